"""What is done to the small images that super-resolution is trained on, so that it forgives what a decoder draws.

Gaussian blur: Saharia et al., "Image Super-Resolution via Iterative Refinement" (2021). Blur, noise, resizing and JPEG
in a random order: after Zhang et al., "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution"
(ICCV 2021), much shortened. Gaussian conditioning augmentation: Ho et al., "Cascaded Diffusion Models for High Fidelity
Image Generation" (JMLR 2022), section 4. All that is drawn comes from each sample's seed.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from genmodels import random

_NOISE = 0.1  # largest deviation of the noise of "bsr", for images in [-1, 1]
_RESIZE = (0.5, 1.5)  # "bsr" resizes to so many times the side, and back
_QUALITY = (40.0, 95.0)  # of JPEG
# The luminance table of the JPEG standard (ITU T.81, annex K), here for all three colours.
_JPEG = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip


def degraded(images: Tensor, seeds: Tensor, kind: Literal["none", "blur", "bsr"], sigma: float) -> Tensor:
    """Images (batch, channels, height, width) in [-1, 1] made worse, each by its own seed.

    Args:
        images: small ones.
        seeds: int64 (batch,).
        kind: "none", "blur", or "bsr": blur, noise, resizing and JPEG, each as strong as is drawn, in any order.
        sigma: largest deviation of the blur in pixels.
    """
    if kind == "none":
        return images
    strength = random.uniform(seeds, (5,), "degradation").to(images.dtype)  # of each, and the kind of resizing
    if kind == "blur":
        return _blurred(images, sigma * strength[:, 0])
    order = random.uniform(seeds, (4,), "order of degradation").argsort(1).tolist()
    parts = []
    for row, steps in enumerate(order):
        image, own, drawn = images[row : row + 1], seeds[row : row + 1], strength[row : row + 1]
        for step in steps:
            if step == 0:
                image = _blurred(image, sigma * drawn[:, 0])
            elif step == 1:
                noise = random.normal(own, image.shape[1:], "degradation noise", image.dtype)
                image = image + _NOISE * drawn[:, 1].item() * noise
            elif step == 2:
                image = _resized(image, float(drawn[0, 2]), float(drawn[0, 4]))
            else:
                low, high = _QUALITY
                image = _jpeg(image, high + (low - high) * float(drawn[0, 3]))
        parts.append(image.clamp(-1, 1))
    return torch.cat(parts)


def noised(images: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """cos(πs/2) x + sin(πs/2) ε for levels s (batch,) from 0, clean, to 1, noise: the cosine schedule's."""
    angle = level.to(images.dtype).reshape(-1, 1, 1, 1) * (math.pi / 2)
    return angle.cos() * images + angle.sin() * noise


def level_of(deviation: float) -> float:
    """The level at which the noise has this deviation, 0 to 1."""
    return 2 / math.pi * math.asin(min(max(deviation, 0.0), 1.0))


def random_crops(images: Tensor, seeds: Tensor, size: int, multiple: int) -> Tensor:
    """A square of `size` pixels of each image; its place is drawn by the seed, in multiples of `multiple` pixels."""
    places = (images.shape[-1] - size) // multiple + 1
    top, left = (random.integers(seeds, places, f"crop {axis}").mul(multiple) for axis in ("top", "left"))
    cut = [
        image[:, y : y + size, x : x + size] for image, y, x in zip(images, top.tolist(), left.tolist(), strict=True)
    ]
    return torch.stack(cut)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a deviation for each image; borders are repeated."""
    radius = max(1, math.ceil(3 * float(sigma.max())))
    line = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (line / sigma.clamp(min=1e-2)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (batch, taps)
    count, channels, height, width = images.shape
    kernel = kernel.repeat_interleave(channels, 0)
    flat = pad(images, (radius,) * 4, mode="replicate").reshape(1, count * channels, height + 2 * radius, -1)
    across = conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    return conv2d(across, kernel[:, None, :, None], groups=count * channels).reshape(count, channels, height, width)


def _resized(image: Tensor, share: float, kind: float) -> Tensor:
    """To another size and back, both in the way that `kind` in (0, 1) draws."""
    low, high = _RESIZE
    side = max(2, round(image.shape[-1] * (low + (high - low) * share)))
    way = ("bilinear", "bicubic", "area")[min(2, int(3 * kind))]
    sizes = ((side, side), tuple(image.shape[-2:]))
    for size in sizes:
        options = {} if way == "area" else {"align_corners": False}
        image = interpolate(image, size=size, mode=way, **options)  # type: ignore[arg-type]
    return image


def _jpeg(image: Tensor, quality: float) -> Tensor:
    """The quantisation of JPEG in blocks of 8 by 8 pixels, of each colour alike."""
    scale = 50 / quality if quality < 50 else 2 - quality / 50
    table = (torch.tensor(_JPEG, dtype=image.dtype, device=image.device) * scale).round().clamp(min=1)
    _, channels, height, width = image.shape
    padded = pad(image * 127.5, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.reshape(channels, padded.shape[2] // 8, 8, padded.shape[3] // 8, 8).transpose(2, 3)
    basis = _cosines().to(image)
    coefficients = basis @ blocks @ basis.T
    restored = basis.T @ ((coefficients / table).round() * table) @ basis
    return restored.transpose(2, 3).reshape(1, *padded.shape[1:])[..., :height, :width] / 127.5


@cache
def _cosines() -> Tensor:
    """The orthonormal discrete cosine transform of eight values, float64 (8, 8)."""
    number = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi * (number[None, :] + 0.5) * number[:, None] / 8) / 2
    basis[0] /= math.sqrt(2)
    return basis
