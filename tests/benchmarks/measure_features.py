"""100,000 features of width 2,048 to a Fréchet distance: ours, through a Ray Data actor, or torchmetrics' plain loop.

python tests/benchmarks/measure_features.py ours|torchmetrics OUT.json [--count 100000]

Both extract with the same network, a random projection of small pictures of noise, one thread each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from genmodels.features.extractor import FeatureExtractor, Features
from pipelines.evaluation.sources import Block

WIDTH, SIDE, BLOCK = 2048, 8, 500
REAL = 10_000  # pictures to compare with


class Projection(FeatureExtractor):
    """Noise to features that are neither independent nor normal."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, WIDTH), nn.ReLU())
        super().__init__("projection", network, SIDE, WIDTH, torch.device("cpu"))

    def _features(self, images: Tensor) -> Features:
        return Features(self.network(images / 127.5 - 1).numpy())


@dataclass(frozen=True)
class Noise:
    """Pictures of noise, the same at each call."""

    count: int
    seed: int
    block: int = BLOCK

    def open(self, device: Any) -> Any:
        def draw(start: int, stop: int) -> Block:
            rng = np.random.default_rng([self.seed, start])
            pictures = rng.integers(0, 256, (stop - start, SIDE, SIDE, 3), dtype=np.uint8)
            return Block(pictures, [""] * (stop - start), [""] * (stop - start))

        return draw


class Peak(threading.Thread):
    """Largest memory of this process and of the actors that measure, in MiB: pages of files that are only mapped and
    could be dropped at any time are not counted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0

    def run(self) -> None:
        while True:
            processes = [psutil.Process(), *(p for p in psutil.process_iter() if "_Measurer" in _title(p))]
            self.mib = max(self.mib, sum(map(_own_mib, processes)))
            time.sleep(0.2)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _own_mib(process: psutil.Process) -> float:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def ours(count: int) -> dict[str, float]:
    """Streamed to memory-mapped features; the distance, as torchmetrics gives it; and once more with its interval."""
    from genmodels.metrics.frechet import FeatureSums, frechet_interval
    from pipelines.evaluation.measure import Extractors, measure
    from pipelines.training import cluster

    cluster.join(2)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        sources = {"generated": Noise(count, 0), "real": Noise(REAL, 1)}
        folders = {name: Path(temporary) / name for name in sources}
        stores = measure(sources, folders, {name: {} for name in sources}, Extractors(Projection()), actors=1)
        measured = time.perf_counter()
        gaussians = [FeatureSums.of(stores[name].features).gaussian() for name in sources]
        value = gaussians[0].distance(gaussians[1])
        computed = time.perf_counter()
        found = frechet_interval(stores["generated"].features, FeatureSums.of(stores["real"].features).gaussian())
    seconds = {"features": measured - began, "distance": computed - measured}
    seconds["distance_with_interval"] = time.perf_counter() - computed
    values = {"value": value, "low": found.low, "high": found.high}
    return {**seconds, **values, "seconds": computed - began}


def torchmetrics_loop(count: int) -> dict[str, float]:
    """As torchmetrics' documentation has it: update with each batch, then compute."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = Projection()

    class Network(nn.Module):
        num_features = WIDTH

        def forward(self, pictures: Tensor) -> Tensor:
            return torch.from_numpy(extractor(pictures.permute(0, 2, 3, 1).contiguous().numpy()).features)

    began = time.perf_counter()
    metric = FrechetInceptionDistance(Network(), normalize=False)
    for source, real in ((Noise(count, 0), False), (Noise(REAL, 1), True)):
        draw = source.open("cpu")
        for start in range(0, source.count, BLOCK):
            pictures = draw(start, min(start + BLOCK, source.count)).pictures
            metric.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real=real)
    value = float(metric.compute())
    return {"seconds": time.perf_counter() - began, "value": value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=["ours", "torchmetrics"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peak = Peak()
    peak.start()
    found = (ours if arguments.who == "ours" else torchmetrics_loop)(arguments.count)
    arguments.out.write_text(json.dumps({**found, "peak_mib": peak.mib}))


if __name__ == "__main__":
    main()
