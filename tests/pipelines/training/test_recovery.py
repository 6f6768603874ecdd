"""Killing a training: it ends with the same bits as a run that was left alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow

FIRST, SECOND = small_run.CHECKPOINT_EVERY, 2 * small_run.CHECKPOINT_EVERY  # the steps of two commits, in mid-epoch
START_SECONDS = 240


def wait_past(step: int, process: subprocess.Popen[str], folder: RunFolder) -> None:
    """Until the run is at least three steps past its commit at `step`."""

    def far_enough() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return small_run.reached(folder, step + 3)

    small_run.wait_until(far_enough, START_SECONDS, f"step {step + 3} of {folder.url}")


def assert_killed_between_commits(folder: RunFolder, step: int) -> None:
    """Call when the run stands still: otherwise the test has not shown what it says."""
    assert small_run.newest(folder).step == step, "the run was faster than the test: slow its steps down"
    assert step % small_run.STEPS_AN_EPOCH, "a commit in mid-epoch is wanted"


def assert_as_if_left_alone(folder: RunFolder, alone: RunFolder) -> None:
    small_run.assert_same_bits(small_run.state_at(folder, small_run.STEPS), small_run.state_at(alone, small_run.STEPS))
    for key in ("loss", "grad_norm", "learning_rate"):
        entries = small_run.metric(folder, key)
        assert [step for step, _ in entries] == [*range(1, small_run.STEPS + 1)], key  # each once
        assert entries == small_run.metric(alone, key), key


def test_a_killed_worker_is_replaced_and_a_killed_driver_goes_on_when_typed_again(
    alone: RunFolder, run_root: Path, preset: Path, tmp_path: Path
) -> None:
    folder = RunFolder(str(run_root / "killed"))
    command = (str(preset), "run.name=killed", "--summary", str(tmp_path / "summary.json"))
    with small_run.started(run_root, *command) as process:
        wait_past(FIRST, process, folder)
        workers = small_run.train_workers(process.pid)
        assert len(workers) == 2
        workers[-1].kill()
        assert_killed_between_commits(folder, FIRST)

        wait_past(SECOND, process, folder)  # by itself
        assert small_run.metric(folder, "loss")[: SECOND + 1] == small_run.metric(alone, "loss")[: SECOND + 1]
        replaced = small_run.train_workers(process.pid)
        assert len(replaced) == 2 and not {worker.pid for worker in workers} & {worker.pid for worker in replaced}
        small_run.kill_tree(process)
    assert_killed_between_commits(folder, SECOND)
    small_run.assert_same_bits(small_run.state_at(folder, SECOND), small_run.state_at(alone, SECOND))
    mlflow_run = (folder.read("run.json") or {})["mlflow_run_id"]

    with small_run.started(run_root, *command) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"resumes from step {SECOND} of {small_run.STEPS}" in output
    assert small_run.audit_starts(folder).count(SECOND) == 2, "both workers resume from the commit"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["outcome"], summary["resumed_from"]) == ("trained", SECOND)
    assert summary["mlflow_run_id"] == mlflow_run
    assert_as_if_left_alone(folder, alone)
