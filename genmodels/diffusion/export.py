"""Writing a diffusion model as a folder that others open: JSON and safetensors, in diffusers' layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler
from transformers import T5EncoderModel

from genmodels.diffusion import lora
from genmodels.diffusion.config import export_layout
from genmodels.diffusion.dit import DiT, to_diffusers
from genmodels.diffusion.layout import OWN_INDEX
from genmodels.diffusion.network import save_projection
from genmodels.diffusion.objective import LatentDiffusion
from genmodels.text.tokenizer import save as save_tokenizer


def layout_of(objective: LatentDiffusion) -> str:
    """`export_layout` of its configuration, if the autoencoder is of the kind that diffusers' pipelines take."""
    autoencoder = objective.autoencoder
    if isinstance(objective.text_encoder, T5EncoderModel):
        return "own"
    return "own" if autoencoder is not None and not autoencoder.opens_in_pipelines else export_layout(objective.config)


def export_diffusion(objective: LatentDiffusion, folder: Path) -> None:
    """Write `unet/` or `transformer/`, `scheduler/` and, where there are, `vae/`, `text_encoder/` and `tokenizer/`.

    The layout is `layout_of(objective)`: those of diffusers carry a `model_index.json` with which its own
    pipelines open them, ours a `genmodels.json`. `TextToImage.from_folder` opens all.
    """
    layout = layout_of(objective)
    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = objective.plain_backbone()
    part = "unet"
    if isinstance(backbone, DiT):
        part, backbone = "transformer", to_diffusers(backbone) if layout == "DiTPipeline" else backbone
    library = "genmodels" if isinstance(backbone, DiT) else "diffusers"
    parts: dict[str, tuple[str, str]] = {part: (library, type(backbone).__name__)}
    backbone.save_pretrained(folder / part, safe_serialization=True)

    if objective.config.lora is not None:
        lora.save_adapters(objective.denoiser.backbone, folder / "lora")

    settings = objective.sampler_settings
    sampler: Any
    if objective.config.prediction_type == "edm":
        sampler = EDMEulerScheduler.from_config(settings)
    elif objective.config.prediction_type == "flow":  # what its Stable Diffusion pipeline can drive
        sampler = DPMSolverMultistepScheduler.from_config({**settings, "algorithm_type": "dpmsolver++"})
    else:
        sampler = (DDPMScheduler if layout == "DDPMPipeline" else DDIMScheduler).from_config(settings)
    sampler.save_pretrained(folder / "scheduler")
    parts["scheduler"] = ("diffusers", type(sampler).__name__)

    if objective.autoencoder is not None:
        autoencoder: Any = objective.autoencoder.model
        autoencoder.save_pretrained(folder / "vae", safe_serialization=True)
        parts["vae"] = ("diffusers", type(autoencoder).__name__)
    if objective.config.takes_text:
        text_encoder: Any = objective.denoiser.text_encoder or objective.text_encoder
        if text_encoder is None or objective.tokenizer is None:
            raise ValueError("a conditional model exports with its text encoder and tokenizer, and one is missing")
        text_encoder.save_pretrained(folder / "text_encoder")
        save_tokenizer(objective.tokenizer, folder / "tokenizer")
        parts |= {
            "text_encoder": ("transformers", type(text_encoder).__name__),
            "tokenizer": ("transformers", type(objective.tokenizer).__name__),
        }

    index: dict[str, Any] = {name: list(where) for name, where in sorted(parts.items())}
    if layout == "Stable Diffusion":
        absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index = {"_class_name": "StableDiffusionPipeline", **index, **absent, "requires_safety_checker": False}
    elif layout == "DDPMPipeline":
        index = {"_class_name": "DDPMPipeline", **index}
    elif layout == "DiTPipeline":
        names = {str(label): name for label, name in enumerate(objective.config.classes or ())}
        index = {"_class_name": "DiTPipeline", **index, "id2label": names}
    elif objective.config.classes is not None:
        index["classes"] = objective.config.classes
    projection = objective.denoiser.image_projection
    if projection is not None and objective.clip is not None:
        save_projection(projection, folder / "image_projection")
        objective.clip.save(folder / "clip")
        index["image_embedding"] = {"tokens": projection.tokens, "clip": objective.clip.describe()}
    if objective.denoiser.skip_scale != 1:
        index["skip_scale"] = objective.denoiser.skip_scale
    name = OWN_INDEX if layout == "own" else "model_index.json"
    index["_diffusers_version"] = diffusers.__version__
    if objective.config.image_condition is not None:
        index["image_condition"] = objective.config.image_condition.model_dump()
    (folder / name).write_text(json.dumps(index, indent=2) + "\n")
