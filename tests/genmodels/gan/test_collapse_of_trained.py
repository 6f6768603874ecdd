"""The alarm, with its default thresholds, on trained GANs: healthy ones of three seeds, and three made collapses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from genmodels.families import build_objective
from genmodels.gan.objective import Gan
from genmodels.metrics.collapse import THRESHOLDS, Variety, condition_variety, measure_variety
from genmodels.objective import Batch
from pipelines.demo.classifier import digits_extractor
from pipelines.demo.digits import WORDS
from pipelines.demo.strokes import digits_of, draw_strokes
from tests.genmodels import tiny

pytestmark = pytest.mark.slow

SIZE, STEPS, BATCH, COUNT = 16, 500, 64, 290
SEEDS = (1, 2, 3)


def _train(seed: int) -> Gan:
    """A GAN of ten classes on white digits; ten seconds."""
    torch.manual_seed(seed)
    network = {"kind": "dcgan", "channels": 16, "norm": "none"}
    config = tiny.gan_config(
        latent_dim=32,
        condition_dim=32,
        classes=list(WORDS),
        loss="wasserstein",
        penalties={"gradient": 10.0},
        discriminator_steps=2,
        generator={**network, "norm": "group"},
        discriminator=network,
    )
    made = build_objective(config)
    assert isinstance(made, Gan)
    optimizers = {
        name: torch.optim.AdamW(network.parameters(), 1e-3, betas=(0.5, 0.99))
        for name, network in made.networks.items()
    }
    for batch in _batches(seed):
        for phase in made.phases:
            if phase.runs_at(batch["step"]):
                for name, network in made.networks.items():
                    network.requires_grad_(name == phase.network)
                optimizers[phase.network].zero_grad()
                phase.loss(batch).loss.backward()
                optimizers[phase.network].step()
    return made


def _batches(seed: int) -> Iterator[Batch]:
    pictures = torch.from_numpy(draw_strokes("train", SIZE)).permute(0, 3, 1, 2).float() / 127.5 - 1
    digits, random = digits_of("train"), np.random.default_rng(seed)
    for step in range(STEPS):
        rows = random.integers(len(pictures), size=BATCH)
        yield {
            "images": pictures[rows],
            "weight": torch.ones(BATCH),
            "seeds": torch.arange(step * BATCH, (step + 1) * BATCH) + 10**6 * seed,
            "keys": [str(row) for row in rows],
            "captions": [WORDS[digits[row]] for row in rows],
            "step": step,
        }


@pytest.fixture(scope="module")
def trained() -> dict[int, Gan]:
    return {seed: _train(seed) for seed in SEEDS}


def _features(images: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(images, Tensor):
        images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return np.asarray(digits_extractor()(images).features, np.float64)


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    """Features of held-out digits, and of as many others."""
    return _features(draw_strokes("held_out", SIZE)[:COUNT]), _features(draw_strokes("train", SIZE)[:COUNT])


def _drawn(model: Gan, seeds: Tensor, labels: Tensor) -> np.ndarray:
    with torch.no_grad():
        return _features(model.generate(seeds, labels, "drawing"))


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_quiet_on_a_healthy_one(seed: int, trained: dict[int, Gan], real: tuple[np.ndarray, np.ndarray]) -> None:
    seeds, labels = torch.arange(COUNT), torch.arange(COUNT) % 10
    drawn, again = (_drawn(trained[seed], seeds + first, labels) for first in (0, COUNT))
    variety = measure_variety(drawn, *real)
    assert not variety.collapsed, variety
    assert condition_variety(drawn, again) > THRESHOLDS.of_one_condition


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["one picture", "one for each class", "one class"])
def test_it_goes_off_at_each_kind_of_collapse(
    kind: str, seed: int, trained: dict[int, Gan], real: tuple[np.ndarray, np.ndarray]
) -> None:
    """The same generators, as they draw after a collapse: each picture is as good as before."""
    seeds, labels = torch.arange(COUNT), torch.arange(COUNT) % 10
    if kind == "one class":
        labels = torch.full_like(labels, 1)
    else:
        seeds = torch.zeros_like(seeds)
        labels = torch.zeros_like(labels) if kind == "one picture" else labels
    variety: Variety = measure_variety(_drawn(trained[seed], seeds, labels), *real)
    assert variety.collapsed, variety
