"""S3, MLflow and Ray on one machine: jobs with the nodes' environment, wrong credentials, nothing left behind."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra import storage
from infra.errors import BadRequest
from infra.local_stack import LocalStack
from infra.mlflow_store import check_tracking, open_client
from infra.stack import parts, processes
from infra.stack.jobs import submit
from pipelines.promotion.command import argument_parser, promote
from tests.servers import AWS_VARIABLES

pytestmark = pytest.mark.slow

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
JOB = """
import os, sys
import mlflow, ray, s3fs

print("buckets:", sorted(s3fs.S3FileSystem().ls("")), "word:", os.environ["WORD"])
mlflow.set_experiment("from-a-job")
with mlflow.start_run() as run:
    mlflow.log_param("steps", 3)
    mlflow.log_text("drawn", "note.txt")
mlflow.MlflowClient().create_registered_model("from-a-job")
ray.init(log_to_driver=False)
node = ray.remote(lambda: ray.get_runtime_context().get_node_id())
print("elsewhere:", ray.get(node.remote()) != ray.get_runtime_context().get_node_id(), os.path.exists("job.py"))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "stack"
    with LocalStack.up(folder, nodes=1, cpus=2) as up:
        yield up


@pytest.fixture
def inside(stack, monkeypatch):
    """This process with the variables of stack.env."""
    for name in AWS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = str(Path(processes.__file__).parents[1] / "local_stack.py")
    return subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, env={**os.environ, **environment}
    )


def all_secrets(stack: LocalStack) -> list[str]:
    admin = (stack.folder / "mlflow" / "auth.ini").read_text().split("admin_password = ")[1].split()[0]
    environment = stack.environment()
    return [*(environment[name] for name in SECRETS), (stack.folder / "ray_token").read_text(), admin]


def test_all_parts_are_up(stack):
    assert stack.states() == {"s3": True, "head": True, "mlflow": True, "node-1": True}
    shown = command("status", "--folder", str(stack.folder))
    assert shown.returncode == 0 and shown.stdout.count(" up ") == 4
    assert command("status", RUN_ROOT=str(stack.folder / "nothing")).returncode == 1


def test_a_second_up_is_refused(stack):
    refused = command("up", "--folder", str(stack.folder))
    assert refused.returncode == 2 and "is up already" in refused.stderr and "Traceback" not in refused.stderr


def test_a_job_needs_the_nodes_environment_alone(stack, inside, tmp_path, capsys):
    (tmp_path / "job.py").write_text(JOB)
    assert submit(stack.environment(), ["python", "job.py", "7"], tmp_path, {"WORD": "kept"}) == 7
    printed = capsys.readouterr().out
    assert "buckets: ['mlflow', 'runs', 'shards'] word: kept" in printed and "elsewhere: True True" in printed
    client = open_client()
    experiment = client.get_experiment_by_name("from-a-job")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"steps": "3"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    assert storage.exists(f"s3://mlflow/artifacts/{experiment.experiment_id}/{run.info.run_id}/artifacts/note.txt")
    assert client.get_registered_model("from-a-job").name == "from-a-job"


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_ray_refuses_a_wrong_token(stack, inside, tmp_path, capsys, token):
    (tmp_path / "token").write_text(token)
    environment = {**stack.environment(), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert submit(environment, ["true"], tmp_path) == 1
    assert "AuthenticationError" in capsys.readouterr().out
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    assert parts.ask(f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)[0] in (401, 403)


def test_mlflow_refuses_a_wrong_password(inside):
    assert check_tracking(None, nodes=2) == os.environ["MLFLOW_TRACKING_URI"]
    inside.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(BadRequest, match="refuses the login: set MLFLOW_TRACKING_USERNAME"):
        check_tracking(None)
    for command in (["models:/digits/1"], ["models:/digits", "--rollback"]):  # before anything is read or moved
        with pytest.raises(BadRequest, match="refuses the login"):
            promote(argument_parser().parse_intermixed_args(command))
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        inside.delenv(name)
    with pytest.raises(BadRequest, match="refuses the login"):
        check_tracking(None)


def test_s3_refuses_a_wrong_key(inside):
    storage.check_access("s3://runs/any", write=True)
    inside.setenv("AWS_SECRET_ACCESS_KEY", "wrong-key")
    with pytest.raises(BadRequest, match="bucket runs: access denied"):
        storage.check_access("s3://runs/any")


def test_it_listens_on_this_machine_only(stack):
    addresses = {
        connection.laddr.ip
        for process in processes.members(stack.folder, stack.parts, stack.temporary)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    for address in addresses:
        parsed = ipaddress.ip_address(address)
        assert (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback, addresses


def test_secrets_are_nowhere_but_in_files_of_the_owner(stack, inside):
    secrets = [secret.encode() for secret in all_secrets(stack)]
    assert stack.folder.stat().st_mode & 0o777 == 0o700
    for name in ("stack.env", "stack.json", "ray_token", "mlflow/auth.ini"):
        assert (stack.folder / name).stat().st_mode & 0o777 == 0o600
    token = {"Authorization": f"Bearer {(stack.folder / 'ray_token').read_text()}"}
    _, jobs = parts.ask(f"{stack.environment()['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=token)
    assert b"kept" in jobs  # what `env_vars` carry is seen here
    texts = {"jobs": jobs, "stack.json": (stack.folder / "stack.json").read_bytes()}
    for log in [*(stack.folder / "logs").iterdir(), *stack.temporary.rglob("*")]:
        if log.is_file():
            texts[str(log)] = log.read_bytes()
    assert sum("job-driver" in name for name in texts) >= 1
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            texts[str(line)] = line.read_bytes()
        except OSError:
            continue  # it ended meanwhile
    assert [name for name, text in texts.items() if any(secret in text for secret in secrets)] == []


def test_a_process_that_got_an_old_pid_is_spared(tmp_path):
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        stale = processes.Part("s3", "", other.pid, psutil.Process(other.pid).create_time() - 100)
        assert not stale.is_alive()
        assert processes.stop(tmp_path, [stale], None) == 0 and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(BadRequest, match="holds other files"):
        LocalStack.up(tmp_path)


def test_down_leaves_nothing_even_after_a_crash(stack):
    """Runs last: it stops the stack, two of whose parts were killed before."""
    found = processes.members(stack.folder, stack.parts, stack.temporary)
    for name in ("head", "mlflow"):
        os.kill(next(part.pid for part in stack.parts if part.name == name), signal.SIGKILL)
    psutil.wait_procs([process for process in found if process.pid in {part.pid for part in stack.parts}], timeout=0.5)
    assert command("status", "--folder", str(stack.folder)).returncode == 1
    assert LocalStack.find(stack.folder).down(purge=True) >= 4
    assert not [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not any(processes.is_open(port) for port in stack.ports.values())
    assert not stack.temporary.exists() and not stack.folder.exists()
    assert command("down", "--folder", str(stack.folder)).stdout == "0 processes stopped\n"
