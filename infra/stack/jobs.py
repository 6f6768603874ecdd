"""`ray job submit` to a stack, with the exit code of what was submitted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

from infra.stack.parts import ask, program

MISLEADING = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3")
"""Variables that would take precedence over those of the stack."""
# What `ray job submit` and the job's supervisor say about themselves.
_OF_RAY = re.compile(
    r"^(\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|SUCC|WARNING) (cli|packaging|working_dir|dashboard_sdk|sdk|job_manager)\.py"
    r"|Running entrypoint for job |-+$|Job 'job-\w+' (succeeded|failed)|\s*$"
    r"|.*\(raylet\).* PYTHON worker processes|.*(real_accelerator\.py|core_worker\.cc))"
)


def submit(
    settings: Mapping[str, str],
    entrypoint: list[str],
    working_dir: str | os.PathLike[str],
    env_vars: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> int:
    """Run `ray job submit` and print its lines as they come; returns the exit code of the job's entrypoint.

    `settings` is what stack.env exports (`LocalStack.environment`). `env_vars` are readable by all who see the
    dashboard: they carry no secrets, which jobs find in the environment of the nodes. With `quiet` only what the
    entrypoint itself says is printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    environment |= {**settings, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    job = f"job-{uuid.uuid4().hex[:12]}"
    command = [program("ray"), "job", "submit", "--submission-id", job, "--working-dir", str(working_dir)]
    if env_vars:
        command += ["--runtime-env-json", json.dumps({"env_vars": dict(env_vars)})]
    process = subprocess.Popen(
        [*command, "--log-color", "false", "--", *entrypoint],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    for line in process.stdout:
        if not (quiet and _OF_RAY.search(line)):
            print(line, end="", flush=True)
    code = process.wait()
    try:
        headers = {"Authorization": f"Bearer {Path(settings['RAY_AUTH_TOKEN_PATH']).read_text().strip()}"}
        _, answer = ask(f"{settings['RAY_API_SERVER_ADDRESS']}/api/jobs/{job}", headers=headers)
        said = json.loads(answer).get("driver_exit_code")
    except (OSError, ValueError, KeyError, AttributeError):
        said = None
    return code if said is None else int(said)  # `ray job submit` itself says 1 for every failure
