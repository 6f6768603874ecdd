import numpy as np
import pytest

from genmodels.metrics.frechet import Gaussian, frechet_interval
from genmodels.metrics.intervals import bootstrap, jackknife, mean_interval, share_interval
from genmodels.metrics.kernel import kernel_interval

DRAWS = 200


def covered(intervals, truth):
    """How many of 200 intervals hold the truth; 95 % are to, so fewer than 180 or more than 198 are too many or few."""
    return sum(interval.low <= truth <= interval.high for interval in intervals)


def test_the_interval_of_a_frechet_distance_holds_the_truth_and_has_no_bias_left():
    dimensions, scale, shift, count = 8, 1.3, 0.2, 500
    reference = Gaussian(np.zeros(dimensions), np.eye(dimensions))
    truth = dimensions * (scale - 1) ** 2 + dimensions * shift**2
    rng = np.random.default_rng(0)
    intervals = [
        frechet_interval(rng.normal(size=(count, dimensions)) * scale + shift, reference) for _ in range(DRAWS)
    ]
    assert 180 <= covered(intervals, truth) <= 198
    values, plain = np.array([(i.value, i.value + i.bias) for i in intervals]).T
    error = values.std() / np.sqrt(DRAWS)
    assert values.mean() == pytest.approx(truth, abs=4 * error)
    # What is not corrected is biased by about 1/count, and shows it.
    assert plain.mean() - truth > 8 * error


def test_fewer_samples_bias_a_frechet_distance_more():
    reference = Gaussian(np.zeros(16), np.eye(16))
    rng = np.random.default_rng(1)
    biases = []
    for count in (200, 800):
        found = [frechet_interval(rng.normal(size=(count, 16)), reference) for _ in range(40)]
        plain = np.mean([i.value + i.bias for i in found])
        biases.append(plain)
        assert abs(np.mean([i.value for i in found])) < 0.1 * plain
    assert biases[0] / biases[1] == pytest.approx(4, rel=0.1)


def test_the_interval_of_a_kernel_distance_holds_the_truth():
    rng = np.random.default_rng(5)
    same = [kernel_interval(*rng.normal(size=(2, 300, 6))) for _ in range(DRAWS)]
    assert 180 <= covered(same, 0.0) <= 198


def test_the_interval_of_a_mean_and_of_a_share_hold_the_truth():
    rng = np.random.default_rng(2)
    assert 180 <= covered([mean_interval(rng.exponential(size=100)) for _ in range(DRAWS)], 1.0) <= 198
    assert 180 <= covered([share_interval(rng.binomial(300, 0.9), 300) for _ in range(DRAWS)], 0.9) <= 198
    none = share_interval(0, 100)
    assert none.low == 0.0 and 0.03 < none.high < 0.04


def test_the_bootstrap_holds_the_truth():
    rng = np.random.default_rng(3)
    intervals = []
    for seed in range(DRAWS):
        values = rng.normal(size=200)
        intervals.append(bootstrap(lambda rows, values=values: np.median(values[rows]), 200, seed=seed))
    assert 180 <= covered(intervals, 0.0) <= 198


def test_a_jackknife_of_a_mean_is_that_of_its_blocks():
    values = np.random.default_rng(4).normal(size=(20, 50))
    without = [np.delete(values, block, axis=0).mean() for block in range(20)]
    assert jackknife(values.mean(), without)[:3] == pytest.approx(mean_interval(values.mean(axis=1))[:3])
    with pytest.raises(ValueError, match="2 to 50 blocks"):
        jackknife(0.0, [0.0])
