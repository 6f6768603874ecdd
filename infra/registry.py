"""The MLflow registry: an export becomes a version of a registered model, and a reference becomes a folder again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from genmodels.diffusion.layout import class_names, image_condition, takes_prompts
from infra import model_card as cards
from infra import storage
from infra.errors import BadRequest
from infra.exports import INDICES, export_kind, folder_digest
from infra.mlflow_store import open_client, patiently, tracking_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient
    from mlflow.types import TensorSpec

_REQUIREMENTS = ("mlflow", "torch", "diffusers", "transformers", "tokenizers", "safetensors", "pydantic", "pillow")
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[^@/]*)|@(?P<alias>[^/]+))?")
_DESCRIPTION_LENGTH = 5000  # characters of a version's description that the registry stores
LEASE = re.compile(r"\.lease-(\d{8})$")  # ends the names of entities that are no models (see registry_lease.py)
DEFAULT_SAMPLING = {"num_steps": 20, "guidance_scale": 2.0, "sampler": "ddim"}


def _grey_png() -> bytes:
    """A picture whose size every autoencoder takes: 64×64."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(stream, "PNG")
    return stream.getvalue()


def _signature(folder: Path, kind: str) -> tuple[ModelSignature, pd.DataFrame]:
    """Signature and input example. Nobody draws the example on registering: it is there to be read."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType, Array

    png = ColSpec("binary", "png")
    columns: list[ColSpec | TensorSpec]
    if kind == "autoencoder":
        return ModelSignature(inputs=Schema([png]), outputs=Schema([png])), pd.DataFrame({"png": [_grey_png()]})
    if kind in ("clip", "damsm"):
        texts = Schema([ColSpec("string", "text")])
        example = pd.DataFrame({"text": ["a red seven on a white background"]})
        return ModelSignature(inputs=texts, outputs=Schema([ColSpec(Array("double"), "embedding")])), example
    if kind == "prior":
        columns = [ColSpec("string", "text"), ColSpec("long", "seed", required=False)]
        example = pd.DataFrame({"text": ["a red seven on a white background"], "seed": [1]})
        return ModelSignature(inputs=Schema(columns), outputs=Schema([ColSpec(Array("double"), "embedding")])), example
    if kind == "text_to_image" and _is_told_an_image(folder):
        columns = [ColSpec("binary", "image"), ColSpec(AnyType(), "seed", required=False)]
        columns.append(ColSpec(AnyType(), "direction", required=False))
        return ModelSignature(inputs=Schema(columns), outputs=Schema([png])), pd.DataFrame({"image": [_grey_png()]})
    conditional = takes_prompts(folder)
    # Of any type, and checked by the model: MLflow would cut 1.5 down to a long, and refuse a row that leaves one out.
    columns = [
        ColSpec(AnyType(), "seed", required=not conditional),
        ColSpec(AnyType(), "num_steps", required=False),
    ]
    example = pd.DataFrame({"seed": [1]})
    if conditional:
        columns = [ColSpec("string", "prompt"), ColSpec(AnyType(), "negative_prompt", required=False), *columns]
        columns.append(ColSpec(AnyType(), "guidance_scale", required=False))
        example.insert(0, "prompt", (class_names(folder) or ["a red seven on a white background"])[:1])
    return ModelSignature(inputs=Schema(columns), outputs=Schema([png])), example


def _is_told_an_image(folder: Path) -> bool:
    """Whether a model makes pictures of images alone, as image-to-image GANs do."""
    return not takes_prompts(folder) and (image_condition(folder) or {}).get("kind") == "member"


def register_export(
    uri: str | None,
    run_id: str,
    folder: str | os.PathLike[str],
    name: str,
    facts: Mapping[str, Any],
    config_yaml: str,
    lineage: Mapping[str, Any],
    model_card: str | None = None,
) -> str:
    """Register an export folder as the next version of model `name`; returns "models:/NAME/VERSION".

    Registering the same files for the same run again returns the version that is there: a driver that died after
    registering may repeat itself.

    Args:
        uri: MLflow tracking URI, or None for the default.
        run_id: the run that trained it.
        folder: what `Objective.export` wrote.
        name: of the registered model.
        facts: for the model card (see `infra.model_card`); `facts["sampling"]` overrides parts of DEFAULT_SAMPLING.
        config_yaml: the resolved config of the training.
        lineage: index digest, git commit, parent version, seeds; kept as tags of the version.
        model_card: markdown, where it is not to be made from `facts`.

    Raises:
        BadRequest: `folder` is no export, or the name cannot be a model's.
        ValueError: `model_card` begins with facts that cannot be read.
    """
    from mlflow.exceptions import MlflowException

    kind = export_kind(folder)
    if kind is None:
        raise BadRequest(f"{folder}: no export to register (no {INDICES})")
    if not re.fullmatch(r"[^/:@']+", name):
        raise BadRequest(f"model name {name!r}: may not be empty, nor hold any of / : @ '")
    uri = tracking_uri(uri)
    client = open_client(uri)
    digest = folder_digest(folder)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id and version.tags.get("export_digest") == digest:
            return f"models:/{name}/{version.version}"
    told = kind == "text_to_image" and _is_told_an_image(Path(folder))
    samples = (facts.get("data") or {}).get("samples")
    lineage = {**lineage, "export_digest": digest, **({} if samples is None else {"samples": samples})}
    known = {**facts, "told_an_image": told, "lineage": lineage}
    card = cards.with_front_matter(model_card or cards.model_card(name, known), known)
    sampling = {**facts.get("sampling", {}), "model": name, "model_digest": digest}  # pictures say what drew them
    logged = _log_model(client, run_id, Path(folder), kind, name, card, config_yaml, {**facts, "sampling": sampling})
    try:
        patiently(client.create_registered_model, name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    card_digest = hashlib.sha256(card.encode()).hexdigest()  # promotion looks whether it is still this card
    tags = {key: str(value) for key, value in {**lineage, "kind": kind, "card": card_digest}.items()}
    version = patiently(
        client.create_model_version,
        name,
        # With a local store, a source models:/ID would be looked up in the process-wide store, not in this one.
        source=logged.artifact_location if uri.startswith("sqlite:") else f"models:/{logged.model_id}",
        run_id=run_id,
        tags=tags,
        description=cards.split_card(card)[1][:_DESCRIPTION_LENGTH],
        model_id=logged.model_id,
    )
    return f"models:/{name}/{version.version}"


def _log_model(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    kind: str,
    name: str,
    card: str,
    config_yaml: str,
    facts: Mapping[str, Any],
) -> LoggedModel:
    """Store the pyfunc model as an output of the run.

    In single calls, since `mlflow.pyfunc.log_model` uses process-wide state and logs the metrics of step 0 once more.
    """
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    here = Path(__file__).resolve().parent
    signature, example = _signature(folder, kind)
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = patiently(client.create_logged_model, experiment_id, name=name, source_run_id=run_id, model_type=kind)
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it tells of each step
    with tempfile.TemporaryDirectory() as temporary:
        model_folder = Path(temporary) / "model"
        pyfunc.save_model(
            str(model_folder),
            python_model=str(here / f"{kind}_model.py"),
            artifacts={"export": str(folder)},
            code_paths=[str(here.parent / "genmodels")],  # so that the model opens without this checkout
            model_config={**DEFAULT_SAMPLING, **facts.get("sampling", {})} if kind == "text_to_image" else None,
            signature=signature,
            input_example=example,
            # Named, since to infer them MLflow loads the model in a new process.
            pip_requirements=[f"{package}=={_public_version(package)}" for package in _REQUIREMENTS],
            mlflow_model=Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id),
        )
        (model_folder / "README.md").write_text(card, encoding="utf-8")
        (model_folder / "config.yaml").write_text(config_yaml)
        client.log_model_artifacts(logged.model_id, str(model_folder))
    patiently(client.finalize_logged_model, logged.model_id, "READY")
    patiently(client.log_outputs, run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _public_version(package: str) -> str:
    return importlib.metadata.version(package).partition("+")[0]  # torch 2.13.0+cpu is on no common index


def tag_version(uri: str | None, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set (or replace) tags of a version of a registered model."""
    client = open_client(uri)
    for key, value in tags.items():
        patiently(client.set_model_version_tag, name, version, key, value)


def resolve_model(reference: str | os.PathLike[str], uri: str | None = None, anew: bool = False) -> Path:
    """The local export folder of a model.

    Args:
        reference: an export folder (local or s3://), "models:/NAME/VERSION", "models:/NAME@ALIAS", or "models:/NAME"
            for the highest version.
        uri: MLflow tracking URI, or None for the default.
        anew: fetch a registered model again, also where it was fetched before.

    Raises:
        BadRequest: there is no such model; the message lists what there is.
    """
    text = str(reference)
    if text.startswith("models:"):
        return _from_registry(text, tracking_uri(uri), anew)
    if storage.is_remote(text):
        storage.check_access(text)
        filesystem, path = storage.open_filesystem(text)
        files = filesystem.find(path, detail=True)
        if not files:
            raise BadRequest(f"{text}: holds nothing; give an export folder, a run folder or models:/NAME/VERSION")
        state = json.dumps([(name, info["size"], info.get("ETag")) for name, info in sorted(files.items())])
        return _checked(_cached(f"{text}\n{state}", lambda target: storage.download_folder(text, target)), text)
    folder = Path(text).expanduser().absolute()
    if not folder.exists():
        raise BadRequest(f"{folder}: no such folder; give an export folder, a run folder or models:/NAME/VERSION")
    return _checked(folder, text)


def _checked(folder: Path, reference: str) -> Path:
    if export_kind(folder) is None:
        raise BadRequest(
            f"{reference}: holds no model (no {INDICES}); give an export folder, a run folder or models:/NAME/VERSION"
        )
    return folder


def _cached(key: str, fetch: Callable[[Path], Any], anew: bool = False) -> Path:
    """A folder under the run root that `fetch` filled, now or (but for `anew`) earlier; complete or absent."""
    target = storage.run_root() / "downloads" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if anew or not target.is_dir():
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        partial.mkdir(parents=True)
        try:
            fetch(partial)
            if anew and target.is_dir():
                old = target.with_name(f"{partial.name}.old")
                os.replace(target, old)
                os.replace(partial, target)
                shutil.rmtree(old, ignore_errors=True)
            elif not target.is_dir():
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _from_registry(reference: str, uri: str, anew: bool) -> Path:
    version = find_version(reference, uri)
    client = open_client(uri)
    if version.model_id:
        location = client.get_logged_model(version.model_id).artifact_location
    else:
        location = client.get_model_version_download_uri(version.name, version.version)
    parsed = urllib.parse.urlparse(location)
    if parsed.scheme in ("", "file"):
        model = Path(urllib.request.url2pathname(parsed.path))
        if not model.is_dir():
            raise BadRequest(f"{reference}: its files are not at {model}; is it on another machine?")
    else:
        from mlflow.artifacts import download_artifacts

        model = _cached(
            f"{uri}\n{location}",
            lambda target: download_artifacts(location, dst_path=str(target), tracking_uri=uri, registry_uri=uri),
            anew,
        )
        model = next(iter(model.rglob("MLmodel"))).parent
    flavors = yaml.safe_load((model / "MLmodel").read_text())["flavors"]
    artifact = flavors.get("python_function", {}).get("artifacts", {}).get("export")
    if artifact is None:
        raise BadRequest(f"{reference}: was not registered by this project (it has no export folder)")
    return _checked(model / artifact["path"], reference)


def find_version(reference: str, uri: str | None = None) -> ModelVersion:
    """The version that "models:/NAME/VERSION", "models:/NAME@ALIAS" or "models:/NAME" (the highest) means.

    Raises BadRequest, which lists the models, versions or aliases that there are.
    """
    from mlflow.exceptions import MlflowException

    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BadRequest(f"{reference}: write models:/NAME/VERSION, models:/NAME@ALIAS or models:/NAME")
    uri = tracking_uri(uri)
    client = open_client(uri)
    name, number, alias = match["name"], match["version"], match["alias"]
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        there = (found.name for found in client.search_registered_models())
        names = ", ".join(sorted(found for found in there if not LEASE.search(found))) or "none"
        raise BadRequest(f"no registered model {name!r} in {uri}; there are: {names}") from error
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))
    numbers = ", ".join(str(version.version) for version in versions) or "none"
    if alias is not None:
        if alias not in model.aliases:
            aliases = ", ".join(sorted(model.aliases)) or "none"
            raise BadRequest(f"{reference}: no such alias; aliases: {aliases}; versions: {numbers}")
        return client.get_model_version_by_alias(name, alias)
    if not versions:
        raise BadRequest(f"{reference}: model {name!r} has no version yet")
    if not number or number == "latest":
        return versions[-1]
    for version in versions:
        if str(version.version) == number:
            return version
    raise BadRequest(f"{reference}: no such version; there are: {numbers}")
