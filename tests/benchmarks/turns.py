"""Processes that take turns: each trains a few steps while the others wait, so that all meet the same machine.

A conductor listens; each process connects, says its name, and waits. A turn is one window of steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, TypeVar

ADDRESS, NAME, STEPS = "BENCH_TURNS", "BENCH_NAME", "BENCH_WINDOW"
_Batch = TypeVar("_Batch")


def taking_turns(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches; before each window waits for this process's turn, after it reports the seconds of a step."""
    window = int(os.environ[STEPS])
    with Client(os.environ[ADDRESS]) as conductor:
        conductor.send(os.environ[NAME])
        while conductor.recv() == "go":
            began = time.perf_counter()
            for _ in range(window):
                yield next(batches)
            conductor.send((time.perf_counter() - began) / window)
    yield from batches  # what is left, unmeasured


class Conductor:
    """Starts processes one after another, lets each run a window to warm up, and then gives them turns."""

    def __init__(self, folder: Path, window: int) -> None:
        self.window = window
        self._address = str(folder / f"turns-{time.time_ns()}")
        self._listener = Listener(self._address)
        self._running: dict[str, tuple[subprocess.Popen[Any], Connection, Path]] = {}

    def start(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        """Start a process that takes turns, and wait until it has done its first window."""
        log = Path(f"{self._address}-{name}.log")
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdout=log.open("wb"), stderr=subprocess.STDOUT,
            env={**environment, ADDRESS: self._address, NAME: name, STEPS: str(self.window)},
        )  # fmt: skip
        self._listener._listener._socket.settimeout(5.0)  # type: ignore[attr-defined]  # it may end before it connects
        while True:
            try:
                connection = self._listener.accept()
                break
            except TimeoutError:
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended before its first step:\n{log.read_text()}") from None
        assert connection.recv() == name
        self._running[name] = (process, connection, log)
        self._turn(name)

    def _turn(self, name: str) -> float:
        process, connection, log = self._running[name]
        connection.send("go")
        try:
            return float(connection.recv())
        except EOFError:
            raise SystemExit(f"{name} ended with {process.wait()}:\n{log.read_text()}") from None

    def measure(self, rounds: int, each: Callable[[int], None]) -> dict[str, list[float]]:
        """Seconds of a step of each process, for each round; the order turns around from round to round."""
        seconds: dict[str, list[float]] = {name: [] for name in self._running}
        for number in range(rounds):
            each(number)
            for name in list(seconds)[:: 1 if number % 2 else -1]:
                seconds[name].append(self._turn(name))
        return seconds

    def finish(self) -> None:
        """Let each in turn go to its end."""
        for name, (process, connection, log) in self._running.items():
            connection.send("rest")
            if process.wait():
                raise SystemExit(f"{name} ended with {process.returncode}:\n{log.read_text()}")
            connection.close()
        self._running.clear()
        self._listener.close()
