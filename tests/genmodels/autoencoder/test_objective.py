"""The autoencoder as the trainer sees it: two phases, each training its own network, and the latents' scale."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from genmodels.autoencoder.codec import LatentCodec
from genmodels.autoencoder.perceptual import PerceptualDistance
from genmodels.families import build_objective
from genmodels.metrics.image import psnr
from tests.genmodels import tiny

DISCRIMINATOR = {"start_step": 3, "weight": 0.1, "channels": 8, "layers": 1}


def run_phase(objective, phase, batch):
    """As the trainer runs it: only the phase's own network has gradients on."""
    for name, network in objective.networks.items():
        network.requires_grad_(name == phase.network).zero_grad()
    result = phase.loss(batch)
    result.loss.backward()
    return result


def has_gradient(network):
    return [p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters()]


@pytest.fixture
def objective():
    torch.manual_seed(0)
    return build_objective(tiny.autoencoder_config(discriminator=DISCRIMINATOR))


def test_each_phase_trains_its_own_network(objective):
    batch = tiny.batch(4, step=3)
    autoencoder, discriminator = (objective.networks[n] for n in ("autoencoder", "discriminator"))
    assert [p.network for p in objective.phases] == ["autoencoder", "discriminator"]
    run_phase(objective, objective.phases[0], batch)
    found = has_gradient(autoencoder)
    assert sum(found) > 0.9 * len(found) and not any(has_gradient(discriminator))
    run_phase(objective, objective.phases[1], batch)
    # Within the hinge's margin the last bias cancels between real and fake.
    assert all(has_gradient(discriminator)[:-1]) and not any(has_gradient(autoencoder))


def test_the_discriminator_starts_late(objective):
    assert [p.runs_at(2) for p in objective.phases] == [True, False]
    assert [p.runs_at(3) for p in objective.phases] == [True, True]
    before, after = (objective.autoencoder_loss(tiny.batch(4, step=s)) for s in (2, 3))
    adversarial = after.metrics["adversarial"].total / 4
    assert before.metrics["adversarial"].total == 0 and adversarial != 0
    torch.testing.assert_close(after.loss, before.loss + 0.1 * adversarial)
    assert before.metrics.keys() == after.metrics.keys()


def test_an_adaptive_weight_gives_both_terms_the_same_strength():
    torch.manual_seed(0)
    objective = build_objective(
        tiny.autoencoder_config(discriminator=DISCRIMINATOR | {"adaptive": True, "weight": 1.0})
    )
    batch, last = tiny.batch(4, step=3), objective.autoencoder.last_layer
    result = objective.autoencoder_loss(batch)
    (both,) = torch.autograd.grad(result.loss, last)
    plain = objective._terms(batch, objective.reconstruct(batch))["loss"].mean()
    (reconstruction,) = torch.autograd.grad(plain, last)
    # The two gradients have one norm, up to the 1e-4 that keeps the ratio finite.
    assert (both - reconstruction).norm().item() == pytest.approx(reconstruction.norm().item(), rel=0.02)
    assert objective.phases[0].couples_samples and objective.phases[0].double_backward
    assert result.metrics["adversarial_factor"].total > 0


@pytest.mark.parametrize("phase", [0, 1])
def test_a_sample_of_weight_0_adds_nothing(objective, phase):
    batch = tiny.batch(4, step=5)
    network = objective.networks[objective.phases[phase].network]
    run_phase(objective, objective.phases[phase], {**batch, "weight": torch.tensor([1.0, 1.0, 1.0, 0.0])})
    with_bad = [p.grad.clone() for p in network.parameters()]
    run_phase(objective, objective.phases[phase], {k: v if k == "step" else v[:3] for k, v in batch.items()})
    for a, b in zip(with_bad, network.parameters()):
        torch.testing.assert_close(a, b.grad * 3 / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_the_loss_is_rombachs_over_the_number_of_values(reconstruction):
    objective = build_objective(
        tiny.autoencoder_config(reconstruction=reconstruction, regulariser={"kind": "kl", "weight": 0.3})
    )
    batch = tiny.batch(4)
    result = objective.reconstruct(batch)
    difference = (result.images - batch["images"]).flatten(1)
    error = difference.abs().sum(1) if reconstruction == "l1" else difference.square().sum(1)
    kl = 0.5 * (result.mean**2 + result.log_variance.exp() - 1 - result.log_variance).flatten(1).sum(1)
    torch.testing.assert_close(objective.autoencoder_loss(batch).loss, ((error + 0.3 * kl) / (3 * 16 * 16)).mean())


def test_the_perceptual_term_enters(tmp_path):
    torch.manual_seed(0)
    save_file(PerceptualDistance().state_dict(), tmp_path / "perceptual.safetensors")
    config = tiny.autoencoder_config(perceptual=str(tmp_path / "perceptual.safetensors"), perceptual_weight=2.0)
    objective, batch = build_objective(config), tiny.batch(2)
    result = objective.autoencoder_loss(batch)
    plain = build_objective(tiny.autoencoder_config())
    plain.autoencoder.load_state_dict(objective.autoencoder.state_dict())
    term = result.metrics["perceptual"].total / 2
    torch.testing.assert_close(result.loss, plain.autoencoder_loss(batch).loss + 2 * term)
    assert set(objective.frozen) == {"perceptual"}


@pytest.mark.parametrize("channels", [[8, 8, 8], [8, 8, 8, 8]], ids=["f4", "f8"])
def test_latents_are_centred_and_of_unit_deviation_after_export(tmp_path, channels):
    torch.manual_seed(0)
    objective = build_objective(tiny.autoencoder_config(channels=channels))
    with torch.no_grad():  # far from zero, as those of a trained autoencoder may be
        objective.autoencoder.model.quant_conv.bias[:4] += torch.tensor([3.0, -1.0, 0.0, 0.5])
    batches = [tiny.batch(16, first_seed=s) for s in (0, 100)]
    bad = {**batches[0], "images": batches[0]["images"] * 50, "weight": torch.zeros(16)}
    figures = objective.finish([*batches, bad])  # a quarantined batch counts for nothing
    facts = objective.export(tmp_path)
    opened = AutoencoderKL.from_pretrained(tmp_path)
    assert opened.config.scaling_factor == pytest.approx(1 / figures["latent_std"])
    codec = LatentCodec(opened)
    with torch.no_grad():
        own = torch.cat([objective.reconstruct(b).latents for b in batches])
        latents = torch.cat([codec.encode(b["images"], b["seeds"]) for b in batches])
        pictures = codec.decode(latents[:2])
        original = objective.autoencoder.model.decode(own[:2]).sample
    assert latents.shape[2] == 16 // facts["factor"]
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5 and abs(latents.square().mean() - 1) < 1e-4
    shift = torch.tensor(facts["latent_shift"]).view(1, -1, 1, 1)
    torch.testing.assert_close(latents, (own - shift) * opened.config.scaling_factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pictures, original, rtol=1e-4, atol=1e-5)
    assert figures["latent_mean_rms"] == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-5)
    assert shift[0, 0] > 2
    again = build_objective(tiny.autoencoder_config(channels=channels))
    again.load_state_dict(objective.state_dict())
    assert again.scaling_factor == objective.scaling_factor and again.latent_mean.equal(objective.latent_mean)


def test_the_shift_of_a_pretrained_autoencoder_is_taken_off_and_no_pipeline_opens_it(tmp_path):
    objective, batch = build_objective(tiny.autoencoder_config()), tiny.batch(2)
    objective.export(tmp_path)
    opened = AutoencoderKL.from_pretrained(tmp_path)
    plain = LatentCodec(opened).encode(batch["images"])
    images = LatentCodec(opened).decode(plain)
    assert LatentCodec(opened).opens_in_pipelines
    opened.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    codec = LatentCodec(opened)
    torch.testing.assert_close(codec.encode(batch["images"]), (plain - 0.25) * 2)
    torch.testing.assert_close(codec.decode((plain - 0.25) * 2), images)
    assert not codec.opens_in_pipelines


def test_an_export_without_measurement_keeps_the_weights(tmp_path):
    objective, again = (build_objective(tiny.autoencoder_config()) for _ in range(2))
    objective.export(tmp_path)
    again.load_weights(tmp_path)
    batch = tiny.batch(2)
    assert again.autoencoder_loss(batch).loss.equal(objective.autoencoder_loss(batch).loss)


def test_it_learns_to_reconstruct():
    torch.manual_seed(0)
    objective, batch = build_objective(tiny.autoencoder_config()), tiny.batch(8)
    batch["images"] = batch["images"][:, :, :1, :1].expand(-1, -1, 16, 16).contiguous()  # plain colours
    optimizer = torch.optim.AdamW(objective.autoencoder.parameters(), 3e-3)
    with torch.no_grad():
        before = objective.validate(batch)["l1"]
    for _ in range(60):
        optimizer.zero_grad()
        objective.autoencoder_loss(batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = objective.validate(batch)
    assert after["l1"].total < 0.4 * before.total and set(after) == {"loss", "l1", "kl", "psnr"}


def test_the_preview_sets_pairs_side_by_side(objective):
    batch = tiny.batch(4)
    with torch.no_grad():
        preview = objective.preview(batch)
    assert preview.images.shape == (8, 3, 16, 16) and preview.images[0::2].equal(batch["images"])
    assert preview.titles[:2] == ["image", "reconstruction"]


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(images + 0.02, images), torch.full((2,), 40.0), rtol=1e-4, atol=0)


def test_misfits_are_named(tmp_path):
    with pytest.raises(ValueError, match="not a multiple of 4"):
        tiny.autoencoder_config(image_size=18)
    objective = build_objective(tiny.autoencoder_config())
    objective.export(tmp_path)
    with pytest.raises(ValueError, match="do not fit"):
        build_objective(tiny.autoencoder_config(latent_channels=8)).load_weights(tmp_path)
    with pytest.raises(ValueError, match="no sample"):
        objective.finish([])
    assert objective.flops_per_sample() > 1e5
    counted = type(objective).abstract_networks(objective.config)["autoencoder"].parameters()
    assert sum(p.numel() for p in counted) == sum(p.numel() for p in objective.autoencoder.parameters())
