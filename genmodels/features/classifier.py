"""A small classifier whose last layer but one is a feature space: what measures where nothing is pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genmodels.config import Section

_MEASURED = 4096  # training pictures for the deviation of the features
CONFIG, WEIGHTS = "classifier.json", "classifier.safetensors"


class ClassifierConfig(Section):
    """What it is made of."""

    image_size: int = Field(32, gt=0, description="height and width in pixels; a multiple of 2^len(channels)")
    channels: list[int] = Field([16, 32, 32], min_length=1, description="features after each halving of the image")
    width: int = Field(64, gt=0, description="features of the last layer but one")
    heads: dict[str, int] = Field(description="number of classes of each question that it answers")
    damage: bool = Field(True, description="it also learns to tell what is blurred, noisy or coarse")


class Classifier(nn.Module):
    """Convolutions of stride 2, a linear layer to the features, and a linear answer to each question."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        previous = 3
        for channels in config.channels:
            layers += [nn.Conv2d(previous, channels, 3, 2, 1), nn.SiLU()]
            previous = channels
        left = config.image_size // 2 ** len(config.channels)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(previous * left * left, config.width))
        heads = {**config.heads, **({DAMAGE: len(_DAMAGES)} if config.damage else {})}
        self.heads = nn.ModuleDict({name: nn.Linear(config.width, classes) for name, classes in heads.items()})
        # Of the features of the training pictures: each counts alike in a distance.
        self.mean, self.deviation = nn.Buffer(torch.zeros(config.width)), nn.Buffer(torch.ones(config.width))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (batch, width), of unit deviation on the training pictures, and logits for each head, of images
        (batch, 3, size, size) in [-1, 1]."""
        features = self.body(images)
        logits = {name: head(nn.functional.silu(features)) for name, head in self.heads.items()}
        return (features - self.mean) / self.deviation, logits


def train_classifier(
    pictures: np.ndarray,
    classes: dict[str, np.ndarray],
    config: ClassifierConfig,
    steps: int = 1500,
    batch: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Classifier:
    """Train on pictures, uint8 (n, size, size, 3), whose classes are int64 (n,) for each head; seconds on two cores.

    Pictures are shifted by up to a sixteenth of their size, and with `config.damage` every second one is blurred, noisy
    or coarse: a classifier that never saw such would hardly look at what makes a picture sharp. The weights are rounded
    to float16 at the end.
    """
    torch.manual_seed(seed)
    network, rng = Classifier(config), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    targets = {name: torch.from_numpy(values) for name, values in classes.items()}
    reach = config.image_size // 16
    for _ in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(pictures), batch))
        dy, dx = rng.integers(-reach, reach + 1, 2)
        padded = nn.functional.pad(images[rows].float() / 127.5 - 1, (reach,) * 4, mode="replicate")
        crop = padded[..., reach + dy : reach + dy + config.image_size, reach + dx : reach + dx + config.image_size]
        answers = {name: target[rows] for name, target in targets.items()}
        if config.damage:
            crop, answers[DAMAGE] = _damaged(crop, rng)
        _, logits = network(crop)
        loss = sum(
            nn.functional.cross_entropy(logits[name], answer, label_smoothing=0.05) for name, answer in answers.items()
        )
        optimizer.zero_grad()
        torch.as_tensor(loss).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        features, _ = network(images[:: -(-len(images) // _MEASURED)].float() / 127.5 - 1)
        network.mean.copy_(features.mean(0))
        network.deviation.copy_(features.std(0))
        for values in network.state_dict().values():
            values.copy_(values.half().float())
    return network.eval()


def _blurred(images: Tensor, strength: float) -> Tensor:
    for _ in range(1 + round(2 * strength)):
        images = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images


def _noisy(images: Tensor, strength: float) -> Tensor:
    return images + (0.05 + 0.3 * strength) * torch.randn_like(images)


def _coarse(images: Tensor, strength: float) -> Tensor:
    small = nn.functional.avg_pool2d(images, 2 if strength < 0.7 else 4)
    return nn.functional.interpolate(small, size=images.shape[-2:])


DAMAGE = "damage"  # the head that tells it
_DAMAGES = (None, _blurred, _noisy, _coarse)


def _damaged(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Every second image blurred, noisy or coarse, and which of `_DAMAGES` each one is."""
    parts, kinds = [], []
    for start, kind in enumerate((0, 1, 0, 2, 0, 3)):
        part, damage = images[start::6], _DAMAGES[kind]
        parts.append(part if damage is None else damage(part, rng.random()))
        kinds += [kind] * len(part)
    order = torch.cat([torch.arange(start, len(images), 6) for start in range(6)]).argsort()
    return torch.cat(parts)[order], torch.tensor(kinds)[order]


def save_classifier(network: Classifier, folder: Path) -> None:
    """Write configuration and float16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(network.config.model_dump(), indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / WEIGHTS)


def load_classifier(folder: Path) -> Classifier:
    """Read what `save_classifier` wrote. Raises ValueError where there is none."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no classifier (no {CONFIG} there)")
    network = Classifier(ClassifierConfig.model_validate_json((folder / CONFIG).read_text()))
    network.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    return network.eval()
