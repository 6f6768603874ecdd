"""The CLIP that a run stands on, whoever trained it, with the statistics of its embeddings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genmodels.families import members_of
from infra import storage
from infra.errors import BadRequest
from pipelines.data.fixed import read_fixed
from pipelines.data.index import DatasetIndex, load_index
from pipelines.data.spec import ArraySpec, SampleSpec
from pipelines.training.config import TrainConfig
from pipelines.training.embeddings import clip_reference, embedding_member
from pipelines.training.export import find_export, resolve_reference
from pipelines.training.run_folder import RunFolder

if TYPE_CHECKING:
    from genmodels.clip.frozen import FrozenClip
    from genmodels.clip.statistics import EmbeddingStatistics

_AT_ONCE = 64


def open_clip(reference: str, tracking_uri: str | None, scratch: Path, root: str | None = None) -> FrozenClip:
    """A CLIP of this project, named in any way, or of transformers: a folder or hub name.

    Args:
        reference: as the user wrote it.
        tracking_uri: for models:/NAME.
        scratch: folder that what comes from a hub is copied to; it has to stay while the CLIP is copied on.
        root: of runs that the reference may name [the run root].

    Raises:
        ValueError, OSError: there is none, or it is none.
    """
    from genmodels.clip.frozen import FrozenClip, fetch_clip
    from genmodels.clip.layout import is_transformers_clip

    root = root or str(storage.run_root())
    local = Path(reference).expanduser()
    ours = reference.startswith("models:") or storage.is_remote(reference) or find_export(reference, root) is not None
    if ours or (local.is_dir() and not is_transformers_clip(local)):
        return FrozenClip.from_folder(resolve_reference(reference, root, tracking_uri, finished=True))
    if local.is_dir():
        return FrozenClip.from_folder(local)
    fetch_clip(reference, scratch / "clip")
    return FrozenClip.from_folder(scratch / "clip")


def complete_clip(objective: Any, config: TrainConfig, index: DatasetIndex, inputs: Path) -> None:
    """Put a prior's tokenizer, its CLIP's, in its place; and measure how the embeddings of a CLIP are distributed that
    came without, on samples of this run. Raises BadRequest where they cannot be measured."""
    if clip_reference(objective) is None:
        return
    from genmodels.clip.frozen import FrozenClip
    from genmodels.text.tokenizer import save

    clip = FrozenClip.from_folder(inputs / "clip")
    if isinstance(getattr(objective, "clip", None), str):  # the priors read captions as their CLIP does
        save(clip.tokenizer, inputs / "tokenizer")
    if clip.statistics is None:
        member, caption = embedding_member(objective), config.data.caption
        measure_statistics(clip, index, caption, config.run.finish_samples, member).save(inputs / "clip")


def measure_statistics(
    clip: FrozenClip, index: DatasetIndex, caption: str | None, count: int, member: str | None = None
) -> EmbeddingStatistics:
    """How the embeddings of a CLIP are distributed on `count` samples, always the same ones.

    Args:
        clip: whose embeddings.
        index: of the shards.
        caption: where the captions are, see `SampleSpec`.
        count: samples.
        member: of the samples, with the image's embedding; None: images are embedded.

    Raises:
        BadRequest: fewer than two samples can be used.
    """
    import torch

    from genmodels.clip.statistics import EmbeddingStatistics

    print(f"measuring the embeddings of the CLIP on {min(count, index.samples)} samples", flush=True)
    if member is None:
        spec = SampleSpec(clip.image_size, caption=caption)
    else:
        spec = SampleSpec(0, caption=caption, arrays=(ArraySpec("image_embeddings", member, (clip.embedding_dim,)),))
    images, texts, reasons = [torch.empty(0, clip.embedding_dim)], [torch.empty(0, clip.embedding_dim)], []
    for batch in read_fixed(index, spec, count, _AT_ONCE):
        good = batch["weight"] > 0
        reasons += [reason for reason in batch["reasons"] if reason]
        if not good.any():
            continue
        if member is None:
            images.append(clip.embed_images(batch["images"][good].float() / 127.5 - 1))
        else:
            images.append(batch["image_embeddings"][good])
        captions = [text for text, kept in zip(batch["captions"], good.tolist(), strict=True) if kept]
        texts.append(clip.read_texts(clip.tokens(captions))[2])
    try:
        return EmbeddingStatistics.measure(torch.cat(images), torch.cat(texts))
    except ValueError as error:
        why = f"; the first that cannot be used: {reasons[0]}" if reasons else ""
        raise BadRequest(f"the embeddings of the CLIP cannot be measured on {index.url}: {error}{why}") from None


def check_labels(config: TrainConfig, index: DatasetIndex, folder: RunFolder) -> None:
    """Raise BadRequest where no sample has a label that classification could be measured with."""
    data = config.data
    for name, member in members_of(config.objective).items():
        for section in ("zero_shot", "semi_supervised"):
            asked = getattr(member, section, None)
            if asked is None or (section == "semi_supervised" and data.validation_url is None):
                continue  # few of the training's samples may have a label
            if data.validation_url is not None:
                index = load_index(data.validation_url, folder.path("index"))
            spec = SampleSpec(member.image_size, caption=None, label=asked.label, image=data.image)
            found = {label for batch in read_fixed(index, spec, _AT_ONCE, _AT_ONCE) for label in batch["labels"]}
            if not found & {*asked.classes}:
                key = f"objective.members.{name}.{section}" if name else f"objective.{section}"
                seen = ", ".join(sorted(found - {""})[:5]) or "none"
                raise BadRequest(
                    f"{key}: of {_AT_ONCE} samples none has one of its classes at label {asked.label}: {seen} there"
                )


def place_clip(asked: Mapping[str, Any], folder: str, root: str, tracking_uri: str | None, index: DatasetIndex) -> str:
    """Copy a trained CLIP, with the statistics of its embeddings on these samples where it came without, to `folder`
    once; returns what stages name it by.

    Args:
        asked: "path" of the CLIP, and "caption" and "samples" to measure it with.
        folder: new; where it stays.
        root: of runs that `path` may name.
        tracking_uri: for models:/NAME.
        index: of shards with images.

    Raises:
        BadRequest: there is no such CLIP, another was copied before, or its embeddings cannot be measured.
    """
    done = f"{folder}.json"  # written last, beside it
    wanted = {**asked, "index_digest": index.digest}
    if storage.exists(done):
        known = json.loads(storage.read_bytes(done))
        if different := [key for key in wanted if known.get(key) != wanted[key]]:
            told = "; ".join(f"{key}: {known.get(key)} → {wanted[key]}" for key in different)
            raise BadRequest(f"{folder} was copied for another request ({told}): undo that, or choose another name")
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        try:
            clip = open_clip(str(asked["path"]), tracking_uri, scratch, root)
        except (OSError, ValueError) as error:
            raise BadRequest(f"{asked['path']}: {' '.join(str(error).split())[:300]}") from None
        clip.save(scratch / "own")
        if clip.statistics is None:
            measure_statistics(clip, index, asked["caption"], asked["samples"]).save(scratch / "own")
        storage.remove(folder)  # of an attempt that was not completed
        storage.upload_folder(scratch / "own", folder)
        storage.write_bytes(done, json.dumps(wanted, indent=2).encode())
    return folder
