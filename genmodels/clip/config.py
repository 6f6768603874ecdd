"""What a pair of contrastively trained encoders is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genmodels.config import Attention, Section, check_groups
from genmodels.text.config import TrainedTextEncoder


class ConvolutionalImageEncoder(Section):
    """Convolutions of stride 2, then one linear layer over what is left: for small images."""

    kind: Literal["convolutional"] = "convolutional"
    channels: list[int] = Field([32, 64, 128], min_length=1, description="features after each halving of the image")
    norm_groups: int = Field(8, gt=0, description="groups of the normalisation; divides every entry of channels")

    @model_validator(mode="after")
    def _groups_divide(self) -> ConvolutionalImageEncoder:
        check_groups(self.channels, self.norm_groups)
        return self


class TransformerImageEncoder(Attention):
    """CLIP's vision transformer (Radford et al. 2021, section 2.4); the defaults are ViT-B/32."""

    kind: Literal["transformer"] = "transformer"
    patch_size: int = Field(32, gt=0, description="side of a patch in pixels; divides image_size")
    width: int = Field(768, gt=0, description="features per token; a multiple of heads")
    layers: int = Field(12, gt=0, description="transformer layers")
    heads: int = Field(12, gt=0, description="attention heads per layer")


ImageEncoderConfig = ConvolutionalImageEncoder | TransformerImageEncoder


class ZeroShotConfig(Section):
    """Classification by sentences alone, measured at each validation (Radford et al. 2021, section 3.1)."""

    label: str = Field(description="shard member with the class of a sample: cls, or json:KEY")
    classes: dict[str, str] = Field(min_length=2, description="what a sentence calls each label")
    templates: list[str] = Field(
        ["a photo of a {}"], min_length=1, description="sentences with {} for the class; their embeddings are averaged"
    )

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> ZeroShotConfig:
        for template in self.templates:
            if template.count("{}") != 1 or template.count("{") != 1:
                raise ValueError(f"template {template!r} needs one {{}}, where the class is put")
        return self


class ClipConfig(Section):
    """An image and a text encoder with one space of embeddings (Radford et al. 2021)."""

    kind: Literal["clip"] = "clip"
    image_size: int = Field(224, gt=0, description="height and width in pixels")
    image_encoder: Annotated[ImageEncoderConfig, Field(discriminator="kind")] = Field(
        ConvolutionalImageEncoder(),
        description="kind convolutional, or transformer: what transformers' CLIPModel opens",
    )
    text_encoder: TrainedTextEncoder = Field(TrainedTextEncoder(), description="the text side, kind trained")
    embedding_dim: int = Field(512, gt=0, description="features of the shared embeddings")
    temperature: float = Field(0.07, gt=0, description="of the softmax at the start; it is learnt, and at least 0.01")

    zero_shot: ZeroShotConfig | None = Field(
        None, description="classify held-out images by sentences; null: retrieval alone is measured"
    )

    @property
    def label(self) -> str | None:
        """Where the samples' labels are read, if they are."""
        return None if self.zero_shot is None else self.zero_shot.label

    @property
    def conditional(self) -> bool:
        """Whether captions are read: always."""
        return True

    @model_validator(mode="after")
    def _size_divides(self) -> ClipConfig:
        side = self.image_encoder
        if isinstance(side, TransformerImageEncoder):
            factor, origin = side.patch_size, "image_encoder.patch_size"
        else:
            factor, origin = 2 ** len(side.channels), "image_encoder.channels"
        if self.image_size % factor:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {factor} (from {origin})")
        return self
