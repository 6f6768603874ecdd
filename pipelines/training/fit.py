"""The fitting of a training run: Ray Train's workers are started, shown and watched from the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra import storage, tracking
from infra.errors import BadRequest, RunFailed
from pipelines.training import cluster
from pipelines.training.config import TrainConfig
from pipelines.training.lease import Lease
from pipelines.training.run_data import data_urls
from pipelines.training.run_folder import RunFolder


@dataclass(frozen=True)
class Part:
    """A training that is paused before its end, and watched meanwhile, as a trial of a search.

    Attributes:
        until: step at which it is paused, with a checkpoint; typed again without a part, it goes on.
        on_measured: called in the driver with {"step", "figures", "checkpoint"} once a step's held-out figures and its
            checkpoint are there. What it raises ends the training.
    """

    until: int
    on_measured: Callable[[dict[str, Any]], None]


def fit(
    config: TrainConfig,
    folder: RunFolder,
    uri: str,
    run_id: str,
    lease: Lease,
    started: float,
    lines: bool,
    part: Part | None,
) -> None:
    """Train until the run's last step, or that of `part`; `started` is when the command began.

    Raises:
        BadRequest: a node cannot reach a folder, or no extractor opens; no worker was started.
        RunFailed: training failed, with its first cause; or another process took the run over.
    """
    extractor = _extractor(config)
    marks = {"launch": started, "checks": time.time()}
    cluster.connect(config)
    marks["ray"] = time.time()
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.board import Board, ProgressDisplay, describe_failure, first_cause
    from pipelines.training.worker import train_worker

    cluster.check_shared(folder.url, "the run's folder")
    for key, url in data_urls(config).items():
        if url is not None:
            cluster.check_shared(url, key)
    tracking.check_tracking(uri, cluster.node_count())
    board = Board.remote()  # type: ignore[attr-defined]
    filesystem, path = (
        storage.ray_filesystem(folder.path("ray")) if storage.is_remote(folder.url) else (None, folder.path("ray"))
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump_json(),
            "folder": folder.url,
            "tracking_uri": uri,
            "mlflow_run_id": run_id,
            "board": board,
            "marks": marks,
            "extractor": None if extractor is None else ray.put(extractor),  # checked here, and the same on every node
            "until": None if part is None else part.until,
        },
        torch_config=TorchConfig(backend="nccl" if config.workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=config.workers.use_gpu,
            resources_per_worker={"CPU": config.workers.cpus} | ({"GPU": 1} if config.workers.use_gpu else {}),
        ),
        run_config=RayRunConfig(
            name=f"{config.run.name}-{time.time_ns()}",  # a launch of its own: what is resumed is our checkpoint
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
        ),
    )
    display = ProgressDisplay(board, config.run.name, config.run.steps, lines)
    try:
        error = _watched(trainer, lease, board, part)
    finally:
        display.close()
    cause = first_cause(ray.get(board.failures.remote()))
    if error is None and (cause is None or not cause["fatal"]):
        return
    if cause is not None:
        raise RunFailed(describe_failure(cause)) from error
    raise RunFailed(f"training ended without a worker's report: {error}") from error


def _extractor(config: TrainConfig) -> Any:
    """What looks at pictures drawn during training; None where none are. Raises BadRequest."""
    if not config.evaluation.every:
        return None
    from genmodels.features.extractor import open_extractor

    try:
        if config.evaluation.features is not None:
            return open_extractor(config.evaluation.features)
        from pipelines.demo.classifier import digits_extractor

        return digits_extractor()
    except ValueError as error:
        raise BadRequest(f"evaluation.features: {' '.join(str(error).split())}") from None


def _watched(trainer: Any, lease: Lease, board: Any, part: Part | None) -> Exception | None:
    """`trainer.fit()`; what it raises is returned. Raises RunFailed where the lease is lost meanwhile.

    In the main thread Ray Train would take over SIGINT for the rest of the process, and exit with 0 when it comes.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            trainer.fit()
        except Exception as error:
            raised.append(error)

    def tell(last: int) -> int:
        """Those after the step `last`: not by their number, as a board that died forgets the earlier ones."""
        import ray

        try:
            entries = [] if part is None else ray.get(board.measurements.remote(last))
        except ray.exceptions.RayError:  # the actor is being restarted
            return last
        for entry in entries:
            part.on_measured(entry)  # type: ignore[union-attr]
            last = entry["step"]
        return last

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    last = -1
    while thread.is_alive():
        thread.join(1.0)
        lease.check()
        last = tell(last)
    tell(last)
    return raised[0] if raised else None
