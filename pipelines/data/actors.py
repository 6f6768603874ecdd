"""Work with models over Ray Data: actors that open them once, and are given rows."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any


def map_by_actors(rows: list[dict[str, Any]], actor: type, shared: Any, actors: int, use_gpu: bool) -> Any:
    """A Dataset of what actors make of rows, one at a time and in order; Ray is running.

    Args:
        rows: of plain values.
        actor: a class that is made with a list that holds `shared`, and called with a row as a batch of one.
        shared: a reference to what all actors need.
        actors: how many, of one CPU each, or one GPU with `use_gpu`.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions

    context = DataContext.get_current().copy()
    context.execution_options = ExecutionOptions(preserve_order=True, verbose_progress=False)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # not that some function failed, but how
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # what matters is raised
    # On a cluster, an actor whose node was lost is started anew. On this machine alone it would meet what
    # ended it again, and for actors that restart Ray prints a warning of losing their arguments.
    once = None if os.environ.get("RAY_ADDRESS") else (lambda: {"max_restarts": 0, "max_task_retries": 0})
    with DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of `ray_remote_args_fn`, from Ray 2.64 on
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            actor,
            batch_size=1,
            compute=ActorPoolStrategy(size=actors),
            fn_constructor_args=[[shared]],  # in a list, the reference is sent and not what it stands for
            ray_remote_args_fn=once,
            **({"num_gpus": 1} if use_gpu else {"num_cpus": 1}),
        )
