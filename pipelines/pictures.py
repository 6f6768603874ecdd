"""Grids of pictures for the eye: every picture with its title under it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

_SMALLEST_SIDE = 96  # pixels on the screen; smaller pictures are enlarged without smoothing
_GAP = 10
_FONT_SIZE = 13
_LINE = 17
_BACKGROUND, _TEXT = (250, 250, 250), (32, 32, 32)


def provenance(facts: Mapping[str, Any]) -> PngInfo:
    """What made a picture, as text in its PNG file: `Image.open(file).text` gives it back. None is left out, and what
    is no text is JSON."""
    info = PngInfo()
    info.add_itxt("Software", "genmodels")
    for name, value in facts.items():
        if value is not None:
            info.add_itxt(name, value if isinstance(value, str) else json.dumps(value, default=str))
    return info


def grid_png(images: np.ndarray | Sequence[np.ndarray], titles: Sequence[str] = (), columns: int = 8) -> Image.Image:
    """A labelled grid, from left to right and top to bottom.

    Args:
        images: uint8 (n, height, width, 3), all of one size. Sides below 96 pixels are enlarged by a whole number.
        titles: none, or one for each picture; long ones are wrapped, and nothing is cut off.
        columns: pictures in a row.

    Raises ValueError for pictures of another type or shape, or another number of titles.
    """
    pictures = np.asarray(images)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8 or not len(pictures):
        raise ValueError(f"images must be uint8 (n, height, width, 3), not {pictures.dtype} {pictures.shape}")
    if titles and len(titles) != len(pictures):
        raise ValueError(f"{len(titles)} titles for {len(pictures)} pictures")
    scale = -(-_SMALLEST_SIDE // min(pictures.shape[1:3]))
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    columns = max(1, min(columns, len(pictures)))
    font = ImageFont.load_default(size=_FONT_SIZE)
    wrapped = [_wrap(title, font, width) for title in titles] or [[] for _ in pictures]
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    row_heights = [height + _LINE * max(len(wrapped[i]) for i in row) + 2 * _GAP for row in rows]

    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, sum(row_heights) + _GAP), _BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    top = _GAP
    for row, row_height in zip(rows, row_heights):
        for column, i in enumerate(row):
            left = _GAP + column * (width + _GAP)
            picture = Image.fromarray(pictures[i]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            for line, text in enumerate(wrapped[i]):
                canvas.text((left, top + height + 3 + line * _LINE), text, fill=_TEXT, font=font)
        top += row_height
    return sheet


def _wrap(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces; a word wider than that is broken where it must be."""
    lines = [""]
    for word in title.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]
