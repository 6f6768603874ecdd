"""Trainings through Ray: what the objective sees, at every world size, and what a second command does."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from infra.errors import BadRequest, main_exit
from pipelines.training import cluster
from pipelines.training.checkpoint import assemble, list_checkpoints
from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow

Train = Callable[..., dict[str, Any]]
WORLD_SIZES = (1, 2, 4)
BEGUN = 2 * small_run.CHECKPOINT_EVERY  # the step at which the run of two workers goes on with one and with four
EPOCHS = range(-(-BEGUN // small_run.STEPS_AN_EPOCH), small_run.STEPS // small_run.STEPS_AN_EPOCH)


@pytest.fixture(scope="module")
def runs(train: Train, alone: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunFolder]:
    """The end of one run by world size: a checkpoint of two workers, continued by one, two and four."""
    found = {2: alone}
    for world_size in (1, 4):
        root = tmp_path_factory.mktemp(f"world-{world_size}")
        folder = found[world_size] = RunFolder(str(root / "alone"))
        left_out = shutil.ignore_patterns("audit", "export", "result.json", "run.json")
        shutil.copytree(alone.url, folder.url, ignore=left_out)
        shutil.rmtree(small_run.newest(folder).url)
        assert small_run.newest(folder).step == BEGUN
        summary = train("run.name=alone", f"run.root={root}", f"workers.count={world_size}")
        assert (summary["outcome"], summary["resumed_from"], summary["steps"]) == ("trained", BEGUN, small_run.STEPS)
    return found


def content(shards: str) -> Counter[tuple[str, str]]:
    """(key, hash of the pixels) of every sample, by the webdataset library and Pillow."""
    found: Counter[tuple[str, str]] = Counter()
    tars = sorted(Path(shards).glob("*.tar"))
    for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB")).transpose(2, 0, 1)
        digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]
        found[f"{Path(sample['__url__']).name}/{sample['__key__']}", digest] += 1
    return found


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_epoch_is_every_sample_once(world_size: int, epoch: int, runs: dict[int, RunFolder], shards: str) -> None:
    first = epoch * small_run.STEPS_AN_EPOCH
    seen = small_run.audit(runs[world_size], first, first + small_run.STEPS_AN_EPOCH)
    expected = content(shards)
    assert len(expected) == small_run.SAMPLES
    assert Counter((entry["key"], entry["pixels"]) for entry in seen) == expected
    assert {entry["weight"] for entry in seen} == {1.0}


@pytest.mark.parametrize("world_size", (1, 4))
def test_global_batches_do_not_depend_on_the_world_size(world_size: int, runs: dict[int, RunFolder]) -> None:
    def batches(folder: RunFolder) -> dict[int, Counter[tuple[str, int, str]]]:
        found: dict[int, Counter[tuple[str, int, str]]] = {}
        for entry in small_run.audit(folder, BEGUN):
            found.setdefault(entry["step"], Counter())[entry["key"], entry["seed"], entry["pixels"]] += 1
        return found

    given = batches(runs[world_size])
    assert sorted(given) == [*range(BEGUN, small_run.STEPS)]
    assert [sum(batch.values()) for batch in given.values()] == [small_run.GLOBAL_BATCH] * len(given)
    assert given == batches(runs[2])
    seeds = [seed for batch in given.values() for _, seed, _ in batch]
    assert len(set(seeds)) == len(seeds)  # new ones in every epoch


@pytest.mark.parametrize("world_size", (1, 4))
def test_a_loss_does_not_depend_on_the_world_size(world_size: int, runs: dict[int, RunFolder]) -> None:
    # The weights of this step are the checkpoint's, so dropout, timesteps and noise of the whole batch must be equal.
    losses = {size: dict(small_run.metric(runs[size], "loss")) for size in (2, world_size)}
    assert losses[world_size][BEGUN + 1] == pytest.approx(losses[2][BEGUN + 1], rel=0, abs=1e-6)
    assert losses[2][BEGUN + 1] != pytest.approx(losses[2][BEGUN + 2], rel=0, abs=1e-6)


@pytest.mark.parametrize("world_size", (1, 4))
def test_a_checkpoint_of_two_workers_continues_on_others(world_size: int, runs: dict[int, RunFolder]) -> None:
    folder = runs[world_size]
    assert small_run.audit_starts(folder) == [BEGUN] * world_size
    end, expected = small_run.newest(folder), small_run.newest(runs[2])
    assert end.manifest["world_size"] == world_size
    for what in ("param", "ema"):
        ours, theirs = assemble(end, what), assemble(expected, what)
        for network, tensors in theirs.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(ours[network][name], tensor, rtol=0, atol=1e-4, msg=f"{network} {name}")


def run_command(run_root: Path, preset: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(small_run.CHECKOUT / "pipelines" / "train_ldm.py"), str(preset), *arguments],
        env=small_run.environment(run_root),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_cluster_that_says_how_far_it_may_grow(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all nodes start on demand there are no CPUs when a job begins, and one node."""
    for name in cluster.LIMITS.values():
        monkeypatch.delenv(name, raising=False)
    assert cluster.resources() == {"CPU": 8.0, "GPU": 0.0} and cluster.node_count() == 1
    monkeypatch.setenv("CLUSTER_MAX_CPUS", "64")
    monkeypatch.setenv("CLUSTER_MAX_GPUS", "4")
    assert cluster.resources() == {"CPU": 64.0, "GPU": 4.0} and cluster.node_count() == 2
    monkeypatch.setenv("CLUSTER_MAX_GPUS", "four")
    with pytest.raises(BadRequest, match="CLUSTER_MAX_GPUS=four: give a number"):
        cluster.resources()


def test_a_finished_run_says_so(alone: RunFolder, run_root: Path, preset: Path, tmp_path: Path) -> None:
    checkpoint = small_run.newest(alone).url
    done = run_command(run_root, preset, "run.name=alone", "--summary", str(tmp_path / "summary.json"))
    assert done.returncode == 0, done.stderr
    assert f"run 'alone' is finished: {small_run.STEPS} steps" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == ("already finished", small_run.STEPS)
    assert small_run.newest(alone).url == checkpoint
    parts = summary["start_seconds"]  # of the launch that trained
    assert list(parts) == ["checks", "ray", "workers", "building", "first batch", "first step"]
    assert min(parts.values()) >= 0 and sum(parts.values()) < 120


def test_another_configuration_is_refused_with_the_difference(alone: RunFolder, run_root: Path, preset: Path) -> None:
    refused = run_command(run_root, preset, "run.name=alone", "data.global_batch_size=32")
    assert refused.returncode == 2
    assert "data.global_batch_size: 16 → 32" in refused.stderr
    assert "run.name" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_too_many_bad_images_stop_the_run(
    train: Train, run_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards, bad = str(tmp_path / "shards"), range(3, small_run.SAMPLES, 8)  # one in every chunk
    small_run.write_digits(shards, damage=lambda number, image: image[:60] if number in bad else image)
    preset = small_run.write_preset(tmp_path / "bad.yaml", shards, name="bad")
    with pytest.raises(SystemExit) as ended:
        main_exit(lambda: print(train("workers.max_failures=3", preset=preset)))
    message = capfd.readouterr().err
    assert ended.value.code == 1
    first_line = next(line for line in message.splitlines() if line.startswith("failed:"))
    for part in ("worker ", "step ", "shards 0", "DataFailure", "samples read so far cannot be used", "image:"):
        assert part in first_line, message
    assert message.count("failed:") == 1
    folder = RunFolder(str(run_root / "bad"))
    # Every worker that lives to write its audit does so once an attempt: there was one attempt.
    assert len(small_run.audit_starts(folder)) <= 2
    assert not list_checkpoints(folder.checkpoints)
