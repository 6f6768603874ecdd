"""All figures of a set of pictures against real ones, each with its interval, its conditions, and what real pictures
get in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import xlogy

from genmodels.metrics.copies import Nearest, nearest
from genmodels.metrics.coverage import balls
from genmodels.metrics.figure import Conditions, Figure
from genmodels.metrics.frechet import FeatureSums, frechet_interval
from genmodels.metrics.intervals import Interval, jackknife, mean_interval, random_blocks, share_interval
from genmodels.metrics.kernel import kernel_interval
from genmodels.metrics.text import clip_scores, retrieval_recall
from pipelines.evaluation.store import FeatureStore

COPY_QUANTILE = 0.05
_PRECISION_NEIGHBOURS, _COVERAGE_NEIGHBOURS = 3, 5
_RETRIEVED = 1000  # pictures among which a caption's own is sought

Reader = Callable[[np.ndarray, list[str]], dict[str, np.ndarray]]
"""Reads pictures, uint8 (n, height, width, 3), and says where they show what their captions say: bool (n,) by part, and
for "all" parts."""


@dataclass(frozen=True)
class Sets:
    """What is compared: generated pictures, real ones that no training saw, and those of the training where known."""

    generated: FeatureStore
    held_out: FeatureStore
    training: FeatureStore | None = None


@dataclass
class Measured:
    """Figures, what real pictures get in their place (by name), and what is known of single pictures.

    Attributes:
        precise: which generated pictures lie in a ball of real ones; bool, for the rows `generated_rows`.
        recalled: which real pictures lie in a ball of generated ones; bool, for the rows `held_out_rows`.
        strange: distance of each generated picture to the nearest real held-out one.
        copies: nearest training picture of each generated one, and `copy_threshold`, the distance that only 5 % of
            real held-out pictures are below; None without training data.
        read: where the captions are followed, by part; empty without a reader.
    """

    figures: list[Figure]
    real: dict[str, float]
    generated_rows: np.ndarray
    held_out_rows: np.ndarray
    precise: np.ndarray
    recalled: np.ndarray
    strange: np.ndarray
    copies: Nearest | None = None
    copy_threshold: float = 0.0
    read: dict[str, np.ndarray] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """Of a figure by name. Raises KeyError."""
        return {figure.name: figure.value for figure in self.figures}[name]


def measure_figures(
    sets: Sets,
    conditions: Conditions,
    reader: Reader | None = None,
    text_embeddings: np.ndarray | None = None,
    most_neighbours: int = 10_000,
) -> Measured:
    """Every figure that these sets allow.

    Args:
        sets: at least two pictures in each.
        conditions: of the generated pictures; each figure carries them.
        reader: says where captions are followed.
        text_embeddings: of the generated pictures' captions by the CLIP that gave `embeddings`.
        most_neighbours: samples of each set that neighbours are searched among, as their cost grows with the square.

    Memory does not grow with the number of pictures, but for a few numbers a picture.
    """
    generated, held_out, training = sets.generated, sets.held_out, sets.training
    table = _Table(conditions)
    real_sums = FeatureSums.of(held_out.features).gaussian()
    table.add("frechet_distance", frechet_interval(generated.features, real_sums), "lower")
    kernel = kernel_interval(generated.features, held_out.features)
    table.add("kernel_distance", kernel, "lower")

    count = min(generated.count, held_out.count, most_neighbours)
    rows = [_some(store.count, count, seed) for seed, store in enumerate((generated, held_out))]
    own, real = generated.features[rows[0]], held_out.features[rows[1]]
    precise, recalled = _neighbour_figures(table, own, real)
    strange = nearest(generated.features, held_out.features).distance
    measured = Measured(table.figures, table.real, rows[0], rows[1], precise, recalled, strange)

    if generated.probabilities is not None:
        table.add("inception_score", _inception(generated.probabilities), "higher", _inception(held_out.probabilities))
    if len(pairs := _pairs(generated)) > 1:
        others = _pairs(held_out)
        table.add("ms_ssim", mean_interval(pairs), "lower", mean_interval(others) if len(others) > 1 else None)
    table.real |= real_in_its_place(sets, count)
    for name, scores in (("psnr", generated.psnr), ("ssim", generated.ssim), ("lpips", generated.lpips)):
        if scores is not None:
            table.add(name, mean_interval(scores), "lower" if name == "lpips" else "higher")
    if training is not None:
        _against_training(table, measured, sets)
    if reader is not None:
        measured.read = reader(generated.thumbnails, generated.captions)
        read_real = reader(held_out.thumbnails, held_out.captions)
        for name, right in measured.read.items():
            title = "caption_consistency" + ("" if name == "all" else f"_{name}")
            table.add(title, _share(right), "higher", _share(read_real[name]))
    if text_embeddings is not None and generated.embeddings is not None:
        table.add("clip_score", mean_interval(clip_scores(generated.embeddings, text_embeddings)), "higher")
        number = min(generated.count, _RETRIEVED)
        found, _ = retrieval_recall(generated.embeddings[:number], text_embeddings[:number])
        table.add(f"retrieval_of_{number}", share_interval(round(found * number), number), "higher")
    return measured


class _Table:
    def __init__(self, conditions: Conditions) -> None:
        self.figures: list[Figure] = []
        self.real: dict[str, float] = {}
        self._conditions = conditions

    def add(self, name: str, found: Interval, better: Literal["higher", "lower"], real: Interval | None = None) -> None:
        self.figures.append(
            Figure(
                name=name, value=found.value, low=found.low, high=found.high, better=better, conditions=self._conditions
            )
        )
        if real is not None:
            self.real[name] = real.value


def _neighbour_figures(table: _Table, own: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    precise = balls(real, own, _PRECISION_NEIGHBOURS).density > 0
    recalled = balls(own, real, _PRECISION_NEIGHBOURS).density > 0
    found = balls(real, own, _COVERAGE_NEIGHBOURS)
    table.add("precision", _share(precise), "higher")
    table.add("recall", _share(recalled), "higher")
    table.add("density", mean_interval(found.density), "higher")
    table.add("coverage", _share(found.covered), "higher")
    return precise, recalled


def _against_training(table: _Table, measured: Measured, sets: Sets) -> None:
    """The distance to training data, and copies of it."""
    generated, held_out, training = sets.generated, sets.held_out, sets.training
    assert training is not None
    few = training.features[_some(training.count, min(training.count, held_out.count), 7)]  # as many as held-out ones
    against = FeatureSums.of(few).gaussian()
    table.add("frechet_distance_training", frechet_interval(generated.features, against), "lower")
    measured.copies = nearest(generated.features, training.features)
    real = nearest(held_out.features[measured.held_out_rows], training.features).distance
    measured.copy_threshold = float(np.quantile(real, COPY_QUANTILE))
    table.add("copy_share", _share(measured.copies.distance < measured.copy_threshold), "lower")

    table.real["copy_share"] = COPY_QUANTILE


def real_in_its_place(sets: Sets, count: int) -> dict[str, float]:
    """What real pictures get in the place of generated ones: those of the training, or, where they are not known, one
    half of the held-out ones against the other."""
    real = sets.held_out.features
    if sets.training is not None:
        training = sets.training.features
        own = training[_some(len(training), min(sets.generated.count, len(training)), 2)]
    else:
        order = np.random.default_rng(5).permutation(len(real))
        own, real = real[np.sort(order[::2])], real[np.sort(order[1::2])]
    few = min(len(own), len(real), count)
    own_few, real_few = own[_some(len(own), few, 3)], real[_some(len(real), few, 1)]
    table = _Table(Conditions(count=len(own)))
    table.add("frechet_distance", frechet_interval(own, FeatureSums.of(real).gaussian()), "lower")
    table.add("kernel_distance", kernel_interval(own, real), "lower")
    _neighbour_figures(table, own_few, real_few)
    return {figure.name: figure.value for figure in table.figures}


def _inception(probabilities: np.ndarray | None) -> Interval:
    """The Inception score from sums over blocks: log of it is the mean of Σ p log p less Σ p̄ log p̄."""
    assert probabilities is not None
    sums = []
    for rows in random_blocks(len(probabilities), min(20, len(probabilities) // 2)):
        part = np.asarray(probabilities[rows], dtype=np.float64)
        sums.append((len(part), part.sum(axis=0), xlogy(part, part).sum()))

    def score(parts: list[tuple[int, np.ndarray, float]]) -> float:
        count, mass, inner = (sum(values) for values in zip(*parts))
        mean = mass / count
        return float(np.exp(inner / count - xlogy(mean, mean).sum()))

    without = [score(sums[:number] + sums[number + 1 :]) for number in range(len(sums))]
    return jackknife(score(sums), without)


def _pairs(store: FeatureStore) -> np.ndarray:
    values = np.asarray(store.similarity)
    return values[np.isfinite(values)]


def _share(right: np.ndarray) -> Interval:
    return share_interval(int(right.sum()), len(right))


def _some(total_count: int, count: int, seed: int) -> np.ndarray:
    """`count` of so many rows, drawn once and for all, in order."""
    if count == total_count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(total_count, count, replace=False))
