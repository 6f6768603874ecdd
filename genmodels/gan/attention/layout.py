"""What the export folders of a DAMSM and of an AttnGAN say of themselves, read without any model library."""

from __future__ import annotations

import json
from pathlib import Path

from genmodels.gan.layout import INDEX

DAMSM = "damsm.json"  # marks the folder of a DAMSM
ENCODERS = "damsm.safetensors"


def attends_to_words(folder: Path) -> bool:
    """Whether the export of a GAN is an AttnGAN's."""
    return json.loads((folder / INDEX).read_text())["config"].get("kind") == "attn_gan"
