"""Images as conditions, by concatenation: super-resolution, deblurring, denoising, edges, maps, inpainting.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022), sections 4.3.2 to 4.5;
Saharia et al., "Image Super-Resolution via Iterative Refinement" (2021). In training the condition is made from the
image itself, or is another image of the sample. The denoiser gets all of it, its pixels folded into channels where
latents are smaller than images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pixel_unshuffle

from genmodels import random
from genmodels.diffusion.config import (
    BlurCondition,
    EdgeCondition,
    ImageConditionConfig,
    LowResolutionCondition,
    MaskCondition,
    MemberCondition,
    NoiseCondition,
)
from genmodels.diffusion.degradation import degraded, noised


def condition_channels(config: ImageConditionConfig, factor: int) -> int:
    """Channels that `fold` gives: `factor` is how many pixels a side one latent stands for."""
    own = {"edges": 1, "mask": 4}.get(config.kind, 3)
    return own * factor**2


def fold(condition: Tensor, factor: int) -> Tensor:
    """(batch, channels, height, width) in pixels to (batch, channels·factor², height / factor, width / factor)."""
    return pixel_unshuffle(condition, factor)


def from_batch(config: ImageConditionConfig, batch: dict[str, Any]) -> Tensor:
    """What the denoiser is told of the images of a batch: (batch, channels, height, width), before `fold`.

    Args:
        config: which condition.
        batch: of training. Noise and masks come from its `seeds`; kind member takes its `condition_images`.
    """
    images, seeds = batch["images"], batch["seeds"]
    match config:
        case MemberCondition():
            return batch["condition_images"]
        case LowResolutionCondition():
            small = degraded(reduced(images, config.factor), seeds, config.degradation, config.blur_sigma)
            return upsampled(augmented(config, small, seeds)[0], images.shape[-1], config.augmentation == 0)
        case BlurCondition():
            return blurred(images, config.sigma)
        case NoiseCondition():
            return images + config.deviation * random.normal(seeds, images.shape[1:], "condition noise")
        case EdgeCondition():
            return edges(images, config.threshold)
        case MaskCondition():
            return masked(images, random_rectangles(seeds, images.shape[-1], config.largest))


def from_given(
    config: ImageConditionConfig,
    images: Tensor,
    masks: Tensor | None = None,
    level: float = 0.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """What the denoiser is told of given images when it draws: (batch, channels, size, size), before `fold`.

    Args:
        config: which condition.
        images: low_resolution, blur and noise: what is to be improved; member: the other image; edges: the edges
            themselves, 1 channel, or an image to find them in, 3 channels; mask: what is to be filled in. (batch,
            channels, size, size) in [-1, 1]; low-resolution ones are smaller.
        masks: float (batch, 1, size, size) for kind mask: 1 where it is to be filled in.
        level: of noise that is put on the images of a model that is told of it, by `seeds`, int64 (batch,).

    Raises:
        ValueError: a mask is missing, or given to a model that takes none.
    """
    if (masks is not None) != (config.kind == "mask"):
        raise ValueError(f"a model with image_condition {config.kind} takes {'a mask' if masks is None else 'no mask'}")
    match config:
        case LowResolutionCondition():
            if level > 0:
                assert seeds is not None
                noise = random.normal(seeds, images.shape[1:], "augmentation noise")
                images = noised(images, torch.full_like(seeds, level, dtype=torch.float64), noise)
            return upsampled(images, images.shape[-1] * config.factor, config.augmentation == 0)
        case EdgeCondition():
            return images if images.shape[1] == 1 else edges(images, config.threshold)
        case MaskCondition():
            assert masks is not None
            return masked(images, masks)
    return images


def as_given(config: ImageConditionConfig, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What one would give a model to get the images of a batch back: images for `from_given`, and masks for kind mask.

    Args: as of `from_batch`.
    """
    images, seeds = batch["images"], batch["seeds"]
    match config:
        case LowResolutionCondition():
            return reduced(images, config.factor), None
        case EdgeCondition():
            return images, None
        case MaskCondition():
            return images, random_rectangles(seeds, images.shape[-1], config.largest)
    return from_batch(config, batch), None


def augmented(config: LowResolutionCondition, small: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Small images with as much noise as is drawn for them in training, and the levels of it, (batch,) from 0 to 1."""
    level = config.augmentation * random.uniform(seeds, (), "augmentation level")
    if config.augmentation == 0:
        return small, level
    return noised(small, level, random.normal(seeds, small.shape[1:], "augmentation noise")), level


def reduced(images: Tensor, factor: int) -> Tensor:
    """Images by a `factor` smaller: means over squares of pixels."""
    return torch.nn.functional.avg_pool2d(images, factor)


def upsampled(images: Tensor, size: int, clamp: bool = True) -> Tensor:
    """Bicubic, to `size` pixels a side: what super-resolution has to beat."""
    larger = interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    return larger.clamp(-1, 1) if clamp else larger


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of deviation `sigma` in pixels; borders are repeated."""
    radius = max(1, round(3 * sigma))
    line = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (line / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = torch.nn.functional.pad(images, (radius,) * 4, mode="replicate")
    across = conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
    return conv2d(across, kernel[:, :, :, None], groups=images.shape[1])


def edges(images: Tensor, threshold: float) -> Tensor:
    """Where the colour changes by more than `threshold` between neighbours: (batch, 1, height, width), 1 or -1."""
    across = (images - images.roll(1, -1)).abs().amax(1, keepdim=True)
    down = (images - images.roll(1, -2)).abs().amax(1, keepdim=True)
    across[..., :, 0], down[..., 0, :] = 0, 0
    return torch.where(torch.maximum(across, down) > threshold, 1.0, -1.0)


def masked(images: Tensor, masks: Tensor) -> Tensor:
    """The image with 0 in place of what is masked, and the mask as a fourth channel, 1 or -1."""
    return torch.cat([images * (1 - masks), 2 * masks - 1], dim=1)


def random_rectangles(seeds: Tensor, size: int, largest: float) -> Tensor:
    """One rectangle for each sample, of up to `largest` of each side: float (batch, 1, size, size), 1 inside."""
    u = random.uniform(seeds, (4,), "mask")  # (batch, 4): height, width, top, left

    def inside(extent: Tensor, start: Tensor) -> Tensor:
        length = (extent * largest * size).ceil().clamp(min=1)
        first = (start * (size - length + 1)).floor()
        place = torch.arange(size, device=seeds.device)
        return (place >= first[:, None]) & (place < (first + length)[:, None])

    rows, columns = inside(u[:, 0], u[:, 2]), inside(u[:, 1], u[:, 3])
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()
