"""One MLflow run for one training: each step once, also after restarts; errors that are told and not swallowed."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sqlite3
import threading
import time

import pytest
from PIL import Image

from infra import mlflow_store, tracking
from infra.errors import BadRequest
from infra.tracking import RunLogger
from tests.servers import free_port


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def run_id(uri):
    return tracking.start_run(uri, "tests", "a-run", params={"steps": 15})


def steps_of(uri, run_id, key):
    return [metric.step for metric in mlflow_store.open_client(uri).get_metric_history(run_id, key)]


def test_each_step_once_after_a_restart(uri, run_id):
    with RunLogger(uri, run_id) as logger:
        for step in range(1, 11):
            logger.log(step, {"train/loss": 1 / step})
    assert tracking.start_run(uri, "tests", "a-run", run_id=run_id) == run_id
    with RunLogger(uri, run_id) as logger:  # resumed at the checkpoint of step 5
        for step in range(6, 16):
            logger.log(step, {"train/loss": 1 / step})
    assert sorted(steps_of(uri, run_id, "train/loss")) == list(range(1, 16))
    rows = tracking.metric_history(uri, run_id, ["train/loss"])
    assert [(row["step"], row["train/loss"]) for row in rows] == [(step, 1 / step) for step in range(1, 16)]


def test_metrics_of_one_step_may_come_apart(uri, run_id):
    """A crash between a step's loss and its validation must not lose the validation."""
    with RunLogger(uri, run_id) as logger:
        logger.log(10, {"train/loss": 1.0})
    with RunLogger(uri, run_id) as logger:
        logger.log(10, {"train/loss": 1.0})
        logger.log(10, {"validation/loss": 2.0})
    assert steps_of(uri, run_id, "train/loss") == [10]
    assert steps_of(uri, run_id, "validation/loss") == [10]


def test_step_zero_and_not_a_number_are_kept(uri, run_id):
    with RunLogger(uri, run_id) as logger:
        logger.log(0, {"train/loss": float("nan")})
        logger.log(1, {"train/loss": 0.5})
    assert sorted(steps_of(uri, run_id, "train/loss")) == [0, 1]


def test_flush_has_written_everything(uri, run_id):
    logger = RunLogger(uri, run_id)
    for step in range(2500):
        logger.log(step, {"train/loss": 0.0})
    logger.flush()
    assert len(steps_of(uri, run_id, "train/loss")) == 2500
    logger.close()


def test_logging_does_not_wait_for_mlflow(uri, run_id):
    with RunLogger(uri, run_id) as logger:
        start = time.perf_counter()
        for step in range(200):
            logger.log(step, {"train/loss": 0.0})
        assert time.perf_counter() - start < 0.2


def test_images_and_files_once(uri, run_id):
    picture = Image.new("RGB", (8, 8), "red")
    for _ in range(2):
        with RunLogger(uri, run_id) as logger:
            logger.log_image("samples/grid", picture, 5)
            logger.log_artifact_bytes("config/resolved.yaml", b"a: 1")
    client = mlflow_store.open_client(uri)
    pictures = [a.path for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]
    assert len(pictures) == 1
    assert [a.path for a in client.list_artifacts(run_id, "config")] == ["config/resolved.yaml"]


def test_errors_of_the_thread_are_raised(uri):
    logger = RunLogger(uri, "0" * 32)
    logger.log(1, {"train/loss": 1.0})
    with pytest.raises(RuntimeError, match="logging to MLflow at"):
        logger.flush()
    with pytest.raises(RuntimeError):
        logger.close()
    with pytest.raises(RuntimeError, match="closed"):
        logger.log(2, {"train/loss": 1.0})


def test_the_first_error_is_the_one_that_is_raised():
    with pytest.raises(ZeroDivisionError) as caught, RunLogger("sqlite:////dev/null/mlflow.db", "0" * 32) as logger:
        logger.log(1, {"train/loss": 1.0})
        raise ZeroDivisionError
    assert "logging to MLflow" in caught.value.__notes__[0]


def test_an_evaluation_has_its_figures_at_its_step_and_its_files(uri, run_id, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("page")
    tracking.log_evaluation(uri, run_id, {"evaluation_recall": 0.5, "evaluation_none": math.inf}, 60, [page])
    rows = tracking.metric_history(uri, run_id, ["evaluation_recall", "evaluation_none"])
    assert rows == [{"step": 60, "evaluation_recall": 0.5}]
    assert [f.path for f in mlflow_store.open_client(uri).list_artifacts(run_id, "evaluation")] == [
        "evaluation/report.html"
    ]


def test_system_metrics(uri, run_id):
    with RunLogger(uri, run_id, system_metrics=True, system_interval=0.2) as logger:
        time.sleep(1.5)
        logger.log(1, {"train/loss": 1.0})
    assert any(key.startswith("system/") for key in mlflow_store.open_client(uri).get_run(run_id).data.metrics)


def test_a_run_that_resumes(uri):
    client = mlflow_store.open_client(uri)
    run_id = tracking.start_run(uri, "tests", "resumes", params={"steps": 10, "lr": 0.1}, tags={"index_digest": "abc"})
    tracking.finish_run(uri, run_id, "FAILED")
    assert client.get_run(run_id).info.status == "FAILED"
    tracking.start_run(uri, "tests", "resumes", run_id=run_id, params={"steps": 20, "lr": 0.1, "new": "x" * 9000})
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["steps"] == "10" and run.data.tags["param_now.steps"] == "20"
    assert "param_now.lr" not in run.data.tags and run.data.tags["index_digest"] == "abc"
    assert len(run.data.params["new"]) == 6000
    tracking.finish_run(uri, run_id)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_of_another_store_is_refused(uri):
    with pytest.raises(BadRequest, match="is not in sqlite"):
        tracking.start_run(uri, "tests", "x", run_id="f" * 32)


def _log_steps(uri, run_id, prefix):
    with RunLogger(uri, run_id) as logger:
        for step in range(50):
            logger.log(step, {f"{prefix}/loss": 0.0})
            logger.flush()


def _train_until_killed(uri, run_id, committed):
    logger = RunLogger(uri, run_id)
    for step in range(1, 1000):
        logger.log(step, {"train/loss": 1 / step})
        if step % 5 == 0:
            logger.flush()
            committed.value = step
        time.sleep(0.005)


@pytest.mark.slow
def test_each_step_once_after_a_kill(uri, run_id):
    """Killed between two commits, with values still queued; the next worker resumes at the last commit."""
    spawn = multiprocessing.get_context("spawn")
    committed = spawn.Value("i", 0)
    worker = spawn.Process(target=_train_until_killed, args=(uri, run_id, committed))
    worker.start()
    while committed.value < 20:
        time.sleep(0.01)
    time.sleep(0.02)
    worker.kill()
    worker.join()
    resumed = committed.value
    assert max(steps_of(uri, run_id, "train/loss")) >= resumed
    with RunLogger(uri, run_id) as logger:
        for step in range(resumed + 1, resumed + 21):
            logger.log(step, {"train/loss": 1 / step})
    assert sorted(steps_of(uri, run_id, "train/loss")) == list(range(1, resumed + 21))


@pytest.mark.slow
def test_two_processes_write_one_sqlite_file(uri, run_id):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_log_steps, args=(uri, run_id, prefix)) for prefix in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(steps_of(uri, run_id, "a/loss")) == len(steps_of(uri, run_id, "b/loss")) == 50


def test_a_locked_file_is_waited_for(monkeypatch):
    calls = []

    def locked_twice():
        calls.append(1)
        if len(calls) < 3:
            raise sqlite3.OperationalError("database is locked")
        return "done"

    def always_locked():
        raise sqlite3.OperationalError("database is locked")

    assert mlflow_store.patiently(locked_twice) == "done"
    with pytest.raises(ZeroDivisionError):
        mlflow_store.patiently(lambda: 1 / 0)
    monkeypatch.setattr(mlflow_store, "_LOCK_SECONDS", 0.1)
    with pytest.raises(sqlite3.OperationalError):
        mlflow_store.patiently(always_locked)


def test_the_database_has_a_write_ahead_log(uri):
    mlflow_store.open_client(uri)
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_where_runs_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    assert tracking.check_tracking(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///relative.db")
    assert tracking.tracking_uri().startswith("sqlite:////")
    with pytest.raises(BadRequest, match="2 nodes"):
        tracking.check_tracking(None, nodes=2)
    with pytest.raises(BadRequest, match="plain folders"):
        tracking.check_tracking(str(tmp_path))
    with pytest.raises(BadRequest, match="no MLflow server answers"):
        tracking.check_tracking(f"http://127.0.0.1:{free_port()}")


def test_trials_that_start_together_share_an_experiment(uri):
    ids: list[str] = []

    def start():
        ids.append(tracking.start_run(uri, "together", "trial"))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = mlflow_store.open_client(uri)
    assert len(ids) == 4 and len({client.get_run(run_id).info.experiment_id for run_id in ids}) == 1


def _open(uri: str) -> str:
    from infra.mlflow_store import open_client

    return str(open_client(uri).get_experiment("0").name)


def test_processes_that_create_one_database_at_once_wait_for_each_other(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_open, [f"sqlite:///{tmp_path}/new/mlflow.db"] * 3) == ["Default"] * 3
