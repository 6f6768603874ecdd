"""`retrain.py` through Ray: nothing new, new shards, a worse result, and the same period typed again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.errors import BadRequest
from infra.mlflow_store import open_client
from infra.registry_lease import RegistryLease
from pipelines.data.index import load_index
from pipelines.promotion.retraining import argument_parser, retrain
from pipelines.training.checkpoint import list_checkpoints
from pipelines.training.lease import Lease
from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow
MEASURED = ["--count", "24", "--num-steps", "2", "--features", "digits", "--actors", "1"]
OPEN = {"share_of_real": "{}", "not_worse": "[]", "copies": "false", "slice_loss": "1", "improve": "[frechet_distance]"}


@pytest.fixture
def run(local_ray: None, run_root: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    held_out, shards = tmp_path / "held_out", tmp_path / "train"
    small_run.write_digits(str(held_out), 40)
    small_run.write_digits(str(shards), 64)

    def typed(*arguments: str, samples: int = 96, **gates: str) -> list[str]:
        told = [part for key, value in (OPEN | gates).items() for part in ("--gate", f"{key}={value}")]
        command = ["models:/again", str(preset), f"data.url={shards}", f"data.validation_url={held_out}"]
        command += ["workers.count=1", "run.checkpoint_every=3", "--samples", str(samples), *arguments]
        return [*command, *MEASURED, *told, "--summary", str(tmp_path / "summary.json")]

    def call(*arguments: str, samples: int = 96, **gates: str) -> dict[str, Any]:
        return retrain(argument_parser().parse_intermixed_args(typed(*arguments, samples=samples, **gates)))

    call.shards, call.typed = shards, typed  # type: ignore[attr-defined]
    return call


def test_a_model_is_trained_again_where_its_data_have_grown(
    run: Any, run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _kill_in_the_middle(run.typed("--period", "one", "--new-share", "0.5"), run_root, tmp_path)
    assert "--new-share is left out, as again has no champion yet" in told
    assert not [model.name for model in open_client(None).search_registered_models("name = 'again'")]
    late = run.shards / "late-00000.tar"  # arrives meanwhile: the run goes on with its own shards
    late.write_bytes((run.shards / "00000.tar").read_bytes())
    first = run("--period", "one")
    late.unlink()
    assert RunFolder(first["run_folder"]).config().data.index == load_index(str(run.shards)).digest
    assert len(open_client(None).search_model_versions("name = 'again'")) == 1
    assert (first["event"], first["promoted"], first["champion"]) == ("first", True, "1")
    assert json.loads((tmp_path / "summary.json").read_text())["run"] == "again-one"
    for period in ("one", "two"):
        skipped = run("--period", period)
        assert (skipped["event"], skipped["promoted"]) == ("nothing_new", False)
        assert skipped["reason"] == "nothing new since champion 1 was trained"
    assert not (run_root / "again-two").exists()

    small_run.write_digits(str(run.shards / "more"), 32)
    (run.shards / "more" / "00000.tar").rename(run.shards / "more-00000.tar")
    assert "run again-one is of the shards of then: name another --period" in run("--period", "one")["reason"]
    capsys.readouterr()
    worse = run("--period", "two", "--new-share", "0.5", "--hours", "1", improve_by="{frechet_distance: 1.0e+9}")
    told = capsys.readouterr().out
    assert "96 samples, other than those of champion 1" in told
    assert "of an epoch of 128 samples 0.500 are new" in told
    assert (worse["event"], worse["outcome"], worse["champion"]) == ("refused", "refused", "1")
    client = open_client(None)
    assert {k: str(v) for k, v in client.get_registered_model("again").aliases.items()} == {"champion": "1"}
    version = client.get_model_version("again", worse["version"])
    settled = RunFolder(worse["run_folder"]).config()
    assert (settled.data.new_share, settled.run.max_hours) == (0.5, 1.0)
    assert settled.data.old_index == client.get_model_version("again", "1").tags["index_digest"]
    assert version.tags["samples"] == "96"  # the repeated ones count once
    assert version.tags["init_from"] == "models:/again/1" and RunFolder(worse["run_folder"]).config().run.steps == 6
    known = run("--period", "three")
    assert known["event"] == "nothing_new" and "name another" not in known["reason"]
    assert known["reason"].startswith(
        "nothing new since version 2, which was refused: better than the champion: frechet"
    )

    for other in ("--from scratch", "--new-share 0.25"):
        with pytest.raises(BadRequest, match=f"run again-two began from models:/again/1 .*: leave out {other}"):
            run("--period", "two", "--again", *other.split())
    # It is finished, and so is not trained once more, but judged: here somebody else promotes meanwhile.
    with RegistryLease(None, "again"), pytest.raises(BadRequest, match="again is being promoted"):
        run("--period", "two", "--again")
    assert "run 'again-two' is finished: 6 steps" in capsys.readouterr().out
    assert len(client.search_model_versions("name = 'again'")) == 2


def _kill_in_the_middle(arguments: list[str], run_root: Path, folder: Path) -> str:
    """Type the command, and switch the machine off at the first checkpoint of its training; what it printed."""
    command = [sys.executable, str(small_run.CHECKOUT / "pipelines" / "retrain.py"), *arguments]
    printed = folder / "printed.txt"
    environment = small_run.environment(run_root)
    with printed.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, stdout=file)
    try:
        checkpoints = RunFolder(str(run_root / "again-one")).checkpoints
        small_run.wait_until(lambda: bool(list_checkpoints(checkpoints)), 300, "a checkpoint of the retraining")
    finally:
        small_run.kill_tree(process)
    return printed.read_text()


def test_a_second_one_at_once_and_what_cannot_be_asked_for(run: Any, run_root: Path) -> None:
    small_run.write_digits(str(run.shards / "more"), 40)
    (run.shards / "more" / "00000.tar").rename(run.shards / "other-00000.tar")
    busy = pytest.raises(BadRequest, match="again-busy is being trained by process")
    with Lease(RunFolder(str(run_root / "again-busy"))), busy:
        run("--period", "busy", "--again")
    for arguments, match in (
        (["run.name=mine"], "leave out run.name=mine"),
        (["--gate", "improve_bye.x=1"], "did you mean improve_by"),
    ):
        with pytest.raises(BadRequest, match=match):
            run(*arguments)
    with pytest.raises(BadRequest, match="a step alone takes 16"):
        run(samples=3)
    blind = ["dinov2:nowhere" if part == "digits" else part for part in run.typed()]
    with pytest.raises(BadRequest, match="name what looks at captions: --clip"):
        retrain(argument_parser().parse_intermixed_args(blind))
