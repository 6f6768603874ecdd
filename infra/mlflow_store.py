"""Which MLflow store a process talks to: its URI, whether all nodes reach it, and how one waits for a locked file."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from infra import storage
from infra.errors import BadRequest

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training calls no one it was not told of
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # of each run that ends
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # bars of its own would cut through the run's

Result = TypeVar("Result")
_LOCK_SECONDS = 120.0  # how long other writers of one SQLite file are waited for


def tracking_uri(uri: str | None = None) -> str:
    """`uri`, else MLFLOW_TRACKING_URI, else a SQLite file under the run root; paths within it are made absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.run_root()}/mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    return uri


def _is_local(uri: str) -> bool:
    return uri.startswith(("sqlite:", "file:")) or "://" not in uri


def check_tracking(uri: str | None, nodes: int = 1) -> str:
    """The absolute tracking URI. Raises BadRequest where `nodes` machines cannot all log to it, or nobody answers."""
    uri = tracking_uri(uri)
    if _is_local(uri) and nodes > 1:
        raise BadRequest(
            f"tracking URI {uri} is a local file, but the run has {nodes} nodes; "
            "start `mlflow server` and set MLFLOW_TRACKING_URI to its http://HOST:PORT"
        )
    if _is_local(uri) and not uri.startswith("sqlite:///"):
        raise BadRequest(
            f"tracking URI {uri}: MLflow no longer writes plain folders; give sqlite:////FILE or http://HOST:PORT"
        )
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
        except urllib.error.HTTPError:
            pass  # it answers: a proxy may guard /health and still let the API through
        except (urllib.error.URLError, OSError) as error:
            raise BadRequest(
                f"no MLflow server answers at {uri} ({error}); start it, or mend MLFLOW_TRACKING_URI"
            ) from error
        _check_user(uri)
    return uri


def _check_user(uri: str) -> None:
    """Raises BadRequest where the server knows its users, and this is none: /health asks for no login."""
    from mlflow.exceptions import MlflowException

    try:
        open_client(uri).search_experiments(max_results=1)
    except MlflowException as error:
        if error.error_code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise
        raise BadRequest(
            f"the MLflow server at {uri} refuses the login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "(or MLFLOW_TRACKING_TOKEN)"
        ) from None


def _create_database(path: Path) -> None:
    """An empty file for MLflow to fill, with a write-ahead log: two writers then wait a quarter as long."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def open_client(uri: str | None = None) -> MlflowClient:
    """A client for the runs and models of one tracking URI; the first use of a SQLite file creates it (1.5 s)."""
    uri = tracking_uri(uri)
    alone: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        _create_database(file)
        alone = FileLock(f"{file}.lock")  # two processes that fill it at once are in each other's way
    from mlflow.tracking import MlflowClient

    for noisy in (
        "alembic",
        "mlflow.store.db.utils",
        "mlflow.store.model_registry.abstract_store",
        "mlflow.system_metrics.system_metrics_monitor",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with alone:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def patiently(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`call(*args, **kwargs)`, tried again while another process holds the lock of the SQLite file (two minutes)."""
    deadline, pause = time.monotonic() + _LOCK_SECONDS, 0.05
    while True:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if "database is locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
