"""AttnGAN's generator, coarse to fine with a look at the words between, and its discriminators, one for each stage.

Xu et al. 2018, section 3.1 and figure 2. Normalised in groups of channels: a picture does not depend on its batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from genmodels.gan.attention.config import AttnGanConfig
from genmodels.gan.config import START
from genmodels.gan.networks.blocks import SLOPE


class Pictures(NamedTuple):
    """What the generator makes.

    Attributes:
        images: of each stage, (batch, 3, size, size) in [-1, 1].
        mean, log_variance: (batch, condition_dim), of what the condition was drawn from.
        attention: of the last stage, (batch, length, rows, columns): at each place, how much of each word.
    """

    images: list[Tensor]
    mean: Tensor
    log_variance: Tensor
    attention: Tensor


class StageScores(NamedTuple):
    """What a stage's discriminator says of images, float32 (batch,): `alone`, and `told` each of the sentences."""

    alone: Tensor
    told: list[Tensor]


class Generator(nn.Module):
    """A latent, noise for the condition, and the features of a caption (`Texts`) to `Pictures`."""

    def __init__(self, config: AttnGanConfig, text_dim: int) -> None:
        super().__init__()
        doublings = (config.sizes[0] // START).bit_length() - 1
        widths = [min(config.channels * 2**step, config.largest) for step in reversed(range(doublings + 1))]
        widths[-1] = config.channels
        self.condition = nn.Linear(text_dim, 2 * config.condition_dim)
        self.first = nn.Linear(config.latent_dim + config.condition_dim, widths[0] * START**2)
        self.coarse = nn.Sequential(*(Doubling(one, other) for one, other in itertools.pairwise(widths)))  # F_0
        finer = range(config.stages - 1)
        self.look = nn.ModuleList(WordAttention(text_dim, config.channels) for _ in finer)
        self.finer = nn.ModuleList(  # F_i
            nn.Sequential(
                *(Residual(2 * config.channels) for _ in range(config.residual_blocks)),
                Doubling(2 * config.channels, config.channels),
            )
            for _ in finer
        )
        self.paint = nn.ModuleList(nn.Conv2d(config.channels, 3, 3, 1, 1) for _ in config.sizes)  # G_i

    def forward(self, latents: Tensor, noise: Tensor, words: Tensor, mask: Tensor, sentence: Tensor) -> Pictures:
        # Conditioning augmentation (Zhang et al., "StackGAN", 2017, section 3.2).
        mean, log_variance = self.condition(sentence).float().chunk(2, dim=1)
        condition = mean + (log_variance / 2).exp() * noise
        hidden = self.first(torch.cat([latents, condition], dim=1)).unflatten(1, (-1, START, START))
        hidden = self.coarse(hidden)
        images = [self.paint[0](hidden).tanh()]
        for look, finer, paint in zip(self.look, self.finer, self.paint[1:], strict=True):
            seen, attention = look(hidden, words, mask)
            hidden = finer(torch.cat([hidden, seen], dim=1))
            images.append(paint(hidden).tanh())
        return Pictures(images, mean, log_variance, attention)


class WordAttention(nn.Module):
    """F^attn: each place's words, by how well they match what is there (eq. 2)."""

    def __init__(self, text_dim: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_dim, channels, bias=False)  # U

    def forward(self, hidden: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What each place sees, as `hidden` (batch, channels, rows, columns), and β (batch, length, rows, columns)."""
        projected = self.project(words)
        similarity = torch.einsum("bchw,btc->bthw", hidden, projected).float()
        attention = similarity.masked_fill(~mask[:, :, None, None], -torch.inf).softmax(1)
        return torch.einsum("bthw,btc->bchw", attention.to(projected.dtype), projected), attention


class Doubling(nn.Module):
    """Twice the height and width, with gates (Dauphin et al. 2017); the transposed convolution can be any of 3×3 after
    pixels are doubled, at less cost."""

    def __init__(self, channels: int, following: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(channels, 2 * following, 4, 2, 1, bias=False), _norm(2 * following), nn.GLU(1)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, 1, 1, bias=False),
            _norm(2 * channels),
            nn.GLU(1),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            _norm(channels),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


class Discriminators(nn.Module):
    """One for each stage, as one module, so that one engine shards and updates them together."""

    def __init__(self, config: AttnGanConfig, text_dim: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(StageDiscriminator(config, size, text_dim) for size in config.sizes)

    def forward(self, images: Sequence[Tensor], *sentences: Tensor, first: int = 0) -> list[StageScores]:
        """Of `images` of each stage from the `first` on; features of `sentences` are (batch, text_dim)."""
        return [judge(shown, *sentences) for judge, shown in zip(self.stages[first:], images)]


class StageDiscriminator(nn.Module):
    """Images of one size to `StageScores`: whether they are real, and whether they are and show what is told."""

    def __init__(self, config: AttnGanConfig, size: int, text_dim: int) -> None:
        super().__init__()
        halvings = (size // START).bit_length() - 1
        widths = [min(config.discriminator_channels * 2**step, config.largest) for step in range(halvings)]
        layers: list[nn.Module] = []
        for before, width in zip([3, *widths], widths):
            layers += [nn.Conv2d(before, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers)
        self.alone = nn.Conv2d(widths[-1], 1, START)
        self.sentence = nn.Linear(text_dim, config.condition_dim)
        self.joint = nn.Conv2d(widths[-1] + config.condition_dim, widths[-1], 3, 1, 1)
        self.told = nn.Conv2d(widths[-1], 1, START)

    def forward(self, images: Tensor, *sentences: Tensor) -> StageScores:
        features = self.layers(images)
        told = []
        for sentence in sentences:
            everywhere = self.sentence(sentence)[:, :, None, None].expand(-1, -1, START, START)
            joint = leaky_relu(self.joint(torch.cat([features, everywhere], dim=1)), SLOPE)
            told.append(self.told(joint).flatten().float())
        return StageScores(self.alone(features).flatten().float(), told)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, 1)), (batch,), of independent features (batch, dim)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)
