"""From noise to samples: diffusers' samplers, driven so that a sample depends on its condition and seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from genmodels.diffusion.config import PredictionType, ScheduleName
from genmodels.diffusion.ddim import (
    DDIMSampler,
    EdmHeunSampler,
    EdmSampler,
    EulerAncestralSampler,
    FlowSampler,
    ddim_step,
    seeded,
)
from genmodels.diffusion.noise_schedule import SCHEDULES
from genmodels.random import derive_seeds, normal

SamplerName = Literal["ddpm", "ddim", "dpm_solver++", "euler", "heun", "euler_ancestral"]

SAMPLERS: dict[str, type] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMSampler,
    "dpm_solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "euler_ancestral": EulerAncestralSampler,
}
# Along a straight flow, and for edm, DDIM is Euler's method, and both ancestral samplers are DDIM with eta 1.
FLOW_SAMPLERS: dict[str, type] = {
    "ddpm": FlowSampler,
    "ddim": FlowSampler,
    "dpm_solver++": DPMSolverMultistepScheduler,
    "euler": FlowSampler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "euler_ancestral": FlowSampler,
}
EDM_SAMPLERS: dict[str, type] = {
    "ddpm": EdmSampler,
    "ddim": EdmSampler,
    "dpm_solver++": EDMDPMSolverMultistepScheduler,
    "euler": EdmSampler,
    "heun": EdmHeunSampler,
    "euler_ancestral": EdmSampler,
}
_DRAW_NOISE = (DDPMScheduler, DDIMSampler, EulerAncestralSampler, FlowSampler, EdmSampler)

_LARGEST_THRESHOLD = 1000.0  # diffusers takes the smaller of this and the share's value; no image comes near it

Condition = Mapping[str, Tensor]
"""What the model is told of each sample, by kind: (batch, …) each; empty where it is told nothing."""
Denoise = Callable[[Tensor, Tensor, Condition], Tensor]
"""denoise(latents (batch, …), timesteps (batch,), condition) -> prediction like the latents."""
NOTHING: Condition = {}


def sampler_settings(
    noise_schedule: ScheduleName,
    prediction_type: PredictionType,
    train_timesteps: int = 1000,
    clip: bool = False,
    zero_terminal_snr: bool = False,
    flow_shift: float = 1.0,
    sigma_data: float = 1.0,
    learned_variance: bool = False,
    dynamic_thresholding: float | None = None,
) -> dict[str, Any]:
    """The settings that training fixes, as diffusers names them; a model's export and our own sampling share them.

    Steps are spaced from the noisiest timestep down ("trailing"; Lin et al., "Common Diffusion Noise Schedules and
    Sample Steps Are Flawed", WACV 2024), save where ε is predicted on the cosine schedule: there x = (x_t − …ε)/√ᾱ_T
    divides by 5e-5, and the first steps would be noise.
    """
    if noise_schedule == "edm":
        return {"num_train_timesteps": train_timesteps, "sigma_data": sigma_data, "prediction_type": "epsilon"}
    if noise_schedule == "flow":
        return {
            "num_train_timesteps": train_timesteps,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": flow_shift,
        }
    name, first, last = SCHEDULES[noise_schedule]
    spacing = "leading" if (prediction_type, noise_schedule) == ("epsilon", "cosine") else "trailing"
    settings = {
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
    if dynamic_thresholding is not None:  # Saharia et al. 2022, section 2.3
        settings |= {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": dynamic_thresholding}
        settings |= {"sample_max_value": _LARGEST_THRESHOLD}
    return {**settings, "variance_type": "learned_range"} if learned_variance else settings


def make_sampler(name: SamplerName, settings: dict[str, Any], eta: float = 0.0) -> Any:
    """A fresh diffusers sampler; it keeps state from step to step, so each drawing makes its own.

    Args:
        name: "ddpm" (ancestral), "ddim" (Song et al. 2021), "dpm_solver++" (second order, multistep; Lu et al. 2022),
            "euler", "heun" (second order, two passes a step; both Karras et al. 2022) or "euler_ancestral".
        settings: as `sampler_settings` gives, or the `config` of a sampler that a model was saved with.
        eta: of "ddim" alone, 0 … 1: how much of each step's noise is drawn anew; 0 is deterministic.

    Raises:
        ValueError: no sampler of that name, an eta that it does not take, or a model that it cannot draw from.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1 or (eta and name != "ddim"):
        raise ValueError(f"eta is {eta} with sampler {name}: only ddim takes one, from 0 to 1")
    flow, edm = settings.get("prediction_type") == "flow_prediction", "sigma_data" in settings
    known = {key: value for key, value in settings.items() if not key.startswith("_")}
    if name != "ddpm":
        known.pop("variance_type", None)  # `sample` leaves it out, and diffusers' DPM-Solver would by itself
    if name == "dpm_solver++" and not edm:
        known |= {"algorithm_type": "dpmsolver++", "solver_order": 2}
    elif flow:
        known = {"num_train_timesteps": known["num_train_timesteps"], "shift": known.get("flow_shift", 1.0)}
    elif name == "heun" and known.get("rescale_betas_zero_snr"):
        raise ValueError("heun cannot start from pure noise (zero_terminal_snr): use ddim, euler or dpm_solver++")
    predicts_sample = not edm and name == "euler_ancestral" and known.get("prediction_type") == "sample"
    if predicts_sample:
        known["prediction_type"] = "epsilon"
    chosen = (EDM_SAMPLERS if edm else FLOW_SAMPLERS if flow else SAMPLERS)[name]
    sampler: Any = chosen.from_config(known)  # type: ignore[attr-defined]
    if isinstance(sampler, (DDIMSampler, FlowSampler, EdmSampler)):
        sampler.eta = 1.0 if name in ("ddpm", "euler_ancestral") else eta
    elif isinstance(sampler, EulerAncestralSampler):
        sampler.predicts_sample = predicts_sample
    return sampler


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, u + s (c − u) (Ho and Salimans 2022, eq. 6).

    Raises ValueError where a value is out of range.
    """

    scale: float = 1.0
    """s: 1 is the conditional model; more follows the condition more closely."""
    rescale: float = 0.0
    """0 … 1: how far the result's deviation is brought back to that of c (Lin et al. 2024, section 3.4)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide only where t/T is in it; 1 is pure noise (Kynkäänniemi et al., "Applying Guidance in a Limited Interval
    Improves Sample and Distribution Quality in Diffusion Models", NeurIPS 2024)."""

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.rescale}, must be from 0 to 1")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance_interval is {self.interval}, must be LOW < HIGH from 0 (clean) to 1 (noise)")

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction, (batch, …) like the two that it is made of."""
        result = unconditional + self.scale * (conditional - unconditional)
        if self.rescale == 0:
            return result
        axes = tuple(range(1, result.dim()))
        ratio = conditional.std(axes, keepdim=True) / result.std(axes, keepdim=True)
        return result * (1 + self.rescale * (ratio - 1))


def guided(
    denoise: Denoise,
    condition: Condition,
    negative: Condition,
    guidance: Guidance,
    position: Callable[[float], float] = lambda timestep: timestep / 1000,
) -> Denoise:
    """The guided model, as one pass over a doubled batch. `position` is where a timestep is in the schedule, 0 to 1.

    With a scale of 1, outside the interval, or without a negative condition, it is the conditional model in one pass.
    """
    # What is not steered away from is told both times.
    kinds = condition.keys() if negative else ()
    both = {kind: torch.cat([negative.get(kind, condition[kind]), condition[kind]]) for kind in kinds}
    low, high = guidance.interval

    def denoise_guided(latents: Tensor, timesteps: Tensor, _: Condition) -> Tensor:
        # All samples of a drawing are at the same timestep.
        if not both or guidance.scale == 1 or not low <= position(float(timesteps[0])) <= high:
            return denoise(latents, timesteps, condition)
        doubled = denoise(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
        without, told = doubled.chunk(2)
        channels = latents.shape[1]
        # A variance that comes after the prediction is not steered: it is the conditional model's.
        return torch.cat([guidance.combine(without[:, :channels], told[:, :channels]), told[:, channels:]], dim=1)

    return denoise_guided


def _position(sampler: Any) -> Callable[[float], float]:
    """Where a timestep of `sampler` is in its schedule: 0 is clean, 1 is noise; for edm by the logarithm of σ."""
    config = sampler.config
    if "sigma_data" not in config:
        return lambda timestep: timestep / config.num_train_timesteps
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    return lambda timestep: min(1.0, max(0.0, (4 * timestep - low) / (high - low)))


def sample(
    denoise: Denoise,
    shape: tuple[int, ...],
    seeds: Tensor,
    sampler: Any,
    num_steps: int,
    condition: Condition = NOTHING,
    negative: Condition = NOTHING,
    guidance: Guidance = Guidance(),
    on_step: Callable[[float], None] | None = None,
    initial: Tensor | None = None,
    stop: float = 0.0,
) -> Tensor:
    """Draw one sample per seed; each depends on its own seed and condition, not on the batch.

    Args:
        denoise: the model.
        shape: of one sample, (channels, height, width).
        seeds: int64 (batch,), on the device to draw on.
        sampler: from `make_sampler`.
        num_steps: denoising steps, 1 … the model's training timesteps.
        condition, negative: what to draw and what to steer away from.
        guidance: how strongly.
        on_step: called with the number of steps done; Heun's steps count half of each pass.
        initial: noise to begin with, (batch, *shape) standard normal, in place of the seeds'; what `invert` gives.
        stop: end before the first step that begins at this part of the schedule or below, 0 (clean) to 1 (noise): the
            samples are then still as noisy as the schedule says for `stopped_at`.

    Returns:
        float32 (batch, *shape).

    Raises:
        ValueError: `num_steps` is out of range.
    """
    limit = sampler.config.num_train_timesteps - (sampler.config.get("timestep_spacing") == "leading")
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps is {num_steps}, this model takes 1 to {limit}")
    position = _position(sampler)
    denoise = guided(denoise, condition, negative, guidance, position)
    sampler.set_timesteps(num_steps, device=seeds.device)
    noise = {"generator": seeded(derive_seeds(seeds, "sampler"))} if isinstance(sampler, _DRAW_NOISE) else {}
    latents = normal(seeds, shape, "initial") if initial is None else initial
    latents = latents * getattr(sampler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(sampler.timesteps):
        if stop > 0 and position(float(timestep)) <= stop:
            break
        scaled = sampler.scale_model_input(latents, timestep) if hasattr(sampler, "scale_model_input") else latents
        prediction = denoise(scaled, timestep.expand(len(seeds)), condition).float()
        if sampler.config.get("variance_type") != "learned_range":
            prediction = prediction[:, : latents.shape[1]]
        latents = sampler.step(prediction, timestep, latents, return_dict=False, **noise)[0]
        if on_step is not None:
            on_step((index + 1) * num_steps / len(sampler.timesteps))
    return latents


def stopped_at(sampler: Any, stop: float) -> float:
    """The timestep at which `sample` ended with this `stop`; 0 where it went to the end, which is clean."""
    position = _position(sampler)
    return next((float(t) for t in sampler.timesteps if position(float(t)) <= stop), 0.0) if stop > 0 else 0.0


def invert(
    denoise: Denoise,
    latents: Tensor,
    sampler: Any,
    num_steps: int,
    condition: Condition = NOTHING,
    iterations: int = 5,
) -> Tensor:
    """The noise from which DDIM draws given latents: `sample(…, initial=invert(…))` gives them back.

    Each step is undone by fixed-point iteration on the step itself, so that what comes back differs only as far as that
    has not converged (Pan et al., "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", ICCV
    2023).

    Args:
        denoise: the model, without guidance.
        latents: (batch, channels, height, width), clean.
        sampler: "ddim" of `make_sampler` with eta 0; for flow and edm "euler" as well.
        num_steps: steps, the same as for drawing.
        condition: as for drawing.
        iterations: passes for each step.

    Returns:
        float32, shaped like the latents: the value of `initial` for `sample`.

    Raises:
        ValueError: the sampler is not deterministic DDIM.
    """
    if not isinstance(sampler, (DDIMSampler, FlowSampler, EdmSampler)) or sampler.eta:
        raise ValueError("only ddim with eta 0 can be inverted")
    sampler.set_timesteps(num_steps, device=latents.device)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for timestep in sampler.timesteps.flip(0):
        end = latents
        # For a given prediction p a step is x_s = A x_t + B p. A is 0 where x itself is predicted and x_s is clean.
        gain, share = (ddim_step(*sampler.split(p, timestep, x)) for x, p in ((one, zero), (zero, one)))
        for _ in range(iterations):
            scaled = latents * sampler.scale(timestep) if isinstance(sampler, EdmSampler) else latents
            prediction = denoise(scaled.float(), timestep.expand(len(latents)), condition).float()
            prediction = prediction[:, : latents.shape[1]]
            if gain > 1e-3:
                latents = ((end - share * prediction) / gain).float()
            else:
                latents = latents + sampler.split(prediction, timestep, latents)[2][0] * (end - prediction)
    return latents / getattr(sampler, "init_noise_sigma", 1.0)
