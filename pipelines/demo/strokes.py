"""Small tasks for GANs, made of the demo's digits in white on black: thin and bold strokes, and few labels."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image

from infra.storage import join
from pipelines.data.index import DatasetIndex
from pipelines.data.write import ShardWriter
from pipelines.demo.digits import SPLITS, WORDS, load_originals, paint, stroke_mask

Weight = Literal["thin", "usual", "bold"]
LABELS_A_DIGIT = 10  # of the training digits; the held-out ones all have theirs
_THRESHOLDS: dict[str, float] = {"thin": 0.75, "usual": 0.5, "bold": 0.2}


def draw_strokes(split: str, size: int, weight: Weight = "usual") -> np.ndarray:
    """Every digit of a split once, uint8 (digits, size, size, 3), in the order of `SPLITS`."""
    masks = (stroke_mask(source, size, _THRESHOLDS[weight]) for source in SPLITS[split])
    return np.stack([paint(mask, "white", "black") for mask in masks])


def digits_of(split: str) -> np.ndarray:
    """What they show, int64 (digits,)."""
    return load_originals()[1][list(SPLITS[split])]


def labelled(digits: np.ndarray) -> np.ndarray:
    """Which samples have a label: the first `LABELS_A_DIGIT` of each digit, bool (digits,)."""
    kept = np.zeros(len(digits), bool)
    for digit in range(10):
        kept[np.flatnonzero(digits == digit)[:LABELS_A_DIGIT]] = True
    return kept


def stroke_overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of the strokes of two pictures each, uint8 (n, size, size, 3): float (n,), 0 to 1."""
    first, second = (pictures.mean(3) > 127 for pictures in (one, other))
    return (first & second).sum((1, 2)) / np.maximum((first | second).sum((1, 2)), 1)


def write_strokes(out: str, size: int, shard_samples: int, overwrite: bool) -> dict[str, DatasetIndex]:
    """Write shards of `size` pixels, with splits train/ and held_out/ each, to

    OUT/digits      usual strokes; txt is the digit as a word, and json has "label" where there is one
    OUT/pairs       png is bold, thin.png the same digit's thin strokes
    OUT/thin        thin strokes of the first half of the training digits
    OUT/bold        bold strokes of the other half: no digit is in both
    """
    indices = {}
    for split in SPLITS:
        digits = digits_of(split)
        known = labelled(digits) if split == "train" else np.ones(len(digits), bool)
        usual, thin, bold = (draw_strokes(split, size, weight) for weight in ("usual", "thin", "bold"))
        half = np.arange(len(digits)) < len(digits) // 2
        words = [WORDS[digit].encode() for digit in digits]
        samples: dict[str, Iterator[tuple[int, dict[str, bytes]]]] = {
            "digits": (
                (
                    number,
                    {
                        "png": _png(picture),
                        "txt": words[number],
                        "json": json.dumps({"label": str(digits[number])} if known[number] else {}).encode(),
                    },
                )
                for number, picture in enumerate(usual)
            ),
            "pairs": (
                (number, {"png": _png(picture), "thin.png": _png(thin[number])}) for number, picture in enumerate(bold)
            ),
            "thin": ((int(number), {"png": _png(thin[number])}) for number in np.flatnonzero(half)),
            "bold": ((int(number), {"png": _png(bold[number])}) for number in np.flatnonzero(~half)),
        }
        for name, members in samples.items():
            writer = ShardWriter(join(out, name, split), shard_samples, overwrite=overwrite)
            for number, parts in members:
                writer.write(f"{split}-{number:04d}", parts)
            indices[f"{name}/{split}"] = writer.close()
    return indices


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
