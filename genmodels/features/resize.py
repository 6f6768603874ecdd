"""Resizing that does not alias, as Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
CVPR 2022, ask for: bicubic with Pillow's antialiasing, each channel in float32, without rounding."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize(pictures: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
    """Pictures of another size.

    Args:
        pictures: uint8 (n, height, width, 3).
        height, width: of the result; a square without `width`.

    Returns:
        float32 (n, height, width, 3) in [0, 255].

    Raises:
        ValueError: another type or shape.
    """
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"pictures must be uint8 (n, height, width, 3), not {pictures.dtype} {pictures.shape}")
    width = width or height
    if pictures.shape[1:3] == (height, width):
        return pictures.astype(np.float32)
    resized = np.empty((len(pictures), height, width, 3), np.float32)
    for picture, target in zip(pictures.astype(np.float32), resized):
        for channel in range(3):
            image = Image.fromarray(np.ascontiguousarray(picture[..., channel]))
            target[..., channel] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return resized.clip(0.0, 255.0, out=resized)
