import numpy as np
import pytest
from scipy.spatial import cKDTree

from genmodels.metrics import coverage
from genmodels.metrics.copies import copy_share, nearest


@pytest.mark.parametrize("tile", [16, 2048])
def test_the_nearest_is_that_of_a_kd_tree(tile, monkeypatch):
    monkeypatch.setattr(coverage, "TILE", tile)
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(50, 4)), rng.normal(size=(70, 4))
    distance, index = cKDTree(reference).query(samples)
    found = nearest(samples, reference)
    assert found.distance == pytest.approx(distance) and (found.which == index).all()


def test_copies_show_and_fresh_samples_do_not():
    rng = np.random.default_rng(1)
    training, held_out, fresh = rng.normal(size=(3, 2000, 6))
    assert copy_share(fresh, training, held_out) == pytest.approx(0.05, abs=4 * np.sqrt(2 * 0.05 * 0.95 / 2000))
    copied = training + 0.01 * rng.normal(size=training.shape)
    assert copy_share(copied, training, held_out) > 0.99
    half = np.concatenate([fresh[:1000], copied[:1000]])
    assert copy_share(half, training, held_out) == pytest.approx(0.525, abs=0.03)
