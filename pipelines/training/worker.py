"""What runs in each Ray Train worker: build, resume, train; and say what failed."""

from __future__ import annotations

import os
import socket
import time
import traceback
from contextlib import ExitStack
from typing import Any

import psutil
import torch

from infra import storage
from infra.errors import BadRequest
from infra.tracking import RunLogger
from pipelines.data.batch import RankBatch
from pipelines.data.quarantine import Quarantine
from pipelines.training.audit import Audit
from pipelines.training.board import NETWORK_WORDS
from pipelines.training.checkpoint import newest_verified
from pipelines.training.config import TrainConfig
from pipelines.training.export import initial_objective
from pipelines.training.hooks import RunHooks, checked, known_best, training_device
from pipelines.training.inputs import local_inputs, sample_spec
from pipelines.training.run_data import RunData, parts
from pipelines.training.run_folder import RunFolder
from pipelines.training.trainer import Trainer

# Errors that come from machines and networks: starting again may help. Any other would come back.
_PASSING = (OSError, torch.distributed.DistError, torch.OutOfMemoryError)


class _Position:
    """Where this worker is, for the message when it fails."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.batch: RankBatch | None = None

    def describe(self) -> dict[str, Any]:
        phase = self.trainer.phase.network if self.trainer and self.trainer.phase else None
        if self.batch is None:
            return {"step": "before the first", "phase": phase, "shards": []}
        keys = [key for _, part in parts(self.batch) for key in part["keys"]]
        shards = sorted({key.partition(".tar/")[0] + ".tar" for key in keys})
        return {"step": self.batch["step"], "phase": phase, "shards": shards[:4]}


def train_worker(job: dict[str, Any]) -> None:
    """Entry point in a worker. `job`: config (JSON), run folder URL, MLflow run and URI, and the board."""
    import ray
    from ray import train

    board = job["board"]
    if ray.get(board.fatal.remote()):
        return  # restarted after an error that would come back: the driver tells of it
    context = train.get_context()
    position = _Position()
    try:
        _train(job, context.get_world_rank(), context.get_world_size(), context.get_local_world_size(), position)
    except Exception as error:
        text = " ".join(str(error).split())
        entry = {
            "rank": context.get_world_rank(),
            "node": socket.gethostname(),
            "time": time.time(),
            "error": f"{type(error).__name__}: {text}",
            "traceback": traceback.format_exc(limit=-6),
            "fatal": not _may_pass(error),
            **position.describe(),
        }
        ray.get(board.failure.remote(entry))
        raise


def _may_pass(error: Exception) -> bool:
    import ray

    if isinstance(error, (*_PASSING, *storage.ERRORS, ray.exceptions.RayError)):
        return True
    if isinstance(error, BadRequest) and isinstance(error.__cause__, storage.ERRORS):
        return True  # what the driver could reach a moment ago
    # torch says so with a plain RuntimeError; our own errors are of other types.
    return type(error) is RuntimeError and any(word in str(error).lower() for word in NETWORK_WORDS)


def _train(job: dict[str, Any], rank: int, world_size: int, local_world_size: int, position: _Position) -> None:
    import ray

    entered = time.time()
    config = TrainConfig.model_validate_json(job["config"])
    folder = RunFolder(job["folder"])
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    torch.set_num_threads(config.workers.threads or max(1, cores // local_world_size))
    device = training_device(config.workers.use_gpu)

    data = RunData.load(config, folder.path("index"), build=False, progress=False)
    inputs = local_inputs(folder)
    spec = sample_spec(config, inputs)

    objective = initial_objective(config, inputs)  # the same on every rank
    for network in (*objective.networks.values(), *objective.frozen.values()):
        network.to(device)
    position.trainer = trainer = Trainer(config, objective, device, rank)
    checkpoint = newest_verified(folder.checkpoints, tell=lambda line: job["board"].note.remote(line))
    if checkpoint is not None and any(checkpoint.manifest[name] != digest for name, digest in data.facts.items()):
        raise ValueError(f"the shards changed since {checkpoint.url} was written")
    start = trainer.restore(checkpoint) if checkpoint is not None else 0

    facts = {
        "mlflow_run_id": job["mlflow_run_id"],
        **data.facts,
        "training_hours": 0.0 if checkpoint is None else checkpoint.manifest.get("training_hours", 0.0),
        "marks": {**job["marks"], "workers": entered, "building": time.time()},
    }
    if config.best.metric is not None:
        facts |= known_best(newest_verified(folder.best), checkpoint)
    with ExitStack() as closing:
        logger = None
        if rank == 0:
            made = RunLogger(job["tracking_uri"], job["mlflow_run_id"], config.tracking.system_metrics)
            logger = closing.enter_context(made)
        audit = None
        if config.run.audit:
            audit = Audit(folder, rank, start)
            closing.callback(audit.write)
        quarantine = Quarantine(folder.path("quarantine"), rank, config.data.max_bad_share, data.train.chunk_samples)
        hooks = RunHooks(
            config,
            folder,
            spec,
            data,
            logger,
            job["board"],
            facts,
            quarantine,
            bad_samples=checkpoint.manifest["bad_samples"] if checkpoint is not None else 0,
            audit=audit,
            extractor=None if job["extractor"] is None else ray.get(job["extractor"]),
            until=job["until"],
        )

        def seen(batch: RankBatch) -> None:
            position.batch = batch
            if audit is not None:
                audit.record(batch)

        if job["until"] is not None and start >= job["until"]:
            return  # paused there already, before the others were told
        if start >= config.run.steps:  # shortened to where it is: only the end is left to do
            hooks.after_step(trainer, start)
            return
        batches = data.batches(config, spec, rank, world_size, start, closing)
        trainer.fit(checked(batches, quarantine, seen), start, hooks)
