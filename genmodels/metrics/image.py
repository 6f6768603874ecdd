"""Distances between a picture and its reconstruction, and how alike pictures are among themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WINDOW = 11  # pixels of structural similarity's Gaussian window
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels of each image, 10 log₁₀(data_range² / mean squared error); (batch,).

    Args:
        images, reference: (batch, channels, height, width), of equal shape.
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].

    Equal images give infinity. Raises ValueError where shapes differ.

    >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2))
    tensor([20.])
    """
    _check_shapes(images, reference)
    error = (images - reference).float().square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(data_range**2 / error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), at most 1; (batch,). Computed by torchmetrics.

    Args:
        images, reference: (batch, channels, height, width) in [-1, 1], of equal shape, 11 pixels or more each way.

    Raises ValueError where shapes differ or a side is under 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    both = _positive(images, reference)
    found: Any = structural_similarity_index_measure(*both, data_range=1.0, reduction="none")
    return found


def ms_ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale structural similarity of each image (Wang et al. 2003), 0 … 1; (batch,). Arguments as `ssim`.

    With the paper's five scales from 176 pixels on; smaller images have as many of them as torchmetrics can compare,
    their weights scaled to sum to 1.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    both = _positive(images, reference)
    side = min(images.shape[-2:])
    scales = max(number for number in range(1, 6) if side // max(1, (number - 1) ** 2) >= _WINDOW)
    whole = sum(_SCALES[:scales])
    found: Any = multiscale_structural_similarity_index_measure(
        *both,
        data_range=1.0,
        reduction="none",
        betas=tuple(weight / whole for weight in _SCALES[:scales]),
        normalize="relu",
    )
    return found


def _positive(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in [0, 1]: the comparison of means is not for negative ones."""
    _check_shapes(images, reference)
    if min(images.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"structural similarity looks at {_WINDOW} × {_WINDOW} pixels: {tuple(images.shape[-2:])} is too small"
        )
    return (images.float() + 1) / 2, (reference.float() + 1) / 2


def _check_shapes(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(images.shape)} and {tuple(reference.shape)}")
