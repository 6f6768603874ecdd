"""Batches for one rank, in order, read by Ray Data over the cluster's CPUs, from the train worker's own process.

The run is read in segments of a bounded number of read tasks, so nothing grows with its length. Ray Data runs a segment
in a thread here; the next segment starts when the last task of the present one is giving its batches. It must not
start earlier: its tasks would hold the CPUs that the present one still needs, while nobody takes their output.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipelines.data.batch import RankBatch, to_batch
from pipelines.data.fixed import fixed_batches
from pipelines.data.order import DataOrder
from pipelines.data.read import read_steps
from pipelines.data.spec import SampleSpec

__all__ = ["BatchStream", "RankBatch", "SampleSpec", "fixed_batches", "training_batches"]

_TASK_SAMPLES = 256  # a read task costs about 10 ms to start: it should be small beside its work
_SEGMENT_TASKS = 2000
_READ_AHEAD_TASKS = 8  # about how many tasks' output may wait for the consumer
_POLL_SECONDS = 0.2
_making_dataset = threading.Lock()  # Ray's current DataContext is one for all threads


def _task_ranges(order: DataOrder, world_size: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Steps [start, end) cut at rows: a task works whole rows, since a row's chunks are fetched once."""
    row_samples = order.steps_per_row * order.rank_batch_size(world_size)
    steps = order.steps_per_row * max(1, -(-_TASK_SAMPLES // row_samples))
    while start < end:
        stop = min(end, (start // steps + 1) * steps)
        yield start, stop
        start = stop


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Segment(threading.Thread):
    """Runs one Dataset and puts its batches in a bounded queue; None marks the end."""

    def __init__(self, stream: BatchStream, ranges: list[tuple[int, int]]) -> None:
        super().__init__(name="read-data", daemon=True)
        self.batches: queue.Queue[RankBatch | _Failure | None] = queue.Queue(max(1, stream.prefetch))
        self.in_last_task = threading.Event()
        self._stream, self._ranges, self._stopped = stream, ranges, threading.Event()

    def _put(self, item: RankBatch | _Failure | None) -> bool:
        while not self._stopped.is_set():
            try:
                self.batches.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def run(self) -> None:
        try:
            batches = self._batches()
            for batch in batches:
                if batch["step"] >= self._ranges[-1][0]:
                    self.in_last_task.set()
                if not self._put(batch):
                    batches.close()
                    return
            self._put(None)
        except BaseException as error:
            self._put(_Failure(error))
        finally:
            self.in_last_task.set()

    def _batches(self) -> Generator[RankBatch, None, None]:
        stream = self._stream
        size = stream.order.rank_batch_size(stream.world_size)
        with _making_dataset:
            dataset = _dataset(stream, self._ranges)
        blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        rest: pa.Table | None = None
        try:
            for block in blocks:  # Ray Data may join or split the tables that a task gave
                rest = block if rest is None else pa.concat_tables([rest, block])
                while rest.num_rows >= size:
                    yield to_batch(rest.slice(0, size), stream.spec)
                    rest = rest.slice(size)
                if not rest.num_rows:
                    rest = None
        finally:
            blocks.close()

    def stop(self) -> None:
        self._stopped.set()


def _dataset(stream: BatchStream, ranges: list[tuple[int, int]]) -> Any:
    """A Dataset of one read task per range of steps."""
    import ray
    from ray.data import DataContext, ExecutionOptions
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    from pipelines.data.ray_execution import limit_to_share  # imports Ray Data

    order, spec, rank, world_size, shared = stream.order, stream.spec, stream.rank, stream.world_size, stream.shared
    size = order.rank_batch_size(world_size)
    batch_bytes = size * spec.row_bytes

    def read_task(first: int, last: int) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            its_order, its_spec = ray.get(shared)
            return read_steps(its_order, its_spec, rank, world_size, first, last)

        rows = (last - first) * size
        return ReadTask(read, BlockMetadata(rows, (last - first) * batch_bytes, None, None))

    class Steps(Datasource):
        def get_name(self) -> str:
            return "Steps"

        def estimate_inmemory_data_size(self) -> int:
            return sum(last - first for first, last in ranges) * batch_bytes

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [read_task(first, last) for first, last in ranges]

    context = DataContext.get_current().copy()
    context.execution_options = ExecutionOptions(preserve_order=True, verbose_progress=False)
    steps_a_task = max(last - first for first, last in ranges)
    limit_to_share(context, stream.concurrency, _READ_AHEAD_TASKS * steps_a_task * batch_bytes)
    context.target_max_block_size = batch_bytes  # so that a batch is passed on at once, not collected to 128 MB
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # what matters is raised
    with DataContext.current(context):
        # Less than one CPU a task lets ranks share it: one without room would wait for ever, and the others with it.
        task_cpus = min(1.0, stream.concurrency)
        return ray.data.read_datasource(Steps(), override_num_blocks=len(ranges), num_cpus=task_cpus)


class BatchStream(Iterator[RankBatch]):
    """The rank's batches of steps [start_step, end_step). Close it, or use it in a `with` block.

    `wait_seconds` is the time that was spent blocked in `next()`, so far; the first batch's is `first_wait_seconds`,
    not in it.
    """

    def __init__(
        self,
        order: DataOrder,
        spec: SampleSpec,
        rank: int,
        world_size: int,
        start_step: int,
        end_step: int,
        concurrency: float,
        prefetch: int,
    ) -> None:
        import ray

        order.check_world_size(world_size)
        self.order, self.spec, self.rank, self.world_size = order, spec, rank, world_size
        self.concurrency, self.prefetch = concurrency, prefetch
        self.wait_seconds = self.first_wait_seconds = 0.0
        self.shared = ray.put((order, spec))  # once, instead of inside every read task
        self._ranges = _task_ranges(order, world_size, start_step, end_step)
        self._expected, self._end, self._started = start_step, end_step, False
        self._present = self._start_segment()
        self._next: _Segment | None = None

    def _start_segment(self) -> _Segment | None:
        ranges = list(islice(self._ranges, _SEGMENT_TASKS))
        if not ranges:
            return None
        segment = _Segment(self, ranges)
        segment.start()
        return segment

    def __next__(self) -> RankBatch:
        begin = time.perf_counter()
        batch = self._take()
        waited = time.perf_counter() - begin
        if self._started:
            self.wait_seconds += waited
        else:
            self.first_wait_seconds, self._started = waited, True
        return batch

    def _take(self) -> RankBatch:
        while self._present is not None:
            if self._next is None and self._present.in_last_task.is_set():
                self._next = self._start_segment()
            item = self._present.batches.get()
            if isinstance(item, _Failure):
                self.close()
                cause = getattr(item.error, "cause", None)
                if isinstance(cause, BaseException):  # Ray wraps what a read task raised in an error of its own kind
                    raise cause from item.error
                raise item.error
            if item is None:
                self._present = self._next or self._start_segment()
                self._next = None
                continue
            if item["step"] != self._expected:
                raise RuntimeError(f"the data of step {self._expected} came as step {item['step']}")
            self._expected += 1
            return item
        if self._expected < self._end:
            raise RuntimeError(f"the data ended at step {self._expected} of {self._end}: the stream was closed or lost")
        raise StopIteration

    def close(self) -> None:
        """Stop reading; what runs is given up. May be called twice."""
        segments = [segment for segment in (self._present, self._next) if segment is not None]
        self._present = self._next = None
        self._end = self._expected
        for segment in segments:
            segment.stop()
        for segment in segments:
            segment.join(timeout=10)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    *,
    order: DataOrder,
    spec: SampleSpec,
    rank: int,
    world_size: int,
    start_step: int,
    end_step: int,
    concurrency: float = 1,
    prefetch: int = 4,
) -> BatchStream:
    """The rank's batches of steps [start_step, end_step), read ahead by Ray Data.

    `concurrency` is how many logical CPUs this rank's read tasks may take (ranks that share one take a fraction of it
    each), `prefetch` how many batches wait in this process. A start in the middle of a row reads only what that step
    and later ones need. Raises BadRequest where world_size does not divide the lanes; whatever fails in reading is
    raised by `next()`.
    """
    return BatchStream(order, spec, rank, world_size, start_step, end_step, concurrency, prefetch)
