"""Diffusion transformers: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023).

Text enters by cross-attention (the paper's section 3.2, and PixArt-α's), or joins the image's tokens in one attention
with weights of its own (Esser et al., "Scaling Rectified Flow Transformers", ICML 2024, section 4). Classes are added
to the timestep's embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from genmodels.diffusion.config import DIFFUSERS_DIT_CLASSES
from genmodels.weights import copy_weights

SIZE_FEATURES = 256  # sines and cosines of each of four numbers


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to `context`."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width or width, width)
        self.to_v = nn.Linear(context_width or width, width)
        self.to_out = nn.Linear(width, width)

    def project(self, tokens: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, features) each."""
        context = tokens if context is None else context
        parts = (self.to_q(tokens), self.to_k(context), self.to_v(context))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def merge(self, attended: Tensor) -> Tensor:
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        return self.merge(scaled_dot_product_attention(*self.project(tokens, context)))


class Stream(nn.Module):
    """What a block does to tokens of one kind: adaLN-zero around attention and around an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False, eps=1e-5)  # diffusers' two values
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def modulate(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate for attention, then for the MLP: (batch, 1, width) each."""
        return self.modulation(silu(conditioning))[:, None].chunk(6, dim=-1)

    def normalised(self, tokens: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        return self.norm_attention(tokens) * (1 + parts[1]) + parts[0]

    def finish(self, tokens: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        normalised = self.norm_mlp(tokens) * (1 + parts[4]) + parts[3]
        return tokens + parts[5] * self.mlp(normalised)


class Block(nn.Module):
    """Self-attention, cross-attention to the text where there is one, MLP."""

    def __init__(self, width: int, heads: int, text: bool) -> None:
        super().__init__()
        self.image = Stream(width, heads)
        if text:
            self.norm_text = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.cross_attention = Attention(width, heads)

    def forward(self, tokens: Tensor, text: Tensor | None, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = self.image.modulate(conditioning)
        tokens = tokens + parts[2] * self.image.attention(self.image.normalised(tokens, parts))
        if text is not None:
            tokens = tokens + self.cross_attention(self.norm_text(tokens), text)
        return self.image.finish(tokens, parts), text


class JointBlock(nn.Module):
    """One attention over the tokens of image and text; everything else is the kind's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.image, self.text = Stream(width, heads), Stream(width, heads)

    def forward(self, tokens: Tensor, text: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        streams = ((self.text, text), (self.image, tokens))
        parts = [stream.modulate(conditioning) for stream, _ in streams]
        projected = [
            stream.attention.project(stream.normalised(own, part)) for (stream, own), part in zip(streams, parts)
        ]
        query, key, value = (torch.cat(both, dim=2) for both in zip(*projected))
        attended = scaled_dot_product_attention(query, key, value).split([text.shape[1], tokens.shape[1]], dim=2)
        text, tokens = (
            stream.finish(own + part[2] * stream.attention.merge(of_own), part)
            for (stream, own), part, of_own in zip(streams, parts, attended)
        )
        return tokens, text


class DiT(ModelMixin, ConfigMixin):
    """A diffusion transformer over patches, called as diffusers' U-Nets are.

    Args:
        sample_size: height and width of its input, a multiple of `patch_size`.
        in_channels, out_channels: of its input and output.
        patch_size: side of a patch; a token is a patch.
        width: features per token, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        text_width: features per token of text; None takes no text.
        text_attention: "cross" or "joint".
        size_conditioning: takes features of the image's original size and crop.
        num_classes: classes, whose labels are 0 … num_classes − 1, and `num_classes` for none; None takes no label.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        text_width: int | None = None,
        text_attention: str = "cross",
        num_classes: int | None = None,
        size_conditioning: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.patches = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time = TimestepEmbedding(256, width)
        if num_classes is not None:
            self.classes = nn.Embedding(num_classes + 1, width)
        if size_conditioning:
            self.size = TimestepEmbedding(4 * SIZE_FEATURES, width)
        if text_width is not None:
            self.text = nn.Linear(text_width, width)
            self.pooled = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        joint = text_width is not None and text_attention == "joint"
        blocks = [
            JointBlock(width, heads) if joint else Block(width, heads, text_width is not None) for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_size**2 * out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Every block begins as the identity, and the output as 0 (the paper's adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.proj.weight.flatten(1))
        nn.init.zeros_(self.patches.proj.bias)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or name.startswith(("time.linear", "size.linear")):
                nn.init.normal_(module.weight, std=0.02)
            elif name.endswith(("modulation", "modulation_out", "cross_attention.to_out")) or module is self.out:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        size: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict from noisy latents.

        Args:
            sample: (batch, in_channels, sample_size, sample_size).
            timestep: (batch,).
            encoder_hidden_states: text (batch, length, text_width).
            class_labels: int64 (batch,).
            size: features of sizes, (batch, 4 · 256).
            return_dict: False returns a tuple.

        Returns:
            `.sample`, (batch, out_channels, sample_size, sample_size).
        """
        tokens, text = self.patches(sample), None
        conditioning = self.time(self.time_features(timestep).to(tokens.dtype))
        if class_labels is not None:
            conditioning = conditioning + self.classes(class_labels)
        if size is not None:
            conditioning = conditioning + self.size(size)
        if encoder_hidden_states is not None:
            text = self.text(encoder_hidden_states)
            conditioning = conditioning + self.pooled(encoder_hidden_states.mean(1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens, text = checkpoint(block, tokens, text, conditioning, use_reentrant=False)
            else:
                tokens, text = block(tokens, text, conditioning)
        shift, scale = self.modulation_out(silu(conditioning))[:, None].chunk(2, dim=-1)
        patches = self.out(self.norm_out(tokens) * (1 + scale) + shift)
        side, patch = sample.shape[-1] // self.config.patch_size, self.config.patch_size
        grid = patches.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
        images = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return UNet2DOutput(images) if return_dict else (images,)


def to_diffusers(model: DiT) -> Any:
    """The same model as diffusers' `DiTTransformer2DModel`, for its DiTPipeline.

    There every block has an embedding of timestep and class of its own: all are copies of ours. And the label of no
    class is always 1000: where there are fewer, those between are never asked for.

    Raises:
        ValueError: the model takes text, or no classes, or more than 1000.
    """
    from diffusers import DiTTransformer2DModel

    config: Any = model.config
    if not 0 < (config.num_classes or 0) <= DIFFUSERS_DIT_CLASSES or config.text_width is not None:
        raise ValueError("only a DiT of at most 1000 classes, without text, is one of diffusers'")
    theirs = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=DIFFUSERS_DIT_CLASSES,
    )
    own, state = model.state_dict(), {}
    unused = own["classes.weight"].new_zeros(DIFFUSERS_DIT_CLASSES - config.num_classes, config.width)
    own["classes.weight"] = torch.cat([own["classes.weight"][:-1], unused, own["classes.weight"][-1:]])
    for ours, name in _names(config.depth):
        for suffix in ("weight", "bias"):
            if f"{ours}.{suffix}" in own:
                state[f"{name}.{suffix}"] = own[f"{ours}.{suffix}"]
    theirs.load_state_dict(state)
    return theirs


def from_diffusers(model: Any, num_classes: int | None = None) -> DiT:
    """A `DiTTransformer2DModel` as ours; of its blocks' embeddings the first is taken.

    `num_classes` is how many of its classes there really are; None is all.
    """
    config: Any = model.config
    num_classes = num_classes or config.num_embeds_ada_norm
    ours = DiT(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels or config.in_channels,
        patch_size=config.patch_size,
        width=config.num_attention_heads * config.attention_head_dim,
        depth=config.num_layers,
        heads=config.num_attention_heads,
        num_classes=num_classes,
    )
    theirs, own = model.state_dict(), ours.state_dict()
    state = {
        f"{mine}.{suffix}": theirs[f"{name}.{suffix}"]
        for mine, name in reversed(_names(config.num_layers))
        for suffix in ("weight", "bias")
        if f"{mine}.{suffix}" in own
    }
    table = state["classes.weight"]
    state["classes.weight"] = torch.cat([table[:num_classes], table[-1:]])
    ours.load_state_dict(state)
    return ours


def open_dit(folder: Path, num_classes: int | None = None) -> DiT:
    """A DiT from a folder that this project or diffusers wrote; `num_classes` as for `from_diffusers`.

    Raises:
        ValueError: the folder holds no DiT.
    """
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    if name == "DiTTransformer2DModel":
        from diffusers import DiTTransformer2DModel

        return from_diffusers(DiTTransformer2DModel.from_pretrained(folder, **options), num_classes)
    if name != "DiT":
        raise ValueError(f"{folder} is a {name}, and no DiT")
    return DiT.from_pretrained(folder, **options)


def load_dit(model: DiT, folder: Path) -> None:
    """Copy the weights of an exported DiT into `model`.

    Raises:
        ValueError: there is none, or its shapes differ.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"init_from: {folder} holds no DiT (no config.json there)")
    config: Any = model.config
    copy_weights(open_dit(folder, config.num_classes).state_dict(), model, folder)


def _names(depth: int) -> list[tuple[str, str]]:
    """Our modules and diffusers', by name; the embeddings once for each block."""
    pairs = [("patches.proj", "pos_embed.proj"), ("modulation_out", "proj_out_1"), ("out", "proj_out_2")]
    for number in range(depth):
        block, theirs = f"blocks.{number}.image", f"transformer_blocks.{number}"
        pairs += [
            ("time.linear_1", f"{theirs}.norm1.emb.timestep_embedder.linear_1"),
            ("time.linear_2", f"{theirs}.norm1.emb.timestep_embedder.linear_2"),
            ("classes", f"{theirs}.norm1.emb.class_embedder.embedding_table"),
            (f"{block}.modulation", f"{theirs}.norm1.linear"),
            (f"{block}.attention.to_q", f"{theirs}.attn1.to_q"),
            (f"{block}.attention.to_k", f"{theirs}.attn1.to_k"),
            (f"{block}.attention.to_v", f"{theirs}.attn1.to_v"),
            (f"{block}.attention.to_out", f"{theirs}.attn1.to_out.0"),
            (f"{block}.mlp.0", f"{theirs}.ff.net.0.proj"),
            (f"{block}.mlp.2", f"{theirs}.ff.net.2"),
        ]
    return pairs
