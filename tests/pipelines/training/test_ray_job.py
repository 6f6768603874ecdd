"""`ray job submit -- python pipelines/train_ldm.py` on a head of `ray start`, from a bare copy of the sources."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run
from tests.servers import free_port

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).parent / "ray")
STEPS = 4


@dataclass(frozen=True)
class Head:
    """A Ray head of our own: where jobs are submitted, and the environment that it gives to them."""

    address: str
    environment: dict[str, str] = field(repr=False)

    def submit(self, sources: Path, job: str) -> str:
        """Submit the training as a job, wait for its end, and return its status and log as one text."""
        entry = ["python", "pipelines/train_ldm.py", "small.yaml"]
        submitted = ["job", "submit", "--address", self.address, "--submission-id", job, "--working-dir", str(sources)]
        self.ray(*submitted, "--", *entry)
        status = self.ray("job", "status", job, "--address", self.address)
        return status + self.ray("job", "logs", job, "--address", self.address)

    def ray(self, *arguments: str) -> str:
        # Not check=True: a failed job must be shown with its log.
        done = subprocess.run(
            [RAY, *arguments],
            env=self.environment | {"COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def head(run_root: Path) -> Iterator[Head]:
    environment = small_run.environment(run_root)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("PYTHONPATH", None)  # a head knows nothing of this checkout
    # A token of its own: whether Ray makes one in the home directory depends on what ran there before.
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    dashboard = free_port()
    # Sockets lie in the temporary folder, and their paths may have 107 characters: pytest's own is too long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ports = {
            "port": free_port(),
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
        }
        address = ["--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        numbers = [f"--{name}={port}" for name, port in ports.items()]
        with (Path(temporary) / "head.log").open("w") as log:
            process = subprocess.Popen(
                [RAY, "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={temporary}", *address, *numbers],
                env=environment,
                cwd=temporary,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            started = Head(f"http://127.0.0.1:{dashboard}", environment)
            small_run.wait_until(lambda: _answers(started), 90, "the head answers")
            yield started
        finally:
            small_run.kill_tree(process)  # `ray stop` would end every Ray of this machine


def _answers(head: Head) -> bool:
    """Whether jobs can be submitted: the dashboard answers some seconds after the head itself."""
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers=token)
    with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A copy of the sources, with a preset beside them."""
    copy = tmp_path_factory.mktemp("sources")
    for package in ("pipelines", "genmodels", "infra"):
        shutil.copytree(small_run.CHECKOUT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    small_run.write_preset(copy / "small.yaml", shards, name="job", steps=STEPS)
    return copy


def test_the_project_is_not_installed() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    asked = subprocess.run(
        [sys.executable, "-c", "import genmodels"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'genmodels'" in asked.stderr


def test_a_job_trains_and_a_later_one_finds_it_finished(head: Head, sources: Path, run_root: Path) -> None:
    folder = RunFolder(str(run_root / "job"))
    first = head.submit(sources, "first")
    assert "Job 'first' succeeded" in first
    assert f"job: trained, {STEPS} steps" in first
    assert small_run.newest(folder).step == STEPS

    # Another content of the sources gives the next job another working directory.
    with (sources / "pipelines" / "train_ldm.py").open("a") as source:
        source.write("# edited\n")
    again = head.submit(sources, "again")
    assert "Job 'again' succeeded" in again
    assert f"run 'job' is finished: {STEPS} steps" in again
