import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from genmodels.metrics.kernel import kernel_distances


def test_one_distribution_has_mean_0_and_goes_negative():
    values = np.concatenate(
        [
            kernel_distances(*np.random.default_rng(seed).normal(size=(2, 500, 8)), block=100)
            for seed in range(20)
        ]
    )  # fmt: skip
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert 0.2 < (values < 0).mean() < 0.8


def test_a_linear_kernel_is_the_distance_of_means_over_the_dimensions():
    rng = np.random.default_rng(0)
    values = kernel_distances(rng.normal(size=(20_000, 4)), rng.normal(size=(20_000, 4)) + 1.0, block=200, degree=1)
    assert values.mean() == pytest.approx(1.0, abs=4 * values.std() / np.sqrt(len(values)))


def test_torchmetrics_agrees():
    a, b = np.random.default_rng(1).normal(size=(2, 300, 16))
    from torchmetrics.image.kid import poly_kernel

    x, y = torch.from_numpy(a), torch.from_numpy(b + 0.3)
    theirs = poly_mmd(x, y, 3, 1 / 16, 1.0)
    assert poly_kernel(x, y).shape == (300, 300)
    assert kernel_distances(a, b + 0.3, block=300) == pytest.approx([float(theirs)], rel=1e-9)


def test_every_sample_is_in_one_block():
    a, b = np.random.default_rng(2).normal(size=(2, 25, 3))
    assert len(kernel_distances(a, b, block=10)) == 2
    with_last = kernel_distances(a, b, block=10)
    a[-1] += 10
    assert (kernel_distances(a, b, block=10) != with_last).tolist() == [False, True]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="two samples or more"):
        kernel_distances(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="NaN"):
        kernel_distances(np.full((3, 2), np.nan), np.zeros((5, 2)))
