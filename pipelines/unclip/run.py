"""The driver of all stages of unCLIP: train, encode, train, join, register.

Every part is done once: a finished stage says so, a shard with embeddings is not encoded again, and a joined model is
the same version again. So the same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from genmodels.unclip.layout import INDEX
from infra import storage, tracking
from infra.errors import BadRequest
from pipelines.data.index import load_index
from pipelines.encoding import REQUEST, Encoders, encode, open_clip
from pipelines.training.clip import place_clip
from pipelines.training.config import TrainConfig, logged
from pipelines.training.embeddings import embedding_member, read_encoders
from pipelines.training.launch import draw_demo, git_commit, train
from pipelines.training.lease import Lease
from pipelines.training.run_folder import RunFolder, root_of
from pipelines.unclip.config import Stages, UnclipConfig, clip_folder

Train = Callable[[str, TrainConfig, str], dict[str, Any]]
"""Trains a stage: its name, its configuration, and the MLflow run that it is a part of; returns its summary."""


def train_one(name: str, config: TrainConfig, parent_run: str) -> dict[str, Any]:
    """Train a stage, and say which one it is where it fails."""
    try:
        return train(config, parent_run=parent_run)
    except BadRequest as error:
        raise BadRequest(f"{name}: {error}") from error


def train_stages(stages: Stages, train_stage: Train = train_one) -> dict[str, Any]:
    """Train, or go on with, all stages; join them and register the model. Returns the summary.

    Raises:
        BadRequest: a stage cannot be trained as it is asked for, or stages do not fit.
        RunFailed: a training failed.
    """
    began, config = time.time(), stages.config
    first = next(iter(stages.trainings.values()))
    root = root_of(first)
    storage.check_access(root, write=True)
    uri = tracking.check_tracking(first.tracking.uri)
    folder = RunFolder(storage.join(root, config.name))
    if storage.exists(folder.path("checkpoints")):
        raise BadRequest(f"{folder.url} is the folder of a training: give all stages another name=")
    with Lease(folder):
        run_id = _open_tracking(config, folder, uri)
        try:
            done: dict[str, dict[str, Any]] = {}
            encoded: list[dict[str, Any]] = []
            if config.trained_clip is not None:
                encoded = _encode_by_trained(stages, uri)
            for name, training in stages.trainings.items():
                draw_demo(training)
                done[name] = train_stage(name, training, run_id)
                if name == "clip":
                    source = training.data
                    encoded = encode_for(stages, done["clip"]["export"], source.url, source.validation_url)
            summary = _publish(stages, folder, uri, run_id, done)
        except BaseException:
            tracking.finish_run(uri, run_id, "FAILED")
            raise
        tracking.finish_run(uri, run_id, "FINISHED")
    outcomes = {name: each["outcome"] for name, each in done.items()}
    return {**summary, "outcomes": outcomes, "encoded": encoded, "stages": done, "seconds": time.time() - began}


def _encode_by_trained(stages: Stages, uri: str) -> list[dict[str, Any]]:
    """Put the CLIP that is trained already where the stages look for it, and write the shards with its embeddings."""
    given, first = stages.config.trained_clip, next(iter(stages.trainings.values()))
    assert given is not None
    for training in stages.trainings.values():
        draw_demo(training)
    index = load_index(given.data_url, storage.join(str(storage.run_root()), "index"))
    asked = given.model_dump(include={"path", "caption", "samples"})
    try:
        own = place_clip(asked, clip_folder(stages.config, first), root_of(first), uri, index)
    except BadRequest as error:
        raise BadRequest(f"trained_clip: {error}") from None
    return encode_for(stages, own, given.data_url, given.validation_url)


def encode_for(stages: Stages, clip: str, url: str, validation_url: str | None) -> list[dict[str, Any]]:
    """Write the shards with embeddings that stages read, by the CLIP in a folder, of shards with images."""
    wanted: dict[str, str] = {}  # new shards: of which
    for training in stages.trainings.values():
        if embedding_member(training.objective) is None:
            continue
        for new, old in ((training.data.url, url), (training.data.validation_url, validation_url)):
            if new is not None and old is not None and new != old:
                wanted[new] = old
    if not wanted:
        return []
    config = stages.config
    encoders = Encoders(open_clip(clip), None, 0, tuple(config.keep))
    done = []
    for new, old in wanted.items():
        if (known := _suffices(new, old, encoders)) is None:
            again = _made_of(new, old, encoders, config.name)
            known = encode(old, new, encoders, config.actors, config.gpus, again, config.name)
        done.append(known)
    return done


def _suffices(new: str, old: str, encoders: Encoders) -> dict[str, Any] | None:
    """What `encode` would say of a folder that was written by `encode_latents.py` with all that is wanted, or more."""
    known, made = _request(new), read_encoders(new)
    if known is None or known.get("of") != _digest(old) or not set(encoders.keep) <= set(known.get("keep", ())):
        return None
    if any(made.get(member, {}).get("digest") != each["digest"] for member, each in encoders.describe().items()):
        return None
    index = load_index(new, storage.join(str(storage.run_root()), "index"))
    shards = len(index.names)
    return {"url": new, "samples": index.samples, "shards": shards, "written": 0, "index_digest": index.digest}


def _made_of(new: str, old: str, encoders: Encoders, name: str) -> bool:
    """Whether a folder holds what this very job made of the same shards with another CLIP: it needs that no more."""
    known = _request(new)
    if known is None or known.get("by") != name:
        return False
    same_way = known.get("keep") == list(encoders.keep) and not known.get("half")
    return bool(known.get("of") == _digest(old) and same_way and known["encoders"].keys() == encoders.describe().keys())


def _request(folder: str) -> dict[str, Any] | None:
    path = storage.join(folder, REQUEST)
    return json.loads(storage.read_bytes(path)) if storage.exists(path) else None


def _digest(url: str) -> str:
    return load_index(url, storage.join(str(storage.run_root()), "index")).digest


def _open_tracking(config: UnclipConfig, folder: RunFolder, uri: str) -> str:
    known = folder.read("run.json") or {}
    params = logged(json.loads(config.model_dump_json()))
    tags = {"git_commit": git_commit(), "run_folder": folder.url, "pipeline": "unclip"}
    run_id = tracking.start_run(uri, config.experiment, config.name, known.get("mlflow_run_id"), params, tags)
    folder.write("run.json", {"mlflow_run_id": run_id, "tracking_uri": uri})
    return run_id


def _publish(
    stages: Stages, folder: RunFolder, uri: str, run_id: str, done: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Join the exports and register the model; the folder of a joined model is named by what it was joined of."""
    from genmodels.unclip.join import join
    from infra.exports import folder_digest
    from infra.registry import register_export, resolve_model

    config = stages.config
    exports = {name: resolve_model(each["export"]) for name, each in done.items()}
    digests = {name: folder_digest(export) for name, export in exports.items()}
    drawing = json.loads(config.drawing.model_dump_json(exclude_none=True))
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / "unclip"
        try:
            index = join(
                local,
                {name: exports[name] for name in config.priors},
                exports["decoder"],
                {name: exports[name] for name in config.upsamplers},
                drawing,
            )
        except ValueError as error:
            raise BadRequest(f"the stages do not fit one another: {error}") from None
        export = folder.path("export", folder_digest(local)[:16])
        if not storage.exists(storage.join(export, INDEX)):
            content = (local / INDEX).read_bytes()
            (local / INDEX).unlink()
            storage.upload_folder(local, export)
            storage.write_bytes(storage.join(export, INDEX), content)  # last: it says that all is there
    first = next(iter(done))  # the CLIP, or of a cascade the decoder
    samples = done[first]["samples"]
    summary = {
        "name": config.name,
        "folder": folder.url,
        "export": export,
        "tracking_uri": uri,
        "mlflow_run_id": run_id,
        "model_uri": None,
        "clip": index["clip"],
        "samples": samples,
        "index_digest": done[first]["index_digest"],
    }
    if config.register_as is not None:
        facts = {
            "description": "A cascade: its stages draw pictures from sentences.",
            "layout": "own",
            "parts": ", ".join(done),
            "data": {
                "url": stages.trainings[first].data.url,
                "samples": samples,
                "index digest": summary["index_digest"],
            },
            "figures": {
                f"{name}: {key}": value
                for name, each in done.items()
                for key, value in each["figures"].items()
                if key.startswith("val_")
            },
            "sampling": index["drawing"]["decoder"],
        }
        lineage = {
            "index_digest": summary["index_digest"],
            "git_commit": git_commit(),
            **({} if index["clip"] is None else {"clip_digest": index["clip"]["digest"]}),
            "run_folder": folder.url,
            **{f"parent.{name}": f"{done[name]['model_uri'] or done[name]['export']} {digests[name]}" for name in done},
        }
        summary["model_uri"] = register_export(
            uri, run_id, resolve_model(export), config.register_as, facts, _all_yaml(stages), lineage
        )
    folder.write("result.json", summary)
    return summary


def _all_yaml(stages: Stages) -> str:
    """The configuration of all stages, for whoever opens the model."""
    trainings = {name: json.loads(each.model_dump_json()) for name, each in stages.trainings.items()}
    return yaml.safe_dump({"unclip": json.loads(stages.config.model_dump_json()), "stages": trainings}, sort_keys=False)
