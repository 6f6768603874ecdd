"""What `promote.py` does once its arguments are read."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from infra.errors import BadRequest, check_summary, write_summary
from infra.mlflow_store import check_tracking
from infra.promotion import Decision, champion_of, history, mend, roll_back
from infra.registry import find_version
from infra.registry_lease import RegistryLease
from pipelines.evaluation.command import add_measuring_arguments, request_of
from pipelines.promotion.gates import Check, Gates
from pipelines.training.explain import describe_keys, explain
from pipelines.training.presets import override

_REPORTED = ("promoted", "refused", "would be promoted", "would be refused", "already champion", "rolled back")


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """The arguments of `promote.py`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="gates, with defaults:\n" + "\n".join(describe_keys(Gates)),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="models:/NAME/VERSION, or models:/NAME for its newest version")
    add("--gates", metavar="FILE", help="YAML file with gates that replace the defaults")
    add("overrides", nargs="*", metavar="key=value", help="replaces a gate; values are YAML")
    add("--dry-run", action="store_true", help="measure and say what would be decided; nothing is moved or recorded")
    add("--anew", action="store_true", help="judge it by itself, where the champion is lost or cannot be compared with")
    add("--rollback", action="store_true", help="make the previous champion the champion again")
    add("--history", action="store_true", help="list all decisions, and stop")
    add_measuring_arguments(parser, count=1000)
    add("--summary", metavar="FILE", help="write decision, reason, checks and figures as one JSON object")
    return parser


def promote(arguments: argparse.Namespace) -> dict[str, Any]:
    """Promote, refuse, roll back or list, as `promote.py` is asked to; prints and returns the summary.

    Raises:
        BadRequest: something in the request cannot be used; the message says what to do.
    """
    check_summary(arguments.summary)
    gates = read_gates(arguments.gates, arguments.overrides)
    if arguments.rollback + arguments.history + arguments.dry_run > 1:
        raise BadRequest("--rollback, --history and --dry-run: give one of them")
    uri = check_tracking(arguments.tracking_uri)
    version = find_version(arguments.model, uri)
    name, number = version.name, str(version.version)
    if arguments.history:
        summary: dict[str, Any] = {"model": name, "decisions": [asdict(each) for each in history(uri, name)]}
        show_history(name, history(uri, name), champion_of(uri, name))
    elif arguments.rollback:
        with RegistryLease(uri, name) as lease:
            mended = mend(lease)
            tell_mended(name, mended)
            went_back = [each for each in mended if each.event == "rollback" and each.champion == each.version]
            # Typed again after it was cut off, it went back already: once more would be a champion too far.
            decision = went_back[-1] if went_back else roll_back(lease)
        summary = {"model": name, "outcome": "rolled back", **asdict(decision)}
        Console(soft_wrap=True).print(f"{name}: {decision.reason}", highlight=False)
    else:
        from pipelines.promotion.run import decide

        request = request_of(arguments, f"models:/{name}/{number}")
        summary = decide(uri, name, number, gates, request, arguments.dry_run, arguments.anew)
        show(summary)
    write_summary(arguments.summary, summary)
    return summary


def tell_mended(name: str, mended: list[Decision]) -> None:
    """Say which decisions had been cut off, and what became of them."""
    for decision in mended:
        print(f"{name}: decision {decision.number} was cut off; {decision.reason}", flush=True)


def read_gates(path: str | None, overrides: list[str]) -> Gates:
    """The gates of a YAML file, or the defaults, with overrides. Raises BadRequest, which names every mistake."""
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadRequest(f"--gates {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise BadRequest(f"--gates {path} must hold a mapping, such as improve_by: 0.02")
    try:
        return Gates.model_validate(override(tree, overrides))
    except ValidationError as error:
        raise BadRequest("; ".join(explain(error, Gates))) from None


def show(summary: dict[str, Any]) -> None:
    """Print the gates, one a line, and the decision."""
    console = _console()
    console.print(f"[bold]{summary['model']}[/] version {summary['version']}: {summary['outcome']}", highlight=False)
    if checks := summary["checks"]:
        table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
        for check in (Check(**each) for each in checks):
            table.add_row("✓" if check.passed else "✗", check.gate, check.told)
        console.print(table, highlight=False)
    console.print(f"  reason     {summary['reason']}", highlight=False, markup=False)
    console.print(f"  champion   {_told(summary['champion'])}", highlight=False, markup=False)


def show_history(name: str, decisions: list[Decision], champion: str | None) -> None:
    """Print the decisions, oldest first."""
    table = Table(title=f"{name}: champion is {_told(champion)}", padding=(0, 1, 0, 0))
    for column in ("", "when", "version", "event", "champion", "reason"):
        table.add_column(column)
    for each in decisions:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.time))
        moved = (
            f"{each.before or '–'} → {each.champion or '–'}" if each.before != each.champion else each.champion or "–"
        )
        table.add_row(str(each.number), when, each.version, each.event, moved, each.reason)
    _console().print(table)


def _console() -> Console:
    """With room for a table in the log of a job, which has no width of its own."""
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 118
    return console


def _told(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
