"""The text side of a conditional model: a small CLIP text transformer trained along, or a pretrained frozen one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from genmodels.config import Section
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.text.tokenizer import save as save_tokenizer


class TrainedTextEncoder(Section):
    """A CLIP text transformer trained along with the denoiser, with a tokenizer built from the captions."""

    kind: Literal["trained"] = "trained"
    width: int = Field(512, gt=0, description="features per token; a multiple of heads")
    layers: int = Field(6, gt=0, description="transformer layers")
    heads: int = Field(8, gt=0, description="attention heads per layer")
    length: int = Field(77, ge=4, description="tokens per caption, start and end included; longer ones are cut")
    vocab_size: int = Field(8192, ge=514, description="tokens in the vocabulary; 514 is bytes and markers alone")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TrainedTextEncoder:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class PretrainedTextEncoder(Section):
    """A pretrained CLIP text model, frozen."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(
        description="folder or hub name of a CLIPTextModel and its tokenizer (safetensors), models:/NAME of a CLIP "
        "trained here, or preset:NAME to train that first"
    )
    width: int = Field(768, gt=0, description="its features per token, for estimates while it is not at hand")


class NoTextEncoder(Section):
    """No condition: the model draws from noise alone."""

    kind: Literal["none"] = "none"


TextEncoderConfig = Annotated[TrainedTextEncoder | PretrainedTextEncoder | NoTextEncoder, Field(discriminator="kind")]


def build_text_encoder(config: TrainedTextEncoder, tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """A freshly initialised text transformer; its start and end tokens are those of `tokenizer`.

    Raises:
        ValueError: the tokenizer has more tokens than the embedding, or another length.
    """
    if tokenizer is not None:
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens, text_encoder.vocab_size is {config.vocab_size}")
        if tokenizer.model_max_length != config.length:
            raise ValueError(
                f"tokenizer gives {tokenizer.model_max_length} tokens, text_encoder.length is {config.length}"
            )
    bos, eos = (0, 1) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.length,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def fetch_pretrained(path: str, folder: Path) -> None:
    """Copy a pretrained text encoder and its tokenizer to `folder/text_encoder` and `folder/tokenizer`.

    Args:
        path: hub name, or a local folder: of a text model with its tokenizer, or a Stable Diffusion export.
        folder: where the copies go; weights are read and written as safetensors only.
    """
    parts = (Path(path) / "text_encoder").is_dir()
    encoder_source, tokenizer_source = (f"{path}/text_encoder", f"{path}/tokenizer") if parts else (path, path)
    CLIPTextModel.from_pretrained(encoder_source, use_safetensors=True).save_pretrained(folder / "text_encoder")
    if Path(tokenizer_source).is_dir():
        tokenizer = load_tokenizer(Path(tokenizer_source))
    else:
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_source)
    save_tokenizer(tokenizer, folder / "tokenizer")


def pretrained_width(config: PretrainedTextEncoder) -> int:
    """Features per token of a pretrained text model: from its folder, or what the config says while there is none."""
    file = Path(config.path) / "config.json"
    if not file.is_file():
        return config.width
    content = json.loads(file.read_text())
    return int(content.get("text_config", content)["hidden_size"])
