import math

import pytest
import torch

from genmodels.metrics.likelihood import bits_per_dim


def test_a_uniform_8_bit_model_needs_8_bits():
    dimensions = 3 * 32 * 32
    log_prob = torch.full((2,), -dimensions * math.log(256.0), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(log_prob, dimensions), torch.full((2,), 8.0, dtype=torch.float64))
    # 256 levels of a width of 1/127.5 each: the density of a uniform one is 127.5/256 in every dimension.
    density = torch.full((2,), dimensions * math.log(127.5 / 256), dtype=torch.float64)
    torch.testing.assert_close(
        bits_per_dim(density, dimensions, scaled=True), torch.full((2,), 8.0, dtype=torch.float64)
    )


def test_a_gaussian_that_is_dequantised_approaches_its_entropy():
    # Of deviation 20 levels: the entropy of 8-bit values is close to log₂(20 √(2πe)).
    density = torch.distributions.Normal(0.0, 20 / 127.5)
    values = density.sample((200_000,)).double()
    expected = math.log2(20 * math.sqrt(2 * math.pi * math.e))
    assert bits_per_dim(density.log_prob(values), 1, scaled=True).mean().item() == pytest.approx(expected, abs=0.01)


def test_no_dimensions_are_refused():
    with pytest.raises(ValueError, match="positive"):
        bits_per_dim(torch.zeros(1), 0)
