"""The CLIP that a run stands on, whoever trained it, with the statistics of its embeddings."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import BadRequest
from pipelines.data.fixed import read_fixed
from pipelines.data.index import DatasetIndex
from pipelines.data.spec import ArraySpec, SampleSpec
from pipelines.training.config import TrainConfig
from pipelines.training.embeddings import clip_reference, embedding_member
from pipelines.training.export import find_export, resolve_reference

if TYPE_CHECKING:
    from genmodels.clip.frozen import FrozenClip
    from genmodels.clip.statistics import EmbeddingStatistics

_AT_ONCE = 64


def open_clip(reference: str, tracking_uri: str | None, scratch: Path) -> FrozenClip:
    """A CLIP of this project, named in any way, or of transformers: a folder or hub name.

    Args:
        reference: as the user wrote it.
        tracking_uri: for models:/NAME.
        scratch: folder that what comes from a hub is copied to; it has to stay while the CLIP is copied on.

    Raises:
        ValueError, OSError: there is none, or it is none.
    """
    from genmodels.clip.frozen import FrozenClip, fetch_clip
    from genmodels.clip.layout import is_transformers_clip

    root = str(storage.run_root())
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


def place_clip(
    reference: str, folder: str, tracking_uri: str | None, index: DatasetIndex, caption: str | None, count: int
) -> str:
    """Copy a trained CLIP, with the statistics of its embeddings on these samples where it came without, to `folder`
    once; returns what stages name it by.

    Raises:
        BadRequest: there is no such CLIP, another one is there, or its embeddings cannot be measured.
    """
    done = f"{folder}.digest"  # written last, beside it
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        try:
            clip = open_clip(reference, tracking_uri, scratch)
        except (OSError, ValueError) as error:
            raise BadRequest(f"{reference}: {' '.join(str(error).split())[:300]}") from None
        if storage.exists(done):
            known = storage.read_bytes(done).decode()
            if known != clip.digest:
                raise BadRequest(f"{folder} holds a CLIP of digest {known}, and {reference} has {clip.digest}: choose "
                                 "another name")  # fmt: skip
            return folder
        clip.save(scratch / "own")
        if clip.statistics is None:
            measure_statistics(clip, index, caption, count).save(scratch / "own")
        storage.upload_folder(scratch / "own", folder)
        storage.write_bytes(done, clip.digest.encode())
    return folder
