"""DDIM for every schedule and prediction type, and what else diffusers' own samplers leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Level = tuple[Tensor, Tensor]
"""a_t and b_t of x_t = a_t x + b_t ε, scalars."""


def ddim_step(
    clean: Tensor,
    epsilon: Tensor,
    level: Level,
    next_level: Level,
    eta: float = 0.0,
    generator: Any = None,
) -> Tensor:
    """From x_t = a_t x + b_t ε to x_s, at less noise: Song, Meng and Ermon, "DDIM" (ICLR 2021), eq. 12 and 16.

    Args:
        clean, epsilon: x and ε that the denoiser sees in x_t.
        level, next_level: (a_t, b_t) and (a_s, b_s); any a and b, not only a² + b² = 1.
        eta: 0 is deterministic, 1 is ancestral sampling (Ho et al. 2020, with the posterior's own variance).
        generator: for eta > 0, one of torch's or a list of one per sample.
    """
    (signal, noise), (next_signal, next_noise) = level, next_level
    added = noise**2 - (signal / next_signal * next_noise) ** 2  # the variance of q(x_t | x_s)
    deviation = eta * next_noise / noise * added.clamp(min=0).sqrt()
    result = next_signal * clean + (next_noise**2 - deviation**2).clamp(min=0).sqrt() * epsilon
    if eta > 0:
        fresh = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        result = result + deviation * fresh
    return result


class DDIMSampler(DDIMScheduler):
    """DDIM on the grid itself: every step ends at the timestep where the next begins.

    diffusers' own step goes to t − T // n: the same where n divides T, and slightly off the grid elsewhere, so that
    the last step may leave noise behind.
    """

    eta = 0.0

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One step; returns the next latents alone."""
        return (ddim_step(*self.split(model_output, timestep, sample), self.eta, generator),)

    def split(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Level, Level]:
        """x and ε that a prediction implies, and (a, b) at the timestep and at the next one."""
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
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return clean, epsilon, (signal, noise), (next_alpha_bar.sqrt(), (1 - next_alpha_bar).sqrt())


class FlowSampler(FlowMatchEulerDiscreteScheduler):
    """Equal steps along a flow from noise to data; with `eta` 0 Euler's method, which for a flow is DDIM as well."""

    eta = 0.0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
        """Equal steps down to 0 (diffusers' own default ends with one of 1/T)."""
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(sigmas=sigmas.tolist(), device=device)

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One step; returns the next latents alone."""
        return (ddim_step(*self.split(model_output, timestep, sample), self.eta, generator),)

    def split(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Level, Level]:
        """x and ε that a prediction implies, and (a, b) at the timestep and at the next one."""
        index = int((self.timesteps == timestep).nonzero()[0])
        time, next_time = self.sigmas[index], self.sigmas[index + 1]
        clean, epsilon = sample - time * model_output, sample + (1 - time) * model_output
        return clean, epsilon, (1 - time, time), (1 - next_time, next_time)


class EdmSampler(EDMEulerScheduler):
    """EDM's noise levels (Karras et al. 2022, eq. 5), by DDIM; with `eta` 0 that is Euler's method."""

    eta = 0.0

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One step; returns the next latents alone, x + σ n."""
        if self.step_index is None:
            self._init_step_index(timestep)
        result = ddim_step(*self.split(model_output, timestep, sample), self.eta, generator)
        self._step_index += 1
        return (result,)

    def scale(self, timestep: Tensor) -> Tensor:
        """c_in: what latents are multiplied by before the network sees them."""
        return (torch.exp(8 * timestep.double()) + self.config.sigma_data**2).rsqrt()

    def split(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Level, Level]:
        """x and ε that a prediction implies, and (1, σ) at the timestep and at the next one."""
        index = int((self.timesteps == timestep).nonzero()[0])
        sigma, next_sigma = self.sigmas[index], self.sigmas[index + 1]
        clean = self.precondition_outputs(sample, model_output, sigma)
        one = torch.ones(())
        return clean, (sample - clean) / sigma, (one, sigma), (one, next_sigma)


class EdmHeunSampler(EDMEulerScheduler):
    """EDM's second-order steps (Karras et al. 2022, algorithm 1), without churn; the last one is Euler's."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
        """Each timestep but the first is there twice: the end of one step, and the beginning of the next."""
        super().set_timesteps(num_inference_steps, device)
        timesteps: Tensor = self.timesteps  # type: ignore[has-type]
        sigmas: Tensor = self.sigmas  # type: ignore[has-type]
        self.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        self.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        self._began: tuple[Tensor, Tensor, Tensor] | None = None

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Half a step; returns the next latents alone, x + σ n."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, next_sigma = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        slope = (sample - self.precondition_outputs(sample, model_output, sigma)) / sigma
        self._step_index += 1
        if self._began is None:
            if next_sigma > 0:
                self._began = (sample, slope, sigma)
            return (sample + (next_sigma - sigma) * slope,)
        (start, first_slope, first_sigma), self._began = self._began, None
        return (start + (sigma - first_sigma) * (first_slope + slope) / 2,)


class EulerAncestralSampler(EulerAncestralDiscreteScheduler):
    """diffusers' Euler-ancestral steps, also where the clean sample is predicted, which they lack."""

    predicts_sample = False

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = False,
    ) -> Any:
        if self.predicts_sample:
            if self.step_index is None:
                self._init_step_index(timestep)
            model_output = (sample - model_output) / self.sigmas[self.step_index]
        return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)


def seeded(seeds: Tensor) -> list[torch.Generator]:
    """A generator per sample, on the CPU so that every device draws the same."""
    return [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds.tolist()]
