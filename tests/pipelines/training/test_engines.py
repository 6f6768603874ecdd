"""DeepSpeed at every ZeRO stage trains as plain torch does: the same losses, the same skipped steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.checkpoint import commit_snapshot, list_checkpoints
from pipelines.training.deepspeed_engine import DeepSpeedEngine
from pipelines.training.export import load_objective
from tests.genmodels import tiny
from tests.pipelines.training.small import make_trainer, rank_batch, train_steps, training_config
from tests.processes import on_ranks

pytestmark = pytest.mark.slow
STEPS = 20
ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_inputs(tmp_path_factory.mktemp("inputs"))


def _train(rank: int, world_size: int, objective: str, inputs: Path) -> dict[str, Any]:
    """Twenty steps with each engine, one after the other in one pair of processes."""
    results = {}
    for kind, stage in ENGINES:
        config = training_config(kind, stage, world_size)
        trainer = make_trainer(objective, config, inputs, rank)
        logged = train_steps(trainer, 0, STEPS, rank, world_size, inputs)
        sharded = {
            name: state.engine.partitioned_elements()
            for name, state in trainer.networks.items()
            if isinstance(state.engine, DeepSpeedEngine)
        }
        whole = {
            name: sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in module.parameters())
            for name, module in trainer.objective.networks.items()
        }
        results[kind, stage] = {"logged": logged, "sharded": sharded, "whole": whole}
    return results


@pytest.mark.parametrize("objective", ["latent diffusion", "two networks"])
def test_every_zero_stage_follows_plain_torch(objective: str, inputs: Path) -> None:
    on_rank = on_ranks(2, _train, objective, inputs)
    reference = on_rank[0]["torch", 0]["logged"]
    assert len(reference) == STEPS
    assert reference[-1]["loss"] != pytest.approx(reference[0]["loss"], rel=1e-3), (
        "nothing was learnt: compares nothing"
    )
    for kind, stage in ENGINES[1:]:
        for step, (expected, found) in enumerate(zip(reference, on_rank[0][kind, stage]["logged"], strict=True)):
            for name in ("loss", "generator_loss", "grad_norm"):
                assert found.get(name) == pytest.approx(expected.get(name), abs=1e-5), (kind, stage, step, name)
    # Stage 3 keeps a half of every parameter on each rank, rounded up.
    for result in (rank["deepspeed", 3] for rank in on_rank):
        for name, total in result["whole"].items():
            assert total / 2 <= result["sharded"][name] < 0.55 * total


def _train_with_a_bad_step(rank: int, world_size: int, inputs: Path) -> dict[Any, dict[str, Any]]:
    """Two good steps, one whose loss is infinite on rank 1 alone, two good ones; with each engine."""
    results = {}
    for kind, stage in ENGINES:
        trainer = make_trainer("latent diffusion", training_config(kind, stage, world_size), inputs, rank)
        train_steps(trainer, 0, 2, rank, world_size, inputs)
        engine = trainer.networks["denoiser"].engine
        before = [{key: value.clone() for key, value in fragment.values.items()} for fragment in engine.fragments()]
        bad = rank_batch(2, rank, world_size, inputs)
        if rank == 1:
            bad["weight"][0] = math.inf  # one sample of the first micro-batch
        trainer.step(2, bad)
        after = [fragment.values for fragment in engine.fragments()]
        same = all(torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)
        skipped = trainer.skipped_in_a_row["denoiser"]
        trainer.log.read()
        good = train_steps(trainer, 3, 5, rank, world_size, inputs)
        results[kind, stage] = {
            "same": same,
            "skipped": skipped,
            "then": trainer.skipped_in_a_row["denoiser"],
            "in all": trainer.skipped_steps,
            "good": all(math.isfinite(entry["loss"]) for entry in good),
        }
    return results


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(inputs: Path) -> None:
    for results in on_ranks(2, _train_with_a_bad_step, inputs):
        for engine, result in results.items():
            assert result == {"same": True, "skipped": 1, "then": 0, "in all": 1, "good": True}, engine


def _validate_with_averages(rank: int, world_size: int, inputs: Path) -> dict[str, Any]:
    """Averages are used inside, and the training weights are back afterwards, to the bit."""
    results = {}
    for kind, stage in ENGINES:
        trainer = make_trainer("latent diffusion", training_config(kind, stage, world_size), inputs, rank)
        train_steps(trainer, 0, 3, rank, world_size, inputs)
        plain = trainer.validate([rank_batch(9, rank, world_size, inputs)], 3)["val_loss"]
        for state in trainer.networks.values():
            for value in state.ema.values:
                value.zero_()
        zeroed = trainer.validate([rank_batch(9, rank, world_size, inputs)], 3)["val_loss"]
        logged = train_steps(trainer, 3, 5, rank, world_size, inputs)
        results[kind, stage] = (plain, zeroed, logged[-1]["loss"])
    return results


def test_validation_uses_the_averages_and_leaves_the_training_alone(inputs: Path) -> None:
    results = on_ranks(2, _validate_with_averages, inputs)[0]
    undisturbed = on_ranks(2, _train_five, inputs)[0]
    for engine, (plain, zeroed, later) in results.items():
        assert plain == pytest.approx(results["torch", 0][0], abs=1e-5), engine
        assert abs(zeroed - plain) > 1e-3, engine
        assert later == pytest.approx(undisturbed, abs=1e-5), engine


def _train_five(rank: int, world_size: int, inputs: Path) -> float:
    trainer = make_trainer("latent diffusion", training_config("torch", 0, world_size), inputs, rank)
    return train_steps(trainer, 0, 5, rank, world_size, inputs)[-1]["loss"]


FROZEN = ["backbone.down_blocks.*", "text_encoder.*"]


def _train_with_some_frozen(rank: int, world_size: int, inputs: Path, folder: str) -> dict[Any, dict[str, Any]]:
    """Three steps with a part frozen; then a checkpoint, and the model that is made of it."""
    results = {}
    for kind, stage in ENGINES:
        config = training_config(kind, stage, world_size, optimizer__freeze=FROZEN)
        trainer = make_trainer("latent diffusion", config, inputs, rank)
        before = {key: value.clone() for key, value in trainer.objective.networks["denoiser"].state_dict().items()}
        losses = [entry["loss"] for entry in train_steps(trainer, 0, 3, rank, world_size, inputs)]
        url = commit_snapshot(f"{folder}/{kind}-{stage}", trainer.snapshot(3, {}))
        (checkpoint,) = list_checkpoints(f"{folder}/{kind}-{stage}")
        assert checkpoint.url == url
        made = load_objective(config, checkpoint, inputs)
        now = made.networks["denoiser"].state_dict()
        moved = {} if stage == 3 else {key: not torch.equal(now[key], before[key]) for key in before}
        with trainer.with_ema():
            probe = tiny.with_tokens(tiny.batch(4), inputs)
            drawn = trainer.objective.validate(probe)["loss"].total
            loaded = made.validate(tiny.with_tokens(tiny.batch(4), inputs))["loss"].total
        results[kind, stage] = {"losses": losses, "moved": moved, "drawn": float(drawn), "loaded": float(loaded)}
    return results


def test_frozen_parameters_stay_at_every_stage_and_the_rest_trains_as_in_plain_torch(
    inputs: Path, tmp_path: Path
) -> None:
    results = on_ranks(2, _train_with_some_frozen, inputs, str(tmp_path))[0]
    plain = results["torch", 0]
    for engine, found in results.items():
        assert found["losses"] == pytest.approx(plain["losses"], abs=1e-5), engine
        assert found["drawn"] == pytest.approx(plain["drawn"], abs=1e-4), engine
        assert found["loaded"] == pytest.approx(found["drawn"], abs=1e-4), engine
        for name, moved in found["moved"].items():
            assert moved != name.startswith(("backbone.down_blocks.", "text_encoder.")), (engine, name)


def test_a_pattern_that_freezes_nothing_or_everything_is_refused(inputs: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no parameter of 'denoiser' is named like down_blocks\.\*; .* such as backbone"
    ):
        make_trainer("latent diffusion", training_config("torch", 0, 1, optimizer__freeze=["down_blocks.*"]), inputs, 0)
    with pytest.raises(ValueError, match="leaves nothing of 'denoiser' to train"):
        make_trainer("latent diffusion", training_config("torch", 0, 1, optimizer__freeze=["*"]), inputs, 0)
