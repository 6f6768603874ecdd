"""`pipelines/train_ldm.py` whose training steps take turns with other processes: see `turns.py`.

python tests/benchmarks/train_in_turns.py PRESET.yaml [dotted.key=value …]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipelines.training import worker


def train_worker(job: dict[str, Any]) -> None:
    """In the Ray Train worker: the real one, but batches come when it is this process's turn."""
    from pipelines.training.trainer import Trainer
    from tests.benchmarks.turns import taking_turns

    fit = Trainer.fit

    def fit_in_turns(trainer: Trainer, batches: Iterator[Any], *rest: Any) -> None:
        fit(trainer, taking_turns(batches), *rest)

    Trainer.fit = fit_in_turns  # type: ignore[method-assign]
    worker.train_worker(job)


if __name__ == "__main__":
    from pipelines.training import command
    from tests.benchmarks import train_in_turns  # by its name, which the worker imports

    worker.train_worker = train_in_turns.train_worker
    command.run(__doc__ or "", "ldm_demo", "latent_diffusion")
