"""The two encoders as one module with one forward, so that one engine shards and updates them together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from genmodels.clip.config import ClipConfig, ConvolutionalImageEncoder, ImageEncoderConfig
from genmodels.text.encoder import build_text_encoder

_LARGEST_SCALE = 100.0  # Radford et al. 2021, section 2.5: more was unstable


class Embeddings(NamedTuple):
    """Unit vectors of images and texts, float32 (batch, embedding_dim) each, and the inverse temperature, a scalar."""

    images: Tensor
    texts: Tensor
    scale: Tensor


class EncoderPair(nn.Module):
    """Image and text encoder, their projections into one space, and the temperature."""

    def __init__(
        self, image_encoder: nn.Module, text_encoder: CLIPTextModel, text_projection: nn.Linear, log_scale: float
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.text_projection = text_projection
        self.log_scale = nn.Parameter(torch.full((1,), log_scale))

    def forward(self, images: Tensor, token_ids: Tensor) -> Embeddings:
        """Embed images, (batch, 3, height, width) in [-1, 1], and captions, int64 (batch, length)."""
        scale = self.log_scale.exp().clamp(max=_LARGEST_SCALE).squeeze()
        return Embeddings(self.embed_images(images), self.embed_texts(token_ids), scale)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors of images, (batch, 3, height, width) in [-1, 1]."""
        return nn.functional.normalize(self.image_encoder(images).float(), dim=1)

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """Unit vectors of captions, int64 (batch, length)."""
        return self.read_texts(token_ids)[1]

    def read_texts(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features of each token, (batch, length, width), and the captions' unit vectors (batch, embedding_dim)."""
        read = self.text_encoder(token_ids)
        pooled = read.pooler_output  # at the end token, (batch, width)
        return read.last_hidden_state.float(), nn.functional.normalize(self.text_projection(pooled).float(), dim=1)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the transformers' activations in the backward pass; those of convolutions are small."""
        self.text_encoder.gradient_checkpointing_enable()
        if isinstance(self.image_encoder, VisionTransformer):
            self.image_encoder.transformer.gradient_checkpointing_enable()


class VisionTransformer(nn.Module):
    """CLIP's vision transformer and its projection: (batch, 3, size, size) → (batch, embedding_dim)."""

    def __init__(self, transformer: CLIPVisionModel, projection: nn.Linear) -> None:
        super().__init__()
        self.transformer = transformer
        self.projection = projection

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.transformer(images).pooler_output)


def build_image_encoder(config: ImageEncoderConfig, image_size: int, embedding_dim: int) -> nn.Module:
    """(batch, 3, image_size, image_size) → (batch, embedding_dim)."""
    if isinstance(config, ConvolutionalImageEncoder):
        return _build_convolutions(config, image_size, embedding_dim)
    vision = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=image_size,
        patch_size=config.patch_size,
    )
    return VisionTransformer(CLIPVisionModel(vision), nn.Linear(config.width, embedding_dim, bias=False))


def _build_convolutions(config: ConvolutionalImageEncoder, image_size: int, embedding_dim: int) -> nn.Module:
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
    text_encoder = build_text_encoder(config.text_encoder, tokenizer)
    text_projection = nn.Linear(config.text_encoder.width, config.embedding_dim, bias=False)
    return EncoderPair(image_encoder, text_encoder, text_projection, -math.log(config.temperature))


def to_transformers(pair: EncoderPair) -> CLIPModel:
    """The same encoders as transformers' own model. Raises ValueError where the image side is no vision transformer."""
    image = pair.image_encoder
    if not isinstance(image, VisionTransformer):
        raise ValueError("transformers has no CLIP whose image side is convolutional")
    config = CLIPConfig(
        text_config=pair.text_encoder.config.to_dict(),
        vision_config=image.transformer.config.to_dict(),
        projection_dim=pair.text_projection.out_features,
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    state = {f"text_model.{key}": value for key, value in pair.text_encoder.state_dict().items()}
    state |= {f"vision_model.{key}": value for key, value in image.transformer.state_dict().items()}
    state |= {
        "visual_projection.weight": image.projection.weight,
        "text_projection.weight": pair.text_projection.weight,
    }
    state["logit_scale"] = pair.log_scale.detach().squeeze()
    model.load_state_dict(state, strict=False, assign=True)  # position ids are no weights
    return model


def from_transformers(model: CLIPModel) -> EncoderPair:
    """A CLIP of transformers as a pair of encoders, which share its weights."""
    image_encoder = VisionTransformer(model.vision_model, model.visual_projection)
    return EncoderPair(image_encoder, model.text_model, model.text_projection, float(model.logit_scale))
