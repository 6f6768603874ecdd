"""Reading: chunks fetched by one range read each, checked, parsed, decoded and packed as one Arrow table per step.

No torch here: a read task's process would need seconds to import it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra.storage import open_filesystem
from pipelines.data.decode import BadImage, decode_image
from pipelines.data.index import DatasetIndex
from pipelines.data.order import DataOrder
from pipelines.data.seeds import uniform
from pipelines.data.spec import BadCaption, SampleSpec
from pipelines.data.tar import BytesSource, DamagedTar, TarSample, group_samples, read_members

_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.2
_READS_AT_ONCE = 16

ChunkId = tuple[int, int]  # shard, chunk


@dataclass
class ReadChunk:
    """The samples of a chunk, in the shard's order; or the reason why none of them could be read."""

    data: bytes
    samples: list[TarSample]
    reason: str = ""


def _parse(data: bytes, flaws: dict[str, str], first: int, count: int) -> ReadChunk:
    try:
        samples = list(group_samples(read_members(BytesSource(data), whole=False)))
    except DamagedTar as error:
        return ReadChunk(b"", [], f"tar: {error}")
    if len(samples) != count:
        return ReadChunk(b"", [], f"tar: {len(samples)} samples where the index has {count}")
    for place, sample in enumerate(samples):
        sample.flaw = sample.flaw or flaws.get(str(first + place), "")
    return ReadChunk(data, samples)


def _fetch(index: DatasetIndex, wanted: list[ChunkId], done: dict[ChunkId, ReadChunk]) -> dict[ChunkId, str]:
    """Read chunks and check them; good ones go to `done`, the reasons for the others come back."""
    reasons: dict[ChunkId, str] = {}
    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:  # a sidecar that isn't in memory yet is a request of its own
        loading = {shard: threads.submit(index.sidecar, shard) for shard in {shard for shard, _ in wanted}}
    ranges: dict[ChunkId, list[int]] = {}
    for shard, chunk in wanted:
        try:
            ranges[shard, chunk] = loading[shard].result().chunks[chunk]
        except (OSError, ValueError, TypeError, IndexError) as error:
            reasons[shard, chunk] = f"sidecar: {error}"
    filesystem, root = open_filesystem(index.url)
    answers = filesystem.cat_ranges(
        [f"{root}/{index.names[shard]}" for shard, _ in ranges],
        [offset for offset, *_ in ranges.values()],
        [offset + length for offset, length, *_ in ranges.values()],
        on_error="return",
        batch_size=_READS_AT_ONCE,
    )
    for ((shard, chunk), (_, length, count, crc32)), answer in zip(ranges.items(), answers):
        if isinstance(answer, BaseException):
            reasons[shard, chunk] = f"read: {' '.join(str(answer).split())[:200] or type(answer).__name__}"
        elif len(answer) != length or zlib.crc32(answer) != crc32:
            reasons[shard, chunk] = "checksum: the shard's bytes are not those of the index"
        else:
            flaws = loading[shard].result().flaws
            done[shard, chunk] = _parse(answer, flaws, chunk * index.chunk_samples, count)
    return reasons


def read_chunks(index: DatasetIndex, wanted: Iterable[ChunkId]) -> dict[ChunkId, ReadChunk]:
    """Fetch chunks, each by one range read, and check each against the index before it is parsed.

    A failed or altered read is tried again, with waiting; what stays bad comes back as a chunk with a reason.
    """
    done: dict[ChunkId, ReadChunk] = {}
    reasons = _fetch(index, list(wanted), done)
    for attempt in range(1, _ATTEMPTS):
        if reasons:
            time.sleep(_BACKOFF_SECONDS * 4 ** (attempt - 1))
            reasons = _fetch(index, list(reasons), done)
    return done | {chunk_id: ReadChunk(b"", [], reason) for chunk_id, reason in reasons.items()}


def build_batch(
    index: DatasetIndex,
    spec: SampleSpec,
    chunks: dict[ChunkId, ReadChunk],
    slots: NDArray[np.int64],
    seeds: NDArray[np.int64],
    step: int,
) -> pa.Table:
    """Decode the samples at `slots` (n, 3) into a table of n rows, in order.

    Columns: image (3*S*S bytes, channels first), key `shard/key`, caption, weight (0 for a quarantined sample, whose
    image is zeros), seed, reason ("" for a good one), step, and, with a tokenizer, token_ids (int32 bytes).
    """
    count, size = len(slots), spec.image_size
    images = np.zeros((count, 3, size, size), np.uint8)
    tokens = np.zeros((count, spec.token_length), np.int32) if spec.tokenizer_json is not None else None
    place_x, place_y, flips = (uniform(seeds, purpose) for purpose in ("crop_x", "crop_y", "flip"))
    draws = uniform(seeds, "caption")
    keys, captions, reasons = [], [], []
    for row, (shard, chunk, within) in enumerate(slots.tolist()):
        source = chunks[shard, chunk]
        key, caption, reason = f"chunk{chunk}/sample{within}", "", source.reason
        if not reason:
            sample = source.samples[within]
            key, reason = sample.key, sample.flaw
        if not reason:
            members = {name: source.data[part.data : part.data + part.size] for name, part in sample.members.items()}
            place = (place_x[row], place_y[row]) if spec.crop == "random" else (0.5, 0.5)
            encoded, reason = spec.choose_image(members)
            try:
                if encoded is not None:
                    flip = spec.horizontal_flip and flips[row] < 0.5
                    decode_image(encoded, size, images[row], place, bool(flip))
                    caption = spec.choose_caption(members, draws[row]) if spec.caption else ""
            except (BadImage, BadCaption) as error:
                reason = str(error)
        if reason:
            images[row] = 0
        if tokens is not None:
            tokens[row] = spec.tokenize(caption)
        keys.append(f"{index.names[shard]}/{key}".encode("utf-8", "backslashreplace").decode())
        captions.append(caption)
        reasons.append(reason.encode("utf-8", "backslashreplace").decode())
    columns = {
        "image": _fixed_size(images.reshape(count, -1)),
        "key": pa.array(keys, pa.string()),
        "caption": pa.array(captions, pa.string()),
        "weight": pa.array(np.array([not reason for reason in reasons], np.float32)),
        "seed": pa.array(seeds),
        "reason": pa.array(reasons, pa.string()),
        "step": pa.array(np.full(count, step, np.int64)),
    }
    if tokens is not None:
        columns["token_ids"] = _fixed_size(tokens)
    return pa.table(columns)


def _fixed_size(rows: NDArray[np.generic]) -> pa.Array:
    """A fixed-size binary column over the array's own memory: nothing is copied."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.strides[0]), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
    )


def read_steps(
    order: DataOrder, spec: SampleSpec, rank: int, world_size: int, first: int, last: int
) -> Iterator[pa.Table]:
    """The rank's batches of steps [first, last), one table each: its lanes in order, `per_lane` samples of each."""
    lanes = order.rank_lanes(rank, world_size)
    share = order.per_lane
    while first < last:
        row, start = divmod(first, order.steps_per_row)
        stop = min(order.steps_per_row, start + last - first)
        slots = np.stack([order.lane_row(lane, row)[start * share : stop * share] for lane in lanes])
        wanted = np.unique(slots[:, :, :2].reshape(-1, 2), axis=0)
        chunks = read_chunks(order.index, ((int(shard), int(chunk)) for shard, chunk in wanted))
        base = row * order.lane_slots
        for step in range(start, stop):
            seeds = [order.seeds(lane, base + step * share, base + (step + 1) * share) for lane in lanes]
            taken = slots[:, (step - start) * share : (step - start + 1) * share].reshape(-1, 3)
            yield build_batch(order.index, spec, chunks, taken, np.concatenate(seeds), row * order.steps_per_row + step)
        first += stop - start
