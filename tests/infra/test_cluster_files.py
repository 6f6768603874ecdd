"""The cluster files, checked offline: by Ray's own validation, and by the structure that KubeRay expects."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
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
    assert launcher["file_mounts"] == {}


def test_nodes_install_what_pyproject_names(launcher):
    installed = set(re.findall(r"'([^']+)'", " ".join(launcher["setup_commands"])))
    assert installed == set(DEPENDENCIES)


def test_one_version_of_ray_everywhere(launcher):
    ray = next(name for name in DEPENDENCIES if name.startswith("ray["))
    minor = re.search(r">=(\d+\.\d+)", ray)[1]
    texts = [(ROOT / path).read_text() for path in ("ray_cluster.yaml", "infra/cluster/Dockerfile")]
    images = [image for text in texts for image in re.findall(r"rayproject/ray:(\S+)", text)]
    assert images and all(image.startswith(f"{minor}.0-py311-") for image in images)
    for path in ("infra/cluster/raycluster.yaml", "infra/cluster/rayjob.yaml"):
        assert re.search(r'rayVersion: "(.*)"', (ROOT / path).read_text())[1] == f"{minor}.0"


def cluster_spec(path: str) -> dict:
    document = load(path)
    assert document["apiVersion"] == "ray.io/v1" and document["metadata"]["name"]
    if path.endswith("rayjob.yaml"):
        assert document["kind"] == "RayJob"
        return document["spec"]["rayClusterSpec"]
    assert document["kind"] == "RayCluster"
    return document["spec"]


@pytest.mark.parametrize("path", ["infra/cluster/raycluster.yaml", "infra/cluster/rayjob.yaml"])
def test_kubernetes_cluster(path):
    spec = cluster_spec(path)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"data", "train"}
    for group in groups.values():
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
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


def test_both_kubernetes_files_describe_one_cluster():
    assert cluster_spec("infra/cluster/raycluster.yaml") == cluster_spec("infra/cluster/rayjob.yaml")


def test_the_job_runs_what_the_image_holds():
    entrypoint = load("infra/cluster/rayjob.yaml")["spec"]["entrypoint"]
    dockerfile = (ROOT / "infra/cluster/Dockerfile").read_text()
    home = re.search(r"^WORKDIR (\S+)$", dockerfile, re.M)[1]
    script = re.match(rf"python {home}/(\S+)", entrypoint)[1]
    assert script.split("/")[0] in re.findall(r"^COPY --chown=ray (\S+) \1$", dockerfile, re.M)
    assert f"PYTHONPATH={home}" in dockerfile
    for folder in re.findall(r"^COPY --chown=ray (\S+) \1$", dockerfile, re.M):
        assert (ROOT / folder).is_dir()
