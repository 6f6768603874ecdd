"""What a run needs from elsewhere, copied into its folder once, so that workers anywhere and later restarts find it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from genmodels.text.config import PretrainedTextEncoder, TrainedTextEncoder
from infra import storage
from infra.errors import BadRequest
from infra.exports import folder_digest
from pipelines.data.captions import read_captions
from pipelines.data.index import DatasetIndex
from pipelines.data.spec import SampleSpec
from pipelines.training.cluster import local_cpus
from pipelines.training.config import TrainConfig, load_config
from pipelines.training.export import resolve_reference
from pipelines.training.run_folder import RunFolder, root_of

_TOKENIZER_CAPTIONS = 50_000  # enough for the merges of a vocabulary of tens of thousands


def prepare_inputs(config: TrainConfig, folder: RunFolder, index: DatasetIndex) -> None:
    """Collect autoencoder, tokenizer, text encoder, perceptual weights and initial weights in the run's folder.

    Raises:
        BadRequest: a reference does not lead to a model or file; the message names the key.
    """
    if storage.exists(folder.path("inputs", "complete")):
        return
    objective: Any = config.objective
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        perceptual = getattr(objective, "perceptual", None)
        if perceptual is not None:
            if not Path(perceptual).is_file():
                raise BadRequest(f"objective.perceptual: there is no file {perceptual}")
            shutil.copy(perceptual, local / "perceptual.safetensors")
        sources: dict[str, dict[str, str]] = {}  # which model exactly each reference led to
        if config.run.init_from is not None:
            source = _resolve("run.init_from", config.run.init_from, config)
            sources["run.init_from"] = {"reference": config.run.init_from, "digest": folder_digest(source)}
            shutil.copytree(source, local / "init")
        text = getattr(objective, "text_encoder", None)
        models: dict[str, str] = {}  # key: reference to a model that this project trained, or trains first
        if isinstance(text, PretrainedTextEncoder) and text.path.startswith(("models:", "preset:")):
            models["objective.text_encoder.path"] = text.path
        elif isinstance(text, PretrainedTextEncoder):
            _fetch_text_encoder(text.path, text.path, local)
        elif isinstance(text, TrainedTextEncoder):
            started_from = local / "init" / "tokenizer"
            if started_from.is_dir():  # fine-tuning keeps the meaning of the token ids
                shutil.copytree(started_from, local / "tokenizer")
            else:
                from genmodels.text.tokenizer import save, train_tokenizer

                spec = SampleSpec(config.objective.image_size, caption=config.data.caption)
                captions = read_captions(index, spec, _TOKENIZER_CAPTIONS)
                save(train_tokenizer(captions, text.vocab_size, text.length), local / "tokenizer")
        if getattr(objective, "autoencoder", None) is not None:
            models["objective.autoencoder"] = objective.autoencoder
        for key, source in _resolve_all(models, config):
            sources[key] = {"reference": models[key], "digest": folder_digest(source)}
            if key == "objective.autoencoder":
                nested = source / "vae"  # a Stable Diffusion export holds one too
                shutil.copytree(nested if nested.is_dir() else source, local / "autoencoder")
            else:
                _fetch_text_encoder(models[key], str(source), local)
        storage.remove(folder.inputs)  # of an attempt that was not completed
        if any(local.iterdir()):
            storage.upload_folder(local, folder.inputs)
        folder.write("inputs/sources.json", sources)
        storage.write_bytes(folder.path("inputs", "complete"), secrets.token_hex(16).encode())


def parents(folder: RunFolder) -> dict[str, str]:
    """The models that the run was made from, for its lineage: "parent.KEY" to reference and digest of the export."""
    sources = folder.read("inputs/sources.json") or {}
    return {f"parent.{key}": f"{source['reference']} {source['digest']}" for key, source in sources.items()}


def _fetch_text_encoder(reference: str, source: str, local: Path) -> None:
    from genmodels.text.encoder import fetch_pretrained

    try:
        fetch_pretrained(source, local)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise BadRequest(f"objective.text_encoder.path={reference}: {message}") from None


def _resolve_all(references: dict[str, str], config: TrainConfig) -> Iterator[tuple[str, Path]]:
    """Models by key of the configuration. "preset:NAME" trains that preset first, where its run is not finished yet.

    These come last: what is wrong with the others, or with a preset's name, is said before anything is trained.
    """
    given = {"run.root": config.run.root, "tracking.uri": config.tracking.uri}
    assignments = [f"{key}={value}" for key, value in given.items() if value is not None]
    assignments.append(f"tracking.experiment={config.tracking.experiment}")
    presets = {key: text.removeprefix("preset:") for key, text in references.items() if text.startswith("preset:")}
    # The trainings share the Ray that the first one starts, so it has to be large enough for each.
    room = max(local_cpus(each) for each in [config, *(load_config(name, assignments) for name in presets.values())])
    for key, reference in references.items():
        if key not in presets:
            yield key, _resolve(key, reference, config)
    for key, preset in presets.items():
        from pipelines.training.launch import train

        export = train(load_config(preset, [*assignments, f"workers.local_cpus={room}"]))["export"]
        yield key, _resolve(key, export, config)


def _resolve(key: str, reference: str, config: TrainConfig) -> Path:
    try:
        return resolve_reference(reference, root_of(config), config.tracking.uri, finished=True)
    except BadRequest as error:
        raise BadRequest(f"{key}: {error}") from None


def local_inputs(folder: RunFolder) -> Path:
    """The inputs as a local folder; from object storage they are fetched once on each node."""
    if not storage.is_remote(folder.url):
        return Path(storage.open_filesystem(folder.inputs)[1])
    token = storage.read_bytes(
        folder.path("inputs", "complete")
    ).decode()  # of these inputs, whatever the run is called
    target = storage.run_root() / "downloads" / f"inputs-{token}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            storage.download_folder(folder.inputs, partial)
            partial.rename(target)
    return target


def sample_spec(config: TrainConfig, inputs: Path) -> SampleSpec:
    """How samples become batches in this run."""
    data = config.data
    tokenizer = inputs / "tokenizer"
    if not tokenizer.is_dir():
        caption = data.caption if getattr(config.objective, "conditional", False) else None
        return SampleSpec(config.objective.image_size, data.crop, data.horizontal_flip, caption)
    from genmodels.text.tokenizer import load, tokenizer_json

    loaded = load(tokenizer)
    return SampleSpec(
        config.objective.image_size,
        data.crop,
        data.horizontal_flip,
        data.caption,
        tokenizer_json=tokenizer_json(tokenizer),
        token_length=loaded.model_max_length,
        pad_token_id=loaded.pad_token_id,
    )
