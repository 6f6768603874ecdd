"""What happens around the training steps: metrics, validation, sample grids, checkpoints, the end of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from genmodels.features.extractor import FeatureExtractor
from genmodels.objective import Drawing, Mean
from infra.tracking import RunLogger
from pipelines.data.batch import RankBatch
from pipelines.data.fixed import read_fixed
from pipelines.data.quarantine import DataFailure, Quarantine
from pipelines.data.spec import SampleSpec
from pipelines.pictures import grid_png
from pipelines.training.audit import Audit
from pipelines.training.checkpoint import Checkpoint, commit_snapshot, prune
from pipelines.training.config import TrainConfig
from pipelines.training.evaluation import MEASURED, DrawnPictures
from pipelines.training.metrics import device_peak_flops, durations, finite, flop_utilisation, memory_mib
from pipelines.training.run_data import RunData, Split, parts
from pipelines.training.run_folder import RunFolder
from pipelines.training.trainer import Trainer, TrainingStopped

_PROGRESS_SECONDS = 0.3


class RunHooks:
    """Called after every step, on every rank; only rank 0 has a `logger`. What is collective happens on all ranks.

    `bad_samples` is the count over all ranks and restarts at the checkpoint that the run goes on from, and `facts` is
    what else goes into the next ones. At step `until` training is paused, with a checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        spec: SampleSpec,
        data: RunData,
        logger: RunLogger | None,
        board: Any,
        facts: dict[str, Any],
        quarantine: Quarantine,
        bad_samples: int = 0,
        audit: Audit | None = None,
        extractor: FeatureExtractor | None = None,
        until: int | None = None,
    ) -> None:
        self.until = until
        self.config, self.folder, self.spec = config, folder, spec
        self.data = data
        self.logger, self.board, self.facts = logger, board, facts
        self.quarantine, self.bad_samples, self.audit = quarantine, bad_samples, audit
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.shown: dict[str, Any] = {}
        self._shown_at = 0.0
        self._began, self._spent_before = time.monotonic(), 3600 * float(facts.get("training_hours", 0.0))
        self._validation: list[RankBatch] | None = None
        self._extractor = extractor
        self._drawn: DrawnPictures | None = None

    def after_step(self, trainer: Trainer, step: int) -> bool:
        run = self.config.run
        last = step == run.steps
        log = last or step % run.checkpoint_every == 0 or step % run.log_every == 0
        if log:
            self._log(trainer, step)
            last = self._time_is_over() or last
        validated: dict[str, float] = {}
        if self.data.validation is not None and run.validation_samples and (last or step % run.validate_every == 0):
            self._show(step, force=True, doing="validating")
            validated = self._validate(trainer, step)
        drawn: dict[str, float] = {}
        every = self.config.evaluation.every
        if every and (last or step % every == 0):
            self._show(step, force=True, doing="drawing and measuring")
            drawn = self._evaluate(trainer, step)
        measured = drawn if self.config.best.metric in MEASURED else validated
        if measured and self.config.best.metric is not None:
            last = self._keep_best(trainer, step, measured) or last
            if last and not log:
                self._log(trainer, step)
        paused = step == self.until
        checkpoint = last or paused or step % run.checkpoint_every == 0
        figures: dict[str, float] = {}
        if last:
            self._show(step, force=True, doing="measuring")
            figures = trainer.finish(self._finish_batches, step)
            self._report(step, {f"final_{name}": value for name, value in figures.items()})
        if run.preview_samples and (last or (run.preview_every and step % run.preview_every == 0)):
            self._show(step, force=True, doing="drawing")
            self._preview(trainer, step)
        if self.config.ema.lengths and (last or step % self.config.ema.store_every == 0):
            self._show(step, force=True, doing="storing averages")
            commit_snapshot(self.folder.averages, trainer.averages(step))
        if checkpoint:
            url = self._checkpoint(trainer, step, last, figures, finite(validated | drawn))
            if self.rank == 0 and (validated or drawn):
                told = {"step": step, "figures": finite(validated | drawn), "checkpoint": url}
                self.board.measured.remote(told)
        self._show(step, force=last)
        return last or paused

    def _log(self, trainer: Trainer, step: int) -> None:
        bad, read = self.quarantine.take()
        trainer.log.add(
            {"bad_share": Mean(*torch.tensor([bad, read], device=trainer.device))}
        )  # summed with the others
        metrics = trainer.log.read()
        self.bad_samples += round(metrics.pop("bad_share", 0.0) * read * self.world_size)
        metrics["bad_samples"] = float(self.bad_samples)
        if trainer.skipped_steps:
            metrics["skipped_steps"] = float(trainer.skipped_steps)
        samples_per_second, wait_share = trainer.throughput.window()
        metrics |= trainer.last
        metrics |= {
            "samples_per_second": samples_per_second,
            "data_wait_share": wait_share,
            "memory_mib": memory_mib(trainer.device),
            "epoch": step * self.config.data.global_batch_size / self.data.train.samples,
        }
        peak = device_peak_flops(trainer.device)
        if peak is not None:
            used = flop_utilisation(samples_per_second / self.world_size, trainer.objective.flops_per_sample(), peak)
            metrics |= {} if used is None else {"flop_utilisation": used}
        self._report(step, metrics)
        samples = step * self.config.data.global_batch_size * (1 if self.data.other is None else 2)
        if self.quarantine.too_many(self.bad_samples, samples):  # the counts are the same on all ranks
            raise self._data_failure(f"{self.bad_samples} of the {samples} samples read so far")

    def _time_is_over(self) -> bool:
        """Whether the run has trained for as long as it may, over all its starts, by rank 0's clock. Collective."""
        spent = self._spent_before + time.monotonic() - self._began
        self.facts["training_hours"] = spent / 3600
        if self.config.run.max_hours is None:
            return False
        over = [spent >= 3600 * self.config.run.max_hours]
        dist.broadcast_object_list(over, 0)
        if over[0]:
            self.facts["stopped_early"] = {"max_hours": self.config.run.max_hours}
        return bool(over[0])

    def _data_failure(self, counts: str) -> DataFailure:
        """The error that names a bad sample, whichever rank met it. Collective."""
        met: list[Any] = [None] * self.world_size
        dist.all_gather_object(met, self.quarantine.last)
        return self.quarantine.failure(counts, next(filter(None, met), None))

    def _validate(self, trainer: Trainer, step: int) -> dict[str, float]:
        if self._validation is None:
            count = self.config.run.validation_samples
            self._validation = self._fixed_batches(
                "held_out", count, self.config.rank_micro_batch, self.rank, self.world_size
            )
        metrics = trainer.validate(self._validation, step)
        if "val_loss" not in metrics:  # nothing was counted, on any rank
            raise self._data_failure("all held-out samples of the validation")
        self._report(step, metrics)
        return metrics

    def _evaluate(self, trainer: Trainer, step: int) -> dict[str, float]:
        """The distance of pictures drawn now to real ones."""
        asked = self.config.evaluation
        if self._drawn is None:
            assert self._extractor is not None and self.data.validation is not None
            self._extractor.to(trainer.device)
            part = (self.config.rank_micro_batch, self.rank, self.world_size)
            self._drawn = DrawnPictures(
                self._extractor,
                read_fixed(self.data.drawn_like, self.spec, asked.reference_count, *part),
                self._fixed_batches("held_out", asked.count, *part),
                Drawing(asked.num_steps, asked.guidance_scale, asked.sampler),
                self.config.objective.image_size,
            )
        metrics = self._drawn.measure(trainer, step)
        if self._drawn.reasons and self.board is not None:
            self.board.note.remote(f"step {step}: the model may have collapsed: {'; '.join(self._drawn.reasons)}")
        self._report(step, metrics)
        return metrics

    def _keep_best(self, trainer: Trainer, step: int, measured: dict[str, float]) -> bool:
        """Keep this checkpoint where it is the best so far; whether training ends for want of a better one.

        The figures are the same on all ranks, and so is what follows from them.
        """
        best = self.config.best
        if best.metric not in measured:
            raise TrainingStopped(f"best.metric: {best.metric} is not measured, only {', '.join(sorted(measured))}")
        value, known = measured[best.metric], self.facts.get("best")
        how = measured_how(self.config)
        if known is not None and known["how"] != how:
            known = None  # of another metric, or measured on other pictures
        improved = known is None or (value < known["value"] if best.better == "lower" else value > known["value"])
        if improved and math.isfinite(value):
            self.facts["best"] = {"step": step, "value": value, "waited": 0, "how": how}
            self._show(step, force=True, doing="saving the best")
            figures = trainer.finish(self._finish_batches, step)  # what is measured at the end belongs to its weights
            facts = {name: kept for name, kept in self.facts.items() if name != "marks"}
            facts |= {"bad_samples": self.bad_samples, "finished": True, "figures": finite(measured | figures)}
            commit_snapshot(self.folder.best, trainer.snapshot(step, facts))
            if self.rank == 0:
                prune(self.folder.best, 1)
        elif known is not None:
            self.facts["best"] = {**known, "waited": known["waited"] + 1}
            if best.patience and known["waited"] + 1 >= best.patience:
                self.facts["stopped_early"] = {"patience": best.patience}
                return True
        return False

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        self.shown |= metrics
        if self.logger is not None:
            self.logger.log(step, finite(metrics))

    def _show(self, step: int, force: bool = False, doing: str = "") -> None:
        if self.rank == 0 and (force or time.monotonic() - self._shown_at > _PROGRESS_SECONDS):
            self._shown_at = time.monotonic()
            self.board.progress.remote({**self.shown, "step": step, "doing": doing})

    def _fixed_batches(
        self, split: Split, count: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[RankBatch]:
        """`RunData.fixed`; bad samples are recorded, by rank 0 alone where all ranks read the same."""
        batches = list(self.data.fixed(split, self.spec, count, batch_size, rank, world_size))
        if self.rank == rank:
            for batch in batches:
                for name, part in parts(batch):
                    self.quarantine.record(part["keys"], part["reasons"], split=f"{name} {split}".strip())
        return batches

    def _finish_batches(self) -> Iterator[RankBatch]:
        """The same training samples on every rank, so that what is measured from them is the same."""
        yield from self._fixed_batches("train", self.config.run.finish_samples, self.config.rank_micro_batch)

    def _preview(self, trainer: Trainer, step: int) -> None:
        sharded = any(self.config.engine_of(name).zero_stage == 3 for name in trainer.networks)
        if self.rank > 0 and not sharded:
            with trainer.with_ema():  # the averages are gathered by all
                return
        split: Split = "train" if self.data.validation is None else "held_out"
        batch = self._fixed_batches(split, self.config.run.preview_samples, self.config.run.preview_samples)[0]
        preview = trainer.preview(batch, step)
        if preview is not None and self.logger is not None:
            pixels = (
                ((preview.images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            )
            self.logger.log_image("samples", grid_png(pixels, preview.titles, preview.columns), step)

    def _checkpoint(
        self, trainer: Trainer, step: int, last: bool, figures: dict[str, float], measured: dict[str, float]
    ) -> str:
        self._show(step, force=True, doing="saving")
        if self.logger is not None:
            self.logger.flush()  # a run resumed from here does not log these steps again
        if self.audit is not None:
            self.audit.write()
        facts = {**self.facts, "bad_samples": self.bad_samples, "finished": last, "measured": measured}
        facts["start_seconds"] = durations({**facts.pop("marks", {}), **trainer.throughput.marks})
        if last:
            throughput = trainer.throughput
            facts["figures"] = finite(
                {
                    **{name: value for name, value in self.shown.items() if isinstance(value, float)},
                    **figures,
                    "bad_samples": self.bad_samples,
                    "data_wait_share": throughput.wait_share,
                    "samples_per_second": throughput.samples / max(throughput.seconds, 1e-9),
                    "training_seconds": throughput.seconds,
                    **{f"seconds_{name}": spent for name, spent in trainer.phase_seconds.items()},
                }
            )
        url = commit_snapshot(self.folder.checkpoints, trainer.snapshot(step, facts))
        if self.rank == 0:
            prune(self.folder.checkpoints, self.config.run.keep_checkpoints)
        return url


def measured_how(config: TrainConfig) -> dict[str, Any]:
    """What the figure of `best.metric` depends on besides the weights: only what was measured alike is compared."""
    best = config.best
    how: dict[str, Any] = {"metric": best.metric, "better": best.better}
    if best.metric in MEASURED:
        return how | config.evaluation.model_dump(mode="json", exclude={"every"})
    return how | {"validation_samples": config.run.validation_samples}


def known_best(kept: Checkpoint | None, resumed: Checkpoint | None) -> dict[str, Any]:
    """What is known of the best checkpoint as a run goes on.

    The one that is kept says so itself: an older checkpoint may name one that has been replaced since. How long a
    better one was waited for, the checkpoint knows that the run goes on from.
    """
    if kept is None:
        return {}
    best = dict(kept.manifest["best"])
    told = {} if resumed is None else resumed.manifest.get("best") or {}
    return {"best": {**best, "waited": told["waited"] if told.get("step") == best["step"] else 0}}


def checked(
    batches: Iterator[RankBatch], quarantine: Quarantine, seen: Callable[[RankBatch], None]
) -> Iterator[RankBatch]:
    """The same batches, each one counted and its bad samples recorded; a hopeless case stops the run here."""
    for batch in batches:
        seen(batch)
        for name, part in parts(batch):
            quarantine.add(part["keys"], part["reasons"], part["step"], f"{name} train".strip())
        quarantine.check()
        yield batch


def training_device(use_gpu: bool) -> torch.device:
    if use_gpu:
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cpu")
