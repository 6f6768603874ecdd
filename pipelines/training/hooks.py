"""What happens around the training steps: metrics, validation, sample grids, checkpoints, the end of the run."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from infra import storage
from infra.tracking import RunLogger
from pipelines.data.batch import RankBatch
from pipelines.data.index import DatasetIndex
from pipelines.data.quarantine import Quarantine
from pipelines.data.spec import SampleSpec
from pipelines.data.stream import fixed_batches
from pipelines.pictures import grid_png
from pipelines.training.checkpoint import commit_snapshot, prune
from pipelines.training.config import TrainConfig
from pipelines.training.metrics import device_peak_flops, finite, flop_utilisation, memory_mib
from pipelines.training.run_folder import RunFolder
from pipelines.training.trainer import Trainer

_PROGRESS_SECONDS = 0.3


class RunHooks:
    """Called after every step, on every rank; only rank 0 has a `logger`. What is collective happens on all ranks."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        spec: SampleSpec,
        train_index: DatasetIndex,
        validation_index: DatasetIndex | None,
        logger: RunLogger | None,
        board: Any,
        facts: dict[str, Any],
    ) -> None:
        self.config, self.folder, self.spec = config, folder, spec
        self.train_index, self.validation_index = train_index, validation_index
        self.logger, self.board, self.facts = logger, board, facts
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.shown: dict[str, Any] = {}
        self._shown_at = 0.0
        self._validation: list[RankBatch] | None = None

    def after_step(self, trainer: Trainer, step: int) -> None:
        run = self.config.run
        last = step == run.steps
        checkpoint = last or step % run.checkpoint_every == 0
        if checkpoint or step % run.log_every == 0:
            self._log(trainer, step)
        if self.validation_index is not None and run.validation_samples and (last or step % run.validate_every == 0):
            self._show(step, force=True, doing="validating")
            self._report(step, trainer.validate(self._validation_batches(), step))
        figures: dict[str, float] = {}
        if last:
            self._show(step, force=True, doing="measuring")
            figures = trainer.finish(self._finish_batches, step)
            self._report(step, {f"final_{name}": value for name, value in figures.items()})
        if run.preview_samples and (last or (run.preview_every and step % run.preview_every == 0)):
            self._show(step, force=True, doing="drawing")
            self._preview(trainer, step)
        if checkpoint:
            self._checkpoint(trainer, step, last, figures)
        self._show(step, force=last)

    def _log(self, trainer: Trainer, step: int) -> None:
        metrics = trainer.log.read()
        samples_per_second, wait_share = trainer.throughput.window()
        metrics |= trainer.last
        metrics |= {
            "samples_per_second": samples_per_second,
            "data_wait_share": wait_share,
            "memory_mib": memory_mib(trainer.device),
            "epoch": step * self.config.data.global_batch_size / self.train_index.samples,
        }
        peak = device_peak_flops(trainer.device)
        if peak is not None:
            used = flop_utilisation(samples_per_second / self.world_size, trainer.objective.flops_per_sample(), peak)
            metrics |= {} if used is None else {"flop_utilisation": used}
        self._report(step, metrics)

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        self.shown |= metrics
        if self.logger is not None:
            self.logger.log(step, finite(metrics))

    def _show(self, step: int, force: bool = False, doing: str = "") -> None:
        if self.rank == 0 and (force or time.monotonic() - self._shown_at > _PROGRESS_SECONDS):
            self._shown_at = time.monotonic()
            self.board.progress.remote({**self.shown, "step": step, "doing": doing})

    def _validation_batches(self) -> list[RankBatch]:
        if self._validation is None:
            assert self.validation_index is not None
            size = self.config.rank_micro_batch
            self._validation = fixed_batches(
                self.validation_index, self.spec, self.config.run.validation_samples, size, self.rank, self.world_size
            )
        return self._validation

    def _finish_batches(self) -> Iterator[RankBatch]:
        """The same training samples on every rank, so that what is measured from them is the same."""
        yield from fixed_batches(
            self.train_index, self.spec, self.config.run.finish_samples, self.config.rank_micro_batch
        )

    def _preview(self, trainer: Trainer, step: int) -> None:
        sharded = any(self.config.engine_of(name).zero_stage == 3 for name in trainer.networks)
        if self.rank > 0 and not sharded:
            with trainer.with_ema():  # the averages are gathered by all
                return
        source = self.validation_index or self.train_index
        batch = fixed_batches(source, self.spec, self.config.run.preview_samples, self.config.run.preview_samples)[0]
        preview = trainer.preview(batch, step)
        if preview is not None and self.logger is not None:
            pixels = (
                ((preview.images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            )
            self.logger.log_image("samples", grid_png(pixels, preview.titles, preview.columns), step)

    def _checkpoint(self, trainer: Trainer, step: int, last: bool, figures: dict[str, float]) -> None:
        self._show(step, force=True, doing="saving")
        if self.logger is not None:
            self.logger.flush()  # a run resumed from here does not log these steps again
        facts = {**self.facts, "finished": last}
        if last:
            throughput = trainer.throughput
            facts["figures"] = finite(
                {
                    **{name: value for name, value in self.shown.items() if isinstance(value, float)},
                    **figures,
                    "data_wait_share": throughput.wait_share,
                    "samples_per_second": throughput.samples / max(throughput.seconds, 1e-9),
                    "training_seconds": throughput.seconds,
                }
            )
        commit_snapshot(self.folder.checkpoints, trainer.snapshot(step, facts))
        if self.rank == 0:
            prune(self.folder.checkpoints, self.config.run.keep_checkpoints)


def checked(
    batches: Iterator[RankBatch], quarantine: Quarantine, seen: Callable[[RankBatch], None]
) -> Iterator[RankBatch]:
    """The same batches, each one counted: too many bad samples stop the run here."""
    for batch in batches:
        seen(batch)
        quarantine.add(batch["keys"], batch["reasons"], batch["step"])
        quarantine.check()
        yield batch


class Audit:
    """Writes what each rank was given, as JSON lines: step, key, seed, weight and a hash of the pixels.

    One file for each rank and start, so nothing is overwritten by a restart; a step that was done again is there
    twice, with equal lines.
    """

    def __init__(self, folder: RunFolder, rank: int, start: int) -> None:
        self.url = folder.path(
            "audit", f"from-{start:08d}-rank-{rank:04d}-{socket.gethostname()}-{time.time_ns()}.jsonl"
        )
        self.lines: list[str] = []

    def record(self, batch: RankBatch) -> None:
        for row, key in enumerate(batch["keys"]):
            digest = hashlib.sha256(batch["images"][row].contiguous().numpy().tobytes()).hexdigest()[:16]
            self.lines.append(
                json.dumps(
                    {
                        "step": batch["step"],
                        "key": key,
                        "seed": int(batch["seeds"][row]),
                        "weight": float(batch["weight"][row]),
                        "pixels": digest,
                    }
                )
            )

    def write(self) -> None:
        storage.write_bytes(self.url, ("\n".join(self.lines) + "\n").encode())


def training_device(use_gpu: bool) -> torch.device:
    if use_gpu:
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cpu")
