"""The decoder: what it depends on, how it is trained without parts of it, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genmodels.diffusion.network import told_embedding
from genmodels.diffusion.pipeline import TextToImage
from genmodels.families import build_objective
from tests.genmodels import tiny


@pytest.fixture(scope="module")
def objective(inputs: Path) -> Any:
    torch.manual_seed(0)
    made: Any = build_objective(tiny.decoder_config(), inputs)
    made.denoiser.eval()
    return made


def test_its_output_depends_on_the_embedding_and_separately_on_the_text(objective: Any, inputs: Path) -> None:
    batch = tiny.with_tokens(tiny.batch(4), inputs)
    latents, timesteps = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500)
    told = objective.condition(batch, dropout=False)
    assert told["embedding"].shape == (4, 17)
    with torch.no_grad():
        before = objective.denoiser(latents, timesteps, told)
        for name in ("embedding", "text"):
            changed = {**told, name: told[name].roll(1, 0)}
            after = objective.denoiser(latents, timesteps, changed)
            assert ((after - before).abs().flatten(1).amax(1) > 1e-4).all(), name
        # By either way in: the vector that is added to the timestep's, and the tokens of context.
        for way in ("to_vector", "to_tokens"):
            layer = getattr(objective.denoiser.image_projection, way)
            kept = layer.weight.clone()
            layer.weight.zero_()
            assert not torch.allclose(objective.denoiser(latents, timesteps, told), before, atol=1e-5), way
            layer.weight.copy_(kept)
        assert objective.denoiser(latents, timesteps, told).equal(before)


def test_embedding_and_caption_are_dropped_by_themselves(inputs: Path) -> None:
    config = tiny.decoder_config(condition_dropout=0.5, image_embedding={"clip": "given", "dropout": 0.1, "tokens": 2})
    torch.manual_seed(0)
    made: Any = build_objective(config, inputs)
    batch = tiny.with_tokens(tiny.batch(2), inputs)
    many = {
        "seeds": torch.arange(4000),
        "token_ids": batch["token_ids"][:1].expand(4000, -1),
        "weight": torch.ones(4000),
    }
    many["images"] = batch["images"][:1].expand(4000, -1, -1, -1)
    told = made.condition(many, dropout=True)
    known = told["embedding"][:, -1] == 1
    captioned = (told["text"] != made.empty_ids).any(1)
    for found, share in ((known, 0.9), (captioned, 0.5), (known & captioned, 0.45)):
        assert abs(float(found.float().mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert (told["embedding"][~known] == 0).all()
    nothing = made.nothing(tiny.with_tokens(tiny.batch(2), inputs))
    assert (nothing["embedding"] == 0).all() and nothing["embedding"].shape == (2, 17)


def test_stored_embeddings_and_images_give_the_same_loss(inputs: Path) -> None:
    batch = tiny.with_tokens(tiny.batch(6), inputs)
    losses = []
    for member in (None, "clip.npy"):
        torch.manual_seed(0)
        made: Any = build_objective(tiny.decoder_config(image_embedding={"clip": "given", "member": member}), inputs)
        stored = made.clip.embed_images(batch["images"]).half()
        losses.append(float(made.loss({**batch, "image_embeddings": stored}).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_stored_latents_and_images_give_the_same_loss(inputs: Path) -> None:
    batch = tiny.with_tokens(tiny.batch(6), inputs)
    losses = []
    for member in (None, "latent.npy"):
        torch.manual_seed(0)
        made: Any = build_objective(tiny.diffusion_config(latent_member=member), inputs)
        moments = made.autoencoder.moments(batch["images"])
        assert moments.shape[1:] == made.autoencoder.moments_shape(16)
        given = {key: value for key, value in batch.items() if key != "images"} if member else dict(batch)
        losses.append(float(made.loss({**given, "latent_moments": moments.half().float()}).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_export_draws_the_same_and_says_whose_embeddings_it_takes(
    objective: Any, inputs: Path, tmp_path: Path
) -> None:
    assert objective.export(tmp_path)["layout"] == "own"
    model = TextToImage.from_folder(tmp_path)
    assert model.takes_embedding and model.conditional and model.clip is not None
    assert model.clip.digest == objective.clip.digest
    images = tiny.batch(3)["images"]
    embeddings = model.clip.embed_images(images)
    prompts, seeds = ["a red seven", "blue 3", ""], [1, 2, 3]
    drawn = model.draw(prompts, seeds, num_steps=3, embeddings=embeddings)
    alone = model.draw(prompts[1:2], seeds[1:2], num_steps=3, embeddings=embeddings[1:2])
    assert drawn.shape == (3, 8, 8, 3) and abs(alone[0].astype(int) - drawn[1]).max() <= 1
    without = model.draw(prompts, seeds, num_steps=3)
    assert (drawn != without).any() and (drawn != model.draw(prompts, seeds, num_steps=3, embeddings=-embeddings)).any()
    with pytest.raises(ValueError, match="needs 3 embeddings of 16 features, got \\(3, 12\\)"):
        model.draw(prompts, seeds, num_steps=2, embeddings=embeddings[:, :12])
    again: Any = build_objective(tiny.decoder_config(), inputs)
    again.load_weights(tmp_path)
    for name, value in objective.denoiser.state_dict().items():
        assert again.denoiser.state_dict()[name].equal(value), name


def test_a_decoder_without_text_is_told_embeddings_alone(inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made: Any = build_objective(tiny.decoder_config(text_encoder={"kind": "none"}), inputs)
    batch = {key: value for key, value in tiny.batch(3).items() if key != "captions"}
    assert made.loss(batch).loss.isfinite() and "text" not in made.condition(batch, dropout=True)
    made.export(tmp_path)
    model = TextToImage.from_folder(tmp_path)
    assert not model.conditional and model.clip is not None
    embeddings = model.clip.embed_images(batch["images"])
    assert model.draw(None, [1, 2, 3], num_steps=2, embeddings=embeddings).shape == (3, 8, 8, 3)


def test_embeddings_are_taken_in_units_of_their_deviations(objective: Any) -> None:
    projection, clip = objective.denoiser.image_projection, objective.clip
    assert projection.mean.equal(clip.statistics.mean) and projection.deviation.equal(clip.statistics.deviation)
    with torch.no_grad():
        mean, nothing = told_embedding(clip.statistics.mean[None]), torch.zeros(1, 17)
        vector = projection(mean)[0]
        torch.testing.assert_close(vector[0], projection.to_vector.bias + projection.to_vector.weight[:, -1])
        torch.testing.assert_close(projection(nothing)[0][0], projection.to_vector.bias)


def test_what_does_not_go_together_is_refused(inputs: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"denoiser": {"kind": "dit", "width": 16, "depth": 1, "heads": 2}}, "denoiser.kind unet"),
        ({"classes": ["a"], "text_encoder": {"kind": "none"}}, "leave classes and image_condition out"),
        ({"image_condition": {"kind": "blur"}}, "leave classes and image_condition out"),
        ({"denoiser": {**tiny.UNET, "middle_attention": False}}, "middle_attention"),
        ({"latent_member": "latent.npy"}, "latent_member is of an autoencoder"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny.decoder_config(**changes)
    with pytest.raises(ValueError, match="needs clip/ among its inputs"):
        build_objective(tiny.decoder_config(text_encoder={"kind": "none"}), tmp_path)
