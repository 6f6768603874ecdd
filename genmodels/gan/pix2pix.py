"""The training objective of pix2pix: an image made of another, judged in patches and by its distance.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017), eq. 4.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genmodels.autoencoder.network import PatchDiscriminator
from genmodels.gan.base import TranslationObjective
from genmodels.gan.export import write_networks
from genmodels.gan.networks.translation import UNetTranslator
from genmodels.gan.translation_config import Pix2PixConfig
from genmodels.metrics.image import psnr
from genmodels.objective import Batch, Drawing, Mean, PhaseLoss, Preview
from genmodels.random import derive_seeds
from genmodels.weights import forward_flops


class Pix2Pix(TranslationObjective):
    """Networks "discriminator", which sees the given image and the other, and "generator", which makes the other."""

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__(config)
        self.config = config

    @staticmethod
    def build(config: Pix2PixConfig) -> tuple[nn.Module, nn.Module]:
        """The discriminator of both images together, and the generator."""
        return build_patches(config), build_translator(config)

    def translate(self, batch: Batch, purpose: str) -> Tensor:
        """What is made of the given images, (batch, 3, height, width) in [-1, 1]."""
        return self.generator(batch["condition_images"], derive_seeds(batch["seeds"], purpose))

    def discriminator_loss(self, batch: Batch) -> PhaseLoss:
        """The game's loss, half as strong as the generator's (section 3.3), over all patches."""
        with torch.no_grad():
            made = self.translate(batch, "discriminator")
        real, fake = self._scores(batch, batch["images"]), self._scores(batch, made)
        per_sample = self.game.of_discriminator(real, fake).flatten(1).mean(1) / 2
        facts = {"loss": per_sample, "score_real": real.flatten(1).mean(1), "score_fake": fake.flatten(1).mean(1)}
        logged = {name: Mean.of(value, batch["weight"]) for name, value in facts.items()}
        return PhaseLoss((batch["weight"] * per_sample).mean(), logged)

    def generator_loss(self, batch: Batch) -> PhaseLoss:
        """The game's other loss, and the distance from the sample's own image."""
        made, real = self.translate(batch, "generator"), None
        if self.game.paired:
            with torch.no_grad():
                real = self._scores(batch, batch["images"])
        adversarial = self.game.of_generator(self._scores(batch, made), real).flatten(1).mean(1)
        distance = (made - batch["images"]).abs().flatten(1).mean(1)
        per_sample = adversarial + self.config.l1_weight * distance
        facts = {"generator_loss": per_sample, "adversarial": adversarial, "l1": distance}
        logged = {name: Mean.of(value, batch["weight"]) for name, value in facts.items()}
        return PhaseLoss((batch["weight"] * per_sample).mean(), logged)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """`loss`, the mean distance from held-out images, and `psnr` in dB."""
        made = self.translate(batch, "drawing")
        distance = (made - batch["images"]).abs().flatten(1).mean(1)
        values = {"loss": distance, "psnr": psnr(made, batch["images"]).clamp(max=100)}
        return {name: Mean.of(value, batch["weight"]) for name, value in values.items()}

    def preview(self, batch: Batch) -> Preview:
        """Rows of the given image, what is made of it, and the sample's own."""
        count = self.config.preview_samples
        made = self.translate(batch, "drawing")
        rows = torch.stack([batch["condition_images"], made, batch["images"]], 1)[:count].flatten(0, 1)
        return Preview(rows, ["given", "made", "real"] * (len(rows) // 3), columns=6)

    def draw(self, batch: Batch, drawing: Drawing) -> Tensor:
        """What is made of each held-out sample's given image."""
        return self.translate(batch, "drawing")

    def export(self, folder: Path) -> dict[str, Any]:
        """Write both networks, for `TranslationModel.from_folder`."""
        told = json.loads(self.config.image_condition.model_dump_json())
        return write_networks(folder, self.config, self.networks, image_condition=told)

    def flops_per_sample(self) -> float:
        """Of one pass through both networks."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        size = self.config.image_size
        shapes = [((1, channels, size, size), torch.float32) for channels in (3, 6)]
        translator = forward_flops(lambda: build_translator(self.config), shapes[0])
        return translator + forward_flops(lambda: build_patches(self.config), shapes[1])

    def _scores(self, batch: Batch, images: Tensor) -> Tensor:
        """Of all patches, (batch, 1, rows, columns)."""
        return self.discriminator(torch.cat([batch["condition_images"], images], dim=1))


def build_translator(config: Pix2PixConfig) -> UNetTranslator:
    """The generator, freshly initialised."""
    return UNetTranslator(config.channels, config.largest, config.depth, config.dropout)


def build_patches(config: Pix2PixConfig) -> PatchDiscriminator:
    """The discriminator, freshly initialised."""
    return PatchDiscriminator(config.discriminator.channels, config.discriminator.layers, in_channels=6)
