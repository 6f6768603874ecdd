"""The commands that the cluster files show can be typed as they are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipelines.promotion.retraining import argument_parser
from pipelines.training.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "cluster"


@pytest.mark.parametrize("name", ["README.md", "rayjob.yaml"])
def test_documented_training_commands_are_valid(name: str) -> None:
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"train_ldm\.py((?:\s+[\w.]+(?:=\S+)?)+)", text)
    assert commands
    for command in commands:
        preset, *overrides = command.split()
        config = load_config(preset, [word for word in overrides if "=" in word])
        assert config.run.root == "s3://BUCKET/runs" and config.data.demo is None and config.workers.use_gpu


@pytest.mark.parametrize(
    ("name", "period"),
    [
        ("retrain-cronjob.yaml", r"PERIOD"),  # filled in by run_rayjob.py, which test_cluster_files.py tries
        ("retrain-raycronjob.yaml", r"20\d\d-W\d\d"),
        ("crontab.example", r"20\d\d-W\d\d"),
    ],
)
def test_documented_retraining_commands_are_valid(name: str, period: str) -> None:
    """As a shell reads them, by the parser of retrain.py, and with a configuration that can be judged."""
    text = "\n".join(line for line in (FOLDER / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    (command,) = re.findall(r"retrain\.py(.*?--period (?:\$\([^)]+\)|\S+))", text, re.S)
    command = " ".join(command.replace(r"\%", "%").replace("$PERIOD", "PERIOD").split())
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    arguments = argument_parser().parse_intermixed_args(words.stdout.splitlines())
    assert re.fullmatch(period, arguments.period)
    assert arguments.model == "models:/ldm-256" and arguments.features and arguments.clip
    run_name = f"run.name=ldm-256-{arguments.period}"
    config = load_config(arguments.preset, [*arguments.overrides, run_name])
    assert config.run.root == "s3://BUCKET/runs" and config.workers.use_gpu
    assert config.data.validation_url is not None and config.data.demo is None
    assert arguments.samples >= config.data.global_batch_size


def test_all_schedules_run_the_same_command() -> None:
    commands = []
    for name in ("retrain-cronjob.yaml", "retrain-raycronjob.yaml", "crontab.example"):
        (command,) = re.findall(r"retrain\.py( models.*?) --period", (FOLDER / name).read_text(), re.S)
        commands.append(command.split())
    assert commands[0] == commands[1] == commands[2]
