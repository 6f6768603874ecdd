"""Alterations: by seed, with a probability, the same for real and drawn images, and passing gradients on."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from genmodels.gan.augment import augmented
from genmodels.gan.config import Policy

ALL = list(get_args(Policy))
SEEDS = torch.arange(200)


def images(count: int = 200, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("policy", ALL)
def test_each_is_by_its_seed_alone_and_as_often_as_asked(policy: Policy) -> None:
    given = images()
    whole = augmented(given, SEEDS, [policy])
    torch.testing.assert_close(whole[7:9], augmented(given[7:9], SEEDS[7:9], [policy]))
    assert whole.shape == given.shape and not whole.equal(given)
    assert augmented(given, SEEDS, [policy], 0.0).equal(given)
    sometimes = augmented(given, SEEDS, [policy], 0.3)
    changed = (sometimes != given).flatten(1).any(1)
    unlike = (whole != given).flatten(1).any(1)  # half of the flips, and a quarter of the turns, change nothing
    assert 0.18 < float(changed[unlike].float().mean()) < 0.42
    assert sometimes[changed].equal(whole[changed])


@pytest.mark.parametrize("policy", ALL)
def test_gradients_pass_to_drawn_images(policy: Policy) -> None:
    given = images(8).requires_grad_()
    augmented(given, SEEDS[:8], [policy]).square().sum().backward()
    assert given.grad is not None and (given.grad.flatten(1).abs().sum(1) > 0).all()


def test_what_each_does() -> None:
    given = images()
    flipped = augmented(given, SEEDS, ["flip"])
    for image, other in zip(given, flipped, strict=True):
        assert other.equal(image) or other.equal(image.flip(2))
    turned = augmented(given, SEEDS, ["quarter_turn"])
    counts = [0] * 4
    for image, other in zip(given, turned, strict=True):
        counts[next(k for k in range(4) if other.equal(image.rot90(k, (1, 2))))] += 1
    assert min(counts) > 25
    moved = augmented(torch.ones(200, 3, 16, 16), SEEDS, ["translation"])
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    rows, columns = (moved[:, 0].amax(axis) for axis in (2, 1))
    assert rows.sum(1).min() == 14 and columns.sum(1).min() == 14 and rows.sum(1).max() == 16
    holes = augmented(torch.ones(200, 3, 16, 16), SEEDS, ["cutout"])
    sizes = (holes == 0)[:, 0].flatten(1).sum(1)
    assert sizes.max() == 64 and sizes.min() >= 16
    grey = torch.full((200, 3, 16, 16), 0.25)
    coloured = augmented(grey, SEEDS, ["color"])
    torch.testing.assert_close(coloured, coloured[:, :1, :1, :1].expand_as(coloured))  # grey stays grey
    assert coloured[:, 0, 0, 0].std() > 0.2
    turned_round = augmented(grey, SEEDS, ["rotation", "scale"])
    torch.testing.assert_close(turned_round, grey)  # nothing comes in from outside but what is there
