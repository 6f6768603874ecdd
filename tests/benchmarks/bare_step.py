"""The same training step in a bare torch loop: the same model, the same batches, AdamW, clipping; nothing else.

python tests/benchmarks/bare_step.py PRESET.yaml INPUTS [--channels-last] [--compile] [--bf16]

Its steps take turns with other processes: see `turns.py`.
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa
import torch

from genmodels.families import build_objective
from genmodels.precision import autocast
from pipelines.data.batch import to_batch
from pipelines.data.index import load_index
from pipelines.data.order import DataOrder
from pipelines.data.read import read_steps
from pipelines.training.config import load_config
from pipelines.training.inputs import sample_spec
from tests.benchmarks.turns import taking_turns

DISTINCT_BATCHES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("inputs", type=Path)
    for name in ("--channels-last", "--compile", "--bf16"):
        parser.add_argument(name, action="store_true")
    arguments = parser.parse_args()
    config = load_config(arguments.preset, [])
    torch.set_num_threads(1)
    torch.manual_seed(config.run.seed)
    device = torch.device("cpu")

    objective = build_objective(config.objective, arguments.inputs)
    denoiser = objective.networks["denoiser"].train()
    if arguments.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if arguments.compile:
        denoiser.compile()
    rate = config.optimizer.learning_rate
    optimizer = torch.optim.AdamW(denoiser.parameters(), rate, weight_decay=0.01, fused=True)

    data, spec = config.data, sample_spec(config, arguments.inputs)
    order = DataOrder(
        load_index(data.url, build=False), config.run.seed, data.lanes, data.global_batch_size, data.slots_per_lane
    )
    size, batches = data.global_batch_size, []
    rows = pa.concat_tables(islice(read_steps(order, spec, 0, 1, 0, DISTINCT_BATCHES), DISTINCT_BATCHES))
    for number in range(rows.num_rows // size):
        batch = dict(to_batch(rows.slice(number * size, size), spec))
        batch["images"] = batch["images"].float().div_(127.5).sub_(1.0)  # type: ignore[attr-defined]
        batches.append(batch)

    for step, batch in enumerate(taking_turns(islice(cycle(batches), config.run.steps))):
        optimizer.zero_grad()
        with autocast("bf16" if arguments.bf16 else "fp32", device):
            loss = objective.phases[0].loss({**batch, "step": step}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    main()
