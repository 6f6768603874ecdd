"""Draws pictures in several processes of one thread each: on a CPU, faster than one process with as many threads.

A picture depends on its prompt and seed alone, so the result does not depend on how the prompts are dealt out.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def draw_in_processes(
    folder: Path,
    prompts: list[str],
    seeds: list[int],
    processes: int,
    progress: Callable[[float, int], None] | None = None,
    precision: str = "fp32",
    **options: Any,
) -> np.ndarray:
    """Draw a picture for each prompt and seed from an export folder; uint8 (n, height, width, 3).

    Args:
        processes: at least 1. Each loads the model anew and uses one thread.
        progress: called with the number of pictures that are done, and their total.
        precision: "fp32" or "bf16", of the U-Net.
        options: passed on to `TextToImage.draw` (`num_steps`, `guidance_scale`, `sampler`, `batch_size`).

    What a process raises is raised here.
    """
    part = options.get("batch_size", 64)
    jobs = [(prompts[i : i + part], seeds[i : i + part], options) for i in range(0, len(prompts), part)]
    # Not forked: a fork of a process that has run torch's threads can hang at the next parallel region.
    context = multiprocessing.get_context("spawn")
    pictures = []
    with context.Pool(min(processes, len(jobs)), initializer=_load, initargs=(str(folder), precision)) as pool:
        for drawn in pool.imap(_draw, jobs):
            pictures.append(drawn)
            if progress:
                progress(sum(map(len, pictures)), len(prompts))
        pool.close()
        pool.join()  # leaving the block ends processes at once, and would leak their semaphores
    return np.concatenate(pictures)


_model: Any = None  # one for each process of the pool


def _load(folder: str, precision: str) -> None:
    global _model
    import torch

    from genmodels.diffusion.pipeline import TextToImage

    torch.set_num_threads(1)
    _model = TextToImage.from_folder(Path(folder), precision=precision)


def _draw(job: tuple[list[str], list[int], dict[str, Any]]) -> np.ndarray:
    prompts, seeds, options = job
    return _model.draw(prompts, seeds, **options)
