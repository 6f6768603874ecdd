"""What objectives of two networks that play against each other share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from genmodels.gan.export import read_networks
from genmodels.gan.losses import adversarial_loss
from genmodels.objective import Batch, Objective, Phase, PhaseLoss


class AdversarialObjective(Objective, ABC):
    """Networks "discriminator" and "generator", in the order of their phases."""

    def __init__(self, discriminator: nn.Module, generator: nn.Module) -> None:
        self.discriminator, self.generator = discriminator, generator
        self.networks: dict[str, nn.Module] = {"discriminator": discriminator, "generator": generator}
        self.frozen: dict[str, nn.Module] = {}

    @abstractmethod
    def discriminator_loss(self, batch: Batch) -> PhaseLoss:
        """What the discriminator minimises."""

    @abstractmethod
    def generator_loss(self, batch: Batch) -> PhaseLoss:
        """What the generator minimises."""

    def load_weights(self, folder: Path) -> None:
        """Start from an export. Raises ValueError where there is none, or it does not fit."""
        read_networks(folder, self.networks)


class TranslationObjective(AdversarialObjective):
    """Of image to image: networks that follow from the configuration alone, and a phase of each in every step."""

    def __init__(self, config: Any) -> None:
        super().__init__(*self.build(config))
        self.game = adversarial_loss(config.loss)
        self.phases = [Phase("discriminator", self.discriminator_loss), Phase("generator", self.generator_loss)]

    @staticmethod
    @abstractmethod
    def build(config: Any) -> tuple[nn.Module, nn.Module]:
        """The discriminator and the generator, freshly initialised."""

    @classmethod
    def from_config(cls, config: Any, inputs: Path | None = None) -> Self:
        """Build from a configuration; nothing else is needed."""
        return cls(config)

    @classmethod
    def abstract_networks(cls, config: Any) -> dict[str, nn.Module]:
        """The trained networks on the meta device, to count parameters."""
        with torch.device("meta"):
            return dict(zip(("discriminator", "generator"), cls.build(config), strict=True))
