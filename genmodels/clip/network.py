"""The two encoders as one module with one forward, so that one engine shards and updates them together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from genmodels.clip.config import ClipConfig, ConvolutionalImageEncoder
from genmodels.text.encoder import build_text_encoder

_LARGEST_SCALE = 100.0  # Radford et al. 2021, section 2.5: more was unstable


class Embeddings(NamedTuple):
    """Unit vectors of images and texts, float32 (batch, embedding_dim) each, and the inverse temperature, a scalar."""

    images: Tensor
    texts: Tensor
    scale: Tensor


class EncoderPair(nn.Module):
    """Image and text encoder, their projections into one space, and the temperature."""

    def __init__(self, image_encoder: nn.Module, text_encoder: CLIPTextModel, config: ClipConfig) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(config.text_encoder.width, config.embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(config.temperature)))

    def forward(self, images: Tensor, token_ids: Tensor) -> Embeddings:
        """Embed images, (batch, 3, height, width) in [-1, 1], and captions, int64 (batch, length)."""
        return Embeddings(
            nn.functional.normalize(self.image_encoder(images).float(), dim=1),
            self.embed_texts(token_ids),
            self.log_scale.exp().clamp(max=_LARGEST_SCALE).squeeze(),
        )

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """Unit vectors of captions, int64 (batch, length)."""
        pooled = self.text_encoder(token_ids).pooler_output  # at the end token, (batch, width)
        return nn.functional.normalize(self.text_projection(pooled).float(), dim=1)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the text encoder's activations in the backward pass; the image encoder's are small."""
        self.text_encoder.gradient_checkpointing_enable()


def build_image_encoder(config: ConvolutionalImageEncoder, image_size: int, embedding_dim: int) -> nn.Module:
    """(batch, 3, image_size, image_size) → (batch, embedding_dim)."""
    layers: list[nn.Module] = []
    previous = 3
    for channels in config.channels:
        layers += [nn.Conv2d(previous, channels, 3, 2, 1), nn.GroupNorm(config.norm_groups, channels), nn.SiLU()]
        previous = channels
    left = image_size // 2 ** len(config.channels)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(previous * left * left, embedding_dim))


def build_pair(config: ClipConfig, tokenizer: CLIPTokenizer | None = None) -> EncoderPair:
    """Freshly initialised encoders. Raises ValueError where the tokenizer does not fit the text encoder."""
    image_encoder = build_image_encoder(config.image_encoder, config.image_size, config.embedding_dim)
    return EncoderPair(image_encoder, build_text_encoder(config.text_encoder, tokenizer), config)
