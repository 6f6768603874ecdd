"""Where Ray comes from, and whether it has room for the run."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from infra import storage
from infra.errors import BadRequest
from pipelines.training.config import TrainConfig

LIMITS = {"CPU": "CLUSTER_MAX_CPUS", "GPU": "CLUSTER_MAX_GPUS"}
"""Environment variables of the head that say what a cluster may grow to: Ray 2.60 tells no job its autoscaler's
limits."""

GROWS = f" (a cluster that starts nodes on demand says in {' and '.join(LIMITS.values())} how far it may grow)"
"""Said where a cluster has no room."""


def connect(config: TrainConfig) -> None:
    """Join the cluster that RAY_ADDRESS names (inside a Ray job it is set), else start Ray on this machine.

    Raises:
        BadRequest: the workers cannot be placed beside a data task, which would hang without a word.
    """
    join(local_cpus(config))
    check_room(config, resources())


def join(cpus: int) -> None:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine with so many logical CPUs at least."""
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # Ray's processes look in the folder that the command is typed in, which need not be the checkout.
            sources = str(Path(__file__).resolve().parents[2])
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sources, os.environ.get("PYTHONPATH")]))
            ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                _node_ip_address="127.0.0.1",  # a Ray of our own is nobody else's: its ports stay on this machine
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )


def local_cpus(config: TrainConfig) -> int:
    """Logical CPUs for a Ray of our own: the configured number, else enough for the run, at least the machine's."""
    if config.workers.local_cpus is not None:
        return config.workers.local_cpus
    workers = config.workers
    return max(os.cpu_count() or 1, math.ceil(workers.count * (workers.cpus + max(config.data.read_cpus, 1))))


def check_local_room(config: TrainConfig) -> None:
    """`check_room` for a Ray of our own, whose size is known before it starts."""
    if not os.environ.get("RAY_ADDRESS"):
        check_room(config, {"CPU": float(local_cpus(config)), "GPU": float("inf")})


def resources() -> dict[str, float]:
    """CPUs and GPUs that the cluster has, or may grow to where it scales by itself. Raises BadRequest."""
    import ray

    present = ray.cluster_resources()
    return {key: max(float(present.get(key, 0)), _limit(name)) for key, name in LIMITS.items()}


def _limit(name: str) -> float:
    """What the cluster may grow to; 0 where it does not, or does not say."""
    told = os.environ.get(name)
    try:
        return float(told or 0)
    except ValueError:
        raise BadRequest(f"{name}={told}: give a number, of all nodes together that the cluster may have") from None


def check_room(config: TrainConfig, resources: dict[str, float]) -> None:
    """Raises BadRequest where the workers do not fit beside their data tasks."""
    workers = config.workers
    # A data task for each worker and set: with fewer, one's tasks can hold the CPUs that another one waits for.
    sets = 1 if config.data.other_url is None else 2
    needed = workers.count * (workers.cpus + min(float(sets), config.data.read_cpus))
    if needed > resources["CPU"]:
        raise BadRequest(
            f"workers.count={workers.count}, workers.cpus={workers.cpus:g} and a data task each need {needed:g} CPUs, "
            f"Ray has {resources['CPU']:g}: use fewer workers, a larger cluster, or a larger workers.local_cpus" + GROWS
        )
    if workers.use_gpu and workers.count > resources["GPU"]:
        raise BadRequest(
            f"workers.count={workers.count} with workers.use_gpu needs as many GPUs, Ray has {resources['GPU']:g}; "
            f"use fewer workers, or workers.use_gpu=false" + GROWS
        )


def check_shared(url: str, what: str) -> None:
    """Raises BadRequest where a local path would have to be seen by several machines."""
    if node_count() > 1 and not storage.is_remote(url):
        raise BadRequest(f"{what} is {url}, which the nodes of the cluster do not share: use an s3:// URL")


def node_count() -> int:
    """Nodes of the cluster; at least 2 where it scales by itself, since the next one may come at any time."""
    import ray

    alive = sum(1 for node in ray.nodes() if node["Alive"])
    return max(alive, 2 if resources()["CPU"] > ray.cluster_resources().get("CPU", 0) else 1)
