"""Averages whose length is chosen afterwards: closed forms, and averages that were really made."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from genmodels.power_ema import combination, exponent, products, share_of_new


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_deviation_of_the_profile_is_the_length(sigma_rel):
    gamma = exponent(sigma_rel)
    mean = quad(lambda x: (gamma + 1) * x ** (gamma + 1), 0, 1)[0]
    square = quad(lambda x: (gamma + 1) * x ** (gamma + 2), 0, 1)[0]
    assert np.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


def test_known_exponents():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)  # section 3.1 of the paper
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.005, 0.3, float("nan")])
def test_lengths_that_no_power_function_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"from 0\.01 to 0\.28"):
        exponent(sigma_rel)


def test_updates_weigh_the_weights_by_the_power_function():
    gamma, last = exponent(0.1), 50
    weights = np.zeros(last)
    for update in range(1, last + 1):
        share = share_of_new(gamma, update)
        weights *= 1 - share
        weights[update - 1] = share
    edges = (np.arange(last + 1) / last) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), atol=1e-12)  # the profile, integrated over each update


@pytest.mark.parametrize("first", [(16.97, 30.0), (6.94, 80.0)])
@pytest.mark.parametrize("second", [(16.97, 30.0), (6.94, 80.0), (3.0, 30.0)])
def test_products_of_profiles(first, second):
    def product(x):
        return np.prod([(gamma + 1) * x**gamma / end ** (gamma + 1) for gamma, end in (first, second)])

    expected = quad(product, 0, min(first[1], second[1]))[0]
    assert products([first[0]], [first[1]], [second[0]], [second[1]])[0, 0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("wanted", [0.04, 0.07, 0.13, 0.2])
def test_stored_averages_span_others(wanted):
    """A random walk, averaged at every step with the wanted length, and made of averages stored every 64 steps."""
    walk, last = np.cumsum(np.random.default_rng(0).normal(size=1024)), 1024

    def averages(sigma_rel):
        gamma, value, found = exponent(sigma_rel), 0.0, {}
        for update in range(1, last + 1):
            value += (walk[update - 1] - value) * share_of_new(gamma, update)
            found[update] = value
        return found

    made = {sigma_rel: averages(sigma_rel) for sigma_rel in (0.05, 0.1)}
    stored = [(sigma_rel, update) for sigma_rel in made for update in range(64, last + 1, 64)]
    factors, error = combination(stored, wanted, last)
    total = sum(factor * made[sigma_rel][update] for factor, (sigma_rel, update) in zip(factors, stored))
    assert error < 0.03 and factors.sum() == pytest.approx(1.0, abs=1e-9)
    assert total == pytest.approx(averages(wanted)[last], abs=0.1)
    assert abs(averages(wanted)[last] - averages(0.1)[last]) > 1  # which is not near


def test_one_profile_alone_does_not_span_others():
    stored = [(0.05, 1024.0)]
    assert combination(stored, 0.05, 1024.0)[1] < 1e-6
    assert combination(stored, 0.13, 1024.0)[1] > 0.5
