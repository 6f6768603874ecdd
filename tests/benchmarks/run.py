"""What the machinery costs, measured side by side: a training step, drawing, measuring, the way to the first step.

    make bench
    python tests/benchmarks/run.py --out out/bench.json

Every comparison runs in processes of its own, with one thread each, that take turns of a few steps; given are medians,
and the ratio within each turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from tests.benchmarks.setup import SOURCES, Ratio, Workbench, read_json
from tests.benchmarks.turns import Conductor

LONG, SHORT = 96, 22  # batches whose bare step takes about 1 s and 0.25 s on one core of 2024
LONG_WINDOW, SHORT_WINDOW = 3, 10  # steps of a turn
GOALS = {
    "step_overhead": 1.03,
    "step_overhead_short": 1.10,
    "step_overhead_full": 1.05,
    "generate_ratio": 1.02,
    "evaluate_ratio": 1.10,
}
PEAK_GOAL = 2048  # MiB


def steps(bench: Workbench, rounds: int, show: Any) -> dict[str, Any]:
    """A step through Ray Train and DeepSpeed against a bare one."""
    starts: list[dict[str, float]] = []
    long = _turns(bench, "1 s", LONG, LONG_WINDOW, rounds, ["plain", "full", "bare"], starts, show)
    short = _turns(bench, "0.25 s", SHORT, SHORT_WINDOW, rounds, ["plain", "bare"], starts, show)
    options = {
        "bfloat16": ["--bf16"],
        "channels-last": ["--channels-last"],
        "bfloat16, channels-last": ["--bf16", "--channels-last"],
        "torch.compile": ["--compile"],
    }
    helped = _turns(
        bench, "what may help a bare one", LONG, LONG_WINDOW, max(1, rounds // 3), ["bare"], starts, show, options
    )
    return {
        "step_overhead": Ratio(long["plain"], long["bare"]),
        "step_overhead_full": Ratio(long["full"], long["bare"]),
        "step_overhead_short": Ratio(short["plain"], short["bare"]),
        "variants": {name: Ratio(helped[name], helped["bare"]).median for name in options},
        "start": {part: statistics.median(each[part] for each in starts) for part in starts[0]},
        "export": read_json(bench.folder / f"plain-{LONG}.json")["export"],
    }


def _turns(
    bench: Workbench,
    what: str,
    batch: int,
    window: int,
    rounds: int,
    who: list[str],
    starts: list[dict[str, float]],
    show: Any,
    options: Mapping[str, list[str]] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Seconds of a step of each, who take turns; adds to `starts` where the trainings' time to the first step went."""
    conductor = Conductor(bench.folder, window)
    begun, summaries = {}, {}
    for name in who:
        show(f"a step of {what}: {name} starts")
        preset = bench.preset(f"{name}-{batch}", batch, (rounds + 2) * window, full=name == "full")
        inputs = bench.folder / "runs" / f"plain-{LONG}" / "inputs"
        if name == "bare":
            command = ["tests/benchmarks/bare_step.py", str(preset), str(inputs)]
        else:
            summaries[name], begun[name] = bench.folder / f"{name}-{batch}.json", time.time()
            command = ["tests/benchmarks/train_in_turns.py", str(preset), "--summary", str(summaries[name])]
        conductor.start(name, command, bench.environment, SOURCES)
    for name, flags in options.items():
        conductor.start(name, [*command, *flags], bench.environment, SOURCES)
    seconds = conductor.measure(rounds, lambda turn: show(f"a step of {what}: turn {turn + 1} of {rounds}"))
    conductor.finish()
    for name, file in summaries.items():
        facts = read_json(file)
        starts.append({"imports": round(facts["started"] - begun[name], 3), **facts["start_seconds"]})
    return seconds


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


def evaluation(bench: Workbench, rounds: int, show: Any) -> tuple[Ratio, float, dict[str, float]]:
    """100,000 features to a Fréchet distance, against torchmetrics' loop; the largest memory; and where time went."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "torchmetrics": []}
    for turn in range(rounds):
        show(f"measuring features, turn {turn + 1} of {rounds}")
        for who, results in found.items():
            out = bench.folder / "features.json"
            bench.call("tests/benchmarks/measure_features.py", who, str(out))
            results.append(read_json(out))
    values = [each["value"] for results in found.values() for each in results]
    if max(values) - min(values) > 1e-3 * max(values):
        raise SystemExit(f"the Fréchet distances differ: {values}")
    ratio = Ratio(*([each["seconds"] for each in results] for results in found.values()))
    parts = ("features", "distance", "distance_with_interval")
    seconds = {part: statistics.median(each[part] for each in found["ours"]) for part in parts}
    return ratio, max(each["peak_mib"] for each in found["ours"]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"), help="figures as JSON [out/bench.json]")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each comparison [10]")
    arguments = parser.parse_args()
    out, begun, console = arguments.out.absolute(), time.time(), Console(soft_wrap=True)

    def show(what: str) -> None:
        console.print(f"{time.time() - begun:5.0f} s  {what}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        bench = Workbench(Path(temporary))
        show("shards and an autoencoder")
        bench.prepare()
        found = steps(bench, arguments.rounds, show)
        found["generate_ratio"], pixels = drawing(bench, found["export"], max(1, arguments.rounds // 5), show)
        found["evaluate_ratio"], peak, measuring = evaluation(bench, max(1, arguments.rounds // 5), show)

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
    console.print(
        f"100,000 features of width 2,048: {peak:.0f} MiB at most (goal ≤ {PEAK_GOAL}); seconds: ",
        measuring,
        highlight=False,
    )
    figures = {
        **{name: found[name].median for name in GOALS},
        "evaluate_peak_mib": peak,
        "evaluate_seconds": measuring,
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
