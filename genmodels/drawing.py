"""Opening a model that draws, whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genmodels.unclip.layout import INDEX

if TYPE_CHECKING:
    from genmodels.diffusion.pipeline import TextToImage
    from genmodels.unclip.pipeline import Unclip


def open_drawing_model(folder: Path, device: str = "cpu", precision: str = "fp32") -> TextToImage | Unclip:
    """A diffusion model, or all stages of unCLIP; see `TextToImage.from_folder` and `Unclip.from_folder`.

    Raises:
        ValueError: a part is missing or the precision unknown; the message names it.
    """
    if (Path(folder) / INDEX).is_file():
        from genmodels.unclip.pipeline import Unclip

        return Unclip.from_folder(Path(folder), device, precision)
    from genmodels.diffusion.pipeline import TextToImage

    return TextToImage.from_folder(folder, device, precision)
