"""All stages of unCLIP on the demo's digits: trained, joined, and judged, each part against what it has to beat.

make demo-unclip                                      the same, with the set-up before it
python pipelines/demo/unclip.py --out out/demo-unclip.json
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

SOURCES = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCES))

from rich.console import Console
from rich.table import Table

from infra.errors import BadRequest, main_exit
from infra.storage import run_root
from pipelines.demo.command import parse
from pipelines.demo.run import Stages, forget_models, prepare
from pipelines.training.config import TrainConfig
from pipelines.unclip.config import load_stages

_SCRIPTS = {"clip": "train_clip.py", "decoder": "train_decoder.py"}
_OWN = ("data.", "run.name", "run.root", "tracking.")  # what overrides may not lead away


def run_unclip(out: Path, overrides: list[str], count: int) -> dict[str, Any]:
    """Train, join, draw, judge; returns the figures and writes them to `out`."""
    began = psutil.Process().create_time()  # of the command, so that imports count
    root, announced = run_root(), Stages()
    for text in overrides:
        stage, _, rest = text.partition(".")
        if text.startswith(("name=", "root=", "tracking_uri=")) or (stage and rest.startswith(_OWN)):
            raise BadRequest(f"the demo removes and draws its own data and models: leave out {text}")
    stages = load_stages("unclip_demo", overrides)
    trainings = list(stages.trainings.values())

    def prepare_all() -> None:
        shutil.rmtree(root / "data" / "digits-64-clip", ignore_errors=True)
        forget_models(root, [stages.config.name])
        prepare(root, trainings)

    announced.run(
        "shards", f"python pipelines/prepare_shards.py {root}/data/digits-64 --demo digits --size 64", prepare_all
    )
    from pipelines.unclip.run import train_one, train_stages

    def train_stage(name: str, config: TrainConfig, parent_run: str) -> dict[str, Any]:
        script = _SCRIPTS.get(name, "train_prior.py" if name in stages.config.priors else "train_upsampler.py")
        preset = stages.config.stages[name]
        return announced.run(
            name.replace("_", " "), f"python pipelines/{script} {preset}", lambda: train_one(name, config, parent_run)
        )

    trained = train_stages(stages, train_stage)
    folder = Path(trained["export"])
    pictures = out.parent / "demo-unclip"
    pictures.mkdir(parents=True, exist_ok=True)
    from pipelines.demo.unclip_judgement import judge_unclip

    figures = announced.run(
        "pictures and judgement",
        f'python pipelines/generate.py --model {trained["model_uri"]} "a red seven on a white background"',
        lambda: judge_unclip(folder, count, pictures),
    )
    summary = {
        "seconds": time.time() - began,
        **figures,
        "model_uri": trained["model_uri"],
        "mlflow_run_id": trained["mlflow_run_id"],
        "tracking_uri": trained["tracking_uri"],
        "seconds_by_part": announced.seconds,
        "training": {name: done["figures"] for name, done in trained["stages"].items()},
    }
    out.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(soft_wrap=True)
    table = Table(title=f"{summary['count']} pictures of kept-out combinations, 64×64, none rejected")
    for column in ("the decoder is told", "guidance", "digit", "ink", "paper", "all right", "of real"):
        table.add_column(column, justify="left" if column.startswith("the") else "right")
    for arm in summary["arms"]:
        shares = (f"{arm[part]:.3f}" for part in ("digit", "ink", "paper", "all"))
        scale = "" if arm["guidance_scale"] is None else f"{arm['guidance_scale']:g}"
        table.add_row(arm["told"], scale, *shares, f"{arm['ratio']:.3f}")
    console.print(table)
    low, high = summary["prior_gain_interval"]
    for line in (
        f"prior instead of text embedding: {summary['prior_gain']:+.3f} (95 % interval {low:+.3f} to {high:+.3f})",
        f"CLIP recall@1 of real pictures, among {summary['captions']} captions: {summary['clip_recall_at_1']:.3f} "
        f"({summary['clip_pictures']} pictures); of drawn ones {summary['clip_recall_at_1_drawn']:.3f}",
        f"upsampler: PSNR {summary['upsampler_psnr']:.2f} dB, bicubic {summary['bicubic_psnr']:.2f}, told another "
        f"image {summary['upsampler_psnr_shuffled']:.2f}; Fréchet distance "
        f"{summary['upsampler_frechet_distance']:.2f}, bicubic {summary['bicubic_frechet_distance']:.2f}",
        f"variations keep all: {summary['variation_consistency']:.3f} ({summary['variation_consistency_ratio']:.3f} of "
        f"real); interpolation begins as the one and ends as the other: {summary['interpolation_ends']:.3f}",
    ):
        console.print(line, highlight=False)


def main() -> None:
    arguments = parse(__doc__, "demo-unclip", 500, "of a stage's training", "STAGE.dotted.key=value")
    summary = run_unclip(arguments.out, arguments.overrides, arguments.count)
    show(summary)
    print(
        f"\n── done in {summary['seconds']:.0f} s\n   pictures   {summary['grid']}\n"
        f"   variations {summary['variations']}\n   between    {summary['interpolation']}\n"
        f"   model      {summary['model_uri']}\n   figures    {arguments.out}\n"
        f'   draw more  python pipelines/generate.py --model {summary["model_uri"]} "a blue 3 on yellow paper"'
    )


if __name__ == "__main__":
    main_exit(main)
