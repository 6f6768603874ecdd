"""The denoiser: a U-Net or transformer and, where it is trained along, the text encoder, as one module."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genmodels.diffusion.config import DiTConfig, UNetConfig
from genmodels.diffusion.dit import SIZE_FEATURES, DiT
from genmodels.diffusion.sampler import NOTHING, Condition
from genmodels.text.encoder import TextEncoder
from genmodels.weights import copy_weights, forward_flops

_WEIGHTS = "model.safetensors"
LEVELS = 1000  # what a level of noise is multiplied by, to be embedded as timesteps are


class ConditionalDenoiser(nn.Module):
    """Predicts what the objective asks for, from noisy latents, a timestep and what else it is told.

    Backbone and trained text encoder are one network, so that one engine shards, clips and updates them together. A
    frozen text encoder stays outside, and its output is handed in.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text_encoder: TextEncoder | None = None,
        learned_variance: bool = False,
        image_projection: ImageProjection | None = None,
        skip_scale: float = 1.0,
    ) -> None:
        """Args: `backbone` is one of diffusers' U-Nets or a `DiT`; see `learned_variance.py` for the third;
        `image_projection` takes the embedding of an image in; `skip_scale` multiplies skip connections."""
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder
        self.learned_variance = learned_variance
        self.image_projection = image_projection
        self.skip_scale = skip_scale
        if skip_scale != 1:
            for block in backbone.up_blocks:  # type: ignore[union-attr]
                block.register_forward_pre_hook(self._scale_skips, with_kwargs=True)

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
                encoder's features (batch, length, width) where not; "text_mask": bool (batch, length), where padding is
                not to be seen; "classes": labels int64 (batch,); "image": what comes with the latents, (batch,
                extra_channels, height, width); "level": how noisy that image is, (batch,) from 0 to 1; "embedding": of
                an image, with a last feature 1, or zeros where it is not told, (batch, features + 1); "size": (batch,
                4), see `Batch`.

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
        if "text_mask" in condition:
            told["encoder_attention_mask"] = condition["text_mask"]
        if self.image_projection is not None:
            vector, tokens = self.image_projection(condition["embedding"].to(dtype))
            told["class_labels"] = vector
            text = told.get("encoder_hidden_states")
            told["encoder_hidden_states"] = tokens if text is None else torch.cat([text, tokens], dim=1)
            if "encoder_attention_mask" in told:
                told["encoder_attention_mask"] = nn.functional.pad(
                    told["encoder_attention_mask"], (0, tokens.shape[1]), value=True
                )
        if "level" in condition:
            told["class_labels"] = condition["level"] * LEVELS
        if "classes" in condition:
            told["class_labels"] = condition["classes"]
        if "size" in condition:
            told["class_labels" if isinstance(self.backbone, UNet2DConditionModel) else "size"] = size_features(
                condition["size"]
            ).to(dtype)
        if "image" in condition:
            latents = torch.cat([latents, condition["image"].to(latents.dtype)], dim=1)
        return self.backbone(latents.to(dtype), timesteps, **told).sample.float()

    def _scale_skips(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before a block of the way up, which diffusers' two U-Nets call in different ways."""
        name = "res_hidden_states_tuple"
        skips = tuple(skip * self.skip_scale for skip in (given[name] if name in given else args[1]))
        return (args, {**given, name: skips}) if name in given else ((args[0], skips, *args[2:]), given)

    @property
    def takes_level(self) -> bool:
        """Whether it is told how noisy an image is."""
        config: Any = self.backbone.config
        return config.get("class_embed_type") == "timestep"

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


class ImageProjection(nn.Module):
    """The embedding of an image, for a U-Net: a vector that is added to the timestep's, and tokens of context.

    Ramesh et al. 2022, section 2.1. Embeddings come in units of their features' deviations from their mean.
    """

    def __init__(self, features: int, vector: int, width: int, tokens: int) -> None:
        """Args: features of the embedding, of the timestep's vector and of a token of context, and how many tokens."""
        super().__init__()
        self.tokens = tokens
        self.mean, self.deviation = nn.Buffer(torch.zeros(features)), nn.Buffer(torch.ones(features))
        self.to_vector = nn.Linear(features + 1, vector)
        self.to_tokens = nn.Linear(features + 1, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, vector) and (batch, tokens, width), of embeddings (batch, features + 1), see `told_embedding`."""
        known = embedding[:, -1:]
        scaled = (embedding[:, :-1] - self.mean) / self.deviation * known
        read = torch.cat([scaled, known], dim=1).to(self.to_vector.weight.dtype)
        return self.to_vector(read), self.norm(self.to_tokens(read).unflatten(1, (self.tokens, -1)))


def save_projection(projection: ImageProjection, folder: Path) -> None:
    """Write a projection for `load_projection` and `open_projection`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in projection.state_dict().items()}, folder / _WEIGHTS)


def load_projection(projection: ImageProjection, folder: Path) -> None:
    """Take over the weights of a folder. Raises ValueError where there are none, or of other shapes."""
    copy_weights(_projection_weights(folder), projection, folder)


def open_projection(folder: Path, tokens: int) -> ImageProjection:
    """The projection of a folder, which becomes so many tokens. Raises ValueError where there is none."""
    weights = _projection_weights(folder)
    vector, features = weights["to_vector.weight"].shape
    projection = ImageProjection(features - 1, vector, len(weights["norm.weight"]), tokens)
    copy_weights(weights, projection, folder)
    return projection


def _projection_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"init_from: {folder} holds no projection of image embeddings (no {_WEIGHTS} there)")
    return load_file(folder / _WEIGHTS)


def told_embedding(embeddings: Tensor, known: Tensor | None = None) -> Tensor:
    """Embeddings (batch, features) as the denoiser is told them, (batch, features + 1); zeros where not `known`."""
    told = torch.cat([embeddings, torch.ones_like(embeddings[:, :1])], dim=1)
    return told if known is None else told * known[:, None].to(told.dtype)


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
    extra_vector: Literal["identity", "timestep"] | None = None,
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
        extra_vector: of U-Nets: takes what is added to the timestep's embedding ("identity"), or another timestep.

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
    kind = "projection" if size_conditioning else extra_vector
    return _build_unet(config, in_channels, out_channels, sample_size, text_width, num_classes, kind)


_POOLING_HEAD = 32  # features per head of the pooling of text, at most
_PLAIN = ("DownBlock2D", "UpBlock2D")


def _build_unet(
    config: UNetConfig,
    in_channels: int,
    out_channels: int,
    sample_size: int,
    text_width: int | None,
    num_classes: int | None,
    class_embed_type: str | None,
) -> Any:
    layers = config.layers_per_block
    common: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(config.channels),
        "class_embed_type": class_embed_type,
        "norm_num_groups": config.norm_groups,
        "dropout": config.dropout,
        "num_class_embeds": None if num_classes is None else num_classes + 1,
    }
    heads = [config.heads or max(1, channels // config.head_dim) for channels in config.channels]
    if text_width is None:
        resample = "resnet" if config.resnet_resampling else "conv"
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resnet_resampling else _PLAIN
        if isinstance(layers, list):
            if len(set(layers)) > 1:
                raise ValueError("layers_per_block: a U-Net without text has the same number at each resolution")
            layers = layers[0]
        return UNet2DModel(
            **common,
            layers_per_block=layers,
            add_attention=config.middle_attention,
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
        layers_per_block=layers,
        cross_attention_dim=text_width,
        transformer_layers_per_block=config.transformer_layers,
        # diffusers reads this argument as the number of heads, whatever its name.
        attention_head_dim=tuple(heads),
        use_linear_projection=config.linear_projection,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        projection_class_embeddings_input_dim=4 * SIZE_FEATURES if class_embed_type == "projection" else None,
        addition_embed_type="text" if config.pooled_text else None,
        addition_embed_type_num_heads=text_width // gcd(text_width, _POOLING_HEAD),
    )


def example_flops(
    build: Callable[[], ConditionalDenoiser],
    text_shape: tuple[int, int] | None,
    classes: bool,
    crop: int | None = None,
) -> float:
    """Floating point operations of one sample's forward pass; `text_shape` is (length, width) of frozen features, and
    `crop` the side of what is cut out of an image, where it is not seen whole."""

    class Example(nn.Module):
        """The denoiser with one sample's arguments, which `forward_flops` cannot give as a mapping."""

        def __init__(self) -> None:
            super().__init__()
            self.denoiser = build()

        def forward(self, timesteps: Tensor) -> Tensor:
            denoiser, device = self.denoiser, timesteps.device
            channels, *sides = denoiser.sample_shape
            sides = sides if crop is None else [crop, crop]
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
            if denoiser.takes_level:
                told["level"] = torch.zeros(1, device=device)
            if denoiser.image_projection is not None:
                told["embedding"] = torch.zeros(1, denoiser.image_projection.to_vector.in_features, device=device)
            config: Any = denoiser.backbone.config
            if config.in_channels > channels:
                told["image"] = torch.zeros(1, config.in_channels - channels, *sides, device=device)
            return denoiser(torch.zeros(1, channels, *sides, device=device), timesteps, told)

    return forward_flops(Example, ((1,), torch.int64))
