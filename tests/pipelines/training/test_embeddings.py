"""What a run reads beside images, and at which size the images are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genmodels.families import SideBySideConfig
from infra.errors import BadRequest
from pipelines.training.embeddings import sample_arrays
from tests.genmodels import tiny


def given(tmp_path: Path, **members: Any) -> tuple[Any, Path]:
    """A run of these members, and its inputs: each has the CLIP of 16 pixels."""
    inputs = tiny.write_inputs(tmp_path / "inputs")
    for name in members:
        shutil.copytree(inputs / "clip", tmp_path / "run" / name / "clip")
    objective = SideBySideConfig(members={name: member.model_dump() for name, member in members.items()})
    return SimpleNamespace(objective=objective, evaluation=SimpleNamespace(every=0)), tmp_path / "run"


def test_a_clip_sees_images_at_least_as_large_as_it_wants_them(tmp_path: Path) -> None:
    told = tiny.decoder_config(image_size=8)
    assert sample_arrays(*given(tmp_path, one=told, other=told)) == ((), 16)


def test_nobody_else_is_trained_on_images_that_a_clip_wants_larger(tmp_path: Path) -> None:
    plain = tiny.diffusion_config(image_size=8, autoencoder=None)
    config, inputs = given(tmp_path, told=tiny.decoder_config(image_size=8), plain=plain)
    with pytest.raises(BadRequest, match=r"objective.members.plain: the CLIP .* reads images of 16 pixels, .* of 8:"):
        sample_arrays(config, inputs)
