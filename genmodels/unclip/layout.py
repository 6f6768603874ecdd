"""What a joined unCLIP says of itself, read without any model library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "unclip.json"  # marks the folder
_PRESERVING = ("ddpm", "ddim", "dpm_solver++")  # the others keep pictures on another scale while they are noisy
FACTS = "prior.json"  # marks the export of a prior, and says which CLIP it belongs to


class PartsDoNotFit(ValueError):
    """Stages that were trained on different CLIPs, or with other sizes; the message has both values."""


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a joined unCLIP. Raises ValueError where it is none."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no unCLIP (no {INDEX} there)")
    return dict(json.loads((folder / INDEX).read_text()))


def check_augmentation(name: str, first: bool, trained: float, drawing: Mapping[str, Any]) -> None:
    """Raise ValueError where an upsampler is to be told noise that it never saw.

    Args:
        name: of the upsampler.
        first: whether it follows the decoder.
        trained: the largest level of its training, image_condition.augmentation.
        drawing: its augmentation_level and augmentation.
    """
    level, truncated = drawing.get("augmentation_level", 0.0), drawing.get("augmentation") == "truncated"
    if level > trained:
        raise ValueError(
            f"{name}: augmentation_level {level:g} is more than it was trained with, image_condition.augmentation "
            f"{trained:g}: lower it, or train the upsampler with more"
        )
    if truncated and not first:
        raise ValueError(f"{name}: truncated augmentation is of the first upsampler, which the decoder hands on to")
    if truncated and not level:
        raise ValueError(f"{name}: truncated augmentation needs an augmentation_level above 0, where the decoder ends")


def check_truncation(diffuses_pixels: bool, sampler: str) -> None:
    """Raise ValueError where a decoder cannot hand on its picture before it is finished.

    Args:
        diffuses_pixels: whether it does, by a diffusion schedule: no latents, no flow.
        sampler: its name.
    """
    if not diffuses_pixels:
        raise ValueError("truncated augmentation needs a decoder that diffuses pixels by a diffusion schedule")
    if sampler not in _PRESERVING:
        raise ValueError(f"truncated augmentation takes sampler {', '.join(_PRESERVING)}, and not {sampler}")


def check_same_clip(named: dict[str, dict[str, Any]]) -> None:
    """Raise PartsDoNotFit where stages, by name, were trained on different CLIPs: digest, width or statistics."""
    (first, known), *others = named.items()
    for name, other in others:
        for key in ("embedding_dim", "digest", "statistics"):
            if known.get(key) != other.get(key):
                raise PartsDoNotFit(
                    f"{first} and {name} belong to different CLIPs: {key} is {known.get(key)} of {first} and "
                    f"{other.get(key)} of {name}; train both on the same"
                )
