"""The kernel distance (KID) of Bińkowski et al., "Demystifying MMD GANs", ICLR 2018: unbiased at any number of
samples, so it can fall below zero."""

from __future__ import annotations

import math

import numpy as np

from genmodels.metrics.intervals import Interval, mean_interval

_BLOCK = 1000  # samples


def kernel_distances(a: np.ndarray, b: np.ndarray, block: int = 1000, degree: int = 3) -> np.ndarray:
    """Unbiased squared maximum mean discrepancy of features, for each pair of disjoint blocks; float64 (blocks,).

    The kernel is (x·y / dimensions + 1)^degree. Their mean is the distance, and their spread its uncertainty
    (Zaremba et al., "B-tests", NeurIPS 2013). Every sample is in one block.

    Args:
        a, b: float (samples ≥ 2, dimensions).
        block: samples of a block at least, as far as there are as many.
        degree: of the polynomial.

    Only blocks are made float64, so both may be memory-mapped files. Raises ValueError for other shapes, NaN or
    infinity.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (two samples or more, dimensions), not {a.shape} and {b.shape}")
    blocks = max(1, min(len(a), len(b)) // block)
    pairs = zip(np.array_split(a, blocks), np.array_split(b, blocks))
    found = np.array([_unbiased(np.asarray(x, np.float64), np.asarray(y, np.float64), degree) for x, y in pairs])
    if not np.isfinite(found).all():
        raise ValueError("features hold NaN or infinity")
    return found


def kernel_interval(features: np.ndarray, real: np.ndarray, block: int | None = None) -> Interval:
    """The kernel distance, from disjoint blocks of samples drawn at random; no end is known where there is one block.

    Args:
        features, real: float (samples, dimensions); of the larger set as many are taken as the other one has.
        block: samples of each block [a tenth, at most 1,000].
    """
    number = min(len(features), len(real))  # blocks of equal size, each of which fits into memory
    rng = np.random.default_rng(4)
    features, real = (each[rng.permutation(len(each))[:number]] for each in (features, real))
    values = kernel_distances(features, real, block=block or max(2, min(_BLOCK, number // 10)))
    return mean_interval(values) if len(values) > 1 else Interval(float(values[0]), -math.inf, math.inf, 0.0)


def _unbiased(a: np.ndarray, b: np.ndarray, degree: int) -> float:
    """Equation 4 of Gretton et al., "A Kernel Two-Sample Test", JMLR 2012: no sample is compared with itself."""
    within = [_off_diagonal_mean(_kernel(x, x, degree)) for x in (a, b)]
    return sum(within) - 2.0 * float(_kernel(a, b, degree).mean())


def _kernel(a: np.ndarray, b: np.ndarray, degree: int) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1.0) ** degree


def _off_diagonal_mean(kernel: np.ndarray) -> float:
    count = len(kernel)
    return float(kernel.sum() - np.trace(kernel)) / (count * (count - 1))
