"""What an export folder of a diffusion model says of itself, read without any model library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OWN_INDEX = "genmodels.json"


def class_names(folder: Path) -> list[str] | None:
    """The classes that a model was trained on, by label; None where it has none."""
    for name, key in ((OWN_INDEX, "classes"), ("gan.json", "classes"), ("model_index.json", "id2label")):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get(key)
            if isinstance(found, dict):  # diffusers' DiTPipeline
                found = [found[label] for label in sorted(found, key=int)]
            if found:
                return list(found)
    return None


def own_index(folder: Path) -> dict[str, Any]:
    """What an export in our own layout says of itself; empty for any other."""
    index = folder / OWN_INDEX
    return dict(json.loads(index.read_text())) if index.is_file() else {}


def image_condition(folder: Path) -> dict[str, Any] | None:
    """The configuration of the image that the model is told; None where it is told none."""
    of_gan = folder / "gan.json"
    index = json.loads(of_gan.read_text()) if of_gan.is_file() else own_index(folder)
    return index.get("image_condition")


def takes_prompts(folder: Path) -> bool:
    """Whether the model draws from prompts: texts, or names of its classes; all stages of unCLIP together do."""
    if (folder / "unclip.json").is_file():
        return True
    return (folder / "tokenizer").is_dir() or class_names(folder) is not None
