"""Killing a training: it ends with the same bits as a run that was left alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow

COMMITTED = small_run.CHECKPOINT_EVERY
KILLED_AFTER = COMMITTED + 3
START_SECONDS = 240


def wait_for_kill(process: subprocess.Popen[str], folder: RunFolder) -> None:
    """Until the run is at least three steps past its first checkpoint."""

    def far_enough() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return small_run.reached(folder, KILLED_AFTER)

    small_run.wait_until(far_enough, START_SECONDS, f"step {KILLED_AFTER} of {folder.url}")


def assert_killed_between_commits(folder: RunFolder) -> None:
    """Call when the run stands still: otherwise the test has not shown what it says."""
    assert small_run.newest(folder).step == COMMITTED, "the run was faster than the test: slow its steps down"
    assert COMMITTED % small_run.STEPS_AN_EPOCH, "a commit in mid-epoch is wanted"


def assert_as_if_left_alone(folder: RunFolder, alone: RunFolder) -> None:
    small_run.assert_same_bits(small_run.end_state(folder), small_run.end_state(alone))
    for key in ("loss", "grad_norm", "learning_rate"):
        entries = small_run.metric(folder, key)
        assert [step for step, _ in entries] == [*range(1, small_run.STEPS + 1)], key  # each once
        assert entries == small_run.metric(alone, key), key


def test_a_killed_worker_is_replaced(alone: RunFolder, run_root: Path, preset: Path) -> None:
    folder = RunFolder(str(run_root / "worker-killed"))
    with small_run.started(run_root, str(preset), "run.name=worker-killed") as process:
        wait_for_kill(process, folder)
        workers = small_run.train_workers(process.pid)
        assert len(workers) == 2
        workers[-1].kill()
        assert_killed_between_commits(folder)
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    starts = small_run.audit_starts(folder)
    assert starts.count(COMMITTED) == 2, f"both workers resume from the commit, not from {starts}"
    assert_as_if_left_alone(folder, alone)


def test_a_killed_driver_goes_on_when_typed_again(
    alone: RunFolder, run_root: Path, preset: Path, tmp_path: Path
) -> None:
    folder = RunFolder(str(run_root / "driver-killed"))
    command = (str(preset), "run.name=driver-killed", "--summary", str(tmp_path / "summary.json"))
    with small_run.started(run_root, *command) as process:
        wait_for_kill(process, folder)
        small_run.kill_tree(process)
    assert_killed_between_commits(folder)
    mlflow_run = (folder.read("run.json") or {})["mlflow_run_id"]

    with small_run.started(run_root, *command) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"resumes from step {COMMITTED} of {small_run.STEPS}" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["outcome"], summary["resumed_from"]) == ("trained", COMMITTED)
    assert summary["mlflow_run_id"] == mlflow_run
    assert_as_if_left_alone(folder, alone)
