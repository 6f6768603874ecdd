"""The best checkpoint, training that ends for want of a better one, and the figure of pictures drawn meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genmodels.metrics.frechet import sample_frechet_distance
from genmodels.objective import Drawing
from infra.errors import BadRequest
from infra.tracking import metric_history
from pipelines.data.index import load_index
from pipelines.data.quarantine import Quarantine
from pipelines.data.spec import SampleSpec
from pipelines.demo.classifier import digits_extractor
from pipelines.demo.evaluation import real_pictures
from pipelines.training.checkpoint import Checkpoint, Snapshot, list_checkpoints
from pipelines.training.config import TrainConfig, load_config
from pipelines.training.evaluation import DrawnPictures
from pipelines.training.hooks import RunHooks, known_best, measured_how
from pipelines.training.metrics import MeanLog, Throughput
from pipelines.training.run_data import RunData
from pipelines.training.run_folder import RunFolder
from pipelines.training.trainer import TrainingStopped
from tests.genmodels import tiny
from tests.pipelines.data.shards import write_shards
from tests.pipelines.training.test_hooks import _Board
from tests.processes import on_ranks


class _Trainer:
    """As much of a trainer as the hooks touch; its validations find what the test says."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.log, self.throughput, self.device = MeanLog(), Throughput(), torch.device("cpu")
        self.last: dict[str, float] = {}
        self.skipped_steps = 0
        self.phase_seconds: dict[str, float] = {}
        self.losses = losses

    def validate(self, batches: Any, step: int) -> dict[str, float]:
        return {"val_loss": self.losses[step]}

    def finish(self, batches: Any, step: int) -> dict[str, float]:
        return {"measured_at": float(step)}

    def snapshot(self, step: int, facts: dict[str, Any]) -> Snapshot:
        return Snapshot(step, {}, {**facts, "networks": {}})


def run_of(root: Path, **best: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": {"name": "r", "steps": 12, "log_every": 1, "checkpoint_every": 6, "validate_every": 2},
            "evaluation": {
                "features": {"kind": "classifier", "path": "unused"},
                "every": 4 if best.get("metric") == "val_frechet_distance" else 0,
            },
            "data": {"url": str(root / "s"), "validation_url": str(root / "s"), "lanes": 1, "global_batch_size": 2},
            "objective": tiny.diffusion_config().model_dump(),
            "best": {"metric": "val_loss", **best},
        }
    )


def _go(
    rank: int, world_size: int, root: Path, losses: list[float], best: dict[str, Any], facts: dict[str, Any]
) -> Any:
    """Steps until the hooks say that it was the last one; the step, the best checkpoint's, and the last manifest."""
    config = run_of(root, **best)
    changed = {"preview_samples": 0, **facts.pop("run", {})}
    config = config.model_copy(update={"run": config.run.model_copy(update=changed)})
    folder = RunFolder(str(root / "run"))
    index = load_index(config.data.url, build=False)
    quarantine = Quarantine(folder.path("quarantine"), 0, 1.0, 2)
    distances = facts.pop("distances", {})
    hooks: Any = RunHooks(config, folder, SampleSpec(8), RunData(index, index), None, _Board(), facts, quarantine)
    hooks._evaluate = lambda trainer, step: {"val_frechet_distance": distances[step]}
    trainer: Any = _Trainer(dict(zip(range(2, 13, 2), losses)))
    try:
        last = next(step for step in range(1, 13) if hooks.after_step(trainer, step))
    except TrainingStopped as error:
        return str(error)
    kept = list_checkpoints(folder.best)
    best_manifest = kept[0].manifest if kept else None
    return last, [c.step for c in kept], best_manifest, list_checkpoints(folder.checkpoints)[0].manifest


def go(root: Path, losses: list[float], best: dict[str, Any] | None = None, facts: dict[str, Any] | None = None) -> Any:
    write_shards(root / "s", 8, 8, chunk_samples=2)
    return on_ranks(1, _go, root, losses, best or {}, facts or {})[0]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_no_other(tmp_path):
    last, kept, manifest, newest = go(tmp_path, [5.0, 3.0, 4.0, 2.0, float("nan"), 9.0])
    assert (last, kept) == (12, [8]) and newest["best"]["value"] == 2.0
    assert manifest["figures"] == {"val_loss": 2.0, "measured_at": 8.0} and "stopped_early" not in newest


@pytest.mark.slow
def test_higher_can_be_better_and_patience_ends_training(tmp_path):
    last, kept, _, newest = go(tmp_path, [1.0, 4.0, 3.0, 4.0, 5.0, 6.0], {"better": "higher", "patience": 2})
    assert (last, kept) == (8, [4]) and newest["finished"] and newest["stopped_early"] == {"patience": 2}
    assert {key: newest["best"][key] for key in ("step", "value", "waited")} == {"step": 4, "value": 4.0, "waited": 2}


@pytest.mark.slow
def test_training_ends_after_so_many_hours_of_all_its_starts(tmp_path):
    limited = {"run": {"max_hours": 2.0, "log_every": 4}, "training_hours": 2.5}
    last, _, _, newest = go(tmp_path, [1.0] * 6, facts=limited)
    assert last == 4 and newest["finished"] and newest["stopped_early"] == {"max_hours": 2.0}
    assert 2.5 < newest["training_hours"] < 2.6


@pytest.mark.slow
def test_what_was_best_before_a_restart_stays_so(tmp_path):
    how = measured_how(run_of(tmp_path, patience=4))
    known = {"step": 2, "value": 0.5, "waited": 1, "how": how}
    last, kept, _, newest = go(tmp_path, [5.0] * 6, {"patience": 4}, {"best": known})
    assert (last, kept) == (6, []) and newest["best"] == {**known, "waited": 4}


@pytest.mark.slow
def test_a_best_by_another_metric_is_not_compared_with(tmp_path):
    known = {"step": 2, "value": 0.01, "waited": 7, "how": {"metric": "val_other"}}
    _, kept, _, newest = go(tmp_path, [5.0, 3.0, 4.0, 4.0, 4.0, 4.0], {"patience": 9}, {"best": known})
    assert kept == [4] and newest["best"]["value"] == 3.0 and newest["best"]["waited"] == 4


@pytest.mark.slow
def test_validations_between_evaluations_do_not_decide(tmp_path):
    # The distance is measured at other steps than the validation, which may neither stop the run nor be the best.
    last, kept, _, newest = go(
        tmp_path, [1.0] * 6, {"metric": "val_frechet_distance"}, {"distances": {4: 2.0, 8: 1.0, 12: 3.0}}
    )
    assert (last, kept) == (12, [8]) and newest["best"]["value"] == 1.0


def test_a_run_that_goes_on_asks_the_kept_checkpoint():
    kept = Checkpoint("there", {"best": {"step": 8, "value": 1.0, "waited": 0}})
    older, newer = ({"best": {"step": step, "value": 2.0, "waited": 3}} for step in (4, 8))
    assert known_best(None, Checkpoint("x", newer)) == {}
    assert known_best(kept, Checkpoint("x", older))["best"] == {"step": 8, "value": 1.0, "waited": 0}
    assert known_best(kept, Checkpoint("x", newer))["best"]["waited"] == 3


@pytest.mark.slow
def test_a_metric_that_is_never_measured_stops_with_those_that_are(tmp_path):
    assert "val_typo is not measured, only val_loss" in go(tmp_path, [1.0] * 6, {"metric": "val_typo"})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["best.metric=loss"], "measured on held-out data"),
        (["best.metric=val_frechet_distance"], "set it"),
        (["best.patience=3"], "best.patience waits"),
        (["evaluation.every=5", "data.demo=null"], "name evaluation.features"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(overrides, said):
    with pytest.raises(BadRequest, match=said):
        load_config("ldm_demo", overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["best.metric=val_of_one_condition"], "better the higher it is"),
        (["best.metric=val_collapsed", "evaluation.every=0"], "measured by evaluation.every: set it"),
        (["best.metric=val_loss"], "how well the discriminator does, not what is drawn"),
        (["best.metric=val_accuracy_real", "best.better=higher"], "how well the discriminator does"),
        (["engines.discriminator.zero_stage=3"], "engines.discriminator.zero_stage to 2 or less"),
        (["objective.generator.norm=batch", "data.micro_batch=8"], "accumulation would change it"),
        (["objective.discriminator.channels=1", "objective.kind=pix2pix"], "discriminator"),
    ],
)
def test_what_a_gan_cannot_have_is_refused_before_anything_starts(overrides, said):
    with pytest.raises(BadRequest, match=said):
        load_config("gan_demo", overrides)


class _Drawer:
    """Stands in for a trainer whose objective draws pictures from the seeds alone."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.objective = self

    def with_ema(self) -> Any:
        return torch.no_grad()

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def to_device(self, batch: Any, step: int) -> Any:
        return batch

    def draw(self, batch: Any, drawing: Drawing) -> torch.Tensor:
        pictures = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(int(s))) for s in batch["seeds"]]
        return torch.stack(pictures) * 2 - 1


def _batch(first: int, last: int, weight: float = 1.0) -> Any:
    images = torch.stack([torch.full((3, 8, 8), 10 * n, dtype=torch.uint8) for n in range(first, last)])
    return {"images": images, "seeds": torch.arange(first, last), "weight": torch.full((last - first,), weight)}


def _distance(rank: int, world_size: int) -> float:
    share = 12 // world_size
    mine = [_batch(rank * share, (rank + 1) * share), _batch(0, 3, weight=0.0)]
    larger = [{**batch, "images": batch["images"].repeat_interleave(2, 2).repeat_interleave(2, 3)} for batch in mine]
    drawn = DrawnPictures(digits_extractor(), larger, mine, Drawing(), 8)  # as a CLIP may read them
    trainer: Any = _Drawer()
    return drawn.measure(trainer, 1)["val_frechet_distance"]


@pytest.mark.slow
def test_the_distance_is_that_of_all_pictures_at_any_number_of_ranks():
    batch, extractor = _batch(0, 12), digits_extractor()
    pixels = ((_Drawer().draw(batch, Drawing()) + 1) * 127.5).round().to(torch.uint8)
    features = [
        extractor(np.ascontiguousarray(p.permute(0, 2, 3, 1).numpy())).features for p in (pixels, batch["images"])
    ]
    expected = sample_frechet_distance(*features)
    for world_size in (1, 2):
        assert on_ranks(world_size, _distance) == pytest.approx([expected] * world_size, rel=1e-6)


class _Digits(_Drawer):
    """Draws a digit of its own for every seed, or the same few for all."""

    def __init__(self, few: int | None) -> None:
        super().__init__()
        pictures = real_pictures("train", 32, 0)[0][: 200 if few is None else few]
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    def draw(self, batch: Any, drawing: Drawing) -> torch.Tensor:
        return self.pictures[batch["seeds"] % len(self.pictures)]


def _variety(rank: int, world_size: int, few: int | None) -> tuple[dict[str, float], tuple[str, ...]]:
    real = torch.from_numpy(real_pictures("held_out", 32, 0)[0][:200]).permute(0, 3, 1, 2)
    mine = range(rank * 200 // world_size, (rank + 1) * 200 // world_size)
    batch: Any = {"images": real[mine], "seeds": torch.tensor(list(mine)), "weight": torch.ones(len(mine))}
    drawn = DrawnPictures(digits_extractor(), [batch], [batch], Drawing())
    trainer: Any = _Digits(few)
    return drawn.measure(trainer, 1), drawn.reasons


@pytest.mark.slow
@pytest.mark.parametrize(("few", "collapsed"), [(None, 0), (1, 1), (5, 1)])
def test_an_alarm_goes_off_where_the_same_few_pictures_are_drawn(few: int | None, collapsed: int) -> None:
    (alone, why), *pair = [each for size in (1, 2) for each in on_ranks(size, _variety, few)]
    assert alone["val_collapsed"] == collapsed and bool(why) == bool(collapsed)
    for found, _ in pair:
        assert found == pytest.approx(alone, rel=1e-5)
    assert pair[1][1] == () or not collapsed, "said once, by rank 0"


@pytest.mark.slow
def test_a_run_that_measures_what_it_draws_publishes_its_best_checkpoint(train, run_root, shards):
    overrides = [
        "run.name=measured", "run.steps=9", f"data.validation_url={shards}", "run.validate_every=3",
        "run.validation_samples=16", "evaluation.every=3", "evaluation.count=16", "evaluation.reference_count=32",
        "evaluation.num_steps=2", "evaluation.features={kind: classifier, path: pipelines/demo/digits_classifier}",
        "best.metric=val_frechet_distance",
    ]  # fmt: skip
    summary = train(*overrides)
    rows = metric_history(summary["tracking_uri"], summary["mlflow_run_id"], ["val_frechet_distance"])
    assert [row["step"] for row in rows] == [3, 6, 9]
    best = min(rows, key=lambda row: row["val_frechet_distance"])
    assert summary["published_step"] == best["step"] == summary["best"]["step"]
    assert summary["best"]["value"] == best["val_frechet_distance"] and summary["export"].endswith(
        f"{best['step']:08d}-best"
    )
    assert train(*overrides)["outcome"] == "already finished"
