"""Image to image from two sets that do not belong together: cycles, the pool, both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from genmodels.drawing import open_drawing_model
from genmodels.families import SideBySideConfig, build_objective
from genmodels.gan.cycle import CycleGan
from genmodels.gan.image_pool import ImagePool
from genmodels.gan.networks.translation import Pair
from genmodels.gan.translation import TranslationModel
from genmodels.objective import Batch, Drawing
from genmodels.side_by_side import SideBySide
from tests.genmodels import tiny


def make(**changes: Any) -> CycleGan:
    torch.manual_seed(0)
    made = build_objective(tiny.cycle_config(**changes))
    assert isinstance(made, CycleGan)
    return made


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images


def test_generators_that_undo_each_other_have_no_cycle_loss() -> None:
    objective, batch = make(), tiny.unpaired()
    objective.generator = Pair({"ab": _Scale(-0.5), "ba": _Scale(-2.0)})
    with torch.no_grad():
        assert float(objective.generator_loss(batch).metrics["cycle"].total) == pytest.approx(0, abs=1e-6)
        assert float(objective.validate(batch)["loss"].total) == pytest.approx(0, abs=1e-6)
        objective.generator = Pair({"ab": _Scale(-0.5), "ba": _Scale(-1.0)})
        assert float(objective.generator_loss(batch).metrics["cycle"].total) > 0.1


def test_the_losses_are_the_papers() -> None:
    objective, batch = make(cycle_weight=10.0, identity_weight=5.0), tiny.unpaired()
    a, b, ab, ba = batch["images"], batch["other"]["images"], objective.generator["ab"], objective.generator["ba"]
    judge_a, judge_b = objective.discriminator["a"], objective.discriminator["b"]
    with torch.no_grad():
        objective.prepare([batch])
        torch.testing.assert_close(batch["shown b"], ab(a))
        of_discriminators = sum(
            ((judge(real) - 1).square().mean() + judge(made).square().mean()) / 2
            for judge, real, made in ((judge_a, a, ba(b)), (judge_b, b, ab(a)))
        )
        torch.testing.assert_close(objective.discriminator_loss(batch).loss, of_discriminators)
        game = (judge_b(ab(a)) - 1).square().mean() + (judge_a(ba(b)) - 1).square().mean()
        cycle = (ba(ab(a)) - a).abs().mean() + (ab(ba(b)) - b).abs().mean()
        identity = (ab(b) - b).abs().mean() + (ba(a) - a).abs().mean()
        torch.testing.assert_close(objective.generator_loss(batch).loss, game + 10 * cycle + 5 * identity)


def test_a_quarantined_sample_of_either_set_counts_for_nothing() -> None:
    losses = []
    for fill in (0.0, 1.0):
        objective, batch = make(), tiny.unpaired()
        batch["weight"][0] = batch["other"]["weight"][2] = 0
        batch["images"][0], batch["other"]["images"][2] = fill, fill
        with torch.no_grad():
            objective.prepare([batch])
            losses.append([phase.loss(batch).loss for phase in objective.phases])
        assert len(objective.pools["a"].images) == 2
    assert losses[0] == losses[1]


def test_the_pool_shows_older_images_half_of_the_time() -> None:
    pool, seeds = ImagePool(50), torch.arange(2000)
    images = torch.arange(2000.0)[:, None, None, None].expand(-1, 3, 1, 1)
    weight = torch.ones(2000)
    first = pool.exchange(images[:50], seeds[:50], weight[:50])
    assert first.equal(images[:50]) and len(pool.images) == 50
    shown = pool.exchange(images[50:], seeds[50:], weight[50:])
    older = (shown != images[50:]).flatten(1).any(1)
    assert 0.46 < older.float().mean() < 0.54
    assert (shown[older] < images[50:][older]).all(), "no image comes before it was made"
    assert len({float(image[0, 0, 0]) for image in pool.images}) == 50
    assert len({float(each) for each in shown[:, 0, 0, 0]}) == len(shown), "one leaves the pool as it is shown"
    copy = ImagePool(50)
    copy.load("pool", pool.tensors("pool"))
    assert copy.exchange(images[:9], seeds[:9], weight[:9]).equal(pool.exchange(images[:9], seeds[:9], weight[:9]))
    none = ImagePool(0)
    assert none.exchange(images[:9], seeds[:9], weight[:9]).equal(images[:9]) and none.tensors("pool") == {}


def test_side_by_side_each_is_shown_what_it_made_itself() -> None:
    alone = make(), make(cycle_weight=1.0)
    with torch.no_grad():
        alone[1].generator.get_parameter("ab.layers.0.weight").mul_(2)
    members = {"one": alone[0].config, "two": alone[1].config}
    together = SideBySide(SideBySideConfig(members=members), {"one": alone[0], "two": alone[1]})
    batch, expected = tiny.unpaired(), []
    with torch.no_grad():
        for member in alone:
            own = tiny.unpaired()
            member.prepare([own])
            expected += [phase.loss(own).loss for phase in member.phases]
            member.pools = {name: ImagePool(20, name) for name in member.pools}
        together.prepare([batch])
        found = [phase.loss(batch).loss for phase in together.phases]
    assert found == expected and expected[0] != expected[2]


def _sets(size: int, first: int) -> Batch:
    """A: smooth images that are dark at the top; B: of other samples, with all brightness turned round."""
    batch = tiny.unpaired(size, first)
    for part, sign in ((batch, 1), (batch["other"], -1)):
        smooth = interpolate(avg_pool2d(part["images"], 8), scale_factor=8, mode="nearest")
        ramp = torch.linspace(-0.7, 0.7, 16)[None, None, :, None]
        part["images"] = sign * (0.5 * smooth + ramp).clamp(-1, 1)
    return batch


def test_it_learns_what_sets_have_apart_without_pairs() -> None:
    objective = make(identity_weight=0.0, channels=8)
    optimizers = {
        name: torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.5, 0.99))
        for name, network in objective.networks.items()
    }
    for step in range(150):
        batch = _sets(8, 1000 * step)
        with torch.no_grad():
            objective.prepare([batch])
        for phase in objective.phases:
            for name, network in objective.networks.items():
                network.requires_grad_(name == phase.network)
            optimizers[phase.network].zero_grad()
            phase.loss(batch).loss.backward()
            optimizers[phase.network].step()
    held_out = _sets(16, 10**6)
    with torch.no_grad():
        made = objective.draw(held_out, Drawing())
    top, bottom = made[:, :, :4].mean((1, 2, 3)), made[:, :, 12:].mean((1, 2, 3))
    assert (top > bottom).float().mean() > 0.9, "as images of B are"
    assert ((held_out["images"][:, :, :4].mean((1, 2, 3)) < 0).float().mean()) == 1


def test_the_export_draws_the_same_in_both_directions(tmp_path: Path) -> None:
    objective, batch = make(), tiny.unpaired()
    assert objective.export(tmp_path / "export")["layout"] == "own" and objective.flops_per_sample() > 1e4
    model = open_drawing_model(tmp_path / "export")
    assert isinstance(model, TranslationModel) and not model.conditional
    given = ((batch["images"] + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    images = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1
    seeds = batch["seeds"].tolist()
    for direction in ("ab", "ba"):
        drawn = model.draw(None, seeds, images=given, direction=direction, batch_size=3)
        with torch.no_grad():
            expected = ((objective.generator(direction, images) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(expected - drawn).max() <= 1
    with pytest.raises(ValueError, match="no direction 'aa' of this model, only ab and ba"):
        model.draw(None, seeds, images=given, direction="aa")
    other = make()
    with torch.no_grad():
        other.generator.get_parameter("ab.layers.0.weight").zero_()
    other.load_weights(tmp_path / "export")
    assert all(x.equal(y) for x, y in zip(other.generator.parameters(), objective.generator.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_size": 18, "halvings": 2}, "image_size 18 is not a multiple of 4"),
        ({"image_size": 8, "halvings": 2}, "image_size 8 is not a multiple of 4 with 4 pixels left"),
        ({"discriminator": {"layers": 3}}, "layers=3 leaves nothing of 16 pixels: less"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        tiny.cycle_config(**changes)
