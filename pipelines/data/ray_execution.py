"""What a rank's Dataset may use, and how it waits: two things that Ray Data 2.60 does badly for many small Datasets.

1. Ray Data divides the cluster's spare CPUs among all running Datasets, in whole numbers. With one Dataset a rank, the
   first to ask gets a CPU and others none; these then read only once their consumer has nothing left. Here each
   rank's Dataset has the share that the run's configuration gives it (`check_room` saw to it that there is that much).
2. When nothing more may be read ahead, Ray Data's scheduling loop turns without pause, and takes a core and the
   interpreter lock of the process that trains. Here it pauses after a turn that changed nothing.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from ray.data import DataContext, ExecutionResources
from ray.data._internal.cluster_autoscaler.base_cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution.execution_callback import ExecutionCallback

_PAUSE_SECONDS = (0.001, 0.05)  # the first, and the longest: each is twice the one before


class _FixedShare(ClusterAutoscaler):
    """Stands where Ray Data asks for the cluster's resources; the cluster's size is left to Ray Train."""

    def __init__(self, share: ExecutionResources) -> None:
        self._share = share

    def try_trigger_scaling(self) -> None:
        pass

    def on_executor_shutdown(self) -> None:
        pass

    def get_total_resources(self) -> ExecutionResources:
        return self._share


class _RankExecution(ExecutionCallback):
    def __init__(self, cpus: float) -> None:
        self._share = ExecutionResources.for_limits(cpu=cpus)
        self._done: list[tuple[int, int]] = []
        self._pause = _PAUSE_SECONDS[0]

    def before_execution_starts(self, executor: Any) -> None:
        executor._cluster_autoscaler.on_executor_shutdown()  # withdraws its request for a part of the cluster
        executor._cluster_autoscaler = _FixedShare(self._share)

    def on_execution_step(self, executor: Any) -> None:
        metrics = [operator.metrics for operator in executor._topology]
        done = [(each.num_tasks_submitted, each.num_task_outputs_generated) for each in metrics]
        shortest, longest = _PAUSE_SECONDS
        if done == self._done:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, longest)
        else:
            self._done, self._pause = done, shortest


def limit_to_share(context: DataContext, cpus: float, read_ahead_bytes: int) -> None:
    """Let Datasets of this context use `cpus` logical CPUs, and hold about `read_ahead_bytes` that nobody took yet."""
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=cpus, object_store_memory=read_ahead_bytes
    )
    context.custom_execution_callback_classes = [
        *context.custom_execution_callback_classes,
        partial(_RankExecution, cpus),  # type: ignore[list-item]  # Ray calls it, with no arguments
    ]
