"""What a run needs from elsewhere, copied into its folder once, so that workers anywhere and later restarts find it.

References: a model that this project trained (models:/NAME, preset:NAME, a run, an export), or where others are taken
too a folder or hub name of transformers.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from genmodels.clip.layout import FACTS as CLIP_FACTS
from genmodels.families import members_of
from genmodels.gan.attention.config import RecurrentTextEncoder
from genmodels.text.config import PretrainedTextEncoder, TrainedTextEncoder
from infra import storage
from infra.errors import BadRequest
from infra.exports import export_kind, folder_digest
from pipelines.data.captions import read_captions
from pipelines.data.index import DatasetIndex
from pipelines.data.spec import SampleSpec
from pipelines.training.clip import check_labels, complete_clip
from pipelines.training.cluster import local_cpus
from pipelines.training.config import TrainConfig, load_config
from pipelines.training.embeddings import check_encoders, clip_reference, sample_arrays
from pipelines.training.export import find_export, resolve_reference
from pipelines.training.run_folder import RunFolder, root_of

_TOKENIZER_CAPTIONS = 50_000  # enough for the merges of a vocabulary of tens of thousands


def prepare_inputs(config: TrainConfig, folder: RunFolder, index: DatasetIndex) -> None:
    """Collect autoencoder, tokenizer, text encoder, perceptual weights and initial weights in the run's folder.

    What a member of a `side_by_side` objective needs is in a folder of its name; the tokenizer is that of all.

    Raises:
        BadRequest: a reference does not lead to a model or file; the message names the key.
    """
    if storage.exists(folder.path("inputs", "complete")):
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        sources: dict[str, dict[str, str]] = {}  # which model exactly each reference led to
        if config.run.init_from is not None:
            source = _resolve("run.init_from", config.run.init_from, config)
            sources["run.init_from"] = {"reference": config.run.init_from, "digest": folder_digest(source)}
            shutil.copytree(source, local / "init")
        members = members_of(config.objective)
        models: dict[str, str] = {}  # key: reference to a model that this project trained, or trains first
        for name, member in members.items():
            (local / name).mkdir(exist_ok=True)
            models |= _member_inputs(name, member, config, index, local)
        for reference, source in _resolve_all(models, config):
            for key in (key for key, wanted in models.items() if wanted == reference):
                sources[key] = {"reference": reference, "digest": folder_digest(source)}
                place(key, reference, source, local / _member_named(key))
        for name, member in members.items():
            complete_clip(member, config, index, local / name)
        check_encoders(config, local)
        check_labels(config, index, folder)
        _share_tokenizer(local, list(members))
        storage.remove(folder.inputs)  # of an attempt that was not completed
        if any(local.iterdir()):
            storage.upload_folder(local, folder.inputs)
        folder.write("inputs/sources.json", sources)
        storage.write_bytes(folder.path("inputs", "complete"), secrets.token_hex(16).encode())


def _member_inputs(name: str, objective: Any, config: TrainConfig, index: DatasetIndex, local: Path) -> dict[str, str]:
    """Put what is at hand into the member's folder; returns what is to be resolved: key to reference."""
    section, target = f"objective.members.{name}" if name else "objective", local / name
    perceptual = getattr(objective, "perceptual", None)
    if perceptual is not None:
        if not Path(perceptual).is_file():
            raise BadRequest(f"{section}.perceptual: there is no file {perceptual}")
        shutil.copy(perceptual, target / "perceptual.safetensors")
    text = getattr(objective, "text_encoder", None)
    models: dict[str, str] = {}
    if isinstance(text, PretrainedTextEncoder):
        key = f"{section}.text_encoder.path"
        elsewhere = text.path.startswith(("models:", "preset:")) or storage.is_remote(text.path)
        if elsewhere or find_export(text.path, root_of(config)) is not None:
            models[key] = text.path
        else:
            _fetch(key, text.path, text.path, target, "text_encoder", text.length)
    elif isinstance(text, (TrainedTextEncoder, RecurrentTextEncoder)):
        started_from = local / "init" / name / "tokenizer"
        if started_from.is_dir():  # fine-tuning keeps the meaning of the token ids
            shutil.copytree(started_from, target / "tokenizer")
        else:
            from genmodels.text.tokenizer import save, train_tokenizer

            spec = SampleSpec(config.objective.image_size, caption=config.data.caption)
            captions = read_captions(index, spec, _TOKENIZER_CAPTIONS)
            save(train_tokenizer(captions, text.vocab_size, text.length), target / "tokenizer")
    if getattr(objective, "autoencoder", None) is not None:
        models[f"{section}.autoencoder"] = objective.autoencoder
    if (damsm := getattr(objective, "damsm", None)) is not None:
        models[f"{section}.damsm"] = damsm
    if (found := clip_reference(objective)) is not None:
        key, path = f"{section}.{found[0]}", found[1]
        if path.startswith(("models:", "preset:")) or _is_ours(path, config):
            models[key] = path
        else:
            _fetch(key, path, path, target, "clip")
    return models


def _is_ours(path: str, config: TrainConfig) -> bool:
    """Whether a reference leads to a run, a checkpoint or an export of this project."""
    if find_export(path, root_of(config)) is not None or storage.is_remote(path):
        return True
    return (Path(path).expanduser() / CLIP_FACTS).is_file()


def place(key: str, reference: str, source: Path, target: Path) -> None:
    """Copy the model that a key of the configuration refers to into its member's folder.

    Raises:
        BadRequest: it is of another kind; the message names the key.
    """
    if key.endswith(".clip"):
        shutil.copytree(source, target / "clip")
    elif key.endswith(".damsm"):
        if export_kind(source) != "damsm":
            raise BadRequest(f"{key}={reference}: holds no DAMSM; train one with train_gan.py damsm_demo")
        shutil.copytree(source, target / "damsm")
        shutil.copytree(source / "tokenizer", target / "tokenizer")  # captions are read as it reads them
    elif key.endswith(".autoencoder"):
        nested = source / "vae"  # a Stable Diffusion export holds one too
        shutil.copytree(nested if nested.is_dir() else source, target / "autoencoder")
    else:
        _fetch(key, reference, str(source), target, "text_encoder")


def _member_named(key: str) -> str:
    """The member whose key it is; "" of an objective without members."""
    return key.split(".")[2] if key.startswith("objective.members.") else ""


def _share_tokenizer(local: Path, members: list[str]) -> None:
    """The tokenizer of the data path, where it belongs. Raises BadRequest where members bring different ones."""
    brought = [name for name in members if name and (local / name / "tokenizer").is_dir()]
    if not brought:
        return
    first, *others = brought
    digest = folder_digest(local / first / "tokenizer")
    for name in others:
        if folder_digest(local / name / "tokenizer") != digest:
            raise BadRequest(
                f"objective.members {first} and {name} have different tokenizers, and the captions are read with one: "
                "give both the same text encoder"
            )
    shutil.copytree(local / first / "tokenizer", local / "tokenizer")


def parents(folder: RunFolder) -> dict[str, str]:
    """The models that the run was made from, for its lineage: "parent.KEY" to reference and digest of the export."""
    sources = folder.read("inputs/sources.json") or {}
    return {f"parent.{key}": f"{source['reference']} {source['digest']}" for key, source in sources.items()}


def _fetch(key: str, reference: str, source: str, local: Path, part: str, length: int | None = None) -> None:
    """Copy a text encoder with its tokenizer, or a CLIP, of transformers. Raises BadRequest where there is none."""
    try:
        if part == "clip":
            from genmodels.clip.frozen import fetch_clip

            fetch_clip(source, local / part)
        else:
            from genmodels.text.encoder import fetch_pretrained

            fetch_pretrained(source, local, length)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise BadRequest(f"{key}={reference}: {message}") from None


def _resolve_all(models: dict[str, str], config: TrainConfig) -> Iterator[tuple[str, Path]]:
    """References in the configuration, each once, and the folders of the models that they lead to.

    "preset:NAME" (or "preset:NAME/MEMBER") trains that preset first, where its run is not finished yet. These come
    last: what is wrong with the others, or with a preset's name, is said before anything is trained.
    """
    given = {"run.root": config.run.root, "tracking.uri": config.tracking.uri}
    assignments = [f"{key}={value}" for key, value in given.items() if value is not None]
    assignments.append(f"tracking.experiment={config.tracking.experiment}")
    keys: dict[str, str] = {}
    for key, reference in models.items():
        keys.setdefault(reference, key)
    parts = {text: _preset_and_member(text) for text in keys if text.startswith("preset:")}
    presets = {name: load_config(name, assignments) for name, _ in parts.values()}
    # The trainings share the Ray that the first one starts, so it has to be large enough for each.
    room = max(local_cpus(each) for each in [config, *presets.values()])
    for text, key in keys.items():
        if text not in parts:
            yield text, _resolve(key, text, config)
    for name in presets:
        from pipelines.training.launch import train

        export = train(load_config(name, [*assignments, f"workers.local_cpus={room}"]))["export"]
        for text, (wanted, member) in parts.items():
            if wanted == name:
                yield text, _resolve(keys[text], storage.join(export, member) if member else export, config)


def _preset_and_member(text: str) -> tuple[str, str]:
    """What "preset:NAME" or "preset:NAME/MEMBER" says; a name may be a file's, which holds slashes itself.

    >>> _preset_and_member("preset:autoencoder_variants/kl"), _preset_and_member("preset:/a/b.yaml/kl")
    (('autoencoder_variants', 'kl'), ('/a/b.yaml', 'kl'))
    """
    name, suffix, member = text.removeprefix("preset:").partition(".yaml")
    if suffix:
        return name + suffix, member.lstrip("/")
    name, _, member = name.partition("/")
    return name, member


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


def _classes_of(members: Iterable[Any]) -> tuple[str, ...] | None:
    """The captions that all members with classes know; None where none has classes."""
    named = [classes for member in members if (classes := getattr(member, "classes", None)) is not None]
    return tuple(name for name in named[0] if all(name in others for others in named)) if named else None


def sample_spec(config: TrainConfig, inputs: Path) -> SampleSpec:
    """How samples become batches in this run."""
    data = config.data
    members = members_of(config.objective).values()
    told = [condition for member in members if (condition := getattr(member, "image_condition", None)) is not None]
    arrays, image_size = sample_arrays(config, inputs)
    spec = SampleSpec(
        image_size,
        data.crop,
        data.horizontal_flip,
        data.caption if getattr(config.objective, "conditional", False) else None,
        condition_image=next((condition.member for condition in told if condition.kind == "member"), None),
        sizes=any(getattr(member, "size_conditioning", False) for member in members),
        arrays=arrays,
        label=next((label for member in members if (label := getattr(member, "label", None)) is not None), None),
        image=data.image,
        classes=_classes_of(members),
    )
    tokenizer = inputs / "tokenizer"
    if not tokenizer.is_dir():
        return spec
    from genmodels.text.tokenizer import load, tokenizer_json

    loaded = load(tokenizer)
    return replace(
        spec,
        caption=data.caption,
        tokenizer_json=tokenizer_json(tokenizer),
        token_length=loaded.model_max_length,
        pad_token_id=loaded.pad_token_id,
    )
