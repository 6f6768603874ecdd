"""The driver of a training run: check everything, start or resume, train, export, register.

Running the same command again resumes; when the run is finished it says so. A step that was done (training, export,
registration) is not done again.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from infra import storage, tracking
from infra.errors import BadRequest, RunFailed
from pipelines.data.fixed import fixed_batches
from pipelines.data.order import DataOrder
from pipelines.data.prepare import digits_complete, write_digits
from pipelines.data.quarantine import allowed_bad
from pipelines.training import checkpoint as checkpoints
from pipelines.training import cluster
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.config import TrainConfig, abstract_networks, logged
from pipelines.training.export import export_run, initial_objective, to_publish
from pipelines.training.fit import Part, fit
from pipelines.training.inputs import local_inputs, parents, prepare_inputs, sample_spec
from pipelines.training.lease import EXPIRY_SECONDS, Lease
from pipelines.training.run_data import RunData, data_urls
from pipelines.training.run_folder import RunFolder, root_of
from pipelines.training.trainer import check_phases

_SHARD_SAMPLES = 1000
_READ_FIRST, _READ_MORE = 8, 256  # samples that are tried before any worker starts
_PATIENCE_SECONDS = 1.5 * EXPIRY_SECONDS  # a trial whose process was killed on another machine is started again
_CHECKED_PARAMETERS = 500_000_000  # larger models are built by the workers alone


def train(
    config: TrainConfig, lines: bool = False, parent_run: str | None = None, part: Part | None = None
) -> dict[str, Any]:
    """Carry out (or resume, or report as finished) a training run; returns its summary.

    With `lines` its progress is told in lines, also on a terminal: for several trainings at once, each in a thread.
    `parent_run` is the MLflow run that this one is a part of. Of a `part`, the summary is `outcome` (paused),
    `checkpoint`, `steps` and `measured` (held-out figures there).

    Raises:
        BadRequest: the request cannot be carried out; nothing was started.
        RunFailed: training failed; the message gives the first cause.
    """
    started = time.time()
    folder = RunFolder.of(config)
    cluster.check_local_room(config)
    storage.check_access(root_of(config), write=True)
    uri = tracking.check_tracking(config.tracking.uri)
    data, order = prepare_data(config, folder)
    # What is finished can be read by several trainings at once, and so without the lease.
    published = storage.exists(folder.path("result.json")) and folder.began_as(config)
    if published and (result := _finished(config, folder, data, checkpoints.newest_verified(folder.checkpoints))):
        return result
    with Lease(folder, patience=0.0 if part is None else _PATIENCE_SECONDS) as lease:
        folder.begin(config)
        newest = checkpoints.newest_verified(folder.checkpoints) or _continued(config, folder)
        if result := _finished(config, folder, data, newest):
            return result
        if part is not None and newest is not None and newest.manifest.get("measured"):  # perhaps not told yet
            figures = newest.manifest["measured"]
            part.on_measured({"step": newest.step, "figures": figures, "checkpoint": newest.url})
        complete = newest is not None and _is_complete(newest, config)
        ready = newest is not None and (complete or (part is not None and newest.step >= part.until))
        prepare_inputs(config, folder, data.train)
        if not ready:
            _check_objective(config, folder)
            _check_samples(config, folder, data)
        run_id = _open_tracking(config, folder, uri, data, parent_run)
        try:
            if not ready:
                if newest is not None:
                    print(f"run {config.run.name!r} resumes from step {newest.step} of {config.run.steps}", flush=True)
                fit(config, folder, uri, run_id, lease, started, lines, part)
            lease.check()
            if part is not None and (paused := _paused(config, folder)):
                tracking.finish_run(uri, run_id, "FINISHED")
                return {**paused, "mlflow_run_id": run_id, "run_folder": folder.url}
            summary = _publish(config, folder, uri, run_id, data, order)
        except BaseException as error:
            _mark_failed(uri, run_id, error)
            raise
        tracking.finish_run(uri, run_id, "FINISHED")
        folder.write("result.json", summary)
    resumed_from = newest.step if newest is not None else 0
    ended = {"outcome": "trained", "resumed_from": resumed_from, "started": started, "seconds": time.time() - started}
    return {**summary, **ended}


def _continued(config: TrainConfig, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint of another run that this one begins with, by run.continue_from. Raises BadRequest."""
    source = config.run.continue_from
    if source is None:
        return None
    url = source if storage.is_remote(source) or "/" in source else storage.join(root_of(config), source)
    found = checkpoints.find_checkpoint(url)
    if found is None:
        raise BadRequest(f"run.continue_from={source}: no checkpoint that verifies; name a run's folder, or one of its")
    if found.step >= config.run.steps:
        raise BadRequest(f"run.continue_from={source} is at step {found.step} already: set run.steps to more")
    return checkpoints.adopt(found, folder.checkpoints)


def _paused(config: TrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """What is told of a run that stands before its end; None where it has come there."""
    newest = checkpoints.newest_verified(folder.checkpoints)
    if newest is None:
        raise RunFailed(f"the checkpoint of {folder.url} does not verify: type the same command again")
    if _is_complete(newest, config):
        return None
    told = {"outcome": "paused", "run": config.run.name, "steps": newest.step, "checkpoint": newest.url}
    return {**told, "measured": newest.manifest.get("measured", {})}


def _finished(
    config: TrainConfig, folder: RunFolder, data: RunData, newest: Checkpoint | None
) -> dict[str, Any] | None:
    """The summary of a run that is trained and published; None where something is left to do.

    Raises:
        BadRequest: it cannot be gone on with.
    """
    _check_continuation(config, newest, data)
    result = folder.read("result.json")
    if newest is None or result is None or not _is_complete(newest, config) or not _is_of(result, newest, config):
        return None
    print(f"run {config.run.name!r} is finished: {result['steps']} steps; nothing to do", flush=True)
    return {**result, "outcome": "already finished"}


def _is_complete(newest: Checkpoint, config: TrainConfig) -> bool:
    why = newest.manifest.get("stopped_early")
    if isinstance(why, int):  # of an earlier version
        why = {"patience": why}
    if why is not None:  # and neither limit was lifted since
        limits = {"patience": config.best.patience, "max_hours": config.run.max_hours}
        return newest.finished and all(limits[limit] == value for limit, value in why.items())
    return newest.finished and newest.step >= config.run.steps


def _is_of(result: dict[str, Any], newest: Checkpoint, config: TrainConfig) -> bool:
    """Whether what was published is this checkpoint, under the name that is asked for now."""
    registered = (result["model_uri"] or "").removeprefix("models:/").rpartition("/")[0] or None
    return result.get("checkpoint") == newest.url and registered == config.tracking.register_as


def _check_continuation(config: TrainConfig, newest: Checkpoint | None, data: RunData) -> None:
    """Refuse to go on from a checkpoint with other data, or to end before it."""
    if newest is None:
        return
    for key, (name, digest) in zip(("data.url", "data.other_url"), data.facts.items(), strict=False):
        known = newest.manifest[name]
        if known != digest:
            raise BadRequest(
                f"the shards at {key} changed since run {config.run.name!r} began (index {known[:12]} then, "
                f"{digest[:12]} now), so its order of samples is lost: start anew with run.name=ANOTHER_NAME"
            )
    if newest.step > config.run.steps and not newest.finished:
        raise BadRequest(f"run {config.run.name!r} is at step {newest.step} already: set run.steps to that or more")


def _check_objective(config: TrainConfig, folder: RunFolder) -> None:
    """Build the objective once here, unless it is large, so that what does not fit is told before a worker starts."""
    inputs = local_inputs(folder)
    networks = abstract_networks(config)
    size = sum(p.numel() for module in networks.values() for p in module.parameters())
    if size > _CHECKED_PARAMETERS:
        return
    try:
        check_phases(config, initial_objective(config, inputs))
    except ValueError as error:
        raise BadRequest(" ".join(str(error).split())) from None


def _check_samples(config: TrainConfig, folder: RunFolder, data: RunData) -> None:
    """Read a few samples of each set. Raises BadRequest where none can be used, as where a member has another name."""
    spec = sample_spec(config, local_inputs(folder))
    sets = (data.train, data.validation, data.other, data.other_validation)
    for key, index in zip(data_urls(config), sets, strict=True):
        if index is None or config.data.max_bad_share == 1:
            continue
        (batch,) = fixed_batches(index, spec, _READ_FIRST, _READ_FIRST)
        if all(batch["reasons"]):  # of many, so that neither chance nor one damaged shard decides
            (batch,) = fixed_batches(index, spec, _READ_MORE, _READ_MORE)
        count = len(batch["reasons"])
        if all(batch["reasons"]) and allowed_bad(config.data.max_bad_share, count, chunk_samples=0) < count:
            raise BadRequest(
                f"{key}: none of {len(batch['reasons'])} samples can be used, the first being {batch['keys'][0]}: "
                f"{batch['reasons'][0]}"
            )


def _mark_failed(uri: str, run_id: str, error: BaseException) -> None:
    """Mark the MLflow run; where that fails too, `error` stays the one that is told."""
    try:
        tracking.finish_run(uri, run_id, "FAILED")
    except Exception as second:
        error.add_note(f"MLflow run {run_id} could not be marked as FAILED: {second}")


def prepare_data(config: TrainConfig, folder: RunFolder) -> tuple[RunData, DataOrder]:
    """Indexes of the shards (built where there are none), and the order of those at data.url; everything about the data
    is checked here."""
    draw_demo(config)
    data = RunData.load(config, folder.path("index"))
    if data.new_share is not None:
        print(f"of an epoch of {data.train.samples} samples {data.new_share:.3f} are new", flush=True)
    orders = data.orders(config)
    for key, order in zip(("data.url", "data.other_url"), orders, strict=False):
        order.check_world_size(config.workers.count)
        if order.row_slots > order.samples:
            print(
                f"note: data.lanes × data.slots_per_lane is {order.row_slots}, more than the {order.samples} samples "
                f"of {key}: some come twice before others come once; lower data.slots_per_lane for exact epochs",
                flush=True,
            )
    return data, orders[0]


def draw_demo(config: TrainConfig) -> None:
    """Draw the demo's shards where they belong; a `data.url` of one's own is never written to."""
    data, size = config.data, config.data.demo_size or config.objective.image_size
    out = storage.join(str(storage.run_root()), "data", f"digits-{size}")
    if data.demo != "digits" or data.url != storage.join(out, "train") or digits_complete(out):
        return
    print(f"drawing the demo's digits to {out}", flush=True)
    write_digits(out, size, data.demo_repeats, _SHARD_SAMPLES, overwrite=True)


def _open_tracking(config: TrainConfig, folder: RunFolder, uri: str, data: RunData, parent_run: str | None) -> str:
    """One MLflow run for one training, however often it restarts."""
    known = folder.read("run.json") or {}
    tags = {
        **data.facts,
        "git_commit": git_commit(),
        "run_folder": folder.url,
        "pipeline": config.objective.kind,
        **({} if parent_run is None else {"mlflow.parentRunId": parent_run}),
    }
    params = logged(json.loads(config.model_dump_json()))
    run_id = tracking.start_run(
        uri, config.tracking.experiment, config.run.name, known.get("mlflow_run_id"), params, tags
    )
    folder.write("run.json", {"mlflow_run_id": run_id, "tracking_uri": uri})
    return run_id


def _publish(
    config: TrainConfig, folder: RunFolder, uri: str, run_id: str, data: RunData, order: DataOrder
) -> dict[str, Any]:
    """Export and register what was trained; returns the summary of the run."""
    newest = checkpoints.newest_verified(folder.checkpoints)
    if newest is None or not newest.finished:
        raise RunFailed(f"the last checkpoint of {folder.url} does not verify: type the same command again")
    published = to_publish(folder, newest)
    export_url, facts = export_run(folder, published)
    figures = newest.manifest.get("figures", {})
    summary: dict[str, Any] = {
        "run": config.run.name,
        "run_folder": folder.url,
        "steps": newest.step,
        "checkpoint": newest.url,
        "epochs": order.slots_consumed(newest.step) / order.samples,
        "samples": data.samples,
        **data.facts,
        "export": export_url,
        "mlflow_run_id": run_id,
        "tracking_uri": uri,
        "model_uri": None,
        "figures": figures,
        "start_seconds": newest.manifest.get("start_seconds", {}),
        "best": newest.manifest.get("best"),
        "stopped_early": newest.manifest.get("stopped_early") is not None,
        "published_step": published.step,
    }
    if config.tracking.register_as is not None:
        from infra.registry import register_export, resolve_model

        lineage = {
            **data.facts,
            "data_url": config.data.url,
            **({} if config.data.other_url is None else {"other_data_url": config.data.other_url}),
            "git_commit": git_commit(),
            "seed": config.run.seed,
            "steps": published.step,
            "init_from": config.run.init_from,
            "run_folder": folder.url,
            **parents(folder),
        }
        described = {
            **facts,
            "figures": published.manifest.get("figures", {}),
            "data": data.described(config),
        }
        summary["model_uri"] = register_export(
            uri,
            run_id,
            resolve_model(export_url),
            config.tracking.register_as,
            described,
            yaml.safe_dump(json.loads(config.model_dump_json())),
            lineage,
        )
    return summary


def git_commit() -> str:
    """The commit of the sources, by the environment (GIT_COMMIT), a file of that name beside them, as an image has it,
    or git; "unknown" in a bare copy."""
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    sources = Path(__file__).resolve().parents[2]
    noted = sources / "GIT_COMMIT"
    if noted.is_file():
        return noted.read_text().strip() or "unknown"
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=sources, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return "unknown"
    return asked.stdout.strip() if asked.returncode == 0 else "unknown"
