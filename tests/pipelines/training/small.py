"""Small trainings on pairs of processes, without Ray: objectives, configurations and batches for the equality tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genmodels import random
from genmodels.objective import Batch, Mean, Objective, Phase, PhaseLoss
from pipelines.data.batch import RankBatch
from pipelines.training.config import TrainConfig
from pipelines.training.trainer import Trainer
from tests.genmodels import tiny

GLOBAL_BATCH = 16


class TwoNetworks(Objective):
    """A GAN of two small networks: each loss calls both, and freezes one."""

    def __init__(self) -> None:
        self.generator = nn.Sequential(nn.Linear(8, 40), nn.SiLU(), nn.Linear(40, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 1))
        self.networks = {"discriminator": self.discriminator, "generator": self.generator}
        self.frozen = {}
        self.phases = [Phase("discriminator", self.judge), Phase("generator", self.fool, every=2)]

    def _real_and_fake(self, batch: Batch) -> tuple[Tensor, Tensor]:
        real = batch["images"].mean((2, 3))
        return real, self.generator(random.normal(batch["seeds"], (8,)))

    def judge(self, batch: Batch) -> PhaseLoss:
        real, fake = self._real_and_fake(batch)
        errors = nn.functional.softplus(-self.discriminator(real)) + nn.functional.softplus(self.discriminator(fake))
        return PhaseLoss(errors.mean(), {"loss": Mean.of(errors[:, 0])})

    def fool(self, batch: Batch) -> PhaseLoss:
        errors = nn.functional.softplus(-self.discriminator(self._real_and_fake(batch)[1]))
        return PhaseLoss(errors.mean(), {"generator_loss": Mean.of(errors[:, 0])})

    def validate(self, batch: Batch) -> dict[str, Mean]:
        return self.judge(batch).metrics


def training_config(
    kind: str = "deepspeed", stage: int = 1, world_size: int = 2, model: Any = None, **changes: Any
) -> TrainConfig:
    """A run of tiny latent diffusion, or of the `model` given, two micro-batches a step; parameters of every size are
    sharded at stage 3."""
    share, unpaired = GLOBAL_BATCH // world_size, getattr(model, "unpaired", False)
    tree: dict[str, Any] = {
        "run": {"name": "small", "steps": 100},
        "data": {
            "url": "/nowhere",
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch": share // 2,
            "lanes": 4,
        },
        "objective": (model or tiny.diffusion_config()).model_dump(),
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5, "max_grad_norm": 0.5},
        "engine": {"kind": kind, "zero_stage": stage, "persistence_threshold": 0, "bucket_elements": 5000},
        "ema": {"decay": 0.9, "lengths": [0.05, 0.1]},
        "workers": {"count": world_size},
    }
    if unpaired:
        tree["data"]["other_url"] = "/elsewhere"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return TrainConfig.model_validate(tree)


def global_batch(step: int, inputs: Path) -> RankBatch:
    """The same global batch on every rank: images uint8, as the data path gives them."""
    given, other = (_as_read(tiny.batch(GLOBAL_BATCH, first_seed=1000 * step + first), step) for first in (0, 500))
    return {**tiny.with_tokens(given, inputs), "other": other}  # type: ignore[typeddict-item]


def _as_read(given: Batch, step: int) -> Batch:
    pixels = ((given["images"] + 1) * 127.5).round().byte()
    return {**given, "images": pixels, "step": step, "reasons": [""] * GLOBAL_BATCH}


def rank_batch(step: int, rank: int, world_size: int, inputs: Path) -> RankBatch:
    """A rank's share: lanes are in order, so the global batch is the ranks' shares one after the other."""
    share = GLOBAL_BATCH // world_size
    part = slice(rank * share, (rank + 1) * share)

    def rows(whole: Any) -> Any:
        return {
            key: rows(value) if key == "other" else value[part] if isinstance(value, (Tensor, list)) else value
            for key, value in whole.items()
        }

    return rows(global_batch(step, inputs))  # type: ignore[no-any-return]


def make_trainer(objective: str, config: TrainConfig, inputs: Path, rank: int) -> Trainer:
    from genmodels.families import build_objective

    torch.manual_seed(0)
    made = TwoNetworks() if objective == "two networks" else build_objective(config.objective, inputs)
    return Trainer(config, made, torch.device("cpu"), rank)


Logged = list[dict[str, float]]
"""Figures of each step."""


def assert_same_training(reference: Logged, found: Logged, label: Any, **tolerance: float) -> None:
    """Losses of both networks and norms of gradients are equal at every step, to 1e-5 where nothing else is said."""
    for step, (expected, got) in enumerate(zip(reference, found, strict=True)):
        assert got.keys() == expected.keys()
        for figure in {"loss", "generator_loss", "grad_norm"} & expected.keys():
            close = pytest.approx(expected[figure], **({"abs": 1e-5, "rel": 1e-5} | tolerance))
            assert got[figure] == close, (label, step, figure)


def assert_something_was_learnt(reference: Logged) -> None:
    """Else nothing would be compared."""
    first, last = (sum(entry["loss"] for entry in part) for part in (reference[:5], reference[-5:]))
    assert last != pytest.approx(first, rel=1e-3)


def train_steps(
    trainer: Trainer, first: int, last: int, rank: int, world_size: int, inputs: Path
) -> list[dict[str, float]]:
    """Steps [first, last); the metrics of each, over all ranks."""
    logged = []
    for step in range(first, last):
        trainer.step(step, rank_batch(step, rank, world_size, inputs))
        logged.append(trainer.log.read() | {"grad_norm": trainer.last["grad_norm"]})
    return logged
