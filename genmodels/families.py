"""The families of models that can be trained, by the `kind` that a configuration names.

A new family is its configuration and its case here. Its own module is imported when it is asked for: each brings
libraries that take seconds to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from genmodels.autoencoder.config import AutoencoderConfig
from genmodels.clip.config import ClipConfig
from genmodels.diffusion.config import LatentDiffusionConfig

if TYPE_CHECKING:
    from genmodels.objective import Objective

ObjectiveConfig = Annotated[AutoencoderConfig | ClipConfig | LatentDiffusionConfig, Field(discriminator="kind")]


def objective_class(kind: str) -> type[Objective]:
    """The class that trains configurations of this `kind`; KeyError where there is none."""
    match kind:
        case "autoencoder":
            from genmodels.autoencoder.objective import Autoencoder

            return Autoencoder
        case "clip":
            from genmodels.clip.objective import Clip

            return Clip
        case "latent_diffusion":
            from genmodels.diffusion.objective import LatentDiffusion

            return LatentDiffusion
    raise KeyError(kind)


def build_objective(config: Any, inputs: Path | None = None) -> Objective:
    """The objective of a configuration, with freshly initialised networks on the CPU.

    Args:
        config: of one of the classes in `ObjectiveConfig`.
        inputs: folder of what the objective needs from elsewhere (`autoencoder/`, `tokenizer/`, `text_encoder/`,
            `perceptual.safetensors`); None where it needs nothing.

    Raises:
        ValueError: an input is missing or does not fit the configuration; the message names it.
    """
    return objective_class(config.kind).from_config(config, inputs)
