"""Latent diffusion as the trainer sees it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import TypeAdapter, ValidationError

from genmodels import random
from genmodels.diffusion.noise_schedule import NoiseSchedule
from genmodels.families import ObjectiveConfig, build_objective
from genmodels.text.config import TrainedTextEncoder
from genmodels.text.encoder import build_text_encoder
from genmodels.text.tokenizer import encode
from tests.genmodels import tiny


@pytest.fixture
def objective(inputs):
    torch.manual_seed(0)
    return build_objective(tiny.diffusion_config(), inputs)


@pytest.fixture
def batch(inputs):
    return tiny.with_tokens(tiny.batch(8), inputs)


def gradients(objective, batch):
    objective.denoiser.zero_grad()
    objective.loss(batch).loss.backward()
    return {name: p.grad.clone() for name, p in objective.denoiser.named_parameters()}


def rows(batch, part):
    return {k: v if k == "step" else v[part] for k, v in batch.items() if k != "once"}


def test_every_parameter_is_trained_and_the_frozen_autoencoder_is_not(objective, batch):
    found = gradients(objective, batch)
    assert all(g.abs().sum() > 0 for name, g in found.items() if "k_proj.bias" not in name)  # softmax drops that bias
    assert any(name.startswith("text_encoder.") for name in found)
    frozen = objective.frozen["autoencoder"]
    assert not frozen.training and all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_a_sample_of_weight_0_adds_nothing(objective, batch):
    weight = torch.tensor([1.0] * 6 + [0.0] * 2)
    with_bad = gradients(objective, {**batch, "weight": weight})
    without = gradients(objective, rows(batch, slice(0, 6)))
    for name, gradient in with_bad.items():  # a mean over 8 slots rather than 6
        torch.testing.assert_close(gradient, without[name] * 6 / 8, rtol=1e-3, atol=1e-6)
    metrics = objective.loss({**batch, "weight": weight}).metrics
    assert metrics["loss"].count == 6
    assert sum(metrics[f"loss_t{k}"].count for k in range(4)) == 6
    total = sum(metrics[f"loss_t{k}"].total for k in range(4))
    torch.testing.assert_close(total, metrics["loss"].total)


def test_biased_timesteps_have_the_density_that_is_documented(inputs, monkeypatch):
    seen = []
    objective = build_objective(tiny.diffusion_config(timestep_bias=2.0, autoencoder=None), inputs)
    errors = torch.zeros(4096), None
    monkeypatch.setattr(
        objective, "_errors", lambda batch, latents, timesteps, condition: seen.append(timesteps) or errors
    )
    monkeypatch.setattr(objective, "condition", lambda batch, dropout: {})
    objective.loss({"seeds": torch.arange(4096), "weight": torch.ones(4096), "images": torch.zeros(4096, 1)})
    (timesteps,) = seen
    assert timesteps.min() >= 0 and timesteps.max() <= objective.config.train_timesteps - 1
    for share in (0.25, 0.5, 0.75):  # a density of t up to T: P(t < share·T) = share²
        assert (timesteps < share * objective.config.train_timesteps).float().mean() == pytest.approx(
            share**2, abs=0.03
        )


def test_offset_noise_is_one_number_for_each_channel_of_a_sample(inputs, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(NoiseSchedule, "q_sample", lambda self, x, timesteps, epsilon: seen.append(epsilon) or x)
    for offset in (0.0, 0.5):
        objective = build_objective(tiny.diffusion_config(offset_noise=offset), inputs)
        objective.loss(batch)
    added = seen[1] - seen[0]
    assert added.std((2, 3)).max() < 1e-6
    assert added.mean((2, 3)).std() == pytest.approx(0.5, rel=0.5)


def test_logit_normal_timesteps_have_the_quantiles_that_are_documented(inputs):
    config = tiny.diffusion_config(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.8, autoencoder=None)
    positions = build_objective(config, inputs)._positions(torch.arange(40_000))
    for quantile in (0.1, 0.5, 0.9):
        expected = torch.sigmoid(0.5 + 0.8 * torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
        assert positions.quantile(quantile) == pytest.approx(expected.item(), abs=0.01)


def test_flow_matching_is_the_error_of_the_velocity(inputs, batch):
    config = tiny.diffusion_config(prediction_type="flow", noise_schedule="flow", condition_dropout=0.0)
    objective = build_objective(config, inputs)
    latents, seeds = objective.latents(batch), batch["seeds"]
    noise, time = random.normal(seeds, latents.shape[1:], "noise"), random.uniform(seeds, (), "timesteps")
    share = time.float()[:, None, None, None]
    with torch.no_grad():
        predicted = objective.denoiser((1 - share) * latents + share * noise, 1000 * time, {"text": batch["token_ids"]})
        expected = (predicted - (noise - latents)).square().mean()
        torch.testing.assert_close(objective.loss(batch).loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prediction_type": "flow"}, "prediction_type flow together with noise_schedule flow"),
        ({"noise_schedule": "flow"}, "prediction_type flow together with noise_schedule flow"),
        ({"prediction_type": "flow", "noise_schedule": "flow", "zero_terminal_snr": True}, "ends in pure noise"),
    ],
)
def test_flows_are_asked_for_whole(changes, said):
    with pytest.raises(ValidationError, match=said):
        tiny.diffusion_config(**changes)


def test_pure_noise_and_epsilon_do_not_go_together():
    with pytest.raises(ValidationError, match="zero_terminal_snr needs prediction_type v_prediction or sample"):
        tiny.diffusion_config(zero_terminal_snr=True, prediction_type="epsilon")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_changes_the_loss_and_not_the_errors_by_timestep(inputs, batch, prediction_type):
    results = []
    for gamma in (None, 0.01):
        torch.manual_seed(0)
        config = tiny.diffusion_config(min_snr_gamma=gamma, prediction_type=prediction_type)
        results.append(build_objective(config, inputs).loss(batch))
    plain, weighted = results
    assert plain.loss != weighted.loss
    for quarter in range(4):
        assert plain.metrics[f"loss_t{quarter}"].total == weighted.metrics[f"loss_t{quarter}"].total


def test_micro_batches_add_up_to_the_whole(objective, batch):
    whole = objective.loss(batch).loss
    parts = [objective.loss(rows(batch, slice(i, i + 2))).loss for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_dropped_captions_become_the_empty_caption(inputs, objective):
    batch = tiny.with_tokens(tiny.batch(400), inputs)
    token_ids = objective.condition(batch, dropout=True)["text"]
    empty = encode(objective.tokenizer, [""])
    dropped = (token_ids == empty).all(1)
    expected = random.uniform(batch["seeds"], (), "dropout") < 0.1
    assert dropped.equal(expected) and 0 < dropped.sum() < 100
    assert token_ids[~dropped].equal(batch["token_ids"][~dropped])
    assert objective.condition(batch, dropout=False)["text"].equal(batch["token_ids"])


def test_captions_are_names_of_classes(inputs):
    names = sorted(set(tiny.CAPTIONS))
    config = tiny.diffusion_config(classes=names, text_encoder={"kind": "none"})
    objective, batch = build_objective(config, inputs), tiny.batch(400)
    told, dropped = (
        objective.condition(batch, dropout=False)["classes"],
        objective.condition(batch, dropout=True)["classes"],
    )
    assert [names[label] for label in told] == batch["captions"]
    expected = random.uniform(batch["seeds"], (), "dropout") < 0.1
    assert (dropped == len(names)).equal(expected) and dropped[~expected].equal(told[~expected])
    quarantined = {**batch, "captions": [""] * 400, "weight": torch.zeros(400)}
    assert objective.condition(quarantined, dropout=False)["classes"].eq(len(names)).all()
    with pytest.raises(ValueError, match="shard/0: caption 'a cat' is not one of"):
        objective.condition({**batch, "captions": ["a cat"] * 400}, dropout=False)
    found = gradients(objective, batch)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ["a"]}, "with classes, set text_encoder.kind=none"),
        ({"classes": ["a", "a"], "text_encoder": {"kind": "none"}}, "each one once"),
        ({"denoiser": {"kind": "dit", "width": 30, "heads": 4}}, "width 30 is not a multiple of heads 4"),
    ],
)
def test_conditions_and_transformers_that_do_not_fit_are_named(changes, said):
    with pytest.raises(ValidationError, match=said):
        tiny.diffusion_config(**changes)


def test_patches_that_do_not_divide_the_latents_are_named(inputs):
    with pytest.raises(ValueError, match="patch_size 3 does not divide the latents' side 4"):
        build_objective(tiny.diffusion_config(denoiser={"kind": "dit", "patch_size": 3}), inputs)


def test_latents_are_scaled_posterior_samples_of_unit_deviation(inputs, objective):
    batch = tiny.batch(8)
    plain = AutoencoderKL.from_pretrained(inputs / "autoencoder")
    with torch.no_grad():
        posterior = plain.encode(batch["images"]).latent_dist
    noise = random.normal(batch["seeds"], posterior.mean.shape[1:], "latent")
    latents = objective.latents(batch)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * plain.config.scaling_factor)
    assert abs(latents.std().item() - 1) < 1e-2  # measured on these very images


def test_the_loss_is_the_error_of_the_prediction(objective, batch):
    """Written out from the paper for one batch, with diffusers' scheduler in place of ours."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    latents, seeds = objective.latents(batch), batch["seeds"]
    noise, timesteps = random.normal(seeds, latents.shape[1:], "noise"), random.integers(seeds, 1000, "timesteps")
    with torch.no_grad():
        features = objective.denoiser.text_encoder(objective.condition(batch, dropout=True)["text"]).last_hidden_state
        noisy = schedule.add_noise(latents, noise, timesteps)
        predicted = objective.denoiser.backbone(noisy, timesteps, encoder_hidden_states=features).sample
        expected = (predicted - schedule.get_velocity(latents, noise, timesteps)).square().mean()
        torch.testing.assert_close(objective.loss(batch).loss, expected, rtol=1e-4, atol=1e-5)


def test_validation_repeats_and_covers_the_schedule(objective, batch):
    with torch.no_grad():
        first, again = objective.validate(batch), objective.validate(batch)
        halves = [objective.validate(rows(batch, slice(i, i + 4))) for i in (0, 4)]
    assert first == again
    assert [int(first[f"loss_t{k}"].count) for k in range(4)] == [8] * 4 and first["loss"].count == 32
    torch.testing.assert_close(halves[0]["loss"].total + halves[1]["loss"].total, first["loss"].total)


def test_the_preview_repeats_and_is_titled(objective, batch):
    with torch.no_grad():
        first, again = objective.preview(batch), objective.preview(batch)
    assert first.images.shape == (8, 3, 16, 16) and first.images.equal(again.images)
    assert first.images.abs().max() <= 1 and first.titles == batch["captions"]


def test_a_frozen_text_encoder_stays_outside_the_denoiser(inputs, tmp_path):
    (tmp_path / "autoencoder").symlink_to(inputs / "autoencoder")
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    build_text_encoder(TrainedTextEncoder.model_validate(tiny.TEXT)).save_pretrained(tmp_path / "text_encoder")
    config = tiny.diffusion_config(text_encoder={"kind": "pretrained", "path": str(tmp_path / "text_encoder")})
    objective = build_objective(config, tmp_path)
    batch = tiny.with_tokens(tiny.batch(2), tmp_path)
    objective.loss(batch).loss.backward()
    assert set(objective.frozen) == {"autoencoder", "text_encoder"}
    assert all(p.grad is None for p in objective.frozen["text_encoder"].parameters())
    assert not any("text_encoder" in name for name, _ in objective.denoiser.named_parameters())
    assert objective.flops_per_sample() > 0


@pytest.mark.parametrize(
    ("prediction_type", "noise_schedule"),
    [(p, s) for p in ("epsilon", "v_prediction", "sample") for s in ("linear", "scaled_linear", "cosine")]
    + [("flow", "flow"), ("edm", "edm")],
)
def test_pixels_without_condition_train_and_preview(prediction_type, noise_schedule):
    config = tiny.diffusion_config(
        autoencoder=None, text_encoder={"kind": "none"}, prediction_type=prediction_type,
        noise_schedule=noise_schedule, preview_steps=3,
    )  # fmt: skip
    objective, batch = build_objective(config), tiny.batch(2)
    assert torch.isfinite(objective.loss(batch).loss)
    with torch.no_grad():
        preview = objective.preview(batch)
    assert torch.isfinite(preview.images).all() and not preview.titles


def test_counts_without_inputs_and_flops(inputs, objective):
    counted = type(objective).abstract_networks(tiny.diffusion_config())["denoiser"]
    assert all(p.is_meta for p in counted.parameters())
    assert sum(p.numel() for p in counted.parameters()) == sum(p.numel() for p in objective.denoiser.parameters())
    assert objective.flops_per_sample() > 1e5


def test_bfloat16_weights_take_float32_batches(objective, batch):
    objective.denoiser.to(torch.bfloat16)
    result = objective.loss(batch).loss
    assert result.dtype == torch.float32 and torch.isfinite(result)


def test_weights_start_from_an_export_and_misfits_are_named(inputs, objective, tmp_path):
    objective.export(tmp_path)
    torch.manual_seed(9)
    other = build_objective(tiny.diffusion_config(), inputs)
    other.load_weights(tmp_path)
    for (name, a), b in zip(other.denoiser.state_dict().items(), objective.denoiser.state_dict().values()):
        assert a.equal(b), name
    wider = {**tiny.UNET, "channels": [16, 32]}
    with pytest.raises(ValueError, match=r"is \(.*\) there and \(.*\) here"):
        build_objective(tiny.diffusion_config(denoiser=wider), inputs).load_weights(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        other.load_weights(tmp_path / "nothing")


def test_missing_inputs_and_misspelt_keys_are_named(tmp_path):
    with pytest.raises(ValueError, match="autoencoder/"):
        build_objective(tiny.diffusion_config(), tmp_path)
    read = TypeAdapter(ObjectiveConfig).validate_python
    assert read({"kind": "latent_diffusion"}).image_size == 256
    with pytest.raises(ValidationError, match="imagesize"):
        read({"kind": "latent_diffusion", "imagesize": 32})
    with pytest.raises(ValidationError, match="norm_groups"):
        read({"kind": "latent_diffusion", "denoiser": {"kind": "unet", "channels": [20], "attention": [True]}})
    with pytest.raises(ValidationError, match="'autoencoder', 'clip', 'latent_diffusion'"):
        read({"kind": "gam"})
