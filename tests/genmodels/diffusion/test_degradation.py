"""What upsamplers are trained on: degradation by seed, noise of a known level, aligned crops, known error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genmodels.diffusion.config import LowResolutionCondition
from genmodels.diffusion.degradation import _cosines, _jpeg, degraded, level_of, noised, random_crops
from genmodels.diffusion.image_condition import blurred, reduced, upsampled
from genmodels.diffusion.pipeline import TextToImage
from genmodels.families import build_objective
from tests.genmodels import tiny


@pytest.mark.parametrize("kind", ["none", "blur", "bsr"])
def test_an_image_is_made_worse_by_its_seed_alone(kind: Any) -> None:
    images, seeds = tiny.batch(5)["images"], torch.arange(5)
    whole = degraded(images, seeds, kind, 1.0)
    for row in range(5):
        alone = degraded(images[row : row + 1], seeds[row : row + 1], kind, 1.0)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)
    changed = (whole - images).abs().flatten(1).amax(1)
    assert (changed == 0).all() if kind == "none" else (changed > 1e-3).all()
    assert whole.shape == images.shape and whole.abs().max() <= 1 + 1e-5
    if kind != "none":
        assert not torch.allclose(degraded(images, seeds + 9, kind, 1.0), whole)


def test_blur_of_one_strength_is_the_gaussian_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    from genmodels.diffusion import degradation

    images = tiny.batch(3)["images"]
    found = degradation._blurred(images, torch.full((3,), 1.3))
    torch.testing.assert_close(found, blurred(images, 1.3), rtol=0, atol=2e-4)  # the kernels end 3 deviations out


def test_jpeg_keeps_what_it_should() -> None:
    basis = _cosines()
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    image = tiny.batch(1)["images"][:, :, :13, :11]
    fine, coarse = (_jpeg(image, quality) for quality in (99.0, 20.0))
    assert fine.shape == image.shape
    assert (fine - image).abs().mean() < 0.02 < 0.1 < (coarse - image).abs().mean()
    flat = torch.full((1, 3, 16, 16), 0.4)
    torch.testing.assert_close(_jpeg(flat, 75.0), flat, rtol=0, atol=8 / 127.5)  # one step of the table's first entry


def test_noise_has_the_deviation_that_its_level_says() -> None:
    level = torch.tensor([0.0, 0.25, 0.5, 1.0])
    image, noise = torch.zeros(4, 3, 64, 64), torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    deviations = noised(image, level, noise).flatten(1).std(1)
    expected = torch.tensor([math.sin(math.pi * float(each) / 2) for each in level])
    torch.testing.assert_close(deviations, expected, rtol=0.04, atol=1e-6)
    assert [level_of(float(each)) for each in expected] == pytest.approx(level.tolist())
    x = tiny.batch(4, image_size=64)["images"]
    assert noised(x, level, noise)[0].equal(x[0])


def test_crops_lie_on_the_grid_of_the_small_image() -> None:
    places = torch.arange(16.0).expand(200, 1, 16, 16)  # a pixel's column
    crops = random_crops(places, torch.arange(200), 8, 4)
    lefts = crops[:, 0, 0, 0]
    assert crops.shape == (200, 1, 8, 8) and set(lefts.tolist()) == {0.0, 4.0, 8.0}
    images, seeds = tiny.batch(6)["images"], torch.arange(6)
    # The small version of a crop is the crop of the small version.
    small = random_crops(reduced(images, 4), seeds, 2, 1)
    torch.testing.assert_close(reduced(random_crops(images, seeds, 8, 4), 4), small)


def _upsampler(**told: Any) -> Any:
    condition = {"kind": "low_resolution", "factor": 2, "augmentation": 0.3, "crop": 8, **told}
    torch.manual_seed(0)
    return build_objective(
        tiny.upsampler_config(image_condition=condition, prediction_type="sample", noise_schedule="cosine")
    )


def test_it_is_trained_on_crops_told_the_level_and_draws_whole_images(tmp_path: Path) -> None:
    objective, batch = _upsampler(), tiny.batch(4)
    view = objective.view(batch)
    assert view["images"].shape == (4, 3, 8, 8) and objective.view(batch) is view
    told = objective.condition(view, dropout=True)
    assert told["image"].shape == (4, 3, 8, 8) and ((told["level"] > 0) & (told["level"] < 0.3)).all()
    assert objective.loss(batch).loss.isfinite()
    whole = _upsampler(crop=None).flops_per_sample()
    assert 3.5 < whole / objective.flops_per_sample() < 4.1, "what is computed in training is counted"
    objective.denoiser.eval()
    noisy, timesteps = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((4,), 300)
    with torch.no_grad():
        one, other = (objective.denoiser(noisy, timesteps, {**told, "level": told["level"] + x}) for x in (0, 0.5))
    assert not torch.allclose(one, other, atol=1e-4)
    assert not any("attentions" in name for name in objective.denoiser.state_dict()), "no attention anywhere"
    objective.export(tmp_path)
    model = TextToImage.from_folder(tmp_path)
    small = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    drawn = model.draw(None, [1, 2], num_steps=2, guidance_scale=1.0, images=small, augmentation_level=0.1)
    assert model.given_size == 8 and drawn.shape == (2, 16, 16, 3)
    clean = model.draw(None, [1, 2], num_steps=2, guidance_scale=1.0, images=small)
    assert (drawn != clean).any()
    with pytest.raises(ValueError, match="crop 9 is not a multiple of factor 2"):
        LowResolutionCondition(factor=2, crop=9)
    with pytest.raises(ValueError, match="crop 32 is more than image_size 16"):
        tiny.upsampler_config(image_condition={"kind": "low_resolution", "factor": 2, "crop": 32})


@pytest.mark.slow
def test_on_a_linear_gaussian_problem_it_reaches_the_known_error_and_needs_its_input() -> None:
    """Pixels are independent normal numbers and the small image their means over squares of four: all that can be known
    of a pixel is that mean, and 3/4 of its variance is left. With cubic enlargement the mean is a linear map of what
    the network is told."""
    torch.manual_seed(0)
    made: Any = _upsampler(augmentation=0.0, crop=None)
    optimizer = torch.optim.AdamW(made.denoiser.parameters(), 4e-3)
    steps, size = 300, 32

    def images(first: int, count: int) -> torch.Tensor:
        return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(first))

    def error(batch: dict[str, Any], told: torch.Tensor) -> float:
        timesteps = torch.full((len(batch["seeds"]),), 999)
        noisy = made.noise_schedule.q_sample(batch["images"], timesteps, images(7, len(told)))
        with torch.no_grad():
            return float((made.denoiser(noisy, timesteps, {"image": told}) - batch["images"]).square().mean())

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        seeds = torch.arange(step * size, (step + 1) * size)
        batch = {"images": images(100 + step, size), "seeds": seeds, "weight": torch.ones(size)}
        optimizer.zero_grad()
        made.loss(batch).loss.backward()
        optimizer.step()
    held_out = {"images": images(1, 64), "seeds": torch.arange(64)}
    told = upsampled(reduced(held_out["images"], 2), 16)
    reached = error(held_out, told)
    # 49,152 pixels: four standard errors of their mean square are 0.02; 5 % are left to learn.
    assert 0.75 - 0.02 < reached < 0.75 * 1.05 + 0.02
    assert error(held_out, told.roll(1, 0)) > 1.1, "with another image's input it is worse than knowing nothing"
