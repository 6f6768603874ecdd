"""AttnGAN and its DAMSM at every ZeRO stage train as in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genmodels.families import build_objective
from genmodels.text.tokenizer import load
from infra.errors import BadRequest
from pipelines.training.inputs import place
from pipelines.training.trainer import check_phases
from tests.genmodels import tiny
from tests.pipelines.training.small import (
    GLOBAL_BATCH,
    assert_same_training,
    assert_something_was_learnt,
    make_trainer,
    train_steps,
    training_config,
)
from tests.pipelines.training.test_engines import ENGINES
from tests.processes import on_ranks

pytestmark = pytest.mark.slow
STEPS = 20
MODELS: dict[str, Any] = {
    "damsm": tiny.damsm_config(),
    "attn_gan": tiny.attn_gan_config(damsm_weight=0.5),
    "with a penalty": tiny.attn_gan_config(damsm_weight=0.0, penalties={"r1": 1.0, "every": 4}),  # accumulates
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_inputs(tmp_path_factory.mktemp("inputs"))
    tiny.write_damsm(folder / "damsm", folder)
    return folder


def _config(name: str, kind: str, stage: int, world_size: int) -> Any:
    # A larger epsilon: AdamW would make differences of rounding, where a gradient is nearly 0, as large as its steps.
    calm = {"optimizer__learning_rate": 3e-3, "optimizer__epsilon": 1e-4}
    whole = {} if name == "with a penalty" else {"data__micro_batch": GLOBAL_BATCH // world_size}
    return training_config(kind, stage, world_size, MODELS[name], **calm, **whole)


def _engines(name: str) -> list[tuple[str, int]]:
    return [(kind, stage) for kind, stage in ENGINES if not (name == "with a penalty" and stage == 3)]


def _train(rank: int, world_size: int, inputs: Path) -> dict[Any, list[dict[str, float]]]:
    return {
        (name, kind, stage): train_steps(
            make_trainer(name, _config(name, kind, stage, world_size), inputs, rank), 0, STEPS, rank, world_size, inputs
        )
        for name in MODELS
        for kind, stage in _engines(name)
    }


def test_every_zero_stage_follows_plain_torch(inputs: Path) -> None:
    found = on_ranks(2, _train, inputs)[0]
    for name in MODELS:
        reference = found[name, "torch", 0]
        assert_something_was_learnt(reference)
        for engine in _engines(name)[1:]:
            assert_same_training(reference, found[(name, *engine)], (name, engine))


def _at_world_size(rank: int, world_size: int, inputs: Path) -> dict[str, list[dict[str, float]]]:
    return {
        name: train_steps(
            make_trainer(name, _config(name, "deepspeed", 1, world_size), inputs, rank), 0, 6, rank, world_size, inputs
        )
        for name in MODELS
    }


def test_the_number_of_ranks_changes_nothing(inputs: Path) -> None:
    alone, pair = (on_ranks(world_size, _at_world_size, inputs)[0] for world_size in (1, 2))
    for name, expected in alone.items():
        assert_same_training(expected, pair[name], name, abs=2e-5, rel=2e-4)


def test_a_damsm_comes_with_its_tokenizer(inputs: Path, tmp_path: Path) -> None:
    place("objective.damsm", "models:/mine", inputs / "damsm", tmp_path)
    made: Any = build_objective(MODELS["attn_gan"], tmp_path)
    assert load(tmp_path / "tokenizer").get_vocab() == made.tokenizer.get_vocab()
    with pytest.raises(BadRequest, match=r"objective\.damsm=models:/other: holds no DAMSM; train one"):
        place("objective.damsm", "models:/other", inputs / "clip", tmp_path)


@pytest.mark.parametrize("name", ["damsm", "attn_gan"])
def test_accumulation_would_change_the_comparison_and_is_refused(name: str, inputs: Path) -> None:
    config = training_config("torch", 0, 1, MODELS[name])
    with pytest.raises(ValueError, match=r"couples the samples of a batch, .*: set data.micro_batch=16"):
        check_phases(config, build_objective(MODELS[name], inputs))
