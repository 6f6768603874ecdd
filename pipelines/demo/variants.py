"""Denoisers, prediction types and regularisers compared: trained side by side on the same batches, judged alike.

make demo-ldm-variants                        the same, with the set-up before it
python pipelines/demo/variants.py --out out/demo-ldm-variants.json
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SOURCES = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCES))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from genmodels.diffusion.config import LatentDiffusionConfig
from genmodels.families import members_of
from infra.errors import main_exit
from infra.storage import run_root
from pipelines.demo.command import parse
from pipelines.demo.evaluation import kept_out_prompts
from pipelines.demo.run import Stages, check_overrides, prepare
from pipelines.training.config import TrainConfig, load_config

DRAWING: dict[str, Any] = {"num_steps": 10, "guidance_scale": 3.5, "sampler": "dpm_solver++"}
# Presets and their scripts; those of one dictionary are trained at once, on a core each.
ENCODERS = {"autoencoder_variants": "train_autoencoder.py", "clip_variants": "train_clip.py"}
DENOISERS = {"ldm_variants_kl": "train_ldm.py", "ldm_variants_vq": "train_ldm.py"}
LEAST = 0.6  # of the real digits' consistency: below it, a variant has not learnt
_SHOWN = 10  # pictures of each variant in the grid


def run_variants(out: Path, overrides: list[str], count: int) -> dict[str, Any]:
    """Train, draw, judge; returns the figures and writes them to `out`."""
    began = psutil.Process().create_time()  # of the command, so that imports count
    root, stages = run_root(), Stages()
    check_overrides(overrides)
    configs = {name: load_config(name, overrides) for name in (*ENCODERS, *DENOISERS)}
    size = configs["ldm_variants_kl"].objective.image_size
    stages.run(
        "shards",
        f"python pipelines/prepare_shards.py {root}/data/digits-{size} --demo digits --size {size}",
        lambda: prepare(root, list(configs.values()), at_once=len(DENOISERS)),
    )

    def train(stage: str, presets: dict[str, str]) -> dict[str, dict[str, Any]]:
        typed = " & ".join(f"python pipelines/{script} {name}" for name, script in presets.items())
        return stages.run(stage, typed, lambda: train_at_once({name: configs[name] for name in presets}))

    train("autoencoders, text encoder", ENCODERS)
    trained = train("latent diffusion", DENOISERS)
    folders = {
        (name, member): Path(trained[name]["export"]) / member
        for name in trained
        for member in members_of(configs[name].objective)
    }
    command = f"python pipelines/demo/judge_model.py {root}/RUN/export/STEP/MEMBER --count {count}"
    judged = stages.run("pictures and judgement", command, lambda: judge(folders, count))
    rows, pictures = [], {}
    for (name, member), folder in folders.items():
        figures, config = trained[name]["figures"], members_of(configs[name].objective)[member]
        found = judged[name, member]
        row = {
            "member": label(config),
            **axes(config),
            **{key: value for key, value in found.items() if key != "pictures"},
            "learnt": found["consistency_ratio"] >= LEAST,
            "validation_loss": figures[f"val_{member}/loss"],
            "steps": trained[name]["steps"],
            "seconds": figures[f"seconds_{member}-denoiser"],
            "export": str(folder),
        }
        rows.append(row)
        pictures[row["member"]] = found["pictures"]
    types = ("epsilon", "v_prediction", "sample", "flow")
    order = ["-".join(axes) for axes in product(("unet", "dit"), types, ("kl", "vq"))]
    rows.sort(key=lambda row: order.index(row["member"]))
    grid = out.parent / "demo-ldm-variants.png"
    draw_grid({name: pictures[name] for name in order}, kept_out_prompts(count)[1]).save(grid)
    summary = {
        "seconds": time.time() - began,
        "variants": rows,
        "lowest_consistency_ratio": min(row["consistency_ratio"] for row in rows),
        "count": count,
        "grid": str(grid),
        "mlflow_run_ids": {name: summary["mlflow_run_id"] for name, summary in trained.items()},
        "tracking_uri": next(iter(trained.values()))["tracking_uri"],
        "seconds_by_part": stages.seconds,
    }
    out.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def train_at_once(configs: dict[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """Train presets, each in a thread: their workers are processes anyway; the summaries by preset.

    Raises whatever one of them raises, once all have ended.
    """
    from pipelines.training.launch import train

    done: dict[str, dict[str, Any] | BaseException] = {}

    def run(name: str, config: TrainConfig) -> None:
        try:
            done[name] = train(config, lines=True)
        except BaseException as error:
            done[name] = error

    # Daemons: a keyboard interrupt ends this process without waiting for them.
    threads = [threading.Thread(target=run, args=each, name=each[0], daemon=True) for each in configs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in done.values():
        if isinstance(result, BaseException):
            raise result
    return {name: result for name, result in done.items() if not isinstance(result, BaseException)}


def axes(member: LatentDiffusionConfig) -> dict[str, str]:
    """What distinguishes a variant: its denoiser, prediction type, and the regulariser of its autoencoder."""
    regulariser = (member.autoencoder or "").rpartition("/")[2]
    return {"denoiser": member.denoiser.kind, "prediction_type": member.prediction_type, "regulariser": regulariser}


def label(member: LatentDiffusionConfig) -> str:
    """What a variant is called in the table and the grid: its `axes`."""
    return "-".join(axes(member).values())


def judge(folders: dict[Any, Path], count: int) -> dict[Any, dict[str, Any]]:
    """Figures of each model and the first pictures it drew; one process for each physical core."""
    jobs = [(name, str(folder), count) for name, folder in folders.items()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.demo.variants", "genmodels.diffusion.pipeline"])
    judged = {}
    columns = (TextColumn("drawing and judging"), BarColumn(), MofNCompleteColumn())
    with (
        context.Pool(psutil.cpu_count(logical=False) or 1) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        row = bar.add_task("models", total=len(jobs))
        for name, figures in pool.imap_unordered(_judge_one, jobs):
            judged[name] = figures
            bar.advance(row)
        pool.close()  # ending the processes at once would leak their semaphores
        pool.join()
    return judged


def _judge_one(job: tuple[Any, str, int]) -> tuple[Any, dict[str, Any]]:
    import torch

    from genmodels.diffusion.pipeline import TextToImage
    from pipelines.demo.evaluation import evaluate_digits

    name, folder, count = job
    torch.set_num_threads(1)
    model = TextToImage.from_folder(Path(folder), precision="auto")
    model.draw(["a red seven on a white background"], [0], **DRAWING)  # the first call is slower than all others
    found = evaluate_digits(lambda prompts, seeds: model.draw(prompts, seeds, **DRAWING), model.image_size, count)
    kept = ["consistency", "consistency_real", "consistency_ratio", "consistency_shuffled"]
    kept += ["coverage", "coverage_ratio", "seconds_per_100"]
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    shown = found.pictures[:_SHOWN]
    return name, {**{key: found.figures[key] for key in kept}, "parameters": parameters, "pictures": shown}


def draw_grid(pictures: dict[str, np.ndarray], captions: list[str]) -> Any:
    """A row for each model: the same sentences from the same seeds."""
    from pipelines.pictures import grid_png

    titles = []
    for number, name in enumerate(pictures):
        last = number == len(pictures) - 1
        titles += (
            [f"{name}: {text}" if i == 0 else text for i, text in enumerate(captions[:_SHOWN])]
            if last
            else [name if i == 0 else "" for i in range(_SHOWN)]
        )
    return grid_png(np.concatenate(list(pictures.values())), titles, columns=_SHOWN)


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, 110)  # narrower, and figures would be cut
    rows = summary["variants"]
    table = Table(title=f"Latent diffusion of 16×16 digits, {rows[0]['steps']} steps", padding=(0, 1, 0, 0))
    for column in ("denoiser", "predicts", "latents"):
        table.add_column(column)
    for column in ("parameters", "consistency", "of real", "coverage", "of real", "validation loss", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["denoiser"], row["prediction_type"], row["regulariser"], f"{row['parameters']:,}",
            f"{row['consistency']:.3f}", f"{row['consistency_ratio']:.3f}" + ("" if row["learnt"] else " !"),
            f"{row['coverage']:.3f}", f"{row['coverage_ratio']:.3f}", f"{row['validation_loss']:.4f}",
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    if not all(row["learnt"] for row in rows):
        console.print(f"! below {LEAST} of the real digits' consistency: it has not learnt", highlight=False)


def main() -> None:
    arguments = parse(__doc__, "demo-ldm-variants", 200, "for all trainings")
    summary = run_variants(arguments.out, arguments.overrides, arguments.count)
    show(summary)
    print(f"\n── done in {summary['seconds']:.0f} s\n   pictures   {summary['grid']}\n   figures    {arguments.out}")


if __name__ == "__main__":
    main_exit(main)
