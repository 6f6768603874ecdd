"""Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks" (2016): strided convolutions, batch normalisation, a condition beside the latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genmodels.gan.config import DcganDiscriminator, DcganGenerator
from genmodels.gan.networks.blocks import (
    SLOPE,
    START,
    BatchNorm,
    Conditioner,
    Head,
    Scores,
    limited,
    start_of,
    steps_to,
)


class Generator(nn.Module):
    """(batch, latent_dim) → (batch, 3, image_size, image_size) in [-1, 1]."""

    def __init__(
        self, config: DcganGenerator, image_size: int, latent_dim: int, conditioner: Conditioner | None, dim: int
    ) -> None:
        super().__init__()
        steps = steps_to(image_size)
        widths = [config.channels * 2**step for step in reversed(range(steps))]
        self.conditioner = conditioner
        self.first = nn.Linear(latent_dim + (dim if conditioner is not None else 0), widths[0] * START**2)
        layers: list[nn.Module] = [_norm(config.norm, widths[0]), nn.ReLU()]
        for width, following in zip(widths, [*widths[1:], None], strict=True):
            layers.append(nn.ConvTranspose2d(width, following or 3, 4, 2, 1))
            layers += [] if following is None else [_norm(config.norm, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.apply(_small_weights)

    def forward(self, latents: Tensor, condition: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        x = self.first(start_of(latents, self.conditioner, condition))
        return self.layers(x.unflatten(1, (-1, START, START)))


class Discriminator(nn.Module):
    """(batch, 3, image_size, image_size) → `Scores`."""

    def __init__(
        self,
        config: DcganDiscriminator,
        image_size: int,
        conditioner: Conditioner | None,
        dim: int,
        classes: int = 0,
        joint: bool = False,
    ) -> None:
        super().__init__()
        widths = [config.channels * 2**step for step in range(steps_to(image_size))]
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers.append(limited(nn.Conv2d(before, width, 4, 2, 1), config.spectral_norm))
            layers += [] if before == 3 else [_norm(config.norm, width)]
            layers.append(nn.LeakyReLU(SLOPE))
            before = width
        self.layers = nn.Sequential(*layers)
        self.last = limited(nn.Linear(before * START**2, dim), config.spectral_norm)
        self.head = Head(dim, conditioner, classes, joint, config.spectral_norm)
        if not config.spectral_norm:
            self.apply(_small_weights)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Scores:
        features = nn.functional.leaky_relu(self.last(self.layers(images).flatten(1)), SLOPE)
        return self.head(features, condition)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return BatchNorm(channels)
    return nn.GroupNorm(min(8, channels), channels) if kind == "group" else nn.Identity()


def _small_weights(module: nn.Module) -> None:
    """Deviation 0.02, as in the paper's section 4."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, BatchNorm) and module.weight is not None:
        with torch.no_grad():
            module.weight.normal_(1.0, 0.02)
