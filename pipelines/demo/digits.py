"""The demo's data: real handwritten digits, drawn in an ink and on a paper of eight colours, with an English caption.

The strokes are scikit-learn's 1,797 digits (8×8 grey levels; E. Alpaydin and C. Kaynak, UCI "Optical Recognition of
Handwritten Digits"). The first 1,500 are for training; the last 297, by other writers, are held out. On top of that,
twenty combinations of digit, ink and paper are never drawn for training: a model that draws them from a sentence has
composed them from parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import NamedTuple, TypedDict

import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {  # near the corners of the RGB cube: as far apart as eight can be
    "black": (16, 16, 16),
    "white": (242, 242, 242),
    "red": (220, 24, 32),
    "green": (16, 168, 48),
    "blue": (28, 48, 224),
    "yellow": (244, 224, 32),
    "magenta": (220, 48, 212),
    "cyan": (32, 212, 228),
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a {ink} {digit} on a {paper} background",
    "{ink} {digit} on {paper} paper",
    "handwritten {digit}, ink {ink}, paper {paper}",
    "the digit {digit} written in {ink} on {paper}",
    "the number {digit} in {ink} ink on a {paper} page",
    "{digit}, drawn in {ink} on {paper} paper",
    "on {paper} paper, a {ink} {digit}",
    "a {paper} page with a {ink} {digit} on it",
    "paper {paper}, ink {ink}: the digit {digit}",
    "a picture of a {ink} {digit} against {paper}",
    "{paper} background, {ink} handwritten {digit}",
    "someone wrote {digit} with a {ink} pen on {paper} paper",
    "a handwritten {digit} in {ink}, the background is {paper}",
    "{digit} in {ink} on {paper}",
)
TRAIN_DIGITS = 1500
SPLITS = {"train": range(TRAIN_DIGITS), "held_out": range(TRAIN_DIGITS, 1797)}

_MARGIN = 0.5  # cells of paper around the 8×8 original, so that strokes do not end at the picture's edge
_THRESHOLD = 0.5  # share of full ink above which the enlarged original counts as stroke
_OVERSAMPLE = 4


class Combination(NamedTuple):
    """What a caption says: digit 0-9, and the names of two different colours."""

    digit: int
    ink: str
    paper: str


class Meta(TypedDict):
    """What a picture shows, and the index (0-1796) of its strokes in scikit-learn's digits."""

    digit: int
    ink: str
    paper: str
    source: int
    kept_out: bool


def _choose_kept_out(seed: int = 2024) -> list[Combination]:
    """Two combinations a digit, in twenty different pairs of colours; each colour is ink two or three times."""
    rng = np.random.default_rng(seed)
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    shifts = rng.permutation(np.arange(1, len(COLOURS)))
    pairs = [(colours[n % 8], colours[(n % 8 + shifts[n // 8]) % 8]) for n in range(20)]
    return [Combination(n % 10, *pairs[i]) for n, i in enumerate(rng.permutation(20))]


KEPT_OUT: list[Combination] = _choose_kept_out()


@cache
def load_originals() -> tuple[np.ndarray, np.ndarray]:
    """The originals, float32 (1797, 8, 8) in [0, 1] with 1 as ink, and their digits, int64 (1797,)."""
    from sklearn.datasets import load_digits  # imported late: a second of start-up that --help should not pay

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=2048)
def stroke_mask(source: int, size: int, threshold: float = _THRESHOLD) -> np.ndarray:
    """The strokes of original `source`, enlarged: float32 (size, size) in [0, 1] with edges one pixel wide.

    `threshold` is the share of full ink above which a place counts as stroke: a higher one makes thinner strokes.

    The bicubic enlargement is thresholded at four times the size and then averaged, so the outline is as sharp as the
    size allows: 64 pixels hold detail that 16 do not. The array is shared between calls, so it is read-only.
    """
    original = np.pad(load_originals()[0][source], 1)
    fine, edge = size * _OVERSAMPLE, 1 - _MARGIN
    box = (edge, edge, original.shape[1] - edge, original.shape[0] - edge)
    smooth = Image.fromarray(original).resize((fine, fine), Image.Resampling.BICUBIC, box=box)
    stroke = (np.asarray(smooth) > threshold).astype(np.float32)
    mask = stroke.reshape(size, _OVERSAMPLE, size, _OVERSAMPLE).mean(axis=(1, 3))
    mask.setflags(write=False)
    return mask


def paint(mask: np.ndarray, ink: str, paper: str) -> np.ndarray:
    """A picture, uint8 (size, size, 3), from a stroke mask, float (size, size) in [0, 1], and two colour names."""
    ink_rgb, paper_rgb = (np.asarray(COLOURS[name], dtype=np.float32) for name in (ink, paper))
    return np.rint(paper_rgb + mask[..., None] * (ink_rgb - paper_rgb)).astype(np.uint8)


def caption(digit: int, ink: str, paper: str, rng: np.random.Generator) -> str:
    """One of the templates with the digit as a numeral or a word: 28 sentences for each combination."""
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return template.format(digit=(str(digit), WORDS[digit])[rng.integers(2)], ink=ink, paper=paper)


@cache
def _patterns() -> list[re.Pattern[str]]:
    colour, digit = "|".join(COLOURS), "|".join([*map(str, range(10)), *WORDS])
    parts = {"ink": f"(?P<ink>{colour})", "paper": f"(?P<paper>{colour})", "digit": f"(?P<digit>{digit})"}
    return [re.compile(template.format(**parts)) for template in TEMPLATES]


def parse_caption(text: str) -> Combination:
    """What a caption of this data set says; raises ValueError for any other sentence.

    >>> parse_caption("a red seven on a white background")
    Combination(digit=7, ink='red', paper='white')
    """
    for pattern in _patterns():
        if match := pattern.fullmatch(text):
            word = match["digit"]
            return Combination(int(word) if word.isdigit() else WORDS.index(word), match["ink"], match["paper"])
    raise ValueError(f"no caption of the digits: {text!r}")


def colour_pairs(digit: int, *, with_kept_out: bool) -> list[tuple[str, str]]:
    """The (ink, paper) pairs in which `digit` may be drawn: 56, or 54 without those that are kept out."""
    pairs = [(ink, paper) for ink in COLOURS for paper in COLOURS if ink != paper]
    return [pair for pair in pairs if with_kept_out or (digit, *pair) not in KEPT_OUT]


def draw_split(split: str, size: int, repeats: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray, str, Meta]]:
    """Draw every digit of a split `repeats` times, each time in another pair of colours.

    Yields (key, picture uint8 (size, size, 3), caption, meta), always the same for the same arguments. Split "train"
    never shows a combination of `KEPT_OUT`; "held_out" may, and its meta says where it does. Raises ValueError for
    another split, or a size below 8 pixels.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    if size < 8 or repeats < 1:
        raise ValueError(f"size must be at least 8 pixels and repeats at least 1, not {size} and {repeats}")
    digits = load_originals()[1]
    for repeat in range(repeats):
        for source in SPLITS[split]:
            digit = int(digits[source])
            pairs = colour_pairs(digit, with_kept_out=split != "train")
            # One permutation for a source, walked by its repeats: no two repeats share their colours.
            order = np.random.default_rng([seed, source]).permutation(len(pairs))
            ink, paper = pairs[order[repeat % len(pairs)]]
            rng = np.random.default_rng([seed, source, repeat, 1])
            meta = Meta(digit=digit, ink=ink, paper=paper, source=source, kept_out=(digit, ink, paper) in KEPT_OUT)
            picture = paint(stroke_mask(source, size), ink, paper)
            yield f"{split}-{source:04d}-{repeat:02d}", picture, caption(digit, ink, paper, rng), meta
