"""The demo's report: one HTML page with everything in it, for a desktop or a phone, in light or dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.demo.digits import KEPT_OUT
from pipelines.demo.evaluation import Evaluation, correct, real_pictures
from pipelines.evaluation.charts import loss_chart
from pipelines.evaluation.page import Gallery, as_text, gallery_section, tile, write_page

History = list[dict[str, Any]]

_OPEN = """\
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({folder!r})
pipeline("a red seven on a white background", num_inference_steps={num_steps}, guidance_scale={guidance_scale},
         height={size}, width={size}).images[0].save("seven.png")
"""
_NAMED_FACTS = ("data_wait_share", "seconds_by_part", "export_folder")


def galleries(evaluation: Evaluation, each: int = 2) -> list[Gallery]:
    """The first pictures of every kept-out combination, not chosen; and generated beside real held-out ones."""
    number = each * len(KEPT_OUT)
    right = correct(evaluation.reading, evaluation.wanted)["all"]
    faults = {}
    for i in np.flatnonzero(~right[:number]).tolist():
        digit, ink, paper = (part[i] for part in evaluation.reading)
        faults[i] = f"read as {ink} {digit} on {paper}" if ink else f"read as plain {paper}"
    asked = Gallery(
        "Drawn from sentences about combinations that training never saw",
        f"The first {each} of each combination, in the order drawn. Red notes say what the judge read instead.",
        evaluation.pictures[:number],
        evaluation.captions[:number],
        faults,
    )
    real, real_wanted = real_pictures("held_out", evaluation.pictures.shape[1], 0)
    gap = np.full((real.shape[1], 2, 3), 128, dtype=np.uint8)
    pairs, names = [], []
    for i, combination in enumerate(KEPT_OUT[:10]):
        pairs.append(np.concatenate([evaluation.pictures[i], gap, real[real_wanted.index(combination)]], axis=1))
        names.append(f"{combination.ink} {combination.digit} on {combination.paper}")
    note = "The same combination twice: on the left as the model drew it, on the right a real held-out digit."
    return [asked, Gallery("Generated and real", note, np.stack(pairs), names)]


def write_report(
    path: str | Path,
    figures: Mapping[str, Any],
    images: Sequence[Gallery],
    history: Mapping[str, History] | History,
    facts: Mapping[str, Any],
) -> None:
    """Write the page to `path`; parents are made.

    Args:
        figures: what `evaluate_digits` measured.
        images: what `galleries` chose.
        history: rows with `step` and `loss` and/or `validation_loss`; one list, or one under each training's name.
        facts: about the run. Shown in their own places: `data_wait_share` (0 … 1), `seconds_by_part` (part: seconds),
            `export_folder`, `num_steps`, `guidance_scale`. All others are listed by name.
    """
    curves = history if isinstance(history, Mapping) else {"Training": history}
    size = images[0].pictures.shape[1] if images else 32
    sections = [
        _headline(figures, facts, size),
        *(gallery_section(gallery) for gallery in images),
        _curves(curves),
        "<div class=charts>",
        _share_table("By digit", figures.get("per_digit", [])),
        _share_table("By combination", figures.get("per_combination", [])),
        "</div>",
        _time(facts.get("seconds_by_part", {})),
        _facts(facts),
        _how_to_open(facts, size),
    ]
    write_page(path, "Pictures from sentences: digits", sections)


def _headline(figures: Mapping[str, Any], facts: Mapping[str, Any], size: int) -> str:
    share = figures["consistency"]
    tiles = [
        tile("What was asked for", share, f"all three right; real digits {figures['consistency_real']:.3f}"),
        tile("Against real digits", figures["consistency_ratio"], "the same judge on both", at_least=0.90),
        tile(
            "Captions shuffled",
            figures["consistency_shuffled"],
            f"drawing without reading would give {figures['consistency_chance']:.3f}",
        ),
        tile(
            "Coverage, against real",
            figures["coverage_ratio"],
            f"{figures['coverage']:.3f} of held-out digits; training digits {figures['coverage_real']:.3f}",
            at_least=0.70,
        ),
        tile("Seconds for 100 pictures", figures["seconds_per_100"], "drawing only", digits=1),
    ]
    if "data_wait_share" in facts:
        tiles.append(tile("Waiting for data", facts["data_wait_share"], "share of training time", at_most=0.02))
    intro = (
        f"{figures['count']:,} pictures of {size}×{size} pixels, drawn from sentences about twenty combinations of "
        "digit, ink and paper that no training saw. None was rejected. A classifier that learned from real training "
        "digits reads the strokes; the colours are the nearest named ones."
    )
    return f"<h1>Digits drawn from sentences</h1><p class=quiet>{intro}</p><div class=tiles>{''.join(tiles)}</div>"


def _curves(history: Mapping[str, History]) -> str:
    charts = "".join(loss_chart(title, rows) for title, rows in history.items())
    return f"<h2>Training</h2><div class=charts>{charts}</div>" if charts else ""


def _share_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = {"all": "all three", "all_real": "real digits"}
    columns = [column for column in rows[0] if column != "asked"]
    head = "".join(f"<th>{names.get(column, column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{html.escape(str(row['asked']))}</td>" + "".join(f"<td>{row[c]:.2f}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    table = f"<table><tr><th>asked for</th>{head}</tr>{body}</table>"
    return f"<div><h2>{title}: share that is right</h2><div class=scroll>{table}</div></div>"


def _time(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    longest = max(seconds.values()) or 1.0
    rows = "".join(
        f"<tr><td>{html.escape(part)}</td><td>{value:.0f} s</td>"
        f'<td style="text-align:left"><span class=bar style="width:{8 * value / longest:.2f}rem"></span></td></tr>'
        for part, value in seconds.items()
    )
    total = f"<tr><td>together</td><td>{sum(seconds.values()):.0f} s</td><td></td></tr>"
    return f"<h2>Where the time went</h2><div class=scroll><table>{rows}{total}</table></div>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(as_text(value))}</td></tr>"
        for name, value in facts.items()
        if name not in _NAMED_FACTS and value is not None
    )
    return f"<h2>About this run</h2><table class=facts>{rows}</table>" if rows else ""


def _how_to_open(facts: Mapping[str, Any], size: int) -> str:
    if not facts.get("export_folder"):
        return ""
    steps, guidance = facts.get("num_steps", 20), facts.get("guidance_scale", 2.0)
    code = _OPEN.format(folder=str(facts["export_folder"]), num_steps=steps, guidance_scale=guidance, size=size)
    return f"<h2>Open the model in diffusers</h2><pre>{html.escape(code)}</pre>"
