"""Captions alone, without decoding an image: what a tokenizer is trained on."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.progress import Progress

from pipelines.data.fixed import spread_slots
from pipelines.data.index import DatasetIndex
from pipelines.data.read import ChunkId, read_chunks
from pipelines.data.spec import BadCaption, SampleSpec

_CHUNKS_AT_ONCE = 32  # read side by side, and held in memory
_QUIET_SECONDS = 2.0  # a bar is shown where it takes longer


def read_captions(index: DatasetIndex, spec: SampleSpec, count: int) -> Iterator[str]:
    """Up to `count` captions, spread evenly over the dataset; samples without a usable one are passed over.

    Raises OSError where a shard cannot be read.
    """
    slots = spread_slots(index, min(count, index.samples))
    places: dict[ChunkId, list[int]] = {}  # in the order of the shards
    for shard, chunk, within in slots.tolist():
        places.setdefault((shard, chunk), []).append(within)
    chunk_ids = list(places)
    progress, shown, began = Progress(transient=True), False, time.monotonic()
    bar = progress.add_task("reading captions", total=len(chunk_ids))
    try:
        for first in range(0, len(chunk_ids), _CHUNKS_AT_ONCE):
            group = chunk_ids[first : first + _CHUNKS_AT_ONCE]
            chunks = read_chunks(index, group)
            for chunk_id in group:
                read = chunks[chunk_id]
                if read.reason:
                    continue
                for place in places[chunk_id]:
                    try:
                        yield spec.choose_caption(read.members(place), 0.5)
                    except BadCaption:
                        continue
            if not shown and time.monotonic() - began > _QUIET_SECONDS:
                progress.start()
                shown = True
            progress.advance(bar, len(group))
    finally:
        if shown:
            progress.stop()
