"""A GAN on the demo's digits, from sentences: trained, judged, and set beside the demo's latent diffusion.

make demo-gan                                 the same, with the set-up before it
python pipelines/demo/gan.py --out out/demo-gan.json
"""

from __future__ import annotations

import json
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
from pipelines.demo.run import EVALUATION, Stages, check_overrides, prepare
from pipelines.training.config import load_config

_DRAWING = ["--precision", "fp32", "--processes", "2"]
_ROWS = ("consistency", "consistency_ratio", "coverage", "coverage_ratio", "seconds_per_100")


def run_gan(out: Path, overrides: list[str], count: int) -> dict[str, Any]:
    """Train, draw, judge; returns the figures and writes them to `out`. Latent diffusion is not in its `seconds`."""
    root, stages = run_root(), Stages()
    check_overrides(overrides)
    encoders, gan = load_config("gan_clip_demo", []), load_config("gan_demo", overrides)
    beside = time.perf_counter()
    diffusion = latent_diffusion(root, stages, count)
    beside = time.perf_counter() - beside
    began = psutil.Process().create_time()  # of the command, so that imports count
    stages.run(
        "shards",
        f"python pipelines/prepare_shards.py {root}/data/digits-32 --demo digits --size 32",
        lambda: prepare(root, [encoders, gan]),
    )
    from pipelines.training.launch import train

    stages.run("text encoder", "python pipelines/train_clip.py gan_clip_demo", lambda: train(encoders))
    trained = stages.run("GAN", "python pipelines/train_gan.py", lambda: train(gan))
    folder = out.parent / "demo-gan"
    folder.mkdir(parents=True, exist_ok=True)
    command = [trained["model_uri"], "--count", str(count), *_DRAWING]
    figures = stages.run(
        "pictures and judgement",
        f"python pipelines/demo/judge_model.py {' '.join(command)}",
        lambda: judge([*command, "--grid", f"{folder}/grid.png"]),
    )
    between = stages.run("latent space", "(between latents, and nearer to their middle)", lambda: show_latents(
        Path(trained["export"]), folder
    ))  # fmt: skip
    summary = {
        "seconds": time.time() - began - beside,
        **{name: figures[name] for name in (*_ROWS, "consistency_real", "coverage_real", "count")},
        **{f"ldm_{name}": diffusion[name] for name in _ROWS},
        "ldm_model_uri": diffusion["model"],
        "grid": figures["grid"],
        **between,
        "model_uri": trained["model_uri"],
        "mlflow_run_id": trained["mlflow_run_id"],
        "tracking_uri": trained["tracking_uri"],
        "seconds_by_part": stages.seconds,
        "training": trained["figures"],
    }
    out.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def latent_diffusion(root: Path, stages: Stages, count: int) -> dict[str, Any]:
    """The judge's figures of the registered demo model; it is trained where there is none."""
    from infra.registry import find_version

    try:
        version = find_version("models:/ldm-demo", f"sqlite:///{root / 'mlflow.db'}")
        uri = f"models:/ldm-demo/{version.version}"
    except BadRequest:
        parts = [load_config(name, []) for name in ("autoencoder_demo", "clip_demo", "ldm_demo")]
        prepare(root, parts)
        from pipelines.training.launch import train

        uri = stages.run(
            "latent diffusion, to compare with", "python pipelines/train_ldm.py", lambda: train(parts[-1])
        )["model_uri"]
    command = [uri, "--count", str(count), *EVALUATION]
    return dict(
        stages.run(
            "latent diffusion's pictures",
            f"python pipelines/demo/judge_model.py {' '.join(command)}",
            lambda: judge(command),
        )
    )


def judge(command: list[str]) -> dict[str, Any]:
    """`judge_model.py` with these arguments."""
    from pipelines.demo.judgement import argument_parser, judge_model

    return judge_model(argument_parser().parse_args(command))


def show_latents(export: Path, folder: Path) -> dict[str, str]:
    """Grids: rows between latents of one sentence, and of the same latents at several truncations."""
    import numpy as np

    from genmodels.gan.pipeline import GanModel
    from pipelines.pictures import grid_png

    model, steps = GanModel.from_folder(export), 8
    texts = ["a red seven on a white background", "blue 3 on yellow paper", "a green four on black paper"]
    rows = [model.interpolate(text, [1, 2], steps)[0] for text in texts]
    titles = [title for text in texts for title in (text, *[""] * (steps - 1))]
    grid_png(np.concatenate(rows), titles, columns=steps).save(folder / "interpolation.png")
    shares = (0.0, 0.5, 0.75, 1.0, 1.5)
    text, seeds = texts[0], list(range(steps))
    rows = [model.draw([text] * steps, seeds, truncation=share) for share in shares]
    titles = [title for share in shares for title in (f"truncation {share:g}", *[""] * (steps - 1))]
    grid_png(np.concatenate(rows), titles, columns=steps).save(folder / "truncation.png")
    return {"interpolation": str(folder / "interpolation.png"), "truncation": str(folder / "truncation.png")}


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{summary['count']} pictures of kept-out combinations, 32×32, none rejected")
    for column in ("", "all right", "of real", "coverage", "of real", "seconds for 100"):
        table.add_column(column, justify="right" if column else "left")
    for title, prefix in (("GAN, one pass", ""), ("latent diffusion, 10 steps", "ldm_")):
        table.add_row(title, *(f"{summary[prefix + name]:.3f}" for name in _ROWS))
    Console(soft_wrap=True).print(table)


def main() -> None:
    arguments = parse(__doc__, "demo-gan", 1000, "of the GAN's training")
    summary = run_gan(arguments.out, arguments.overrides, arguments.count)
    show(summary)
    print(
        f"\n── done in {summary['seconds']:.0f} s\n   pictures   {summary['grid']}\n"
        f"   between    {summary['interpolation']}\n   truncation {summary['truncation']}\n"
        f"   model      {summary['model_uri']}\n   figures    {arguments.out}\n"
        f'   draw more  python pipelines/generate.py --model {summary["model_uri"]} "a blue 3 on yellow paper"'
    )


if __name__ == "__main__":
    main_exit(main)
