"""How sure a figure is: intervals from leaving blocks of samples out, or from drawing samples again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

MOST_BLOCKS = 50


class Interval(NamedTuple):
    """A figure, the ends of its confidence interval, and how much of it was bias.

    `value` has the bias of order 1/samples taken off: add `bias` for what was computed from all samples.
    """

    value: float
    low: float
    high: float
    bias: float


def jackknife(whole: float, without: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """The block jackknife: a figure from all samples, and from all but each of some blocks of equal size.

    The bias of order 1/samples is estimated and taken off; the interval is Student's around the rest (Efron and
    Tibshirani, "An Introduction to the Bootstrap", chapter 11).

    Args:
        whole: the figure of all samples.
        without: the same figure without block 0, 1, …: 2 to 50 of them.
        confidence: of the interval, 0 … 1.

    Raises ValueError for another number of blocks.
    """
    without = np.asarray(without, dtype=np.float64)
    if not 2 <= len(without) <= MOST_BLOCKS:
        raise ValueError(f"2 to {MOST_BLOCKS} blocks are left out in turn, not {len(without)}")
    blocks = len(without)
    pseudo = blocks * whole - (blocks - 1) * without
    value = float(pseudo.mean())
    error = float(pseudo.std(ddof=1)) / np.sqrt(blocks)
    reach = float(stats.t.ppf(0.5 + confidence / 2, blocks - 1)) * error
    return Interval(value, value - reach, value + reach, whole - value)


def random_blocks(count: int, blocks: int) -> list[np.ndarray]:
    """All of `count` rows in blocks of equal size, drawn at random and always the same: neighbouring rows may be alike,
    as those of one class, and blocks of them would not stand for the whole."""
    return [np.sort(rows) for rows in np.array_split(np.random.default_rng(6).permutation(count), blocks)]


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean of independent values, (samples ≥ 2,), with Student's interval."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values must be (two or more,), not {values.shape}")
    mean, error = float(values.mean()), float(values.std(ddof=1)) / np.sqrt(len(values))
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach, 0.0)


def share_interval(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """A share of `count` independent samples with Wilson's interval, which stays inside 0 … 1."""
    if not 0 <= hits <= count or not count:
        raise ValueError(f"{hits} of {count} is no share")
    found = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
    return Interval(hits / count, float(found.low), float(found.high), 0.0)


def bootstrap(
    figure: Callable[[np.ndarray], float], count: int, draws: int = 200, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The bootstrap: `figure` of samples that are drawn again, with replacement; the interval is of percentiles.

    Args:
        figure: of the samples with these indices, int64 (count,).
        count: of samples.
        draws: how often.
        confidence: of the interval.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    whole = float(figure(np.arange(count)))
    values = [float(figure(rng.integers(0, count, count))) for _ in range(draws)]
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(whole, float(low), float(high), 0.0)
