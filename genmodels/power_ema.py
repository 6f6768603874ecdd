"""Averages of weights whose length is chosen after training.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (CVPR 2024), sections 3.1 and 3.2,
appendix C.
An average with a power-function profile weighs the weights at time τ of t by τ^γ; its length is σ_rel, the deviation
of that profile over t. Two such averages, stored now and then, span others: any profile is nearly a sum of the stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 0.01, 0.28  # of σ_rel; γ = 0, the plain mean, has 0.289


def exponent(sigma_rel: float) -> float:
    """γ of a profile of relative length `sigma_rel`: the largest root of (γ+1)/((γ+2)²(γ+3)) = σ_rel².

    >>> round(exponent(0.05), 2), round(exponent(0.10), 2)
    (16.97, 6.94)

    Raises:
        ValueError: no power function is that short or that long.
    """
    if not SHORTEST <= sigma_rel <= LONGEST:
        raise ValueError(f"the length of an average is from {SHORTEST} to {LONGEST} of the training, not {sigma_rel}")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def share_of_new(gamma: float, updates: int) -> float:
    """1 − β(t) = 1 − (1 − 1/t)^(γ+1): the share of the weights after update t = `updates` (from 1) in the average."""
    return 1.0 - (1.0 - 1.0 / updates) ** (gamma + 1.0)


def products(
    gammas: Sequence[float], times: Sequence[float], gammas_other: Sequence[float], times_other: Sequence[float]
) -> NDArray[np.float64]:
    """Inner products ∫ p(τ) q(τ) dτ of profiles p, that end at `times`, with profiles q: (n, m)."""
    gamma, other = np.asarray(gammas, float)[:, None], np.asarray(gammas_other, float)[None]
    time, time_other = np.asarray(times, float)[:, None], np.asarray(times_other, float)[None]
    ratio = time / time_other
    # The exponent of the profile that lasts longer.
    shorter = np.where(ratio < 1, ratio**other, (1 / ratio) ** gamma)
    return (gamma + 1) * (other + 1) / (gamma + other + 1) * shorter / np.maximum(time, time_other)


def combination(
    stored: Sequence[tuple[float, float]], sigma_rel: float, time: float
) -> tuple[NDArray[np.float64], float]:
    """What to multiply stored averages by, so that their sum is the average of length `sigma_rel` at `time`.

    Args:
        stored: (σ_rel, update) of each stored average.
        sigma_rel: of the wanted one.
        time: updates at its end.

    Returns:
        Factors (n,), which sum to 1, and the relative error of the profile, ‖sum − wanted‖/‖wanted‖.

    Raises:
        ValueError: `sigma_rel` is out of range.
    """
    gammas, times = [exponent(sigma) for sigma, _ in stored], [end for _, end in stored]
    wanted = exponent(sigma_rel)
    gram = products(gammas, times, gammas, times)
    towards = products(gammas, times, [wanted], [time])[:, 0]
    # Least squares under the condition that the factors sum to 1, so that what never moved stays where it is.
    count = len(stored)
    bordered = np.ones((count + 1, count + 1))
    bordered[:count, :count], bordered[count, count] = gram, 0.0
    solution = np.linalg.lstsq(bordered, np.append(towards, 1.0), rcond=None)[0]
    factors: NDArray[np.float64] = solution[:count].astype(np.float64)
    square = products([wanted], [time], [wanted], [time])[0, 0]
    missing = square - 2 * factors @ towards + factors @ gram @ factors
    return factors, float(np.sqrt(max(missing, 0.0) / square))
