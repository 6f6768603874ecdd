"""Through Ray: images made of images, from samples that hold both, and from two sets that do not belong together."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from genmodels.drawing import open_drawing_model
from infra.errors import BadRequest
from infra.registry import resolve_model
from pipelines.data.quarantine import read_quarantine
from pipelines.data.write import ShardWriter
from pipelines.demo.digits import draw_split
from pipelines.training.run_folder import RunFolder
from tests.genmodels import tiny
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow

Train = Callable[..., dict[str, Any]]
STEPS = 12
LENGTH = f"run.steps={STEPS}", "run.checkpoint_every=6", "run.preview_samples=4"
PIX2PIX = {
    "kind": "pix2pix",
    "image_size": 16,
    "channels": 4,
    "largest": 8,
    "discriminator": {"channels": 4, "layers": 1},
    "image_condition": {"kind": "member", "member": "grey.png"},
}
CYCLE_STEPS, COMMIT = 36, 10  # whole epochs of both sets; the first commit is in the middle of one of each
OTHER_SAMPLES = 64  # a whole number of rows of the order, as small_run.SAMPLES is, and another one


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels.mean(2, keepdims=True), 3, 2).astype(np.uint8)


def _objective(tree: dict[str, Any]) -> str:
    return f"objective={yaml.safe_dump(tree, default_flow_style=True, width=9999).strip()}"


def _write(url: Path, samples: int, members: Callable[[int, np.ndarray], dict[str, bytes]]) -> str:
    with ShardWriter(str(url), shard_samples=40, chunk_samples=8) as writer:
        for number, (key, pixels, _, _) in enumerate(islice(draw_split("train", 16, 1), samples)):
            writer.write(key, members(number, pixels))
    return str(url)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples of a colour image and the same in grey; of one the grey image is missing."""

    def members(number: int, pixels: np.ndarray) -> dict[str, bytes]:
        given = {} if number == 3 else {"grey.png": _png(_grey(pixels))}
        return {"png": _png(pixels), **given}

    return _write(tmp_path_factory.mktemp("pairs"), small_run.SAMPLES, members)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Grey images and, fewer, coloured ones, under the same names; one of the second is damaged."""
    root = tmp_path_factory.mktemp("sets")
    first = _write(root / "grey", small_run.SAMPLES, lambda _, pixels: {"png": _png(_grey(pixels))})
    second = _write(root / "colour", OTHER_SAMPLES, lambda n, pixels: {"png": b"no image" if n == 5 else _png(pixels)})
    return first, second


def test_pix2pix_trains_on_pairs_and_is_drawn_from_the_registry(train: Train, pairs: str) -> None:
    summary = train(
        "run.name=pix2pix", f"data.url={pairs}", f"data.validation_url={pairs}", "data.caption=null", *LENGTH,
        "data.max_bad_share=0.1", _objective(PIX2PIX), "tracking.register_as=pix2pix-test",
    )  # fmt: skip
    folder = RunFolder(summary["run_folder"])
    assert summary["outcome"] == "trained" and {"val_psnr", "val_loss", "l1"} <= summary["figures"].keys()
    (bad,) = [record for record in read_quarantine(folder.path("quarantine")) if record["split"] == "train"]
    assert "grey.png" in bad["reason"], "a pair that lacks a side is left out, and said so"
    drawn = open_drawing_model(resolve_model(summary["model_uri"], summary["tracking_uri"])).draw(
        None, [1, 2], images=np.zeros((2, 16, 16, 3), np.uint8)
    )
    assert drawn.shape == (2, 16, 16, 3)
    mlflow.set_tracking_uri(summary["tracking_uri"])
    black = _png(np.zeros((24, 16, 3), np.uint8))
    (png,) = mlflow.pyfunc.load_model(summary["model_uri"]).predict(pd.DataFrame({"image": [black], "seed": [1]}))[
        "png"
    ]
    assert (np.asarray(Image.open(io.BytesIO(png))) == drawn[0]).all()


def test_pairs_without_the_named_member_are_refused_with_its_name(train: Train, pairs: str) -> None:
    other = {**PIX2PIX, "image_condition": {"kind": "member", "member": "edges.png"}}
    with pytest.raises(BadRequest, match=r"data\.url: none of 96 samples can be used, .*edges\.png: missing"):
        train("run.name=sideless", f"data.url={pairs}", "data.caption=null", *LENGTH, _objective(other))


def _cycle(sets: tuple[str, str], *changes: str) -> tuple[str, ...]:
    first, second = sets
    return (
        f"data.url={first}", f"data.validation_url={first}", f"data.other_url={second}",
        f"data.other_validation_url={second}", "data.caption=null", "data.max_bad_share=0.2", "engine.zero_stage=2",
        f"run.steps={CYCLE_STEPS}", f"run.checkpoint_every={COMMIT}", "run.preview_samples=4",
        _objective(tiny.cycle_config().model_dump(mode="json")), *changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cycled(train: Train, sets: tuple[str, str]) -> dict[str, Any]:
    """The summary of a CycleGAN that nothing happened to, whose pictures were judged on the way."""
    return train(*_cycle(
        sets, "run.name=cycle", "tracking.register_as=cycle-test", f"evaluation.every={COMMIT}", "evaluation.count=48",
        "evaluation.reference_count=96",
        "evaluation.features={kind: classifier, path: pipelines/demo/digits_classifier}",
    ))  # fmt: skip


def test_cycle_gan_sees_each_set_exactly_once_an_epoch(cycled: dict[str, Any]) -> None:
    assert cycled["outcome"] == "trained" and "val_cycle_a" in cycled["figures"]
    folder = RunFolder(cycled["run_folder"])
    seen = small_run.audit(folder, 0, CYCLE_STEPS)
    sides = {name: [entry for entry in seen if entry.get("set", "") == name] for name in ("", "other")}
    for name, samples in (("", small_run.SAMPLES), ("other", OTHER_SAMPLES)):
        steps = samples // small_run.GLOBAL_BATCH
        for start in range(0, CYCLE_STEPS - steps + 1, steps):
            counts = Counter(entry["key"] for entry in sides[name] if start <= entry["step"] < start + steps)
            assert set(counts.values()) == {1} and len(counts) == samples, (name, start)
    in_step = [{entry["key"] for entry in side if entry["step"] == 0} for side in sides.values()]
    assert in_step[0] != in_step[1], "samples of the two sets do not belong together"
    bad = {
        (record["split"], record["reason"].partition(":")[0]) for record in read_quarantine(folder.path("quarantine"))
    }
    assert bad == {("other train", "image"), ("other held_out", "image")}
    assert cycled["figures"]["bad_samples"] == CYCLE_STEPS // (OTHER_SAMPLES // small_run.GLOBAL_BATCH)


def test_pictures_are_judged_on_the_way_where_held_out_sets_differ_in_size(cycled: dict[str, Any]) -> None:
    measured = small_run.metric(RunFolder(cycled["run_folder"]), "val_frechet_distance")
    assert [step for step, _ in measured] == [COMMIT, 2 * COMMIT, 3 * COMMIT, CYCLE_STEPS]
    assert all(0 < distance < float("inf") for _, distance in measured)
    assert measured[0][1] != measured[-1][1], "the generators changed between them"


def test_a_run_of_two_sets_whose_worker_is_killed_ends_as_if_left_alone(
    cycled: dict[str, Any], train: Train, sets: tuple[str, str], run_root: Path
) -> None:
    """With the same samples of both sets at each step, and the same pools of images."""
    folder, alone = RunFolder(str(run_root / "cycle-killed")), RunFolder(cycled["run_folder"])
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, *_cycle(sets, "run.name=cycle-killed", "workers.max_failures=1"))

        def past_the_commit() -> bool:
            assert not training.done(), training.result()
            return small_run.reached(folder, COMMIT + 3)

        small_run.wait_until(past_the_commit, 120, "some steps after the first commit")
        workers = small_run.train_workers(os.getpid())
        assert len(workers) == 2
        workers[-1].kill()
        assert small_run.newest(folder).step == COMMIT, "the run was faster than the test: slow its steps down"
        assert training.result(timeout=240)["outcome"] == "trained"
    assert small_run.audit_starts(folder).count(COMMIT) == 2, "both workers resume from the commit"
    small_run.assert_same_bits(*(small_run.state_at(each, CYCLE_STEPS) for each in (folder, alone)))

    def samples(of: RunFolder) -> set[tuple[Any, ...]]:
        return {
            (entry["step"], entry.get("set", ""), entry["key"], entry["seed"], entry["pixels"])
            for entry in small_run.audit(of, 0, CYCLE_STEPS)
        }

    assert samples(folder) == samples(alone)
    assert len(samples(alone)) == 2 * CYCLE_STEPS * small_run.GLOBAL_BATCH


def test_cycle_gan_draws_both_ways_and_refuses_other_shards(
    cycled: dict[str, Any], train: Train, sets: tuple[str, str]
) -> None:
    model = open_drawing_model(resolve_model(cycled["model_uri"], cycled["tracking_uri"]))
    images = np.full((2, 16, 16, 3), 90, np.uint8)
    there, back = (model.draw(None, [1, 2], images=images, direction=way) for way in ("ab", "ba"))
    assert there.shape == back.shape == (2, 16, 16, 3) and (there != back).any()
    frame = pd.DataFrame({"image": [_png(images[0])] * 2, "direction": ["ab", "ba"]})
    mlflow.set_tracking_uri(cycled["tracking_uri"])
    served = mlflow.pyfunc.load_model(cycled["model_uri"]).predict(frame)["png"]
    for png, expected in zip(served, (there, back), strict=True):
        assert (np.asarray(Image.open(io.BytesIO(png))) == expected[0]).all()

    shutil.rmtree(sets[1])
    _write(Path(sets[1]), OTHER_SAMPLES, lambda _, pixels: {"png": _png(255 - pixels)})
    with pytest.raises(BadRequest, match=r"the shards at data\.other_url changed since run 'cycle' began"):
        train(*_cycle(sets, "run.name=cycle", "run.steps=60"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ([], r"objective\.kind=cycle_gan learns from two sets: name data\.other_url"),
        (["data.other_url=/b", "data.validation_url=/c"], "data.validation_url and data.other_validation_url go tog"),
        (["data.other_url=/b", _objective(PIX2PIX)], r"data\.other_url is of cycle_gan: objective\.kind=pix2pix"),
    ],
)
def test_sets_that_do_not_fit_the_objective_are_refused(train: Train, changes: list[str], match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        train("run.name=x", "data.caption=null", _objective(tiny.cycle_config().model_dump(mode="json")), *changes)
