"""Samplers on problems whose answer is known, and their independence of the batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from genmodels.diffusion.ddim import ddim_step
from genmodels.diffusion.noise_schedule import SCHEDULES, EdmSchedule, FlowSchedule, NoiseSchedule
from genmodels.diffusion.sampler import SAMPLERS, Guidance, guided, invert, make_sampler, sample, sampler_settings

SHAPE = (2, 3, 3)


def point_mass(point: torch.Tensor, schedule: NoiseSchedule, prediction_type: str):
    """The exact denoiser of data that is one point: the noise is what is left of x_t."""

    def denoise(latents, timesteps, _):
        signal, noise = schedule.signal_and_noise(timesteps, latents.double())
        epsilon = (latents.double() - signal * point) / noise
        return schedule.target(prediction_type, point.expand_as(epsilon), epsilon, timesteps)

    return denoise


def exact(name: str, settings: dict, denoise):
    """`denoise` at the times that a sampler means: Euler's and Heun's diffusers classes give them as floats."""
    return lambda latents, timesteps, condition: denoise(
        latents, timesteps if settings.keys() & {"flow_shift", "sigma_data"} else timesteps.round().long(), condition
    )


def gaussian(deviation: float, schedule: NoiseSchedule, prediction_type: str):
    """The optimal denoiser of data N(0, s²): E[x | x_t] = a s² x_t / (a² s² + b²), and E[ε | x_t] from it."""

    def denoise(latents, timesteps, _):
        latents = latents.double()
        signal, noise = schedule.signal_and_noise(timesteps, latents)
        variance = signal**2 * deviation**2 + noise**2
        x, epsilon = signal * deviation**2 * latents / variance, noise * latents / variance
        return schedule.target(prediction_type, x, epsilon, timesteps)

    return denoise


COMBINATIONS = [
    (noise_schedule, prediction_type)
    for noise_schedule in sorted(SCHEDULES)
    for prediction_type in ("epsilon", "v_prediction", "sample")
] + [("flow", "flow"), ("edm", "edm")]
EXACT = ["ddim", "dpm_solver++", "euler", "heun"]
"""Deterministic samplers: a point mass is a fixed point of each of their steps."""


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("noise_schedule", "prediction_type"), COMBINATIONS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_a_point_mass_is_returned_for_any_number_of_steps(name, prediction_type, noise_schedule, num_steps):
    point = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(1, *SHAPE)
    settings = sampler_settings(noise_schedule, prediction_type)
    denoise = exact(name, settings, point_mass(point, NoiseSchedule.named(noise_schedule), prediction_type))
    drawn = sample(denoise, SHAPE, torch.arange(3), make_sampler(name, settings), num_steps)
    torch.testing.assert_close(drawn.double(), point.expand(3, *SHAPE), rtol=0, atol=5e-3)  # float32


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
@pytest.mark.parametrize(("noise_schedule", "prediction_type"), COMBINATIONS)
def test_gaussian_data_is_drawn_with_its_deviation(name, noise_schedule, prediction_type):
    schedule, deviation = NoiseSchedule.named(noise_schedule), 0.5
    settings = sampler_settings(noise_schedule, prediction_type)
    denoise = exact(name, settings, gaussian(deviation, schedule, prediction_type))
    drawn = sample(denoise, (1, 8, 8), torch.arange(64), make_sampler(name, settings), 200)
    spread = deviation / (2 * drawn.numel()) ** 0.5  # standard error of a standard deviation
    assert abs(drawn.mean().item()) < 4 * deviation / drawn.numel() ** 0.5
    assert abs(drawn.std().item() - deviation) < 4 * spread + 0.02  # 0.02: the last of the noise at ᾱ_0 < 1


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(
    ("noise_schedule", "prediction_type"), [("scaled_linear", "v_prediction"), ("flow", "flow"), ("edm", "edm")]
)
def test_any_eta_draws_the_same_distribution(noise_schedule, prediction_type, eta):
    settings = sampler_settings(noise_schedule, prediction_type)
    denoise = gaussian(0.5, NoiseSchedule.named(noise_schedule), prediction_type)
    plain, fresh = (
        sample(denoise, (1, 8, 8), torch.arange(64), make_sampler("ddim", settings, eta=value), 200)
        for value in (0.0, eta)
    )
    assert abs(fresh.std().item() - 0.5) < 4 * 0.5 / (2 * fresh.numel()) ** 0.5 + 0.02
    assert (plain - fresh).abs().mean() > 0.05  # fresh noise was drawn


def test_eta_1_is_the_posterior_of_ddpm():
    """Song et al. 2021, section 4.1: σ² = (1 − ᾱ_s)/(1 − ᾱ_t)·β, and the mean that goes with it."""
    alpha_bar = NoiseSchedule.named("linear").alpha_bar[[500, 480]]
    level, next_level = ((a.sqrt(), (1 - a).sqrt()) for a in alpha_bar)
    x, epsilon = torch.randn(2, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, alpha = level[0] * x + level[1] * epsilon, alpha_bar[0] / alpha_bar[1]
    mean = (alpha_bar[1].sqrt() * (1 - alpha) * x + alpha.sqrt() * (1 - alpha_bar[1]) * x_t) / (1 - alpha_bar[0])
    drawn = ddim_step(x, epsilon, level, next_level, 1.0, torch.Generator().manual_seed(1))
    variance = (1 - alpha_bar[1]) / (1 - alpha_bar[0]) * (1 - alpha)
    deviations = (drawn - mean) / variance.sqrt()
    assert abs(deviations.mean()) < 4 / 20_000**0.5 and abs(deviations.std() - 1) < 4 / 40_000**0.5


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(
    ("noise_schedule", "prediction_type"), [("scaled_linear", "epsilon"), ("flow", "flow"), ("edm", "edm")]
)
def test_order_on_the_gaussian_ode(name, order, noise_schedule, prediction_type):
    """Its solution scales with the deviation of x_t, √(a²s² + b²): here, through the noisier half."""
    schedule, deviation = NoiseSchedule.named(noise_schedule), 0.5
    denoise = gaussian(deviation, schedule, prediction_type)
    errors = []
    for num_steps in (40, 80, 160) if noise_schedule == "edm" else (10, 20, 40):  # edm begins at σ = 80
        sampler = make_sampler(name, sampler_settings(noise_schedule, prediction_type))
        sampler.set_timesteps(num_steps)
        scale = getattr(sampler, "scale_model_input", lambda latents, timestep: latents)
        passes = order * num_steps // 2
        reached = sampler.timesteps[passes - (order == 2)]  # Heun's list has each timestep but the first twice
        latents = 1 / scale(torch.ones(1, 1, 1, 1, dtype=torch.float64), sampler.timesteps[0])
        for timestep in sampler.timesteps[:passes]:
            prediction = denoise(scale(latents, timestep), whole(timestep, schedule), None)
            latents = sampler.step(prediction, timestep, latents, return_dict=False)[0].double()
        first, last = (
            (signal**2 * deviation**2 + noise**2).sqrt()
            for signal, noise in (schedule.coefficients(whole(t, schedule)) for t in (sampler.timesteps[0], reached))
        )
        errors.append(abs(scale(latents, reached).item() - (last / first).item()))
    for coarse, fine in pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.4 * 2**order, errors


def whole(timestep: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    return (
        timestep.reshape(-1)
        if isinstance(schedule, (FlowSchedule, EdmSchedule))
        else timestep.reshape(-1).round().long()
    )


@pytest.mark.parametrize(("noise_schedule", "prediction_type"), COMBINATIONS)
def test_inversion_finds_the_noise_that_draws_the_sample(noise_schedule, prediction_type):
    settings = sampler_settings(noise_schedule, prediction_type)
    denoise = gaussian(0.5, NoiseSchedule.named(noise_schedule), prediction_type)
    latents = 0.5 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = invert(denoise, latents, make_sampler("ddim", settings), 20, iterations=20)
    drawn = sample(denoise, SHAPE, torch.arange(3), make_sampler("ddim", settings), 20, initial=noise)
    torch.testing.assert_close(drawn, latents, rtol=0, atol=2e-3)
    assert 0.5 < noise.std() < 2


def test_only_deterministic_ddim_is_inverted():
    settings = sampler_settings("linear", "epsilon")
    for sampler in (make_sampler("ddpm", settings), make_sampler("ddim", settings, eta=0.5)):
        with pytest.raises(ValueError, match="only ddim with eta 0"):
            invert(lambda x, t, c: x, torch.zeros(1, *SHAPE), sampler, 5)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sample_does_not_depend_on_its_batch(name):
    def denoise(latents, timesteps, condition):
        return torch.tanh(latents * condition["gain"].reshape(-1, 1, 1, 1) + timesteps.reshape(-1, 1, 1, 1) / 1000)

    seeds, condition = torch.tensor([5, 11, -3, 2**62]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    settings = sampler_settings("linear", "v_prediction")
    arguments = {"num_steps": 8, "guidance": Guidance(2.0)}

    def draw(part):
        sampler = make_sampler(name, settings)
        return sample(denoise, SHAPE, seeds[part], sampler, condition={"gain": condition[part]},
                      negative={"gain": torch.zeros_like(condition[part])}, **arguments)  # fmt: skip

    together = draw(slice(None))
    alone = torch.cat([draw(slice(i, i + 1)) for i in range(4)])
    assert together.equal(alone)
    assert not together[0].equal(together[1])


def test_guidance_scale_1_is_the_conditional_model_in_one_pass():
    passes = []

    def denoise(latents, timesteps, condition):
        passes.append(len(latents))
        return latents * condition["gain"][:, None]

    latents, timesteps = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    condition, negative = {"gain": torch.tensor([2.0, 3.0])}, {"gain": torch.tensor([1.0, 1.0])}
    plain = guided(denoise, condition, negative, Guidance(1.0))(latents, timesteps, None)
    assert plain.equal(latents * condition["gain"][:, None]) and passes == [2]
    doubled = guided(denoise, condition, negative, Guidance(3.0))(latents, timesteps, None)
    assert doubled.equal(torch.tensor([4.0, 7.0])[:, None].expand(2, 3)) and passes == [2, 4]


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="ddpm, ddim"):
        make_sampler("plms", {})
    sampler = make_sampler("ddim", sampler_settings("linear", "epsilon", 100))
    with pytest.raises(ValueError, match="1 to 100"):
        sample(lambda x, t, c: x, SHAPE, torch.arange(1), sampler, 101)
    with pytest.raises(ValueError, match="only ddim takes one"):
        make_sampler("euler", sampler_settings("linear", "epsilon"), eta=0.5)
    with pytest.raises(ValueError, match="pure noise"):
        make_sampler("heun", sampler_settings("linear", "v_prediction", zero_terminal_snr=True))
    with pytest.raises(ValueError, match="guidance_rescale is 2"):
        Guidance(2.0, rescale=2)
    with pytest.raises(ValueError, match="LOW < HIGH"):
        Guidance(2.0, interval=(0.5, 0.5))


def test_guidance_within_an_interval_only():
    passes = []

    def denoise(latents, timesteps, condition):
        passes.append(len(latents))
        return latents * condition["gain"][:, None]

    condition, negative = {"gain": torch.tensor([2.0])}, {"gain": torch.tensor([1.0])}
    model = guided(denoise, condition, negative, Guidance(3.0, interval=(0.2, 0.8)))
    for timestep, expected in ((900, 2.0), (800, 4.0), (200, 4.0), (100, 2.0)):
        assert model(torch.ones(1, 3), torch.tensor([timestep]), None).unique().item() == expected
    assert passes == [1, 2, 2, 1]


def test_rescaled_guidance_has_the_deviation_of_the_conditional_model():
    generator = torch.Generator().manual_seed(0)
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    plain, full = (Guidance(7.0, rescale=value).combine(unconditional, conditional) for value in (0.0, 1.0))
    torch.testing.assert_close(full.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-9, atol=0)
    half = Guidance(7.0, rescale=0.5).combine(unconditional, conditional)
    torch.testing.assert_close(half, (plain + full) / 2, rtol=1e-9, atol=1e-12)
