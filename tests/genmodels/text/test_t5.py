"""Imagen's variant: a frozen T5 reads the captions, its padding is not seen, and predicted images are thresholded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from genmodels.diffusion.pipeline import TextToImage
from genmodels.diffusion.sampler import make_sampler, sampler_settings
from genmodels.families import build_objective
from genmodels.text import tokenizer as tokenizers
from genmodels.text.encoder import fetch_pretrained, open_text_encoder, pretrained_width, read_text
from tests.genmodels import tiny

# Imagen's: most blocks where the image is small, and skip connections scaled.
EFFICIENT = {**tiny.UNET, "layers_per_block": [1, 2], "skip_scale": 0.7071}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5 with a tokenizer of its own, as transformers saves them."""
    folder = tmp_path_factory.mktemp("t5")
    words = Tokenizer(models.Unigram())
    words.normalizer, words.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    words.train_from_iterator(tiny.CAPTIONS * 4, trainer)
    learned = [(piece, score) for piece, score in __import__("json").loads(words.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=learned, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 80, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    fetch_pretrained(str(t5), folder, 10)
    return folder


def config(**changes: Any) -> Any:
    text = {"kind": "pretrained", "path": "given", "width": 16}
    settings = {"autoencoder": None, "image_size": 8, "denoiser": EFFICIENT, "text_encoder": text, **changes}
    return tiny.diffusion_config(noise_schedule="cosine", dynamic_thresholding=0.9, **settings)


def test_it_is_fetched_with_its_tokenizer_and_its_padding_is_not_seen(t5: Path, inputs: Path) -> None:
    encoder, words = open_text_encoder(inputs / "text_encoder"), tokenizers.load(inputs / "tokenizer")
    assert (
        isinstance(encoder, T5EncoderModel)
        and pretrained_width(config(text_encoder={"kind": "pretrained", "path": str(t5)}).text_encoder) == 16
    )
    token_ids = tokenizers.encode(words, tiny.CAPTIONS)
    assert token_ids.shape == (4, 10)
    given = T5Tokenizer.from_pretrained(t5)
    for row, caption in zip(token_ids, tiny.CAPTIONS, strict=True):
        expected = given(caption, truncation=True, max_length=10)["input_ids"]
        assert row[: len(expected)].tolist() == expected and (row[len(expected) :] == 0).all()
    # What a data task computes, without transformers.
    backend = Tokenizer.from_str(tokenizers.tokenizer_json(inputs / "tokenizer"))
    assert [backend.encode(caption).ids for caption in tiny.CAPTIONS] == token_ids.tolist()
    with torch.no_grad():
        read = read_text(encoder, token_ids)
        for number, caption in enumerate(tiny.CAPTIONS):
            short = torch.tensor([given(caption, truncation=True, max_length=10)["input_ids"]])
            alone = encoder(input_ids=short).last_hidden_state[0]
            torch.testing.assert_close(read["text"][number, : short.shape[1]], alone, rtol=1e-4, atol=1e-5)
            assert read["text_mask"][number].sum() == short.shape[1]


def test_the_denoiser_does_not_see_padding_either_and_the_export_draws(inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made: Any = build_objective(config(), inputs)
    batch = tiny.with_tokens(tiny.batch(4, image_size=8), inputs)
    assert made.loss(dict(batch)).loss.isfinite() and made.flops_per_sample() > 1e4
    made.denoiser.eval()
    told = made.condition(batch, dropout=False)
    assert not told["text_mask"].all()
    other = {**told, "text": torch.where(told["text_mask"][..., None], told["text"], told["text"] + 5)}
    noisy, timesteps = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500)
    with torch.no_grad():
        one, two = (made.denoiser(noisy, timesteps, each) for each in (told, other))
        torch.testing.assert_close(one, two)
        made.denoiser.skip_scale = 1.0
        assert not torch.allclose(made.denoiser(noisy, timesteps, told), one, atol=1e-4), "skips are scaled"
        made.denoiser.skip_scale = 0.7071
    layers = [len(block.resnets) for block in made.denoiser.backbone.down_blocks]
    assert layers == [1, 2]
    assert made.export(tmp_path)["layout"] == "own"
    model = TextToImage.from_folder(tmp_path)
    assert isinstance(model.denoiser.text_encoder, T5EncoderModel) and model.denoiser.skip_scale == 0.7071
    drawn = model.draw(tiny.CAPTIONS[:2], [1, 2], num_steps=3)
    assert abs(model.draw(tiny.CAPTIONS[1:2], [2], num_steps=3)[0].astype(int) - drawn[1]).max() <= 1
    with pytest.raises(ValueError, match="padding must not be seen"):
        build_objective(config(denoiser={"kind": "dit", "width": 16, "depth": 1, "heads": 2}), inputs)
    with pytest.raises(ValueError, match="without pooled_text alone takes care"):
        build_objective(config(denoiser={**tiny.UNET, "pooled_text": True}), inputs)


def test_dynamic_thresholding_is_that_of_diffusers_and_keeps_images_in_range() -> None:
    settings = sampler_settings("cosine", "sample", 1000, clip=True, dynamic_thresholding=0.9)
    ours, theirs = make_sampler("ddim", settings), DDIMScheduler.from_config(settings)
    for sampler in (ours, theirs):
        sampler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    noisy, predicted = torch.randn(2, 3, 8, 8, generator=generator), 3 * torch.randn(2, 3, 8, 8, generator=generator)
    found = ours.step(predicted, ours.timesteps[0], noisy)[0]
    expected = theirs.step(predicted, theirs.timesteps[0], noisy, return_dict=False)[0]
    torch.testing.assert_close(found, expected)
    clean = ours.split(predicted, ours.timesteps[0], noisy)[0]
    for image, given in zip(clean, predicted, strict=True):
        threshold = torch.quantile(given.abs().flatten(), 0.9)
        assert threshold > 1
        torch.testing.assert_close(image, given.clamp(-threshold, threshold) / threshold)
    small = predicted / 30  # within [-1, 1]: nothing is scaled
    torch.testing.assert_close(ours.split(small, ours.timesteps[0], noisy)[0], small)
    with pytest.raises(ValueError, match="dynamic_thresholding is of pixels"):
        tiny.diffusion_config(dynamic_thresholding=0.995)
