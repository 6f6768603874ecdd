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
from pipelines.data.index import load_index
from pipelines.data.order import DataOrder
from pipelines.data.quarantine import Quarantine
from pipelines.data.stream import training_batches
from pipelines.training.audit import Audit
from pipelines.training.board import NETWORK_WORDS
from pipelines.training.checkpoint import newest_verified
from pipelines.training.config import TrainConfig
from pipelines.training.export import initial_objective
from pipelines.training.hooks import RunHooks, checked, known_best, training_device
from pipelines.training.inputs import local_inputs, sample_spec
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
        shards = sorted({key.partition(".tar/")[0] + ".tar" for key in self.batch["keys"]})
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

    index_root = folder.path("index")
    train_index = load_index(config.data.url, index_root, build=False, progress=False)
    validation_index = None
    if config.data.validation_url is not None:
        validation_index = load_index(config.data.validation_url, index_root, build=False, progress=False)
    inputs = local_inputs(folder)
    spec = sample_spec(config, inputs)
    order = DataOrder(
        train_index, config.run.seed, config.data.lanes, config.data.global_batch_size, config.data.slots_per_lane
    )

    objective = initial_objective(config, inputs)  # the same on every rank
    for network in (*objective.networks.values(), *objective.frozen.values()):
        network.to(device)
    position.trainer = trainer = Trainer(config, objective, device, rank)
    checkpoint = newest_verified(folder.checkpoints, tell=lambda line: job["board"].note.remote(line))
    if checkpoint is not None and checkpoint.manifest["index_digest"] != train_index.digest:
        raise ValueError(f"the shards changed since {checkpoint.url} was written")
    start = trainer.restore(checkpoint) if checkpoint is not None else 0

    facts = {
        "mlflow_run_id": job["mlflow_run_id"],
        "index_digest": train_index.digest,
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
        quarantine = Quarantine(folder.path("quarantine"), rank, config.data.max_bad_share, train_index.chunk_samples)
        hooks = RunHooks(
            config,
            folder,
            spec,
            train_index,
            validation_index,
            logger,
            job["board"],
            facts,
            quarantine,
            bad_samples=checkpoint.manifest["bad_samples"] if checkpoint is not None else 0,
            audit=audit,
            extractor=None if job["extractor"] is None else ray.get(job["extractor"]),
        )

        def seen(batch: RankBatch) -> None:
            position.batch = batch
            if audit is not None:
                audit.record(batch)

        if start >= config.run.steps:  # shortened to where it is: only the end is left to do
            hooks.after_step(trainer, start)
            return
        stream = training_batches(
            order=order,
            spec=spec,
            rank=rank,
            world_size=world_size,
            start_step=start,
            end_step=config.run.steps,
            concurrency=config.data.read_cpus,
            prefetch=config.data.prefetch_batches,
        )
        trainer.fit(checked(closing.enter_context(stream), quarantine, seen), start, hooks)
