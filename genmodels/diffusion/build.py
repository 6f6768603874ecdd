"""The denoiser of a configuration, as it fits the frozen networks beside it."""

from __future__ import annotations

from typing import Literal

from transformers import CLIPTokenizer

from genmodels.autoencoder.codec import LatentCodec
from genmodels.clip.frozen import FrozenClip
from genmodels.diffusion import lora
from genmodels.diffusion.config import LatentDiffusionConfig, UNetConfig
from genmodels.diffusion.image_condition import condition_channels
from genmodels.diffusion.network import ConditionalDenoiser, ImageProjection, build_backbone
from genmodels.text.config import PretrainedTextEncoder, TrainedTextEncoder
from genmodels.text.encoder import TextEncoder, build_text_encoder, pretrained_width


def build_denoiser(
    config: LatentDiffusionConfig,
    autoencoder: LatentCodec | None = None,
    frozen_text: TextEncoder | None = None,
    tokenizer: CLIPTokenizer | None = None,
    clip: FrozenClip | None = None,
) -> ConditionalDenoiser:
    """A freshly initialised denoiser that fits the other parts; those not at hand are taken to be of the usual size.

    Raises:
        ValueError: `image_size` is not a multiple of the autoencoder's reduction, or the latents not of the patches.
    """
    channels, size, factor = 3, config.image_size, 1
    if config.autoencoder is not None:
        factor = config.latent_factor if autoencoder is None else autoencoder.factor
        channels = config.latent_channels if autoencoder is None else autoencoder.channels
        if autoencoder is not None and size % factor:
            raise ValueError(f"image_size {size} is not a multiple of the autoencoder's factor {factor}")
        size //= factor
    text_encoder, width = None, None
    if isinstance(config.text_encoder, TrainedTextEncoder):
        text_encoder = build_text_encoder(config.text_encoder, tokenizer)
        width = config.text_encoder.width
    elif isinstance(config.text_encoder, PretrainedTextEncoder):
        width = pretrained_width(config.text_encoder) if frozen_text is None else frozen_text.config.hidden_size
    unet = config.denoiser if isinstance(config.denoiser, UNetConfig) else None
    projection, features = None, 0
    vector: Literal["identity", "timestep"] | None = "timestep" if config.tells_level else None
    if config.image_embedding is not None and unet is not None:
        features = config.image_embedding.clip_dim if clip is None else clip.embedding_dim
        width, vector = width or features, "identity"
    backbone = build_backbone(
        config.denoiser,
        channels,
        size,
        text_width=width,
        num_classes=None if config.classes is None else len(config.classes),
        extra_channels=0 if config.image_condition is None else condition_channels(config.image_condition, factor),
        learned_variance=config.learned_variance,
        size_conditioning=config.size_conditioning,
        extra_vector=vector,
    )
    if config.image_embedding is not None and unet is not None and width is not None:
        # diffusers makes the timestep's vector four times as wide as the finest level.
        projection = ImageProjection(features, 4 * unet.channels[0], width, config.image_embedding.tokens)
        if clip is not None and clip.statistics is not None:
            projection.mean.copy_(clip.statistics.mean)
            projection.deviation.copy_(clip.statistics.deviation)
    if config.lora is not None:
        lora.add_adapters(backbone, config.lora)
    skip_scale = 1.0 if unet is None else unet.skip_scale
    return ConditionalDenoiser(backbone, text_encoder, config.learned_variance, projection, skip_scale)
