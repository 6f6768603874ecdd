"""Create the RayJob of a scheduled period, and end as it ends: the pod of `retrain-cronjob.yaml`.

    JOB_NAME=… JOB_UID=… python infra/cluster/run_rayjob.py TEMPLATE      name and uid of the Kubernetes Job

The period comes from the Job's name, in which a CronJob writes the time that the Job was due: a pod that is started
again, after midnight or on another node, finds the RayJob of its period and waits for it. A Job that is made by hand
(`kubectl create job 2026-11-23 --from=cronjob/retrain-ldm`) has its name as its period, and so goes on with that run.

Exit codes: 0 the RayJob succeeded; 1 it failed, after its own retries; 2 it cannot be created.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from infra.errors import BadRequest, RunFailed, main_exit

_FAILED = ("Failed", "ValidationFailed")


@dataclass(frozen=True)
class Api:
    """The RayJobs of one namespace, as a pod's service account may use them."""

    url: str = "https://kubernetes.default.svc"
    account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    pause: float = 20.0  # seconds between two looks, and before what did not answer is asked again

    def create(self, rayjob: dict[str, Any]) -> bool:
        """Create it; False where one of this name is there already."""
        try:
            self._call("POST", "", rayjob)
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise BadRequest(f"RayJob {rayjob['metadata']['name']} was not created: {_reason(error)}") from None
        return True

    def status(self, name: str) -> dict[str, Any]:
        """Its status; empty before KubeRay has seen it."""
        try:
            return self._call("GET", f"/{name}").get("status") or {}
        except urllib.error.HTTPError as error:
            raise RunFailed(f"RayJob {name} cannot be followed: {_reason(error)}") from None

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask until there is an answer: a training of days is not given up because the API server restarts."""
        namespace = (self.account / "namespace").read_text().strip()
        url = f"{self.url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{path}"
        while True:
            request = urllib.request.Request(url, method=method)
            if body is not None:
                request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
            # Read at each call: the kubelet replaces the token before it runs out.
            request.add_header("Authorization", f"Bearer {(self.account / 'token').read_text().strip()}")
            try:
                with urllib.request.urlopen(request, timeout=60, context=self._tls()) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise
                print(f"{method} {url}: {error}; asking again", flush=True)
            except OSError as error:
                print(f"{method} {url}: {error}; asking again", flush=True)
            time.sleep(self.pause)

    def _tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self.account / "ca.crt") if self.url.startswith("https:") else None


def period_of(job: str) -> str:
    """The day (UTC) that a CronJob's Job was due, from the minutes since 1970 in its name; any other name as it is.

    >>> period_of("retrain-ldm-29730420")
    '2026-07-12'
    >>> period_of("2026-11-23")
    '2026-11-23'
    """
    due = re.search(r"-(\d{8})$", job)
    return job if due is None else time.strftime("%Y-%m-%d", time.gmtime(60 * int(due[1])))


def rayjob_of(template: str, job: str, uid: str) -> dict[str, Any]:
    """The RayJob in which $JOB and $PERIOD are filled in, and which goes when the Kubernetes Job goes."""
    try:
        rayjob = yaml.safe_load(Template(template).substitute(JOB=job, PERIOD=period_of(job)))
    except (KeyError, ValueError) as error:
        raise BadRequest(f"the template knows $JOB and $PERIOD, and $$ for a dollar: {error}") from None
    except yaml.YAMLError as error:
        raise BadRequest(f"the template is no YAML: {error}") from None
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}
    rayjob["metadata"]["ownerReferences"] = [owner]
    return rayjob


def run(rayjob: dict[str, Any], api: Api) -> None:
    """Create the RayJob where it is not there, and wait for its end.

    Raises:
        BadRequest: it cannot be created; the message is the API server's.
        RunFailed: it failed, was stopped or was deleted.
    """
    name = rayjob["metadata"]["name"]
    print(f"RayJob {name}: {'created' if api.create(rayjob) else 'is there already'}", flush=True)
    told = None
    while True:
        status = api.status(name)
        deployment, job = status.get("jobDeploymentStatus") or "New", status.get("jobStatus") or "not started"
        if told != (deployment, job):
            print(f"RayJob {name}: {deployment}, {job}", flush=True)
            told = deployment, job
        if deployment == "Complete" and job == "SUCCEEDED":
            return
        if deployment == "Complete" or deployment in _FAILED:
            why = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
            raise RunFailed(f"RayJob {name} ended as {deployment}, {job}. {why}")
        time.sleep(api.pause)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["message"]
    except (ValueError, KeyError, TypeError):
        return str(error)


def main() -> None:
    template = Path(sys.argv[1]).read_text(encoding="utf-8")
    run(rayjob_of(template, os.environ["JOB_NAME"], os.environ["JOB_UID"]), Api())


if __name__ == "__main__":
    main_exit(main)
