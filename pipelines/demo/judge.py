"""Reads digit, ink and paper from a picture's pixels alone. Part of the evaluation, never of training.

The judge learns from real training digits only. It is the same for real and for generated pictures, so a ratio of the
two says how much worse the generator is than reality, not how good the judge is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.demo.digits import COLOURS, SPLITS, load_originals, stroke_mask

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # (8, 3)
NAMES = np.array(list(COLOURS))

_COLOUR_SPREAD = 40.0  # grey levels: how far from a colour's name a pixel may be and still count half for it
_SMALLEST_INK = 0.01  # share of a picture; the thinnest real digit has five times as much
_JUDGE_CELLS = 10  # with shifted copies, 0.96 of the held-out strokes are read right; 8 cells give 0.95
_JUDGE_COPIES = 4


class Reading(NamedTuple):
    """What the judge sees in n pictures: digit int64 (n,), ink and paper colour names (n,).

    Where a picture shows one colour only, digit is -1 and ink is the empty string.
    """

    digit: np.ndarray
    ink: np.ndarray
    paper: np.ndarray


class Strokes(NamedTuple):
    """Stroke masks, float32 (n, height, width) in [0, 1] with 1 as ink, and indices into `NAMES`; ink -1 is none."""

    mask: np.ndarray
    ink: np.ndarray
    paper: np.ndarray


def find_strokes(pictures: np.ndarray) -> Strokes:
    """Split pictures, uint8 (n, height, width, 3), into stroke mask, ink and paper.

    Paper is the named colour that rules the border; ink is the named colour that rules the rest. The mask is each
    pixel's place on the line from paper to ink. Every pixel votes softly, by its distance to each name, so the mixed
    pixels along an edge (grey, between black and white) elect nobody.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 (n, height, width, 3), not {pictures.dtype} {pictures.shape}")
    parts = [_find_strokes(pictures[start : start + 256]) for start in range(0, len(pictures), 256)]
    return Strokes(*(np.concatenate(part) for part in zip(*parts)))


def _find_strokes(pictures: np.ndarray) -> Strokes:
    pixels = pictures.astype(np.float32)
    count, height, width, _ = pixels.shape
    distance = np.square(pixels[:, :, :, None] - PALETTE).sum(axis=-1)  # (n, height, width, 8), squared
    votes = np.exp(-distance / (2 * _COLOUR_SPREAD**2))
    rim = max(1, min(height, width) // 16)
    border = np.ones((height, width), dtype=bool)
    border[rim:-rim, rim:-rim] = False
    paper = votes[:, border].sum(axis=1).argmax(axis=1)
    total = votes.mean(axis=(1, 2))
    total[np.arange(count), paper] = -1.0
    ink = total.argmax(axis=1)
    blank = total.max(axis=1) < _SMALLEST_INK
    origin = PALETTE[paper][:, None, None]
    line = PALETTE[ink][:, None, None] - origin
    mask = (((pixels - origin) * line).sum(axis=-1) / np.square(line).sum(axis=-1)).clip(0.0, 1.0)
    mask[blank] = 0.0
    return Strokes(mask.astype(np.float32), np.where(blank, -1, ink), paper)


def average_to(masks: np.ndarray, cells: int) -> np.ndarray:
    """Stroke masks (n, height, width) averaged over a grid of cells × cells; float32 (n, cells²)."""
    size, box = (cells, cells), Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(mask).resize(size, box)).ravel() for mask in masks])


class Judge:
    """A support vector machine on strokes, and the nearest named colours."""

    def __init__(self, classifier) -> None:
        self.classifier = classifier

    @classmethod
    def train(cls, size: int, seed: int = 0) -> Judge:
        """Learn from the 1,500 training digits at `size` pixels, and four moved copies of each; about a second."""
        from sklearn.svm import SVC

        rng = np.random.default_rng(seed)
        masks = [stroke_mask(source, size) for source in SPLITS["train"]]
        copies = masks + [_moved(mask, rng) for _ in range(_JUDGE_COPIES) for mask in masks]
        digits = np.tile(load_originals()[1][: len(masks)], 1 + _JUDGE_COPIES)
        classifier = SVC(C=10.0, kernel="rbf", gamma="scale")
        return cls(classifier.fit(average_to(np.stack(copies), _JUDGE_CELLS), digits))

    def __call__(self, pictures: np.ndarray) -> Reading:
        """Read pictures, uint8 (n, height, width, 3)."""
        return self.read(find_strokes(pictures))

    def read(self, strokes: Strokes) -> Reading:
        """Read strokes that `find_strokes` found."""
        digit = self.classifier.predict(average_to(strokes.mask, _JUDGE_CELLS))
        digit = np.where(strokes.ink < 0, -1, digit)
        return Reading(digit, np.where(strokes.ink < 0, "", NAMES[strokes.ink]), NAMES[strokes.paper])


def _moved(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy that is shifted by about 1/32 of its size, turned and slanted by about 6 degrees, and scaled by 5 %."""
    from scipy.ndimage import affine_transform

    size = len(mask)
    turn, slant, scale = rng.normal(size=3) * (0.1, 0.1, 0.05)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[1.0, 0.0], [slant, 1.0]]) / np.exp(scale)
    centre = np.full(2, (size - 1) / 2)
    offset = centre - matrix @ centre + rng.normal(size=2) * size / 32
    return affine_transform(mask, matrix, offset, order=1, mode="nearest")
