"""What the trainer knows of a model: networks, frozen networks, and an ordered list of phases.

A new family is a new `Objective`; the trainer, the engines and the checkpoints stay as they are. In one training
step the phases run in order; in each, only the phase's own network has gradients on. Whether a phase runs depends
on the step alone, never on data: ranks that disagreed would wait for each other forever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
"""One micro-batch of a rank. Keys that the image-text data path always gives:

- `images`    float32 (batch, 3, height, width) in [-1, 1]
- `weight`    float32 (batch,): 1, or 0 for a quarantined sample, whose slot then adds nothing to the loss
- `seeds`     int64 (batch,): drawn from (seed, lane, position); all randomness of a sample comes from it
- `keys`      list of `shard/key`
- `captions`  list of str
- `labels`    list of str, where the objective's configuration has a `label`, their member; "" where a sample has none
- `token_ids` int64 (batch, length), where the run has a tokenizer
- `other`     a batch like this one, of samples that do not belong to these, where the configuration is `unpaired`
- `condition_images` float32 like images, where the objective's `image_condition` names a member of the samples
- `sizes`     int32 (batch, 4), where the objective's `size_conditioning` is on: the image's original height and width,
  and how many rows and columns were cut off at the top and at the left of the resized image
"""

T = TypeVar("T")


def once(batch: Batch, key: Hashable, inputs: Sequence[Any], compute: Callable[[], T]) -> T:
    """`compute()`, which needs no gradient, done once for a micro-batch, however many phases ask under this `key`.

    `inputs` are the values of the batch that it is computed from: where they are others, it is computed anew.
    """
    known: dict[Hashable, tuple[Sequence[Any], T]] = batch.setdefault("once", {})
    if key not in known or any(old is not new for old, new in zip(known[key][0], inputs, strict=True)):
        known[key] = (inputs, compute())
    return known[key][1]


class Mean(NamedTuple):
    """A metric as a sum and a count, so that micro-batches and ranks add up before they are divided."""

    total: Tensor  # scalar
    count: Tensor  # type: ignore[assignment]  # scalar

    @staticmethod
    def of(values: Tensor, weight: Tensor | None = None) -> Mean:
        """Weighted mean of `values` (batch,); `weight` (batch,) defaults to ones."""
        values = values.detach().float()
        weight = torch.ones_like(values) if weight is None else weight.to(values)
        return Mean((values * weight).sum(), weight.sum())


class PhaseLoss(NamedTuple):
    """What a phase gives back: the scalar to minimise and what to log. Metric names may not depend on data."""

    loss: Tensor
    metrics: dict[str, Mean]


@dataclass(frozen=True)
class Phase:
    """One update of one network.

    Args:
        network: key in `Objective.networks`; its parameters alone have gradients on during `loss`.
        loss: maps a micro-batch to a `PhaseLoss`. The loss is a mean over the slots of the micro-batch.
        every: the phase runs at steps that are a multiple of this.
        start_step: first step at which the phase runs.
        couples_samples: the loss mixes the samples of a batch (a contrastive loss, batch norm). Accumulation would
            then change its meaning, so it is refused, unless it `caches_gradients`.
        caches_gradients: the losses of the micro-batches together have the gradient of the whole batch's: `prepare` has
            seen all of them.
        clip_weights: after each update the network's weights are cut to ± this; None leaves them.
        double_backward: the loss takes a gradient itself (R1, gradient penalty); ZeRO stage 3 cannot, and is refused.
    """

    network: str
    loss: Callable[[Batch], PhaseLoss]
    every: int = 1
    start_step: int = 0
    couples_samples: bool = False
    caches_gradients: bool = False
    double_backward: bool = False
    clip_weights: float | None = None

    def runs_at(self, step: int) -> bool:
        return step >= self.start_step and step % self.every == 0


@dataclass
class Preview:
    """Pictures to look at during training: images (n, 3, height, width) in [-1, 1] and a title for each."""

    images: Tensor
    titles: list[str] = field(default_factory=list)
    columns: int = 8


class Drawing(NamedTuple):
    """How pictures are drawn; a family takes of it what it has."""

    num_steps: int = 20
    guidance_scale: float = 2.0
    sampler: Any = "ddim"


class Objective:
    """Base of all objectives. Subclasses fill `networks`, `frozen` and `phases` in `__init__`.

    Losses call the plain modules in `networks`, never an engine. `validate` and `preview` run with EMA weights in
    place, on every rank at the same time, under `torch.no_grad`.
    """

    networks: dict[str, nn.Module]
    frozen: dict[str, nn.Module]  # the only place that holds them, so that `share_frozen` can exchange them
    phases: Sequence[Phase]
    trained: dict[str, list[str]] = {}
    """Patterns of the names of the parameters that are trained, by network; one that is not in it is trained whole."""

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Compute, with `once` and without gradients, what the phases will ask of the micro-batches of a step."""

    def begin_validation(self) -> None:
        """Compute, with the weights of this validation, what is the same for all its batches."""

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """Metrics on held-out data. Must contain `loss`. Fixed noise and timesteps: all from `batch["seeds"]`."""
        raise TypeError(f"{type(self).__name__} does not say how to validate")

    def preview(self, batch: Batch) -> Preview | None:
        """A grid for the eye, drawn for one fixed held-out batch; None where there is nothing to draw."""
        return None

    def draw(self, batch: Batch, drawing: Drawing) -> Tensor | None:
        """A picture for each sample of a held-out batch, (batch, 3, height, width) in [-1, 1], from what it is
        conditioned on and from `batch["seeds"]`; None of an objective that draws nothing."""
        return None

    @property
    def draws(self) -> bool:
        """Whether `draw` draws."""
        return type(self).draw is not Objective.draw

    def finish(self, batches: Iterable[Batch]) -> dict[str, float]:
        """After the last step, with EMA weights: measure what the export needs (latent statistics, say).

        Returns figures for the run's summary. What is measured is kept as the objective's own state.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """The objective's own state, beyond its networks; equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state of its own, but the checkpoint has {sorted(state)}")

    def export(self, folder: Path) -> dict[str, Any]:
        """Write what others open, from the weights now in the networks; returns facts for the model card."""
        raise TypeError(f"{type(self).__name__} does not export")

    def load_weights(self, folder: Path) -> None:
        """Start from the weights of an export (fine-tuning). Raises ValueError naming what does not fit."""
        raise TypeError(f"{type(self).__name__} cannot start from other weights")

    @staticmethod
    def from_config(config: Any, inputs: Path | None = None) -> Objective:
        """Freshly initialised on the CPU; `inputs` is the folder of what it needs from elsewhere."""
        raise TypeError("this family does not say how it is built")

    @staticmethod
    def abstract_networks(config: Any) -> dict[str, nn.Module]:
        """The trained networks on the meta device: their sizes, before any input is at hand."""
        raise TypeError("this family does not say how large it is")

    def share_frozen(self, other: Objective) -> None:
        """Use the frozen networks of `other` in place of equal ones of one's own."""
        for name, network in self.frozen.items():
            twin = other.frozen.get(name)
            if twin is not None and _equal(network, twin):
                self.frozen[name] = twin

    def flops_per_sample(self) -> float | None:
        """Floating point operations of one forward pass for one sample, where known (for model FLOP utilisation)."""
        return None


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    if type(one) is not type(other) or ours.keys() != theirs.keys():
        return False
    return all(value.shape == theirs[key].shape and torch.equal(value, theirs[key]) for key, value in ours.items())
