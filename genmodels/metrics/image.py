"""Distances between a picture and its reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels of each image, 10 log₁₀(data_range² / mean squared error); (batch,).

    Args:
        images, reference: (batch, channels, height, width), of equal shape.
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].

    Equal images give infinity. Raises ValueError where shapes differ.

    >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2))
    tensor([20.])
    """
    if images.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(images.shape)} and {tuple(reference.shape)}")
    error = (images - reference).float().square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(data_range**2 / error)
