"""Real digits, and generators that each do one thing wrong, as feature stores: for the tests of the figures."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from pipelines.demo.classifier import digits_extractor
from pipelines.demo.digits import SPLITS, draw_split, load_originals, paint, parse_caption, stroke_mask
from pipelines.evaluation.measure import Extractors, measured_rows
from pipelines.evaluation.sources import Block
from pipelines.evaluation.store import FeatureStore, StoreWriter

SIZE = 32


@cache
def real(split: str, half: int | None = None, repeats: int = 8) -> tuple[np.ndarray, list[str]]:
    """Pictures and captions of a split, or of one half of its writers."""
    drawn = [
        (picture, caption)
        for _, picture, caption, meta in draw_split(split, SIZE, repeats)
        if half is None or meta["source"] // 10 % 2 == half  # ten digits of one writer follow each other
    ]
    return np.stack([picture for picture, _ in drawn]), [caption for _, caption in drawn]


def copies() -> tuple[np.ndarray, list[str]]:
    """Training pictures to the pixel."""
    pictures, captions = real("train")
    rows = np.random.default_rng(0).choice(len(pictures), 1200, replace=False)
    return pictures[rows], [captions[row] for row in rows]


def one_mode() -> tuple[np.ndarray, list[str]]:
    """For each digit always the same strokes, in the right colours."""
    digits = load_originals()[1]
    first = {digit: next(s for s in SPLITS["held_out"] if digits[s] == digit) for digit in range(10)}
    captions = real("held_out", 1)[1]
    asked = [parse_caption(caption) for caption in captions]
    return np.stack([paint(stroke_mask(first[c.digit], SIZE), c.ink, c.paper) for c in asked]), captions


def blurred() -> tuple[np.ndarray, list[str]]:
    """Real pictures out of focus."""
    pictures, captions = real("held_out", 1)
    return gaussian_filter(pictures.astype(np.float32), (0, 1.5, 1.5, 0)).round().astype(np.uint8), captions


def deaf() -> tuple[np.ndarray, list[str]]:
    """Real pictures, each with the caption of another."""
    pictures, captions = real("held_out", 1)
    order = np.random.default_rng(0).permutation(len(captions))
    return pictures, [captions[row] for row in order]


def store(pictures: np.ndarray, captions: list[str], folder: Path) -> FeatureStore:
    """What an evaluation would measure of them."""
    extractors = Extractors(digits_extractor())
    writer = StoreWriter(folder, len(pictures))
    for start in range(0, len(pictures), 256):
        part = slice(start, start + 256)
        block = Block(pictures[part], captions[part], [""] * len(captions[part]))
        rows = measured_rows(block, extractors)
        texts = [rows.pop(name).tolist() for name in ("captions", "keys")]
        writer.add(rows, *texts)
    return writer.close({})
