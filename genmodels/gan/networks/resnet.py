"""Residual networks with spectral normalisation.

Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (2018), appendix B; conditional
normalisation as in Miyato and Koyama, "cGANs with Projection Discriminator" (2018).
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from genmodels.gan.config import ResNetDiscriminator, ResNetGenerator
from genmodels.gan.networks.blocks import (
    START,
    ConditionalNorm,
    Conditioner,
    Head,
    Scores,
    halved,
    limited,
    start_of,
    steps_to,
)


class Generator(nn.Module):
    """(batch, latent_dim) → (batch, 3, image_size, image_size) in [-1, 1]; norms see latent and condition."""

    def __init__(
        self, config: ResNetGenerator, image_size: int, latent_dim: int, conditioner: Conditioner | None, dim: int
    ) -> None:
        super().__init__()
        steps = steps_to(image_size)
        widths = [min(config.channels * 2**step, config.largest) for step in reversed(range(steps + 1))]
        self.conditioner = conditioner
        start = latent_dim + (dim if conditioner is not None else 0)
        groups = 0 if config.norm == "batch" else min(8, widths[-1])
        self.first = nn.Linear(start, widths[0] * START**2)
        self.blocks = nn.ModuleList(
            _Doubling(before, after, start, groups) for before, after in itertools.pairwise(widths)
        )
        self.norm = ConditionalNorm(widths[-1], start, groups)
        self.to_pixels = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor, condition: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        start = start_of(latents, self.conditioner, condition)
        x = self.first(start).unflatten(1, (-1, START, START))
        for block in self.blocks:
            x = block(x, start)
        return self.to_pixels(relu(self.norm(x, start))).tanh()


class _Doubling(nn.Module):
    """A residual block that doubles height and width."""

    def __init__(self, before: int, after: int, dim: int, groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ConditionalNorm(width, dim, groups) for width in (before, after))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, after, 3, padding=1) for width in (before, after))
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        inner = interpolate(relu(self.norms[0](x, vector)), scale_factor=2)
        inner = self.convolutions[0](inner)
        inner = self.convolutions[1](relu(self.norms[1](inner, vector)))
        return inner + self.shortcut(interpolate(x, scale_factor=2))


class Discriminator(nn.Module):
    """(batch, 3, image_size, image_size) → `Scores`."""

    def __init__(
        self,
        config: ResNetDiscriminator,
        image_size: int,
        conditioner: Conditioner | None,
        dim: int,
        classes: int = 0,
        joint: bool = False,
    ) -> None:
        super().__init__()
        widths = [min(config.channels * 2**step, config.largest) for step in range(steps_to(image_size))]
        spectral = config.spectral_norm
        self.blocks = nn.Sequential(
            *(
                _Halving(before, after, spectral, first=before == 3)
                for before, after in zip([3, *widths[:-1]], widths, strict=True)
            ),
            _Halving(widths[-1], widths[-1], spectral, halve=False),
        )
        self.last = limited(nn.Linear(widths[-1], dim), spectral)
        self.head = Head(dim, conditioner, classes, joint, spectral)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Scores:
        features = relu(self.last(relu(self.blocks(images)).sum((2, 3))))
        return self.head(features, condition)


class _Halving(nn.Module):
    """A residual block that halves height and width."""

    def __init__(self, before: int, after: int, spectral: bool, first: bool = False, halve: bool = True) -> None:
        super().__init__()
        self.first, self.halve = first, halve
        self.one = limited(nn.Conv2d(before, after, 3, padding=1), spectral)
        self.two = limited(nn.Conv2d(after, after, 3, padding=1), spectral)
        self.shortcut = limited(nn.Conv2d(before, after, 1), spectral)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.one(x if self.first else relu(x))
        inner = self.two(relu(inner))
        both = inner + self.shortcut(x)
        return halved(both) if self.halve else both
