"""The order is exact: every sample once an epoch, the same global batches at any world size, any row at once."""

import pickle
from collections import Counter

import numpy as np
import pytest

from infra.errors import BadRequest
from pipelines.data.index import DatasetIndex
from pipelines.data.order import DataOrder
from pipelines.data.seeds import sample_seeds, uniform


def index_of(*shard_samples: int, chunk_samples: int = 5) -> DatasetIndex:
    counts = np.array(shard_samples, np.int64)
    return DatasetIndex("", "", "d", chunk_samples, [f"{n}.tar" for n in range(len(counts))], counts, counts * 100)


def rank_batch(order: DataOrder, step: int, rank: int, world_size: int) -> list[tuple[int, ...]]:
    row, at = divmod(step, order.steps_per_row)
    share = order.per_lane
    lanes = order.rank_lanes(rank, world_size)
    parts = [order.lane_row(lane, row)[at * share : (at + 1) * share] for lane in lanes]
    return [tuple(slot) for slot in np.concatenate(parts).tolist()]


def all_samples(index: DatasetIndex) -> Counter:
    every = Counter()
    for shard, count in enumerate(index.shard_samples):
        every.update((shard, n // index.chunk_samples, n % index.chunk_samples) for n in range(count))
    return every


def test_an_epoch_holds_each_sample_once_and_the_next_follows_at_once():
    index = index_of(17, 0, 23, 3, 40, 1)
    order = DataOrder(index, seed=3, lanes=4, global_batch=8, slots_per_lane=7)
    total = index.samples
    for epoch in range(3):
        slots = order.slots(epoch * total, (epoch + 1) * total)
        assert Counter(map(tuple, slots.tolist())) == all_samples(index)
    first, second = order.slots(0, total), order.slots(total, 2 * total)
    assert not np.array_equal(first, second), "every epoch has an order of its own"
    across = order.slots(total - 3, total + 2)
    assert np.array_equal(across, np.concatenate([first[-3:], second[:2]]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_at_any_world_size(world_size):
    order = DataOrder(index_of(50, 31, 60), seed=1, lanes=4, global_batch=12, slots_per_lane=10)
    for step in range(0, 40, 3):
        whole = rank_batch(order, step, 0, 1)
        parts = [rank_batch(order, step, rank, world_size) for rank in range(world_size)]
        assert [slot for part in parts for slot in part] == whole
        assert len(whole) == 12


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_consumed_slots_are_the_sequence_row_by_row(world_size):
    order = DataOrder(index_of(100, 20), seed=5, lanes=4, global_batch=8, slots_per_lane=6)
    steps = 3 * order.steps_per_row
    seen = Counter(
        s for step in range(steps) for rank in range(world_size) for s in rank_batch(order, step, rank, world_size)
    )
    assert seen == Counter(map(tuple, order.slots(0, order.slots_consumed(steps)).tolist()))


def test_any_row_is_computed_without_those_before():
    index = index_of(*[90] * 7)
    used = DataOrder(index, seed=2, lanes=2, global_batch=4, slots_per_lane=8)
    for row in range(20):
        used.lane_row(1, row)
    fresh = pickle.loads(pickle.dumps(DataOrder(index, seed=2, lanes=2, global_batch=4, slots_per_lane=8)))
    assert np.array_equal(fresh.lane_row(1, 19), used.lane_row(1, 19))
    other = DataOrder(index, seed=3, lanes=2, global_batch=4, slots_per_lane=8)
    assert not np.array_equal(other.lane_row(1, 19), used.lane_row(1, 19))


def test_windows_bound_what_is_shuffled_together():
    index = index_of(*[3] * 600, chunk_samples=2)
    order = DataOrder(index, seed=0, lanes=1, global_batch=1)
    slots = order.slots(0, index.samples)
    assert Counter(map(tuple, slots.tolist())) == all_samples(index)
    assert len(set(slots[: 256 * 3, 0])) == 256


def test_a_planned_billion_samples_cost_no_list_of_them():
    index = DatasetIndex("", "", "d", 32, ["x"] * 100_000, np.full(100_000, 10_000), np.ones(100_000))
    order = DataOrder(index, seed=0, lanes=512, global_batch=4096, slots_per_lane=1024)
    row = 10**9 // (512 * 1024) * 2  # in the third epoch or so
    assert order.lane_row(511, row).shape == (1024, 3)
    assert order._window(1, 5)[0].nbytes < 1 << 20


def test_lanes_read_chunks_not_samples():
    order = DataOrder(index_of(*[640] * 4, chunk_samples=32), seed=0, lanes=2, global_batch=8, slots_per_lane=256)
    chunks = {tuple(slot[:2]) for slot in order.lane_row(0, 1).tolist()}
    assert len(chunks) <= 256 // 32 + 1


def test_sums_that_do_not_divide_are_refused():
    with pytest.raises(BadRequest, match="global batch of 10 is no multiple of 4 lanes"):
        DataOrder(index_of(9), 0, lanes=4, global_batch=10)
    with pytest.raises(BadRequest, match="3 workers do not divide 4 lanes"):
        DataOrder(index_of(9), 0, lanes=4, global_batch=8).rank_lanes(0, 3)
    with pytest.raises(BadRequest, match="no samples"):
        DataOrder(index_of(0), 0, lanes=4, global_batch=8)


def test_seeds_depend_on_seed_lane_and_position_and_uniform_is_that_of_torch():
    import torch

    from genmodels import random

    seeds = np.concatenate([sample_seeds(s, lane, np.arange(500)) for s in (0, 1) for lane in (0, 1, 7)])
    assert len(set(seeds.tolist())) == 3000
    assert np.array_equal(sample_seeds(0, 1, np.arange(100, 110)), sample_seeds(0, 1, np.arange(110))[100:])
    draws = uniform(seeds, "flip")
    assert np.array_equal(draws, random.uniform(torch.from_numpy(seeds), (), "flip").numpy())
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * 3000)
    assert abs(np.corrcoef(draws, uniform(seeds, "crop_x"))[0, 1]) < 4 / np.sqrt(3000)
