"""Variances of the ancestral steps, learnt: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models"
(ICML 2021), section 3.1.

The denoiser has twice the channels: the second half, v in [-1, 1] or near it, places each variance between the two that
are known to bound it, β̃ (v = -1) and β (v = 1), in the logarithm. It learns from the variational bound, which passes no
gradient on to the prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genmodels.diffusion.config import PredictionType
from genmodels.diffusion.noise_schedule import DiffusionSchedule

BOUND_WEIGHT = 1e-3  # λ of the hybrid objective (eq. 16), of the bound as a sum over all timesteps


def log_variance(schedule: DiffusionSchedule, variance: Tensor, timesteps: Tensor) -> Tensor:
    """ln Σ of the step from t to t − 1, shaped like `variance`, the network's v: eq. 15."""
    beta, posterior, _, _ = _step(schedule, timesteps, variance)
    share = (variance + 1) / 2
    return share * beta.log() + (1 - share) * posterior.log()


def variational_bound(
    schedule: DiffusionSchedule,
    prediction_type: PredictionType,
    prediction: Tensor,
    variance: Tensor,
    x: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """L_t in bits per dimension, (batch,): the divergence of the model's step from the true one; at t = 0 a density.

    Args:
        schedule: of the training.
        prediction_type: of `prediction`.
        prediction, variance: both halves of the network's output, (batch, channels, height, width) each.
        x, noisy: clean and noisy samples.
        timesteps: int64 (batch,).
    """
    _, posterior, clean_share, noisy_share = _step(schedule, timesteps, x)
    with torch.no_grad():
        predicted = schedule.to_sample(prediction_type, prediction, noisy, timesteps)
        mean, true_mean = (clean_share * clean + noisy_share * noisy for clean in (predicted, x))
    log_var, true_log_var = log_variance(schedule, variance, timesteps), posterior.log()
    divergence = 0.5 * (
        log_var - true_log_var + torch.exp(true_log_var - log_var) + (true_mean - mean).square() / log_var.exp() - 1
    )
    density = 0.5 * (math.log(2 * math.pi) + log_var + (x - mean).square() / log_var.exp())
    first = (timesteps == 0).reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(first, density, divergence).flatten(1).mean(1) / math.log(2)


def _step(schedule: DiffusionSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """β_t, β̃_t, and the shares of x and x_t in the mean of q(x_{t-1} | x_t, x): Ho et al. 2020, eq. 6 and 7.

    β̃ is 0 at the first timestep: there it is the next one's, as the reference has it.
    """
    alpha_bar = schedule.alpha_bar.to(timesteps.device)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    posterior = torch.cat([posterior[1:2], posterior[1:]])
    clean_share = before.sqrt() * beta / (1 - alpha_bar)
    noisy_share = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
    shape = (-1, *[1] * (like.dim() - 1))
    beta, posterior, clean_share, noisy_share = (
        values[timesteps].reshape(shape).to(like.dtype) for values in (beta, posterior, clean_share, noisy_share)
    )
    return beta, posterior, clean_share, noisy_share
