"""What is evaluated, and what is known of it: its run's configuration tells which data it learned from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from genmodels.diffusion.layout import image_condition, takes_prompts
from genmodels.gan.layout import is_unpaired
from infra import storage
from infra.errors import BadRequest
from infra.exports import export_kind, folder_digest, is_gan
from infra.mlflow_store import tracking_uri as absolute_tracking_uri
from infra.registry import find_version, resolve_model
from infra.storage import run_root
from pipelines.training.config import TrainConfig, absolute_url
from pipelines.training.export import export_run, find_export
from pipelines.training.run_folder import RunFolder

_STEP = re.compile(r"\d{8}(?!\w)")  # begins an export's name; that of a downloaded one is longer


@dataclass(frozen=True)
class Subject:
    """A model that draws, an autoencoder, or a folder of pictures.

    Attributes:
        name: as it was asked for.
        kind: text_to_image, autoencoder or pictures.
        folder: the local export, or the pictures.
        reference: what `resolve_model` opens on any node; None for pictures.
        digest: of the export's files; None for pictures.
        config: of the training, where it is known.
        tracking_uri: where the model is registered.
        version: (name, version) in the registry, for a model that was named by it.
        run_id: the MLflow run that trained it, where it is known.
        step: of the training, 0 where it is not known.
        conditional: whether it draws from captions; pictures may have some.
        image_size: of what it draws; 0 where any is possible.
        image_condition: the configuration of the image that it is told, if it is told one.
    """

    name: str
    kind: str
    folder: Path
    reference: str | None = None
    digest: str | None = None
    config: TrainConfig | None = None
    tracking_uri: str | None = None
    version: tuple[str, str] | None = None
    run_id: str | None = None
    step: int = 0
    conditional: bool = True
    image_size: int = 0
    image_condition: dict[str, Any] | None = None


def find_subject(reference: str, tracking_uri: str | None = None) -> Subject:
    """A model named in any way that `generate.py` takes, or a folder of pictures.

    Raises:
        BadRequest: there is nothing of that name, or it is a model that draws nothing.
    """
    if _is_pictures(reference):
        return Subject(reference, "pictures", Path(reference).expanduser().absolute())
    if reference.startswith("models:"):
        return _registered(reference, absolute_tracking_uri(tracking_uri))
    if (found := find_export(reference, str(run_root()))) is not None:
        run, checkpoint = found
        url = export_run(run, checkpoint)[0]
        return _of_run(_exported(reference, resolve_model(url), url, run.config()), run, checkpoint.step)
    folder = resolve_model(reference, tracking_uri)
    above = _run_above(folder)
    opened = reference if storage.is_remote(reference) else str(folder)
    known = _exported(reference, folder, opened, None if above is None else above.config())
    step = next((int(number[0]) for name in (folder.name, folder.parent.name) if (number := _STEP.match(name))), 0)
    return known if above is None else _of_run(known, above, step)


def _exported(name: str, folder: Path, opened: str, config: TrainConfig | None) -> Subject:
    """What an export itself tells. Raises BadRequest where it gives no pictures."""
    kind = export_kind(folder)
    if kind not in ("text_to_image", "autoencoder"):
        raise BadRequest(f"{name} is of kind {kind}: only diffusion models and autoencoders give pictures")
    if is_gan(folder) and is_unpaired(folder):
        raise BadRequest(
            f"{name} is a CycleGAN, of two sets: it is judged by training's own evaluation (evaluation.every)"
        )
    return Subject(
        name=name,
        kind=kind,
        folder=folder,
        reference=opened,
        digest=folder_digest(folder),
        config=config,
        conditional=takes_prompts(folder),
        image_size=_image_size(folder) if config is None else config.objective.image_size,
        image_condition=image_condition(folder),
    )


def _of_run(subject: Subject, run: RunFolder, step: int) -> Subject:
    described = run.read("run.json") or {}
    return replace(
        subject, tracking_uri=described.get("tracking_uri"), run_id=described.get("mlflow_run_id"), step=step
    )


def _registered(reference: str, uri: str) -> Subject:
    folder, version = resolve_model(reference, uri), find_version(reference, uri)
    named = f"models:/{version.name}/{version.version}"
    return replace(
        _exported(reference, folder, named, _config_beside(folder)),
        tracking_uri=uri,
        version=(version.name, str(version.version)),
        run_id=version.run_id,
        step=int(version.tags.get("steps", 0)),
    )


def _image_size(folder: Path) -> int:
    """Of an export whose training is not known; 0 of an autoencoder, which takes any."""
    if export_kind(folder) == "autoencoder":
        return 0
    from genmodels.drawing import open_drawing_model

    try:
        return open_drawing_model(folder).image_size
    except (ValueError, OSError) as error:
        raise BadRequest(f"{folder}: {error}") from error


def _is_pictures(reference: str) -> bool:
    if reference.startswith("models:") or storage.is_remote(reference):
        return False
    folder = Path(reference).expanduser()
    if not folder.is_dir() or export_kind(folder) is not None:
        return False
    return not ((folder / "config.json").is_file() or folder.parent.name in ("checkpoints", "best"))


def _run_above(folder: Path) -> RunFolder | None:
    """The run whose export it is: RUN/export/STEP, or a member of it."""
    for parent in folder.parents:
        if parent.name == "export" and (parent.parent / "config.json").is_file():
            return RunFolder(str(absolute_url(str(parent.parent))))
    return None


def _config_beside(folder: Path) -> TrainConfig | None:
    """The configuration that was registered with a model; its folder lies above the export."""
    for parent in folder.parents:
        if (parent / "MLmodel").is_file():
            if not (parent / "config.yaml").is_file():
                return None
            try:
                return TrainConfig.model_validate(yaml.safe_load((parent / "config.yaml").read_text()))
            except ValidationError:
                return None  # of another version of this project
    return None
