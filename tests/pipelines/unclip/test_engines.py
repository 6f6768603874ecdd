"""Every stage of unCLIP trains at every ZeRO stage as in plain torch, in two micro-batches, and resumes exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.checkpoint import commit_snapshot, list_checkpoints, newest_verified
from pipelines.training.deepspeed_engine import DeepSpeedEngine
from tests.genmodels import tiny
from tests.genmodels.clip.test_objective import TRANSFORMER
from tests.pipelines.training.small import make_trainer, train_steps, training_config
from tests.pipelines.training.test_checkpoint import FACTS, assert_equal, everything
from tests.pipelines.training.test_engines import ENGINES
from tests.processes import on_ranks

pytestmark = pytest.mark.slow
STEPS = 12
STAGES = {
    "clip": tiny.clip_config(image_encoder=TRANSFORMER),
    "diffusion prior": tiny.prior_config(),
    "autoregressive prior": tiny.prior_config("autoregressive_prior"),
    "decoder": tiny.decoder_config(learned_variance=True, prediction_type="epsilon"),
    "upsampler": tiny.upsampler_config(prediction_type="sample", noise_schedule="cosine"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_inputs(tmp_path_factory.mktemp("inputs"))


def _train(rank: int, world_size: int, inputs: Path) -> dict[Any, dict[str, Any]]:
    """Every stage with each engine, one after the other in one pair of processes."""
    results = {}
    for name, model in STAGES.items():
        for kind, stage in ENGINES:
            config = training_config(kind, stage, world_size, model)
            trainer = make_trainer(name, config, inputs, rank)
            logged = train_steps(trainer, 0, STEPS, rank, world_size, inputs)
            (state,) = trainer.networks.values()
            (module,) = trainer.objective.networks.values()
            results[name, kind, stage] = {
                "logged": logged,
                "sharded": state.engine.partitioned_elements() if isinstance(state.engine, DeepSpeedEngine) else 0,
                "whole": sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in module.parameters()),
            }
    return results


def test_every_stage_follows_plain_torch_at_every_zero_stage(inputs: Path) -> None:
    on_rank = on_ranks(2, _train, inputs)
    for name in STAGES:
        reference = on_rank[0][name, "torch", 0]["logged"]
        first, last = (sum(entry["loss"] for entry in part) for part in (reference[:5], reference[-5:]))
        assert last != pytest.approx(first, rel=1e-3), f"{name}: nothing was learnt, so nothing is compared"
        for kind, stage in ENGINES[1:]:
            for step, (expected, found) in enumerate(
                zip(reference, on_rank[0][name, kind, stage]["logged"], strict=True)
            ):
                for figure in ("loss", "grad_norm"):
                    close = pytest.approx(expected[figure], abs=1e-5, rel=1e-5)
                    assert found[figure] == close, (name, kind, stage, step, figure)
        for result in (rank[name, "deepspeed", 3] for rank in on_rank):
            assert result["whole"] / 2 <= result["sharded"] < 0.55 * result["whole"], name


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_resumes_bit_for_bit(name: str, inputs: Path, tmp_path: Path) -> None:
    def trainer() -> Any:
        return make_trainer(name, training_config("torch", 0, 1, STAGES[name]), inputs, 0)

    straight = trainer()
    train_steps(straight, 0, 3, 0, 1, inputs)
    commit_snapshot(str(tmp_path / "half"), straight.snapshot(3, FACTS))
    train_steps(straight, 3, 6, 0, 1, inputs)
    commit_snapshot(str(tmp_path / "straight"), straight.snapshot(6, FACTS))
    resumed = trainer()
    train_steps(resumed, 50, 51, 0, 1, inputs)  # whatever it held before is gone
    found = newest_verified(str(tmp_path / "half"))
    assert found is not None and resumed.restore(found) == 3
    train_steps(resumed, 3, 6, 0, 1, inputs)
    commit_snapshot(str(tmp_path / "resumed"), resumed.snapshot(6, FACTS))
    assert_equal(*(everything(list_checkpoints(str(tmp_path / which))[0]) for which in ("resumed", "straight")))
