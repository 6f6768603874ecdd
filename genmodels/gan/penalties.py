"""Penalties on the gradient of a discriminator with respect to its images.

Gulrajani et al., "Improved Training of Wasserstein GANs" (2017), eq. 3; Mescheder, Geiger and Nowozin, "Which Training
Methods for GANs do actually Converge?" (ICML 2018), eq. 9 and 10.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genmodels import random
from genmodels.gan.config import Penalties


def squared_gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """‖∇score‖² at each image, (batch,); the graph is kept, so that it can be minimised.

    In float32 also under autocast: squares of gradients leave the range of 16 bits.

    Args:
        score: images to (batch,), each of its own image alone.
        images: (batch, channels, height, width).
    """
    with torch.autocast(images.device.type, enabled=False):
        given = images.detach().float().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(given).sum(), given, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def zero_centred(score: Callable[[Tensor], Tensor], images: Tensor, gamma: float) -> Tensor:
    """γ/2 ‖∇D‖², (batch,): R1 at real images, R2 at drawn ones."""
    return gamma / 2 * squared_gradient(score, images)


def gradient_penalty(
    score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, seeds: Tensor, weight: float
) -> Tensor:
    """weight·(‖∇D‖ − 1)² at points between real and drawn images, (batch,); where, comes from `seeds` (batch,)."""
    share = random.uniform(seeds, (1, 1, 1), "between").to(real)
    between = share * real + (1 - share) * fake.to(real)
    # A gradient of exactly 0 has a norm without a derivative.
    norm = squared_gradient(score, between).clamp(min=1e-20).sqrt()
    return weight * (norm - 1).square()


def penalty(
    score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, seeds: Tensor, penalties: Penalties
) -> Tensor:
    """The sum of those that are configured, (batch,)."""
    total = torch.zeros(len(real), device=real.device)
    if penalties.r1:
        total = total + zero_centred(score, real, penalties.r1)
    if penalties.r2:
        total = total + zero_centred(score, fake, penalties.r2)
    if penalties.gradient:
        total = total + gradient_penalty(score, real, fake, seeds, penalties.gradient)
    return total
