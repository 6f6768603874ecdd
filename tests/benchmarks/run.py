"""What the machinery costs, measured side by side: a training step, drawing, and the way to the first step.

    make bench
    python tests/benchmarks/run.py --out out/bench.json

Every comparison runs in processes of its own that take turns, with one thread each; given are medians, and the ratio
within each turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from tests.benchmarks.setup import Ratio, Workbench, read_json

LONG, SHORT = 96, 22  # batches whose bare step takes about 1 s and 0.25 s on one core of 2024
LONG_STEPS, SHORT_STEPS = 20, 60
GOALS = {"step_overhead": 1.03, "step_overhead_short": 1.10, "step_overhead_full": 1.05, "generate_ratio": 1.02}


def training(bench: Workbench, preset: Path, name: str) -> tuple[float, dict[str, Any]]:
    """Seconds of a step of a real run, the median of its windows after the first; and its summary."""
    from infra.tracking import metric_history

    summary, begun = bench.folder / f"{name}.json", time.time()
    bench.call("pipelines/train_ldm.py", str(preset), f"run.name={name}", "--summary", str(summary))
    facts = read_json(summary)
    rows = metric_history(facts["tracking_uri"], facts["mlflow_run_id"], ["samples_per_second"])
    batch = read_json(Path(facts["run_folder"]) / "config.json")["data"]["global_batch_size"]
    windows = [batch / row["samples_per_second"] for row in rows[1:]]
    facts["start_seconds"] = {"imports": round(facts["started"] - begun, 3), **facts["start_seconds"]}
    return statistics.median(windows), facts


def bare(bench: Workbench, preset: Path, inputs: Path, *options: str) -> float:
    out = bench.folder / "bare.json"
    bench.call("tests/benchmarks/bare_step.py", str(preset), str(inputs), str(out), *options)
    return statistics.median(read_json(out))


def steps(bench: Workbench, rounds: int, show: Any) -> dict[str, Any]:
    """A step through Ray Train and DeepSpeed against a bare one."""
    plain, full = (bench.preset(LONG, LONG_STEPS, full) for full in (False, True))
    short = bench.preset(SHORT, SHORT_STEPS, False)
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", "plain", "full", "bare short", "plain short")}
    starts, facts = [], {}
    for turn in range(rounds):
        show(f"training steps, turn {turn + 1} of {rounds}")
        for name, preset in (("plain", plain), ("full", full), ("plain short", short)):
            took, facts = training(bench, preset, f"{name.replace(' ', '-')}-{turn}")
            seconds[name].append(took)
            starts.append(facts["start_seconds"])
        inputs = Path(facts["run_folder"]) / "inputs"
        seconds["bare"].append(bare(bench, plain, inputs))
        seconds["bare short"].append(bare(bench, short, inputs))
    show("what else may help a step")
    variants = {
        name: bare(bench, plain, inputs, *options)
        for name, options in (
            ("bfloat16", ["--bf16"]),
            ("channels-last", ["--channels-last"]),
            ("bfloat16, channels-last", ["--bf16", "--channels-last"]),
            ("torch.compile", ["--compile"]),
        )
    }
    start = {part: statistics.median(each[part] for each in starts) for part in starts[0]}
    return {
        "step_overhead": Ratio(seconds["plain"], seconds["bare"]),
        "step_overhead_full": Ratio(seconds["full"], seconds["bare"]),
        "step_overhead_short": Ratio(seconds["plain short"], seconds["bare short"]),
        "variants": {name: took / statistics.median(seconds["bare"]) for name, took in variants.items()},
        "start": start,
        "export": facts["export"],
    }


def drawing(bench: Workbench, folder: str, rounds: int, show: Any) -> tuple[Ratio, int]:
    """Our sampler against diffusers' pipeline on the same folder; and the largest difference of a pixel."""
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for turn in range(rounds):
        show(f"drawing, turn {turn + 1} of {rounds}")
        for who, took in seconds.items():
            out, pixels = bench.folder / "draw.json", bench.folder / f"{who}.npy"
            bench.call("tests/benchmarks/draw.py", who, folder, str(out), str(pixels))
            took.append(statistics.median(read_json(out)))
    ours, theirs = (np.load(bench.folder / f"{who}.npy").astype(int) for who in seconds)
    return Ratio(seconds["ours"], seconds["diffusers"]), int(np.abs(ours - theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"), help="figures as JSON [out/bench.json]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each comparison [3]")
    arguments = parser.parse_args()
    out, begun, console = arguments.out.absolute(), time.time(), Console(soft_wrap=True)

    def show(what: str) -> None:
        console.print(f"{time.time() - begun:5.0f} s  {what}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        bench = Workbench(Path(temporary))
        show("shards and an autoencoder")
        bench.prepare()
        found = steps(bench, arguments.rounds, show)
        found["generate_ratio"], pixels = drawing(bench, found["export"], arguments.rounds, show)

    table = Table(title="Machinery against the bare thing, one thread, medians of turns")
    for column in ("", "ours, s", "bare, s", "ratio", "from … to", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for name, goal in GOALS.items():
        ratio: Ratio = found[name]
        facts = ratio.facts()
        spread = f"{min(ratio.ratios):.3f} … {max(ratio.ratios):.3f}"
        table.add_row(
            name, f"{facts['seconds']:.3f}", f"{facts['compared_with_seconds']:.3f}", f"{ratio.median:.3f}", spread,
            f"≤ {goal}",
        )  # fmt: skip
    console.print(table)
    start = found["start"]
    console.print(f"seconds to the first step: {sum(start.values()):.1f}: ", start, highlight=False)
    console.print(
        "a bare step, over float32's: ", {k: round(v, 3) for k, v in found["variants"].items()}, highlight=False
    )
    console.print(f"largest difference of a pixel from diffusers' pipeline: {pixels} of 255", highlight=False)
    figures = {
        **{name: found[name].median for name in GOALS},
        "seconds_to_first_step": sum(start.values()),
        "start_seconds": start,
        "pixel_difference": pixels,
        "bare_step_over_float32": found["variants"],
        "comparisons": {name: found[name].facts() for name in GOALS},
        "rounds": arguments.rounds,
        "seconds": time.time() - begun,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"done in {figures['seconds']:.0f} s: {out}", highlight=False)


if __name__ == "__main__":
    main()
