"""Moving averages of one network's weights, in fp32, kept where the weights themselves are kept.

Each rank averages the fragments that it holds, so the average is sharded as the optimizer is, at every ZeRO stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genmodels.power_ema import exponent, share_of_new
from pipelines.training.config import EmaConfig
from pipelines.training.engine import Engine


def power_average(length: float) -> str:
    """What an average of that relative length is called in checkpoints.

    >>> power_average(0.1)
    'ema-0.1'
    """
    return f"ema-{length:g}"


class Ema:
    """The averages of one engine: each has one 1-D tensor for each of the engine's fragments, in their order.

    `values` is the exponential one; `averages` has all by name: "ema", and "ema-LENGTH" (see `genmodels.power_ema`).
    """

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.config = config
        names = ["ema", *map(power_average, config.lengths)]
        self._weights = [fragment.values["param"] for fragment in engine.fragments()]  # views: they follow the training
        self.averages = {name: [values.clone() for values in self._weights] for name in names}
        self.values: list[Tensor] = self.averages["ema"]

    def decay_at(self, updates: int) -> float:
        """Share of the old average that is kept; with warm-up min(decay, (1+n)/(10+n)), so the first weights fade."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after update number `updates` (from 0)."""
        torch._foreach_lerp_(self.values, self._weights, 1.0 - self.decay_at(updates))
        for length in self.config.lengths:
            share = share_of_new(exponent(length), updates + 1)
            torch._foreach_lerp_(self.averages[power_average(length)], self._weights, share)
