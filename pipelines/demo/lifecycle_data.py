"""The shards of the lifecycle demo: what is there at first, what arrives later, and what somebody mislabelled."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator

import numpy as np
from PIL import Image

from pipelines.data.scan import CHUNK_SAMPLES
from pipelines.data.write import ShardBuffer
from pipelines.demo.digits import draw_split

SIZE = 16
_SHARD_SAMPLES = 1000


def write_arrival(
    url: str,
    name: str,
    split: str,
    digits: Collection[int],
    repeats: int,
    seed: int = 0,
    wrong_captions: bool = False,
) -> int:
    """Add shards NAME-00000.tar, … to a folder of shards; returns how many samples they hold.

    Args:
        url: folder, local or s3://; shards that are there already stay.
        split: of the demo's digits, `train` or `held_out`; only those of `digits`, each `repeats` times.
        wrong_captions: each picture gets the caption of another one, drawn at random.
    """
    samples = [sample for sample in draw_split(split, SIZE, repeats, seed) if sample[3]["digit"] in digits]
    captions = [sample[2] for sample in samples]
    if wrong_captions:
        captions = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    buffer, shards = ShardBuffer(), 0
    for members in _encoded(samples, captions, name):
        buffer.add(*members)
        if buffer.samples == _SHARD_SAMPLES:
            buffer.write(url, f"{name}-{shards:05d}.tar", CHUNK_SAMPLES)
            buffer, shards = ShardBuffer(), shards + 1
    if buffer.samples:
        buffer.write(url, f"{name}-{shards:05d}.tar", CHUNK_SAMPLES)
    return len(samples)


def _encoded(samples: list, captions: list[str], name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    for (key, pixels, _, facts), caption in zip(samples, captions, strict=True):
        image = io.BytesIO()
        Image.fromarray(pixels).save(image, "PNG")
        members = {"png": image.getvalue(), "txt": caption.encode(), "json": json.dumps(facts).encode()}
        yield f"{name}-{key}", members
