"""A network without normalisation, by the published recipe of R3GAN.

Huang, Gokaslan, Kuleshov and Tompkin, "The GAN is dead; long live the GAN! A Modern Baseline GAN" (2024), section 4:
bottleneck residual blocks with grouped convolutions, inverted (wider inside), leaky rectifiers, bilinear resampling, a
learnt 4×4 start and end, and fix-up initialisation (Zhang, Dauphin and Ma 2019) in place of normalisation. Written for
the relativistic loss with R1 and R2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from genmodels.gan.config import ModernDiscriminator, ModernGenerator
from genmodels.gan.networks.blocks import SLOPE, START, Conditioner, Head, Scores, doubled, halved, start_of, steps_to


class Generator(nn.Module):
    """(batch, latent_dim) → (batch, 3, image_size, image_size)."""

    def __init__(
        self, config: ModernGenerator, image_size: int, latent_dim: int, conditioner: Conditioner | None, dim: int
    ) -> None:
        super().__init__()
        widths = _widths(config, image_size)[::-1]
        blocks = len(widths) * config.blocks
        self.conditioner = conditioner
        # A learnt 4×4 picture, each channel of which is weighed by the latent.
        self.start = nn.Parameter(torch.randn(widths[0], START, START))
        self.first = nn.Linear(latent_dim + (dim if conditioner is not None else 0), widths[0], bias=False)
        stages: list[nn.Module] = []
        before = widths[0]
        for number, width in enumerate(widths):
            stages.append(_Stage(before, width, config, blocks, up=number > 0))
            before = width
        self.stages = nn.ModuleList(stages)
        self.to_pixels = nn.Conv2d(before, 3, 1)
        nn.init.normal_(self.first.weight, 0.0, self.first.in_features**-0.5)

    def forward(self, latents: Tensor, condition: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        x = self.first(start_of(latents, self.conditioner, condition))[:, :, None, None] * self.start
        for stage in self.stages:
            x = stage(x)
        return self.to_pixels(x)


class Discriminator(nn.Module):
    """(batch, 3, image_size, image_size) → `Scores`."""

    def __init__(
        self,
        config: ModernDiscriminator,
        image_size: int,
        conditioner: Conditioner | None,
        dim: int,
        classes: int = 0,
        joint: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(config, image_size)
        blocks = len(widths) * config.blocks
        self.from_pixels = nn.Conv2d(3, widths[0], 1)
        self.stages = nn.ModuleList(
            _Stage(width, after, config, blocks, down=after_exists)
            for width, after, after_exists in zip(
                widths, [*widths[1:], widths[-1]], [True] * (len(widths) - 1) + [False], strict=True
            )
        )
        self.end = nn.Conv2d(widths[-1], widths[-1], START, groups=widths[-1], bias=False)
        self.last = nn.Linear(widths[-1], dim)
        self.head = Head(dim, conditioner, classes, joint)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Scores:
        x = self.from_pixels(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.last(self.end(x).flatten(1)), condition)


class _Stage(nn.Module):
    """Residual blocks at one resolution, and the transition to or from it."""

    def __init__(
        self,
        before: int,
        after: int,
        config: ModernGenerator | ModernDiscriminator,
        blocks: int,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.change = nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity()
        width = before if down else after
        self.blocks = nn.Sequential(*(_Block(width, config, blocks) for _ in range(config.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        if self.down:  # what is left goes down
            return self.change(halved(self.blocks(x)))
        if self.up:
            x = doubled(x)
        return self.blocks(self.change(x))


class _Block(nn.Module):
    """1×1 to `expansion` times the width, 3×3 in groups, 1×1 back; nothing at first."""

    def __init__(self, width: int, config: ModernGenerator | ModernDiscriminator, blocks: int) -> None:
        super().__init__()
        inner = width * config.expansion
        groups = max(1, inner // config.group_width)
        self.one = nn.Conv2d(width, inner, 1)
        self.two = nn.Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.three = nn.Conv2d(inner, width, 1, bias=False)
        gain = nn.init.calculate_gain("leaky_relu", SLOPE) * blocks**-0.25
        for layer in (self.one, self.two):
            fan = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            nn.init.normal_(layer.weight, 0.0, gain * fan**-0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.three.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = leaky_relu(self.two(leaky_relu(self.one(x), SLOPE)), SLOPE)
        return x + self.three(inner)


def _widths(config: ModernGenerator | ModernDiscriminator, image_size: int) -> list[int]:
    """Channels at each resolution, from fine to coarse."""
    return [min(config.channels * 2**step, config.largest) for step in range(steps_to(image_size) + 1)]
