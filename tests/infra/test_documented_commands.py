"""The training commands that the cluster files show can be typed as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
