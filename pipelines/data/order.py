"""The data order: an endless sequence of slots, a pure function of (seed, index), dealt to lanes, batches and ranks.

    epoch    N consecutive slots, each sample once: shards shuffled, cut into windows of `WINDOW_SHARDS`, and the
             chunks of a window shuffled. The next epoch follows at once, in the middle of a batch where it falls so.
    row      lanes * K slots; lane l owns the l-th K of them and shuffles these, so it reads chunks, not samples.
    step s   takes positions [s*m, (s+1)*m) of every lane's own sequence, m = global_batch / lanes.
    rank     works lanes / world_size neighbouring lanes; the global batch is the ranks' batches one after another.

So the global batches are the same at any world size that divides the lanes, and any row is computed directly: to
resume costs the same anywhere. Only counts from `index.json` are needed, no shard and no sidecar.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from infra.errors import BadRequest
from pipelines.data.index import DatasetIndex
from pipelines.data.seeds import mix, sample_seeds

WINDOW_SHARDS = 256
_EPOCH, _WINDOW, _ROW = 1, 2, 3  # keep the three kinds of shuffle independent

Integers = NDArray[np.int64]


def _permutation(count: int, *key: int) -> Integers:
    # Philox's raw words are stable over numpy versions; Generator.permutation is not promised to be.
    words = np.random.Philox(key=np.concatenate([mix(*key), mix(*key, 1)])).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


class DataOrder:
    """Which sample is at which place. Read tasks get a pickled copy.

    Args:
        index: the dataset; kept as `order.index`.
        seed: shuffles and, through `seeds`, all that is drawn at random for a sample.
        lanes: parallel sequences; the world size must divide them.
        global_batch: samples per step, a multiple of `lanes`.
        slots_per_lane: neighbouring slots that a lane shuffles within, rounded up to a multiple of a lane's batch.

    Raises BadRequest where the numbers do not divide or the index is empty.
    """

    def __init__(
        self, index: DatasetIndex, seed: int, lanes: int, global_batch: int, slots_per_lane: int = 1024
    ) -> None:
        if lanes < 1 or global_batch < 1 or slots_per_lane < 1:
            raise BadRequest("data: lanes, global batch and slots per lane must be at least 1")
        if global_batch % lanes:
            raise BadRequest(f"data: a global batch of {global_batch} is no multiple of {lanes} lanes; change one")
        self.index = index
        self.samples = int(np.sum(index.shard_samples))
        if not self.samples:
            raise BadRequest("data: the dataset holds no samples")
        self.seed, self.lanes, self.global_batch = seed, lanes, global_batch
        self.per_lane = global_batch // lanes
        self.lane_slots = -(-slots_per_lane // self.per_lane) * self.per_lane
        self.row_slots = lanes * self.lane_slots
        self.steps_per_row = self.lane_slots // self.per_lane
        self._cache_functions()

    def _cache_functions(self) -> None:
        self._epoch_shards = lru_cache(2)(self._compute_epoch_shards)
        self._window = lru_cache(3)(self._compute_window)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_epoch_shards", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._cache_functions()

    def slots_consumed(self, step: int) -> int:
        """Samples that the steps before `step` took; divided by `samples` it is the epoch."""
        return step * self.global_batch

    def check_world_size(self, world_size: int) -> None:
        """Raises BadRequest where `world_size` does not divide the lanes."""
        if world_size < 1 or self.lanes % world_size:
            fitting = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            raise BadRequest(
                f"data: {world_size} workers do not divide {self.lanes} lanes; use {fitting} workers, or other lanes"
            )

    def rank_lanes(self, rank: int, world_size: int) -> range:
        """The neighbouring lanes that a rank works. Raises BadRequest where `world_size` does not divide them."""
        self.check_world_size(world_size)
        count = self.lanes // world_size
        return range(rank * count, (rank + 1) * count)

    def rank_batch_size(self, world_size: int) -> int:
        """Samples per step and rank."""
        return len(self.rank_lanes(0, world_size)) * self.per_lane

    def _compute_epoch_shards(self, epoch: int) -> tuple[Integers, Integers]:
        """Shards of an epoch in their order, and the first slot of each window, with the end appended."""
        shards = _permutation(len(self.index.shard_samples), self.seed, _EPOCH, epoch)
        first = np.arange(0, len(shards), WINDOW_SHARDS)
        per_window = np.add.reduceat(self.index.shard_samples[shards], first)
        return shards, np.concatenate([[0], np.cumsum(per_window)])

    def _compute_window(self, epoch: int, window: int) -> tuple[Integers, Integers, Integers]:
        """Of one window, in order: shard and chunk number of each chunk, and its first slot, with the end appended."""
        shards = self._epoch_shards(epoch)[0][window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        samples = self.index.shard_samples[shards]
        chunks = -(-samples // self.index.chunk_samples)
        shard = np.repeat(shards, chunks)
        chunk = np.arange(len(shard)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        size = np.minimum(self.index.chunk_samples, np.repeat(samples, chunks) - chunk * self.index.chunk_samples)
        shuffle = _permutation(len(shard), self.seed, _WINDOW, epoch, window)
        return shard[shuffle], chunk[shuffle], np.concatenate([[0], np.cumsum(size[shuffle])])

    def slots(self, first: int, last: int) -> Integers:
        """Slots [first, last) of the endless sequence, before lanes shuffle: rows (shard, chunk, place in chunk)."""
        pieces = []
        while first < last:
            epoch, at = divmod(first, self.samples)
            starts = self._epoch_shards(epoch)[1]
            window = int(np.searchsorted(starts, at, side="right")) - 1
            shard, chunk, offsets = self._window(epoch, window)
            begin = at - int(starts[window])
            end = min(begin + last - first, int(offsets[-1]))
            within = np.arange(begin, end)
            which = np.searchsorted(offsets, within, side="right") - 1
            pieces.append(np.stack([shard[which], chunk[which], within - offsets[which]], axis=1))
            first += end - begin
        return np.concatenate(pieces) if pieces else np.empty((0, 3), np.int64)

    def lane_row(self, lane: int, row: int) -> Integers:
        """A lane's part of a row, in the lane's order: int64 (K, 3) of (shard, chunk, place in the chunk)."""
        first = (row * self.lanes + lane) * self.lane_slots
        owned = self.slots(first, first + self.lane_slots)
        return owned[_permutation(self.lane_slots, self.seed, _ROW, lane, row)]

    def seeds(self, lane: int, first: int, last: int) -> NDArray[np.int64]:
        """Seeds of the samples at positions [first, last) of a lane's sequence, int64."""
        return sample_seeds(self.seed, lane, np.arange(first, last))
