"""Learning rates as a function of the step alone: resuming needs no state."""

from __future__ import annotations

import math

from pipelines.training.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of the update at `step` (from 0) in a run of `steps`.

    Linear warm-up over `warmup_steps`, then constant, or falling to `final_lr_ratio` of it by a straight line or half
    a cosine (Loshchilov and Hutter 2017).
    """
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    if optimizer.lr_schedule == "constant":
        return optimizer.learning_rate
    progress = min((step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1), 1.0)
    fall = 1.0 - progress if optimizer.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optimizer.learning_rate * (optimizer.final_lr_ratio + (1.0 - optimizer.final_lr_ratio) * fall)
