"""How well samples cover real data, and how far they stay on it, by nearest neighbours in a feature space.

Density and coverage are Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020;
precision and recall are Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
NeurIPS 2019. Balls are closed. Distances are computed a tile at a time, so memory does not grow with the square of
the number of samples. The figures depend on the number of samples: compare them at equal numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

TILE = 2048
_CANCELLED = 1e-6  # of the squared lengths: below it, what is left of a difference is rounding
_REACH = 1 + 1e-9  # a ball is closed, and the sample at its rim may be rounded to either side


def distance_tiles(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Euclidean distances of `a` and `b`, (samples, dimensions) each: the rows, the columns, float64 distances.

    Only tiles are made float64, so both may be memory-mapped files.
    """
    for row in range(0, len(a), TILE):
        rows = slice(row, row + TILE)
        x = np.asarray(a[rows], dtype=np.float64)
        for column in range(0, len(b), TILE):
            columns = slice(column, column + TILE)
            yield rows, columns, _distances(x, np.asarray(b[columns], dtype=np.float64))


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """By one product of matrices; exactly where that would leave only rounding, so equal samples are at distance 0."""
    lengths = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    squares = lengths - 2.0 * (x @ y.T)
    cancelled = squares < _CANCELLED * lengths
    number = int(cancelled.sum())
    if number > cancelled.size // 100:
        return cdist(x, y)
    distances = np.sqrt(np.maximum(squares, 0.0))
    if number:
        one, other = np.nonzero(cancelled)
        for start in range(0, number, TILE):
            part = slice(start, start + TILE)
            distances[one[part], other[part]] = np.linalg.norm(x[one[part]] - y[other[part]], axis=1)
    return distances


def neighbour_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance of each sample to its k-th nearest other sample, float64 (n,).

    Args:
        features: float (n, dimensions).
        k: 1 … n-1.

    Raises ValueError for another shape or k.
    """
    features = checked(features)
    if not 1 <= k < len(features):
        raise ValueError(f"k must be between 1 and {len(features) - 1} for {len(features)} samples, not {k}")
    nearest = np.full((len(features), k), np.inf)
    for rows, columns, tile in distance_tiles(features, features):
        if rows == columns:
            np.fill_diagonal(tile, np.inf)  # a sample is not its own neighbour; an equal one is
        merged = np.concatenate([nearest[rows], tile], axis=1)
        nearest[rows] = np.partition(merged, k - 1, axis=1)[:, :k]
    return nearest.max(axis=1)


class Balls(NamedTuple):
    """How samples lie in the balls around real ones, which reach to the k-th real neighbour.

    Attributes:
        covered: which real samples have a generated one in their ball, bool (real samples,).
        density: in how many balls each generated sample lies, over k; float64 (generated samples,).
    """

    covered: np.ndarray
    density: np.ndarray


def balls(real: np.ndarray, generated: np.ndarray, k: int = 5) -> Balls:
    """Who is in whose ball; both sets: float (samples, dimensions)."""
    real, generated = checked(real), checked(generated)
    radii = _REACH * neighbour_radii(real, k)
    covered, count = np.zeros(len(real), dtype=bool), np.zeros(len(generated), dtype=np.int64)
    for rows, columns, tile in distance_tiles(real, generated):
        within = tile <= radii[rows, None]
        covered[rows] |= within.any(axis=1)
        count[columns] += within.sum(axis=0)
    return Balls(covered, count / k)


def density_and_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density (≥ 0, about 1 on the same distribution) and coverage (0 … 1) of `generated` against `real`.

    Coverage is the share of real samples with a generated one in their ball, which reaches to the k-th real neighbour;
    density counts the balls that a generated sample lies in, over k. Both sets: float (n, dimensions).
    """
    found = balls(real, generated, k)
    return float(found.density.mean()), float(found.covered.mean())


def precision_and_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of generated samples in a ball around a real one, and share of real samples in one around a generated."""
    return float(inside(real, generated, k).mean()), float(inside(generated, real, k).mean())


def inside(centres: np.ndarray, points: np.ndarray, k: int) -> np.ndarray:
    """Which of `points` lie in a ball around one of `centres` that reaches to its k-th neighbour; bool (points,)."""
    return balls(centres, points, k).density > 0


def checked(features: np.ndarray) -> np.ndarray:
    """The features, unless they are of another shape or not finite: then ValueError."""
    features = np.asanyarray(features)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (samples, dimensions) with at least one sample, not {features.shape}")
    for start in range(0, len(features), TILE):
        if not np.isfinite(features[start : start + TILE]).all():
            raise ValueError("features hold NaN or infinity")
    return features
