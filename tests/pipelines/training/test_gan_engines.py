"""GANs at every ZeRO stage, and at stages that differ between the networks, train as in plain torch; resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.checkpoint import commit_snapshot, list_checkpoints, newest_verified
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
from tests.pipelines.training.test_checkpoint import FACTS, assert_equal, everything
from tests.pipelines.training.test_engines import ENGINES
from tests.processes import on_ranks

pytestmark = pytest.mark.slow
STEPS = 20
CLASSES = tiny.CAPTIONS
SHAPE = {"channels": 8, "largest": 16}
MODELS: dict[str, Any] = {
    "gan": tiny.gan_config(classes=CLASSES, matching_aware=True, loss="relativistic"),
    "wgan-gp": tiny.gan_config(
        loss="wasserstein",
        penalties={"gradient": 10.0},
        discriminator_steps=2,
        generator={"kind": "resnet", **SHAPE},
        discriminator={"kind": "modern", **SHAPE, "blocks": 1, "group_width": 8},
    ),
    "wgan": tiny.gan_config(
        loss="wasserstein", weight_clip=0.05, discriminator={"kind": "resnet", **SHAPE, "spectral_norm": False}
    ),
    "adaptive": tiny.gan_config(
        loss="hinge",
        augmentation={"kind": "adaptive", "images": 500.0, "policies": ["flip", "translation", "color"]},
        penalties={"r1": 1.0, "every": 4},
        discriminator={"kind": "resnet", **SHAPE},
    ),
    "cycle": tiny.cycle_config(),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_inputs(tmp_path_factory.mktemp("inputs"))


def _config(name: str, kind: str, stage: int, world_size: int, **changes: Any) -> Any:
    """`stage` 23 is 2 for the discriminator and 3 for the generator."""
    # A larger epsilon: AdamW would make differences of rounding, where a gradient is nearly 0, as large as its steps.
    # Absolute distances, as in cycles, jump where their sign changes: smaller steps still.
    calm = {"optimizer__learning_rate": 1e-4 if name == "cycle" else 3e-4, "optimizer__epsilon": 1e-4}
    config = training_config(kind, 3 if stage == 23 else stage, world_size, MODELS[name], **calm, **changes)
    if stage != 23:
        return config
    return config.model_copy(update={"engines": {"discriminator": config.engine.model_copy(update={"zero_stage": 2})}})


def _engines(name: str) -> list[tuple[str, int]]:
    penalised = getattr(MODELS[name], "penalties", None) is not None and MODELS[name].penalties.any
    return [*((kind, stage) for kind, stage in ENGINES if not (penalised and stage == 3)), ("deepspeed", 23)]


def _train(rank: int, world_size: int, inputs: Path) -> dict[Any, list[dict[str, float]]]:
    results = {}
    for name, model in MODELS.items():
        for kind, stage in _engines(name):
            trainer = make_trainer(name, _config(name, kind, stage, world_size), inputs, rank)
            results[name, kind, stage] = train_steps(trainer, 0, STEPS, rank, world_size, inputs)
            if getattr(model, "weight_clip", None) is not None:
                held = trainer.networks["discriminator"].engine.fragments()
                assert (
                    max(float(fragment.values["param"].abs().max()) for fragment in held)
                    <= 1.000001 * model.weight_clip
                )
    return results


def test_every_zero_stage_follows_plain_torch(inputs: Path) -> None:
    found = on_ranks(2, _train, inputs)[0]
    for name in MODELS:
        reference = found[name, "torch", 0]
        assert len(reference) == STEPS
        assert_something_was_learnt(reference)
        for engine in _engines(name)[1:]:
            assert_same_training(reference, found[(name, *engine)], (name, engine))


def _at_world_size(rank: int, world_size: int, inputs: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for name in MODELS:
        # Spectral norms come nearer with each pass: samples of a later micro-batch, which are others at another number
        # of ranks, would see them 1e-4 off.
        whole = {"data__micro_batch": GLOBAL_BATCH // world_size} if name == "adaptive" else {}
        trainer = make_trainer(name, _config(name, "deepspeed", 1, world_size, **whole), inputs, rank)
        found[name] = train_steps(trainer, 0, 6, rank, world_size, inputs)
    return found


def test_the_number_of_ranks_changes_nothing(inputs: Path) -> None:
    alone, *others = (on_ranks(world_size, _at_world_size, inputs)[0] for world_size in (1, 2, 4))
    for name, expected in alone.items():
        for other in others:
            assert_same_training(expected, other[name], name, abs=2e-5, rel=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_it_resumes_bit_for_bit(name: str, inputs: Path, tmp_path: Path) -> None:
    """With the probability of augmentation, what was seen since it last changed, and the pools of images."""

    def trainer() -> Any:
        return make_trainer(name, _config(name, "torch", 0, 1), inputs, 0)

    straight = trainer()
    train_steps(straight, 0, 5, 0, 1, inputs)
    commit_snapshot(str(tmp_path / "half"), straight.snapshot(5, FACTS))
    train_steps(straight, 5, 11, 0, 1, inputs)
    commit_snapshot(str(tmp_path / "straight"), straight.snapshot(11, FACTS))
    if name == "adaptive":
        assert straight.objective.augmentation.probability > 0 and straight.objective.augmentation.count > 0
    if name == "cycle":
        assert len(straight.objective.state_dict()["pool a"]) == MODELS[name].pool_size, "the pool was exchanged"
    resumed = trainer()
    train_steps(resumed, 50, 51, 0, 1, inputs)  # whatever it held before is gone
    found = newest_verified(str(tmp_path / "half"))
    assert found is not None and resumed.restore(found) == 5
    train_steps(resumed, 5, 11, 0, 1, inputs)
    commit_snapshot(str(tmp_path / "resumed"), resumed.snapshot(11, FACTS))
    assert_equal(*(everything(list_checkpoints(str(tmp_path / which))[0]) for which in ("resumed", "straight")))


def test_bfloat16_trains(inputs: Path) -> None:
    config = _config("adaptive", "torch", 0, 1, precision__compute="bf16")
    logged = train_steps(make_trainer("adaptive", config, inputs, 0), 0, 4, 0, 1, inputs)
    assert all(torch.tensor(list(entry.values())).isfinite().all() for entry in logged)


def test_a_penalty_on_a_network_at_stage_3_is_refused(inputs: Path) -> None:
    config = _config("wgan-gp", "deepspeed", 3, 1)
    from genmodels.families import build_objective

    with pytest.raises(ValueError, match=r"differentiates a gradient, .* set engines.discriminator.zero_stage to 2"):
        check_phases(config, build_objective(MODELS["wgan-gp"]))
