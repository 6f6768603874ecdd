"""The alarm goes off at three kinds of collapse, and not for healthy samples, bad ones, or features in other units."""

from __future__ import annotations

import numpy as np
import pytest

from genmodels.metrics.collapse import condition_variety, measure_variety
from pipelines.demo.classifier import digits_extractor
from pipelines.demo.evaluation import real_pictures

COUNT = 300


def modes(seed: int, which: int | None = None, count: int = COUNT) -> np.ndarray:
    """Ten clusters in 16 dimensions; or one of them."""
    rng = np.random.default_rng(seed)
    centres = 4 * np.random.default_rng(99).standard_normal((10, 16))
    chosen = rng.integers(10, size=count) if which is None else np.full(count, which)
    return centres[chosen] + rng.standard_normal((count, 16))


def collapses(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    few = modes(seed, count=12)
    return {
        "one picture": modes(seed)[:1] + 0.01 * rng.standard_normal((COUNT, 16)),
        "few pictures": few[rng.integers(12, size=COUNT)] + 0.01 * rng.standard_normal((COUNT, 16)),
        "one mode": modes(seed, which=3),
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_goes_off_at_three_kinds_of_collapse_and_is_quiet_on_healthy_samples(seed: int) -> None:
    real, others = modes(10), modes(11)
    for kind, drawn in collapses(seed).items():
        assert measure_variety(drawn, real, others).collapsed, kind
    healthy = measure_variety(modes(seed), real, others)
    assert not healthy.collapsed and healthy.coverage == pytest.approx(1, abs=0.15)
    # Bad ones are no collapse, nor is another unit.
    noisy = modes(seed) + 2 * np.random.default_rng(seed).standard_normal((COUNT, 16))
    assert not measure_variety(noisy, real, others).collapsed
    assert not measure_variety(1e3 * modes(seed), 1e3 * real, 1e3 * others).collapsed


def test_on_pictures_of_digits() -> None:
    """By the features of the demo's classifier: real digits, one digit over and over, each digit once, ones alone."""
    pictures, wanted = real_pictures("held_out", 32, 0)
    features = digits_extractor()(pictures).features
    order = np.random.default_rng(0).permutation(len(features))
    third = len(order) // 3
    real, others, healthy = (features[order[i * third : (i + 1) * third]] for i in range(3))
    assert not measure_variety(healthy, real, others).collapsed
    digits = np.array([each.digit for each in wanted])
    first = [int(np.flatnonzero(digits == digit)[0]) for digit in range(10)]
    once = features[np.resize(first, third)]
    for kind, drawn in (
        ("one picture", np.repeat(healthy[:1], third, axis=0)),
        ("one of each digit", once),
        ("a single digit", np.resize(features[digits == 1], (third, features.shape[1]))),
    ):
        found = measure_variety(drawn, real, others)
        assert found.collapsed and all(0 <= share < 1.2 for share in found[:4]), kind


def test_a_latent_that_is_ignored_is_seen_however_varied_the_conditions_are() -> None:
    rng = np.random.default_rng(0)
    conditions = modes(1)
    assert condition_variety(conditions, conditions + 0.01 * rng.standard_normal((COUNT, 16))) < 0.01
    own = [conditions + rng.standard_normal((COUNT, 16)) for _ in range(2)]
    assert 0.2 < condition_variety(*own) < 0.6
    assert condition_variety(modes(2), modes(3)) == pytest.approx(1, abs=0.1)
    assert not measure_variety(conditions, modes(10), modes(11)).collapsed, "the others do not see it"
    in_order, named = np.repeat(modes(4)[:2], COUNT // 2, axis=0), ["one"] * (COUNT // 2) + ["two"] * (COUNT // 2)
    ignored = [in_order + 0.01 * rng.standard_normal(in_order.shape) for _ in range(2)]
    assert condition_variety(*ignored) > 0.2, "neighbours are of one condition, where they are in order"
    assert condition_variety(*ignored, named) < 0.05
    with pytest.raises(ValueError, match="two different conditions"):
        condition_variety(*ignored, ["one"] * len(in_order))
    with pytest.raises(ValueError, match="two pictures for each of two conditions"):
        condition_variety(conditions[:1], conditions[:1])


def test_too_few_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="19 pictures cannot be judged: 20 are needed"):
        measure_variety(modes(0)[:19], modes(1), modes(2))
    with pytest.raises(ValueError, match="NaN"):
        measure_variety(np.full((30, 16), np.nan), modes(1), modes(2))
