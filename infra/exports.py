"""Export folders: what one holds, and the digest of its files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

INDICES = "model_index.json, {genmodels,unclip,gan,prior,clip,damsm}.json or autoencoder config"


def export_kind(folder: str | os.PathLike[str]) -> str | None:
    """What an export folder holds: "text_to_image", "autoencoder", "clip", "damsm", "prior", or None without one."""
    folder = Path(folder)
    if any((folder / name).is_file() for name in ("model_index.json", "genmodels.json", "unclip.json", "gan.json")):
        return "text_to_image"
    if (folder / "prior.json").is_file():
        return "prior"
    for kind in ("clip", "damsm"):
        if (folder / f"{kind}.json").is_file():
            return kind
    if (folder / "config.json").is_file():
        content = json.loads((folder / "config.json").read_text())
        if content.get("_class_name") in ("AutoencoderKL", "VQModel"):
            return "autoencoder"
        if content.get("model_type") == "clip":  # of transformers
            return "clip"
    return None


def is_unclip(folder: str | os.PathLike[str]) -> bool:
    """Whether an export folder holds all stages of unCLIP."""
    return (Path(folder) / "unclip.json").is_file()


def is_gan(folder: str | os.PathLike[str]) -> bool:
    """Whether an export folder holds a GAN's generator."""
    return (Path(folder) / "gan.json").is_file()


def folder_digest(folder: str | os.PathLike[str]) -> str:
    """sha256 over the names and contents of all files of a folder, as hex digits."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()
