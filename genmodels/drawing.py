"""Opening a model that draws, whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genmodels.gan.attention.layout import attends_to_words
from genmodels.gan.layout import INDEX as OF_GAN
from genmodels.gan.layout import told_image
from genmodels.unclip.layout import INDEX as OF_UNCLIP

if TYPE_CHECKING:
    from genmodels.diffusion.pipeline import TextToImage
    from genmodels.gan.pipeline import GanModel
    from genmodels.gan.translation import TranslationModel
    from genmodels.unclip.pipeline import Unclip

    DrawingModel = TextToImage | Unclip | GanModel | TranslationModel


def open_drawing_model(folder: Path, device: str = "cpu", precision: str = "fp32") -> DrawingModel:
    """A diffusion model, all stages of unCLIP, or a GAN of any kind; see their `from_folder`.

    Raises:
        ValueError: a part is missing or the precision unknown; the message names it.
    """
    if (Path(folder) / OF_GAN).is_file():
        if told_image(Path(folder)):
            from genmodels.gan.translation import TranslationModel

            return TranslationModel.from_folder(Path(folder), device, precision)
        if attends_to_words(Path(folder)):
            from genmodels.gan.attention.pipeline import AttnGanModel

            return AttnGanModel.from_folder(Path(folder), device, precision)
        from genmodels.gan.pipeline import GanModel

        return GanModel.from_folder(Path(folder), device, precision)
    if (Path(folder) / OF_UNCLIP).is_file():
        from genmodels.unclip.pipeline import Unclip

        return Unclip.from_folder(Path(folder), device, precision)
    from genmodels.diffusion.pipeline import TextToImage

    return TextToImage.from_folder(folder, device, precision)
