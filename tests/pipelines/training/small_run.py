"""Trainings of a few seconds through Ray: shards, a preset, the command as a user types it, and what it left behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from PIL import Image

from infra import storage
from infra.mlflow_store import open_client
from pipelines.data.write import ShardWriter
from pipelines.demo.digits import draw_split
from pipelines.training.checkpoint import Checkpoint, assemble, list_checkpoints
from pipelines.training.engine import MOMENTS
from pipelines.training.run_folder import RunFolder
from tests.genmodels import tiny

CHECKOUT = Path(__file__).resolve().parents[3]
IMAGE_SIZE = 16
SAMPLES = 96
GLOBAL_BATCH = 16
STEPS_AN_EPOCH = SAMPLES // GLOBAL_BATCH
CHECKPOINT_EVERY = 20
STEPS = 60

# A row of the data order is 4 lanes of 8 slots, so an epoch of 96 samples is three whole rows.
_PRESET: dict[str, Any] = {
    "run": {
        "steps": STEPS,
        "log_every": 1,
        "checkpoint_every": CHECKPOINT_EVERY,
        "keep_checkpoints": 9,
        "preview_samples": 0,
        "finish_samples": GLOBAL_BATCH,
        "audit": True,
    },
    "data": {"global_batch_size": GLOBAL_BATCH, "lanes": 4, "slots_per_lane": 8, "read_cpus": 0.5},
    "objective": {
        "kind": "latent_diffusion",
        "image_size": IMAGE_SIZE,
        "denoiser": tiny.UNET,
        "text_encoder": tiny.TEXT,
    },
    "optimizer": {"learning_rate": 2e-3, "lr_schedule": "cosine", "warmup_steps": 5},
    "ema": {"decay": 0.9},
    "workers": {"count": 2, "threads": 1},
    "tracking": {"system_metrics": False},
}


def write_digits(url: str, samples: int = SAMPLES, damage: Callable[[int, bytes], bytes] | None = None) -> None:
    """The first digits of the demo as shards of 40, with chunks of 8; `damage` may alter the bytes of an image."""
    with ShardWriter(url, shard_samples=40, chunk_samples=8) as writer:
        for number, (key, pixels, caption, _) in enumerate(islice(draw_split("train", IMAGE_SIZE, 1), samples)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            image = buffer.getvalue()
            writer.write(key, {"png": damage(number, image) if damage else image, "txt": caption.encode()})


def write_preset(path: Path, shards: str, **run: Any) -> Path:
    """A preset file that trains on `shards`; `run` sets keys of its run section."""
    tree = {**_PRESET, "data": {**_PRESET["data"], "url": shards}, "run": {**_PRESET["run"], **run}}
    path.write_text(yaml.safe_dump(tree))
    return path


def environment(run_root: Path) -> dict[str, str]:
    """This process's environment for a command that keeps its runs under `run_root` and starts a Ray of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    offline = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | offline | {"RUN_ROOT": str(run_root), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(run_root: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python pipelines/train_ldm.py ARGUMENTS` while it runs; whatever of it is left at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "pipelines" / "train_ldm.py"), *arguments],
        env=environment(run_root),
        cwd=run_root,  # nothing may depend on being started in the checkout
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all that it started, at once, as when a machine is switched off."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)


def train_workers(driver: int) -> list[psutil.Process]:
    """The Ray Train worker processes that descend from a driver."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds; raises AssertionError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def metric(folder: RunFolder, key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry of a metric that MLflow holds for the run, in order of steps."""
    known = folder.read("run.json")
    if known is None:
        return []
    history = open_client(known["tracking_uri"]).get_metric_history(known["mlflow_run_id"], key)
    return sorted((entry.step, entry.value) for entry in history)


def reached(folder: RunFolder, step: int) -> bool:
    """Whether MLflow holds the loss of `step`."""
    entries = metric(folder, "loss")
    return bool(entries) and entries[-1][0] >= step


def audit(folder: RunFolder, first: int = 0, last: int = STEPS) -> list[dict[str, Any]]:
    """What the objective was given in steps [first, last): one entry for each sample."""
    filesystem, path = storage.open_filesystem(folder.path("audit"))
    lines = [line for name in filesystem.glob(f"{path}/*.jsonl") for line in filesystem.cat_file(name).splitlines()]
    return [entry for entry in map(json.loads, lines) if first <= entry["step"] < last]


def audit_starts(folder: RunFolder) -> list[int]:
    """The steps at which workers began that lived to write some of their audit."""
    filesystem, path = storage.open_filesystem(folder.path("audit"))
    starts = {name.rpartition("-")[0] for name in filesystem.glob(f"{path}/*.jsonl")}  # without the files' numbers
    return sorted(int(name.rpartition("/from-")[2][:8]) for name in starts)


def newest(folder: RunFolder) -> Checkpoint:
    """The newest committed checkpoint."""
    return list_checkpoints(folder.checkpoints)[0]


def state_at(folder: RunFolder, step: int) -> dict[str, Any]:
    """Weights, both moments, averages, the objective's own state and the position in the checkpoint of `step`."""
    (checkpoint,) = [found for found in list_checkpoints(folder.checkpoints) if found.step == step]
    state: dict[str, Any] = {f"objective|{key}": value for key, value in checkpoint.objective_state().items()}
    for what in ("param", *MOMENTS, "ema"):
        for network, tensors in assemble(checkpoint, what).items():
            state |= {f"{network}|{what}|{name}": tensor for name, tensor in tensors.items()}
    for network, described in checkpoint.manifest["networks"].items():
        state[f"{network}|optimizer_steps"] = described["optimizer_steps"]
    return state | {key: checkpoint.manifest[key] for key in ("step", "slots", "skipped_in_a_row")}


def assert_same_bits(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every entry of two end states is there in both; tensors are equal bit by bit."""

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)

    assert state.keys() == expected.keys()
    different = [key for key in expected if not same(state[key], expected[key])]
    assert not different, f"{len(different)} of {len(expected)} differ, first {different[0]}"
