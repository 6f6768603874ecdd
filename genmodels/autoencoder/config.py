"""What an autoencoder is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genmodels.config import Section, check_groups


class DiscriminatorConfig(Section):
    """A patch discriminator, trained by a second phase that starts late."""

    start_step: int = Field(50_000, ge=0, description="first step at which it is trained and judges reconstructions")
    weight: float = Field(0.05, gt=0, description="of the adversarial term, beside errors averaged over pixels")
    channels: int = Field(64, gt=0, multiple_of=4, description="features after its first convolution")
    layers: int = Field(3, gt=0, description="further convolutions; 3 give patches of 70 by 70 pixels")
    adaptive: bool = Field(
        False, description="times the ratio of both terms' gradients at the last layer, as latent diffusion has it"
    )


class KlRegulariser(Section):
    """Latents are drawn from a posterior that is kept near the standard normal."""

    kind: Literal["kl"] = "kl"
    weight: float = Field(1e-6, ge=0, description="of the KL divergence in nats, beside errors summed over pixels")


class VqRegulariser(Section):
    """Latents are rounded to a codebook on their way into the decoder."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(8192, gt=1, description="codes")
    commitment_weight: float = Field(0.25, ge=0, description="of the squared distance of latents to their codes")
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="share of a code's old mean kept at each step")
    revive_below: float = Field(
        0.03, ge=0, lt=1, description="a code used less than this share of an even use is put on a latent of the batch"
    )


class AutoencoderConfig(Section):
    """An autoencoder: diffusers' AutoencoderKL, or VQModel."""

    kind: Literal["autoencoder"] = "autoencoder"
    image_size: int = Field(256, gt=0, description="height and width in pixels")
    channels: list[int] = Field(
        [128, 256, 512], min_length=1, description="per resolution; three entries reduce by 4 (f4), four by 8 (f8)"
    )
    latent_channels: int = Field(4, gt=0, description="channels of the latents")
    layers_per_block: int = Field(2, gt=0, description="residual blocks per resolution")
    norm_groups: int = Field(32, gt=0, description="groups of the normalisation; divides every entry of channels")
    reconstruction: Literal["l1", "l2"] = Field("l1", description="error per pixel: absolute (l1) or squared (l2)")
    regulariser: Annotated[KlRegulariser | VqRegulariser, Field(discriminator="kind")] = Field(
        KlRegulariser(), description="kind kl or vq"
    )
    perceptual: str | None = Field(None, description="local safetensors file of LPIPS weights (VGG-16); null is none")
    perceptual_weight: float = Field(1.0, ge=0, description="of the perceptual distance, where there is one")
    discriminator: DiscriminatorConfig | None = Field(None, description="patch discriminator; null is none")

    @model_validator(mode="after")
    def _fits(self) -> AutoencoderConfig:
        check_groups(self.channels, self.norm_groups)
        if self.image_size % self.factor:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.factor} (from channels)")
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.channels) - 1)
