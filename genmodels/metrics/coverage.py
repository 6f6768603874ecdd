"""How well samples cover real data, and how far they stay on it, by nearest neighbours in a feature space.

Density and coverage are Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020;
precision and recall are Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
NeurIPS 2019. Balls are closed. Distances are computed a tile at a time, so memory does not grow with the square of
the number of samples. The figures depend on the number of samples: compare them at equal numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

TILE = 2048


def distance_tiles(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    for row in range(0, len(a), TILE):
        for column in range(0, len(b), TILE):
            rows, columns = slice(row, row + TILE), slice(column, column + TILE)
            yield rows, columns, cdist(a[rows], b[columns])


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


def density_and_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density (≥ 0, about 1 on the same distribution) and coverage (0 … 1) of `generated` against `real`.

    Coverage is the share of real samples with a generated one in their ball, which reaches to the k-th real neighbour;
    density counts the balls that a generated sample lies in, over k. Both sets: float (n, dimensions).
    """
    real, generated = checked(real), checked(generated)
    radii = neighbour_radii(real, k)
    covered, inside = np.zeros(len(real), dtype=bool), 0
    for rows, _, tile in distance_tiles(real, generated):
        within = tile <= radii[rows, None]
        covered[rows] |= within.any(axis=1)
        inside += int(within.sum())
    return inside / (k * len(generated)), float(covered.mean())


def precision_and_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of generated samples in a ball around a real one, and share of real samples in one around a generated."""
    return _share_inside(real, generated, k), _share_inside(generated, real, k)


def _share_inside(centres: np.ndarray, points: np.ndarray, k: int) -> float:
    centres, points = checked(centres), checked(points)
    radii = neighbour_radii(centres, k)
    inside = np.zeros(len(points), dtype=bool)
    for rows, columns, tile in distance_tiles(centres, points):
        inside[columns] |= (tile <= radii[rows, None]).any(axis=0)
    return float(inside.mean())


def checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (samples, dimensions) with at least one sample, not {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    return features
