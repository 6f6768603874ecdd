"""The families of models that can be trained, by the `kind` that a configuration names. A new family is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from genmodels.autoencoder.objective import Autoencoder, AutoencoderConfig
from genmodels.clip.config import ClipConfig
from genmodels.clip.objective import Clip
from genmodels.diffusion.config import LatentDiffusionConfig
from genmodels.diffusion.objective import LatentDiffusion
from genmodels.objective import Objective

OBJECTIVES: dict[str, tuple[type, type[Objective]]] = {
    "autoencoder": (AutoencoderConfig, Autoencoder),
    "clip": (ClipConfig, Clip),
    "latent_diffusion": (LatentDiffusionConfig, LatentDiffusion),
}

ObjectiveConfig = Annotated[AutoencoderConfig | ClipConfig | LatentDiffusionConfig, Field(discriminator="kind")]


def build_objective(config: Any, inputs: Path | None = None) -> Objective:
    """The objective of a configuration, with freshly initialised networks on the CPU.

    Args:
        config: one of the classes in `OBJECTIVES`.
        inputs: folder of what the objective needs from elsewhere (`autoencoder/`, `tokenizer/`, `text_encoder/`,
            `perceptual.safetensors`); None where it needs nothing.

    Raises:
        ValueError: an input is missing or does not fit the configuration; the message names it.
    """
    _, objective = OBJECTIVES[config.kind]
    return objective.from_config(config, inputs)  # type: ignore[attr-defined,no-any-return]
