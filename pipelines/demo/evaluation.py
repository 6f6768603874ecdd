"""How honest the demo is: pictures of combinations that training never saw, judged against real held-out digits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from genmodels.metrics.coverage import density_and_coverage
from pipelines.demo.digits import (
    KEPT_OUT,
    SPLITS,
    Combination,
    caption,
    load_originals,
    paint,
    parse_caption,
    stroke_mask,
)
from pipelines.demo.judge import Judge, Reading, average_to, find_strokes

Draw = Callable[[list[str], list[int]], np.ndarray]
"""Draws one picture for each prompt and seed: uint8 (n, height, width, 3)."""

_NEIGHBOURS = 5
_FEATURE_CELLS = 8
_SHUFFLES = 10


@dataclass
class Evaluation:
    """The figures of `evaluate_digits`, and the pictures behind them in the order in which they were drawn."""

    figures: dict[str, Any]
    pictures: np.ndarray  # uint8 (count, size, size, 3)
    captions: list[str]
    wanted: list[Combination]
    reading: Reading


def kept_out_prompts(count: int, seed: int = 0) -> tuple[list[Combination], list[str]]:
    """Equally many prompts for each of the twenty kept-out combinations, in turn, in varied English.

    Raises ValueError unless `count` is a positive multiple of 20.
    """
    if count < 1 or count % len(KEPT_OUT):
        raise ValueError(f"count must be a multiple of the {len(KEPT_OUT)} kept-out combinations, not {count}")
    rng = np.random.default_rng([seed, 1])
    wanted = KEPT_OUT * (count // len(KEPT_OUT))
    return wanted, [caption(*combination, rng) for combination in wanted]


def real_pictures(split: str, size: int, which: int) -> tuple[np.ndarray, list[Combination]]:
    """Each real digit of a split once, in the first or second (`which` 0 or 1) kept-out colours of its digit."""
    digits = load_originals()[1]
    colours = {digit: [c for c in KEPT_OUT if c.digit == digit] for digit in range(10)}
    wanted = [colours[int(digits[source])][which] for source in SPLITS[split]]
    drawn = [paint(stroke_mask(source, size), c.ink, c.paper) for source, c in zip(SPLITS[split], wanted)]
    return np.stack(drawn), wanted


def correct(reading: Reading, wanted: list[Combination]) -> dict[str, np.ndarray]:
    """Where a reading agrees with what was asked for: bool (n,) for `digit`, `ink`, `paper`, and `all` three."""
    asked = [np.array(part) for part in zip(*wanted)]
    right = {name: getattr(reading, name) == asked[i] for i, name in enumerate(Combination._fields)}
    return {**right, "all": right["digit"] & right["ink"] & right["paper"]}


def follow_captions(pictures: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
    """Where pictures, uint8 (n, size, size, 3), show what their captions say: as `correct`.

    Raises ValueError for a caption that is none of the digits'.
    """
    wanted = [parse_caption(caption) for caption in captions]
    return correct(_judge(pictures.shape[1])(np.ascontiguousarray(pictures)), wanted)


@cache
def _judge(size: int) -> Judge:
    return Judge.train(size)


def mean_coverage(held_out: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Density and coverage of held-out features at equal numbers, averaged over disjoint random parts of `features`.

    Where there are fewer features than held-out digits, a random part of the held-out digits stands for all.
    """
    number = min(len(held_out), len(features))
    order = rng.permutation(len(features))
    values = []
    for start in range(0, len(features) - number + 1, number):
        part = features[order[start : start + number]]
        reference = held_out[rng.permutation(len(held_out))[:number]]
        values.append(density_and_coverage(reference, part, _NEIGHBOURS))
    density, coverage = np.mean(values, axis=0)
    return float(density), float(coverage)


def evaluate_digits(draw: Draw, size: int, count: int = 1000, seed: int = 0) -> Evaluation:
    """Draw `count` pictures of kept-out combinations, reject none, and judge them.

    Figures (shares are 0 … 1):
        consistency, consistency_digit / _ink / _paper: right in all three, and in each.
        consistency_real, consistency_ratio: the same judge on real held-out digits in the same colours; the quotient,
            which can pass 1, as other writers' digits are harder to read than ones close to the training digits.
        consistency_shuffled, consistency_chance: captions shuffled against pictures; and what drawing without reading
            the caption would reach.
        coverage, coverage_real, coverage_ratio: of held-out digits, by generated and by real training digits (k = 5,
            equal numbers, features the stroke mask averaged to 8×8); density likewise.
        seconds_per_100: drawing time. per_digit, per_combination: tables of the same shares.

    Raises ValueError for a count that is not a multiple of 20, or pictures of another number, type or size.
    """
    wanted, captions = kept_out_prompts(count, seed)
    judge = Judge.train(size)
    start = time.perf_counter()
    pictures = draw(captions, [seed * count + i for i in range(count)])
    seconds = time.perf_counter() - start
    if pictures.shape != (count, size, size, 3) or pictures.dtype != np.uint8:
        raise ValueError(f"asked for {count} uint8 pictures of {size} pixels, got {pictures.dtype} {pictures.shape}")

    strokes = find_strokes(pictures)
    reading = judge.read(strokes)
    right = correct(reading, wanted)
    real = [real_pictures("held_out", size, which) for which in (0, 1)]
    real_wanted = real[0][1] + real[1][1]
    real_right = correct(judge(np.concatenate([real[0][0], real[1][0]])), real_wanted)

    rng = np.random.default_rng([seed, 2])
    shuffles = [[wanted[i] for i in rng.permutation(count)] for _ in range(_SHUFFLES)]
    shuffled = np.mean([correct(reading, shuffle)["all"].mean() for shuffle in shuffles])
    held_out, train = (_features(real_pictures(split, size, 0)[0]) for split in ("held_out", "train"))
    density, coverage = mean_coverage(held_out, average_to(strokes.mask, _FEATURE_CELLS), rng)
    density_real, coverage_real = mean_coverage(held_out, train, rng)

    consistency, consistency_real = float(right["all"].mean()), float(real_right["all"].mean())
    figures = {
        "count": count,
        "consistency": consistency,
        **{f"consistency_{part}": float(right[part].mean()) for part in Combination._fields},
        "consistency_real": consistency_real,
        "consistency_ratio": consistency / consistency_real,
        "consistency_shuffled": float(shuffled),
        "consistency_chance": 1 / len(KEPT_OUT),
        "coverage": coverage,
        "coverage_real": coverage_real,
        "coverage_ratio": coverage / coverage_real,
        "density": density,
        "density_real": density_real,
        "seconds_per_100": 100 * seconds / count,
        "per_digit": _per_digit(right, wanted, real_right, real_wanted),
        "per_combination": _per_combination(right, wanted),
    }
    return Evaluation(figures, pictures, captions, wanted, reading)


def _features(pictures: np.ndarray) -> np.ndarray:
    return average_to(find_strokes(pictures).mask, _FEATURE_CELLS)


def _per_digit(right, wanted, real_right, real_wanted) -> list[dict[str, Any]]:
    asked, real_asked = (np.array([c.digit for c in combinations]) for combinations in (wanted, real_wanted))
    rows = []
    for digit in range(10):
        shares = {name: float(values[asked == digit].mean()) for name, values in right.items()}
        rows.append({"asked": digit, **shares, "all_real": float(real_right["all"][real_asked == digit].mean())})
    return rows


def _per_combination(right, wanted) -> list[dict[str, Any]]:
    number = np.array([KEPT_OUT.index(c) for c in wanted])
    shares = [{name: float(values[number == i].mean()) for name, values in right.items()} for i in range(len(KEPT_OUT))]
    return [{"asked": f"{c.ink} {c.digit} on {c.paper}", **row} for c, row in zip(KEPT_OUT, shares)]
