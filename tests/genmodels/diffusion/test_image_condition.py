"""Images as conditions: how they are made, that they are told whole, and that a trained model follows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy.ndimage import gaussian_filter

from genmodels.diffusion.config import ImageConditionConfig
from genmodels.diffusion.image_condition import (
    blurred,
    condition_channels,
    edges,
    fold,
    from_batch,
    from_given,
    random_rectangles,
    reduced,
    upsampled,
)
from genmodels.diffusion.pipeline import TextToImage
from genmodels.families import build_objective
from genmodels.metrics.frechet import frechet_distance
from genmodels.metrics.image import psnr
from pipelines.demo.digits import SPLITS, paint, stroke_mask
from tests.genmodels import tiny

KINDS = ["low_resolution", "blur", "noise", "edges", "mask"]
PIXELS = {"autoencoder": None, "text_encoder": {"kind": "none"}}


def config_of(kind: str, **settings: object) -> ImageConditionConfig:
    return TypeAdapter(ImageConditionConfig).validate_python({"kind": kind, **settings})


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 4])
def test_nothing_of_it_is_lost_in_folding(kind, factor):
    config, given = config_of(kind), from_batch(config_of(kind), {"images": images(), "seeds": torch.arange(4)})
    folded = fold(given, factor)
    assert folded.shape == (4, condition_channels(config, factor), 16 // factor, 16 // factor)
    assert torch.nn.functional.pixel_shuffle(folded, factor).equal(given)


def test_blur_is_scipys():
    expected = gaussian_filter(images().numpy(), (0, 0, 1.5, 1.5), mode="nearest", radius=(0, 0, 4, 4))
    torch.testing.assert_close(blurred(images(), 1.5), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_edges_are_where_the_colour_changes():
    flat = torch.full((1, 3, 8, 8), -1.0)
    flat[:, 1, 2:5, 3:6] = 1.0
    found = edges(flat, 0.5)[0, 0] > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 3] = expected[2:5, 6] = expected[2, 3:6] = expected[5, 3:6] = True
    assert found.equal(expected)


def test_masks_are_rectangles_that_depend_on_the_seed_alone():
    masks = random_rectangles(torch.arange(500), 16, 0.5)
    assert masks[7:8].equal(random_rectangles(torch.tensor([7]), 16, 0.5))
    heights, widths = masks.amax(3).sum(2), masks.amax(2).sum(2)
    assert (masks.sum((2, 3)) == heights * widths).all()
    assert heights.min() == 1 and heights.max() == 8 and len(widths.unique()) == 8
    assert masks[..., 0, :].any() and masks[..., -1, :].any() and masks[..., 0].any() and masks[..., -1].any()


@pytest.mark.parametrize("kind", ["low_resolution", "mask"])
def test_what_is_given_in_drawing_is_what_was_told_in_training(kind):
    config, seeds = config_of(kind, **({"factor": 4} if kind == "low_resolution" else {})), torch.arange(4)
    told = from_batch(config, {"images": images(), "seeds": seeds})
    if kind == "mask":
        masks = random_rectangles(seeds, 16, config.largest)
        hidden = torch.where(masks.bool(), torch.rand(4, 3, 16, 16), images())  # whatever is under the mask
        assert from_given(config, hidden, masks).equal(told)
    else:
        assert from_given(config, reduced(images(), 4)).equal(told)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_previews_and_draws_the_same_from_its_export(inputs, tmp_path, kind, dropout):
    told = {"kind": kind, "dropout": dropout} | ({"factor": 4} if kind == "low_resolution" else {})
    torch.manual_seed(0)
    objective = build_objective(tiny.diffusion_config(image_condition=told), inputs)
    batch = tiny.with_tokens(tiny.batch(3), inputs)
    loss = objective.loss(batch).loss
    loss.backward()
    assert loss.isfinite() and objective.flops_per_sample() > 0
    changed = objective.loss({**batch, "images": batch["images"].flip(0)}).loss
    assert changed != loss
    assert objective.export(tmp_path)["layout"] == "own"
    model = TextToImage.from_folder(tmp_path)
    given = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3) if kind == "low_resolution" else (3, 16, 16, 3))
    masks = np.zeros((3, 16, 16), dtype=bool)
    masks[:, 4:9, 3:12] = True
    options = {"num_steps": 2, "images": given.astype(np.uint8)} | ({"masks": masks} if kind == "mask" else {})
    drawn = model.draw(tiny.CAPTIONS[:3], [1, 2, 3], **options)
    alone = model.draw(tiny.CAPTIONS[:3], [1, 2, 3], **options, batch_size=1)
    assert np.abs(drawn.astype(int) - alone).max() <= 1
    if kind == "mask":
        assert (drawn[~masks] == given[~masks]).all() and (drawn[masks] != given[masks]).any()
    for wrong, said in (({}, "this model takes images"), ({"images": given[:2].astype(np.uint8)}, "needs 3 images")):
        with pytest.raises(ValueError, match=said):
            model.draw(tiny.CAPTIONS[:3], [1, 2, 3], **wrong)
    with torch.no_grad():
        assert objective.preview(batch).images.isfinite().all()


def test_dropped_images_are_told_as_nothing(inputs):
    objective = build_objective(tiny.diffusion_config(image_condition={"kind": "blur", "dropout": 0.3}), inputs)
    batch = tiny.with_tokens(tiny.batch(200), inputs)
    dropped = objective.condition(batch, dropout=True)["image"].flatten(1).abs().sum(1) == 0
    assert 30 < dropped.sum() < 90
    text = objective.condition(batch, dropout=True)["text"]
    no_text = (text == objective._empty(text)).all(1)
    assert (no_text & ~dropped).any() and (dropped & ~no_text).any()  # each by its own lot
    assert objective.condition(batch, dropout=False)["image"].flatten(1).abs().sum(1).min() > 0


def digits(split: str, count: int) -> np.ndarray:
    """Real digits of 32 pixels, white on black: uint8 (count, 32, 32, 3)."""
    sources = SPLITS[split][:count]
    return np.stack([paint(stroke_mask(source, 32), "white", "black") for source in sources])


def train(told: dict, steps: int = 250) -> object:
    """A small model in pixels, trained on the training digits alone."""
    torch.manual_seed(0)
    unet = {
        "kind": "unet",
        "channels": [16, 32],
        "attention": [False, True],
        "head_dim": 16,
        "layers_per_block": 1,
        "norm_groups": 8,
    }
    config = tiny.diffusion_config(
        **PIXELS,
        image_size=32,
        denoiser=unet,
        image_condition=told,
        prediction_type="v_prediction",
        noise_schedule="cosine",
    )
    objective = build_objective(config)
    optimizer = torch.optim.AdamW(objective.denoiser.parameters(), 2e-3)
    data = torch.from_numpy(digits("train", 1500)).permute(0, 3, 1, 2).float() / 127.5 - 1
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        seeds = torch.arange(step * 16, (step + 1) * 16)
        rows = torch.randint(0, len(data), (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        objective.loss({"images": data[rows], "seeds": seeds, "weight": torch.ones(16), "step": step}).loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.denoiser.parameters(), 1.0)
        optimizer.step()
    return objective


def drawn_from(objective, tmp_path, given: np.ndarray, masks: np.ndarray | None = None) -> torch.Tensor:
    """float32 (count, 3, 32, 32) in [-1, 1]."""
    objective.export(tmp_path)
    model = TextToImage.from_folder(tmp_path)
    drawn = model.draw(None, list(range(len(given))), num_steps=10, guidance_scale=1, images=given, masks=masks)
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def moments(pictures: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of all 4×4 pieces: what sharp and blurred strokes differ in."""
    pieces = torch.nn.functional.unfold(pictures[:, :1], 4, stride=2).transpose(1, 2).flatten(0, 1).double().numpy()
    return pieces.mean(0), np.cov(pieces, rowvar=False)


@pytest.mark.slow
def test_super_resolution_beats_bicubic_and_fails_on_shuffled_inputs(tmp_path):
    objective = train({"kind": "low_resolution", "factor": 4})
    real = torch.from_numpy(digits("held_out", 64)).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = reduced(real, 4)
    pixels = ((small + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    ours, bicubic = drawn_from(objective, tmp_path / "a", pixels), upsampled(small, 32)
    shuffled = drawn_from(objective, tmp_path / "b", np.roll(pixels, 1, axis=0))
    decibels = [psnr(pictures, real).mean().item() for pictures in (ours, bicubic, shuffled)]
    distance = [frechet_distance(*moments(pictures), *moments(real)) for pictures in (ours, bicubic)]
    print("super-resolution, bicubic, shuffled: dB", decibels, "Fréchet distance of 4×4 pieces:", distance)
    assert decibels[0] > decibels[1] + 1 and decibels[2] < decibels[1] - 3
    assert distance[0] < 0.5 * distance[1]


@pytest.mark.slow
def test_edges_are_followed(tmp_path):
    objective = train({"kind": "edges"})
    pixels = digits("held_out", 64)
    real = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    ours = drawn_from(objective, tmp_path, pixels)
    wanted, found = (edges(x, 0.5) > 0 for x in (real, ours))
    agreement = ((wanted & found).sum() / (wanted | found).sum()).item()
    by_chance = ((wanted & found.roll(1, 0)).sum() / (wanted | found.roll(1, 0)).sum()).item()
    print(f"edges: intersection over union {agreement:.2f}, with another picture's {by_chance:.2f}")
    assert agreement > 0.6 and by_chance < 0.35


def test_another_image_of_the_sample_is_told_as_it_is(tmp_path):
    inputs = tiny.write_inputs(tmp_path / "inputs")
    objective = build_objective(tiny.diffusion_config(image_condition={"kind": "member", "member": "map.png"}), inputs)
    batch = tiny.with_tokens(tiny.batch(2), inputs)
    batch["condition_images"] = torch.rand(2, 3, 16, 16) * 2 - 1
    told = objective.condition(batch, dropout=False)["image"]
    assert torch.equal(told, fold(batch["condition_images"], 4))
    torch.nn.init.normal_(objective.denoiser.backbone.conv_out.weight)
    other = {**batch, "condition_images": -batch["condition_images"]}
    assert objective.loss(batch).loss != objective.loss(other).loss
    objective.export(tmp_path / "out")
    model = TextToImage.from_folder(tmp_path / "out")
    assert model.given_size == 16 and not model.takes_mask
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    drawn = model.draw(["a red seven on a white background"] * 2, [1, 1], num_steps=2, images=pixels)
    assert drawn.shape == (2, 16, 16, 3) and (drawn[0] != drawn[1]).any()
