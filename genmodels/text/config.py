"""The text side of a conditional model: a small CLIP text transformer trained along, or a pretrained frozen one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from genmodels.config import Attention, Section


class TrainedTextEncoder(Attention):
    """A CLIP text transformer trained along with the denoiser, with a tokenizer built from the captions."""

    kind: Literal["trained"] = "trained"
    width: int = Field(512, gt=0, description="features per token; a multiple of heads")
    layers: int = Field(6, gt=0, description="transformer layers")
    heads: int = Field(8, gt=0, description="attention heads per layer")
    length: int = Field(77, ge=4, description="tokens per caption, start and end included; longer ones are cut")
    vocab_size: int = Field(8192, ge=514, description="tokens in the vocabulary; 514 is bytes and markers alone")


class PretrainedTextEncoder(Section):
    """A pretrained CLIP text model or T5 encoder, frozen."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(
        description="folder or hub name of a CLIPTextModel or T5EncoderModel and its tokenizer (safetensors), "
        "models:/NAME of a CLIP trained here, or preset:NAME to train that first"
    )
    length: int | None = Field(
        None, ge=4, description="tokens per caption that a T5 reads, its end included; longer ones are cut [128]"
    )
    width: int = Field(768, gt=0, description="its features per token, for estimates while it is not at hand")


class NoTextEncoder(Section):
    """No condition: the model draws from noise alone."""

    kind: Literal["none"] = "none"


TextEncoderConfig = Annotated[TrainedTextEncoder | PretrainedTextEncoder | NoTextEncoder, Field(discriminator="kind")]
