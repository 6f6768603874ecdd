"""MLflow runs: one run for one training however often it restarts, and each step in it once.

`start_run` and `finish_run` are the driver's; `RunLogger` is the worker's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import BadRequest
from infra.mlflow_store import check_tracking, open_client, patiently, tracking_uri
from infra.run_logger import RunLogger

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = [
    "RunLogger",
    "check_tracking",
    "finish_run",
    "log_evaluation",
    "metric_history",
    "set_tags",
    "start_run",
    "tracking_uri",
]

_PARAM_LENGTH = 6000  # characters; MLflow refuses longer values


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None  # a server keeps its own
        if uri.startswith("sqlite:///"):
            folder = Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts" / name.replace("/", "_")
            location = folder.as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another trial was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise BadRequest(f"MLflow experiment {name!r} is deleted at {uri}; restore it, or name another")
    return found.experiment_id


def start_run(
    uri: str | None,
    experiment: str,
    run_name: str,
    run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> str:
    """Create the run of a training, or open run `run_id` again as RUNNING; returns its id.

    Parameters of a run cannot change in MLflow: one that differs on resuming is kept as tag `param_now.NAME`.
    Raises BadRequest where `run_id` is not in this store.
    """
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(uri)
    client = open_client(uri)
    logged: dict[str, str] = {}
    if run_id is None:
        experiment_id = patiently(_experiment_id, client, uri, experiment)
        run_id = str(patiently(client.create_run, experiment_id, run_name=run_name).info.run_id)
    else:
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            raise BadRequest(
                f"MLflow run {run_id} of this training is not in {uri}; "
                "set MLFLOW_TRACKING_URI to the store it began in, or start anew under another run.name"
            ) from error
        if run.info.lifecycle_stage == "deleted":
            raise BadRequest(
                f"MLflow run {run_id} of this training is deleted in {uri}; restore it, or take another run.name"
            )
        logged = dict(run.data.params)
        patiently(client.update_run, run_id, status="RUNNING")
    values = {key: str(value)[:_PARAM_LENGTH] for key, value in (params or {}).items()}
    changed = {f"param_now.{key}": value for key, value in values.items() if logged.get(key, value) != value}
    new_params = [Param(key, value) for key, value in values.items() if key not in logged]
    new_tags = [RunTag(key, str(value)) for key, value in {**(tags or {}), **changed}.items()]
    for first in range(0, max(len(new_params), len(new_tags)), 100):  # MLflow's limit for one request
        part = slice(first, first + 100)
        patiently(client.log_batch, run_id, params=new_params[part], tags=new_tags[part])
    return run_id


def finish_run(uri: str | None, run_id: str, status: str = "FINISHED") -> None:
    """End the run as FINISHED, FAILED or KILLED."""
    client = open_client(uri)
    patiently(client.set_terminated, run_id, status=status)


def set_tags(uri: str | None, run_id: str, tags: Mapping[str, Any]) -> None:
    """Set (or replace) tags of a run."""
    client = open_client(uri)
    for key, value in tags.items():
        patiently(client.set_tag, run_id, key, str(value))


def log_evaluation(
    uri: str | None, run_id: str, figures: Mapping[str, float], step: int, files: Iterable[Path]
) -> None:
    """Figures of an evaluation at a training step, and its files as artifacts under `evaluation/`."""
    from mlflow.entities import Metric

    client = open_client(uri)
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for name, value in figures.items() if math.isfinite(value)]
    patiently(client.log_batch, run_id, metrics=metrics)
    for file in files:
        patiently(client.log_artifact, run_id, str(file), "evaluation")


def metric_history(uri: str | None, run_id: str, keys: Iterable[str]) -> list[dict[str, float]]:
    """Logged values of `keys` as rows {"step": …, key: value, …}, by step; a key that a step lacks is absent."""
    client = open_client(uri)
    rows: dict[int, dict[str, float]] = {}
    for key in keys:
        for metric in client.get_metric_history(run_id, key):
            rows.setdefault(metric.step, {"step": metric.step})[key] = metric.value
    return [rows[step] for step in sorted(rows)]
