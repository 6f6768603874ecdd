"""The families of models that can be trained, by the `kind` that a configuration names.

A new family is its configuration and its case here. Its own module is imported when it is asked for: each brings
libraries that take seconds to import.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from genmodels.autoencoder.config import AutoencoderConfig
from genmodels.clip.config import ClipConfig
from genmodels.config import Section
from genmodels.diffusion.config import LatentDiffusionConfig
from genmodels.gan.attention.config import AttnGanConfig, DamsmConfig
from genmodels.gan.config import GanConfig
from genmodels.gan.translation_config import CycleGanConfig, Pix2PixConfig
from genmodels.unclip.config import AutoregressivePriorConfig, DiffusionPriorConfig

if TYPE_CHECKING:
    from genmodels.objective import Objective

_Alone = (
    AutoencoderConfig
    | ClipConfig
    | LatentDiffusionConfig
    | DiffusionPriorConfig
    | AutoregressivePriorConfig
    | GanConfig
    | Pix2PixConfig
    | CycleGanConfig
    | DamsmConfig
    | AttnGanConfig
)
MemberConfig = Annotated[_Alone, Field(discriminator="kind")]


_TAKEN = ("init", "tokenizer", "clip", "damsm", "complete")  # what else is among the inputs of a run


class SideBySideConfig(Section):
    """Several models that are trained on the same batches, to be compared: one start, one stream of data."""

    kind: Literal["side_by_side"] = "side_by_side"
    members: dict[str, MemberConfig] = Field(min_length=1, description="objective by name; all of one image_size")

    @model_validator(mode="after")
    def _fits(self) -> SideBySideConfig:
        sizes = {name: member.image_size for name, member in self.members.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"members see the same images, so image_size must be the same: {sizes}")
        for name in self.members:
            if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name in _TAKEN:
                raise ValueError(f"{name!r} cannot name a member: use letters, digits, _ and -, and none of {_TAKEN}")
        told = [getattr(member, "image_condition", None) for member in self.members.values()]
        images = {condition.member for condition in told if condition is not None and condition.kind == "member"}
        if len(images) > 1:
            raise ValueError(f"members are told the same image of a sample, not {', '.join(sorted(images))}")
        labels = {getattr(member, "label", None) for member in self.members.values()} - {None}
        if len(labels) > 1:
            raise ValueError(f"members read the same label of a sample, not {', '.join(sorted(map(str, labels)))}")
        unpaired = {getattr(member, "unpaired", False) for member in self.members.values()}
        if len(unpaired) > 1:
            raise ValueError("members that learn from two sets are beside one another, and not beside those of one")
        return self

    @property
    def unpaired(self) -> bool:
        """Whether the members learn from two sets."""
        return any(getattr(member, "unpaired", False) for member in self.members.values())

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return next(iter(self.members.values())).image_size

    @property
    def conditional(self) -> bool:
        """Whether a member reads captions."""
        return any(getattr(member, "conditional", False) for member in self.members.values())


ObjectiveConfig = Annotated[_Alone | SideBySideConfig, Field(discriminator="kind")]


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
        case "diffusion_prior":
            from genmodels.unclip.diffusion_prior import DiffusionPrior

            return DiffusionPrior
        case "autoregressive_prior":
            from genmodels.unclip.autoregressive_prior import AutoregressivePrior

            return AutoregressivePrior
        case "gan":
            from genmodels.gan.objective import Gan

            return Gan
        case "pix2pix":
            from genmodels.gan.pix2pix import Pix2Pix

            return Pix2Pix
        case "cycle_gan":
            from genmodels.gan.cycle import CycleGan

            return CycleGan
        case "damsm":
            from genmodels.gan.attention.damsm import Damsm

            return Damsm
        case "attn_gan":
            from genmodels.gan.attention.objective import AttnGan

            return AttnGan
        case "side_by_side":
            from genmodels.side_by_side import SideBySide

            return SideBySide
    raise KeyError(kind)


def members_of(config: Any) -> dict[str, Any]:
    """The members of a `SideBySideConfig` by name; any other configuration is the only member, named ""."""
    return dict(config.members) if isinstance(config, SideBySideConfig) else {"": config}


def build_objective(config: Any, inputs: Path | None = None) -> Objective:
    """The objective of a configuration, with freshly initialised networks on the CPU.

    Args:
        config: of one of the classes in `ObjectiveConfig`.
        inputs: folder of what the objective needs from elsewhere (`autoencoder/`, `tokenizer/`, `text_encoder/`,
            `clip/`, `damsm/`, `perceptual.safetensors`); None where it needs nothing.

    Raises:
        ValueError: an input is missing or does not fit the configuration; the message names it.
    """
    return objective_class(config.kind).from_config(config, inputs)
