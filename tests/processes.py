"""Run a function on several processes joined by gloo, without Ray: what the equality tests stand on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    result = function(rank, world_size, *arguments)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way


# Imported once, in a server that the processes are forked from: ten seconds for each process otherwise.
_PRELOADED = ["deepspeed", "genmodels.families", "pipelines.training.trainer", "pipelines.training.hooks"]


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(rank, world_size, *arguments)` on each rank; returns what each returned, in rank order."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        arguments_of_main = (world_size, _free_port(), folder, function, arguments)
        mp.start_processes(_main, arguments_of_main, nprocs=world_size, start_method="forkserver")
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]
