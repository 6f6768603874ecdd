"""Copies of training data: whom each picture is nearest to, and whether that is nearer than for unseen real ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genmodels.metrics.coverage import checked, distance_tiles


class Nearest(NamedTuple):
    """For each sample, the distance to the nearest reference, float64 (n,), and which (its row), int64 (n,)."""

    distance: np.ndarray
    which: np.ndarray


def nearest(samples: np.ndarray, reference: np.ndarray) -> Nearest:
    """The nearest of `reference` for each of `samples`, both float (n, dimensions); a tile at a time."""
    samples, reference = checked(samples), checked(reference)
    distance, index = np.full(len(samples), np.inf), np.zeros(len(samples), dtype=np.int64)
    for rows, columns, tile in distance_tiles(samples, reference):
        place = tile.argmin(axis=1)
        found = tile[np.arange(len(tile)), place]
        nearer = found < distance[rows]
        distance[rows] = np.where(nearer, found, distance[rows])
        index[rows] = np.where(nearer, place + columns.start, index[rows])
    return Nearest(distance, index)


def copy_share(generated: np.ndarray, training: np.ndarray, held_out: np.ndarray, quantile: float = 0.05) -> float:
    """Share of generated samples that are nearer to training data than all but `quantile` of real held-out ones are.

    A generator as far from its training data as reality is has about `quantile`; one that copies, 1. All sets: float
    (n, dimensions). Meehan et al., "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020,
    compare the same two distances.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be between 0 and 1, not {quantile}")
    threshold = np.quantile(nearest(held_out, training).distance, quantile)
    return float((nearest(generated, training).distance < threshold).mean())
