"""Exponential moving average of one network's weights, in fp32, kept where the weights themselves are kept.

Each rank averages the fragments that it holds, so the average is sharded as the optimizer is, at every ZeRO stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.training.config import EmaConfig
from pipelines.training.engine import Engine


class Ema:
    """One average for one engine. `values` has one 1-D tensor for each of the engine's fragments, in their order."""

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.engine = engine
        self.config = config
        self.values: list[Tensor] = [fragment.values["param"].clone() for fragment in engine.fragments()]

    def decay_at(self, updates: int) -> float:
        """Share of the old average that is kept; with warm-up min(decay, (1+n)/(10+n)), so the first weights fade."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after update number `updates` (from 0)."""
        weights = [fragment.values["param"] for fragment in self.engine.fragments()]
        torch._foreach_lerp_(self.values, weights, 1.0 - self.decay_at(updates))
