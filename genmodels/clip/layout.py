"""What the folder of a CLIP says of itself, read without any model library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FACTS = "clip.json"  # marks an export of this project


class ClipSizes(NamedTuple):
    """Height and width that the image side sees, in pixels, and features of the embeddings."""

    image_size: int
    embedding_dim: int


def is_transformers_clip(folder: Path) -> bool:
    """Whether a folder holds a CLIPModel as transformers saves it."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("model_type") == "clip"


def clip_sizes(folder: Path) -> ClipSizes:
    """The sizes of a CLIP of this project or of transformers. Raises ValueError where the folder holds none."""
    if (folder / FACTS).is_file():
        own = json.loads((folder / FACTS).read_text())
        return ClipSizes(own["image_size"], own["embedding_dim"])
    if not is_transformers_clip(folder):
        raise ValueError(f"{folder} holds no CLIP (no {FACTS}, and no config.json of a CLIPModel)")
    content = json.loads((folder / "config.json").read_text())
    return ClipSizes(content["vision_config"].get("image_size", 224), content.get("projection_dim", 512))
