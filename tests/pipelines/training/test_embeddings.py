"""What a run reads beside images, and at which size the images are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genmodels.families import SideBySideConfig
from infra.errors import BadRequest
from pipelines.training.clip import check_labels
from pipelines.training.config import logged
from pipelines.training.embeddings import sample_arrays
from pipelines.training.run_folder import RunFolder
from tests.genmodels import tiny
from tests.pipelines.data.shards import write_shards


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


def test_labels_that_no_sample_has_are_refused_before_anything_starts(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards", samples=8, per_shard=8)
    told = {"label": "json:digit", "classes": {"7": "seven", "3": "three"}}
    objective = tiny.clip_config(zero_shot=told)
    config: Any = SimpleNamespace(objective=objective, data=SimpleNamespace(validation_url=None, image=None))
    with pytest.raises(BadRequest, match=r"objective.zero_shot: of 64 samples none .* at label json:digit: none there"):
        check_labels(config, index, RunFolder(str(tmp_path / "run")))
    config.objective = tiny.clip_config(zero_shot={**told, "label": "txt", "classes": {"number 1": "1", "2": "2"}})
    check_labels(config, index, RunFolder(str(tmp_path / "run")))


def test_names_of_classes_are_one_parameter_of_an_mlflow_run() -> None:
    tree = {"run": {"steps": 3}, "objective": {"zero_shot": {"classes": {"a, b": "C++", "c.d": "'"}, "label": "cls"}}}
    zero_shot = {"objective.zero_shot.classes": {"a, b": "C++", "c.d": "'"}, "objective.zero_shot.label": "cls"}
    assert logged(tree) == {"run.steps": 3, **zero_shot}
