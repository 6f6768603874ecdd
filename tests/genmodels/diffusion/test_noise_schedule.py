"""The forward process against closed forms, in float64, and against diffusers' schedules."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from genmodels.diffusion.noise_schedule import SCHEDULES, EdmSchedule, FlowSchedule, NoiseSchedule, betas

NAMES = sorted(SCHEDULES)


def noised(name: str):
    schedule = NoiseSchedule.named(name)
    generator = torch.Generator().manual_seed(1)
    x, epsilon = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64, generator=generator)
    timesteps = torch.randint(0, 990, (64,), generator=generator)  # the cosine schedule's last ᾱ are below 1e-4
    return schedule, x, epsilon, timesteps, schedule.q_sample(x, timesteps, epsilon)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1000, 100])
def test_betas_are_those_of_diffusers(name, steps):
    diffusers_name, first, last = SCHEDULES[name]
    theirs = DDIMScheduler(steps, first, last, diffusers_name)
    torch.testing.assert_close(betas(name, steps).float(), theirs.betas, rtol=2e-6, atol=2e-7)
    ours = NoiseSchedule.named(name, steps).alpha_bar
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_q_equals_all_steps_composed(name):
    schedule = NoiseSchedule.named(name)
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t, beta in enumerate(betas(name)):
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        signal, noise = schedule.signal_and_noise(torch.tensor([t]), torch.zeros(1, dtype=torch.float64))
        assert abs(signal.item() - mean.item()) < 1e-9 and abs(noise.item() ** 2 - variance.item()) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_gives_back_sample_and_noise(name, prediction_type):
    schedule, x, epsilon, timesteps, x_t = noised(name)
    target = schedule.target(prediction_type, x, epsilon, timesteps)
    torch.testing.assert_close(schedule.to_sample(prediction_type, target, x_t, timesteps), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.to_epsilon(prediction_type, target, x_t, timesteps), epsilon, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_noising_and_v_agree_with_diffusers(name):
    schedule, x, epsilon, timesteps, x_t = noised(name)
    diffusers_name, first, last = SCHEDULES[name]
    theirs = DDIMScheduler(1000, first, last, diffusers_name)
    torch.testing.assert_close(theirs.add_noise(x, epsilon, timesteps), x_t, rtol=0, atol=1e-4)
    v = schedule.target("v_prediction", x, epsilon, timesteps)
    torch.testing.assert_close(theirs.get_velocity(x, epsilon, timesteps), v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_that_ends_in_noise_is_that_of_diffusers(name):
    ours = NoiseSchedule.named(name, zero_terminal_snr=True).alpha_bar
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas(name)), dim=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert ours[-1] == 0 and ours[0] == pytest.approx(NoiseSchedule.named(name).alpha_bar[0].item(), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_min_snr_weighs_one_error_of_the_sample_alike_whatever_is_predicted(name):
    schedule, x, epsilon, timesteps, x_t = noised(name)
    answer = x + 0.1 * torch.roll(x, 1, 0)  # some wrong clean sample, told in three ways
    implied = (x_t - schedule.signal_and_noise(timesteps, x)[0] * answer) / schedule.signal_and_noise(timesteps, x)[1]
    snr = schedule.alpha_bar[timesteps] / (1 - schedule.alpha_bar[timesteps])
    expected = snr.clamp(max=5) * (answer - x).square().flatten(1).mean(1)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        told = schedule.target(prediction_type, answer, implied, timesteps)
        errors = (told - schedule.target(prediction_type, x, epsilon, timesteps)).square().flatten(1).mean(1)
        weight = schedule.min_snr_weight(prediction_type, timesteps, 5.0)
        torch.testing.assert_close(weight * errors, expected, rtol=1e-5, atol=1e-12)


def test_a_flow_is_a_straight_line_whose_prediction_gives_back_sample_and_noise():
    schedule = FlowSchedule()
    x, epsilon = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    timesteps = torch.linspace(0, 1000, 64, dtype=torch.float64)
    x_t = schedule.q_sample(x, timesteps, epsilon)
    assert x_t[0].equal(x[0]) and x_t[-1].equal(epsilon[-1])
    flow = schedule.target("flow", x, epsilon, timesteps)
    torch.testing.assert_close(schedule.q_sample(x, timesteps + 1, epsilon) - x_t, flow / 1000, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.to_sample("flow", flow, x_t, timesteps), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.to_epsilon("flow", flow, x_t, timesteps), epsilon, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_edm_is_the_preconditioning_of_the_paper(sigma_data):
    """Karras et al. 2022, table 1 and eq. 8: F = (x − c_skip (x + σ n)) / c_out, at c_in (x + σ n) and ln(σ)/4."""
    schedule = EdmSchedule(sigma_data=sigma_data)
    x, n = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    timesteps = schedule.timesteps(torch.linspace(0.01, 0.99, 64, dtype=torch.float64))
    sigma = torch.exp(4 * timesteps)[:, None, None, None]
    noisy, total = x + sigma * n, sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
    seen = schedule.q_sample(x, timesteps, n)
    torch.testing.assert_close(seen, noisy / total.sqrt(), rtol=1e-9, atol=1e-12)
    target = schedule.target("edm", x, n, timesteps)
    torch.testing.assert_close(target, (x - c_skip * noisy) / c_out, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(schedule.to_sample("edm", target, seen, timesteps), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.to_epsilon("edm", target, seen, timesteps), n, rtol=0, atol=1e-7)
    levels = torch.log(sigma).flatten()
    torch.testing.assert_close(levels[[0, -1]].mean(), torch.tensor(-1.2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.position(timesteps), torch.linspace(0.01, 0.99, 64, dtype=torch.float64))


def test_the_flow_between_gaussians_is_the_least_squares_answer():
    """From N(0, s²) at u = 1 to N(0, 1) at u = 0: the field (u s² − (1−u)) x / ((1−u)² + u² s²), with u = 1 − t/T."""
    schedule, deviation, count = FlowSchedule(), 0.5, 400_000
    generator = torch.Generator().manual_seed(0)
    x = deviation * torch.randn(count, 1, dtype=torch.float64, generator=generator)
    epsilon = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    for u in (0.1, 0.5, 0.8):
        timesteps = torch.full((count,), 1000 * (1 - u), dtype=torch.float64)
        x_t, flow = schedule.q_sample(x, timesteps, epsilon), schedule.target("flow", x, epsilon, timesteps)
        slope = (x_t * flow).mean() / x_t.square().mean()
        known = -(u * deviation**2 - (1 - u)) / ((1 - u) ** 2 + u**2 * deviation**2)  # ours points to the noise
        residual = (flow - slope * x_t).std() / x_t.std() / count**0.5
        assert abs(slope - known) < 4 * residual


def test_shifted_flows_are_those_of_diffusers():
    ours = FlowSchedule(1000, shift=3.0).timesteps(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    torch.testing.assert_close(ours.float(), theirs.timesteps, rtol=1e-6, atol=0)
