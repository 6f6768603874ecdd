import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from genmodels.metrics import coverage
from genmodels.metrics.coverage import density_and_coverage, neighbour_radii, precision_and_recall


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(211, 6)), rng.normal(size=(157, 6)) * 0.7 + 0.4


def reference_radii(features: np.ndarray, k: int) -> np.ndarray:
    return NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(features).kneighbors()[0][:, -1]


@pytest.mark.parametrize("tile", [16, 50, 2048])
def test_all_figures_equal_scikit_learns_neighbours_at_any_tile(sets, tile, monkeypatch):
    monkeypatch.setattr(coverage, "TILE", tile)
    real, generated = sets
    radii = reference_radii(real, 5)
    np.testing.assert_allclose(neighbour_radii(real, 5), radii, rtol=1e-12)
    nearest = NearestNeighbors(n_neighbors=1).fit(generated).kneighbors(real)[0][:, 0]
    balls = np.linalg.norm(real[:, None] - generated[None], axis=-1) <= radii[:, None]
    density, covered = density_and_coverage(real, generated, k=5)
    assert covered == pytest.approx((nearest <= radii).mean(), abs=1e-12)
    assert density == pytest.approx(balls.sum() / (5 * len(generated)), abs=1e-12)
    precision, recall = precision_and_recall(real, generated, k=3)
    distance = np.linalg.norm(real[:, None] - generated[None], axis=-1)
    assert precision == (distance <= reference_radii(real, 3)[:, None]).any(axis=0).mean()
    assert recall == (distance <= reference_radii(generated, 3)[None, :]).any(axis=1).mean()
    assert 0 < precision < 1 and 0 < recall < 1 and 0 < covered < 1


def test_equal_sets_cover_each_other_and_distant_ones_do_not(sets):
    real, _ = sets
    assert density_and_coverage(real, real)[1] == 1.0
    assert precision_and_recall(real, real) == (1.0, 1.0)
    assert density_and_coverage(real, real + 100) == (0.0, 0.0)
    assert precision_and_recall(real, real + 100) == (0.0, 0.0)


def test_coverage_of_the_same_distribution_has_its_expected_value():
    # Naeem et al. 2020, equation 9: with N real and M generated, 1 - (N-1)…(N-k) / ((M+N-1)…(M+N-k)).
    count, k = 400, 5
    expected = 1 - np.prod([(count - i) / (2 * count - i) for i in range(1, k + 1)])
    values = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        values.append(density_and_coverage(rng.normal(size=(count, 4)), rng.normal(size=(count, 4)), k)[1])
    assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / np.sqrt(len(values)))


def test_one_repeated_sample_covers_little_and_duplicates_count_as_neighbours(sets):
    real, _ = sets
    collapsed = np.repeat(real[:1], len(real), axis=0)
    assert density_and_coverage(real, collapsed)[1] < 0.15
    assert (neighbour_radii(collapsed, 3) == 0).all()


def test_wrong_arguments_are_refused(sets):
    real, generated = sets
    with pytest.raises(ValueError, match="k must be between"):
        neighbour_radii(real[:5], 5)
    with pytest.raises(ValueError, match="NaN"):
        density_and_coverage(real, np.full_like(generated, np.nan))
    with pytest.raises(ValueError, match="samples, dimensions"):
        density_and_coverage(real.ravel(), generated)
