"""The forward process x_t = a_t x + b_t ε, and what a network may predict of it.

Diffusion has a_t = √ᾱ_t and b_t = √(1 − ᾱ_t), for whole timesteps; a flow goes straight, a_t = 1 − t/T and b_t = t/T.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), eq. 4; the cosine schedule of Nichol
and Dhariwal (ICML 2021), eq. 17; v of Salimans and Ho, "Progressive Distillation" (ICLR 2022), appendix D;
schedules that end in pure noise of Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are
Flawed" (WACV 2024), algorithm 1. Straight flows: Liu, Gong and Liu (ICLR 2023), Lipman et al. (ICLR 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genmodels.diffusion.config import PredictionType, ScheduleName

# Name in diffusers' configurations, first and last β (the cosine schedule has none).
SCHEDULES: dict[str, tuple[str, float, float]] = {
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}


def betas(name: ScheduleName, num_steps: int = 1000) -> Tensor:
    """β_1 … β_T of a schedule, float64 (num_steps,), equal to diffusers' of that name."""
    _, first, last = SCHEDULES[name]
    if name == "linear":
        return torch.linspace(first, last, num_steps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(first), math.sqrt(last), num_steps, dtype=torch.float64) ** 2
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


def end_in_noise(alpha_bar: Tensor) -> Tensor:
    """ᾱ with √ᾱ shifted and scaled so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


class NoiseSchedule:
    """a_t and b_t, and the closed forms that follow from them.

    Methods take `timesteps` (batch,) and tensors (batch, …); coefficients are computed in float64 and then rounded to
    the tensors' type.
    """

    num_steps: int  # T

    @staticmethod
    def named(
        name: ScheduleName,
        num_steps: int = 1000,
        zero_terminal_snr: bool = False,
        flow_shift: float = 1.0,
        **edm: float,
    ) -> NoiseSchedule:
        """A schedule of `num_steps` steps by its name.

        Args:
            name: "linear", "scaled_linear", "cosine", "flow" or "edm".
            num_steps: T.
            zero_terminal_snr: end in pure noise, as a flow always does.
            flow_shift: see `FlowSchedule`.
            edm: `sigma_data`, `mean` and `std` of `EdmSchedule`.
        """
        if name == "edm":
            return EdmSchedule(num_steps, **edm)
        if name == "flow":
            return FlowSchedule(num_steps, flow_shift)
        alpha_bar = torch.cumprod(1 - betas(name, num_steps), dim=0)
        return DiffusionSchedule(end_in_noise(alpha_bar) if zero_terminal_snr else alpha_bar)

    def timesteps(self, position: Tensor) -> Tensor:
        """The timesteps at `position`, float64 (batch,) in [0, 1): 0 is clean, 1 is noise."""
        raise TypeError

    def position(self, timesteps: Tensor) -> Tensor:
        """Where timesteps are in the schedule, float64 (batch,) from 0, clean, to 1, noise."""
        return timesteps.double() / self.num_steps

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, float64 (batch,)."""
        raise TypeError

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, each (batch, 1, …) so that it multiplies `like`."""
        signal, noise = (c.reshape(-1, *[1] * (like.dim() - 1)) for c in self.coefficients(timesteps))
        return signal.to(like.dtype), noise.to(like.dtype)

    def min_snr_weight(self, prediction_type: PredictionType, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights (batch,) float32 of squared errors of a prediction that amount to min(SNR, γ) on errors of x.

        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023), section 3.4. An error of
        x is one of ε times b/a, one of v times b (a² + b² = 1), and one of a flow times b (a + b = 1).
        """
        signal, noise = self.coefficients(timesteps)
        snr = (signal / noise).square()
        if prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1).float()
        share = torch.ones_like(snr) if prediction_type == "sample" else noise.square()
        return (snr.clamp(max=gamma) * share).float()

    def q_sample(self, x: Tensor, timesteps: Tensor, epsilon: Tensor) -> Tensor:
        """x_t = a_t x + b_t ε."""
        signal, noise = self.signal_and_noise(timesteps, x)
        return signal * x + noise * epsilon

    def target(self, prediction_type: PredictionType, x: Tensor, epsilon: Tensor, timesteps: Tensor) -> Tensor:
        """What a network of `prediction_type` should answer: ε, v = a_t ε − b_t x, x, or the flow ε − x."""
        if prediction_type == "epsilon":
            return epsilon
        if prediction_type == "sample":
            return x
        if prediction_type == "flow":
            return epsilon - x
        signal, noise = self.signal_and_noise(timesteps, x)
        return signal * epsilon - noise * x

    def to_sample(self, prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The clean sample that a prediction at x_t implies."""
        if prediction_type == "sample":
            return prediction
        signal, noise = self.signal_and_noise(timesteps, x_t)
        if prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal
        if prediction_type == "flow":
            return x_t - noise * prediction
        return signal * x_t - noise * prediction

    def to_epsilon(self, prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction at x_t implies."""
        if prediction_type == "epsilon":
            return prediction
        signal, noise = self.signal_and_noise(timesteps, x_t)
        if prediction_type == "sample":
            return (x_t - signal * prediction) / noise
        if prediction_type == "flow":
            return x_t + signal * prediction
        return noise * x_t + signal * prediction


@dataclass(frozen=True)
class DiffusionSchedule(NoiseSchedule):
    """Variance-preserving diffusion: ᾱ_t for the whole timesteps t = 0 … T−1, float64."""

    alpha_bar: Tensor

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        return len(self.alpha_bar)

    def timesteps(self, position: Tensor) -> Tensor:
        return (position * self.num_steps).long().clamp_(max=self.num_steps - 1)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(timesteps.device)[timesteps]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """The straight line from x (t = 0) to ε (t = T), for every t between.

    With `shift` s, positions p are moved to s p / (1 + (s − 1) p), towards the noise: what large images need (Esser et
    al., "Scaling Rectified Flow Transformers", ICML 2024, eq. 23).
    """

    num_steps: int = 1000
    shift: float = 1.0

    def timesteps(self, position: Tensor) -> Tensor:
        return self.num_steps * self.shift * position / (1 + (self.shift - 1) * position)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        time = timesteps.double() / self.num_steps
        return 1 - time, time


@dataclass(frozen=True)
class EdmSchedule(NoiseSchedule):
    """x + σ n for noise levels of which ln σ is normal, scaled to unit deviation as the network sees it.

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (NeurIPS 2022), table 1: with
    c_in = 1/√(σ² + σ_data²), a = c_in and b = σ c_in; the network's timestep is c_noise = ln(σ)/4, and its target,
    whose errors weigh the same at every level, (x − c_skip (x + σ n))/c_out. With σ_data = 1 that is −v.
    """

    num_steps: int = 1000
    sigma_data: float = 1.0
    mean: float = -1.2
    std: float = 1.2

    def timesteps(self, position: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(position.clamp(1e-6, 1 - 1e-6))) / 4

    def position(self, timesteps: Tensor) -> Tensor:
        return torch.special.ndtr((4 * timesteps.double() - self.mean) / self.std)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(4 * timesteps.double())
        scale = (sigma**2 + self.sigma_data**2).rsqrt()
        return scale, sigma * scale

    def target(self, prediction_type: PredictionType, x: Tensor, epsilon: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = self.signal_and_noise(timesteps, x)
        return noise * x / self.sigma_data - self.sigma_data * signal * epsilon

    def to_sample(self, prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = self.signal_and_noise(timesteps, x_t)
        return self.sigma_data**2 * signal * x_t + self.sigma_data * noise * prediction

    def to_epsilon(self, prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = self.signal_and_noise(timesteps, x_t)
        return (x_t - signal * self.to_sample(prediction_type, prediction, x_t, timesteps)) / noise
