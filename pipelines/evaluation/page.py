"""Pieces of a self-contained HTML page, for a desktop or a phone, in light or dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Gallery:
    """Pictures under a heading: uint8 (n, height, width, 3), a caption each, and for some what went wrong."""

    title: str
    note: str
    pictures: np.ndarray
    captions: Sequence[str]
    faults: Mapping[int, str] = field(default_factory=dict)


def write_page(path: str | Path, title: str, sections: Iterable[str]) -> None:
    """Write a page of these sections, HTML, with its style; parents of the file are made."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def tile(
    name: str, value: float, note: str, at_least: float | None = None, at_most: float | None = None, digits: int = 3
) -> str:
    """A figure in large type, with a note and, where there is a goal, whether it is met."""
    goal = ""
    if at_least is not None or at_most is not None:
        met = value >= at_least if at_least is not None else value <= (at_most or 0.0)
        text = f"goal at least {at_least:g}" if at_least is not None else f"goal at most {at_most:g}"
        goal = f'<span class="{"good" if met else "bad"}">{"✓ met" if met else "✗ not met"}: {text}</span>'
    return f"<div class=tile>{html.escape(name)}<b>{value:.{digits}f}</b><span>{html.escape(note)}</span>{goal}</div>"


def gallery_section(gallery: Gallery) -> str:
    """Heading and pictures; pictures wider than high get more room."""
    figures = []
    for i, (picture, caption) in enumerate(zip(gallery.pictures, gallery.captions)):
        fault = f'<span class="bad">✗ {html.escape(gallery.faults[i])}</span>' if i in gallery.faults else ""
        source = f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"
        text = html.escape(caption)
        image = f'<img src="{source}" alt="{html.escape(caption, quote=True)}">'
        figures.append(f"<figure>{image}<figcaption>{text}{fault}</figcaption></figure>")
    heading = f"<h2>{html.escape(gallery.title)}</h2><p class=quiet>{html.escape(gallery.note)}</p>"
    wide = gallery.pictures.shape[2] > gallery.pictures.shape[1]
    return f'{heading}<div class="gallery{" wide" if wide else ""}">{"".join(figures)}</div>'


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture, uint8 (height, width, 3), as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def as_text(value: Any) -> str:
    """A fact in a line: four digits of a fraction, `name: value` of a mapping."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {as_text(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
