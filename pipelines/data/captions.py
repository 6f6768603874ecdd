"""Captions alone, without decoding an image: what a tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.data.fixed import spread_slots
from pipelines.data.index import DatasetIndex
from pipelines.data.read import read_chunks
from pipelines.data.spec import BadCaption, SampleSpec


def read_captions(index: DatasetIndex, spec: SampleSpec, count: int) -> Iterator[str]:
    """Up to `count` captions, spread evenly over the dataset; samples without a usable one are passed over."""
    slots = spread_slots(index, min(count, index.samples))
    by_chunk: dict[tuple[int, int], list[int]] = {}
    for shard, chunk, within in slots.tolist():
        by_chunk.setdefault((shard, chunk), []).append(within)
    for chunk_id, places in by_chunk.items():
        read = read_chunks(index, [chunk_id])[chunk_id]
        if read.reason:
            continue
        for place in places:
            sample = read.samples[place]
            members = {name: read.data[part.data : part.data + part.size] for name, part in sample.members.items()}
            try:
                yield spec.choose_caption(members, 0.5)
            except BadCaption:
                continue
