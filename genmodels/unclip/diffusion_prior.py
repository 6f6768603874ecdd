"""The diffusion prior of unCLIP.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022), section 2.2: a transformer
with a causal mask over the caption's tokens, its embedding, the timestep, the noised image embedding and a learnt query
predicts the clean image embedding itself. The network is diffusers' PriorTransformer, so that diffusers opens it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from genmodels import random
from genmodels.clip.frozen import FrozenClip
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.diffusion.noise_schedule import NoiseSchedule
from genmodels.diffusion.sampler import (
    NOTHING,
    Condition,
    Guidance,
    SamplerName,
    make_sampler,
    sample,
    sampler_settings,
)
from genmodels.objective import Batch, Mean, Phase, PhaseLoss
from genmodels.random import derive_seeds
from genmodels.unclip.config import DiffusionPriorConfig
from genmodels.unclip.prior import Prior, open_clip
from genmodels.weights import forward_flops, load_into

TIMESTEPS = 1000
CANDIDATES = 2  # draws, of which the one nearest to the caption's embedding is kept
_RANGE = 5.0  # deviations from the mean beyond which a predicted feature is cut off
_CHECKS = 4  # timesteps of a validation
_PREVIEW_STEPS = 10


class DiffusionPrior(Prior):
    """One network ("prior"), one phase: the squared error of the clean embedding, in units of features' deviations."""

    config: DiffusionPriorConfig

    def __init__(self, config: DiffusionPriorConfig, clip: FrozenClip) -> None:
        super().__init__(config, clip)
        if clip.text_width != clip.embedding_dim:
            raise ValueError(
                f"PriorTransformer takes token features as wide as embeddings, and this CLIP's have {clip.text_width} "
                f"and {clip.embedding_dim}: use kind autoregressive_prior, or a CLIP with both the same"
            )
        self.prior = build_prior(config, clip.embedding_dim, clip.text_length, self.statistics)
        self.networks: dict[str, nn.Module] = {"prior": self.prior}
        self.phases = [Phase("prior", self.loss)]
        self.noise_schedule = NoiseSchedule.named("cosine", TIMESTEPS)

    @staticmethod
    def from_config(config: DiffusionPriorConfig, inputs: Path | None = None) -> DiffusionPrior:
        """Build from a configuration; `inputs` holds `clip/`. Raises ValueError where it is missing or does not fit."""
        return DiffusionPrior(config, open_clip(inputs))

    @staticmethod
    def abstract_networks(config: DiffusionPriorConfig) -> dict[str, nn.Module]:
        """The trained network on the meta device, to count parameters."""
        with torch.device("meta"):
            return {"prior": build_prior(config, config.clip_dim, config.clip_length)}

    def loss(self, batch: Batch) -> PhaseLoss:
        """Mean over the slots of ‖f(z_t, t, caption) − z‖² a feature."""
        timesteps = self.noise_schedule.timesteps(random.uniform(batch["seeds"], (), "timesteps"))
        errors = self._errors(batch, timesteps, self.told(batch, dropout=True))
        return PhaseLoss((batch["weight"] * errors).mean(), {"loss": Mean.of(errors, batch["weight"])})

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The loss with no caption dropped, at a timestep in each quarter of the schedule; and how near drawn
        embeddings are."""
        told, position = self.told(batch, dropout=False), random.uniform(batch["seeds"], (), "timesteps")
        errors = torch.stack(
            [
                self._errors(batch, self.noise_schedule.timesteps((quarter + position) / _CHECKS), told)
                for quarter in range(_CHECKS)
            ]
        ).mean(0)
        drawn = draw_embeddings(self.prior, told, NOTHING, batch["seeds"], _PREVIEW_STEPS, candidates=1)
        return {"loss": Mean.of(errors, batch["weight"]), **self.agreement(drawn, batch, told)}

    def export(self, folder: Path) -> dict[str, Any]:
        """Write `prior/`, a PriorTransformer of diffusers, and which CLIP it belongs to."""
        self.prior.save_pretrained(folder / "prior", safe_serialization=True)
        self.write_facts(folder)
        return {"layout": "PriorTransformer", "parameters": {"prior": sum(p.numel() for p in self.prior.parameters())}}

    def load_weights(self, folder: Path) -> None:
        """Start from an export. Raises ValueError where it is none, or has other shapes."""
        own = {name: buffer.clone() for name, buffer in self.prior.named_buffers()}  # of this run's CLIP
        load_into(self.prior, folder / "prior")
        for name, buffer in self.prior.named_buffers():
            buffer.copy_(own[name])

    def flops_per_sample(self) -> float:
        """Of the prior's forward pass; the CLIP is not counted."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        dim, length = self.clip.embedding_dim, self.clip.text_length
        shapes = [(1, dim), (1,), (1, dim), (1, length, dim), (1, length)]
        return forward_flops(
            lambda: build_prior(self.config, dim, length),  # type: ignore[arg-type]
            *((shape, torch.bool if number == 4 else torch.float32) for number, shape in enumerate(shapes)),
        )

    def _errors(self, batch: Batch, timesteps: Tensor, told: Condition) -> Tensor:
        clean = self.embeddings(batch)
        clean = (clean - self.prior.clip_mean) / self.prior.clip_std
        noise = random.normal(batch["seeds"], clean.shape[1:], "noise")
        noisy = self.noise_schedule.q_sample(clean, timesteps, noise)
        return (predict(self.prior, noisy, timesteps, told) - clean).square().mean(1)


def build_prior(
    config: DiffusionPriorConfig, embedding_dim: int, length: int, statistics: EmbeddingStatistics | None = None
) -> Any:
    """A freshly initialised PriorTransformer, which keeps `statistics` as diffusers does: `clip_mean`, `clip_std`."""
    prior: Any = PriorTransformer(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.layers,
        embedding_dim=embedding_dim,
        num_embeddings=length,
    )
    nn.init.normal_(prior.positional_embedding, std=0.02)
    nn.init.normal_(prior.prd_embedding, std=0.02)
    mean, deviation = prior.clip_mean.detach(), prior.clip_std.detach()
    if statistics is not None:
        mean, deviation = statistics.mean[None], statistics.deviation[None]
    # Measured, not trained: parameters would decay.
    del prior.clip_mean, prior.clip_std
    prior.register_buffer("clip_mean", mean.clone())
    prior.register_buffer("clip_std", deviation.clone())
    return prior


def open_prior(folder: Path) -> Any:
    """The PriorTransformer of a folder, in evaluation mode. Raises ValueError where there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no PriorTransformer (no config.json there)")
    return PriorTransformer.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()


def predict(prior: Any, noisy: Tensor, timesteps: Tensor, told: Condition) -> Tensor:
    """The clean embeddings that the prior sees, float32 (batch, embedding_dim), in units of deviations."""
    answer = prior(
        noisy,
        timesteps,
        proj_embedding=_scaled(told["embedding"]),
        encoder_hidden_states=told["features"],
        attention_mask=told["mask"],
    )
    return answer.predicted_image_embedding.float()


def draw_embeddings(
    prior: Any,
    told: Condition,
    nothing: Condition,
    seeds: Tensor,
    num_steps: int = 25,
    guidance_scale: float = 1.0,
    candidates: int = CANDIDATES,
    sampler: SamplerName = "ddpm",
) -> Tensor:
    """Image embeddings for captions: unit vectors, float32 (batch, embedding_dim).

    Args:
        prior, told, nothing, seeds, num_steps, guidance_scale, sampler: as of `sample_embeddings`.
        candidates: draws for each; the one with the largest dot product with the caption's embedding is kept.
    """
    drawn = []
    for number in range(candidates):
        own = derive_seeds(seeds, f"candidate {number}")
        found = sample_embeddings(prior, told, nothing, own, num_steps, guidance_scale, sampler)
        drawn.append(normalize(found, dim=1))
    return nearest(torch.stack(drawn), told["embedding"])


def sample_embeddings(
    prior: Any,
    told: Condition,
    nothing: Condition,
    seeds: Tensor,
    num_steps: int = 25,
    guidance_scale: float = 1.0,
    sampler: SamplerName = "ddpm",
) -> Tensor:
    """One draw for each caption, as the prior's distribution has it: float32 (batch, embedding_dim), of any length.

    Args:
        prior: a PriorTransformer with the statistics of its CLIP.
        told, nothing: of the captions, and of the empty one (see `read_captions`); NOTHING where there is no guidance.
        seeds: int64 (batch,): an embedding depends on its caption and seed alone.
        num_steps, guidance_scale, sampler: as for pictures.
    """
    settings = sampler_settings("cosine", "sample", TIMESTEPS, clip=True) | {"clip_sample_range": _RANGE}

    def denoise(noisy: Tensor, timesteps: Tensor, told: Condition) -> Tensor:
        return predict(prior, noisy, timesteps, told)

    stepper, shape = make_sampler(sampler, settings), (prior.clip_mean.shape[1],)
    found = sample(denoise, shape, seeds, stepper, num_steps, told, nothing, Guidance(guidance_scale))
    return found * prior.clip_std + prior.clip_mean


def nearest(candidates: Tensor, embeddings: Tensor) -> Tensor:
    """Of candidates (n, batch, dim) for each of the batch the one of the largest dot product with its embedding."""
    best = (candidates * embeddings).sum(2).argmax(0)
    return candidates[best, torch.arange(len(best), device=best.device)]


def _scaled(embeddings: Tensor) -> Tensor:
    """Unit vectors with features of the size of 1."""
    return embeddings * embeddings.shape[1] ** 0.5
