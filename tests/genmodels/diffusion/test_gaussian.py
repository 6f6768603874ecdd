"""A denoiser trained on N(0, s²) against the optimal loss, which is known."""

from __future__ import annotations

import torch
from torch import nn

from genmodels import random
from genmodels.diffusion.noise_schedule import NoiseSchedule


class GainByTimestep(nn.Module):
    """ε̂ = g(t) x: the family that holds the optimum for Gaussian data."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return self.gain(torch.stack([log_snr / 5, torch.sigmoid(log_snr)], -1)) * x


def test_a_trained_denoiser_comes_close_to_the_optimal_loss_and_does_not_beat_it():
    torch.manual_seed(0)
    deviation, schedule = 0.5, NoiseSchedule.named("scaled_linear")
    log_snr = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log().float()
    optimal = schedule.alpha_bar * deviation**2 / (schedule.alpha_bar * deviation**2 + 1 - schedule.alpha_bar)
    denoiser = GainByTimestep()

    def losses(seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = deviation * random.normal(seeds, (16,), "latent")
        noise, timesteps = random.normal(seeds, (16,), "noise"), random.integers(seeds, 1000)
        noisy = schedule.q_sample(x, timesteps, noise)
        return (denoiser(noisy, log_snr[timesteps]) - noise).square().mean(1), timesteps

    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    schedule_lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for step in range(600):
        optimizer.zero_grad()
        losses(torch.arange(step * 256, (step + 1) * 256))[0].mean().backward()
        optimizer.step()
        schedule_lr.step()
    with torch.no_grad():
        per_sample, timesteps = losses(torch.arange(10**6, 10**6 + 40_000))
    best = optimal.mean().item()
    error = (per_sample - optimal[timesteps].float()).std().item() / 200
    excess = (per_sample - optimal[timesteps].float()).mean().item()
    assert -4 * error < excess < 0.05 * best + 4 * error, (excess, error, best)
