"""Denoisers trained on N(0, s²) by the objective itself, against the optimal loss, which is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genmodels import random
from genmodels.families import build_objective
from tests.genmodels import tiny
from tests.genmodels.diffusion.test_sampler import COMBINATIONS

DEVIATION = 0.5
PIXELS = {"autoencoder": None, "text_encoder": {"kind": "none"}, "sigma_data": DEVIATION}
STEPS, BATCH, JUDGED = 400, 256, 40_000


class GainByTimestep(nn.Module):
    """Answers g(t) x_t: the family that holds the optimum for Gaussian data, whatever is predicted."""

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.gain = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, latents, timesteps, condition):
        signal, noise = (part.float() for part in self.schedule.coefficients(timesteps))
        log_snr = 2 * (signal.clamp(min=1e-3) / noise.clamp(min=1e-3)).log()
        gain = self.gain(
            torch.stack([log_snr / 5, torch.sigmoid(log_snr), self.schedule.position(timesteps).float()], 1)
        )
        return gain[:, :, None, None] * latents


def batch(first: int, count: int) -> dict:
    seeds = torch.arange(first, first + count)
    return {"images": DEVIATION * random.normal(seeds, (1, 4, 4), "image"), "seeds": seeds, "weight": torch.ones(count)}


def optimal_loss(objective, timesteps):
    """E ‖τ‖² − E[τ x_t]²/E[x_t²] of the target τ = p x + q ε, at x_t = a x + b ε; (batch,)."""
    schedule, kind = objective.noise_schedule, objective.config.prediction_type
    signal, noise = schedule.coefficients(timesteps)
    one, zero = torch.ones(len(timesteps), 1, dtype=torch.float64), torch.zeros(len(timesteps), 1, dtype=torch.float64)
    of_x, of_noise = (schedule.target(kind, x, e, timesteps)[:, 0] for x, e in ((one, zero), (zero, one)))
    variance = signal**2 * DEVIATION**2 + noise**2
    shared = of_x * signal * DEVIATION**2 + of_noise * noise
    return of_x**2 * DEVIATION**2 + of_noise**2 - shared**2 / variance


def test_the_optimal_loss_of_epsilon_is_the_closed_form():
    objective = build_objective(tiny.diffusion_config(**PIXELS, prediction_type="epsilon"))
    timesteps = torch.arange(1000)
    alpha_bar = objective.noise_schedule.alpha_bar
    expected = alpha_bar * DEVIATION**2 / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
    torch.testing.assert_close(optimal_loss(objective, timesteps), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("noise_schedule", "prediction_type"), COMBINATIONS)
def test_a_trained_denoiser_comes_close_to_the_optimal_loss_and_does_not_beat_it(noise_schedule, prediction_type):
    torch.manual_seed(0)
    config = tiny.diffusion_config(**PIXELS, noise_schedule=noise_schedule, prediction_type=prediction_type)
    objective = build_objective(config)
    objective.denoiser = denoiser = GainByTimestep(objective.noise_schedule)
    optimizer = torch.optim.Adam(denoiser.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        objective.loss(batch(step * BATCH, BATCH)).loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        judged = batch(10**6, JUDGED)
        timesteps = objective.noise_schedule.timesteps(objective._positions(judged["seeds"]))
        per_sample, _ = objective._errors(judged, judged["images"], timesteps, {})
    best = optimal_loss(objective, timesteps)
    excess = (per_sample - best).mean().item()
    error = (per_sample - best).std().item() / JUDGED**0.5
    assert -4 * error < excess < 0.05 * best.mean().item() + 4 * error, (excess, error, best.mean().item())
