"""Models of a few thousand parameters, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from genmodels.autoencoder.config import AutoencoderConfig
from genmodels.clip.config import ClipConfig
from genmodels.diffusion.config import LatentDiffusionConfig
from genmodels.families import ObjectiveConfig, build_objective
from genmodels.gan.attention.config import AttnGanConfig, DamsmConfig
from genmodels.gan.config import GanConfig
from genmodels.gan.translation_config import CycleGanConfig
from genmodels.objective import Batch
from genmodels.text import tokenizer

CAPTIONS = ["a red seven on a white background", "handwritten 7, ink red", "blue 3", "a green four on black paper"]
TEXT = {"kind": "trained", "width": 16, "layers": 1, "heads": 2, "length": 12, "vocab_size": 560}
UNET = {
    "kind": "unet",
    "channels": [16, 16],
    "attention": [False, True],
    "head_dim": 8,
    "layers_per_block": 1,
    "norm_groups": 8,
}


def autoencoder_config(**changes: Any) -> AutoencoderConfig:
    settings = {"image_size": 16, "channels": [8, 8, 8], "layers_per_block": 1, "norm_groups": 4, **changes}
    return AutoencoderConfig.model_validate(settings)


def diffusion_config(**changes: Any) -> LatentDiffusionConfig:
    settings = {"image_size": 16, "autoencoder": "given", "denoiser": UNET, "text_encoder": TEXT, **changes}
    return LatentDiffusionConfig.model_validate(settings)


def clip_config(**changes: Any) -> ClipConfig:
    image_encoder = {"kind": "convolutional", "channels": [8, 16], "norm_groups": 4}
    settings = {"image_size": 16, "image_encoder": image_encoder, "text_encoder": TEXT, "embedding_dim": 8, **changes}
    return ClipConfig.model_validate(settings)


def prior_config(kind: str = "diffusion_prior", **changes: Any) -> Any:
    shape = {"head_dim": 8} if kind == "diffusion_prior" else {"width": 16, "components": 6, "buckets": 8}
    settings = {"kind": kind, "image_size": 16, "clip": "given", "layers": 1, "heads": 2, **shape, **changes}
    return TypeAdapter(ObjectiveConfig).validate_python(settings)


def decoder_config(**changes: Any) -> LatentDiffusionConfig:
    return diffusion_config(**{"autoencoder": None, "image_size": 8, "image_embedding": {"clip": "given"}, **changes})


def upsampler_config(**changes: Any) -> LatentDiffusionConfig:
    told = {"kind": "low_resolution", "factor": 2, "degradation": "blur", "augmentation": 0.3, "crop": 8}
    unet = {**UNET, "attention": [False, False], "middle_attention": False}
    settings = {"autoencoder": None, "denoiser": unet, "text_encoder": {"kind": "none"}, "image_condition": told}
    return diffusion_config(**{**settings, **changes})


def gan_config(**changes: Any) -> GanConfig:
    shape = {"kind": "style", "channels": 8, "largest": 16}
    settings = {"image_size": 16, "latent_dim": 8, "condition_dim": 16, "loss": "non_saturating", **changes}
    own = {"generator": {**shape, "style_dim": 16, "mapping_layers": 1}, "discriminator": shape}
    return GanConfig.model_validate({**own, **settings})


def cycle_config(**changes: Any) -> CycleGanConfig:
    shape = {"image_size": 16, "channels": 4, "halvings": 1, "blocks": 1, "pool_size": 20}
    return CycleGanConfig.model_validate({**shape, "discriminator": {"channels": 4, "layers": 1}, **changes})


def unpaired(size: int = 4, first_seed: int = 0) -> Batch:
    """A batch of two sets."""
    return {**batch(size, first_seed), "other": batch(size, first_seed + 500)}


def damsm_config(**changes: Any) -> DamsmConfig:
    image_encoder = {"channels": [8, 16], "depth": 1, "regions_after": 2, "norm_groups": 4}
    text = {"width": 8, "length": 12, "vocab_size": 560}
    settings = {"image_size": 16, "image_encoder": image_encoder, "text_encoder": text, "embedding_dim": 8, **changes}
    return DamsmConfig.model_validate(settings)


def attn_gan_config(**changes: Any) -> AttnGanConfig:
    noise = {"latent_dim": 8, "condition_dim": 6, "kl_weight": 0.1}
    shape = {"channels": 4, "discriminator_channels": 4, "largest": 8, "residual_blocks": 1}
    settings = {"image_size": 16, "stages": 2, "damsm": "given", "damsm_dim": 8, **noise, **shape, **changes}
    return AttnGanConfig.model_validate(settings)


def batch(size: int = 4, first_seed: int = 0, image_size: int = 16, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first_seed)
    return {
        "images": torch.rand(size, 3, image_size, image_size, generator=generator) * 2 - 1,
        "weight": torch.ones(size),
        "seeds": torch.arange(first_seed, first_seed + size),
        "keys": [f"shard/{i}" for i in range(size)],
        "captions": [CAPTIONS[i % len(CAPTIONS)] for i in range(size)],
        "step": step,
    }


def with_tokens(given: Batch, inputs: Path) -> Batch:
    return {**given, "token_ids": tokenizer.encode(tokenizer.load(inputs / "tokenizer"), given["captions"])}


def write_clip(folder: Path, inputs: Path, seed: int = 0, **changes: Any) -> Path:
    """The export of a CLIP with measured statistics; its embeddings are as wide as its text's features."""
    torch.manual_seed(seed)
    clip = build_objective(clip_config(embedding_dim=16, **changes), inputs)
    with torch.no_grad():
        clip.finish([with_tokens(batch(32, first_seed=seed), inputs)])
    folder.mkdir(parents=True)
    clip.export(folder)
    return folder


def write_damsm(folder: Path, inputs: Path) -> Path:
    """The export of an untrained DAMSM."""
    torch.manual_seed(0)
    build_objective(damsm_config(), inputs).export(folder)
    return folder


def write_inputs(folder: Path) -> Path:
    """An autoencoder whose latents are scaled, a tokenizer and a CLIP, as the trainer lays them out."""
    torch.manual_seed(0)
    autoencoder = build_objective(autoencoder_config())
    autoencoder.finish([batch(8)])
    autoencoder.export(folder / "autoencoder")
    tokenizer.save(tokenizer.train_tokenizer(CAPTIONS * 4, vocab_size=560, length=12), folder / "tokenizer")
    write_clip(folder / "clip", folder)
    return folder
