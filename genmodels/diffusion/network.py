"""The denoiser: a U-Net and, where it is trained along, the text encoder, as one module with one forward."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from genmodels.diffusion.config import UNetConfig


class ConditionalDenoiser(nn.Module):
    """Predicts ε or v from noisy latents, a timestep and, where there is one, a text condition.

    U-Net and trained text encoder are one network, so that one engine shards, clips and updates them together. A
    frozen text encoder stays outside, and its output is handed in.
    """

    def __init__(self, unet: nn.Module, text_encoder: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Denoise.

        Args:
            latents: (batch, channels, height, width).
            timesteps: int64 (batch,).
            condition: token ids int64 (batch, length) where the text encoder is trained along; the frozen encoder's
                features (batch, length, width) where not; None for an unconditional U-Net.

        Returns:
            The prediction, float32, shaped like the latents.
        """
        dtype = next(self.unet.parameters()).dtype  # the engine may keep the weights in bfloat16
        if condition is None:
            return self.unet(latents.to(dtype), timesteps).sample.float()
        features = condition if self.text_encoder is None else self.text_encoder(condition).last_hidden_state
        return self.unet(latents.to(dtype), timesteps, encoder_hidden_states=features.to(dtype)).sample.float()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        unet: Any = self.unet
        unet.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.gradient_checkpointing_enable()


def build_unet(config: UNetConfig, channels: int, sample_size: int, text_width: int | None) -> Any:
    """diffusers' U-Net for latents (batch, channels, sample_size, sample_size); `text_width` None: unconditional."""
    common: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
    }
    if text_width is None:
        return UNet2DModel(
            **common,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
            attention_head_dim=config.head_dim,
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        cross_attention_dim=text_width,
        transformer_layers_per_block=config.transformer_layers,
        # diffusers reads this argument as the number of heads, whatever its name.
        attention_head_dim=tuple(max(1, c // config.head_dim) for c in config.channels),
    )


def example_inputs(network: ConditionalDenoiser) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of one sample's arguments to `forward`."""
    unet: Any = network.unet
    size, channels = unet.config.sample_size, unet.config.in_channels
    inputs: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((1, channels, size, size), torch.float32),
        ((1,), torch.int64),
    ]
    if network.text_encoder is not None:
        inputs.append(((1, network.text_encoder.config.max_position_embeddings), torch.int64))
    elif isinstance(unet, UNet2DConditionModel):
        inputs.append(((1, 77, unet.config.cross_attention_dim), torch.float32))
    return inputs
