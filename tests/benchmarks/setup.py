"""What all benchmarks share: a small latent diffusion model, data for it, and processes that are timed in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SOURCES = Path(__file__).resolve().parents[2]
LOG_EVERY = 5


@dataclass(frozen=True)
class Workbench:
    """A folder for everything that a benchmark writes."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: one OpenMP thread, runs in this folder."""
        return {**os.environ, "RUN_ROOT": str(self.folder / "runs"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES)}

    def call(self, *command: str) -> None:
        """Run a command of this project; what it says is shown only where it fails."""
        done = subprocess.run(
            [sys.executable, *command], cwd=SOURCES, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")

    def prepare(self) -> None:
        """Draw the shards, and write an autoencoder without training it: its speed is that of a trained one."""
        from genmodels.autoencoder.config import AutoencoderConfig
        from genmodels.families import build_objective

        self.call("pipelines/prepare_shards.py", str(self.folder / "digits"), "--demo", "digits", "--repeats", "2")
        shape = {"image_size": 32, "channels": [16, 32, 32], "layers_per_block": 1, "norm_groups": 8}
        build_objective(AutoencoderConfig.model_validate(shape)).export(self.folder / "autoencoder")

    def preset(self, name: str, batch: int, steps: int, full: bool) -> Path:
        """A training called `name`, one rank under ZeRO-1 with one thread; `full` averages and logs as trainings do."""
        unet = {"channels": [64, 128], "attention": [True, True], "layers_per_block": 1, "head_dim": 32}
        text = {"width": 96, "layers": 1, "heads": 4, "length": 32, "vocab_size": 600}
        tree = {
            "run": {
                "name": name, "steps": steps, "log_every": LOG_EVERY, "checkpoint_every": steps,
                "preview_samples": 0, "finish_samples": 1,
            },
            "data": {"url": str(self.folder / "digits" / "train"), "global_batch_size": batch, "lanes": 2},
            "objective": {
                "kind": "latent_diffusion", "image_size": 32, "autoencoder": str(self.folder / "autoencoder"),
                "denoiser": {"kind": "unet", **unet}, "text_encoder": {"kind": "trained", **text},
            },
            "engine": {"zero_stage": 1},
            "workers": {"count": 1, "threads": 1},
            "ema": {"decay": 0.99 if full else 0.0},
            "tracking": {"system_metrics": full},
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Ratio:
    """Medians of rounds that were run in turn, and of the ratios within each round."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def facts(self) -> dict[str, Any]:
        """For the JSON: seconds, and the ratio with its spread."""
        return {
            "seconds": statistics.median(self.ours),
            "compared_with_seconds": statistics.median(self.theirs),
            "ratio": self.median,
            "ratios": self.ratios,
        }
