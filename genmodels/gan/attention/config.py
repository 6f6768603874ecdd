"""AttnGAN's two trainings: what matches images with words, and the GAN that is told the words.

Xu et al., "AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial Networks" (CVPR
2018).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genmodels.config import Section, check_groups
from genmodels.gan.config import START, Penalties


class RecurrentTextEncoder(Section):
    """A bidirectional LSTM over the tokens of a caption, with a tokenizer built from the captions (section 3.2)."""

    kind: Literal["recurrent"] = "recurrent"
    width: int = Field(256, gt=0, description="features of a token before the LSTM reads it")
    length: int = Field(24, ge=4, description="tokens per caption, start and end included; longer ones are cut")
    vocab_size: int = Field(8192, ge=514, description="tokens in the vocabulary; 514 is bytes and markers alone")


class RegionEncoder(Section):
    """Convolutions from an image to features of its regions, and from those to features of the whole."""

    channels: list[int] = Field([32, 64, 128], min_length=1, description="features after each halving of the image")
    depth: int = Field(2, gt=0, description="convolutions at each resolution")
    regions_after: int = Field(2, gt=0, description="halvings: of 32 pixels 2 leave 8×8 regions")
    norm_groups: int = Field(8, gt=0, description="groups of the normalisation; divides every entry of channels")

    @model_validator(mode="after")
    def _fits(self) -> RegionEncoder:
        check_groups(self.channels, self.norm_groups)
        if self.regions_after > len(self.channels):
            raise ValueError(f"regions_after {self.regions_after}: there are {len(self.channels)} halvings (channels)")
        return self


class DamsmConfig(Section):
    """The deep attentional multimodal similarity model: how well an image matches each word, and the sentence."""

    kind: Literal["damsm"] = "damsm"
    image_size: int = Field(256, gt=0, description="height and width in pixels")
    image_encoder: RegionEncoder = RegionEncoder()
    text_encoder: RecurrentTextEncoder = RecurrentTextEncoder()
    embedding_dim: int = Field(256, gt=0, multiple_of=2, description="features of regions, words, images, sentences")
    gamma1: float = Field(5.0, gt=0, description="how much a word looks at the regions that match it (eq. 9)")
    gamma2: float = Field(5.0, gt=0, description="how much the word that matches best counts (eq. 10)")
    gamma3: float = Field(10.0, gt=0, description="of the softmax over the batch (eq. 11)")

    @property
    def conditional(self) -> bool:
        """Whether captions are read: always."""
        return True

    @property
    def couples_samples(self) -> bool:
        """Whether the loss mixes the samples of a batch, which accumulation would change: always."""
        return True

    @model_validator(mode="after")
    def _size_divides(self) -> DamsmConfig:
        factor = 2 ** len(self.image_encoder.channels)
        if self.image_size % factor:
            raise ValueError(f"image_size {self.image_size} is no multiple of {factor} (from image_encoder.channels)")
        return self


class AttnGanConfig(Section):
    """A GAN that draws coarse to fine; at each finer stage every place looks at the words that concern it."""

    kind: Literal["attn_gan"] = "attn_gan"
    image_size: int = Field(256, gt=0, description="height and width of the last stage in pixels: 16, 32, … 1024")
    stages: int = Field(3, ge=2, description="pictures, each twice as large as the one before")
    damsm: str = Field(
        description="folder, checkpoint, models:/NAME or preset:NAME of a trained DAMSM, which reads the captions"
    )
    damsm_dim: int = Field(256, gt=0, description="its embedding_dim, for estimates while it is not at hand")
    damsm_weight: float = Field(5.0, ge=0, description="λ, of how well the DAMSM matches the last picture (eq. 3)")
    latent_dim: int = Field(100, gt=0, description="numbers that a picture is drawn from, beside its caption")
    condition_dim: int = Field(100, gt=0, description="features of a sentence, for the generator drawn around its own")
    kl_weight: float = Field(0.01, ge=0, description="of the divergence of what is drawn there from a normal")
    channels: int = Field(32, gt=0, description="of the generator at each stage; doubled at each coarser resolution")
    residual_blocks: int = Field(2, gt=0, description="between the words of a stage and its picture")
    discriminator_channels: int = Field(64, gt=0, description="at its stage's resolution, doubled at each coarser one")
    largest: int = Field(512, gt=0, description="channels at most")
    matching_aware: bool = Field(
        True, description="real images with another sample's caption are a third kind of input (Reed et al. 2016)"
    )
    penalties: Penalties = Penalties()
    preview_samples: int = Field(16, gt=0, description="samples in a grid, at most")

    @model_validator(mode="after")
    def _fits(self) -> AttnGanConfig:
        first = self.image_size // 2 ** (self.stages - 1)
        if first <= START or START * 2 ** (self.image_size // START).bit_length() != 2 * self.image_size:
            raise ValueError(
                f"image_size {self.image_size} with {self.stages} stages: the first has to be {START} doubled, so use "
                f"{', '.join(str(2 * START * 2 ** (self.stages - 1 + more)) for more in range(3))}, …"
            )
        return self

    @property
    def couples_samples(self) -> bool:
        """Whether a loss mixes the samples of a batch, which accumulation would change."""
        return self.damsm_weight > 0

    @property
    def sizes(self) -> list[int]:
        """Height and width of each stage's picture."""
        return [self.image_size // 2**finer for finer in reversed(range(self.stages))]

    @property
    def conditional(self) -> bool:
        """Whether captions are read: always."""
        return True
