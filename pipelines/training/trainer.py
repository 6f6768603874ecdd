"""The one training loop, for every family of models.

A step takes one global batch, runs the objective's phases in order, and leaves the weights, averages and position one
step further. Everything that differs between families is in the objective; everything that differs between ZeRO
stages is in the engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genmodels.objective import Batch, Objective, Phase, Preview
from genmodels.precision import autocast, resolve_precision
from pipelines.data.batch import RankBatch
from pipelines.data.seeds import mix
from pipelines.training.checkpoint import NetworkState, Snapshot, restore, take_snapshot
from pipelines.training.config import TrainConfig
from pipelines.training.ema import Ema
from pipelines.training.engine import freeze, make_engine
from pipelines.training.metrics import MeanLog, Throughput
from pipelines.training.schedule import learning_rate


class TrainingStopped(Exception):
    """The training itself cannot go on; the message names step and phase. Restarting would not help."""


class Hooks(Protocol):
    """What happens around the steps: logging, validation, checkpoints. See `hooks.py`."""

    def after_step(self, trainer: Trainer, step: int) -> bool:
        """Whether it was the last step."""


def check_phases(config: TrainConfig, objective: Objective) -> None:
    """Refuse what would train wrongly in silence. Raises ValueError with the reason."""
    for name, module in objective.networks.items():
        freeze(module, config.optimizer_of(name).freeze, name, objective.trained.get(name, ["*"]))
    if config.evaluation.every and not objective.draws:
        raise ValueError(f"evaluation.every: {config.objective.kind} draws nothing to measure; set it to 0")
    for phase in objective.phases:
        engine = config.engine_of(phase.network)
        if phase.couples_samples and not phase.caches_gradients and config.accumulation > 1:
            raise ValueError(
                f"the loss of {phase.network!r} couples the samples of a batch, so accumulation would change it: "
                f"set data.micro_batch={config.data.global_batch_size // config.workers.count}"
            )
        if phase.double_backward and engine.kind == "deepspeed" and engine.zero_stage == 3:
            raise ValueError(
                f"the loss of {phase.network!r} differentiates a gradient, which ZeRO stage 3 cannot: "
                f"set engines.{phase.network}.zero_stage to 2 or less"
            )


class Trainer:
    """Engines, averages and the step. One on each rank.

    Args:
        config: the run.
        objective: networks on `device`, freshly initialised or loaded; the same on every rank.
        device: where the networks are.
        rank: of this process.
    """

    def __init__(self, config: TrainConfig, objective: Objective, device: torch.device, rank: int = 0) -> None:
        check_phases(config, objective)
        self.config, self.objective, self.device, self.rank = config, objective, device, rank
        self.precision = _same_on_all_ranks(resolve_precision(config.precision.compute, device))
        self.networks: dict[str, NetworkState] = {}
        for name, module in objective.networks.items():
            if config.precision.activation_checkpointing:
                _checkpoint_activations(module)
            if config.precision.compile:
                module.compile()
            engine = make_engine(
                module, config.engine_of(name), config.optimizer_of(name), config.rank_micro_batch, config.accumulation
            )
            self.networks[name] = NetworkState(engine, Ema(engine, config.ema))
        self.log = MeanLog()
        self.throughput = Throughput()
        self.skipped_in_a_row: dict[str, int] = dict.fromkeys(objective.networks, 0)
        self.skipped_steps = 0  # updates since the run began that were skipped, of any network
        self.last: dict[str, float] = {}  # learning rate and gradient norm of the latest update
        self.phase: Phase | None = None  # for the message when something fails
        self.phase_seconds: dict[str, float] = dict.fromkeys(objective.networks, 0.0)  # spent since this start

    def fit(self, batches: Iterator[RankBatch], start: int, hooks: Hooks) -> None:
        """Train from step `start` to the end. `batches` yields this rank's share of each step, in order."""
        for step in range(start, self.config.run.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            if self.throughput.started is None:
                self.throughput.first_batch()
                waited = 0.0
            self.step(step, batch)
            self.throughput.step(self.config.data.global_batch_size, waited)
            if hooks.after_step(self, step + 1):
                return

    def step(self, step: int, batch: RankBatch) -> None:
        """One step: every phase that runs at it, over all micro-batches."""
        torch.manual_seed(mix(self.config.run.seed, step, self.rank).item() >> 1)  # for layers that draw themselves
        micro_batches = self.split(batch, step)
        with torch.no_grad(), self.autocast():
            self.objective.prepare(micro_batches)
        for network in self.objective.networks.values():
            network.train()
        for phase in self.objective.phases:
            if phase.runs_at(step):
                began = time.perf_counter()
                self._run(phase, step, micro_batches)
                self.phase_seconds[phase.network] += time.perf_counter() - began
        self.phase = None

    def _run(self, phase: Phase, step: int, micro_batches: list[Batch]) -> None:
        self.phase = phase
        # Frozen, not only zeroed: a gradient left on another network would leak into its next step.
        for name, other in self.networks.items():
            for _, parameter in other.engine.named:
                parameter.requires_grad_(name == phase.network)
        state = self.networks[phase.network]
        for number, micro_batch in enumerate(micro_batches):
            with self.autocast():
                result = phase.loss(micro_batch)
            state.engine.backward(result.loss, last=number == len(micro_batches) - 1)
            self.log.add(result.metrics)
        lr = learning_rate(self.config.optimizer_of(phase.network), step, self.config.run.steps)
        outcome = state.engine.step(lr)
        suffix = "" if phase is self.objective.phases[0] else f"_{phase.network}"
        self.last |= {f"learning_rate{suffix}": lr, f"grad_norm{suffix}": outcome.grad_norm}
        if outcome.applied:
            if phase.clip_weights is not None:
                state.engine.clip_weights(phase.clip_weights)
            state.ema.update(state.engine.optimizer_steps() - 1)
            self.skipped_in_a_row[phase.network] = 0
            return
        self.skipped_in_a_row[phase.network] += 1
        self.skipped_steps += 1
        skipped = self.skipped_in_a_row[phase.network]
        if skipped >= self.config.run.max_skipped_steps:
            raise TrainingStopped(
                f"the loss or gradient of {phase.network!r} was not finite {skipped} steps in a row, the "
                f"last at step {step}: lower optimizer.learning_rate, or use precision.compute=fp32"
            )

    def split(self, batch: RankBatch, step: int) -> list[Batch]:
        """Micro-batches on the device; images become float32 in [-1, 1]."""
        size = self.config.rank_micro_batch
        rows = (slice(begin, begin + size) for begin in range(0, len(batch["keys"]), size))
        return [self.to_device(_rows(batch, part), step) for part in rows]

    def to_device(self, batch: Mapping[str, Any], step: int) -> Batch:
        moved = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        if "other" in batch:
            moved["other"] = self.to_device(batch["other"], step)
        for name in ("images", "condition_images"):
            if name in moved:
                moved[name] = moved[name].float().div_(127.5).sub_(1.0)
        if self.config.precision.channels_last and "images" in moved:
            moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
        moved["step"] = step
        return moved

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.precision, self.device)

    def with_ema(self) -> ExitStack:
        """Inside, every network computes with its averaged weights, in evaluation mode and without gradients."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        for state in self.networks.values():
            stack.enter_context(state.engine.weights(state.ema.values))
        for network in self.objective.networks.values():
            network.eval()
        return stack

    def validate(self, batches: list[RankBatch], step: int) -> dict[str, float]:
        """The objective's figures on held-out data, with averaged weights. Collective."""
        log = MeanLog()
        with self.with_ema(), self.autocast():
            self.objective.begin_validation()
            for batch in batches:
                log.add(self.objective.validate(self.to_device(batch, step)), "val_")
        return log.read()

    def preview(self, batch: RankBatch, step: int) -> Preview | None:
        """The objective's pictures, with averaged weights. Collective."""
        with self.with_ema(), self.autocast():
            return self.objective.preview(self.to_device(batch, step))

    def finish(self, batches: Callable[[], Iterator[RankBatch]], step: int) -> dict[str, float]:
        """What the objective measures at the end, with averaged weights. Collective, the same batches on every rank."""
        with self.with_ema():
            return self.objective.finish(self.to_device(batch, step) for batch in batches())

    def snapshot(self, step: int, facts: dict[str, Any]) -> Snapshot:
        """A copy of all state after `step` steps, in host memory."""
        own = {f"own|{key}": value for key, value in self.objective.state_dict().items()}
        own |= {
            f"buffer|{name}|{key}": buffer
            for name, module in self.objective.networks.items()
            for key, buffer in _buffers(module).items()
        }
        facts = {
            **facts,
            "slots": step * self.config.data.global_batch_size,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_steps": self.skipped_steps,
            "precision": self.precision,
        }
        return take_snapshot(step, self.networks, own, facts)

    def averages(self, step: int) -> Snapshot:
        """A copy of the averaged weights alone."""
        return take_snapshot(step, self.networks, {}, {}, averages_only=True)

    def restore(self, checkpoint: Any) -> int:
        """Take over a checkpoint's state; returns the step to go on with. Collective."""
        restore(checkpoint, self.networks)
        state = checkpoint.objective_state()
        self.objective.load_state_dict(
            {key.removeprefix("own|"): value for key, value in state.items() if key.startswith("own|")}
        )
        for name, module in self.objective.networks.items():
            for key, buffer in _buffers(module).items():
                buffer.copy_(state[f"buffer|{name}|{key}"])
        self.skipped_in_a_row |= checkpoint.manifest["skipped_in_a_row"]
        self.skipped_steps = checkpoint.manifest.get("skipped_steps", 0)
        self.precision = checkpoint.manifest.get("precision", self.precision)  # "auto" means what it meant at first
        return int(checkpoint.step)


def _rows(batch: Mapping[str, Any], part: slice) -> dict[str, Any]:
    """Some samples of a batch, of each of its sets."""
    return {
        key: _rows(value, part) if key == "other" else value[part] if isinstance(value, (Tensor, list)) else value
        for key, value in batch.items()
    }


def _same_on_all_ranks(value: str) -> str:
    """Rank 0's."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the model's state (position ids and the like are not)."""
    names = dict(module.named_parameters()).keys()
    return {key: value for key, value in module.state_dict().items() if key not in names}


def _checkpoint_activations(module: nn.Module) -> None:
    for part in module.modules():
        for switch in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
            if hasattr(part, switch):
                getattr(part, switch)()
                break
