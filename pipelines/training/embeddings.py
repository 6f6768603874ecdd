"""What a run reads of a CLIP: embeddings, and an autoencoder's latents, from the shards, or images to make them of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from genmodels.clip.layout import clip_sizes
from genmodels.families import members_of
from infra import storage
from infra.errors import BadRequest
from pipelines.data.index import Location
from pipelines.data.spec import ArraySpec
from pipelines.training.config import TrainConfig

ENCODERS = "encoders.json"  # beside shards: which models made the arrays in them
_TOLD_ARRAYS = ("image_embeddings", "latent_moments")


def clip_reference(objective: Any) -> tuple[str, str] | None:
    """The key, within its section, that names the CLIP of an objective, and what it names; None where there is none."""
    if isinstance(reference := getattr(objective, "clip", None), str):
        return "clip", reference
    embedding = getattr(objective, "image_embedding", None)
    return None if embedding is None else ("image_embedding.clip", embedding.clip)


def embedding_member(objective: Any) -> str | None:
    """The member of the shards with the embeddings of images; None where they are made as the images come."""
    embedding = getattr(objective, "image_embedding", None)
    return getattr(objective, "embedding_member", None) if embedding is None else embedding.member


def sample_arrays(config: TrainConfig, inputs: Path) -> tuple[tuple[ArraySpec, ...], int]:
    """What arrays are read of each sample, and the size of its image: 0 where none is needed, and where a CLIP sees the
    images at least as large as it wants them."""
    arrays: dict[str, ArraySpec] = {}
    sizes = [0]
    for name, member in members_of(config.objective).items():
        own, size = _member_arrays(name, member, inputs / name)
        sizes.append(size)
        for array in own:
            if arrays.setdefault(array.name, array) != array:
                raise BadRequest(f"objective.members read different {array.member}: give all of them the same")
    if config.evaluation.every or not arrays:
        sizes.append(config.objective.image_size)
    if max(sizes) > config.objective.image_size:
        for name, member in members_of(config.objective).items():
            if clip_reference(member) is None:  # it would be trained on images that are too large
                raise BadRequest(
                    f"objective.members.{name}: the CLIP of another member reads images of {max(sizes)} pixels, and "
                    f"this one of {member.image_size}: read embeddings from shards (member), or train them apart"
                )
    return tuple(arrays[name] for name in _TOLD_ARRAYS if name in arrays), max(sizes)


def _member_arrays(name: str, member: Any, inputs: Path) -> tuple[list[ArraySpec], int]:
    arrays: list[ArraySpec] = []
    stored = embedding_member(member)
    reads_images, size = True, member.image_size
    if clip_reference(member) is not None:
        known = clip_sizes(inputs / "clip")
        if stored is not None:
            arrays.append(ArraySpec("image_embeddings", stored, (known.embedding_dim,)))
            reads_images = getattr(member, "image_embedding", None) is not None  # a prior's samples are embeddings
        elif getattr(member, "image_embedding", None) is not None:
            size = max(size, known.image_size)
    if (latents := getattr(member, "latent_member", None)) is not None:
        from genmodels.autoencoder.codec import LatentCodec

        shape = LatentCodec.from_folder(inputs / "autoencoder").moments_shape(member.image_size)
        arrays.append(ArraySpec("latent_moments", latents, shape))
        reads_images = clip_reference(member) is not None and stored is None
    return arrays, size if reads_images else 0


def check_encoders(config: TrainConfig, inputs: Path) -> None:
    """Raise BadRequest where arrays in the shards were made by other models than this run has, with both digests."""
    wanted: dict[str, dict[str, Any]] = {}
    for name, member in members_of(config.objective).items():
        if (stored := embedding_member(member)) is not None:
            from genmodels.clip.frozen import FrozenClip

            clip = FrozenClip.from_folder(inputs / name / "clip")
            wanted[stored] = {"shape": [clip.embedding_dim], "digest": clip.digest}
        if (latents := getattr(member, "latent_member", None)) is not None:
            from genmodels.autoencoder.codec import LatentCodec

            codec = LatentCodec.from_folder(inputs / name / "autoencoder")
            wanted[latents] = {"shape": list(codec.moments_shape(member.image_size)), "digest": codec.digest}
    urls = {"data.url": config.data.url, "data.validation_url": config.data.validation_url}
    for key, url in urls.items():
        if url is None or not wanted:
            continue
        made = read_encoders(url)
        for stored, own in wanted.items():
            if stored not in made:
                raise BadRequest(
                    f"{key}: {url} has no {stored} (it has {', '.join(made) or 'no arrays'}): make them with "
                    "pipelines/encode_latents.py"
                )
            for what, value in own.items():
                if made[stored][what] != value:
                    raise BadRequest(
                        f"{key}: {stored} was made by another model: {what} is {made[stored][what]} there and "
                        f"{value} of this run's; encode the shards again, or name the model that made them"
                    )


def read_encoders(url: str) -> dict[str, dict[str, Any]]:
    """Which models made the arrays beside these shards, by member; empty where nobody says so."""
    path = storage.join(Location.parse(url).folder, ENCODERS)
    return dict(json.loads(storage.read_bytes(path))) if storage.exists(path) else {}


def as_npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy member."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
