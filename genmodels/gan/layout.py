"""What an export folder of a GAN is made of, read without any model library."""

from __future__ import annotations

import json
from pathlib import Path

INDEX = "gan.json"  # marks the folder
GENERATOR, DISCRIMINATOR = "generator.safetensors", "discriminator.safetensors"


def told_image(folder: Path) -> bool:
    """Whether it makes an image of another."""
    return json.loads((folder / INDEX).read_text()).get("image_condition") is not None


def is_unpaired(folder: Path) -> bool:
    """Whether it turns images of either of two sets into the other's."""
    return json.loads((folder / INDEX).read_text())["config"]["kind"] == "cycle_gan"
