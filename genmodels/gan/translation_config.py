"""What models are made of that turn one image into another."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genmodels.config import Section
from genmodels.diffusion.config import MemberCondition
from genmodels.gan.config import START
from genmodels.gan.losses import LossName


class PatchConfig(Section):
    """A score for each overlapping patch (Isola et al. 2017, section 3.2.2)."""

    channels: int = Field(64, ge=2, description="after the first layer, doubled at each of the next three")
    layers: int = Field(3, gt=0, description="halvings: 3 is a patch of 70×70 pixels, 2 of 34×34, 1 of 16×16")


class Pix2PixConfig(Section):
    """From one image to another, learnt from samples that hold both (Isola et al. 2017)."""

    kind: Literal["pix2pix"] = "pix2pix"
    image_size: int = Field(256, gt=0, description="height and width in pixels: 8, 16, 32, …")
    image_condition: MemberCondition = Field(
        MemberCondition(), description="the image that is given: kind member; the sample's image is what is made of it"
    )
    channels: int = Field(64, gt=0, description="of the U-Net at the finest resolution, doubled at each coarser one")
    largest: int = Field(512, gt=0, description="channels at most")
    halvings: int | None = Field(None, gt=0, description="of the image in the U-Net [down to 4 pixels a side]")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of its coarse features dropped, by each sample's seed")
    discriminator: PatchConfig = PatchConfig()
    loss: LossName = Field("non_saturating", description="the game")
    l1_weight: float = Field(100.0, ge=0, description="of the mean distance from the sample's own image")
    preview_samples: int = Field(8, gt=0, description="samples in a grid, at most")

    @model_validator(mode="after")
    def _fits(self) -> Pix2PixConfig:
        if self.image_size % 2**self.depth:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {2**self.depth} (from halvings)")
        check_patches(self.image_size, self.discriminator)
        if self.image_condition.dropout:
            raise ValueError("image_condition.dropout: the given image is all there is to go by")
        return self

    @property
    def depth(self) -> int:
        """Halvings of the image."""
        return self.halvings or max(1, (self.image_size // START).bit_length() - 1)


class CycleGanConfig(Section):
    """Between two sets of images, A and B, of which none belong together (Zhu et al. 2017)."""

    kind: Literal["cycle_gan"] = "cycle_gan"
    image_size: int = Field(256, gt=0, description="height and width in pixels")
    channels: int = Field(64, gt=0, description="of the generators at the finest resolution, doubled at each halving")
    halvings: int = Field(2, gt=0, description="of the image in the generators")
    blocks: int = Field(9, gt=0, description="residual blocks at their coarsest resolution; 6 for 128 pixels")
    discriminator: PatchConfig = PatchConfig()
    loss: LossName = Field("least_squares", description="the game")
    cycle_weight: float = Field(10.0, ge=0, description="of the mean distance of an image from what comes back")
    identity_weight: float = Field(
        5.0, ge=0, description="of the mean distance of an image from what is made of it as if it were of the other set"
    )
    pool_size: int = Field(
        50, ge=0, description="images made before, which a discriminator is shown half of the time (Shrivastava 2017)"
    )
    preview_samples: int = Field(8, gt=0, description="samples in a grid, at most")

    @model_validator(mode="after")
    def _fits(self) -> CycleGanConfig:
        if self.image_size % 2**self.halvings or self.image_size < 2 ** (self.halvings + 2):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {2**self.halvings} with {START} pixels left (from "
                "halvings)"
            )
        check_patches(self.image_size, self.discriminator)
        return self

    @property
    def unpaired(self) -> bool:
        """Whether it learns from two sets: those of data.url (A) and of data.other_url (B)."""
        return True


def check_patches(image_size: int, patches: PatchConfig) -> None:
    """Raises ValueError where a discriminator of patches has no image left to score."""
    if image_size < 2 ** (patches.layers + 2):
        raise ValueError(f"discriminator.layers={patches.layers} leaves nothing of {image_size} pixels: less")
