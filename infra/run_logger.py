"""Logs a training's metrics to its MLflow run from a background thread, so that no step waits for MLflow.

Each step is logged once, also after restarts: a worker that resumes at an earlier checkpoint computes the same steps
again, and what the run already holds is left out. Metric by metric, since validation is logged more rarely than loss.
"""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.mlflow_store import open_client, patiently, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from PIL import Image

_METRICS_A_REQUEST = 1000  # MLflow's limit
_QUEUED_CALLS = 10_000  # a store that hangs for long holds the training up rather than filling the memory

_Step = tuple[int, int, dict[str, float]]  # step, milliseconds since 1970, values


class RunLogger:
    """Writes to one run. Made in the worker of rank 0 and nowhere else; a context manager.

    Args:
        uri: MLflow tracking URI, or None for the default.
        run_id: as `infra.tracking.start_run` gave it.
        system_metrics: also log this machine's CPU, memory, disk, network and GPU use.
        system_interval: seconds between two samples of these.
    """

    def __init__(self, uri: str | None, run_id: str, system_metrics: bool = False, system_interval: float = 10.0):
        self.uri, self.run_id = tracking_uri(uri), run_id
        self._system_interval = system_interval if system_metrics else None
        self._queue: queue.Queue[_Step | Callable[[], None] | None] = queue.Queue(_QUEUED_CALLS)
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="mlflow-logger", daemon=True)
        self._thread.start()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except RuntimeError as own:
            if error is None:
                raise
            error.add_note(str(own))  # what failed first is what the user must read

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the values of one step. A metric that the run has at this step or a later one is left out."""
        self._put((step, int(time.time() * 1000), {key: float(value) for key, value in metrics.items()}))

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Queue a picture of one step, unless the run has one of this name and step."""
        self._put(lambda: self._write_image(name, image, step))

    def log_artifact_bytes(self, path: str, data: bytes) -> None:
        """Queue a file for the run's artifacts under `path` (with slashes); an earlier one of the name is replaced."""
        self._put(lambda: self._write_artifact(path, data))

    def flush(self) -> None:
        """Wait until all that was queued is written, and raise the thread's error if it failed.

        Call it before a checkpoint is committed: a run resumed from there does not compute the steps before it again.
        """
        self._queue.join()
        if self._error is not None:
            raise RuntimeError(f"logging to MLflow at {self.uri} failed: {self._error}") from self._error

    def close(self) -> None:
        """Flush and end the thread. Raises what `flush` raises; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self.flush()

    def _put(self, item: _Step | Callable[[], None]) -> None:
        if self._closed:
            raise RuntimeError("this RunLogger is closed")
        if self._error is None:  # after an error nothing more is queued; `flush` tells
            self._queue.put(item)

    def _run(self) -> None:
        monitor = None
        try:
            self._open()
            monitor = self._start_monitor()
        except Exception as error:
            self._error = error
        running = True
        while running:
            items = [self._queue.get()]
            while len(items) < _METRICS_A_REQUEST and not self._queue.empty():
                items.append(self._queue.get())
            try:
                if self._error is None:
                    self._write(items)
            except Exception as error:
                self._error = error
            finally:
                running = None not in items
                if not running and monitor is not None:
                    monitor.finish()
                for _ in items:
                    self._queue.task_done()

    def _open(self) -> None:
        self._client = open_client(self.uri)
        data = patiently(self._client.get_run, self.run_id).data
        # The run's record carries the newest entry of each metric. The public history of a metric would do too, but
        # grows with the training. MLflow's own system monitor resumes in the same way.
        self._last_step = {metric.key: metric.step for metric in data._metric_objs}
        self._images: set[tuple[str, int]] | None = None

    def _start_monitor(self) -> Any:
        if self._system_interval is None:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # Only the figures are wanted, not a line of log for a GPU that is not there.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=self._system_interval, resume_logging=True, tracking_uri=self.uri
        )
        monitor.start()
        return monitor

    def _write(self, items: list[_Step | Callable[[], None] | None]) -> None:
        metrics: list[Metric] = []
        for item in items:
            if isinstance(item, tuple):
                metrics += self._new_metrics(*item)
            elif item is not None:
                self._write_metrics(metrics)
                metrics = []
                item()
        self._write_metrics(metrics)

    def _new_metrics(self, step: int, milliseconds: int, values: dict[str, float]) -> list[Metric]:
        from mlflow.entities import Metric

        new = {key: value for key, value in values.items() if step > self._last_step.get(key, -1)}
        self._last_step.update(dict.fromkeys(new, step))
        return [Metric(key, value, milliseconds, step) for key, value in new.items()]

    def _write_metrics(self, metrics: list[Metric]) -> None:
        for first in range(0, len(metrics), _METRICS_A_REQUEST):
            part = metrics[first : first + _METRICS_A_REQUEST]
            # Trying again is safe: an entry of the same key, step, time and value is stored once.
            patiently(self._client.log_batch, self.run_id, metrics=part)

    def _write_image(self, name: str, image: Image.Image, step: int) -> None:
        if self._images is None:
            self._images = set()
            for artifact in self._client.list_artifacts(self.run_id, "images"):
                stem, marker, rest = artifact.path.removeprefix("images/").partition("+step+")
                if marker:
                    self._images.add((stem.replace("~", "/"), int(rest.split("+")[0])))
        if (name, step) not in self._images:
            patiently(self._client.log_image, self.run_id, image, key=name, step=step)
            self._images.add((name, step))

    def _write_artifact(self, path: str, data: bytes) -> None:
        folder, _, file_name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / file_name
            local.write_bytes(data)
            patiently(self._client.log_artifact, self.run_id, str(local), folder or None)
