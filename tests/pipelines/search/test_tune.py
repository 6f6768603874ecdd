"""`tune.py` through Ray: successive halving, killed trials and drivers, populations, and the best one that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from infra.errors import BadRequest
from infra.mlflow_store import open_client
from pipelines.search.command import argument_parser, search
from pipelines.search.record import Trial, read_trials
from pipelines.search.trial import run_trial
from pipelines.training.checkpoint import find_checkpoint
from pipelines.training.presets import override
from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run
from tests.pipelines.training.small_run import CHECKOUT, kill_tree, wait_until

pytestmark = pytest.mark.slow
SPACE = {"optimizer.learning_rate": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}}
SEARCH: dict[str, Any] = {"trials": 2, "at_once": 2, "steps": 8, "interval": 4, "space": SPACE}
SMALL = ["workers.count=1", "run.validation_samples=16", "run.log_every=4"]


@pytest.fixture
def run(local_ray: None, run_root: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small_run.write_digits(str(tmp_path / "held_out"), 16)

    def typed(name: str, *overrides: str, **changed: Any) -> list[str]:
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(SEARCH | {"name": name} | changed))
        command = [str(preset), str(tmp_path / "s.yaml"), *SMALL, f"data.validation_url={tmp_path}/held_out"]
        return [*command, *overrides, "--summary", str(tmp_path / "summary.json")]

    def call(name: str, *overrides: str, **changed: Any) -> dict[str, Any]:
        return search(argument_parser().parse_intermixed_args(typed(name, *overrides, **changed)))

    call.typed = typed  # type: ignore[attr-defined]
    return call


def test_halving_survives_a_killed_trial_and_the_best_one_goes_on(
    run: Any, train: Any, run_root: Path, tmp_path: Path
) -> None:
    import threading

    killed: list[int] = []

    def kill_one() -> None:
        with suppress(AssertionError):
            wait_until(lambda: bool(_actors("ImplicitFunc")), 60, "the actor of a trial")
            victim = _actors("ImplicitFunc")[0]
            victim.kill()
            killed.append(victim.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = run("halving")
    killer.join()
    assert killed
    assert found["outcome"] == "searched" and len(found["trials"]) == 2
    assert json.loads((tmp_path / "summary.json").read_text())["best"] == found["best"]
    best = found["best"]
    finals = [trial["val_loss"] for trial in found["trials"] if trial["steps"] == 8]
    assert best["steps"] == 8 and best["val_loss"] == min(finals) and not any(t["failed"] for t in found["trials"])
    assert {trial["steps"] for trial in found["trials"]} <= {4, 8}

    client = open_client(None)
    of_search = client.get_run(found["mlflow_run_id"])
    assert of_search.info.status == "FINISHED" and of_search.data.metrics["best_val_loss"] == best["val_loss"]
    for trial in found["trials"]:
        known = RunFolder(str(run_root / trial["run"])).read("run.json")
        assert known is not None
        of_trial = client.get_run(known["mlflow_run_id"])
        assert of_trial.data.tags["mlflow.parentRunId"] == found["mlflow_run_id"]
        assert of_trial.info.status == "FINISHED"
    assert not (run_root / "halving" / "ray").exists()  # pickles of Ray Tune
    assert (run_root / "halving" / "search.png").read_bytes()[1:4] == b"PNG"

    assert run("halving")["outcome"] == "already finished"
    with pytest.raises(BadRequest, match="search 'halving' began with another preset or space"):
        run("halving", "optimizer.warmup_steps=1")

    on = train("run.steps=12", preset=Path(found["preset"]))
    assert on["outcome"] == "trained" and on["run"] == "halving-best" and on["resumed_from"] == 8
    trained = RunFolder(on["run_folder"])
    rate = trained.config().optimizer.learning_rate
    assert rate == best["values"]["optimizer.learning_rate"]
    first = find_checkpoint(trained.config().run.continue_from or "")
    assert first is not None and first.step == 8


def _actors(name: str) -> list[psutil.Process]:
    """Actors of Ray in this machine's processes below this one, by their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_population_whose_driver_is_killed_goes_on(
    run: Any, run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = {"method": "pbt", "steps": 12, "worst_share": 0.5}
    command = [sys.executable, str(CHECKOUT / "pipelines" / "tune.py"), *run.typed("crowd", **crowd)]
    folder = RunFolder(str(run_root / "crowd"))
    environment = small_run.environment(run_root)
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        wait_until(lambda: any(trial.reports for trial in read_trials(folder)), 300, "figures of a trial")
    finally:
        kill_tree(process)
    before = {trial.number: trial for trial in read_trials(folder)}
    found = run("crowd", **crowd)
    after = read_trials(folder)
    assert [trial.complete for trial in after] == [True, True]
    for trial in after:  # what was known is not forgotten, and nothing is trained twice
        known = before[trial.number].reports
        assert trial.reports[: len(known)] == known or trial.reports[: len(known) - 1] == known[:-1]
        assert [each["step"] for each in trial.reports if each["run"] == trial.run][-1] == 12
    for trial in after:
        if trial.earlier:  # it went on from the other one's weights
            assert trial.continue_from is not None and f"/{after[1 - trial.number].run}" in trial.continue_from
    assert found["outcome"] == "searched" and found["best"]["steps"] == 12
    assert "crowd: searched" in capsys.readouterr().out
    if not any(trial.earlier for trial in after):  # who met whom is a matter of time: here it is made to happen
        better, worse = sorted(after, key=lambda trial: trial.reports[-1]["figures"]["val_loss"])
        _goes_on_from_another_ones_weights(folder, better, worse, tmp_path, monkeypatch)


def _goes_on_from_another_ones_weights(
    folder: RunFolder, better: Trial, worse: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worse trial is given what the better one had reported before the last interval, with the same values: it
    ends where the better one ended."""
    from ray import tune

    before = better.reports[-2]
    start = before["checkpoint"] if before["run"] == better.run else better.continue_from
    pointer = {"number": better.number, "step": before["step"], "checkpoint": start}
    given = tmp_path / "given"
    given.mkdir()
    (given / "pointer.json").write_text(json.dumps(pointer))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: f"x_{worse.number:05d}"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: tune.Checkpoint.from_directory(str(given)))
    monkeypatch.setattr(tune, "report", lambda figures, checkpoint=None: told.append(figures))
    search, described = folder.read("search.json") or {}, folder.read("run.json") or {}
    base = override(search["base"], [f"data.index={search['index']}"])
    job = {"base": base, "search": search["search"], "folder": folder.url, "environment": {}}
    run_trial(better.values, job | {"parent_run": described["mlflow_run_id"]})
    forked = read_trials(folder)[worse.number]
    assert (forked.earlier, forked.continue_from, forked.complete) == ([*worse.earlier, worse.run], start, True)
    assert RunFolder(str(Path(folder.url).parent / forked.run)).config().run.continue_from == start
    assert [each["step"] for each in told] == [12] and forked.reports[-1]["run"] == forked.run
    assert told[0]["val_loss"] == pytest.approx(better.reports[-1]["figures"]["val_loss"], rel=1e-5)
    assert told[0]["val_loss"] != pytest.approx(worse.reports[-1]["figures"]["val_loss"], rel=1e-3)
