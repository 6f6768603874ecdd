"""Low-rank adapters: what they add, what is trained, and that diffusers loads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pydantic import ValidationError

from genmodels.diffusion import lora
from genmodels.families import build_objective
from pipelines.training.engine import freeze, trainable
from tests.genmodels import tiny

RANK = 3


@pytest.fixture
def inputs(tmp_path):
    return tiny.write_inputs(tmp_path / "inputs")


@pytest.fixture
def base(inputs):
    torch.manual_seed(0)
    return build_objective(tiny.diffusion_config(), inputs)


@pytest.fixture
def adapted(base, inputs, tmp_path):
    """Started from `base`, with adapters that have learnt something."""
    base.export(tmp_path / "base")
    torch.manual_seed(1)
    objective = build_objective(tiny.diffusion_config(lora={"rank": RANK, "alpha": 6}), inputs)
    objective.load_weights(tmp_path / "base")
    for name, parameter in objective.denoiser.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return objective


def test_new_adapters_change_nothing(base, inputs, tmp_path):
    base.export(tmp_path / "base")
    objective = build_objective(tiny.diffusion_config(lora={"rank": RANK}), inputs)
    objective.load_weights(tmp_path / "base")
    batch = tiny.with_tokens(tiny.batch(2), inputs)
    assert torch.equal(objective.loss(batch).loss, base.loss(tiny.with_tokens(tiny.batch(2), inputs)).loss)


def test_only_the_adapters_are_trained_and_they_are_small(adapted):
    freeze(adapted.denoiser, [], "denoiser", adapted.trained["denoiser"])
    names = [name for name, _ in trainable(adapted.denoiser)]
    layers = lora.adapted_layers(adapted.denoiser.backbone)
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert len(names) == 2 * len(layers)
    ends = {name.partition("attn")[2].partition(".")[2] for name in layers}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}
    count = sum(p.numel() for _, p in trainable(adapted.denoiser))
    assert count == sum(RANK * (layer.in_features + layer.out_features) for layer in layers.values())


def test_merged_weights_are_those_of_the_paper(adapted):
    weights = lora.merged(adapted.denoiser.backbone)
    for name, layer in lora.adapted_layers(adapted.denoiser.backbone).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.base_layer.weight + 6 / RANK * up @ down
        assert torch.allclose(weights[f"{name}.weight"], expected, atol=1e-6)


def test_the_merged_model_computes_what_the_adapted_one_does(adapted, inputs, tmp_path):
    adapted.export(tmp_path / "adapted")
    plain = build_objective(tiny.diffusion_config(), inputs)
    plain.load_weights(tmp_path / "adapted")
    batch = tiny.with_tokens(tiny.batch(2), inputs)
    loss = adapted.loss(batch).loss
    assert torch.allclose(plain.loss(tiny.with_tokens(tiny.batch(2), inputs)).loss, loss, atol=1e-5)
    assert all(not hasattr(module, "lora_A") for module in plain.denoiser.modules())


def test_diffusers_adds_the_exported_adapters_to_the_model_they_were_started_from(adapted, tmp_path):
    adapted.export(tmp_path / "adapted")

    def draw(pipeline):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16, "output_type": "np"}
        return pipeline("a red seven on a white background", generator=generator, **settings).images[0]

    merged = draw(StableDiffusionPipeline.from_pretrained(tmp_path / "adapted"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    without = draw(pipeline)
    pipeline.load_lora_weights(tmp_path / "adapted" / "lora")
    np.testing.assert_allclose(draw(pipeline), merged, atol=1e-4)
    assert np.abs(without - merged).max() > 0.01


def test_transformers_take_adapters_too(inputs, tmp_path):
    dit = {"kind": "dit", "width": 16, "depth": 2, "heads": 2}
    plain = build_objective(tiny.diffusion_config(denoiser=dit), inputs)
    plain.export(tmp_path / "base")
    targets = ["to_q", "to_v", "to_out"]
    objective = build_objective(tiny.diffusion_config(denoiser=dit, lora={"rank": 2, "targets": targets}), inputs)
    objective.load_weights(tmp_path / "base")
    assert {name.rpartition(".")[2] for name in lora.adapted_layers(objective.denoiser.backbone)} == set(targets)
    for name, value in lora.merged(objective.denoiser.backbone).items():
        assert torch.equal(value, plain.denoiser.backbone.state_dict()[name]), name


def test_targets_that_are_nowhere_are_refused(inputs):
    with pytest.raises(ValueError, match="nowhere"):
        build_objective(tiny.diffusion_config(lora={"targets": ["nowhere"]}), inputs)
    with pytest.raises(ValidationError):
        tiny.diffusion_config(lora={"rank": 0})
