"""From image to image: a U-Net whose skip connections keep what both have in common.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017), section 3.2.1 and the
appendix, with group normalisation in place of batch normalisation: no picture depends on its batch.
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
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

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


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels)
