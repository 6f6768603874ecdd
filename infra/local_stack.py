"""On one machine what a cluster has: an S3 server, an MLflow server with users, and Ray with a head and worker nodes.

    python infra/local_stack.py up --nodes 2 --cpus 4
    source ~/genmodels-runs/local-stack/stack.env
    ray job submit --working-dir . -- python pipelines/train_ldm.py ldm_demo run.root=s3://runs …
    python infra/local_stack.py status
    python infra/local_stack.py down            (--purge: buckets, MLflow's database and scratch files too)

Everything listens on 127.0.0.1 only and asks for keys, a password or a token, made at random by `up`. They are in
files of mode 600 in a folder of mode 700; jobs find them in the environment of the nodes. Runs are kept in MLflow's
SQLite file, or in the database that LOCAL_STACK_MLFLOW_DATABASE names (postgresql://… wants its driver installed).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from filelock import FileLock, Timeout

from infra import storage
from infra.errors import BadRequest, RunFailed, main_exit
from infra.stack import parts as stack_parts
from infra.stack import processes
from infra.stack.jobs import MISLEADING
from infra.stack.processes import Part

_SECONDS = 180.0  # that a part may take to answer, on a machine that is busy with others
_KEPT = ("s3", "mlflow", "scratch")  # survive `down`, unless purged
_OWN = (*_KEPT, "logs", "ray_token", "stack.json", "stack.env", "stack.lock")


def default_folder() -> Path:
    """Where a stack lives that names no folder."""
    return storage.run_root() / "local-stack"


@dataclass
class LocalStack:
    """A stack that is up, or what is left of one. `with LocalStack.up(folder) as stack:` stops it at the end."""

    folder: Path
    parts: list[Part] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)
    temporary: Path | None = None
    """Ray's folder for sockets and logs, under a short path (a socket's may have 107 bytes); `down` removes it."""

    @classmethod
    def up(cls, folder: str | os.PathLike[str] | None = None, nodes: int = 1, cpus: int = 4) -> LocalStack:
        """Start all parts, `nodes` worker nodes with `cpus` logical CPUs each, and wait until each one answers.

        Raises BadRequest where the folder's stack is up already, RunFailed where a part does not come up (all is
        stopped again).
        """
        if nodes < 1 or cpus < 1:
            raise BadRequest(f"--nodes {nodes} --cpus {cpus}: both must be 1 or more")
        path = _own_folder(folder)
        with _alone(path):
            left = cls.find(path)
            if any(part.is_alive() for part in left.parts):
                state = "is up already" if left.is_up() else "is partly up"
                raise BadRequest(f"the stack of {path} {state}; see `status`, stop it with `down`")
            left._stop()  # what a crash left behind
            stack = cls(path, temporary=Path(tempfile.mkdtemp(prefix="stack-", dir="/tmp")))
            try:
                stack._start(nodes, cpus)
            except BaseException:
                stack._stop(logs=False)
                raise
        return stack

    @classmethod
    def find(cls, folder: str | os.PathLike[str] | None = None) -> LocalStack:
        """The stack of a folder, as its stack.json says; without parts where there is none."""
        path = Path(folder or default_folder()).expanduser().absolute()
        try:
            record = json.loads((path / "stack.json").read_text())
            parts = [Part(**part) for part in record["parts"]]
            return cls(path, parts, dict(record["ports"]), Path(record["temporary"]))
        except (FileNotFoundError, NotADirectoryError):
            return cls(path)
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"{path / 'stack.json'} is damaged ({error!r}); remove it and run `down`") from error

    def environment(self) -> dict[str, str]:
        """What stack.env exports: how to reach the stack, secrets included. Raises BadRequest where it is not up."""
        try:
            lines = (self.folder / "stack.env").read_text().splitlines()
        except OSError as error:
            raise BadRequest(f"no stack is up in {self.folder}; start it with `up --folder {self.folder}`") from error
        words = [shlex.split(line) for line in lines]
        return dict(word.split("=", 1) for kind, *rest in words if kind == "export" for word in rest)

    def states(self) -> dict[str, bool]:
        """For each part whether its process lives and it answers."""
        alive: set[str] = set()
        if any(part.is_alive() for part in self.parts):
            token = self._token()
            alive = stack_parts.living_nodes(f"http://127.0.0.1:{self.ports['dashboard']}", token)
        return {part.name: part.is_alive() and self._answers(part, alive) for part in self.parts}

    def is_up(self) -> bool:
        """Whether every part answers."""
        return bool(self.parts) and (self.folder / "stack.env").exists() and all(self.states().values())

    def down(self, purge: bool = False) -> int:
        """Stop every process of the stack, jobs included, and remove what it left but the data; returns their number.

        `purge` removes the buckets, MLflow's database and the scratch files too. Raises RunFailed where something
        does not end.
        """
        if not self.folder.is_dir():
            return 0
        _own_folder(self.folder)
        with _alone(self.folder):
            count = self._stop()
            if purge:
                for name in _KEPT:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
        if purge:
            (self.folder / "stack.lock").unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        return count

    def __enter__(self) -> LocalStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _start(self, nodes: int, cpus: int) -> None:
        names = ("s3", "mlflow", "gcs", "dashboard")
        self.ports = dict(zip(names, processes.free_ports(len(names))))
        self._record()
        urls = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        token, admin_password = secrets.token_hex(32), secrets.token_hex(16)
        complete = self.folder / "mlflow" / "complete"
        if complete.exists():  # the administrator of the database that is kept
            admin_password = _admin_password(self.folder)
        else:  # a database that was being made when `up` was stopped cannot be used again
            shutil.rmtree(self.folder / "mlflow", ignore_errors=True)
        stack_parts.write_secret(self.folder / "ray_token", token)
        settings = self._settings(urls)
        (self.folder / "scratch").mkdir(exist_ok=True)
        jobs = {name: value for name, value in settings.items() if name != "RAY_API_SERVER_ADDRESS"}
        jobs |= {"RUN_ROOT": str(self.folder / "scratch"), "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        jobs |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
        assert self.temporary is not None
        head = stack_parts.head_options(self.ports["gcs"], self.ports["dashboard"])
        self._add(stack_parts.start_s3(self.folder, self.ports["s3"], settings))
        self._add(stack_parts.start_ray_node(self.folder, "head", urls["dashboard"], head, jobs, self.temporary))
        key = secrets.token_hex(32)
        self._add(stack_parts.start_mlflow(self.folder, self.ports["mlflow"], settings, admin_password, key))
        self._wait("s3", lambda: self._answers(self._part("s3"), set()))
        self._wait("head", lambda: "head" in stack_parts.living_nodes(urls["dashboard"], token))
        workers = [f"node-{number}" for number in range(1, nodes + 1)]
        for name in workers:
            options = stack_parts.node_options(self.ports["gcs"], cpus)
            self._add(stack_parts.start_ray_node(self.folder, name, f"{cpus} CPUs", options, jobs, self.temporary))
        self._wait("mlflow", lambda: self._answers(self._part("mlflow"), set()))
        stack_parts.make_user(urls["mlflow"], admin_password, settings["MLFLOW_TRACKING_PASSWORD"])
        complete.touch()
        for name in workers:
            self._wait(name, lambda name=name: name in stack_parts.living_nodes(urls["dashboard"], token))  # type: ignore[misc]
        lines = [f"unset {' '.join(MISLEADING)}"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
        stack_parts.write_secret(self.folder / "stack.env", "\n".join(lines) + "\n")

    def _settings(self, urls: Mapping[str, str]) -> dict[str, str]:
        """How to reach the stack, with new secrets."""
        return {
            "RAY_API_SERVER_ADDRESS": urls["dashboard"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray_token"),
            "MLFLOW_TRACKING_URI": urls["mlflow"],
            "MLFLOW_TRACKING_USERNAME": stack_parts.USER,
            "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16),
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
            "AWS_ENDPOINT_URL": urls["s3"],
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_REGION": "us-east-1",
        }

    def _part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def _token(self) -> str:
        try:
            return (self.folder / "ray_token").read_text()
        except OSError:
            return ""

    def _answers(self, part: Part, nodes: set[str]) -> bool:
        if part.name == "s3":
            return stack_parts.ask(part.url)[0] != 0  # "access denied" is an answer
        if part.name == "mlflow":
            return stack_parts.ask(f"{part.url}/health")[0] == 200
        return part.name in nodes

    def _add(self, part: Part) -> None:
        self.parts.append(part)
        self._record()

    def _record(self) -> None:
        """Write stack.json: at once, so that `down` finds what an `up` that was killed had started."""
        record = {"parts": [asdict(part) for part in self.parts], "ports": self.ports, "temporary": str(self.temporary)}
        written = self.folder / "stack.json.new"
        stack_parts.write_secret(written, json.dumps(record, indent=2) + "\n")
        written.replace(self.folder / "stack.json")

    def _wait(self, name: str, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SECONDS
        while not answers():
            ended = not self._part(name).is_alive()
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else f"did not answer in {_SECONDS:.0f} s"
                end = processes.log_end(self.folder, name)
                if database := os.environ.get(stack_parts.DATABASE):
                    end = end.replace(database, stack_parts.DATABASE)  # MLflow names it, password and all
                raise RunFailed(f"{name} {what}; its log {self.folder / 'logs' / name}.log ends with: {end}")
            time.sleep(0.2)

    def _stop(self, logs: bool = True) -> int:
        """Stop all processes and remove what is not data (`logs=False`: nor the logs of a start that failed)."""
        count = processes.stop(self.folder, self.parts, self.temporary)
        alive = processes.members(self.folder, self.parts, self.temporary)
        if alive:
            raise RunFailed(
                f"still alive: {', '.join(f'{p.pid} ({p.name()})' for p in alive)}; stop them and try again"
            )
        used = [f"{port} ({name})" for name, port in self.ports.items() if count and processes.is_open(port)]
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        for name in ("stack.env", "ray_token", "stack.json.new", "stack.json"):
            (self.folder / name).unlink(missing_ok=True)
        if logs:
            shutil.rmtree(self.folder / "logs", ignore_errors=True)
        if used:
            raise RunFailed(f"all processes ended, but somebody else answers at port {', '.join(used)}")
        return count


def _own_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The absolute folder of a stack, made with mode 700. Raises BadRequest where it holds anything else."""
    path = Path(folder or default_folder()).expanduser().absolute()
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and not names & {"stack.lock", "stack.json"}:
            raise BadRequest(f"{path} holds other files; name a folder of its own: --folder {path}/local-stack")
        path.chmod(0o700)
    except OSError as error:
        raise BadRequest(f"{path} cannot be used ({error.strerror}); name another with --folder") from error
    return path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "stack.lock", timeout=0, mode=0o600):
            yield
    except Timeout as error:
        raise BadRequest(f"another `up` or `down` of {folder} is at work; wait for it") from error


def _admin_password(folder: Path) -> str:
    lines = (folder / "mlflow" / "auth.ini").read_text().splitlines()
    return next(line.partition(" = ")[2] for line in lines if line.startswith("admin_password"))


def _print_status(stack: LocalStack) -> bool:
    from rich.console import Console
    from rich.table import Table

    states = stack.states()
    table = Table("part", "where", "state", "pid")
    for part in stack.parts:
        table.add_row(part.name, part.url, "up" if states[part.name] else "down", str(part.pid))
    console = Console(soft_wrap=True)
    if stack.parts:
        console.print(table)
    else:
        console.print(f"no stack in {stack.folder}", highlight=False)
    return stack.is_up()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, says in (("up", "start"), ("down", "stop"), ("status", "show what is up")):
        command = commands.add_parser(name, help=says)
        command.add_argument("--folder", help="where data and secrets are kept (default: RUN_ROOT/local-stack)")
        if name == "up":
            command.add_argument("--nodes", type=int, default=1, help="worker nodes beside the head (default 1)")
            command.add_argument("--cpus", type=int, default=4, help="logical CPUs of each (default 4)")
        if name == "down":
            command.add_argument("--purge", action="store_true", help="remove buckets, database and scratch files too")
    chosen = parser.parse_args()
    if chosen.command == "up":
        stack = LocalStack.up(chosen.folder, chosen.nodes, chosen.cpus)
        for part in stack.parts:
            print(f"{part.name:8s} {part.url}")
        print(f"source {shlex.quote(str(stack.folder / 'stack.env'))}")
    elif chosen.command == "status":
        sys.exit(0 if _print_status(LocalStack.find(chosen.folder)) else 1)
    else:
        count = LocalStack.find(chosen.folder).down(purge=chosen.purge)
        print(f"{count} processes stopped")


if __name__ == "__main__":
    main_exit(main)
