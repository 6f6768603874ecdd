"""What the hooks keep of bad samples over ranks and restarts, in validation, and in the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from genmodels.objective import Mean
from pipelines.data.batch import RankBatch
from pipelines.data.index import load_index
from pipelines.data.quarantine import DataFailure, Quarantine, read_quarantine
from pipelines.data.spec import SampleSpec
from pipelines.training.audit import Audit
from pipelines.training.checkpoint import Snapshot, list_checkpoints
from pipelines.training.config import TrainConfig
from pipelines.training.hooks import RunHooks, checked
from pipelines.training.metrics import MeanLog, Throughput
from pipelines.training.run_data import RunData
from pipelines.training.run_folder import RunFolder
from tests.genmodels import tiny
from tests.pipelines.data.shards import encode, numbered_image, pairs, write_shards, write_tar
from tests.processes import on_ranks

RANK_BATCH = 4
WORLD_SIZE = 2


class _Trainer:
    """As much of a trainer as the hooks touch; its validation counts the usable samples."""

    def __init__(self) -> None:
        self.log, self.throughput, self.device = MeanLog(), Throughput(), torch.device("cpu")
        self.last: dict[str, float] = {}
        self.skipped_steps = 0
        self.phase_seconds: dict[str, float] = {}

    def validate(self, batches: list[RankBatch], step: int) -> dict[str, float]:
        log = MeanLog()
        for batch in batches:
            log.add({"loss": Mean.of(torch.ones(len(batch["keys"])), batch["weight"])}, "val_")
        return log.read()

    def finish(self, batches: Any, step: int) -> dict[str, float]:
        return {"samples": float(sum(len(batch["keys"]) for batch in batches()))}

    def snapshot(self, step: int, facts: dict[str, Any]) -> Snapshot:
        return Snapshot(step, {}, {**facts, "networks": {}})


class _Board:
    """Takes the progress of a run and shows it nobody."""

    @property
    def progress(self) -> _Board:
        return self

    @property
    def measured(self) -> _Board:
        return self

    def remote(self, entry: dict[str, Any]) -> None:
        pass


def _config(root: Path, start: _Start) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": {
                "name": "bad", "steps": start.steps, "log_every": 2, "checkpoint_every": 4, "validate_every": 4,
                "preview_samples": 0, "finish_samples": 8,
            },
            "data": {
                "url": str(root / "train"), "validation_url": str(root / start.held_out), "lanes": WORLD_SIZE,
                "global_batch_size": RANK_BATCH * WORLD_SIZE, "max_bad_share": 0.01,
            },
            "objective": tiny.diffusion_config().model_dump(),
            "workers": {"count": WORLD_SIZE},
        }
    )  # fmt: skip


def _batches(rank: int, first: int, last: int, bad: set[tuple[int, int]]) -> Any:
    """Batches of steps [first, last); one sample is bad where (rank, step) is in `bad`."""
    for step in range(first, last):
        keys = [f"a.tar/{step}-{rank}-{n}" for n in range(RANK_BATCH)]
        images = torch.zeros(RANK_BATCH, 3, 2, 2, dtype=torch.uint8)
        yield {
            "keys": keys, "reasons": ["image: missing" if (rank, step) in bad else "", *[""] * (RANK_BATCH - 1)],
            "step": step, "images": images, "seeds": torch.zeros(RANK_BATCH), "weight": torch.ones(RANK_BATCH),
        }  # fmt: skip


class _Start(NamedTuple):
    """A start of a run: its folder, its held-out shards, and what it goes on from."""

    run: str
    steps: int
    bad: set[tuple[int, int]]  # (rank, step) with a bad sample
    first: int = 0
    bad_before: int = 0
    held_out: str = "held_out"


STARTS = [
    _Start("counted", 8, {(1, 0), (0, 5)}),
    # From the commit at step 4 again, for longer, at step 14: 1.12 + 3·√1.12 + 2 = 6.3 of 112 may be bad, and 5 are.
    _Start("resumed", 40, {(0, step) for step in (5, 9, 10, 13)}, 4, 1),
    # The same, with three more: of 96 samples 0.96 + 2.94 + 2 = 5.9 may be.
    _Start("stopped", 40, {(0, step) for step in (5, 6, 7, 9, 10, 11, 13)}, 4, 1),
    _Start("two held out are bad", 4, set(), held_out="two_bad"),
    _Start("all held out are bad", 4, set(), held_out="all_bad"),
]


def _run(rank: int, world_size: int, root: Path) -> list[str]:
    """All starts, one after the other; returns how each ended."""
    return [_end_of(start, rank, root) for start in STARTS]


def _end_of(start: _Start, rank: int, root: Path) -> str:
    config = _config(root, start)
    folder = RunFolder(str(root / start.run))
    indices = [load_index(str(url), build=False) for url in (config.data.url, config.data.validation_url)]
    quarantine = Quarantine(folder.path("quarantine"), rank, config.data.max_bad_share, chunk_samples=2)
    audit = Audit(folder, rank, start.first)
    hooks = RunHooks(
        config, folder, SampleSpec(8), RunData(*indices), None, _Board(), {}, quarantine, start.bad_before, audit
    )  # fmt: skip
    trainer: Any = _Trainer()
    try:
        batches = _batches(rank, start.first, start.steps, start.bad)
        for step, _ in enumerate(checked(batches, quarantine, audit.record), start.first + 1):
            hooks.after_step(trainer, step)
    except DataFailure as error:
        return str(error)
    return f"{hooks.bad_samples} bad"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooks")


@pytest.fixture(scope="module")
def ends(root: Path) -> dict[str, list[str]]:
    """How each start ended, on either rank."""
    write_shards(root / "train", 16, 8, chunk_samples=2)
    write_shards(root / "held_out", 8, 8, chunk_samples=2)
    bad = [("x.png", encode(numbered_image(1))), ("y.png", b"")]
    for name, good in (("two_bad", pairs(6)), ("all_bad", [])):
        (root / name).mkdir()
        write_tar(root / name / "a.tar", [*bad, *good])
        load_index(str(root / name), progress=False)
    by_rank = on_ranks(WORLD_SIZE, _run, root)
    return {start.run: list(of_ranks) for start, of_ranks in zip(STARTS, zip(*by_rank, strict=True), strict=True)}


@pytest.mark.slow
def test_bad_samples_of_all_ranks_are_in_checkpoint_and_figures(root: Path, ends: dict[str, list[str]]) -> None:
    assert ends["counted"] == ["2 bad"] * WORLD_SIZE
    newest, earlier = list_checkpoints(RunFolder(str(root / "counted")).checkpoints)
    assert (earlier.step, earlier.manifest["bad_samples"]) == (4, 1)
    assert (newest.manifest["bad_samples"], newest.manifest["figures"]["bad_samples"]) == (2, 2)
    assert newest.manifest["figures"]["samples"] == 8


@pytest.mark.slow
def test_all_ranks_stop_with_one_message_by_the_counts_since_the_beginning(ends: dict[str, list[str]]) -> None:
    assert ends["resumed"] == ["5 bad"] * WORLD_SIZE
    first, second = ends["stopped"]
    assert first == second
    assert first.startswith("7 of the 96 samples read so far cannot be used"), first
    assert "shard a.tar, key 11-0-0: image: missing" in first  # which rank 0 alone has met


@pytest.mark.slow
def test_bad_held_out_samples_are_recorded_and_not_counted(root: Path, ends: dict[str, list[str]]) -> None:
    assert ends["two held out are bad"] == ["0 bad"] * WORLD_SIZE
    records = read_quarantine(str(root / "two held out are bad" / "quarantine"))
    assert {(record["key"], record["split"]) for record in records} == {(f"a.tar/{key}", "held_out") for key in "xy"}


@pytest.mark.slow
def test_a_validation_without_any_good_sample_fails(ends: dict[str, list[str]]) -> None:
    first, second = ends["all held out are bad"]
    assert first == second and "held-out samples" in first and "shard a.tar" in first


def test_the_audit_of_committed_steps_survives_a_kill(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    audit = Audit(folder, 3, 17)
    for written, batch in enumerate(_batches(3, 17, 19, set()), 1):
        audit.record(batch)
        audit.write()
        audit.write()  # nothing new: no empty file
        assert len(list((tmp_path / "audit").iterdir())) == written
    files = sorted((tmp_path / "audit").iterdir())
    assert all(file.name.startswith("from-00000017-rank-0003-") for file in files)
    steps = [[json.loads(line)["step"] for line in file.read_text().splitlines()] for file in files]
    assert steps == [[17] * RANK_BATCH, [18] * RANK_BATCH]
