"""The denoiser: a U-Net or transformer and, where it is trained along, the text encoder, as one module."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from transformers import CLIPTextModel

from genmodels.diffusion.config import DiTConfig, UNetConfig
from genmodels.diffusion.dit import SIZE_FEATURES, DiT
from genmodels.diffusion.sampler import NOTHING, Condition
from genmodels.weights import forward_flops


class ConditionalDenoiser(nn.Module):
    """Predicts what the objective asks for, from noisy latents, a timestep and what else it is told.

    Backbone and trained text encoder are one network, so that one engine shards, clips and updates them together. A
    frozen text encoder stays outside, and its output is handed in.
    """

    def __init__(
        self, backbone: nn.Module, text_encoder: CLIPTextModel | None = None, learned_variance: bool = False
    ) -> None:
        """Args: `backbone` is one of diffusers' U-Nets or a `DiT`; see `learned_variance.py` for the last."""
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder
        self.learned_variance = learned_variance

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Of one sample: (channels, height, width)."""
        config: Any = self.backbone.config
        channels = config.out_channels // (2 if self.learned_variance else 1)
        return channels, config.sample_size, config.sample_size

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition = NOTHING) -> Tensor:
        """Denoise.

        Args:
            latents: (batch, channels, height, width).
            timesteps: (batch,).
            condition: "text": token ids int64 (batch, length) where the text encoder is trained along, the frozen
                encoder's features (batch, length, width) where not; "classes": labels int64 (batch,); "image": what
                comes with the latents, (batch, extra_channels, height, width); "size": (batch, 4), see `Batch`.

        Returns:
            The prediction, float32, shaped like the latents; with a learned variance that comes after it, as many
            channels again.
        """
        condition = dict(condition)
        if self.text_encoder is not None:
            condition["text"] = self.text_encoder(condition["text"]).last_hidden_state
        return self.predict(latents, timesteps, condition)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """As `forward`, with the text's features in any case."""
        dtype = next(self.backbone.parameters()).dtype  # the engine may keep the weights in bfloat16
        told: dict[str, Tensor] = {}
        if "text" in condition:
            told["encoder_hidden_states"] = condition["text"].to(dtype)
        if "classes" in condition:
            told["class_labels"] = condition["classes"]
        if "size" in condition:
            told["class_labels" if isinstance(self.backbone, UNet2DConditionModel) else "size"] = size_features(
                condition["size"]
            ).to(dtype)
        if "image" in condition:
            latents = torch.cat([latents, condition["image"].to(latents.dtype)], dim=1)
        return self.backbone(latents.to(dtype), timesteps, **told).sample.float()

    @property
    def takes_size(self) -> bool:
        """Whether it is told the original size and crop of images."""
        config: Any = self.backbone.config
        return bool(config.get("size_conditioning") or config.get("class_embed_type") == "projection")

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        backbone: Any = self.backbone
        backbone.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.gradient_checkpointing_enable()


def size_features(sizes: Tensor) -> Tensor:
    """Sines and cosines of each number of `sizes` (batch, 4): (batch, 4 · 256), float32.

    Podell et al., "SDXL" (ICLR 2024), section 2.2.
    """
    features = get_timestep_embedding(
        sizes.flatten().float(), SIZE_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return features.unflatten(0, sizes.shape).flatten(1)


def build_backbone(
    config: UNetConfig | DiTConfig,
    channels: int,
    sample_size: int,
    text_width: int | None = None,
    num_classes: int | None = None,
    extra_channels: int = 0,
    learned_variance: bool = False,
    size_conditioning: bool = False,
) -> Any:
    """The network for latents (batch, channels, sample_size, sample_size).

    Args:
        config: which one.
        channels, sample_size: of the latents.
        text_width: features per token of text; None takes no text.
        num_classes: classes, of which label `num_classes` is none; None takes no labels.
        extra_channels: of what comes with the latents: an image that is told.
        learned_variance: twice as many channels come out.
        size_conditioning: takes the features of sizes.

    Raises:
        ValueError: a DiT's patches do not divide the latents.
    """
    out_channels = 2 * channels if learned_variance else channels
    if isinstance(config, DiTConfig):
        if sample_size % config.patch_size:
            raise ValueError(f"denoiser.patch_size {config.patch_size} does not divide the latents' side {sample_size}")
        return DiT(
            sample_size,
            channels + extra_channels,
            out_channels,
            config.patch_size,
            config.width,
            config.depth,
            config.heads,
            text_width,
            config.text_attention,
            num_classes,
            size_conditioning,
        )
    in_channels = channels + extra_channels
    return _build_unet(config, in_channels, out_channels, sample_size, text_width, num_classes, size_conditioning)


_POOLING_HEAD = 32  # features per head of the pooling of text, at most
_PLAIN = ("DownBlock2D", "UpBlock2D")


def _build_unet(
    config: UNetConfig,
    in_channels: int,
    out_channels: int,
    sample_size: int,
    text_width: int | None,
    num_classes: int | None,
    size_conditioning: bool,
) -> Any:
    common: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
        "num_class_embeds": None if num_classes is None else num_classes + 1,
    }
    heads = [config.heads or max(1, channels // config.head_dim) for channels in config.channels]
    if text_width is None:
        resample = "resnet" if config.resnet_resampling else "conv"
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resnet_resampling else _PLAIN
        return UNet2DModel(
            **common,
            down_block_types=tuple("AttnDownBlock2D" if a else plain[0] for a in config.attention),
            up_block_types=tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(config.attention)),
            attention_head_dim=config.head_dim if config.heads is None else config.channels[-1] // config.heads,
            downsample_type=resample,
            upsample_type=resample,
            resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else _PLAIN[0] for a in config.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else _PLAIN[1] for a in reversed(config.attention)),
        cross_attention_dim=text_width,
        transformer_layers_per_block=config.transformer_layers,
        # diffusers reads this argument as the number of heads, whatever its name.
        attention_head_dim=tuple(heads),
        use_linear_projection=config.linear_projection,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        class_embed_type="projection" if size_conditioning else None,
        projection_class_embeddings_input_dim=4 * SIZE_FEATURES if size_conditioning else None,
        addition_embed_type="text" if config.pooled_text else None,
        addition_embed_type_num_heads=text_width // gcd(text_width, _POOLING_HEAD),
    )


def example_flops(build: Callable[[], ConditionalDenoiser], text_shape: tuple[int, int] | None, classes: bool) -> float:
    """Floating point operations of one sample's forward pass; `text_shape` is (length, width) of frozen features."""

    class Example(nn.Module):
        """The denoiser with one sample's arguments, which `forward_flops` cannot give as a mapping."""

        def __init__(self) -> None:
            super().__init__()
            self.denoiser = build()

        def forward(self, timesteps: Tensor) -> Tensor:
            denoiser, device = self.denoiser, timesteps.device
            channels, *sides = denoiser.sample_shape
            told: dict[str, Tensor] = {}
            if denoiser.text_encoder is not None:
                length = denoiser.text_encoder.config.max_position_embeddings
                told["text"] = torch.zeros(1, length, dtype=torch.int64, device=device)
            elif text_shape is not None:
                told["text"] = torch.zeros(1, *text_shape, device=device)
            if classes:
                told["classes"] = timesteps
            if denoiser.takes_size:
                told["size"] = torch.zeros(1, 4, device=device)
            config: Any = denoiser.backbone.config
            if config.in_channels > channels:
                told["image"] = torch.zeros(1, config.in_channels - channels, *sides, device=device)
            return denoiser(torch.zeros(1, channels, *sides, device=device), timesteps, told)

    return forward_flops(Example, ((1,), torch.int64))
