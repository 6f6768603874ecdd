"""Samplers on problems whose answer is known, and their independence of the batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from genmodels.diffusion.noise_schedule import SCHEDULES, NoiseSchedule
from genmodels.diffusion.sampler import SAMPLERS, guided, make_sampler, sample, sampler_settings

SHAPE = (2, 3, 3)


def point_mass(point: torch.Tensor, schedule: NoiseSchedule, prediction_type: str):
    """The exact denoiser of data that is one point: the noise is what is left of x_t."""

    def denoise(latents, timesteps, _):
        signal, noise = schedule.signal_and_noise(timesteps, latents.double())
        epsilon = (latents.double() - signal * point) / noise
        return schedule.target(prediction_type, point.expand_as(epsilon), epsilon, timesteps)

    return denoise


@pytest.mark.parametrize("name", ["ddim", "dpm_solver++"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("noise_schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_a_point_mass_is_returned_for_any_number_of_steps(name, prediction_type, noise_schedule, num_steps):
    point = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(1, *SHAPE)
    settings = sampler_settings(noise_schedule, prediction_type)
    denoise = point_mass(point, NoiseSchedule.named(noise_schedule), prediction_type)
    drawn = sample(denoise, SHAPE, torch.arange(3), make_sampler(name, settings), num_steps)
    torch.testing.assert_close(drawn.double(), point.expand(3, *SHAPE), rtol=0, atol=1e-3)  # float32


@pytest.mark.parametrize("name", ["ddim", "dpm_solver++"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_a_point_mass_is_returned_from_pure_noise(name, prediction_type, num_steps):
    point = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(1, *SHAPE)
    settings = sampler_settings("scaled_linear", prediction_type, zero_terminal_snr=True)
    denoise = point_mass(point, NoiseSchedule.named("scaled_linear", zero_terminal_snr=True), prediction_type)
    drawn = sample(denoise, SHAPE, torch.arange(3), make_sampler(name, settings), num_steps)
    torch.testing.assert_close(drawn.double(), point.expand(3, *SHAPE), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 4, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_agrees_with_diffusers_where_the_steps_divide(num_steps, prediction_type, clip):
    settings = sampler_settings("scaled_linear", prediction_type, clip=clip)
    ours, theirs = make_sampler("ddim", settings), DDIMScheduler(**settings)

    def denoise(latents, timesteps, _):
        return torch.tanh(latents) + timesteps.reshape(-1, 1, 1, 1) / 1000

    drawn = [sample(denoise, SHAPE, torch.arange(2), sampler, num_steps) for sampler in (ours, theirs)]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_gaussian_data_is_drawn_with_its_deviation(name):
    """For N(0, s²) the optimal ε is √(1−ᾱ)·x/(ᾱs²+1−ᾱ)."""
    schedule, deviation = NoiseSchedule.named("scaled_linear"), 0.5

    def denoise(latents, timesteps, _):
        signal, noise = schedule.signal_and_noise(timesteps, latents)
        return noise * latents / (signal**2 * deviation**2 + noise**2)

    settings = sampler_settings("scaled_linear", "epsilon")
    drawn = sample(denoise, (1, 8, 8), torch.arange(64), make_sampler(name, settings), 200)
    spread = deviation / (2 * drawn.numel()) ** 0.5  # standard error of a standard deviation
    assert abs(drawn.mean().item()) < 4 * deviation / drawn.numel() ** 0.5
    assert abs(drawn.std().item() - deviation) < 4 * spread + 0.02  # 0.02: the last of the noise at ᾱ_0 < 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sample_does_not_depend_on_its_batch(name):
    def denoise(latents, timesteps, condition):
        return torch.tanh(latents * condition.reshape(-1, 1, 1, 1) + timesteps.reshape(-1, 1, 1, 1) / 1000)

    seeds, condition = torch.tensor([5, 11, -3, 2**62]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    settings = sampler_settings("linear", "v_prediction")
    arguments = {"num_steps": 8, "guidance_scale": 2.0}

    def draw(part):
        sampler = make_sampler(name, settings)
        return sample(denoise, SHAPE, seeds[part], sampler, condition=condition[part],
                      negative=torch.zeros_like(condition[part]), **arguments)  # fmt: skip

    together = draw(slice(None))
    alone = torch.cat([draw(slice(i, i + 1)) for i in range(4)])
    assert together.equal(alone)
    assert not together[0].equal(together[1])


def test_guidance_scale_1_is_the_conditional_model_in_one_pass():
    passes = []

    def denoise(latents, timesteps, condition):
        passes.append(len(latents))
        return latents * condition[:, None]

    latents, timesteps = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    condition, negative = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
    plain = guided(denoise, condition, negative, 1.0)(latents, timesteps, None)
    assert plain.equal(latents * condition[:, None]) and passes == [2]
    doubled = guided(denoise, condition, negative, 3.0)(latents, timesteps, None)
    assert doubled.equal(torch.tensor([4.0, 7.0])[:, None].expand(2, 3)) and passes == [2, 4]


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="ddpm, ddim"):
        make_sampler("euler", {})
    sampler = make_sampler("ddim", sampler_settings("linear", "epsilon", 100))
    with pytest.raises(ValueError, match="1 to 100"):
        sample(lambda x, t, c: x, SHAPE, torch.arange(1), sampler, 101)
