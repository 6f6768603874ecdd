"""Text encoders: built afresh, or copied from a pretrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from genmodels.text.config import PretrainedTextEncoder, TrainedTextEncoder
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.text.tokenizer import save as save_tokenizer


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


TextEncoder: TypeAlias = "CLIPTextModel | T5EncoderModel"
T5_LENGTH = 128  # tokens per caption (Saharia et al., "Photorealistic Text-to-Image Diffusion Models …", 2022)


def open_text_encoder(folder: Path) -> TextEncoder:
    """The text encoder of a folder, of either kind. Raises OSError where there is none."""
    source: Any = T5EncoderModel if _is_t5(folder) else CLIPTextModel
    return source.from_pretrained(folder, use_safetensors=True, local_files_only=True)


def read_text(encoder: TextEncoder, token_ids: Tensor) -> dict[str, Tensor]:
    """What a frozen encoder makes of captions, int64 (batch, length): "text", features of each token (batch, length,
    width), and for a T5 "text_mask", bool (batch, length): a CLIP reads its own padding, and a T5 must not."""
    if not isinstance(encoder, T5EncoderModel):
        return {"text": encoder(token_ids).last_hidden_state}
    mask = token_ids != encoder.config.pad_token_id
    return {"text": encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state, "text_mask": mask}


def pooled_text(encoder: TextEncoder, token_ids: Tensor) -> Tensor:
    """One vector for each caption, (batch, width): a CLIP's at the end token, the mean of a T5's over its text."""
    if not isinstance(encoder, T5EncoderModel):
        return encoder(token_ids).pooler_output
    read = read_text(encoder, token_ids)
    mask = read["text_mask"][..., None].to(read["text"])
    return (read["text"] * mask).sum(1) / mask.sum(1).clamp(min=1)


def _is_t5(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("model_type") == "t5"


def fetch_pretrained(path: str, folder: Path, length: int | None = None) -> None:
    """Copy a pretrained text encoder and its tokenizer to `folder/text_encoder` and `folder/tokenizer`.

    Args:
        path: hub name, or a local folder: of a text model with its tokenizer, or a Stable Diffusion export.
        folder: where the copies go; weights are read and written as safetensors only.
        length: tokens per caption of a T5 [T5_LENGTH].
    """
    from transformers import AutoConfig

    if not (Path(path) / "text_encoder").is_dir() and AutoConfig.from_pretrained(path).model_type == "t5":
        encoder: Any = T5EncoderModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        encoder.save_pretrained(folder / "text_encoder")
        words = T5Tokenizer.from_pretrained(path, model_max_length=length or T5_LENGTH)
        save_tokenizer(words, folder / "tokenizer")
        return
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
    own = content.get("text_config", content)
    width = own.get("d_model" if content.get("model_type") == "t5" else "hidden_size")
    return config.width if width is None else int(width)  # the folder of a run has a config.json too
