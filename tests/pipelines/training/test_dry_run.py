"""`--dry-run`: sizes and memory, against numbers worked out by hand and against the networks themselves."""

from __future__ import annotations

import pytest

from genmodels.families import build_objective
from pipelines.training.config import load_config
from pipelines.training.dry_run import describe, state_bytes
from tests.genmodels import tiny
from tests.pipelines.data.shards import write_shards


@pytest.mark.parametrize(
    ("stage", "world_size", "floats_a_parameter"),
    [
        # weights, gradients, two moments, average; from stage 1 on a share of an fp32 copy of the weights
        (0, 1, 1 + 1 + 2 + 1),
        (0, 4, 1 + 1 + 2 + 1),
        (1, 1, 1 + 1 + (2 + 1 + 1)),
        (1, 4, 1 + 1 + (2 + 1 + 1) / 4),
        (2, 4, 1 + (1 + 2 + 1 + 1) / 4),
        (3, 4, (1 + 1 + 2 + 1 + 1) / 4),
    ],
)
def test_state_bytes(stage, world_size, floats_a_parameter):
    assert state_bytes(1000, stage, world_size) == 4 * 1000 * floats_a_parameter


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_ROOT", str(tmp_path / "root"))
    return tmp_path


def small(preset: str, root, **objective: object) -> list[str]:
    write_shards(root / "shards", samples=24, per_shard=12)
    sections = [f"objective={objective}", f"data.url={root}/shards", "data.demo=null", "data.global_batch_size=8"]
    return [*sections, "data.validation_url=null", "run.steps=6"]


def test_a_dry_run_tells_the_sizes_of_what_is_built(root, capsys):
    objective = tiny.diffusion_config().model_dump()
    overrides = ["run.name=dry", "engine.zero_stage=2", "data.micro_batch=2"]
    given = [part.replace("None", "null") for part in small("ldm_demo", root, **objective)]
    facts = describe(load_config("ldm_demo", [*given, *overrides]))
    built = build_objective(tiny.diffusion_config(), tiny.write_inputs(root / "inputs"))
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in built.networks.items()}
    assert facts["parameters"] == counted and set(counted) == {"denoiser"}
    assert facts["memory_mib"]["denoiser"] == pytest.approx(
        [counted["denoiser"] * 4 * floats / 2**20 for floats in (5, 4, 3.5, 3)]
    )
    assert (facts["samples"], facts["steps_an_epoch"], facts["epochs"]) == (24, 3.0, 2.0)
    assert (facts["global_batch_size"], facts["accumulation"]) == (8, 2)
    assert facts["layout"].startswith("Stable Diffusion")
    assert facts["run_folder"] == f"{root}/root/dry"
    printed = capsys.readouterr().out
    assert f"{counted['denoiser']:,}" in printed and "deepspeed 2" in printed and "name: dry" in printed
    assert not (root / "root" / "dry").exists(), "a dry run begins nothing"


@pytest.mark.parametrize("preset", ["gan_demo", "attn_gan_demo"])
def test_a_gan_is_told_by_network_and_opened_by_nobody_else(root, capsys, preset):
    facts = describe(load_config(preset, []))
    assert facts["layout"] == "our own: only generate.py opens it"
    shown = capsys.readouterr().out
    assert "discriminator" in shown and "generator" in shown


@pytest.mark.parametrize("preset", ["autoencoder_demo", "ldm_demo"])
def test_the_demo_presets_without_their_data(root, capsys, preset):
    """The shards are not drawn for a dry run: it says what is missing, and everything else."""
    facts = describe(load_config(preset, []))
    assert "no shard matches" in facts["data"] and "samples" not in facts
    assert facts["accumulation"] == 1
    assert "no shard matches" in capsys.readouterr().out
    if preset == "autoencoder_demo":
        built = build_objective(load_config(preset, []).objective).networks["autoencoder"]
        assert facts["parameters"] == {"autoencoder": sum(p.numel() for p in built.parameters())}


def test_every_network_has_its_row(root, capsys):
    objective = "objective.discriminator={start_step: 3, channels: 8, layers: 1}"
    config = load_config("autoencoder_demo", [objective, "engines.discriminator.kind=torch"])
    facts = describe(config)
    built = build_objective(config.objective)
    assert facts["parameters"] == {n: sum(p.numel() for p in m.parameters()) for n, m in built.networks.items()}
    rows = [line for line in capsys.readouterr().out.splitlines() if "autoencoder " in line or "discriminator " in line]
    assert any("discriminator" in row and "torch" in row for row in rows)
    assert any("autoencoder" in row and "deepspeed 1" in row for row in rows)


@pytest.mark.parametrize(
    ("text_encoder", "autoencoder", "layout"),
    [
        ("none", "null", "DDPMPipeline (diffusers opens it)"),
        ("none", "given", "our own: only generate.py opens it"),
        ("trained", "given", "Stable Diffusion (diffusers opens it)"),
    ],
)
def test_the_export_layout(root, capsys, text_encoder, autoencoder, layout):
    overrides = [f"objective.text_encoder={{kind: {text_encoder}}}", f"objective.autoencoder={autoencoder}"]
    if text_encoder == "none":
        overrides.append("objective.denoiser.pooled_text=false")
    assert describe(load_config("ldm_demo", overrides))["layout"] == layout
