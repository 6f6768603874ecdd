"""The forward process of diffusion: q(x_t | x) = N(√ᾱ_t x, (1 − ᾱ_t) I), and what a network may predict of it.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), eq. 4; the cosine schedule of Nichol
and Dhariwal (ICML 2021), eq. 17; v of Salimans and Ho, "Progressive Distillation" (ICLR 2022), appendix D;
schedules that end in pure noise of Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are
Flawed" (WACV 2024), algorithm 1.
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


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t for t = 0 … T−1, float64, and the closed forms that follow from it.

    Methods take `timesteps` int64 (batch,) and tensors (batch, …); coefficients are computed in float64 and then
    rounded to the tensors' type.
    """

    alpha_bar: Tensor

    @staticmethod
    def named(name: ScheduleName, num_steps: int = 1000, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """The linear, scaled-linear or cosine schedule of `num_steps` steps; optionally one that ends in pure noise."""
        alpha_bar = torch.cumprod(1 - betas(name, num_steps), dim=0)
        return NoiseSchedule(end_in_noise(alpha_bar) if zero_terminal_snr else alpha_bar)

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), each (batch, 1, …) so that it multiplies `like`."""
        alpha_bar = self.alpha_bar.to(timesteps.device)[timesteps].reshape(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)

    def min_snr_weight(self, prediction_type: PredictionType, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights (batch,) float32 of squared errors of a prediction that amount to min(SNR, γ) on errors of x.

        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023), section 3.4. An error of
        x is one of ε times 1/√SNR, and one of v times 1/√(SNR + 1).
        """
        alpha_bar = self.alpha_bar.to(timesteps.device)[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
        return (snr.clamp(max=gamma) / scale).float()

    def q_sample(self, x: Tensor, timesteps: Tensor, epsilon: Tensor) -> Tensor:
        """x_t = √ᾱ_t x + √(1 − ᾱ_t) ε."""
        signal, noise = self.signal_and_noise(timesteps, x)
        return signal * x + noise * epsilon

    def target(self, prediction_type: PredictionType, x: Tensor, epsilon: Tensor, timesteps: Tensor) -> Tensor:
        """What a network of `prediction_type` should answer: ε, v = √ᾱ_t ε − √(1 − ᾱ_t) x, or x."""
        if prediction_type == "epsilon":
            return epsilon
        if prediction_type == "sample":
            return x
        signal, noise = self.signal_and_noise(timesteps, x)
        return signal * epsilon - noise * x

    def to_sample(self, prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The clean sample that a prediction at x_t implies."""
        if prediction_type == "sample":
            return prediction
        signal, noise = self.signal_and_noise(timesteps, x_t)
        if prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal
        return signal * x_t - noise * prediction

    def to_epsilon(self, prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction at x_t implies."""
        if prediction_type == "epsilon":
            return prediction
        signal, noise = self.signal_and_noise(timesteps, x_t)
        if prediction_type == "sample":
            return (x_t - signal * prediction) / noise
        return noise * x_t + signal * prediction
