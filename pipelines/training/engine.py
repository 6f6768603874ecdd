"""What turns losses into updates of one network: the face that the trainer sees, and the plain-torch engine.

Losses call plain modules, never an engine; an engine only does backward and step. `DeepSpeedEngine` shards (see
`deepspeed_engine.py`); `TorchEngine` is the same face without any sharding, and is what DeepSpeed is proved equal to.

Every engine can name the pieces of fp32 state that this rank holds (`fragments`). Checkpoints and EMA are written
once, against fragments, and so fit every ZeRO stage and world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipelines.training.config import EngineConfig, OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state


@dataclass
class Fragment:
    """A run of consecutive elements of one flattened parameter, as this rank holds it.

    `values` maps "param" (and, once the optimizer has state, "exp_avg" and "exp_avg_sq") to 1-D fp32 views of equal
    length: writing to them writes the state. After writing "param", call `Engine.publish`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.values["param"].numel()


@dataclass(frozen=True)
class StepResult:
    """Whether the update was applied (False: a non-finite loss or gradient, skipped on all ranks), and the gradient
    norm before clipping (inf when skipped)."""

    applied: bool
    grad_norm: float


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """Make every gradient NaN when the loss is not finite, so that all ranks see it and skip the step together."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class Engine:
    """One network, its optimizer, and its share of the state. See `TorchEngine` and `DeepSpeedEngine`."""

    module: nn.Module
    named: list[tuple[str, nn.Parameter]]
    """The parameters that are trained, by name; those frozen when the engine was made are not among them."""
    replicated: bool
    """True when every rank holds all of every parameter; False when fragments are disjoint over ranks."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of one micro-batch; `last` closes the accumulation."""
        raise TypeError

    def step(self, lr: float) -> StepResult:
        """Average the gradients over ranks and micro-batches, clip, and update at learning rate `lr`."""
        raise TypeError

    def fragments(self) -> list[Fragment]:
        """The fp32 state that this rank holds. Views: they follow the training."""
        raise TypeError

    def optimizer_steps(self) -> int:
        """Updates applied so far (AdamW's bias correction counts them)."""
        raise TypeError

    def make_optimizer_state(self, steps: int) -> None:
        """Create zeroed moments as if `steps` updates had been applied: what a checkpoint is then loaded into."""
        raise TypeError

    def publish(self) -> None:
        """Bring the module's own parameters in line with the fragments, after these were written to. Collective."""
        raise TypeError

    def clip_weights(self, bound: float) -> None:
        """Cut all weights to ± `bound`. Collective."""
        for fragment in self.fragments():
            fragment.values["param"].clamp_(-bound, bound)
        self.publish()

    @contextmanager
    def weights(self, values: list[Tensor]) -> Iterator[None]:
        """Inside, the module computes with `values` (one for each fragment); then with its own again, to the bit."""
        raise TypeError
        yield


def full_parameters(
    fragments: list[Fragment], values: list[Tensor], named: list[tuple[str, nn.Parameter]], replicated: bool
) -> dict[str, Tensor]:
    """Whole parameters from the fragments of all ranks: one all-reduce of a buffer in which each rank fills its own."""
    shapes = {name: parameter.shape for name, parameter in named}
    offsets, total = {}, 0
    for name, shape in shapes.items():
        offsets[name], total = total, total + shape.numel()
    device = values[0].device if values else named[0][1].device
    flat = torch.zeros(total, device=device)
    for fragment, value in zip(fragments, values, strict=True):
        begin = offsets[fragment.name] + fragment.start
        flat[begin : begin + fragment.numel] = value
    if dist.is_initialized() and dist.get_world_size() > 1 and not replicated:
        dist.all_reduce(flat)
    return {name: flat[offsets[name] : offsets[name] + shape.numel()].view(shape) for name, shape in shapes.items()}


@contextmanager
def replaced_parameters(named: list[tuple[str, nn.Parameter]], full: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters are those in `full`; afterwards what they were."""
    own = [parameter.detach().clone() for _, parameter in named]
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(full[name])
        try:
            yield
        finally:
            for (_, parameter), value in zip(named, own, strict=True):
                parameter.copy_(value)


def freeze(module: nn.Module, patterns: Sequence[str], network: str, trained: Sequence[str] = ("*",)) -> None:
    """Turn gradients on for the parameters that are trained: those of names `trained` that no pattern matches.

    Raises:
        ValueError: a pattern matches none, or all are frozen.
    """
    unused = set(patterns)
    module.requires_grad_(True)
    for name, parameter in module.named_parameters():
        matching = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        unused -= matching
        parameter.requires_grad_(not matching and any(fnmatchcase(name, pattern) for pattern in trained))
    if unused:
        example = next(name for name, _ in module.named_parameters())
        raise ValueError(
            f"optimizer.freeze: no parameter of {network!r} is named like {', '.join(sorted(unused))}; they have names "
            f"such as {example}"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"optimizer.freeze leaves nothing of {network!r} to train")


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def make_adamw(module: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    parameters = [parameter for _, parameter in trainable(module)]
    return torch.optim.AdamW(
        parameters,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        # On CPUs one pass over memory instead of a dozen. On GPUs it would keep its step counts there, which we read.
        fused=True if parameters[0].device.type == "cpu" else None,
    )


class TorchEngine(Engine):
    """Plain torch: every rank holds everything, gradients are averaged by one all-reduce a step."""

    replicated = True

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, accumulation: int) -> None:
        self.module = module
        self.accumulation = accumulation
        self.max_grad_norm = optimizer.max_grad_norm
        self.optimizer = make_adamw(module, optimizer)
        self.named = trainable(module)
        if dist.is_initialized():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0)

    def backward(self, loss: Tensor, last: bool) -> None:
        (poison_if_not_finite(loss) / self.accumulation).backward()

    def step(self, lr: float) -> StepResult:
        parameters = [parameter for _, parameter in self.named]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            offset = 0
            for parameter in parameters:
                parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))  # type: ignore[union-attr]
                offset += parameter.numel()
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf))
        applied = math.isfinite(norm)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied, norm if applied else math.inf)

    def fragments(self) -> list[Fragment]:
        found = []
        for name, parameter in self.named:
            state = self.optimizer.state.get(parameter, {})
            values = {"param": parameter.data.view(-1)} | {key: state[key].view(-1) for key in MOMENTS if key in state}
            found.append(Fragment(name, tuple(parameter.shape), 0, values))
        return found

    def optimizer_steps(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def make_optimizer_state(self, steps: int) -> None:
        for _, parameter in self.named:
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)),
                **{key: torch.zeros_like(parameter, memory_format=torch.contiguous_format) for key in MOMENTS},
            }

    def publish(self) -> None:
        pass  # the fragments are the parameters

    @contextmanager
    def weights(self, values: list[Tensor]) -> Iterator[None]:
        with replaced_parameters(self.named, full_parameters(self.fragments(), values, self.named, replicated=True)):
            yield


def make_engine(
    module: nn.Module, engine: EngineConfig, optimizer: OptimizerConfig, micro_batch: int, accumulation: int
) -> Engine:
    """The engine that the configuration asks for. Collective: every rank calls it for the same network."""
    if engine.kind == "torch":
        return TorchEngine(module, optimizer, accumulation)
    from pipelines.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(module, engine, optimizer, micro_batch, accumulation)
