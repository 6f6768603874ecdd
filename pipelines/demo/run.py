"""The whole demo: shards, autoencoder, text encoder, latent diffusion, pictures, judgement, report.

    make demo                                     the same, with the set-up before it
    python pipelines/demo/run.py --out out/demo.json

Each stage is a command of its own; this runs them one after the other in one process, and prints what to type for each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

SOURCES = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCES))

from infra.errors import BadRequest, RunFailed, main_exit
from infra.storage import run_root
from pipelines.demo.command import parse
from pipelines.training.config import TrainConfig, load_config

EVALUATION = ["--num-steps", "10", "--guidance-scale", "2.0", "--sampler", "dpm_solver++"]
EVALUATION += ["--precision", "auto", "--processes", "2"]


class Stages:
    """Announces the stages of the demo and times them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, command: str, work: Any) -> Any:
        print(f"\n── {name}\n   {command}", flush=True)
        began = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - began, 1)
        return result


def prepare(root: Path, trainings: list[TrainConfig], at_once: int = 1, demo: str = "digits") -> None:
    """Draw the shards in a process of its own, and meanwhile forget earlier demos, import what is needed, start Ray.

    Ray gets room for as many of the trainings at once. `demo` is what is drawn, of the first training's size.
    """
    size = str(trainings[0].data.demo_size or trainings[0].objective.image_size)
    command = [sys.executable, str(SOURCES / "pipelines" / "prepare_shards.py"), str(root / "data" / f"{demo}-{size}")]
    with subprocess.Popen([*command, "--demo", demo, "--size", size, "--overwrite"]) as drawing:
        from genmodels.families import members_of, objective_class
        from pipelines.training import cluster, launch  # noqa: F401

        forget_models(root, [config.run.name for config in trainings])
        largest = max(trainings, key=cluster.local_cpus)
        room = {"local_cpus": at_once * cluster.local_cpus(largest)}
        cluster.connect(largest.model_copy(update={"workers": largest.workers.model_copy(update=room)}))
        for config in trainings:
            for member in members_of(config.objective).values():
                objective_class(member.kind)
    if drawing.returncode:
        raise RunFailed("the shards were not drawn: what is wrong is said above")


def forget_models(root: Path, names: list[str]) -> None:
    """Remove the runs and registered models of earlier demos under the run root; nothing else is touched."""
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)
    if not (root / "mlflow.db").exists():
        return
    from mlflow.exceptions import MlflowException

    from infra.mlflow_store import open_client

    client = open_client(f"sqlite:///{root / 'mlflow.db'}")
    for name in names:
        try:
            client.delete_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


def check_overrides(overrides: list[str]) -> None:
    """Raise BadRequest where they would lead a demo away from its own data and runs."""
    if theirs := [text for text in overrides if text.startswith(("data.", "run.name", "run.root", "tracking."))]:
        raise BadRequest(f"the demo removes and draws its own data and models: leave out {', '.join(theirs)}")


def run_demo(out: Path, overrides: list[str], count: int) -> dict[str, Any]:
    """Run all stages; returns the figures and writes them to `out`."""
    began = psutil.Process().create_time()  # of the command, so that imports count
    root, stages = run_root(), Stages()
    check_overrides(overrides)
    autoencoder = load_config("autoencoder_demo", overrides)
    encoders = load_config("clip_demo", overrides)
    diffusion = load_config("ldm_demo", overrides)
    stages.run(
        "shards",
        f"python pipelines/prepare_shards.py {root}/data/digits-32 --demo digits --size 32",
        lambda: prepare(root, [autoencoder, encoders, diffusion]),
    )
    from infra.tracking import metric_history
    from pipelines.training.launch import train

    ae = stages.run("autoencoder", "python pipelines/train_autoencoder.py", lambda: train(autoencoder))
    clip = stages.run("text encoder", "python pipelines/train_clip.py", lambda: train(encoders))
    ldm = stages.run("latent diffusion", "python pipelines/train_ldm.py", lambda: train(diffusion))
    folder = out.parent / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    history = {
        title: [
            {"step": row["step"], "loss": row.get("loss"), "validation_loss": row.get("val_loss")}
            for row in metric_history(summary["tracking_uri"], summary["mlflow_run_id"], ["loss", "val_loss"])
        ]
        for title, summary in (("Latent diffusion", ldm), ("Autoencoder", ae), ("Text encoder", clip))
    }
    (folder / "history.json").write_text(json.dumps(history))
    facts = {
        "data_wait_share": ldm["figures"]["data_wait_share"],
        "seconds_by_part": stages.seconds,
        "export_folder": ldm["export"],
        "model_uri": ldm["model_uri"],
        "mlflow_run": ldm["mlflow_run_id"],
        "tracking_uri": ldm["tracking_uri"],
        "autoencoder": ae["model_uri"],
        "text_encoder": clip["model_uri"],
        "training_samples": ldm["samples"],
        "index_digest": ldm["index_digest"],
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    command = [ldm["model_uri"], "--count", str(count), *EVALUATION]
    figures = stages.run(
        "pictures and judgement",
        f"python pipelines/demo/judge_model.py {' '.join(command)}",
        lambda: evaluate(command, folder),
    )
    summary = {
        "seconds": time.time() - began,
        **{key: figures[key] for key in FIGURES},
        "data_wait_share": ldm["figures"]["data_wait_share"],
        "grid": figures["grid"],
        "report": figures["report"],
        "model_uri": ldm["model_uri"],
        "mlflow_run_id": ldm["mlflow_run_id"],
        "tracking_uri": ldm["tracking_uri"],
        "seconds_by_part": stages.seconds,
        "training": {"autoencoder": ae["figures"], "text encoder": clip["figures"], "latent diffusion": ldm["figures"]},
    }
    out.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


FIGURES = (
    "consistency",
    "consistency_real",
    "consistency_ratio",
    "consistency_shuffled",
    "coverage",
    "coverage_real",
    "coverage_ratio",
    "seconds_per_100",
)


def evaluate(command: list[str], folder: Path) -> dict[str, Any]:
    """`judge_model.py` with these arguments, its grid and report in `folder`."""
    from pipelines.demo.judgement import argument_parser, judge_model

    files = ["--report", f"{folder}/report.html", "--grid", f"{folder}/grid.png"]
    files += ["--facts", f"{folder}/facts.json", "--history", f"{folder}/history.json"]
    return judge_model(argument_parser().parse_args([*command, *files]))


def main() -> None:
    arguments = parse(__doc__, "demo", 1000, "for all three trainings")
    summary = run_demo(arguments.out, arguments.overrides, arguments.count)
    print(
        f"\n── done in {summary['seconds']:.0f} s\n"
        f"   pictures   {summary['grid']}\n"
        f"   report     {summary['report']}\n"
        f"   model      {summary['model_uri']}\n"
        f"   MLflow     run {summary['mlflow_run_id']}: mlflow ui --backend-store-uri {summary['tracking_uri']}\n"
        f"   figures    {arguments.out}\n"
        f'   draw more  python pipelines/generate.py --model {summary["model_uri"]} "a blue 3 on yellow paper"'
    )


if __name__ == "__main__":
    main_exit(main)
