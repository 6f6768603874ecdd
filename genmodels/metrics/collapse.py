"""Whether a generator has collapsed: draws the same few pictures, or a small part of what there is.

Coverage and recall as in `coverage.py`, and two measures of the variety within a batch: how far pictures are from each
other, and from the nearest of the others. All are set against what as many other real pictures reach, so thresholds do
not depend on the features. Pictures that are merely bad do not set the alarm off: they differ from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from genmodels.metrics.coverage import (
    checked,
    density_and_coverage,
    distance_tiles,
    neighbour_radii,
    precision_and_recall,
)

_NEIGHBOURS = 5
_RECALL_NEIGHBOURS = 3


class CollapseThresholds(NamedTuple):
    """Shares of what real pictures reach, below which something is wrong."""

    coverage: float = 0.3
    recall: float = 0.3
    spread: float = 0.5
    nearest: float = 0.35
    of_one_condition: float = 0.1


THRESHOLDS = CollapseThresholds()


class Variety(NamedTuple):
    """Of drawn pictures, each as a share of what real ones reach.

    Attributes:
        coverage: of real pictures that have a drawn one near them.
        recall: of real pictures that lie among drawn ones.
        spread: mean distance of drawn pictures from each other.
        nearest: median distance of a drawn picture from the nearest other one.
        reasons: what is wrong, in words; none where nothing is.
    """

    coverage: float
    recall: float
    spread: float
    nearest: float
    reasons: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Whether the alarm goes off."""
        return bool(self.reasons)


def measure_variety(
    drawn: np.ndarray, real: np.ndarray, others: np.ndarray, thresholds: CollapseThresholds = THRESHOLDS
) -> Variety:
    """Compare drawn pictures with real ones, and those with other real ones.

    Args:
        drawn: features of drawn pictures, float (n, dimensions).
        real, others: of two disjoint sets of real pictures; equal numbers of all three are taken.
        thresholds: where the alarm goes off: spread or nearest alone, coverage and recall together, since pictures that
            are only unlike real ones have low values of one or the other.

    Raises:
        ValueError: fewer than 20 of a set, or features that are not finite.
    """
    count = min(len(drawn), len(real), len(others))
    if count < 20:
        raise ValueError(f"the variety of {count} pictures cannot be judged: 20 are needed")
    drawn, real, others = (np.asarray(checked(each)[:count], dtype=np.float64) for each in (drawn, real, others))
    ours, theirs = _four(drawn, real), _four(others, real)
    shares = {name: ours[name] / max(theirs[name], 1e-12) for name in ours}
    reasons = []
    if shares["spread"] < thresholds.spread:
        reasons.append(f"pictures differ {shares['spread']:.2f} times as much from each other as real ones do")
    if shares["nearest"] < thresholds.nearest:
        reasons.append(f"the nearest other picture is {shares['nearest']:.2f} times as far as among real ones")
    if shares["coverage"] < thresholds.coverage and shares["recall"] < thresholds.recall:
        reasons.append(
            f"real pictures are covered {shares['coverage']:.2f} times as well as by other real ones, and lie "
            f"{shares['recall']:.2f} times as often among them"
        )
    return Variety(**shares, reasons=tuple(reasons))


def condition_variety(drawn: np.ndarray, again: np.ndarray, conditions: Sequence[str] | None = None) -> float:
    """How far two pictures of one condition are from each other, as a share of how far pictures of different conditions
    are: near 0 where the latent is ignored, however varied the pictures are together.

    Args:
        drawn, again: features of two pictures for each of n conditions, float (n, dimensions).
        conditions: of which equal ones are not compared; None: all are different.

    Raises:
        ValueError: other shapes, or fewer than two different conditions.
    """
    drawn, again = checked(drawn).astype(np.float64), checked(again).astype(np.float64)
    if drawn.shape != again.shape or len(drawn) < 2:
        raise ValueError(f"needs two pictures for each of two conditions at least, got {drawn.shape} and {again.shape}")
    same = np.linalg.norm(drawn - again, axis=1).mean()
    told = np.arange(len(drawn)) if conditions is None else np.asarray(conditions)
    others = [np.flatnonzero(np.roll(told, -row) != told[row]) for row in range(len(told))]
    if not all(map(len, others)):
        raise ValueError("needs two different conditions at least")
    following = [(row + int(places[0])) % len(told) for row, places in enumerate(others)]  # the next that differs
    different = np.linalg.norm(drawn - again[following], axis=1).mean()
    return float(same / max(different, 1e-12))


def _four(pictures: np.ndarray, real: np.ndarray) -> dict[str, float]:
    total = sum(float(tile.sum()) for _, _, tile in distance_tiles(pictures, pictures))
    count = len(pictures)
    return {
        "coverage": density_and_coverage(real, pictures, _NEIGHBOURS)[1],
        "recall": precision_and_recall(real, pictures, _RECALL_NEIGHBOURS)[1],
        "spread": total / (count * (count - 1)),
        "nearest": float(np.median(neighbour_radii(pictures, 1))),
    }
