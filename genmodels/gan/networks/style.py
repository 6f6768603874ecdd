"""A mapping network and modulated synthesis, with a residual discriminator.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020): modulation and demodulation of the
weights (eq. 1 and 3), noise for each pixel, skip connections to pixels; equalised learning rates (Karras et al. 2018).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu, normalize

from genmodels import random
from genmodels.gan.config import StyleDiscriminator, StyleGenerator
from genmodels.gan.networks.blocks import SLOPE, START, Conditioner, Head, Scores, doubled, halved, start_of, steps_to

_GAIN = math.sqrt(2)


class Equal(nn.Module):
    """A linear layer, or a convolution of `kernel`, whose weights are scaled as they are used."""

    def __init__(
        self, before: int, after: int, kernel: int = 0, bias: float = 0.0, rate: float = 1.0, scale: bool = True
    ) -> None:
        super().__init__()
        shape = (after, before, kernel, kernel) if kernel else (after, before)
        self.weight = nn.Parameter(torch.randn(shape) / rate)
        self.bias = nn.Parameter(torch.full((after,), bias / rate))
        self.gain = rate * (math.prod(shape[1:]) ** -0.5 if scale else 1.0)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.gain, self.bias * self.rate
        if self.weight.ndim == 2:
            return nn.functional.linear(x, weight, bias)
        return conv2d(x, weight, bias, padding=self.weight.shape[-1] // 2)


class Generator(nn.Module):
    """(batch, latent_dim) → (batch, 3, image_size, image_size)."""

    def __init__(
        self, config: StyleGenerator, image_size: int, latent_dim: int, conditioner: Conditioner | None, dim: int
    ) -> None:
        super().__init__()
        widths = [min(config.channels * 2**step, config.largest) for step in reversed(range(steps_to(image_size) + 1))]
        before = latent_dim + (dim if conditioner is not None else 0)
        self.conditioner = conditioner
        layers: list[nn.Module] = []
        for _ in range(config.mapping_layers):
            layers += [Equal(before, config.style_dim, rate=0.01), _Leaky()]
            before = config.style_dim
        self.mapping = nn.Sequential(*layers)
        self.start = nn.Parameter(torch.randn(widths[0], START, START))
        pairs = zip([widths[0], *widths[:-1]], widths, strict=True)
        self.stages = nn.ModuleList(
            _Synthesis(one, other, config.style_dim, up=number > 0, number=number)
            for number, (one, other) in enumerate(pairs)
        )

    def styles(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """(batch, style_dim): the latent on the sphere, mapped."""
        latents = normalize(latents, dim=1) * math.sqrt(latents.shape[1])
        return self.mapping(start_of(latents, self.conditioner, condition))

    def synthesise(self, styles: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Images of styles; `seeds` (batch,) give the noise, None puts none on."""
        x = self.start.expand(len(styles), -1, -1, -1)
        image = torch.zeros(len(styles), 3, START, START, device=styles.device, dtype=styles.dtype)
        for stage in self.stages:
            x, image = stage(x, image, styles, seeds)
        return image

    def forward(self, latents: Tensor, condition: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        return self.synthesise(self.styles(latents, condition), seeds)


class Modulated(nn.Module):
    """A convolution whose input channels are scaled by a style, and whose outputs are brought back to deviation 1."""

    def __init__(self, before: int, after: int, kernel: int, style_dim: int, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(after))
        self.style = Equal(style_dim, before, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, styles: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, style_dim) → (batch, after, height, width).

        The input is scaled, in place of the weights of each sample: the same numbers, without a copy of the weights for
        each sample.
        """
        scale = self.style(styles)
        weight = self.weight / math.sqrt(self.weight[0].numel())
        out = conv2d(x * scale[:, :, None, None].to(x.dtype), weight, padding=weight.shape[-1] // 2)
        if self.demodulate:
            squares = weight.float().square().sum((2, 3))  # (after, before)
            norm = (scale.float().square() @ squares.T + 1e-8).rsqrt()
            out = out * norm[:, :, None, None].to(out.dtype)
        return out + self.bias[:, None, None]


class _Synthesis(nn.Module):
    """Two modulated convolutions at one resolution, and what they add to the picture."""

    def __init__(self, before: int, after: int, style_dim: int, up: bool, number: int) -> None:
        super().__init__()
        self.up, self.number = up, number
        self.one = Modulated(before, after, 3, style_dim)
        self.two = Modulated(after, after, 3, style_dim)
        self.to_pixels = Modulated(after, 3, 1, style_dim, demodulate=False)
        self.noise = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, image: Tensor, styles: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.up:
            x, image = doubled(x), doubled(image)
        for place, layer in enumerate((self.one, self.two)):
            x = layer(x, styles)
            if seeds is not None:
                drawn = random.normal(seeds, (1, *x.shape[2:]), f"noise {self.number} {place}")
                x = x + self.noise[place] * drawn.to(x.dtype)
            x = leaky_relu(x, SLOPE) * _GAIN
        return x, image + self.to_pixels(x, styles)


class Discriminator(nn.Module):
    """(batch, 3, image_size, image_size) → `Scores`."""

    def __init__(
        self,
        config: StyleDiscriminator,
        image_size: int,
        conditioner: Conditioner | None,
        dim: int,
        classes: int = 0,
        joint: bool = False,
    ) -> None:
        super().__init__()
        widths = [min(config.channels * 2**step, config.largest) for step in range(steps_to(image_size) + 1)]
        self.from_pixels = Equal(3, widths[0], 1)
        self.blocks = nn.ModuleList(_Halving(one, other) for one, other in itertools.pairwise(widths))
        self.end = Equal(widths[-1], widths[-1], 3)
        self.last = Equal(widths[-1] * START**2, dim)
        self.head = Head(dim, conditioner, classes, joint)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Scores:
        x = leaky_relu(self.from_pixels(images), SLOPE) * _GAIN
        for block in self.blocks:
            x = block(x)
        x = leaky_relu(self.end(x), SLOPE) * _GAIN
        return self.head(leaky_relu(self.last(x.flatten(1)), SLOPE) * _GAIN, condition)


class _Halving(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.one, self.two = Equal(before, before, 3), Equal(before, after, 3)
        self.shortcut = Equal(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = leaky_relu(self.one(x), SLOPE) * _GAIN
        inner = leaky_relu(self.two(halved(inner)), SLOPE) * _GAIN
        return (inner + self.shortcut(halved(x))) / _GAIN


class _Leaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, SLOPE) * _GAIN
