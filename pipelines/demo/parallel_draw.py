"""Draws pictures in several processes of one thread each: on a CPU, faster than one process with as many threads.

A picture depends on its prompt and seed alone, so the result does not depend on how the prompts are dealt out.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class DrawingPool:
    """Processes that draw with the model of an export folder. They start at once; use a `with` block.

    Args:
        folder: an export that can be opened.
        processes: at least 1. Each loads the model anew and uses one thread.
        precision: of the U-Net: "fp32", "bf16" or "auto".
    """

    def __init__(self, folder: Path, processes: int, precision: str = "fp32") -> None:
        # Not forked from here: a fork of a process that has run torch's threads can hang at the next parallel region.
        # They are forks of one process that has only imported what is needed, which takes seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["genmodels.diffusion.pipeline"])
        self._pool = context.Pool(processes, initializer=_load, initargs=(str(folder), precision))

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        progress: Callable[[float, int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """A picture for each prompt and seed: uint8 (n, height, width, 3).

        `progress` is called with the number of pictures that are done, and their total; `options` are those of
        the model's `draw` (`num_steps`, `guidance_scale`, `sampler`, `batch_size`). What a process raises is raised
        here.
        """
        part = options.get("batch_size", 64)
        jobs = [(prompts[i : i + part], seeds[i : i + part], options) for i in range(0, len(prompts), part)]
        pictures = []
        for drawn in self._pool.imap(_draw, jobs):
            pictures.append(drawn)
            if progress:
                progress(sum(map(len, pictures)), len(prompts))
        return np.concatenate(pictures)

    def __enter__(self) -> DrawingPool:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._pool.close()  # ending the processes at once would leak their semaphores
        else:
            self._pool.terminate()
        self._pool.join()


_model: Any = None  # one for each process of the pool


def _load(folder: str, precision: str) -> None:
    global _model
    import torch

    from genmodels.drawing import open_drawing_model

    torch.set_num_threads(1)
    _model = open_drawing_model(Path(folder), precision=precision)


def _draw(job: tuple[list[str], list[int], dict[str, Any]]) -> np.ndarray:
    prompts, seeds, options = job
    return _model.draw(prompts, seeds, **options)
