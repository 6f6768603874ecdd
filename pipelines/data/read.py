"""Reading: chunks fetched by one range read each, checked, parsed, decoded and packed as one Arrow table per step.

No torch here: a read task's process would need seconds to import it.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra.storage import open_filesystem
from pipelines.data.decode import BadImage, decode_image, original_size
from pipelines.data.index import DatasetIndex
from pipelines.data.order import DataOrder
from pipelines.data.quarantine import DataFailure
from pipelines.data.scan import ShardScan
from pipelines.data.seeds import uniform
from pipelines.data.spec import BadArray, BadCaption, SampleSpec
from pipelines.data.tar import BytesSource, DamagedTar, TarSample, group_samples, read_members

_ALTERED_ATTEMPTS = 3  # reads of a chunk whose bytes are not those of the index
_OUTAGE_SECONDS = 60.0  # for so long reads that fail are tried again
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.2, 10.0
_READS_AT_ONCE = 16

ChunkId = tuple[int, int]  # shard, chunk


@dataclass
class ReadChunk:
    """The samples of a chunk, in the shard's order; or the reason why none of them could be read."""

    data: bytes
    samples: list[TarSample]
    reason: str = ""

    def members(self, place: int) -> dict[str, bytes]:
        """The members of a sample, by suffix."""
        parts = self.samples[place].members
        return {name: self.data[part.data : part.data + part.size] for name, part in parts.items()}


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


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _sidecars(index: DatasetIndex, shards: set[int], failed: dict[int, str]) -> dict[int, ShardScan]:
    """Sidecars by shard; why one could not be fetched goes to `failed`. Raises DataFailure where one is damaged."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:  # one that isn't in memory yet is a request of its own
        loading = {shard: threads.submit(index.sidecar, shard) for shard in shards}
    found = {}
    for shard, future in loading.items():
        try:
            found[shard] = future.result()
        except ValueError as error:
            raise DataFailure(
                f"the sidecar of shard {index.shard_url(shard)}: {_text(error)}; run pipelines/index_shards.py again"
            ) from error
        except Exception as error:  # s3fs makes OSErrors of some, and lets through what botocore and aiohttp raise
            failed[shard] = f"sidecar: {_text(error)}"
    return found


def _fetch(
    index: DatasetIndex, wanted: list[ChunkId], done: dict[ChunkId, ReadChunk]
) -> tuple[dict[ChunkId, str], dict[ChunkId, str]]:
    """Read chunks and check them: good ones go to `done`; of the others come back those altered and those not read."""
    altered: dict[ChunkId, str] = {}
    without: dict[int, str] = {}
    sidecars = _sidecars(index, {shard for shard, _ in wanted}, without)
    failed = {(shard, chunk): without[shard] for shard, chunk in wanted if shard in without}
    ranges = {(shard, chunk): sidecars[shard].chunks[chunk] for shard, chunk in wanted if shard in sidecars}
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
            failed[shard, chunk] = _text(answer)
        elif len(answer) != length or zlib.crc32(answer) != crc32:
            altered[shard, chunk] = "checksum: the shard's bytes are not those of the index"
        else:
            done[shard, chunk] = _parse(answer, sidecars[shard].flaws, chunk * index.chunk_samples, count)
    return altered, failed


def read_chunks(index: DatasetIndex, wanted: Iterable[ChunkId]) -> dict[ChunkId, ReadChunk]:
    """Fetch chunks, each by one range read, and check each against the index before it is parsed.

    Altered bytes are read again a few times; what stays altered comes back as a chunk with a reason, to be quarantined.
    A read that fails says nothing about the samples: it is tried again for a minute.

    Raises:
        OSError: reads of a shard still fail after that, or it is gone; the message names it.
        DataFailure: a sidecar is damaged or of another index.
    """
    done: dict[ChunkId, ReadChunk] = {}
    attempts: Counter[ChunkId] = Counter()
    pending, wait, deadline = list(wanted), _BACKOFF_SECONDS, time.monotonic() + _OUTAGE_SECONDS
    while True:
        altered, failed = _fetch(index, pending, done)
        attempts.update(altered.keys())
        done |= {
            chunk_id: ReadChunk(b"", [], reason)
            for chunk_id, reason in altered.items()
            if attempts[chunk_id] >= _ALTERED_ATTEMPTS
        }
        pending = [chunk_id for chunk_id in (*altered, *failed) if chunk_id not in done]
        if not pending:
            return done
        if failed and time.monotonic() >= deadline:
            (shard, _), reason = next(iter(failed.items()))
            raise OSError(f"shard {index.shard_url(shard)} could not be read for {_OUTAGE_SECONDS:g} s: {reason}")
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_BACKOFF_SECONDS)


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
    image is zeros), seed, reason ("" for a good one), step, and what else `spec` asks for: token_ids (int32 bytes),
    label, condition_image (like image), size (4 int32 as bytes: original height and width, rows and columns cut off),
    and the arrays by their names (float32 bytes). Where the spec reads no images there are none.
    """
    count, size = len(slots), spec.image_size
    images = np.zeros((count, 3, size, size), np.uint8)
    tokens = np.zeros((count, spec.token_length), np.int32) if spec.tokenizer_json is not None else None
    others = np.zeros_like(images) if spec.condition_image is not None else None
    sizes = np.zeros((count, 4), np.int32) if spec.sizes else None
    arrays = {array.name: np.zeros((count, *array.shape), np.float32) for array in spec.arrays}
    place_x, place_y, flips = (uniform(seeds, purpose) for purpose in ("crop_x", "crop_y", "flip"))
    draws = uniform(seeds, "caption")
    keys, captions, labels, reasons = [], [], [], []
    for row, (shard, chunk, within) in enumerate(slots.tolist()):
        source = chunks[shard, chunk]
        key, caption, label, reason = f"chunk{chunk}/sample{within}", "", "", source.reason
        if not reason:
            sample = source.samples[within]
            key, reason = sample.key, sample.flaw
        if not reason:
            members = source.members(within)
            place = (place_x[row], place_y[row]) if spec.crop == "random" else (0.5, 0.5)
            encoded, reason = spec.choose_image(members) if size else (None, "")
            try:
                for array in spec.arrays:
                    arrays[array.name][row] = array.read(members)
                if encoded is not None:
                    flip = bool(spec.horizontal_flip and flips[row] < 0.5)
                    cut = decode_image(encoded, size, images[row], place, flip)
                    if sizes is not None:
                        sizes[row] = (*original_size(encoded), *cut)
                    if others is not None:
                        _decode_other(spec, members, encoded, others[row], place, flip)
                label = spec.read_label(members)
                if not reason:
                    caption = spec.choose_caption(members, draws[row]) if spec.caption else ""
            except (BadArray, BadImage, BadCaption) as error:
                reason = str(error)
        if reason:
            for filled in (images, others, *arrays.values()):
                if filled is not None:
                    filled[row] = 0
        if tokens is not None:
            tokens[row] = spec.tokenize(caption)
        keys.append(f"{index.names[shard]}/{key}".encode("utf-8", "backslashreplace").decode())
        captions.append(caption)
        labels.append(label)
        reasons.append(reason.encode("utf-8", "backslashreplace").decode())
    columns = {
        "key": pa.array(keys, pa.string()),
        "caption": pa.array(captions, pa.string()),
        "weight": pa.array(np.array([not reason for reason in reasons], np.float32)),
        "seed": pa.array(seeds),
        "reason": pa.array(reasons, pa.string()),
        "step": pa.array(np.full(count, step, np.int64)),
    }
    if spec.label is not None:
        columns["label"] = pa.array(labels, pa.string())
    if size:
        columns["image"] = _fixed_size(images.reshape(count, -1))
    for name, values in arrays.items():
        columns[name] = _fixed_size(values.reshape(count, -1))
    if tokens is not None:
        columns["token_ids"] = _fixed_size(tokens)
    if others is not None:
        columns["condition_image"] = _fixed_size(others.reshape(count, -1))
    if sizes is not None:
        columns["size"] = _fixed_size(sizes)
    return pa.table(columns)


def _decode_other(
    spec: SampleSpec,
    members: Mapping[str, bytes],
    encoded: bytes,
    out: NDArray[np.uint8],
    place: tuple[float, float],
    flip: bool,
) -> None:
    """Decode the sample's other image to `out`, cut as its image is. Raises BadImage."""
    name = spec.condition_image or ""
    if name not in members:
        raise BadImage(f"{name}: missing")
    try:
        decode_image(members[name], spec.image_size, out, place, flip, nearest=True)
        (height, width), (own_height, own_width) = original_size(encoded), original_size(members[name])
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from error
    if abs(height * own_width - width * own_height) > max(height, width):  # a pixel of rounding
        raise BadImage(f"{name}: {own_width}x{own_height} has other proportions than the image, {width}x{height}")


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
