"""One launch at a time for a run: two drivers would write each other's checkpoints and log every step twice."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from infra import storage
from infra.errors import BadRequest, RunFailed
from infra.owner import is_alive, new_owner
from pipelines.training.run_folder import RunFolder

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
SETTLING_SECONDS = 2.0


class Lease:
    """Held in a `with` block by the driver; renewed by a thread, and free again after EXPIRY_SECONDS without renewal.

    A driver that died on this machine is noticed at once, so the same command can be typed again at once. A driver that
    was cut off for so long that another one took over learns it by `check`. For `patience` seconds the end of another
    launch is waited for.
    """

    def __init__(self, folder: RunFolder, patience: float = 0.0) -> None:
        self.folder, self.patience = folder, patience
        self.owner = new_owner()
        self._ended, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        """Raises BadRequest where another launch of the run is alive."""
        deadline = time.monotonic() + self.patience
        while (other := self._take()) is not None:
            if time.monotonic() > deadline:
                raise BadRequest(
                    f"{self.folder.url} is being trained by process {other['pid']} on {other['host']}: "
                    f"wait for it, or stop it and try again after {EXPIRY_SECONDS:.0f} s"
                )
            time.sleep(1.0)
        if not self._is_ours():
            raise BadRequest(f"{self.folder.url}: another launch of this run began at the same moment; it goes on")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if self._is_ours():
                storage.remove(self.folder.path("lease.json"))
        except storage.ERRORS as error:  # what ends the run matters more, and the lease ends by itself
            print(f"{self.folder.url}: the lease could not be given back ({error})", file=sys.stderr)

    def _take(self) -> dict[str, Any] | None:
        """Write the lease, unless another launch lives: its lease is returned then."""
        with self._one_at_a_time():
            other = self.folder.read("lease.json")
            if other is not None and is_alive(other, self.owner, EXPIRY_SECONDS):
                return other
            self._write()
            if storage.is_remote(self.folder.url):
                time.sleep(SETTLING_SECONDS)  # who read before this was written has written by then, and wins
        return None

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """On this machine's disks, nobody else looks at the lease meanwhile."""
        if storage.is_remote(self.folder.url):
            yield
            return
        os.makedirs(self.folder.url, exist_ok=True)
        with FileLock(self.folder.path(".lease.lock")):
            yield

    def _is_ours(self) -> bool:
        found = self.folder.read("lease.json")
        return found is not None and found["token"] == self.owner["token"]

    def check(self) -> None:
        """Raises RunFailed where another launch has taken over."""
        if self._lost.is_set():
            raise RunFailed(f"{self.folder.url}: another launch of this run took over while this one was cut off")

    def _write(self) -> None:
        self.folder.write("lease.json", {**self.owner, "renewed": time.time()})

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                with self._one_at_a_time():
                    if not self._is_ours():
                        self._lost.set()
                        return
                    self._write()
            except Exception as error:  # of storage, which may answer again before the lease expires
                print(f"{self.folder.url}: the lease could not be renewed ({error}); trying again", file=sys.stderr)
