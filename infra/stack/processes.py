"""The processes of a local stack: started in sessions of their own, told from all others, stopped to the last one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "LOCAL_STACK_FOLDER"
"""Environment variable of every process of a stack, jobs included: the folder of the stack it belongs to."""
_POLITE_SECONDS = 10.0  # between SIGTERM and SIGKILL: Ray takes about 4


@dataclass(frozen=True)
class Part:
    """One server or node: the process that leads its session, and where it answers."""

    name: str
    url: str
    pid: int
    started: float
    """Create time of the process in seconds since the epoch: another process that got the same pid has another."""

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def start(name: str, url: str, command: list[str], environment: Mapping[str, str], folder: Path) -> Part:
    """Run `command` in a session of its own, what it says going to `folder`/logs/NAME.log (readable by its owner)."""
    logs = folder / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
        process = subprocess.Popen(
            command,
            env={**environment, MARK: str(folder)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
    return Part(name, url, process.pid, psutil.Process(process.pid).create_time())


def log_end(folder: Path, name: str, lines: int = 3) -> str:
    """The last lines of a part's log, as one."""
    try:
        text = (folder / "logs" / f"{name}.log").read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())


def members(folder: Path, parts: Iterable[Part], temporary: Path | None) -> list[psutil.Process]:
    """Every living process of the stack: its parts, what they started, and what a crash left of them.

    The mark in the environment tells; Ray's processes write their titles over it, so that for these their session and
    working directory do. This process and those that started it are never among them.
    """
    sessions = {part.pid for part in parts}
    places = [folder] if temporary is None else [folder, temporary]
    spared = {process.pid for process in [psutil.Process(), *psutil.Process().parents()]}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == str(folder) or (
                os.getsid(process.pid) in sessions
                and any(Path(process.cwd()).is_relative_to(place) for place in places)
            ):
                for member in [process, *process.children(recursive=True)]:
                    if member.pid not in spared and member.status() != psutil.STATUS_ZOMBIE:
                        found[member.pid] = member
    return list(found.values())


def stop(folder: Path, parts: Iterable[Part], temporary: Path | None) -> int:
    """Ask all processes of the stack to end, kill those that do not; returns how many there were."""
    parts = list(parts)
    present = members(folder, parts, temporary)
    stopped = {process.pid for process in present}
    leaders = {part.pid for part in parts}
    # Those that lead know how to end the rest; where none is left (a crash), each is asked itself.
    for process in [process for process in present if process.pid in leaders] or present:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + _POLITE_SECONDS
    while present and time.monotonic() < deadline:
        psutil.wait_procs(present, timeout=0.3)  # also takes note of the end of those that we started ourselves
        present = members(folder, parts, temporary)
        stopped |= {process.pid for process in present}
        if not any(process.pid in leaders for process in present):
            break
    while present:
        for process in present:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(present, timeout=5)
        present = members(folder, parts, temporary)
        stopped |= {process.pid for process in present}
        if time.monotonic() > deadline + 30:
            break
    return len(stopped)


def free_ports(count: int) -> list[int]:
    """So many different ports on 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def is_open(port: int) -> bool:
    """Whether anything on this machine accepts connections at `port`."""
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect_ex(("127.0.0.1", port)) == 0
