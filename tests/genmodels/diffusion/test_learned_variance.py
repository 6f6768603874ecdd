"""The variational bound against torch.distributions, the variance it leads to, and what diffusers draws with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from genmodels.diffusion.learned_variance import log_variance, variational_bound
from genmodels.diffusion.noise_schedule import NoiseSchedule
from genmodels.diffusion.pipeline import TextToImage
from genmodels.diffusion.sampler import Guidance, make_sampler, sample
from genmodels.families import build_objective
from tests.genmodels import tiny

SCHEDULES = ["linear", "scaled_linear", "cosine"]
PIXELS = {"autoencoder": None, "text_encoder": {"kind": "none"}, "image_size": 8, "learned_variance": True}


def posterior(schedule, x, noisy, t):
    """Mean and variance of q(x_{t-1} | x_t, x) by Bayes' rule, from the two Gaussians that it is made of."""
    alpha_bar, before = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
    alpha = alpha_bar / before
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (alpha.sqrt() * noisy / (1 - alpha) + before.sqrt() * x / (1 - before)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_bound_is_the_divergence_from_the_true_step(name, kind):
    schedule = NoiseSchedule.named(name)
    generator = torch.Generator().manual_seed(0)
    x, noise, prediction, variance = torch.randn(4, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([1, 500, 990])
    noisy = schedule.q_sample(x, timesteps, noise)
    found = variational_bound(schedule, kind, prediction, variance, x, noisy, timesteps)
    for row, t in enumerate(timesteps.tolist()):
        guess = schedule.to_sample(kind, prediction[row : row + 1], noisy[row : row + 1], timesteps[row : row + 1])
        mean, true_variance = posterior(schedule, x[row], noisy[row], t)
        predicted_mean, _ = posterior(schedule, guess[0], noisy[row], t)
        beta = 1 - schedule.alpha_bar[t] / schedule.alpha_bar[t - 1]
        share = (variance[row] + 1) / 2
        deviation = (0.5 * (share * beta.log() + (1 - share) * true_variance.log())).exp()
        expected = kl_divergence(Normal(mean, true_variance.sqrt()), Normal(predicted_mean, deviation)).mean()
        assert float(found[row]) == pytest.approx(float(expected) / math.log(2), rel=1e-9)


def test_the_bound_of_the_first_timestep_is_a_density():
    schedule = NoiseSchedule.named("linear")
    x, noisy, variance = torch.randn(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = torch.tensor([0])
    guess = x + 0.01
    found = variational_bound(schedule, "sample", guess, variance, x, noisy, timesteps)
    deviation = (0.5 * log_variance(schedule, variance, timesteps)).exp()
    expected = -Normal(guess, deviation).log_prob(x).mean() / math.log(2)  # at t = 0 the mean is the guess itself
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ends_are_the_two_bounds_of_the_variance(name):
    schedule, timesteps = NoiseSchedule.named(name), torch.tensor([1, 400, 900])
    scheduler = DDPMScheduler(beta_schedule={"cosine": "squaredcos_cap_v2"}.get(name, name), **(
        {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    ))  # fmt: skip
    ones = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    for row, t in enumerate(timesteps.tolist()):
        low, high = (log_variance(schedule, sign * ones, timesteps)[row].exp().item() for sign in (-1, 1))
        assert high == pytest.approx(scheduler.betas[t].item(), rel=1e-4)
        assert low == pytest.approx(float(scheduler._get_variance(t, variance_type="fixed_small")), rel=2e-3)
        assert low < high


def test_the_bound_leads_to_the_true_variance_of_a_gaussian():
    """Data N(0, s²), the best prediction: the step back is Gaussian, and its variance is known."""
    schedule, t, s2, count = NoiseSchedule.named("linear"), 300, 0.25, 200_000
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, count, 1, 1, 1, generator=generator, dtype=torch.float64)
    x, timesteps = x * math.sqrt(s2), torch.full((count,), t)
    noisy = schedule.q_sample(x, timesteps, noise)
    alpha_bar, before = schedule.alpha_bar[t].item(), schedule.alpha_bar[t - 1].item()
    best = math.sqrt(alpha_bar) * s2 / (alpha_bar * s2 + 1 - alpha_bar) * noisy
    beta = 1 - alpha_bar / before
    true = beta * (before * s2 + 1 - before) / (alpha_bar * s2 + 1 - alpha_bar)
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], lr=0.5, max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = variational_bound(schedule, "sample", best, v.expand_as(x), x, noisy, timesteps).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = log_variance(schedule, v.detach().reshape(1, 1, 1, 1), timesteps[:1]).exp().item()
    assert found == pytest.approx(true, rel=4 * math.sqrt(2 / count))


def test_the_bound_trains_the_variance_alone():
    torch.manual_seed(0)
    objective = build_objective(tiny.diffusion_config(**PIXELS))
    plain = build_objective(tiny.diffusion_config(**{**PIXELS, "learned_variance": False}))
    batch = tiny.batch(4, image_size=8)
    result = objective.loss(batch)
    assert float(result.metrics["variational_bound"].total) > 0
    assert float(result.loss) > float(result.metrics["loss"].total / 4)
    assert "variational_bound" not in plain.loss(batch).metrics
    result.loss.backward()
    last = objective.denoiser.backbone.conv_out.bias.grad
    assert last.shape == (6,) and (last != 0).all()
    validated = objective.validate(tiny.batch(4, image_size=8))
    assert set(validated) == {"loss", *(f"loss_t{i}" for i in range(4))}


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver++", "euler", "heun", "euler_ancestral"])
def test_every_sampler_draws_and_only_ddpm_uses_the_variance(name):
    torch.manual_seed(0)
    objective = build_objective(tiny.diffusion_config(**PIXELS))
    torch.nn.init.normal_(objective.denoiser.backbone.conv_out.weight, std=0.1)

    def draw(variance):
        def denoise(latents, timesteps, condition):
            prediction = objective.denoiser(latents, timesteps, condition)
            return torch.cat([prediction[:, :3], torch.full_like(prediction[:, :3], variance)], 1)

        with torch.no_grad():
            sampler = make_sampler(name, objective.sampler_settings)
            return sample(denoise, objective.denoiser.sample_shape, torch.tensor([1, 2]), sampler, 5)

    low, high = draw(-1.0), draw(1.0)
    assert low.shape == (2, 3, 8, 8) and low.isfinite().all()
    assert torch.equal(low, high) == (name != "ddpm")


def test_guidance_leaves_the_variance_as_it_is():
    seen = []

    class Sampler(DDPMScheduler):
        def step(self, prediction, *given, **named):
            seen.append(prediction)
            return super().step(prediction, *given, **named)

    def denoise(latents, timesteps, condition):
        told = condition["text"].float()[:, :, None, None].expand(-1, 1, 4, 4)
        return torch.cat([told, told], dim=1)

    condition, negative = {"text": torch.full((2, 1), 0.5)}, {"text": torch.zeros(2, 1)}
    sampler = Sampler(variance_type="learned_range")
    sample(denoise, (1, 4, 4), torch.tensor([1, 2]), sampler, 2, condition, negative, Guidance(3.0))
    assert (seen[0][:, 0] == 1.5).all() and (seen[0][:, 1] == 0.5).all()


def test_unconditional_pixels_are_drawn_by_diffusers_with_the_same_variance(tmp_path):
    torch.manual_seed(0)
    objective = build_objective(tiny.diffusion_config(**PIXELS))
    torch.nn.init.normal_(objective.denoiser.backbone.conv_out.weight, std=0.1)
    assert objective.export(tmp_path)["layout"] == "DDPMPipeline"
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
    assert theirs.shape == (1, 8, 8, 3) and np.isfinite(theirs).all()
    ours = TextToImage.from_folder(tmp_path).draw(None, [1, 2], sampler="ddpm", num_steps=4)
    assert ours.shape == (2, 8, 8, 3)


def test_a_class_conditional_transformer_is_opened_by_diffusers(tmp_path):
    inputs = tiny.write_inputs(tmp_path / "inputs")
    dit = {"kind": "dit", "width": 16, "depth": 1, "heads": 2}
    config = {"text_encoder": {"kind": "none"}, "classes": ["a", "b"], "denoiser": dit, "learned_variance": True}
    objective = build_objective(tiny.diffusion_config(**config, prediction_type="epsilon"), inputs)
    assert objective.denoiser.sample_shape == (4, 4, 4)
    assert objective.export(tmp_path / "out")["layout"] == "DiTPipeline"
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer.config.out_channels == 8
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert TextToImage.from_folder(tmp_path / "out").draw(["a"], [1], num_steps=2).shape == (1, 16, 16, 3)


def test_what_has_no_such_variance_is_refused():
    for changes in ({"prediction_type": "flow", "noise_schedule": "flow"}, {"zero_terminal_snr": True}):
        with pytest.raises(ValidationError, match="learned_variance is of diffusion schedules"):
            tiny.diffusion_config(**PIXELS, **changes)
