"""What the trainings through Ray share: one RUN_ROOT, one S3 server, one Ray in this process, one run left alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.run_folder import RunFolder
from tests import servers
from tests.pipelines.training import small_run

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run_root")


@pytest.fixture(scope="session")
def shards(run_root: Path) -> str:
    folder = str(run_root / "digits")
    small_run.write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def preset(run_root: Path, shards: str) -> Path:
    return small_run.write_preset(run_root / "small.yaml", shards)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 server with the bucket `data`; gives the environment variables that reach it."""
    with servers.rclone_s3(tmp_path_factory.mktemp("s3")) as variables:
        yield variables


@pytest.fixture(scope="session")
def local_ray(run_root: Path, s3: dict[str, str]) -> Iterator[None]:
    """A Ray that all trainings of this process join; its workers can reach the S3 server."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for key, value in (small_run.environment(run_root) | s3).items():
            patch.setenv(key, value)
        ray.init(
            address="local",
            num_cpus=8,
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def train(local_ray: None, run_root: Path, preset: Path) -> Train:
    """Train in this process: `train("run.name=x", …, preset=FILE)` gives the summary."""
    from pipelines.training.config import load_config
    from pipelines.training.launch import train as launch

    def call(*overrides: str, preset: Path = preset) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RUN_ROOT", str(run_root))
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            return launch(load_config(str(preset), list(overrides)))

    return call


@pytest.fixture(scope="session")
def alone(train: Train, run_root: Path) -> RunFolder:
    """A run of two workers that nothing happened to."""
    assert train("run.name=alone")["outcome"] == "trained"
    return RunFolder(str(run_root / "alone"))
