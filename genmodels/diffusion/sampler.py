"""From noise to samples: diffusers' samplers, driven so that a sample depends on its condition and seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from genmodels.diffusion.config import PredictionType, ScheduleName
from genmodels.diffusion.noise_schedule import SCHEDULES
from genmodels.random import derive_seeds, normal

SamplerName = Literal["ddpm", "ddim", "dpm_solver++"]


class DDIMSampler(DDIMScheduler):
    """Deterministic DDIM whose every step ends at the timestep where the next begins (Song et al. 2021, eq. 12).

    diffusers' own step goes to t − T // n: the same where n divides T, and slightly off the grid elsewhere, so that
    the last step may leave noise behind.
    """

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One step; returns the next latents alone. `generator` is not read: no noise is drawn."""
        later = self.timesteps[self.timesteps < timestep]
        alpha_bar = self.alphas_cumprod[timestep.cpu()]
        next_alpha_bar = self.alphas_cumprod[later[0].cpu()] if len(later) else self.final_alpha_cumprod
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.config.prediction_type == "epsilon":
            clean, epsilon = (sample - noise * model_output) / signal, model_output
        elif self.config.prediction_type == "v_prediction":
            clean, epsilon = signal * sample - noise * model_output, signal * model_output + noise * sample
        else:
            clean, epsilon = model_output, (sample - signal * model_output) / noise
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return (next_alpha_bar.sqrt() * clean + (1 - next_alpha_bar).sqrt() * epsilon,)


SAMPLERS: dict[str, type] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMSampler,
    "dpm_solver++": DPMSolverMultistepScheduler,
}

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""denoise(latents (batch, …), timesteps (batch,), condition (batch, …) | None) -> prediction like the latents."""


def sampler_settings(
    noise_schedule: ScheduleName,
    prediction_type: PredictionType,
    train_timesteps: int = 1000,
    clip: bool = False,
    zero_terminal_snr: bool = False,
) -> dict[str, Any]:
    """The settings that training fixes, as diffusers names them; a model's export and our own sampling share them.

    Steps are spaced from the noisiest timestep down ("trailing"; Lin et al., "Common Diffusion Noise Schedules and
    Sample Steps Are Flawed", WACV 2024), save where ε is predicted on the cosine schedule: there x = (x_t − …ε)/√ᾱ_T
    divides by 5e-5, and the first steps would be noise.
    """
    name, first, last = SCHEDULES[noise_schedule]
    spacing = "leading" if (prediction_type, noise_schedule) == ("epsilon", "cosine") else "trailing"
    return {
        "num_train_timesteps": train_timesteps,
        "beta_schedule": name,
        "beta_start": first,
        "beta_end": last,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "steps_offset": 1,  # what diffusers' Stable Diffusion pipeline insists on; read under "leading" only
        "set_alpha_to_one": True,  # the last step lands on the clean sample itself
        "clip_sample": clip,
        "rescale_betas_zero_snr": zero_terminal_snr,
    }


def make_sampler(name: SamplerName, settings: dict[str, Any]) -> Any:
    """A fresh diffusers sampler; it keeps state from step to step, so each drawing makes its own.

    Args:
        name: "ddpm" (ancestral), "ddim" (deterministic; Song et al. 2021) or "dpm_solver++" (second order, multistep;
            Lu et al. 2022).
        settings: as `sampler_settings` gives, or the `config` of a sampler that a model was saved with.

    Raises:
        ValueError: no sampler of that name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    own = {"algorithm_type": "dpmsolver++", "solver_order": 2} if name == "dpm_solver++" else {}
    known = {key: value for key, value in settings.items() if not key.startswith("_")}
    return SAMPLERS[name].from_config({**known, **own})  # type: ignore[attr-defined]


def guided(denoise: Denoise, condition: Tensor | None, negative: Tensor | None, guidance_scale: float) -> Denoise:
    """Classifier-free guidance, u + s (c − u), as one pass over a doubled batch (Ho and Salimans 2022, eq. 6).

    With `guidance_scale` 1, or without a negative condition, it is the conditional model in a single pass.
    """
    if condition is None or negative is None or guidance_scale == 1:
        return lambda latents, timesteps, _: denoise(latents, timesteps, condition)
    both = torch.cat([negative, condition])

    def denoise_guided(latents: Tensor, timesteps: Tensor, _: Tensor | None) -> Tensor:
        doubled = denoise(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
        unconditional, conditional = doubled.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise_guided


def sample(
    denoise: Denoise,
    shape: tuple[int, ...],
    seeds: Tensor,
    sampler: Any,
    num_steps: int,
    condition: Tensor | None = None,
    negative: Tensor | None = None,
    guidance_scale: float = 1.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw one sample per seed; each depends on its own seed and condition, not on the batch.

    Args:
        denoise: the model.
        shape: of one sample, (channels, height, width).
        seeds: int64 (batch,), on the device to draw on.
        sampler: from `make_sampler`.
        num_steps: denoising steps, 1 … the model's training timesteps.
        condition, negative: (batch, …) each, what to draw and what to steer away from.
        guidance_scale: 1 is the conditional model; more follows the condition more closely.
        on_step: called with the number of steps done.

    Returns:
        float32 (batch, *shape).

    Raises:
        ValueError: `num_steps` is out of range.
    """
    limit = sampler.config.num_train_timesteps - (sampler.config.timestep_spacing == "leading")
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps is {num_steps}, this model takes 1 to {limit}")
    denoise = guided(denoise, condition, negative, guidance_scale)
    sampler.set_timesteps(num_steps, device=seeds.device)
    # Ancestral steps draw further noise: one generator per sample, on the CPU so that every device draws the same.
    generators = [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in derive_seeds(seeds, "sampler").tolist()]
    latents = normal(seeds, shape, "initial") * sampler.init_noise_sigma
    for index, timestep in enumerate(sampler.timesteps):
        timesteps = timestep.expand(len(seeds))
        prediction = denoise(sampler.scale_model_input(latents, timestep), timesteps, None).float()
        latents = sampler.step(prediction, timestep, latents, generator=generators, return_dict=False)[0]
        if on_step is not None:
            on_step(index + 1)
    return latents
