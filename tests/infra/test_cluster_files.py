"""The cluster files, checked offline: by Ray's own validation, by schemas of the objects, and against each other."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from infra.cluster.run_rayjob import Api, period_of, rayjob_of, run
from infra.errors import BadRequest, RunFailed
from pipelines.training.cluster import LIMITS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "cluster"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def load(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture
def launcher():
    return load("ray_cluster.yaml")


def prepared(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def test_ray_accepts_the_launcher_file(launcher):
    config = prepared(launcher)
    assert config["head_node_type"] == "head"
    assert {name: node["min_workers"] for name, node in config["available_node_types"].items()} == {
        "head": 0,
        "data": 0,
        "train": 0,
    }


def test_ray_would_notice_a_misspelt_key(launcher):
    import jsonschema

    launcher["available_node_types"]["train"]["max_worker"] = 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        prepared(launcher)


def test_nodes_have_their_roles(launcher):
    nodes = launcher["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    assert nodes["data"]["resources"]["CPU"] > 0 and "GPU" not in nodes["data"]["resources"]
    assert nodes["train"]["resources"]["GPU"] > 0
    assert nodes["train"]["docker"]["worker_image"].endswith("-gpu")
    assert sum(nodes[name]["max_workers"] for name in ("data", "train")) <= launcher["max_workers"]
    assert launcher["idle_timeout_minutes"] > 0


def test_no_node_is_without_the_token(launcher):
    assert list(launcher["file_mounts"]) == ["/home/ray/.ray/auth_token"]
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]


def test_the_head_says_how_far_its_cluster_may_grow(launcher):
    """Ray 2.60 does not: a training on a cluster that is scaled to zero would be refused."""
    nodes = launcher["available_node_types"].values()
    most = [sum(node.get("max_workers", 0) * node["resources"].get(kind, 0) for node in nodes) for kind in LIMITS]
    told = [f"--env {name}={limit}" for name, limit in zip(LIMITS.values(), most, strict=True)]
    assert launcher["docker"]["head_run_options"] == told
    for spec in cluster_specs().values():
        most = [0, 0]
        for group in spec["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            for place, kind in enumerate(("cpu", "nvidia.com/gpu")):
                most[place] += group["maxReplicas"] * int(container["resources"]["limits"].get(kind, 0))
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        told = {each["name"]: each["value"] for each in head["env"]}
        assert told == {name: str(limit) for name, limit in zip(LIMITS.values(), most, strict=True)}


def test_nodes_install_what_pyproject_names(launcher):
    installed = set(re.findall(r"'([^']+)'", " ".join(launcher["setup_commands"])))
    assert installed == set(DEPENDENCIES)


def test_one_version_of_ray_everywhere(launcher):
    ray = next(name for name in DEPENDENCIES if name.startswith("ray["))
    minor = re.search(r">=(\d+\.\d+)", ray)[1]
    texts = [(ROOT / path).read_text() for path in ("ray_cluster.yaml", "infra/cluster/Dockerfile")]
    images = [image for text in texts for image in re.findall(r"rayproject/ray:(\S+)", text)]
    assert images and all(image.startswith(f"{minor}.0-py311-") for image in images)
    assert {spec["rayVersion"] for spec in cluster_specs().values()} == {f"{minor}.0"}


def objects(name: str) -> list[dict]:
    """The Kubernetes objects of a file, and the RayJob that a ConfigMap holds as a template."""
    found = list(yaml.safe_load_all((FOLDER / name).read_text()))
    templates = [one["data"]["rayjob.yaml"] for one in found if one["kind"] == "ConfigMap"]
    return found + [rayjob_of(template, "retrain-ldm-29923380", "uid-of-the-job") for template in templates]


def object_of(name: str, kind: str) -> dict:
    (found,) = [one for one in objects(name) if one["kind"] == kind]
    return found


def rayjob_specs() -> dict[str, dict]:
    return {
        "rayjob.yaml": object_of("rayjob.yaml", "RayJob")["spec"],
        "retrain-cronjob.yaml": object_of("retrain-cronjob.yaml", "RayJob")["spec"],
        "retrain-raycronjob.yaml": object_of("retrain-raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"],
    }


def cluster_specs() -> dict[str, dict]:
    specs = {name: spec["rayClusterSpec"] for name, spec in rayjob_specs().items()}
    return {"raycluster.yaml": object_of("raycluster.yaml", "RayCluster")["spec"], **specs}


@pytest.fixture(scope="module")
def schema():
    import jsonschema

    schema = json.loads((FOLDER / "schema" / "objects.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def positions(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where every key of every mapping is, at all depths."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if isinstance(value, dict):
            yield (*path, key)
        yield from positions(inner, (*path, key))


@pytest.mark.parametrize("name", FILES)
def test_objects_follow_the_schema(schema, name):
    for one in objects(name):
        assert [f"{error.json_path}: {error.message}" for error in schema.iter_errors(one)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_misspelt_key_is_noticed_at_every_depth(schema, name):
    for one in objects(name):
        deepest = 0
        for *way, key in positions(one):
            if way == ["data"]:  # of a ConfigMap: any key may stand there
                continue
            wrong = copy.deepcopy(one)
            inner = wrong
            for step in way:
                inner = inner[step]
            inner[f"{key}s"] = inner.pop(key)
            assert not schema.is_valid(wrong), f"{one['kind']}: {'.'.join(map(str, way))}.{key}s was not noticed"
            deepest = max(deepest, len(way))
        assert deepest >= {"CronJob": 9, "RayCluster": 7, "RayJob": 8, "RayCronJob": 9}.get(one["kind"], 0)


def test_the_schema_knows_no_other_kind(schema):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}}
    assert not schema.is_valid(secret)
    assert not schema.is_valid({"apiVersion": "v1", "metadata": {"name": "keys"}})


def test_kubernetes_cluster():
    spec = cluster_specs()["raycluster.yaml"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"data", "train"}
    for group in groups.values():
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        assert group["template"]["spec"]["automountServiceAccountToken"] is False
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in groups.values())]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert container["image"].startswith("REGISTRY/genmodels:TAG")
        assert container["resources"]["requests"] == container["resources"]["limits"]  # Ray sizes nodes by the limits
        assert {"configMapRef", "secretRef"} == {key for source in container["envFrom"] for key in source}
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod["spec"].get("volumes", ())}
    gpu = [c["resources"]["limits"].get("nvidia.com/gpu") for pod in pods for c in pod["spec"]["containers"]]
    assert gpu[0] is None and gpu[1] is None and int(gpu[2]) > 0


@pytest.mark.parametrize("name", [name for name in FILES if name != "raycluster.yaml"])
def test_all_kubernetes_files_describe_one_cluster(name):
    specs = cluster_specs()
    assert specs[name] == specs["raycluster.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_containers_are_confined(name):
    """None runs as root or may become it; also the autoscaler, which the operator adds to the head."""
    for one in objects(name):
        for *way, key in positions(one):
            if key not in ("containers", "autoscalerOptions"):
                continue
            pod = one
            for step in way:
                pod = pod[step]
            for container in pod["containers"] if key == "containers" else [pod[key]]:
                security = {**pod.get("securityContext", {}), **container["securityContext"]}
                assert security["runAsNonRoot"] is True and security["runAsUser"] == 1000
                assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
                assert security["seccompProfile"] == {"type": "RuntimeDefault"}


def test_no_file_holds_a_secret():
    """Names of keys and passwords stand in comments and tables; nowhere is a value given to one."""
    name = r"(?:AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|MLFLOW_TRACKING_(?:USERNAME|PASSWORD|TOKEN)|RAY_AUTH_TOKEN)"
    value = rf"""{name}["']?\s*[=:]\s*["']?[^\s`…]"""
    for path in [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]:
        text = path.read_text()
        assert not re.search(value, text), path
        assert not re.search(r"AKIA[0-9A-Z]{16}|://[^/\s]+:[^/\s]+@|BEGIN [A-Z ]*PRIVATE KEY", text), path
        assert not re.search(rf"(--from-literal|env_vars)[^\n]*{name}", text), path


def test_retraining_never_overlaps():
    spec = object_of("retrain-cronjob.yaml", "CronJob")["spec"]
    job = spec["jobTemplate"]["spec"]
    rayjob = object_of("retrain-cronjob.yaml", "RayJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["timeZone"] == "Etc/UTC"
    assert spec["startingDeadlineSeconds"] > 0 and spec["successfulJobsHistoryLimit"] > 0
    # The Job outlasts all tries of its RayJob, or the next period would start beside them.
    assert job["activeDeadlineSeconds"] > (1 + rayjob["backoffLimit"]) * rayjob["activeDeadlineSeconds"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    failed = next(rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert failed["onExitCodes"] == {"operator": "In", "values": [1, 2]}
    for name, spec in rayjob_specs().items():
        assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] > 0, name


def test_the_waiting_pod_may_create_and_read_rayjobs_and_nothing_else():
    role, account = object_of("retrain-cronjob.yaml", "Role"), object_of("retrain-cronjob.yaml", "ServiceAccount")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    binding = object_of("retrain-cronjob.yaml", "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account["metadata"]["name"]]
    pod = object_of("retrain-cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["configMap"]["name"] == object_of("retrain-cronjob.yaml", "ConfigMap")["metadata"]["name"]
    assert container["command"][-1] == f"{mount['mountPath']}/rayjob.yaml"


def image_home() -> str:
    return re.search(r"^WORKDIR (\S+)$", (FOLDER / "Dockerfile").read_text(), re.M)[1]


def test_jobs_run_what_the_image_holds():
    home, dockerfile = image_home(), (FOLDER / "Dockerfile").read_text()
    folders = re.findall(r"^COPY --chown=ray (\S+) \1$", dockerfile, re.M)
    assert f"PYTHONPATH={home}" in dockerfile and all((ROOT / folder).is_dir() for folder in folders)
    commands = {name: spec["entrypoint"].split() for name, spec in rayjob_specs().items()}
    waiting = object_of("retrain-cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    commands["the waiting pod"] = waiting["containers"][0]["command"]
    for name, (python, script, *_) in commands.items():
        script = Path(script).relative_to(home)
        assert python == "python" and script.parts[0] in folders and (ROOT / script).is_file(), name


def test_the_crontab_parses():
    lines = [line for line in (FOLDER / "crontab.example").read_text().splitlines() if line and line[0] != "#"]
    settings = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    assert settings["RAY_AUTH_MODE"] == "token" and settings["RAY_AUTH_TOKEN_PATH"].startswith("/")
    assert "$" not in "".join(settings.values()) and "~" not in "".join(settings.values())  # cron expands nothing there
    (line,) = [line for line in lines if not re.match(r"\w+=", line)]
    *fields, command = line.split(maxsplit=5)
    for field, most in zip(fields, (59, 23, 31, 12, 7)):
        assert field == "*" or int(field) <= most
    assert len(fields) == 5 and "%" in command
    assert not re.search(r"(?<!\\)%", command)  # an unescaped one would end the command
    words = shlex.split(command)
    flock = words.index("flock")
    assert words[flock + 1] == "-n" and words[flock + 3 : flock + 6] == [".venv/bin/ray", "job", "submit"]
    assert words[-1] == "2>&1" and words[-2].startswith(">>/")


def test_a_scheduled_job_is_named_by_the_day_that_it_was_due():
    assert period_of("retrain-ldm-29923380") == "2026-11-23"  # due at 03:00, in minutes since 1970
    assert period_of("2026-11-23") == "2026-11-23"  # made by hand: goes on with that period
    rayjob = object_of("retrain-cronjob.yaml", "RayJob")
    assert rayjob["metadata"]["name"] == "ray-retrain-ldm-29923380"
    assert rayjob["spec"]["entrypoint"].endswith("--period 2026-11-23")
    (owner,) = rayjob["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "retrain-ldm-29923380", "uid": "uid-of-the-job"}


def test_a_template_with_another_dollar_is_refused(tmp_path):
    """As the pod starts it: with the image's PYTHONPATH, from any folder."""
    (tmp_path / "rayjob.yaml").write_text("metadata: {name: $HOME}")
    command = [sys.executable, str(FOLDER / "run_rayjob.py"), "rayjob.yaml"]
    job = {"JOB_NAME": "retrain-ldm-29923380", "JOB_UID": "uid", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and "HOME" in ended.stderr


@pytest.fixture
def cluster(tmp_path):
    """A Kubernetes API that answers from a list, and what it was asked."""
    for name, text in {"namespace": "models", "token": "first\n"}.items():
        (tmp_path / name).write_text(text)
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.command, self.path, self.headers["Authorization"], json.loads(body or "null")))
            code, value = answers.pop(0)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())
            (tmp_path / "token").write_text(f"after {len(asked)}")  # as the kubelet replaces it

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Api(f"http://127.0.0.1:{server.server_port}", tmp_path, pause=0.01), answers, asked
    server.shutdown()
    server.server_close()


def status(deployment: str, job: str = "", **more: str) -> tuple[int, dict]:
    return 200, {"status": {"jobDeploymentStatus": deployment, "jobStatus": job, **more}}


RAYJOB = {"metadata": {"name": "ray-retrain-ldm-29923380"}}
ROUTE = "/apis/ray.io/v1/namespaces/models/rayjobs"


def test_the_waiting_pod_ends_as_the_rayjob_does(cluster):
    api, answers, asked = cluster
    answers += [(201, {}), (200, {}), status("Initializing"), (503, {}), status("Running", "RUNNING")]
    answers += [status("Retrying"), status("Running", "RUNNING"), status("Complete", "SUCCEEDED")]
    run(RAYJOB, api)
    assert asked[0] == ("POST", ROUTE, "Bearer first", RAYJOB) and not answers
    assert {(method, path) for method, path, *_ in asked[1:]} == {("GET", f"{ROUTE}/ray-retrain-ldm-29923380")}
    assert asked[-1][2] == f"Bearer after {len(asked) - 1}"


@pytest.mark.parametrize("last", [status("Failed", "FAILED", reason="AppFailed"), status("Complete", "STOPPED")])
def test_a_pod_that_is_started_again_waits_for_the_rayjob_of_its_period(cluster, last):
    api, answers, _ = cluster
    answers += [(409, {"message": "already exists"}), status("Running", "RUNNING"), last]
    with pytest.raises(RunFailed, match="ended as"):
        run(RAYJOB, api)


def test_what_kubernetes_refuses_is_told_in_its_words(cluster):
    api, answers, asked = cluster
    answers += [(403, {"message": "rayjobs.ray.io is forbidden"})]
    with pytest.raises(BadRequest, match="is forbidden"):
        run(RAYJOB, api)
    answers += [(201, {}), (404, {"message": "not found"})]
    with pytest.raises(RunFailed, match="not found"):
        run(RAYJOB, api)
    assert len(asked) == 3
