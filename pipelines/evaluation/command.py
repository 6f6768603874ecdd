"""What `evaluate.py` does once its arguments are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from infra.errors import BadRequest, check_summary, write_summary
from pipelines.drawing_options import add_drawing_arguments, drawing_options

if TYPE_CHECKING:
    from genmodels.metrics.figure import Figure
    from pipelines.evaluation.plan import Request

_KINDS = ("classifier", "inception", "dinov2", "clip")


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """The arguments of `evaluate.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="models:/NAME/VERSION or @ALIAS, a run, one of its checkpoints, an export, or a folder of pictures",
    )
    add_measuring_arguments(parser, count=2000)
    add("--lpips", metavar="FILE", help="VGG-16 and LPIPS weights (safetensors), to measure an autoencoder with")
    add("--curve-steps", default="5,10,40", metavar="N,N", help="other numbers of steps (default: %(default)s)")
    add("--curve-guidance", default="1,3,5", metavar="S,S", help="other guidance scales (default: %(default)s)")
    add("--curve-count", type=int, default=100, help="pictures at each of them; 0: no curves (default: %(default)s)")
    add("--against", metavar="FILE", help="figures.json of an earlier evaluation: say what is better and what worse")
    add("--out", metavar="FOLDER", help="for report.html and figures.json (default: evaluation/ under the run root)")
    add("--no-log", action="store_true", help="write nothing to MLflow")
    add("--summary", metavar="FILE", help="write ids, paths and figures as one JSON object")
    return parser


def add_measuring_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """Add how many pictures are drawn and how, what they are compared with, and what looks at them."""
    add = parser.add_argument
    add("--count", type=int, default=count, help="pictures to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="picture i is drawn from seed·count + i (default: %(default)s)")
    add_drawing_arguments(parser, precision="auto")
    add("--data", metavar="URL", help="shards of real pictures that no training saw (default: the run's held-out ones)")
    add("--training-data", metavar="URL", help="shards of the training, to find copies (default: the run's)")
    add(
        "--caption",
        metavar="PLACE",
        help="shard member with the caption: txt, or json:KEY (default: the run's, or txt)",
    )
    add("--data-count", type=int, default=10_000, help="real pictures of each kind, at most (default: %(default)s)")
    add(
        "--features",
        metavar="KIND:PATH",
        help=f"what looks at the pictures: {', '.join(_KINDS)} and where it is, as dinov2:facebook/dinov2-base, or "
        "digits (default: digits for the demo's data)",
    )
    add("--clip", metavar="PATH", help="folder, hub name or models:/NAME of a CLIP, for how well captions fit")
    add("--actors", type=int, help="processes that draw and measure (default: one for each GPU, else for each core)")
    add("--tracking-uri", help="MLflow server for models:/… (default: MLFLOW_TRACKING_URI, else the local one)")


def request_of(arguments: argparse.Namespace, model: str) -> Request:
    """What `add_measuring_arguments` read, for this model. Raises BadRequest where a number is out of range."""
    options = drawing_options(arguments)
    for name, least in (("count", 10), ("data_count", 10), ("actors", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise BadRequest(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    from pipelines.evaluation.plan import Request

    return Request(
        model=model,
        tracking_uri=arguments.tracking_uri,
        count=arguments.count,
        seed=arguments.seed,
        options=options,
        precision=arguments.precision,
        data=arguments.data,
        training_data=arguments.training_data,
        caption=arguments.caption,
        data_count=arguments.data_count,
        features=arguments.features,
        clip=arguments.clip,
        actors=arguments.actors,
    )


def evaluate_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as `evaluate.py` is asked to; prints and returns the summary, and writes report and figures.

    Raises:
        BadRequest: something in the request cannot be used; the message says what to do.
    """
    check_summary(arguments.summary)
    request = request_of(arguments, arguments.model)
    if arguments.curve_count < 0 or 0 < arguments.curve_count < 10:
        raise BadRequest(f"--curve-count must be 0 or at least 10, not {arguments.curve_count}")
    settings = {
        "num_steps": _numbers("--curve-steps", arguments.curve_steps, int),
        "guidance_scale": _numbers("--curve-guidance", arguments.curve_guidance, float),
    }
    earlier = None if arguments.against is None else read_figures(arguments.against)

    from pipelines.evaluation.run import evaluate

    summary = evaluate(
        replace(
            request,
            perceptual=arguments.lpips,
            curve_settings=settings,
            curve_count=arguments.curve_count,
            out=None if arguments.out is None else Path(arguments.out).expanduser().absolute(),
            log=not arguments.no_log,
        )
    )
    show(summary)
    write_summary(arguments.summary, summary)
    if earlier is not None:
        summary["against"] = show_against(summary["figures"], earlier)
    write_summary(arguments.summary, summary)
    return summary


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadRequest(f"{name} {text}: write numbers with commas between") from None
    if any(number <= 0 for number in found):
        raise BadRequest(f"{name} {text}: write numbers above 0")
    return found


def read_figures(path: str) -> dict[str, Figure]:
    """The figures of a `figures.json`, by name. Raises BadRequest where it is none."""
    from pydantic import ValidationError

    from genmodels.metrics.figure import Figure

    try:
        rows = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))["figures"]
        figures = [Figure.model_validate(row) for row in rows]
    except OSError as error:
        raise BadRequest(f"--against {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, ValidationError):
        raise BadRequest(f"--against {path}: holds no figures of an evaluation; name its figures.json") from None
    return {figure.name: figure for figure in figures}


def show(summary: Mapping[str, Any]) -> None:
    """Print what was found, the figures, and where everything is."""
    console = Console(soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("value", "95 %", "real pictures"):
        table.add_column(column, justify="right")
    for row in summary["figures"]:
        real = summary["real"].get(row["name"])
        interval = "" if row["low"] is None else f"{row['low']:.4g} … {row['high']:.4g}"
        table.add_row(row["name"], f"{row['value']:.4g}", interval, "" if real is None else f"{real:.4g}")
    conditions = summary["figures"][0]["conditions"]
    console.print(f"{conditions['count']:,} pictures, none picked out:", table, highlight=False)
    for finding in summary["findings"]:
        console.print(f"{'✓' if finding['kind'] == 'none' else '!'} {finding['text']}", highlight=False, markup=False)
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds_by_part"].items())
    console.print(f"done in {summary['seconds']:.0f} s ({parts})", highlight=False)
    console.print(f"  report    {summary['report']}", highlight=False, markup=False)
    console.print(f"  figures   {summary['figures_file']}", highlight=False, markup=False)


def show_against(figures: Sequence[Mapping[str, Any]], earlier: Mapping[str, Figure]) -> dict[str, str]:
    """Print and return, for each figure that both have, whether it is better, worse, or undecided.

    Raises:
        BadRequest: they were measured differently; the message names each difference.
    """
    from genmodels.metrics.figure import Figure, compare

    verdicts: dict[str, str] = {}
    for row in figures:
        if row["name"] in earlier:
            try:
                verdicts[row["name"]] = compare(Figure.model_validate(row), earlier[row["name"]])
            except ValueError as error:
                raise BadRequest(f"--against: {error}") from None
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict} (was {earlier[name].value:.4g})")
    return verdicts
