"""The page of an evaluation: what was found, figures with intervals, curves, pictures at their worst."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genmodels.metrics.figure import Conditions, Figure
from pipelines.evaluation.charts import Point, interval_chart
from pipelines.evaluation.figures import COPY_QUANTILE, Measured, Sets
from pipelines.evaluation.findings import Finding
from pipelines.evaluation.page import Gallery, as_text, gallery_section, tile, write_page
from pipelines.evaluation.slices import BY_WORD, Slice

_SHOWN, _PAIRS, _SLICES = 32, 16, 20

MEANINGS: dict[str, str] = {
    "frechet_distance": "Fréchet distance of the features to held-out real pictures; 0 is equal",
    "frechet_distance_training": "the same to training pictures: far below the one above, and the model copies",
    "kernel_distance": "unbiased kernel distance to held-out real pictures; around 0 is equal",
    "precision": "share of the pictures that lie where real ones do",
    "recall": "share of the real pictures that lie where generated ones do",
    "density": "how thickly real pictures surround a generated one; about 1 is real",
    "coverage": "share of the real pictures that have a generated one in their neighbourhood",
    "inception_score": "sure of each picture's class and of many classes; it never sees real pictures",
    "ms_ssim": "structural similarity of two pictures; higher than real ones, and they are too much alike",
    "copy_share": f"share nearer to a training picture than {1 - COPY_QUANTILE:.0%} of real held-out pictures are",
    "psnr": "peak signal-to-noise ratio of reconstructions, in decibels",
    "ssim": "structural similarity of reconstructions and originals; 1 is equal",
    "lpips": "learned perceptual distance of reconstructions and originals; 0 is equal",
    "caption_consistency": "share that show all that their captions say",
    "clip_score": "100 · cosine of picture and caption in CLIP's space",
}


@dataclass(frozen=True)
class Curve:
    """A figure against a setting of the sampler, `count` pictures at each."""

    title: str
    setting: str
    points: list[Point]
    chosen: float
    count: int


def write_report(
    path: Path,
    name: str,
    sets: Sets,
    measured: Measured,
    found: Sequence[Finding],
    slices: Mapping[str, Sequence[Slice]],
    curves: Sequence[Curve],
    facts: Mapping[str, Any],
) -> None:
    """Write the page to `path`."""
    conditions = measured.figures[0].conditions
    sections = [
        _headline(name, measured, found, conditions),
        _table(measured),
        _curves(curves),
        _slices(slices),
        gallery_section(_first(sets)),
        gallery_section(_worst(sets, measured)),
        *([gallery_section(_copies(sets, measured))] if measured.copies is not None else []),
        _facts({**conditions.model_dump(), **facts}),
    ]
    write_page(path, f"Evaluation of {name}", sections)


def _headline(name: str, measured: Measured, found: Sequence[Finding], conditions: Conditions) -> str:
    picked = ("frechet_distance", "precision", "recall", "coverage", "caption_consistency", "copy_share")
    by_name = {figure.name: figure for figure in measured.figures}
    tiles = []
    for key in picked:
        if (figure := by_name.get(key)) is None:
            continue
        real = measured.real.get(key)
        note = _interval(figure) + ("" if real is None else f"; real pictures {_number(real)}")
        tiles.append(tile(key.replace("_", " "), figure.value, note))
    said = "".join(
        f'<p class="finding {"good" if each.kind == "none" else "bad"}">{html.escape(each.text)}</p>' for each in found
    )
    drawn = "" if conditions.sampler is None else f", drawn with {conditions.num_steps} steps of {conditions.sampler}"
    intro = (
        f"{conditions.count:,} pictures{drawn}, none picked out, against {conditions.data_count:,} real pictures that "
        "no training saw. Brackets are intervals of 95 % confidence."
    )
    return (
        f"<h1>{html.escape(name)}</h1><p class=quiet>{html.escape(intro)}</p>{said}"
        f"<div class=tiles>{''.join(tiles)}</div>"
    )


def _table(measured: Measured) -> str:
    rows = []
    for figure in measured.figures:
        meaning = MEANINGS.get(figure.name, "")
        if figure.name.startswith("caption_consistency_"):
            meaning = "share that are right in this part of the caption"
        if figure.name.startswith("retrieval_of_"):
            meaning = "share of the pictures whose own caption is nearest among so many"
        real = measured.real.get(figure.name)
        arrow = "↑" if figure.better == "higher" else "↓"
        rows.append(
            f"<tr><td class=name>{figure.name.replace('_', ' ')} {arrow}<span>{html.escape(meaning)}</span></td>"
            f"<td>{_number(figure.value)}</td><td>{_interval(figure)}</td>"
            f"<td>{'' if real is None else _number(real)}</td></tr>"
        )
    head = "<tr><th>figure</th><th>value</th><th>interval</th><th>real pictures</th></tr>"
    note = (
        "Real pictures: the same figure with real training pictures in the place of generated ones (for captions and "
        "similarity: held-out ones). Where there are no training data, one half of the held-out pictures against the "
        "other."
    )
    return f"<h2>All figures</h2><p class=quiet>{note}</p><div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _curves(curves: Sequence[Curve]) -> str:
    charts = "".join(interval_chart(curve.title, curve.setting, curve.points, curve.chosen) for curve in curves)
    if not charts:
        return ""
    note = f"{curves[0].count} pictures at each setting, of the same captions and seeds. Filled: the setting above."
    return f"<h2>Steps and guidance</h2><p class=quiet>{note}</p><div class=charts>{charts}</div>"


def _slices(slices: Mapping[str, Sequence[Slice]]) -> str:
    tables = []
    for title, rows in slices.items():
        if not rows:
            continue
        if len(rows) > _SLICES and title == BY_WORD:
            title, rows = f"{title}, the {_SLICES} lowest", rows[:_SLICES]
        columns = [column for column in rows[0].shares if any(column in row.shares for row in rows)]
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            f"<tr><td>{html.escape(row.name)}</td><td>{row.pictures}</td>"
            + "".join(f"<td>{row.shares[c]:.2f}</td>" if c in row.shares else "<td></td>" for c in columns)
            + "</tr>"
            for row in rows
        )
        table = f"<table><tr><th></th><th>pictures</th>{head}</tr>{body}</table>"
        tables.append(f"<div><h2>{html.escape(title)}</h2><div class=scroll>{table}</div></div>")
    return f"<div class=charts>{''.join(tables)}</div>" if tables else ""


def _first(sets: Sets) -> Gallery:
    store = sets.generated
    number = min(_SHOWN, store.count)
    note = f"The first {number}, in the order drawn."
    return Gallery("Pictures", note, np.array(store.thumbnails[:number]), _titles(store.captions, range(number)))


def _worst(sets: Sets, measured: Measured) -> Gallery:
    worst = np.argsort(-measured.strange)[: min(_PAIRS, sets.generated.count)].tolist()
    wrong = measured.read.get("all")
    faults = {} if wrong is None else {place: "not as asked" for place, row in enumerate(worst) if not wrong[row]}
    note = "Those farthest from every real held-out picture, by the features."
    pictures = np.stack([sets.generated.thumbnails[row] for row in worst])
    return Gallery("The strangest", note, pictures, _titles(sets.generated.captions, worst), faults)


def _copies(sets: Sets, measured: Measured) -> Gallery:
    assert measured.copies is not None and sets.training is not None
    closest = np.argsort(measured.copies.distance)[: min(_PAIRS, sets.generated.count)].tolist()
    side_by_side, titles = [], []
    for row in closest:
        own, theirs = sets.generated.thumbnails[row], sets.training.thumbnails[int(measured.copies.which[row])]
        gap = np.full((len(own), 2, 3), 128, np.uint8)
        side_by_side.append(np.concatenate([own, gap, theirs], axis=1))
        titles.append(f"distance {measured.copies.distance[row]:.3g}")
    note = (
        f"Generated on the left, the nearest of {sets.training.count:,} training pictures on the right, the closest "
        "pairs first. "
        f"{COPY_QUANTILE:.0%} of real held-out pictures are nearer than {measured.copy_threshold:.3g}."
    )
    return Gallery("Nearest training pictures", note, np.stack(side_by_side), titles)


def _titles(captions: Sequence[str], rows: Sequence[int] | range) -> list[str]:
    return [captions[row] for row in rows]


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(as_text(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None and value != {}
    )
    return f"<h2>How it was measured</h2><table class=facts>{rows}</table>"


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"[{_number(figure.low)}, {_number(figure.high)}]"


def _number(value: float) -> str:
    """Three digits of what is large, three decimals of what is about 1, four of what is small."""
    if abs(value) >= 10:
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.4f}"
