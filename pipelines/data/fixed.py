"""The same samples every time, for validation and previews, read without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.data.batch import RankBatch, to_batch
from pipelines.data.index import DatasetIndex
from pipelines.data.read import build_batch, read_chunks
from pipelines.data.seeds import sample_seeds
from pipelines.data.spec import SampleSpec

_HELD_OUT_LANE = -1  # no lane of a training order, so seeds differ from training's


def spread_slots(index: DatasetIndex, count: int) -> NDArray[np.int64]:
    """`count` slots (shard, chunk, place), in order, from chunks evenly spaced over the dataset."""
    per_shard = -(-index.shard_samples // index.chunk_samples)
    first_chunk = np.cumsum(per_shard) - per_shard
    total = int(per_shard.sum())
    # Not more chunks than needed for variety: each is a read.
    chunks = min(total, count, max(64, -(-count // index.chunk_samples)))
    while True:
        number = np.arange(chunks) * total // chunks
        shard = np.searchsorted(first_chunk, number, side="right") - 1
        while (empty := per_shard[shard] == 0).any():  # shards without samples share their start with the next
            shard = shard - empty
        chunk = number - first_chunk[shard]
        sizes = np.minimum(index.chunk_samples, index.shard_samples[shard] - chunk * index.chunk_samples)
        if sizes.sum() >= count or chunks == total:
            break
        chunks = min(total, chunks + 1 + chunks // 8)
    taken = np.arange(count) * int(sizes.sum()) // count
    which = np.searchsorted(np.cumsum(sizes), taken, side="right")
    return np.stack([shard[which], chunk[which], taken - (np.cumsum(sizes) - sizes)[which]], axis=1)


def fixed_batches(
    index: DatasetIndex, spec: SampleSpec, count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[RankBatch]:
    """All of `read_fixed` at once."""
    return list(read_fixed(index, spec, count, batch_size, rank, world_size))


def read_fixed(
    index: DatasetIndex, spec: SampleSpec, count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[RankBatch]:
    """The rank's part of `count` samples spread evenly over a dataset, always the same ones, read in this process.

    For validation and previews: centre crop, no flip, seeds from the sample's number alone, so that all ranks together
    hold the same samples at any world size. Ranks hold neighbouring parts of equal length, padded with weight 0; every
    rank gets the same number of batches, of `batch_size` (the last one may be smaller). At most the whole dataset.
    """
    count = min(count, index.samples)
    if count < 1:
        return
    slots = spread_slots(index, count)
    share = -(-count // world_size)
    numbers = np.arange(rank * share, (rank + 1) * share)
    real = numbers < count
    numbers = np.minimum(numbers, count - 1)
    plain = replace(spec, crop="center", horizontal_flip=False)
    for first in range(0, share, batch_size):
        mine = numbers[first : first + batch_size]
        chunks = read_chunks(index, {(int(shard), int(chunk)) for shard, chunk, _ in slots[mine]})
        table = build_batch(
            index, plain, chunks, slots[mine], sample_seeds(0, _HELD_OUT_LANE, mine), first // batch_size
        )
        batch = to_batch(table, plain)
        batch["weight"] *= torch.from_numpy(real[first : first + batch_size].astype(np.float32))
        yield batch
