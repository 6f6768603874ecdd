"""Figures of parts: by word of the caption, and by class."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from pipelines.evaluation.figures import Measured, Sets

BY_WORD, BY_CLASS = "By word of the caption", "By class of the extractor"
_LEAST, _MOST_SHARE, _MOST_WORDS = 20, 0.9, 40
_WORD = re.compile(r"[^\W_]+")


class Slice(NamedTuple):
    """A part of the pictures, and shares, 0 … 1, by name."""

    name: str
    pictures: int
    shares: dict[str, float]


def by_word(sets: Sets, measured: Measured) -> list[Slice]:
    """For each word in 20 captions or more, and not in nearly all: how often its pictures are as asked (where they are
    read), and lie where real ones do; how often real pictures with this word lie where generated ones do."""
    generated, held_out = _rows_by_word(sets.generated.captions), _rows_by_word(sets.held_out.captions)
    words = [
        word
        for word, rows in generated.items()
        if len(rows) >= _LEAST and len(rows) <= _MOST_SHARE * sets.generated.count
    ]
    words = sorted(words, key=lambda word: -len(generated[word]))[:_MOST_WORDS]
    precise = dict(zip(measured.generated_rows.tolist(), measured.precise.tolist()))
    recalled = dict(zip(measured.held_out_rows.tolist(), measured.recalled.tolist()))
    found = []
    for word in words:
        rows = generated[word]
        shares: dict[str, float] = {}
        if "all" in measured.read:
            shares["as asked"] = float(measured.read["all"][rows].mean())
        if known := [precise[row] for row in rows if row in precise]:
            shares["precision"] = float(np.mean(known))
        if known := [recalled[row] for row in held_out.get(word, []) if row in recalled]:
            shares["recall"] = float(np.mean(known))
        found.append(Slice(word, len(rows), shares))
    return sorted(found, key=lambda each: min(each.shares.values(), default=1.0))


def by_class(sets: Sets, measured: Measured) -> list[Slice]:
    """For each class of the extractor: its share among generated and real pictures, and recall of real ones."""
    if sets.generated.probabilities is None or sets.held_out.probabilities is None:
        return []
    generated = np.asarray(sets.generated.probabilities).argmax(axis=1)
    real = np.asarray(sets.held_out.probabilities).argmax(axis=1)
    classes = sets.generated.probabilities.shape[1]
    if classes > _MOST_WORDS:
        return []
    recalled = real[measured.held_out_rows]
    found = []
    for number in range(classes):
        shares = {"share": float((generated == number).mean()), "of real": float((real == number).mean())}
        if (recalled == number).any():
            shares["recall"] = float(measured.recalled[recalled == number].mean())
        found.append(Slice(str(number), int((generated == number).sum()), shares))
    return found


def _rows_by_word(captions: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for row, caption in enumerate(captions):
        for word in set(_WORD.findall(caption.lower())):
            found[word].append(row)
    return found
