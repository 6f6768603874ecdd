"""A small Ray actor between workers and driver: how far the run is, and what failed first."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Words of errors that come from a lost peer or a bad connection.
NETWORK_WORDS = ("closed by peer", "connection", "gloo", "nccl", "socket", "broken pipe", "timed out", "barrier")


@ray.remote(num_cpus=0, max_restarts=-1)
class Board:
    """Holds the newest progress and every failure of a launch."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._failures: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._measurements: list[dict[str, Any]] = []

    def note(self, line: str) -> None:
        """Something that people should read."""
        self._notes.append(line)

    def progress(self, entry: dict[str, Any]) -> None:
        self._progress = entry

    def failure(self, entry: dict[str, Any]) -> None:
        self._failures.append(entry)
        self._notes.append(f"worker {entry['rank']} failed at step {entry['step']}: {entry['error']}")

    def measured(self, entry: dict[str, Any]) -> None:
        """Held-out figures at a step, and the checkpoint that they belong to."""
        self._measurements.append(entry)

    def measurements(self, last: int) -> list[dict[str, Any]]:
        """Those after a step; one that was measured again after a restart is told once."""
        later = {entry["step"]: entry for entry in self._measurements if entry["step"] > last}
        return [later[step] for step in sorted(later)]

    def read(self) -> tuple[dict[str, Any], list[str]]:
        """The newest progress, and all notes."""
        return self._progress, self._notes

    def failures(self) -> list[dict[str, Any]]:
        return self._failures

    def fatal(self) -> bool:
        """A worker failed in a way that a restart would repeat."""
        return any(entry["fatal"] for entry in self._failures)


def first_cause(failures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The failure that the others followed from: who lost a peer came later, whoever noticed first."""

    def order(entry: dict[str, Any]) -> tuple[bool, bool, float]:
        text = entry["error"].lower()
        return not entry["fatal"], any(word in text for word in NETWORK_WORDS), entry["time"]

    return min(failures, key=order, default=None)


def describe_failure(entry: dict[str, Any]) -> str:
    """One failure in a few lines: worker, step, shard, and the end of its traceback."""
    where = f"worker {entry['rank']} on {entry['node']}, step {entry['step']}"
    if entry.get("phase"):
        where += f", phase {entry['phase']}"
    if entry.get("shards"):
        where += f", shards {', '.join(entry['shards'])}"
    return f"{where}: {entry['error']}\n{entry['traceback']}"


_CONSOLE = Console(soft_wrap=True)  # of all displays: the bars of trainings side by side are drawn together


class ProgressDisplay:
    """Shows the board on the terminal until closed: a bar where there is a terminal, else a line now and then.

    With `lines` never a bar: two of them would write over each other.
    """

    def __init__(self, board: Any, title: str, steps: int, lines: bool = False) -> None:
        self._board, self._title, self._steps = board, title, steps
        self._lines = lines or not _CONSOLE.is_terminal
        self._noted = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=5)

    def _poll(self) -> tuple[dict[str, Any], list[str]]:
        """The newest progress, and the notes not shown yet."""
        try:
            progress, notes = ray.get(self._board.read.remote(), timeout=5)
        except ray.exceptions.RayError:  # the actor is being restarted, or the driver is ending
            return {}, []
        new = notes[self._noted :]
        self._noted = max(self._noted, len(notes))
        return progress, new

    def _show(self) -> None:
        console = _CONSOLE
        if self._lines:
            self._show_lines(console)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(self._title, total=self._steps, figures="starting workers")
            closing = False
            while not closing:
                closing = self._closing.wait(0.5)
                entry, notes = self._poll()
                for note in notes:
                    progress.console.print(note, markup=False, style="red")
                if entry:
                    progress.update(bar, completed=entry["step"], figures=figures_text(entry))

    def _show_lines(self, console: Console) -> None:
        shown, printed_at, closing = -1, 0.0, False
        while not closing:
            closing = self._closing.wait(0.5)
            entry, notes = self._poll()
            for note in notes:
                console.print(f"{self._title}: {note}", markup=False, highlight=False)
            if entry and entry["step"] != shown and (closing or time.monotonic() - printed_at > 10):
                shown, printed_at = entry["step"], time.monotonic()
                line = f"{self._title}: step {shown}/{self._steps}  {figures_text(entry)}"
                console.print(line, markup=False, highlight=False)


def figures_text(entry: dict[str, Any]) -> str:
    """The figures beside the bar."""
    parts = [entry["doing"]] if entry.get("doing") else []
    for name, form in (("loss", "loss {:.4f}"), ("val_loss", "val {:.4f}"), ("samples_per_second", "{:.0f} samples/s")):
        if name in entry:
            parts.append(form.format(entry[name]))
    return "  ".join(parts)
