"""Image to image from pairs: it learns, follows the image that it is given, exports and draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from genmodels.drawing import open_drawing_model
from genmodels.families import build_objective
from genmodels.gan.pix2pix import Pix2Pix
from genmodels.gan.translation import TranslationModel
from genmodels.gan.translation_config import Pix2PixConfig
from genmodels.objective import Batch, Drawing
from tests.genmodels import tiny


def config(**changes: Any) -> Pix2PixConfig:
    small = {"image_size": 16, "channels": 8, "largest": 16, "discriminator": {"channels": 8, "layers": 2}}
    return Pix2PixConfig.model_validate({**small, **changes})


def make(**changes: Any) -> Pix2Pix:
    torch.manual_seed(0)
    made = build_objective(config(**changes))
    assert isinstance(made, Pix2Pix)
    return made


def pairs(size: int = 8, first: int = 0) -> Batch:
    """Grey images and their own in colour: what is made of a grey one is known."""
    batch = tiny.batch(size, first_seed=first)
    grey = torch.nn.functional.avg_pool2d(batch["images"].mean(1, keepdim=True), 4).repeat_interleave(4, 2)
    grey = grey.repeat_interleave(4, 3)
    batch["condition_images"] = grey.expand(-1, 3, -1, -1).contiguous()
    batch["images"] = torch.cat([grey, -grey, grey / 2], dim=1)
    return batch


def test_patches_of_the_paper_are_70_pixels() -> None:
    made = make(image_size=128, discriminator={"channels": 4, "layers": 3}).discriminator
    images = torch.randn(1, 6, 128, 128, requires_grad=True)
    scores = made.layers[0:1](images)
    for layer in made.layers[1:]:
        scores = layer(scores) if not isinstance(layer, torch.nn.GroupNorm) else scores  # which sees the whole image
    middle = scores.shape[-1] // 2
    (gradient,) = torch.autograd.grad(scores[0, 0, middle, middle], images)
    reached = gradient[0].abs().sum(0)
    assert int((reached.sum(0) > 0).sum()) == int((reached.sum(1) > 0).sum()) == 70


def test_the_losses_are_the_papers() -> None:
    objective, batch = make(l1_weight=10.0), pairs()
    found, other = objective.discriminator_loss(batch), objective.generator_loss(batch)
    with torch.no_grad():
        made = objective.translate(batch, "discriminator")
        assert made.equal(objective.translate(batch, "generator")), "without dropout nothing is random"
        given = batch["condition_images"]
        real, fake = (objective.discriminator(torch.cat([given, x], 1)) for x in (batch["images"], made))
        soft = torch.nn.functional.softplus
        torch.testing.assert_close(found.loss, (soft(-real).mean() + soft(fake).mean()) / 2)
        distance = (made - batch["images"]).abs().mean()
        torch.testing.assert_close(other.loss, soft(-fake).mean() + 10 * distance)
    assert not objective.phases[0].couples_samples


def test_it_learns_what_becomes_of_an_image_and_fails_when_told_another() -> None:
    objective = make()
    optimizers = {
        name: torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.5, 0.99))
        for name, network in objective.networks.items()
    }
    held_out = pairs(16, first=10_000)
    with torch.no_grad():
        before = objective.validate(held_out)["loss"]
    for step in range(120):
        batch = pairs(16, first=16 * step)
        for phase in objective.phases:
            for name, network in objective.networks.items():
                network.requires_grad_(name == phase.network)
            optimizers[phase.network].zero_grad()
            phase.loss(batch).loss.backward()
            optimizers[phase.network].step()
    shuffled = {**held_out, "condition_images": held_out["condition_images"].roll(1, 0)}
    with torch.no_grad():
        after, other = objective.validate(held_out), objective.validate(shuffled)
    loss = float(after["loss"].total / after["loss"].count)
    assert loss < 0.3 * float(before.total / before.count) and loss < 0.08
    assert float(other["loss"].total / other["loss"].count) > 2 * loss


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_export_draws_the_same(dropout: float, tmp_path: Path) -> None:
    objective, batch = make(dropout=dropout), pairs(4)
    assert objective.export(tmp_path / "export")["layout"] == "own" and objective.flops_per_sample() > 1e4
    model = open_drawing_model(tmp_path / "export")
    assert isinstance(model, TranslationModel) and model.given_size == 16
    given = ((batch["condition_images"] + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    seeds = batch["seeds"].tolist()
    drawn = model.draw(None, seeds, images=given, batch_size=3, num_steps=10)
    batch["condition_images"] = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = objective.draw(batch, Drawing())
    pixels = ((expected / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.abs(pixels.astype(int) - drawn.astype(int)).max() <= 1
    again = model.draw(None, [each + 9 for each in seeds], images=given)
    assert (np.abs(again.astype(int) - drawn).max() > 0) == (dropout > 0), "dropout is the noise"
    with pytest.raises(ValueError, match="needs 4 images of 16 by 16 pixels, got none"):
        model.draw(None, seeds)
    with pytest.raises(ValueError, match="told an image, and no prompts"):
        model.draw(["a"], [1], images=given[:1])
    other = make(dropout=dropout)
    other.load_weights(tmp_path / "export")
    assert other.generator.down[0].weight.equal(objective.generator.down[0].weight)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_size": 20, "halvings": 3}, "image_size 20 is not a multiple of 8"),
        ({"discriminator": {"layers": 3}}, "layers=3 leaves nothing of 16 pixels: less"),
        ({"image_condition": {"kind": "member", "dropout": 0.1}}, "the given image is all there is"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        config(**changes)
