"""What `encode_latents.py` does: shards in, shards with embeddings and latents out, over Ray Data actors."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import storage
from infra.errors import BadRequest, RunFailed, check_summary, write_summary
from pipelines.data.decode import BadImage, decode_image
from pipelines.data.index import DatasetIndex, Location, load_index, write_index
from pipelines.data.made import begin, facts_of, make_over_ray, written
from pipelines.data.read import read_chunks
from pipelines.data.scan import ShardFacts
from pipelines.data.spec import SampleSpec
from pipelines.data.write import ShardBuffer
from pipelines.training.embeddings import ENCODERS, as_npy

if TYPE_CHECKING:
    from genmodels.autoencoder.codec import LatentCodec
    from genmodels.clip.frozen import FrozenClip

CLIP_MEMBER, LATENT_MEMBER = "clip.npy", "latent.npy"
REQUEST = "encoding.json"  # in the new folder from the start: what is being written there
_MOST_BAD = 0.01  # of the samples of a dataset whose image cannot be used


@dataclass(frozen=True)
class Encoders:
    """What is applied to each image, and how it is stored; sent to every actor.

    Args:
        clip, autoencoder: one of them at least.
        image_size: of what the autoencoder sees; not read without one.
        keep: members that are copied.
        half: store 16 bits a number.
        batch_size: images at once.
    """

    clip: FrozenClip | None
    autoencoder: LatentCodec | None
    image_size: int
    keep: tuple[str, ...]
    half: bool = False
    batch_size: int = 64

    def describe(self) -> dict[str, dict[str, Any]]:
        """Which models make which member: what training compares with its own."""
        described: dict[str, dict[str, Any]] = {}
        if self.clip is not None:
            described[CLIP_MEMBER] = {"shape": [self.clip.embedding_dim], **self.clip.describe()}
        if self.autoencoder is not None:
            shape = list(self.autoencoder.moments_shape(self.image_size))
            described[LATENT_MEMBER] = {
                "shape": shape,
                "digest": self.autoencoder.digest,
                "image_size": self.image_size,
            }
        return described


def encode_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Carry out what the arguments of `encode_latents.py` ask for; returns and writes the summary.

    Raises:
        BadRequest: a model or the shards cannot be read, or OUT holds something else.
        RunFailed: too many images cannot be used.
    """
    if not arguments.clip and not arguments.autoencoder:
        raise BadRequest("name --clip MODEL, --autoencoder MODEL or both: there is nothing to encode with")
    if arguments.autoencoder and not arguments.image_size:
        raise BadRequest("--autoencoder needs --image-size: the size of the images that it sees, in pixels")
    if arguments.batch_size < 1 or (arguments.actors is not None and arguments.actors < 1):
        raise BadRequest("--batch-size and --actors must be 1 or more")
    check_summary(arguments.summary)
    encoders = Encoders(
        clip=open_clip(arguments.clip, arguments.tracking_uri) if arguments.clip else None,
        autoencoder=_open_autoencoder(arguments.autoencoder, arguments.tracking_uri) if arguments.autoencoder else None,
        image_size=arguments.image_size or 0,
        keep=tuple(part for part in arguments.keep.split(",") if part),
        half=arguments.half,
        batch_size=arguments.batch_size,
    )
    summary = encode(
        _absolute(arguments.data),
        _absolute(arguments.out),
        encoders,
        arguments.actors,
        arguments.gpus,
        arguments.overwrite,
    )
    write_summary(arguments.summary, summary)
    print(
        f"{summary['samples']} samples in {summary['shards']} shards at {summary['url']} "
        f"({summary['written']} written now)"
    )
    return summary


def encode(
    data: str,
    out: str,
    encoders: Encoders,
    actors: int | None = None,
    gpus: bool = False,
    overwrite: bool = False,
    by: str | None = None,
) -> dict[str, Any]:
    """Write to `out` the shards of `data` with what `encoders` make of their images; goes on where it was interrupted.

    Args:
        data, out: absolute paths or URLs.
        encoders: what to write.
        actors: processes side by side [one for each GPU, or core].
        gpus: one GPU for each.
        overwrite: where `out` was written by another request.
        by: the job whose shards they are; noted beside them.

    Raises:
        BadRequest, RunFailed: see `encode_shards`.
    """
    index = load_index(data, storage.join(str(storage.run_root()), "index"))
    folder = Location.parse(out).folder
    if folder == index.url:
        raise BadRequest("the new shards need a folder of their own: name another OUT")
    request = {
        "of": index.digest,
        "encoders": encoders.describe(),
        "keep": list(encoders.keep),
        "half": encoders.half,
    }
    request = json.loads(json.dumps(request))
    begin(folder, REQUEST, request, overwrite, "encode_latents.py", also=(ENCODERS,), by=by)
    names = [new_name(name) for name in index.names]
    if len(set(names)) < len(names):
        raise BadRequest(
            f"{data}: shards in different folders have names that cannot stand beside each other: rename one"
        )
    written_before = {name: written(folder, name, index.chunk_samples) for name in names}
    done = {name: scan.facts for name, scan in written_before.items() if scan is not None}
    bad = sum(len(scan.flaws) for scan in written_before.values() if scan is not None)
    missing = [shard for shard, name in enumerate(names) if name not in done]
    if missing:
        rows, samples = [{"shard": shard} for shard in missing], int(index.shard_samples[missing].sum())
        shared = (index, folder, encoders)
        for made, facts in make_over_ray(rows, ShardEncoder, shared, folder, "encoding", samples, actors, gpus):
            done[made["name"]], bad = facts, bad + made["bad"]
    if bad > max(3, _MOST_BAD * index.samples):
        raise RunFailed(f"{bad} of {index.samples} images of {data} cannot be used: run training on it, which says why")
    storage.write_bytes(storage.join(folder, ENCODERS), json.dumps(encoders.describe(), indent=2).encode())
    new_index = write_index(Location(folder, "*.tar"), folder, done, index.chunk_samples)
    return {
        "url": folder,
        "samples": new_index.samples,
        "shards": len(new_index.names),
        "written": len(missing),
        "without_arrays": bad,
        "index_digest": new_index.digest,
        "encoders": encoders.describe(),
    }


def open_clip(reference: str, tracking_uri: str | None = None) -> FrozenClip:
    """See `pipelines.training.clip.open_clip`. Raises BadRequest."""
    from pipelines.training import clip

    try:
        with tempfile.TemporaryDirectory() as temporary:
            return clip.open_clip(reference, tracking_uri, Path(temporary))
    except (OSError, ValueError) as error:
        raise BadRequest(f"--clip {reference}: {' '.join(str(error).split())[:300]}") from None


def _open_autoencoder(reference: str, tracking_uri: str | None) -> LatentCodec:
    from genmodels.autoencoder.codec import LatentCodec
    from pipelines.training.export import resolve_reference

    folder = resolve_reference(reference, str(storage.run_root()), tracking_uri, finished=True)
    nested = folder / "vae"
    try:
        return LatentCodec.from_folder(nested if nested.is_dir() else folder)
    except ValueError as error:
        raise BadRequest(f"--autoencoder {reference}: {error}") from None


def _absolute(url: str) -> str:
    from pipelines.training.config import absolute_url

    try:
        return str(absolute_url(url))
    except ValueError as error:
        raise BadRequest(str(error)) from None


def new_name(name: str) -> str:
    """What a shard is called in the new folder, which has no folders in it: a/b.tar is a--b.tar there."""
    return name.replace("/", "--")


class ShardEncoder:
    """One actor: reads a shard, encodes its images, writes the new shard."""

    def __init__(self, shared: list[Any]) -> None:
        import ray
        import torch

        cuda = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        if not cuda:
            torch.set_num_threads(1)
        self._device = torch.device("cuda" if cuda else "cpu")
        self._index, self._folder, self._encoders = ray.get(shared[0])
        for network in (self._encoders.clip, self._encoders.autoencoder):
            if network is not None:
                network.to(self._device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        name, facts, bad = encode_shard(self._index, int(batch["shard"][0]), self._folder, self._encoders, self._device)
        return facts_of(facts, name=name, bad=bad)


def encode_shard(
    index: DatasetIndex, shard: int, folder: str, encoders: Encoders, device: Any
) -> tuple[str, ShardFacts, int]:
    """Write one new shard: its name, its facts, and how many samples have no arrays, since their image is bad."""
    buffer, bad, name = ShardBuffer(), 0, new_name(index.names[shard])
    for chunk in range(-(-int(index.shard_samples[shard]) // index.chunk_samples)):
        read = read_chunks(index, [(shard, chunk)])[shard, chunk]
        if read.reason:
            raise OSError(f"shard {index.shard_url(shard)}, chunk {chunk}: {read.reason}")
        members = [read.members(place) for place in range(len(read.samples))]
        for first in range(0, len(members), encoders.batch_size):
            arrays = _arrays(members[first : first + encoders.batch_size], encoders, device)
            for place, made in enumerate(arrays, first):
                sample, key = read.samples[place], read.samples[place].key
                if sample.flaw or made is None:
                    bad += 1
                    buffer.flaw(sample.flaw or "image: could not be used when the shard was encoded")
                    made = {}
                    if sample.flaw:  # perhaps a key that comes twice
                        key = f"{key}-unused-{chunk}-{place}"
                kept = {suffix: members[place][suffix] for suffix in encoders.keep if suffix in members[place]}
                if not {**kept, **made}:
                    kept = {"json": b"{}"}  # a sample without members would have no slot
                buffer.add(key, {**kept, **made})
    return name, buffer.write(folder, name, index.chunk_samples), bad


def _arrays(members: list[dict[str, bytes]], encoders: Encoders, device: Any) -> list[dict[str, bytes] | None]:
    """The new members of each sample; None for one whose image cannot be used."""
    import torch

    good = [True] * len(members)
    kind = np.float16 if encoders.half else np.float32
    made: list[dict[str, bytes]] = [{} for _ in members]
    networks: list[tuple[str, int, Any]] = []
    if encoders.clip is not None:
        networks.append((CLIP_MEMBER, encoders.clip.image_size, encoders.clip.embed_images))
    if encoders.autoencoder is not None:
        networks.append((LATENT_MEMBER, encoders.image_size, encoders.autoencoder.moments))
    for member, size, network in networks:
        pixels, spec = np.zeros((len(members), 3, size, size), np.uint8), SampleSpec(size)
        for row, sample in enumerate(members):
            encoded, _ = spec.choose_image(sample)
            try:
                if encoded is None:
                    raise BadImage("image: missing")
                decode_image(encoded, size, pixels[row])
            except BadImage:
                good[row] = False
        with torch.inference_mode():
            found = network(torch.from_numpy(pixels).to(device).float() / 127.5 - 1).cpu().numpy().astype(kind)
        for row, array in enumerate(found):
            made[row][member] = as_npy(array)
    return [arrays if usable else None for arrays, usable in zip(made, good, strict=True)]
