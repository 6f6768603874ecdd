"""What `judge_model.py` does once its arguments are read."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from infra.errors import BadRequest, write_summary
from pipelines.demo.digits import KEPT_OUT
from pipelines.demo.evaluation import Draw, evaluate_digits, kept_out_prompts
from pipelines.demo.report import galleries, write_report
from pipelines.drawing_options import add_drawing_arguments, complete_options, drawing_options
from pipelines.generation import find_export
from pipelines.pictures import grid_png

if TYPE_CHECKING:
    from genmodels.drawing import DrawingModel

_SHOWN = (
    ("consistency", "consistency_real", "consistency_ratio"),
    ("consistency_digit", "consistency_ink", "consistency_paper"),
    ("consistency_shuffled", "consistency_chance"),
    ("coverage", "coverage_real", "coverage_ratio"),
    ("seconds_per_100",),
)


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """The arguments of `judge_model.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="an export's folder, a training run's folder, or models:/NAME/VERSION or @ALIAS")
    add("--count", type=int, default=1000, help="pictures to draw, a multiple of 20 (default: %(default)s)")
    add("--seed", type=int, default=0, help="picture i is drawn from seed·count + i (default: %(default)s)")
    add_drawing_arguments(parser)
    add(
        "--processes",
        type=int,
        default=1,
        help="above 1: of one core each (default: %(default)s, on all cores)",
    )
    add("--tracking-uri", help="MLflow server for models:/… (default: MLFLOW_TRACKING_URI, else the local one)")
    add("--report", metavar="FILE", help="write a page to look at (HTML, self-contained)")
    add("--grid", metavar="FILE", help="write a labelled grid of the first two pictures of each combination (PNG)")
    add("--facts", metavar="FILE", help="JSON object of facts about the run, for the report")
    add(
        "--history",
        metavar="FILE",
        help="JSON for the report: rows of step, loss, validation_loss; or {training: rows}",
    )
    add("--summary", metavar="FILE", help="write figures and paths as one JSON object")
    return parser


def judge_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge as `judge_model.py` is asked to; prints and returns the figures, and writes what was asked for.

    Raises BadRequest for a model, count or file that cannot be used.
    """
    if arguments.processes < 1:
        raise BadRequest(f"--processes must be at least 1, not {arguments.processes}")
    options = drawing_options(arguments)
    try:
        kept_out_prompts(arguments.count, arguments.seed)
    except ValueError as error:
        raise BadRequest(f"--count: {error}") from None
    facts, history = _read_json(arguments.facts, {}), _read_json(arguments.history, [])
    folder = find_export(arguments.model, arguments.tracking_uri)
    options = complete_options(options, folder)
    with ExitStack() as closing:
        draw, model = _drawing(folder, arguments.processes, arguments.precision, options, closing)
        evaluation = evaluate_digits(draw, model.image_size, arguments.count, arguments.seed)
    _show(evaluation.figures)

    options["precision"] = model.precision
    summary = {"model": arguments.model, "export_folder": str(folder), **options, **evaluation.figures}
    if arguments.grid:
        number = min(2 * len(KEPT_OUT), arguments.count)
        Path(arguments.grid).parent.mkdir(parents=True, exist_ok=True)
        grid_png(evaluation.pictures[:number], evaluation.captions[:number]).save(arguments.grid)
        summary["grid"] = str(Path(arguments.grid).resolve())
    if arguments.report:
        about = {"model": arguments.model, "export_folder": str(folder), "evaluation_seed": arguments.seed, **options}
        write_report(arguments.report, evaluation.figures, galleries(evaluation), history, {**about, **facts})
        summary["report"] = str(Path(arguments.report).resolve())
    write_summary(arguments.summary, summary)
    return summary


def _drawing(
    folder: Path, processes: int, precision: str, options: dict[str, Any], closing: ExitStack
) -> tuple[Draw, DrawingModel]:
    """A function that draws, with a progress bar, and the model that it draws with. `closing` ends its processes."""
    import torch

    from genmodels.drawing import open_drawing_model
    from pipelines.demo.parallel_draw import DrawingPool

    try:
        model = open_drawing_model(folder, "cuda" if torch.cuda.is_available() else "cpu", precision)
        if not model.conditional:
            raise BadRequest(f"{folder} was trained without captions, and the digits are asked for by captions")
        pool = None
        if processes > 1:
            pool = closing.enter_context(DrawingPool(folder, processes, model.precision))
        # One picture ahead of the clock: a model's first call is slower than all others, and shows a bad option.
        model.draw(["a red seven on a white background"], [0], **options)
    except (ValueError, OSError) as error:
        raise BadRequest(f"{folder}: {error}") from error

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            row = bar.add_task("drawing", total=len(prompts))

            def progress(done: float, _total: int) -> None:
                bar.update(row, completed=int(done))

            return (pool or model).draw(prompts, seeds, progress=progress, **options)

    return draw, model


def _read_json(path: str | None, default: Any) -> Any:
    if path is None:
        return default
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadRequest(f"{path} is not JSON: {error}") from None


def _show(figures: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 3, 0, 0))
    for row in _SHOWN:
        table.add_row(*(f"{name} {figures[name]:.3f}" for name in row))
    Console().print(f"{figures['count']} pictures of kept-out combinations, none rejected:", table)
