"""From image to image: a U-Net whose skip connections keep what both have in common, and residual blocks.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017), section 3.2.1 and the
appendix, with group normalisation in place of batch normalisation: no picture depends on its batch. Zhu et al.,
"Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (ICCV 2017), appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu

from genmodels import random
from genmodels.gan.networks.blocks import SLOPE


class UNetTranslator(nn.Module):
    """(batch, 3, size, size) → the same, in [-1, 1]."""

    def __init__(self, channels: int, largest: int, depth: int, dropout: float) -> None:
        super().__init__()
        widths = [min(channels * 2**step, largest) for step in range(depth)]
        self.dropout = dropout
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 4, 2, 1) for before, after in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.down_norms = nn.ModuleList(
            _norm(width) if 0 < number < depth - 1 else nn.Identity() for number, width in enumerate(widths)
        )
        ups, norms, before = [], [], widths[-1]
        for after in [*reversed(widths[:-1]), None]:
            ups.append(nn.ConvTranspose2d(before, after or 3, 4, 2, 1))
            norms.append(_norm(after) if after is not None else nn.Identity())
            before = 2 * after if after is not None else 3
        self.up, self.up_norms = nn.ModuleList(ups), nn.ModuleList(norms)
        _initialise(self)

    def forward(self, images: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Args: `seeds` (batch,) say which coarse features are dropped, in drawing too: it is the noise of this network
        (section 3.2.1); None drops none."""
        x, skips = images, []
        for number, (layer, norm) in enumerate(zip(self.down, self.down_norms, strict=True)):
            x = norm(layer(x if number == 0 else leaky_relu(x, SLOPE)))
            skips.append(x)
        skips.pop()
        for number, (layer, norm) in enumerate(zip(self.up, self.up_norms, strict=True)):
            x = norm(layer(relu(x)))
            if self.dropout and seeds is not None and number < min(3, len(self.up) - 1):
                kept = random.uniform(seeds, tuple(x.shape[1:]), f"dropout {number}") >= self.dropout
                x = x * kept / (1 - self.dropout)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)
        return x.tanh()


class ResNetTranslator(nn.Module):
    """(batch, 3, size, size) → the same, in [-1, 1]: a few halvings, residual blocks, as many doublings."""

    def __init__(self, channels: int, halvings: int, blocks: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [_padded(3, channels, 7), _instance_norm(channels), nn.ReLU()]
        width = channels
        for _ in range(halvings):
            parts += [nn.Conv2d(width, 2 * width, 3, 2, 1), _instance_norm(2 * width), nn.ReLU()]
            width *= 2
        parts += [_Residual(width) for _ in range(blocks)]
        for _ in range(halvings):
            parts += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1), _instance_norm(width // 2)]
            parts.append(nn.ReLU())
            width //= 2
        self.layers = nn.Sequential(*parts, _padded(width, 3, 7), nn.Tanh())
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.layers(images)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _padded(width, width, 3), _instance_norm(width), nn.ReLU(), _padded(width, width, 3), _instance_norm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Pair(nn.ModuleDict):
    """Two networks that are trained together, in one step of one optimizer."""

    def forward(self, which: str, images: Tensor) -> Tensor:
        """What the network named `which` makes of images (batch, 3, height, width)."""
        return self[which](images)


def _padded(before: int, after: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, padding_mode="reflect")


def _instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels)
