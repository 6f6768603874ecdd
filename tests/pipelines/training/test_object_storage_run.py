"""A run that keeps everything in object storage: shards, checkpoints, export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.registry import resolve_model
from pipelines.training.checkpoint import newest_verified
from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow


def test_training_resume_and_export_on_s3(
    train: Callable[..., dict[str, Any]],
    s3: dict[str, str],
    run_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    small_run.write_digits("s3://data/digits")
    preset = small_run.write_preset(
        tmp_path / "s3.yaml", "s3://data/digits", name="on-s3", root="s3://data/runs", checkpoint_every=4
    )
    folder, epoch = RunFolder("s3://data/runs/on-s3"), small_run.STEPS_AN_EPOCH

    first = train(f"run.steps={epoch}", preset=preset)
    assert (first["outcome"], first["run_folder"]) == ("trained", folder.url)
    assert first["export"].startswith("s3://data/runs/on-s3/export/")
    assert len(small_run.state_at(folder, small_run.newest(folder).step)) > 100
    seen = Counter(entry["key"] for entry in small_run.audit(folder))
    assert len(seen) == small_run.SAMPLES and set(seen.values()) == {1}

    again = train(f"run.steps={epoch + 2}", "workers.count=1", preset=preset)
    assert (again["outcome"], again["resumed_from"], again["steps"]) == ("trained", epoch, epoch + 2)
    assert train(f"run.steps={epoch + 2}", preset=preset)["outcome"] == "already finished"

    committed = newest_verified(folder.checkpoints)
    assert committed is not None and committed.step == epoch + 2
    local = resolve_model(again["export"])
    assert {path.name for path in local.iterdir()} == {
        name.rpartition("/")[2] for name in storage.open_filesystem(again["export"])[0].ls(again["export"], False)
    }
