"""Likelihoods on a scale that compares across models and resolutions."""

from __future__ import annotations

import math

from torch import Tensor

_LEVELS_PER_UNIT = 127.5  # of 8-bit values scaled to [-1, 1]


def bits_per_dim(log_prob: Tensor, dimensions: int, *, scaled: bool = False) -> Tensor:
    """Bits that a model needs for each value, −log₂ p / dimensions; the shape of `log_prob`.

    Args:
        log_prob: natural logarithm: of the probability of 8-bit values; or with `scaled`, of the density of such values
            after v ↦ v/127.5 − 1 and dequantisation.
        dimensions: values in a sample: channels · height · width.
        scaled: whether `log_prob` is a density on [-1, 1].

    A uniform model of 8-bit values needs 8 either way.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions must be positive, not {dimensions}")
    bits = -log_prob / (dimensions * math.log(2.0))
    return bits + math.log2(_LEVELS_PER_UNIT) if scaled else bits
