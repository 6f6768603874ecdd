"""What is measured while training: means over micro-batches, steps and ranks, and how well the device is used."""

from __future__ import annotations

import math
import re
import time
from itertools import pairwise

import torch
import torch.distributed as dist

from genmodels.objective import Mean

# Peak dense bf16 FLOP/s (the V100's: fp16) by a word of the device's name; from the vendors' data sheets.
PEAK_FLOPS = {
    "V100": 125e12, "A10G": 70e12, "A100": 312e12, "L4": 121e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12,
    "B200": 2250e12, "RTX 4090": 165e12,
}  # fmt: skip


class MeanLog:
    """Adds up `Mean`s until they are read; reading sums over ranks in one all-reduce."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: dict[str, Mean], prefix: str = "") -> None:
        for name, mean in metrics.items():
            pair = torch.stack([mean.total.detach().double(), mean.count.detach().double()])
            key = prefix + name
            self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def read(self) -> dict[str, float]:
        """Means over everything since the last reading, the same on all ranks; what counted nothing is left out."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count > 0}


def durations(marks: dict[str, float]) -> dict[str, float]:
    """Seconds that led to each mark but the first, by its name, from times since the epoch in their order.

    >>> durations({"begin": 10.0, "ray": 12.5, "workers": 13.0})
    {'ray': 2.5, 'workers': 0.5}
    """
    names = list(marks)
    return {name: round(marks[name] - marks[before], 3) for before, name in pairwise(names)}


class Throughput:
    """Wall time from the first batch on, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.waited = 0.0
        self.samples = 0
        self.marks: dict[str, float] = {}  # times since the epoch: of the first batch, and of the end of the first step
        self._window = (time.perf_counter(), 0, 0.0)

    def first_batch(self) -> None:
        """The clock starts when the first batch is there: what came before is start-up."""
        self.started = time.perf_counter()
        self.marks["first batch"] = time.time()
        self._window = (self.started, 0, 0.0)

    def step(self, samples: int, waited: float) -> None:
        self.marks.setdefault("first step", time.time())
        self.samples += samples
        self.waited += waited

    def window(self) -> tuple[float, float]:
        """(samples a second, share of time waiting for data) since the last call."""
        now = time.perf_counter()
        then, samples, waited = self._window
        self._window = (now, self.samples, self.waited)
        elapsed = max(now - then, 1e-9)
        return (self.samples - samples) / elapsed, (self.waited - waited) / elapsed

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started if self.started is not None else 0.0

    @property
    def wait_share(self) -> float:
        return self.waited / self.seconds if self.started is not None and self.seconds > 0 else 0.0


def device_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an L40S is no L4.
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def flop_utilisation(samples_per_second: float, forward_flops: float | None, peak: float | None) -> float | None:
    """Model FLOP utilisation of one device (Chowdhery et al. 2022, PaLM, app. B): a step costs three forward passes."""
    if forward_flops is None or peak is None:
        return None
    return 3.0 * forward_flops * samples_per_second / peak


def memory_mib(device: torch.device) -> float:
    """Peak memory of this process: of the device where it is a GPU, else resident in the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Only what a tracking server takes."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
