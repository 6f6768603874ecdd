"""A frozen CLIP: opened from our exports and from transformers' folders, told apart by what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from genmodels.clip.frozen import FrozenClip, fit
from genmodels.clip.layout import clip_sizes
from genmodels.clip.objective import open_pair
from tests.genmodels import tiny
from tests.genmodels.clip.test_objective import TRANSFORMER


@pytest.fixture(scope="module")
def export(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "export"
    return tiny.write_clip(folder, inputs, image_encoder=TRANSFORMER)


def test_it_embeds_as_the_pair_that_was_exported(export: Path, inputs: Path) -> None:
    clip, batch = FrozenClip.from_folder(export), tiny.with_tokens(tiny.batch(4), inputs)
    pair = open_pair(export)
    with torch.no_grad():
        torch.testing.assert_close(clip.embed_images(batch["images"]), pair.clip.embed_images(batch["images"]))
    features, mask, embeddings = clip.read_texts(batch["token_ids"])
    assert embeddings.equal(pair.embed_texts(batch["captions"])) and features.shape == (4, 12, 16)
    lengths = [len(clip.tokenizer(text)["input_ids"]) for text in batch["captions"]]
    assert mask.sum(1).tolist() == lengths and mask[:, 0].all()
    assert clip_sizes(export) == (16, 16) == (clip.image_size, clip.embedding_dim)


def test_a_folder_of_transformers_is_the_same_clip_and_its_pixels_are_scaled_as_it_says(
    export: Path, tmp_path: Path
) -> None:
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(export, plain)
    (plain / "clip.json").unlink()
    ours, theirs = FrozenClip.from_folder(export), FrozenClip.from_folder(plain)
    assert theirs.digest == ours.digest and clip_sizes(plain) == (16, 16)
    told = json.loads((plain / "preprocessor_config.json").read_text())
    (plain / "preprocessor_config.json").write_text(json.dumps({**told, "image_mean": [0.4, 0.5, 0.6]}))
    moved = FrozenClip.from_folder(plain)
    assert moved.digest != ours.digest
    images = tiny.batch(2)["images"]
    model = CLIPModel.from_pretrained(plain).eval()
    pixels = ((images + 1) / 2 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        pooled = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(moved.embed_images(images), torch.nn.functional.normalize(pooled, dim=1))


def test_other_weights_are_another_clip(export: Path, inputs: Path, tmp_path: Path) -> None:
    same = tiny.write_clip(tmp_path / "same", inputs, image_encoder=TRANSFORMER)
    other = tiny.write_clip(tmp_path / "other", inputs, seed=1, image_encoder=TRANSFORMER)
    known, again, different = (FrozenClip.from_folder(folder).describe() for folder in (export, same, other))
    assert known == again and known["digest"] != different["digest"]
    assert known["embedding_dim"] == 16 and known["statistics"]["count"] == 32  # type: ignore[index]


def test_images_are_resized_as_pillow_does(export: Path) -> None:
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (37, 37, 3), np.uint8)
    images = torch.from_numpy(large).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = np.asarray(Image.fromarray(large).resize((16, 16), Image.Resampling.BICUBIC), np.float32)
    found = (fit(images, 16)[0].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(found.numpy() - expected).max() <= 1.01  # Pillow rounds after each axis
    clip = FrozenClip.from_folder(export)
    assert clip.embed_images(images).equal(clip.embed_images(fit(images, 16)))


def test_a_sentence_that_is_too_long_is_named(export: Path) -> None:
    clip = FrozenClip.from_folder(export)
    clip.check_length(["a red seven"])
    with pytest.raises(ValueError, match=r"'zebra zebra.* has \d+ tokens, and this CLIP reads 12: shorten it"):
        clip.check_length(["a red seven", "zebra " * 20])


def test_what_is_no_clip_is_refused(inputs: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, inputs / "autoencoder"):
        with pytest.raises(ValueError, match="holds no CLIP"):
            FrozenClip.from_folder(folder)
        with pytest.raises(ValueError, match="holds no CLIP"):
            clip_sizes(folder)


def test_embeddings_are_in_float32_under_autocast_too(export: Path) -> None:
    clip, images = FrozenClip.from_folder(export), tiny.batch(3)["images"]
    with torch.autocast("cpu", torch.bfloat16):
        found: Any = clip.embed_images(images)
    assert found.equal(clip.embed_images(images)) and found.dtype == torch.float32
