import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from genmodels.metrics.frechet import FeatureSums, frechet_distance, sample_frechet_distance, total


def test_isotropic_gaussians_have_the_closed_form():
    dimensions, sigma = 16, 1.7
    mean = np.random.default_rng(0).normal(size=dimensions)
    distance = frechet_distance(np.zeros(dimensions), np.eye(dimensions), mean, sigma**2 * np.eye(dimensions))
    assert distance == pytest.approx((mean**2).sum() + dimensions * (sigma - 1) ** 2, abs=1e-9)


def test_full_covariances_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(1)
    a, b = (m @ m.T for m in rng.normal(size=(2, 8, 8)))
    means = rng.normal(size=(2, 8))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(means[0], a, means[1], b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(means[1], b, means[0], a) == pytest.approx(expected, abs=1e-9)


def test_singular_covariances_are_exact():
    zero, one = np.zeros((3, 3)), np.diag([4.0, 0.0, 0.0])
    mean = np.zeros(3)
    assert frechet_distance(mean, zero, mean + 2, zero) == pytest.approx(12, abs=1e-12)
    assert frechet_distance(mean, one, mean, zero) == pytest.approx(4, abs=1e-12)
    assert frechet_distance(mean, one, mean, np.diag([0.0, 9.0, 0.0])) == pytest.approx(13, abs=1e-12)
    rng = np.random.default_rng(2)
    features = rng.normal(size=(10, 40))  # rank 9 in 40 dimensions
    assert sample_frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert sample_frechet_distance(features, features + 0.5) == pytest.approx(10, abs=1e-9)


def test_samples_approach_the_gaussians_they_come_from():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(20000, 4)), rng.normal(size=(20000, 4)) * 2 + 1
    assert sample_frechet_distance(a, b) == pytest.approx(8, abs=0.3)
    assert 0 <= sample_frechet_distance(a[:10000], a[10000:]) < 0.01


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.zeros(2), np.eye(2) * np.nan, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="two samples or more"):
        sample_frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))


def test_torchmetrics_agrees():
    class Features(nn.Module):
        num_features = 6

        def forward(self, images):
            return images.flatten(1)

    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(700, 6)) @ rng.normal(size=(6, 6)) + 1
    theirs = FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(1, 2, 3))
    theirs.set_dtype(torch.float64)
    for features, real in ((a, True), (b, False)):
        theirs.update(torch.from_numpy(features).view(-1, 1, 2, 3), real=real)
    assert sample_frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_sums_of_parts_are_those_of_the_whole_in_any_order():
    features = np.random.default_rng(5).normal(size=(1000, 7)).astype(np.float32) + 3
    whole = FeatureSums.of(features)
    parts = [FeatureSums.of(part) for part in np.array_split(features, 7)]
    for sums in (total(parts), total(parts[::-1]), total(parts) + parts[0] - parts[0]):
        assert sums.count == 1000
        np.testing.assert_allclose(sums.gaussian().covariance, whole.gaussian().covariance, rtol=1e-10)
    np.testing.assert_allclose(
        whole.gaussian().covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10
    )
    np.testing.assert_allclose(whole.gaussian().mean, features.astype(np.float64).mean(0), rtol=1e-12)
    with pytest.raises(ValueError, match="NaN"):
        whole.add(np.full((1, 7), np.nan))


@pytest.mark.parametrize("samples", [400, 20])
def test_the_quick_distance_is_the_distance_also_of_singular_covariances(samples):
    rng = np.random.default_rng(0)
    a, b = (FeatureSums.of(rng.normal(size=(samples, 40)) * scale).gaussian() for scale in (1.0, 1.5))
    assert a.quick_distance(b) == pytest.approx(a.distance(b), rel=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        a.quick_distance(FeatureSums.of(rng.normal(size=(9, 3))).gaussian())
