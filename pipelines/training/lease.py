"""One launch at a time for a run: two drivers would write each other's checkpoints and log every step twice."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time

import psutil

from infra import storage
from infra.errors import BadRequest
from pipelines.training.run_folder import RunFolder

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0


class Lease:
    """Held in a `with` block by the driver; renewed by a thread, and free again after EXPIRY_SECONDS without renewal.

    A driver that died on this machine is noticed at once, so the same command can be typed again at once.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.owner = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        """Raises BadRequest where another launch of the run is alive."""
        other = self.folder.read("lease.json")
        if other is not None and self._alive(other):
            raise BadRequest(
                f"{self.folder.url} is being trained by process {other['pid']} on {other['host']}: "
                f"wait for it, or stop it and try again after {EXPIRY_SECONDS:.0f} s"
            )
        self._write()
        found = self.folder.read("lease.json")
        if found is None or found["token"] != self.owner["token"]:
            raise BadRequest(f"{self.folder.url}: another launch of this run began at the same moment; it goes on")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        storage.remove(self.folder.path("lease.json"))

    def _write(self) -> None:
        self.folder.write("lease.json", {**self.owner, "renewed": time.time()})

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write()

    def _alive(self, other: dict) -> bool:
        if other["host"] == self.owner["host"]:
            try:
                return psutil.Process(other["pid"]).create_time() == other["started"]
            except psutil.NoSuchProcess:
                return False
        return time.time() - other["renewed"] < EXPIRY_SECONDS
