"""What is done to images before the discriminator sees them, real and drawn alike; gradients pass to drawn images.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training" (NeurIPS 2020): colour, translation, cutout.
Karras et al., "Training Generative Adversarial Networks with Limited Data" (NeurIPS 2020): each alteration with a
probability, which follows how well the discriminator knows real images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from genmodels import random
from genmodels.gan.config import Policy

_SHIFT = 1 / 8  # of the side, at most
_HOLE = 1 / 2  # side of a cutout


def augmented(images: Tensor, seeds: Tensor, policies: Sequence[Policy], probability: float = 1.0) -> Tensor:
    """Images, (batch, channels, height, width), each altered by its own seed.

    Args:
        images: square.
        seeds: int64 (batch,).
        policies: what is done, in this order.
        probability: of each alteration, for each image.
    """
    for policy in policies:
        chosen = random.uniform(seeds, (), f"{policy} chosen") < probability
        altered = _ALTERATIONS[policy](images, seeds)
        images = torch.where(chosen[:, None, None, None], altered, images)
    return images


def _flip(images: Tensor, seeds: Tensor) -> Tensor:
    mirrored = random.uniform(seeds, (), "flip") < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _quarter_turn(images: Tensor, seeds: Tensor) -> Tensor:
    turns = random.integers(seeds, 4, "quarter turn")[:, None, None, None]
    for count in range(1, 4):
        images = torch.where(turns == count, images.rot90(count, (2, 3)), images)
    return images


def _translation(images: Tensor, seeds: Tensor) -> Tensor:
    """By whole pixels; what comes in is mid-grey."""
    size = images.shape[-1]
    far = max(1, round(size * _SHIFT))
    shift = (random.uniform(seeds, (2,), "translation") * (2 * far + 1)).long() - far
    place = torch.arange(size, device=images.device)
    found = place - shift[:, :, None]  # (batch, 2, size): where each row and column comes from
    inside = (found >= 0) & (found < size)
    rows, columns = found.clamp(0, size - 1).unbind(1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].to(images)


def _scale(images: Tensor, seeds: Tensor) -> Tensor:
    """Larger or smaller, the logarithm normal with a deviation of 0.2·ln 2."""
    factor = (0.2 * math.log(2) * random.normal(seeds, (1,), "scale")[:, 0]).exp()
    zero = torch.zeros_like(factor)
    return _moved(images, torch.stack([1 / factor, zero, zero, zero, 1 / factor, zero], 1))


def _rotation(images: Tensor, seeds: Tensor) -> Tensor:
    angle = (random.uniform(seeds, (), "rotation").float() * 2 - 1) * math.pi
    zero = torch.zeros_like(angle)
    return _moved(images, torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1))


def _moved(images: Tensor, matrices: Tensor) -> Tensor:
    grid = affine_grid(
        matrices.view(-1, 2, 3).to(images.device, torch.float32), list(images.shape), align_corners=False
    )
    moved = grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved.to(images.dtype)


def _color(images: Tensor, seeds: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast (Zhao et al. 2020)."""
    brightness, saturation, contrast = (random.uniform(seeds, (3,), "color").to(images)[:, :, None, None, None]).unbind(
        1
    )
    images = images + brightness - 0.5
    mean = images.mean(1, keepdim=True)
    images = mean + (images - mean) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _cutout(images: Tensor, seeds: Tensor) -> Tensor:
    """A square of half the side becomes mid-grey; part of it may lie outside."""
    size = images.shape[-1]
    hole = round(size * _HOLE)
    centre = (random.uniform(seeds, (2,), "cutout") * (size + 1 - hole % 2)).long()
    place = torch.arange(size, device=images.device)
    near = (place >= (centre - hole // 2)[:, :, None]) & (place < (centre - hole // 2 + hole)[:, :, None])
    return images * ~(near[:, 0, :, None] & near[:, 1, None, :])[:, None]


_ALTERATIONS = {
    "flip": _flip,
    "quarter_turn": _quarter_turn,
    "translation": _translation,
    "scale": _scale,
    "rotation": _rotation,
    "color": _color,
    "cutout": _cutout,
}
