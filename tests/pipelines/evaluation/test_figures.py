"""Figures do not depend on the order in which pictures come: neighbouring ones may be alike."""

from __future__ import annotations

import numpy as np
import pytest

from genmodels.metrics.classes import inception_score
from genmodels.metrics.frechet import FeatureSums, frechet_interval
from genmodels.metrics.kernel import kernel_interval
from infra.errors import BadRequest
from pipelines.evaluation.figures import _inception
from pipelines.evaluation.measure import _check_unused, pair_similarity
from pipelines.evaluation.plan import spread_prompts


@pytest.fixture
def by_class() -> np.ndarray:
    """Ten classes that are far from each other, one after the other."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=(200, 4)) + 5 * rng.normal(size=4) for _ in range(10)])


def test_a_perfect_generator_is_perfect_in_any_order(by_class):
    rng = np.random.default_rng(1)
    real = FeatureSums.of(by_class[::2]).gaussian()
    for features in (by_class[1::2], rng.permutation(by_class[1::2])):
        found = frechet_interval(features, real)
        assert found.low < 0.3 and -0.5 < found.value < 0.5
        for other in (by_class[::2], rng.permutation(by_class[::2])):
            distance = kernel_interval(features, other)
            assert distance.low < 0 < distance.high and abs(distance.value) < 150  # blocks of one class each: 750


def test_the_inception_score_by_blocks_is_that_of_all():
    probabilities = np.random.default_rng(0).dirichlet(np.full(6, 0.2), 300).astype(np.float32)
    found = _inception(probabilities)
    assert found.value + found.bias == pytest.approx(inception_score(probabilities), rel=1e-5)
    assert found.low < found.value < found.high


def test_prompts_are_spread_over_all_captions_and_the_first_few_stand_for_all():
    captions = [f"{number:03d}" for number in range(100)]
    for count in (20, 100, 250):
        prompts = spread_prompts(captions, count)
        often = [prompts.count(caption) for caption in captions]
        assert len(prompts) == count and max(often) - min(often) <= 1
    assert {int(prompt) // 25 for prompt in spread_prompts(captions, 40)[:12]} == {0, 1, 2, 3}


def test_pairs_do_not_depend_on_how_many_come_at_once():
    pictures = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    whole = pair_similarity(pictures)
    assert np.isfinite(whole[::2][:3]).all() and np.isnan(whole[1::2]).all() and np.isnan(whole[6])
    np.testing.assert_allclose(np.concatenate([pair_similarity(pictures[:4]), pair_similarity(pictures[4:])]), whole)


def test_samples_that_cannot_be_used_are_told_and_many_are_refused(capsys):
    _check_unused("held_out", [], 100)
    _check_unused("held_out", ["a: image: missing"], 100)
    assert "held-out: 1 of 100 samples cannot be used, the first: a: image: missing" in capsys.readouterr().err
    with pytest.raises(BadRequest, match="5 of 100"):
        _check_unused("held_out", ["x"] * 5, 100)
