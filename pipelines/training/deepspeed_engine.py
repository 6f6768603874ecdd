"""DeepSpeed's ZeRO stages 0 to 3 behind the face of `Engine`.

Losses call the plain module. DeepSpeed learns of a micro-batch only from its own forward, so each one is closed by
hand (`clear_backward_seen_flag`), or stage 3 overwrites gradients instead of adding them up. A step whose gradients
are not finite is skipped by DeepSpeed itself on all ranks at stages 1 to 3, and here at stage 0.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infra.build_extensions import use_own_ninja
from pipelines.training.engine import (
    MOMENTS,
    Engine,
    Fragment,
    StepResult,
    full_parameters,
    make_adamw,
    poison_if_not_finite,
    replaced_parameters,
    trainable,
)

if TYPE_CHECKING:
    from pipelines.training.config import EngineConfig, OptimizerConfig


def init_deepspeed(device: torch.device) -> None:
    """Tell DeepSpeed of the device, and of the process group that Ray Train (or a test) has made."""
    os.environ["DS_ACCELERATOR"] = device.type  # read when DeepSpeed is first imported
    use_own_ninja()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


def deepspeed_settings(
    engine: EngineConfig, optimizer: OptimizerConfig, micro_batch: int, accumulation: int, device: torch.device
) -> dict[str, Any]:
    """The JSON that DeepSpeed reads. Bucket sizes are small where memory is the host's: DeepSpeed allocates them."""
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": device.type == "cuda",
        "reduce_bucket_size": engine.bucket_elements,
        "allgather_bucket_size": engine.bucket_elements,
    }
    if engine.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": engine.persistence_threshold,
            "stage3_prefetch_bucket_size": engine.bucket_elements,
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }


class DeepSpeedEngine(Engine):
    """One network under `deepspeed.initialize`. See `Engine` for the meaning of each method."""

    def __init__(
        self, module: nn.Module, engine: EngineConfig, optimizer: OptimizerConfig, micro_batch: int, accumulation: int
    ) -> None:
        device = next(module.parameters()).device
        init_deepspeed(device)
        import deepspeed

        self.module = module
        self.stage = engine.zero_stage
        self.replicated = engine.zero_stage == 0
        self.named = trainable(module)
        for buffer in module.buffers():  # DeepSpeed broadcasts parameters only
            torch.distributed.broadcast(buffer, 0)
        self.ds, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=make_adamw(module, optimizer),
            config=deepspeed_settings(engine, optimizer, micro_batch, accumulation, device),
            dist_init_required=False,
        )
        self.max_grad_norm = optimizer.max_grad_norm
        self._adamw = self._optimizer if self.stage == 0 else self._optimizer.optimizer
        self._closed = 0
        self._accumulation = accumulation

    def backward(self, loss: Tensor, last: bool) -> None:
        self.ds.backward(poison_if_not_finite(loss))
        self._closed += 1
        if not last:
            self.ds.step()  # no update yet: only counts the micro-batch
            self._close_micro_batch()

    def _close_micro_batch(self) -> None:
        if self.stage > 0:
            self._optimizer.clear_backward_seen_flag()

    def step(self, lr: float) -> StepResult:
        if self._closed != self._accumulation:
            raise RuntimeError(f"{self._closed} micro-batches before a step, configured: {self._accumulation}")
        self._closed = 0
        for group in self._adamw.param_groups:
            group["lr"] = lr
        result = self._step_unsharded() if self.stage == 0 else self._step_sharded()
        self._close_micro_batch()
        return result

    def _step_unsharded(self) -> StepResult:
        gradients = [parameter.grad for _, parameter in self.named if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self.ds.step()
            return StepResult(True, norm)
        for _, parameter in self.named:  # DeepSpeed looks for overflow from stage 1 on: zero it out here
            if parameter.grad is not None:
                parameter.grad = None
        self.ds.micro_steps += 1
        return StepResult(False, math.inf)

    def _step_sharded(self) -> StepResult:
        self.ds.step()
        applied = not self._optimizer.overflow
        return StepResult(applied, float(self.ds.get_global_grad_norm()) if applied else math.inf)

    def fragments(self) -> list[Fragment]:
        found = []
        for name, parameter in self.named:
            located = self._locate(parameter)
            if located is None:
                continue
            flat, offset, start, numel = located
            state = self._adamw.state.get(flat, {})
            values = {"param": flat.detach().view(-1).narrow(0, offset, numel)}
            values |= {key: state[key].view(-1).narrow(0, offset, numel) for key in MOMENTS if key in state}
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            found.append(Fragment(name, shape, start, values))
        return found

    def _locate(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        """Where this rank keeps `parameter`: (flat fp32 tensor, offset in it, start in the parameter, elements)."""
        if self.stage == 0:
            return parameter, 0, 0, parameter.numel()
        if self.stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # wholly on other ranks
                return None
            flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            address = mapping.lp_fragment_address
            return flat, mapping.hp_fragment_address.start, address.start, address.numel
        group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = part * torch.distributed.get_rank()
        numel = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the last ones hold padding
        return (self._optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None

    def _flat_tensors(self) -> list[Tensor]:
        if self.stage == 0:
            return [parameter for _, parameter in self.named]
        if self.stage < 3:
            return list(self._optimizer.single_partition_of_fp32_groups)
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def optimizer_steps(self) -> int:
        return max((int(state["step"]) for state in self._adamw.state.values() if "step" in state), default=0)

    def make_optimizer_state(self, steps: int) -> None:
        for flat in self._flat_tensors():
            self._adamw.state[flat] = {
                "step": torch.tensor(float(steps)),
                **{key: torch.zeros_like(flat, memory_format=torch.contiguous_format) for key in MOMENTS},
            }

    def publish(self) -> None:
        if self.stage == 3:
            for _, parameter in self.named:
                self._set_partition(parameter, self._partition_of(parameter))
            self._gather_anew()
        elif self.stage > 0:
            fragments = self.fragments()
            full = full_parameters(fragments, [f.values["param"] for f in fragments], self.named, replicated=False)
            with torch.no_grad():
                for name, parameter in self.named:
                    parameter.copy_(full[name])

    def _partition_of(self, parameter: nn.Parameter) -> Tensor | None:
        located = self._locate(parameter)
        return None if located is None else located[0].detach().narrow(0, located[1], located[3])

    @staticmethod
    def _set_partition(parameter: nn.Parameter, value: Tensor | None) -> None:
        if value is not None:
            parameter.ds_tensor.data.view(-1)[: value.numel()].copy_(value)  # type: ignore[attr-defined]

    def _gather_anew(self) -> None:
        """Let go of every gathered parameter, whose values are now old; small ones stay whole, so fetch those again."""
        self._optimizer._partition_all_parameters()
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    @contextmanager
    def weights(self, values: list[Tensor]) -> Iterator[None]:
        if self.stage < 3:
            full = full_parameters(self.fragments(), values, self.named, self.replicated)
            with replaced_parameters(self.named, full):
                yield
            return
        by_name = {fragment.name: value for fragment, value in zip(self.fragments(), values, strict=True)}
        own = {name: parameter.ds_tensor.data.clone() for name, parameter in self.named}  # type: ignore[attr-defined]
        for name, parameter in self.named:
            self._set_partition(parameter, by_name.get(name))
        self._gather_anew()
        try:
            yield
        finally:
            for name, parameter in self.named:
                parameter.ds_tensor.data.copy_(own[name])  # type: ignore[attr-defined]
            self._gather_anew()

    def partitioned_elements(self) -> int:
        """Elements of parameters that this rank really keeps apart (stage 3): 0 would mean nothing is sharded."""
        if self.stage != 3:
            return 0
        return sum(
            parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            for _, parameter in self.named
            if not parameter.ds_persist  # type: ignore[attr-defined]
        )
