"""Members that are trained side by side train as each one does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from genmodels.families import SideBySideConfig, build_objective, members_of, objective_class
from tests.genmodels import tiny

DIT = {"kind": "dit", "patch_size": 2, "width": 16, "depth": 1, "heads": 2}
MEMBERS = {
    "unet-v": tiny.diffusion_config(),
    "dit-flow": tiny.diffusion_config(denoiser=DIT, prediction_type="flow", noise_schedule="flow"),
    "kl": tiny.autoencoder_config(),
}


def config(**members: Any) -> SideBySideConfig:
    return SideBySideConfig(members={**MEMBERS, **members})


@pytest.fixture
def inputs(tmp_path):
    for name in MEMBERS:
        tiny.write_inputs(tmp_path / "inputs" / name)
    return tmp_path / "inputs"


@pytest.fixture
def objective(inputs):
    torch.manual_seed(0)
    return build_objective(config(), inputs)


def alone(name, inputs):
    """The same member by itself, with the same weights to begin with."""
    torch.manual_seed(0)
    together = build_objective(config(), inputs).members[name]
    single = build_objective(MEMBERS[name], inputs / name)
    for network, module in single.networks.items():
        module.load_state_dict(together.networks[network].state_dict())
    return single


def test_losses_and_gradients_are_those_of_each_alone(objective, inputs):
    batch = tiny.with_tokens(tiny.batch(4), inputs / "kl")
    names = [phase.network for phase in objective.phases]
    assert names == ["unet-v-denoiser", "dit-flow-denoiser", "kl-autoencoder"] == list(objective.networks)
    for phase, name in zip(objective.phases, MEMBERS, strict=True):
        single = alone(name, inputs)
        (own_phase,) = single.phases
        result, own = phase.loss(batch), own_phase.loss(tiny.with_tokens(tiny.batch(4), inputs / "kl"))
        assert torch.equal(result.loss, own.loss)
        assert result.metrics["loss"] == own.metrics["loss"] == result.metrics[f"{name}/loss"]
        assert set(result.metrics) == {"loss", *(f"{name}/{key}" for key in own.metrics)}
        result.loss.backward()
        own.loss.backward()
        ours, theirs = objective.networks[phase.network], single.networks[own_phase.network]
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad)


def test_equal_frozen_networks_are_held_and_used_once(objective, inputs, monkeypatch):
    first, second, _ = objective.members.values()
    assert first.autoencoder is second.autoencoder
    calls = []
    encode = type(first.autoencoder).encode
    monkeypatch.setattr(type(first.autoencoder), "encode", lambda *given: calls.append(1) or encode(*given))
    batch = tiny.with_tokens(tiny.batch(4), inputs / "kl")
    for phase in objective.phases[:2]:
        phase.loss(batch)
    assert len(calls) == 1
    objective.phases[0].loss({**batch, "images": batch["images"] * 0.5})
    assert len(calls) == 2  # of other images


def test_different_frozen_networks_stay_apart(inputs):
    torch.manual_seed(1)
    other = build_objective(tiny.autoencoder_config())
    other.export(inputs / "dit-flow" / "autoencoder")
    first, second, _ = build_objective(config(), inputs).members.values()
    assert first.autoencoder is not second.autoencoder


def test_validation_and_what_is_measured_last(objective, inputs):
    batch = tiny.with_tokens(tiny.batch(4), inputs / "kl")
    with torch.no_grad():
        found = objective.validate(batch)
        members = [member.validate(batch)["loss"] for member in objective.members.values()]
    assert found["loss"].total == sum(mean.total for mean in members) and found["loss"].count == 16 + 16 + 4
    assert found["kl/psnr"].count == 4
    figures = objective.finish(iter([batch]))
    assert set(figures) == {"kl/latent_mean_rms", "kl/latent_std", "kl/reconstruction_psnr"}
    state = objective.state_dict()
    assert set(state) == {"kl/latent_mean", "kl/latent_std"}
    objective.members["kl"].latent_std = torch.ones(())
    objective.load_state_dict(state)
    assert float(objective.members["kl"].latent_std) == figures["kl/latent_std"]


def test_the_preview_has_a_row_for_each_member(objective, inputs):
    with torch.no_grad():
        preview = objective.preview(tiny.with_tokens(tiny.batch(8), inputs / "kl"))
    assert preview.images.shape == (24, 3, 16, 16) and preview.columns == 8
    assert preview.titles[0] == f"unet-v {tiny.CAPTIONS[0]}" and preview.titles[-1] == "kl reconstruction"


def test_every_member_is_exported_as_if_alone_and_starts_from_it(objective, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    facts = objective.export(out)
    assert facts["layout"] == {"unet-v": "Stable Diffusion", "dit-flow": "own", "kl": "AutoencoderKL"}
    assert facts["parameters"]["kl-autoencoder"] == sum(
        p.numel() for p in objective.members["kl"].autoencoder.parameters()
    )
    torch.manual_seed(5)
    fresh = build_objective(config(), tmp_path / "inputs")
    fresh.load_weights(out)
    for ours, theirs in zip(objective.networks.values(), fresh.networks.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    (out / "dit-flow" / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match="dit-flow: "):
        fresh.load_weights(out)


def test_sizes_are_known_before_any_input(objective):
    networks = objective_class("side_by_side").abstract_networks(config())
    assert list(networks) == list(objective.networks)
    assert all(p.is_meta for module in networks.values() for p in module.parameters())


def test_what_cannot_be_trained_side_by_side_is_refused(inputs):
    with pytest.raises(ValidationError, match="image_size must be the same"):
        config(large=tiny.autoencoder_config(image_size=32))
    with pytest.raises(ValidationError, match="cannot name a member"):
        config(**{"a/b": tiny.autoencoder_config()})
    with pytest.raises(ValidationError, match="'init' cannot name a member"):
        config(init=tiny.autoencoder_config())
    maps = {
        name: tiny.diffusion_config(image_condition={"kind": "member", "member": name}) for name in ("a.png", "b.png")
    }
    with pytest.raises(ValidationError, match=r"the same image of a sample, not a\.png, b\.png"):
        config(one=maps["a.png"], other=maps["b.png"])
    with pytest.raises(ValueError, match=r"another: .* needs autoencoder/"):
        build_objective(config(another=tiny.diffusion_config()), inputs)


def test_members_of_any_configuration():
    assert members_of(config()).keys() == MEMBERS.keys()
    assert members_of(MEMBERS["kl"]) == {"": MEMBERS["kl"]}


def test_members_that_classify_by_sentences_do_so_side_by_side(tmp_path):
    told = {"label": "json:digit", "classes": {"7": "seven", "3": "three"}}
    members = {name: tiny.clip_config(zero_shot=told) for name in ("one", "other")}
    for name in members:
        tiny.write_inputs(tmp_path / name)
    torch.manual_seed(0)
    objective = build_objective(SideBySideConfig(members=members), tmp_path)
    batch = tiny.with_tokens(tiny.batch(4), tmp_path / "one")
    batch["labels"] = ["7", "3", "7", "3"]
    with torch.no_grad():
        objective.begin_validation()
        found = objective.validate(batch)
    assert [found[f"{name}/zero_shot_accuracy"].count.item() for name in members] == [4, 4]
    other = tiny.clip_config(zero_shot={**told, "label": "cls"})
    with pytest.raises(ValidationError, match="read the same label of a sample, not cls, json:digit"):
        SideBySideConfig(members={**members, "other": other})
