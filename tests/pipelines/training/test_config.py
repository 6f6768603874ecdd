"""Configurations: presets, overrides, and what a wrong one is told."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from infra.errors import BadRequest
from pipelines.training.config import (
    MAY_CHANGE,
    TrainConfig,
    changes,
    flatten,
    load_config,
)
from pipelines.training.explain import describe_keys, models_in
from pipelines.training.presets import PRESETS, override, read_preset

# Presets of `train_unclip.py` name presets of stages, and are no training themselves.
PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml") if "run" in read_preset(str(path)))


def refused(*assignments: str, preset: str = "ldm_demo") -> str:
    with pytest.raises(BadRequest) as caught:
        load_config(preset, list(assignments))
    message = str(caught.value)
    assert "\n" not in message
    return message


# What presets for data of one's own leave to be given.
GIVEN = {
    name: ["data.url=s3://bucket/shards"]
    for name in PRESET_NAMES
    if not name.endswith("_demo") and "variants" not in name and "lifecycle" not in name
}
for _name in ("ldm_256", "sd1", "sd2"):
    GIVEN[_name].append("objective.text_encoder.path=clip")


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_preset_loads_and_survives_json(preset):
    given = GIVEN.get(preset, [])
    config = load_config(preset, given)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config == load_config(str(PRESETS / f"{preset}.yaml"), given) == load_config(f"{preset}.yaml", given)


@pytest.mark.parametrize("preset", GIVEN)
def test_a_preset_says_what_is_left_to_give(preset):
    message = refused(preset=preset)
    for assignment in GIVEN[preset]:
        assert f"{assignment.partition('=')[0]} is missing" in message


def test_the_demo_presets_are_there():
    assert {"autoencoder_demo", "ldm_demo"} <= set(PRESET_NAMES)


def test_overrides_merge_and_the_rest_stays():
    plain = load_config("ldm_demo", [])
    config = load_config(
        "ldm_demo",
        ["run.steps=7", "optimizer.learning_rate=1e-3", "objective.denoiser.channels=[32, 64]", "run.init_from="],
    )
    assert (config.run.steps, config.optimizer.learning_rate) == (7, 1e-3)
    assert config.objective.denoiser.channels == [32, 64]
    assert config.run.init_from is None
    before, after = (flatten(json.loads(each.model_dump_json())) for each in (plain, config))
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"run.steps", "optimizer.learning_rate", "objective.denoiser.channels"}


def test_the_last_override_wins_and_sections_appear():
    tree: dict[str, Any] = {"run": {"steps": 1}}
    merged = override(tree, ["run.steps=2", "run.steps=3", "engines.generator.zero_stage=2"])
    assert merged == {"run": {"steps": 3}, "engines": {"generator": {"zero_stage": 2}}}
    assert tree == {"run": {"steps": 1}}


@pytest.mark.parametrize("assignment", ["steps", "=3", "run.steps.more=3"])
def test_what_is_no_override_is_refused(assignment):
    assert assignment in refused(assignment)


def test_a_misspelt_key_names_the_close_one():
    assert refused("run.stepz=3") == "unknown key run.stepz (did you mean steps?)"


def test_a_foreign_key_names_what_is_allowed():
    message = refused("ema.half_life=3")
    assert message == "unknown key ema.half_life (allowed: decay, lengths, store_every, warmup)"
    assert all(section in refused("zzz.a=1") for section in TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("objective.denoiser.chanels=[64]", "unknown key objective.denoiser.chanels (did you mean channels?)"),
        ("objective.text_encoder.widht=3", "unknown key objective.text_encoder.widht (did you mean width?)"),
        (
            "objective.kind=gam",
            "objective.kind: there is no gam; allowed: 'autoencoder', 'clip', 'latent_diffusion', 'diffusion_prior', "
            "'autoregressive_prior', 'gan', 'pix2pix', 'cycle_gan', 'damsm', 'attn_gan', 'side_by_side'",
        ),
        (
            "objective={kind: side_by_side, members: {a: {kind: autoencoder, chanels: [64]}}}",
            "unknown key objective.members.a.chanels (did you mean channels?)",
        ),
        ("engines.denoiser.zero_stag=2", "unknown key engines.denoiser.zero_stag (did you mean zero_stage?)"),
    ],
)
def test_keys_of_unions_are_named_as_they_are_written(assignment, message):
    assert refused(assignment) == message


def test_a_union_member_does_not_offer_the_keys_of_another():
    message = refused("objective.perceptual_weigth=1")  # the autoencoder has perceptual_weight, latent diffusion not
    assert "unknown key objective.perceptual_weigth" in message and "perceptual_weight" not in message.split("(")[1]


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("run.steps=many", "run.steps"),
        ("run.steps=0", "run.steps"),
        ("data.global_batch_size=6.5", "data.global_batch_size"),
        ("engine.zero_stage=4", "engine.zero_stage"),
        ("precision.compute=fp8", "precision.compute"),
        ("ema.decay=1", "ema.decay"),
        ("data=here", "data"),
        ("objective.denoiser.channels=[32, a]", "objective.denoiser.channels.1"),
        ("data.url=gs://bucket/x", "data.url"),
        ("run.root=gs://bucket/x", "run.root"),
        ("tracking.register_as=a/b", "tracking.register_as"),
    ],
)
def test_a_wrong_value_names_the_key(assignment, key):
    message = refused(assignment)
    assert message.startswith(f"{key}: ")
    value = assignment.partition("=")[2]
    assert value in message or re.sub(r".*?(\w+)\]", r"\1", value) in message


@pytest.mark.parametrize("name", ["", "..", ".", ".hidden", "a/b", "/root", "a b", "[red]", "x\ny", "s3://b/x"])
def test_a_run_name_is_one_plain_folder(name):
    with pytest.raises(BadRequest, match=r"run\.name: "):
        load_config("ldm_demo", [f"run.name={json.dumps(name)}"])
    assert load_config("ldm_demo", ["run.name=good_name-1.2"]).run.name == "good_name-1.2"


def test_all_mistakes_are_told_at_once():
    message = refused("run.stepz=3", "run.steps=many", "objective.text_encoder.widht=3", "data.lanes=0")
    for part in ("run.stepz", "run.steps: ", "objective.text_encoder.widht", "data.lanes: "):
        assert part in message
    assert message.count("; ") == 3


def test_what_is_missing_is_named(tmp_path):
    preset = tmp_path / "empty.yaml"
    preset.write_text("run: {name: x}\n")
    message = refused(preset=str(preset))
    assert "run.steps is missing" in message and "data is missing" in message and "objective is missing" in message


def test_batches_have_to_divide():
    message = refused("workers.count=3", "data.lanes=4")
    assert "workers.count=3 does not divide data.lanes=4" in message and "[1, 2, 4]" in message
    assert "data.global_batch_size=30 is not a multiple of data.lanes=4" in refused("data.global_batch_size=30")
    assert "data.micro_batch=5 does not divide" in refused("data.micro_batch=5")
    both = refused("workers.count=3", "data.global_batch_size=30")
    assert "workers.count=3" in both and "data.global_batch_size=30" in both


@pytest.mark.parametrize(
    ("workers", "micro_batch", "accumulation"), [(1, "null", 1), (2, "null", 1), (2, "8", 4), (4, "8", 2)]
)
def test_accumulation(workers, micro_batch, accumulation):
    config = load_config(
        "ldm_demo", [f"workers.count={workers}", f"data.micro_batch={micro_batch}", "data.global_batch_size=64"]
    )
    assert config.accumulation == accumulation
    assert config.accumulation * config.rank_micro_batch * workers == 64


def test_settings_by_network():
    assignments = ["engines.denoiser.zero_stage=3", "optimizers.denoiser.beta1=0.5", "engine.zero_stage=2"]
    config = load_config("ldm_demo", assignments)
    assert (config.engine_of("denoiser").zero_stage, config.engine_of("another").zero_stage) == (3, 2)
    assert (config.optimizer_of("denoiser").beta1, config.optimizer_of("another").beta1) == (0.5, 0.9)


@pytest.mark.parametrize("section", ["engines.denoisr.zero_stage=2", "optimizers.denoisr.beta1=0.5"])
def test_a_network_that_is_not_there_is_refused(section):
    message = refused(section)
    assert "denoisr: there is no such network" in message and message.endswith("only denoiser")


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("ldm_demo", ["data.url=shards/*.tar", "data.validation_url=file://held", "run.root=runs"])
    assert config.data.url == f"{tmp_path}/shards/*.tar"
    assert config.data.validation_url == f"{tmp_path}/held"
    assert config.run.root == f"{tmp_path}/runs"
    remote = load_config("ldm_demo", ["data.url=s3://b/k", "data.validation_url=null", "run.root=s3://b/runs"])
    assert (remote.data.url, remote.data.validation_url, remote.run.root) == ("s3://b/k", None, "s3://b/runs")


def test_run_root_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    assert load_config("ldm_demo", []).data.url == f"{tmp_path}/data/digits-32/train"
    assert load_config("ldm_demo", ["data.url=${RUN_ROOT}/mine"]).data.url == f"{tmp_path}/mine"


def test_presets_that_cannot_be_read(tmp_path):
    assert all(name in refused(preset="nowhere") for name in PRESET_NAMES)
    assert "there is no preset" in refused(preset=str(tmp_path))  # a folder
    for name, content in {"list": b"[1, 2]", "broken": b"run: {", "binary": b"\xff\xfe\x00"}.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
        assert name in refused(preset=str(tmp_path / f"{name}.yaml"))


def test_a_date_in_a_preset_is_a_wrong_type_and_no_crash(tmp_path):
    tree = read_preset("ldm_demo")
    tree["run"]["name"] = datetime.date(2026, 11, 20)
    (tmp_path / "dated.yaml").write_text(yaml.safe_dump(tree))
    assert refused(preset=str(tmp_path / "dated.yaml")).startswith("run.name: ")


def _resolved(*assignments: str) -> dict[str, Any]:
    return json.loads(load_config("ldm_demo", list(assignments)).model_dump_json())


def test_changes_are_shown_key_by_key():
    found = changes(_resolved(), _resolved("optimizer.learning_rate=0.5", "run.seed=3"))
    assert found == ["optimizer.learning_rate: 0.004 → 0.5", "run.seed: 0 → 3"]
    appeared = changes(_resolved(), _resolved("optimizers.denoiser.beta1=0.5"))
    assert "optimizers.denoiser.beta1: null → 0.5" in appeared


@pytest.mark.parametrize(
    "assignment",
    [
        "run.steps=9", "run.log_every=1", "data.micro_batch=4", "workers.count=4", "engine.zero_stage=3",
        "engines.denoiser.zero_stage=3", "tracking.register_as=another", "precision.compile=true",
        "precision.activation_checkpointing=true", "run.keep_checkpoints=9",
    ],
)  # fmt: skip
def test_what_leaves_the_run_the_same_may_change(assignment):
    assert _resolved() != _resolved(assignment)
    assert changes(_resolved(), _resolved(assignment)) == []


@pytest.mark.parametrize(
    "assignment",
    ["data.url=/elsewhere", "data.global_batch_size=48", "data.lanes=8", "run.seed=1", "ema.decay=0.5",
     "precision.compute=bf16", "objective.prediction_type=epsilon", "optimizer.weight_decay=0", "run.init_from=/x"],
)  # fmt: skip
def test_what_makes_another_run_may_not_change(assignment):
    assert len(changes(_resolved(), _resolved(assignment))) == 1


def _all_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, entry in model.model_fields.items():
        inner = [] if str(entry.annotation).startswith("dict") else models_in(entry.annotation)
        keys |= {key for section in inner for key in _all_keys(section, f"{prefix}{name}.")} or {f"{prefix}{name}"}
    return keys


def test_what_may_change_are_keys_that_exist():
    every = _all_keys(TrainConfig)
    for allowed in MAY_CHANGE:
        assert any(key == allowed or key.startswith(f"{allowed}.") for key in every), allowed


def test_help_describes_every_key():
    lines = describe_keys(TrainConfig)
    described = {match[1] for line in lines if (match := re.match(r"  ([\w.]+)  \(", line))}
    assert described == _all_keys(TrainConfig)
    assert {"run.steps", "objective.denoiser.channels", "objective.discriminator.weight", "engines"} <= described
    assert "  objective.kind=latent_diffusion:" in lines and "  objective.text_encoder.kind=pretrained:" in lines
    assert next(line for line in lines if line.startswith("  run.steps  (required) "))
    plain = {"beta1", "beta2", "epsilon", "weight_decay", "experiment", "kind"}  # the field's own names say it
    bare = {line.split()[0] for line in lines if line.endswith(")") and re.match(r"  [\w.]+  \([^)]*\)$", line)}
    assert {key.rpartition(".")[2] for key in bare} <= plain


def test_a_config_is_frozen(tmp_path: Path):
    with pytest.raises(ValueError, match="frozen"):
        load_config("ldm_demo", []).run.steps = 3  # type: ignore[misc]
