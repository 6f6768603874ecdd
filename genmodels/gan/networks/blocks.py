"""What generators and discriminators of all kinds are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.nn.utils.parametrizations import spectral_norm

from genmodels.gan.config import START

SLOPE = 0.2  # of leaky rectifiers


class Scores(NamedTuple):
    """What a discriminator says of images.

    Attributes:
        logits: float32 (batch,): more is more real.
        classes: float32 (batch, classes), of one that names classes too, else None.
        features: (batch, features), what both are read off.
    """

    logits: Tensor
    classes: Tensor | None
    features: Tensor


class Conditioner(nn.Module):
    """A class's own vector, or a projection of features of a text: (batch,) or (batch, width) → (batch, dim)."""

    def __init__(self, classes: int | None, text_width: int | None, dim: int, spectral: bool = False) -> None:
        """Args: one of `classes` (how many) and `text_width` (features of a text), the other is None."""
        super().__init__()
        self.of_class = limited(nn.Embedding(classes, dim), spectral) if classes is not None else None
        self.of_text = limited(nn.Linear(text_width, dim), spectral) if text_width is not None else None

    def forward(self, condition: Tensor) -> Tensor:
        if self.of_class is not None:
            return self.of_class(condition)
        assert self.of_text is not None
        return self.of_text(condition)


class Head(nn.Module):
    """Features to `Scores`.

    A condition enters as in Miyato and Koyama, "cGANs with Projection Discriminator" (2018), eq. 5: a score of the
    features alone, and the dot product of the features with the condition's own vector.
    """

    def __init__(
        self,
        features: int,
        conditioner: Conditioner | None,
        classes: int = 0,
        joint: bool = False,
        spectral: bool = False,
    ) -> None:
        """Args: `classes`: that are named too. `joint`: they and "drawn" are the K + 1 classes of Salimans et al. 2016:
        the score is what all real classes have over 0, that of a drawn image."""
        super().__init__()
        self.conditioner, self.joint = conditioner, joint
        self.score = None if joint else limited(nn.Linear(features, 1), spectral)
        self.classes = limited(nn.Linear(features, classes), spectral) if classes else None

    def forward(self, features: Tensor, condition: Tensor | None) -> Scores:
        classes = None if self.classes is None else self.classes(features).float()
        if self.score is None:
            assert classes is not None
            logits = classes.logsumexp(1)
        else:
            logits = self.score(features).squeeze(1).float()
        if self.conditioner is not None:
            assert condition is not None
            own = self.conditioner(condition)
            logits = logits + (features * own).sum(1).float() / math.sqrt(features.shape[1])
        return Scores(logits, classes, features)


class BatchNorm(nn.Module):
    """Normalisation by the statistics of the global batch, gathered from all ranks (torch's own refuses the CPU).

    In evaluation mode by running averages, which are equal on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.float()
        if self.training:
            mean, mean_square = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
            if dist.is_initialized() and dist.get_world_size() > 1:
                both = collectives.all_reduce(torch.stack([mean, mean_square])) / dist.get_world_size()
                mean, mean_square = both[0], both[1]
            variance = (mean_square - mean.square()).clamp(min=0)
            # In the phase that trains it, not in one that only looks, whose images may be others.
            if torch.is_grad_enabled() and (self.weight is None or self.weight.requires_grad):
                with torch.no_grad():
                    self.running_mean.lerp_(mean.detach(), self.momentum)
                    self.running_var.lerp_(variance.detach(), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        x = (x - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]
        if self.weight is not None and self.bias is not None:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x.to(given)


class ConditionalNorm(nn.Module):
    """Normalisation whose gain and bias follow a vector (Dumoulin et al. 2017; Miyato and Koyama 2018, section 4.2)."""

    def __init__(self, channels: int, dim: int, groups: int) -> None:
        """Args: `groups` of group normalisation; 0: statistics of the batch."""
        super().__init__()
        self.norm: nn.Module
        self.norm = BatchNorm(channels, affine=False) if groups == 0 else nn.GroupNorm(groups, channels, affine=False)
        self.gain_and_bias = nn.Linear(dim, 2 * channels)
        nn.init.zeros_(self.gain_and_bias.weight)
        nn.init.zeros_(self.gain_and_bias.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        gain, bias = self.gain_and_bias(vector)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + gain) + bias


def steps_to(image_size: int) -> int:
    """How often START is doubled to `image_size`. Raises ValueError where it never is."""
    count = (image_size // START).bit_length() - 1
    if count < 1 or START * 2**count != image_size:
        raise ValueError(f"image_size {image_size} cannot be made by doubling {START}: use 8, 16, 32, 64, … 1024")
    return count


def limited(module: nn.Module, spectral: bool) -> nn.Module:
    """With spectral normalisation, if asked for (Miyato et al. 2018): the largest singular value becomes 1."""
    return spectral_norm(module) if spectral else module


def start_of(latents: Tensor, conditioner: Conditioner | None, condition: Tensor | None) -> Tensor:
    """What a generator begins with: the latent, and the condition's vector brought to the same mean square."""
    if conditioner is None:
        return latents
    assert condition is not None
    own = conditioner(condition)
    return torch.cat([latents, normalize(own, dim=1) * math.sqrt(own.shape[1])], dim=1)


def doubled(x: Tensor) -> Tensor:
    """Twice the height and width, bilinear."""
    return interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def halved(x: Tensor) -> Tensor:
    """Half the height and width, means over squares: which is bilinear, antialiased."""
    return nn.functional.avg_pool2d(x, 2)
