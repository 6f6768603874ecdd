"""Ray Data gives exactly what reading in process gives, wherever it starts and however it is cut."""

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import pipelines.data.stream as stream
from pipelines.data import ray_execution
from pipelines.data.batch import to_batch
from pipelines.data.order import DataOrder
from pipelines.data.quarantine import DataFailure
from pipelines.data.read import read_steps
from pipelines.data.spec import SampleSpec
from tests.pipelines.data.shards import write_shards
from tests.pipelines.data.test_read import words_tokenizer

pytestmark = pytest.mark.slow
ROOT = str(Path(__file__).resolve().parents[3])
SPEC = SampleSpec(8, tokenizer_json=words_tokenizer(), token_length=5, pad_token_id=2)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    import ray

    environment = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    index = write_shards(tmp_path_factory.mktemp("shards"), samples=600, per_shard=150)
    return DataOrder(index, seed=11, lanes=4, global_batch=16, slots_per_lane=64)


def plain(batch):
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in batch.items()}


def expected(order, rank, world_size, first, last, spec=SPEC):
    return [plain(to_batch(table, spec)) for table in read_steps(order, spec, rank, world_size, first, last)]


@pytest.mark.parametrize(("rank", "world_size", "first"), [(0, 1, 0), (1, 2, 0), (3, 4, 21)])
def test_the_stream_is_the_order(order, rank, world_size, first):
    with stream.training_batches(
        order=order, spec=SPEC, rank=rank, world_size=world_size, start_step=first, end_step=70, concurrency=2
    ) as batches:
        found = [plain(batch) for batch in batches]
        assert found == expected(order, rank, world_size, first, 70)
        assert batches.first_wait_seconds > 0
    assert [batch["step"] for batch in found] == list(range(first, 70))
    assert np.asarray(found[0]["token_ids"]).shape == (16 // world_size, 5)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_segments_join_without_a_seam(order, monkeypatch, tasks):
    monkeypatch.setattr(stream, "_SEGMENT_TASKS", tasks)
    monkeypatch.setattr(stream, "_TASK_SAMPLES", 1)
    with stream.training_batches(order=order, spec=SPEC, rank=0, world_size=2, start_step=7, end_step=90) as batches:
        assert [plain(batch) for batch in batches] == expected(order, 0, 2, 7, 90)


def test_two_ranks_share_one_cpu_in_step(order):
    streams = [
        stream.training_batches(
            order=order, spec=SPEC, rank=r, world_size=2, start_step=0, end_step=40, concurrency=0.5
        )
        for r in range(2)
    ]
    both = [[*first["keys"], *second["keys"]] for first, second in zip(*streams, strict=True)]
    assert both == [batch["keys"] for batch in expected(order, 0, 1, 0, 40)]


def test_nobody_takes_a_rank_s_share_and_what_waits_is_bounded_and_quiet(order, monkeypatch):
    executors = []
    before = ray_execution._RankExecution.before_execution_starts

    def watched(self, executor):
        executors.append(executor)
        before(self, executor)

    monkeypatch.setattr(ray_execution._RankExecution, "before_execution_starts", watched)
    with ExitStack() as closing:
        for rank in range(2):
            settings = {"order": order, "spec": SPEC, "rank": rank, "world_size": 2, "concurrency": 0.5}
            batches = stream.training_batches(start_step=0, end_step=10**5, **settings)
            next(closing.enter_context(batches))

        def submitted():
            return [op.metrics.num_tasks_submitted for executor in executors for op in executor._topology][1::2]

        found, deadline = submitted(), time.monotonic() + 60
        while True:  # until nothing more is read ahead
            time.sleep(2)
            found, earlier = submitted(), found
            if found == earlier:
                break
            assert time.monotonic() < deadline, "the reading goes on and on"
        assert max(found) <= 4 * stream._READ_AHEAD_TASKS < stream._SEGMENT_TASKS
        assert [executor._resource_manager.get_global_limits().cpu for executor in executors] == [0.5, 0.5]
        began = time.process_time()
        time.sleep(2)
        # Two loops, and whatever else this process does: left alone, each loop of Ray Data takes all that there is.
        assert time.process_time() - began < 0.8


def test_closing_early_stops_the_reading(order):
    begin = time.perf_counter()
    batches = stream.training_batches(order=order, spec=SPEC, rank=0, world_size=1, start_step=0, end_step=10**6)
    next(batches)
    thread = batches._present
    batches.close()
    batches.close()
    assert not thread.is_alive() and time.perf_counter() - begin < 20
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_in_a_read_task_reaches_the_consumer(order):
    broken = SampleSpec(8, tokenizer_json="{}", token_length=5)
    batches = stream.training_batches(order=order, spec=broken, rank=0, world_size=1, start_step=0, end_step=9)
    with pytest.raises(Exception, match=r"(?i)token|missing|json"):
        list(batches)


def test_a_failure_in_a_read_task_keeps_its_type_and_message(tmp_path):
    index = write_shards(tmp_path, samples=8, per_shard=8)
    (tmp_path / "00000.tar.index.json").write_bytes(b"{}")
    batches = stream.training_batches(
        order=DataOrder(index, 0, 1, 8, 8), spec=SampleSpec(8), rank=0, world_size=1, start_step=0, end_step=2
    )
    with pytest.raises(DataFailure, match=r"^the sidecar of shard .*00000\.tar") as caught:
        list(batches)
    assert type(caught.value) is DataFailure
