"""What is evaluated, and what is known of it: its run's configuration tells which data it learned from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from genmodels.diffusion.layout import image_condition, takes_prompts
from infra import storage
from infra.errors import BadRequest
from infra.exports import export_kind, folder_digest
from infra.mlflow_store import tracking_uri as absolute_tracking_uri
from infra.registry import find_version
from infra.storage import run_root
from pipelines.training.config import TrainConfig, absolute_url
from pipelines.training.export import find_run, resolve_reference
from pipelines.training.run_folder import RunFolder


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


def find_subject(reference: str, tracking_uri: str | None = None) -> Subject:
    """A model named in any way that `generate.py` takes, or a folder of pictures.

    Raises:
        BadRequest: there is nothing of that name, or it is a model that draws nothing.
    """
    if _is_pictures(reference):
        return Subject(reference, "pictures", Path(reference).expanduser().absolute())
    folder = resolve_reference(reference, str(run_root()), tracking_uri)
    kind = export_kind(folder)
    if kind not in ("text_to_image", "autoencoder"):
        raise BadRequest(f"{reference} is of kind {kind}: only diffusion models and autoencoders give pictures")
    if (told := image_condition(folder)) is not None:
        raise BadRequest(f"{reference} draws from an image ({told['kind']}), and is evaluated on none so far")
    run = None if reference.startswith("models:") else _run_of(folder, reference)
    config = _config_beside(folder) if run is None else run.config()
    known = Subject(
        name=reference,
        kind=kind,
        folder=folder,
        reference=reference if storage.is_remote(reference) and run is None else str(folder),
        digest=folder_digest(folder),
        config=config,
        conditional=takes_prompts(folder),
        image_size=_image_size(folder) if config is None else config.objective.image_size,
    )
    if run is not None:
        described = run.read("run.json") or {}
        step = re.match(r"\d{8}", folder.name) or re.match(r"\d{8}", folder.parent.name)
        return replace(
            known,
            tracking_uri=described.get("tracking_uri"),
            run_id=described.get("mlflow_run_id"),
            step=int(step[0]) if step else 0,
        )
    if reference.startswith("models:"):
        uri = absolute_tracking_uri(tracking_uri)
        version = find_version(reference, uri)
        return replace(
            known,
            reference=f"models:/{version.name}/{version.version}",
            tracking_uri=uri,
            version=(version.name, str(version.version)),
            run_id=version.run_id,
            step=int(version.tags.get("steps", 0)),
        )
    return known


def _image_size(folder: Path) -> int:
    """Of an export whose training is not known; 0 of an autoencoder, which takes any."""
    if export_kind(folder) == "autoencoder":
        return 0
    from genmodels.diffusion.pipeline import TextToImage

    try:
        return TextToImage.from_folder(folder).image_size
    except (ValueError, OSError) as error:
        raise BadRequest(f"{folder}: {error}") from error


def _is_pictures(reference: str) -> bool:
    if reference.startswith("models:") or storage.is_remote(reference):
        return False
    folder = Path(reference).expanduser()
    if not folder.is_dir() or export_kind(folder) is not None:
        return False
    return not ((folder / "config.json").is_file() or folder.parent.name == "checkpoints")


def _run_of(folder: Path, reference: str) -> RunFolder | None:
    """The run whose export it is: RUN/export/STEP, or a member of it."""
    for parent in (*folder.parents, *Path(reference).expanduser().absolute().parents):
        if parent.name == "export" and (parent.parent / "config.json").is_file():
            return RunFolder(str(absolute_url(str(parent.parent))))
    return find_run(reference, str(run_root()))


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
