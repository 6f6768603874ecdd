"""The record of samples that could not be used, and the rule that stops a run that has too many of them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

from infra.errors import BadRequest
from infra.storage import join, open_filesystem, read_bytes, write_bytes
from pipelines.data.scan import CHUNK_SAMPLES


class DataFailure(RuntimeError):
    """Too many samples could not be used; the message names one of them, the reason and the counts."""


def allowed_bad(max_share: float, read: int, chunk_samples: int) -> float:
    """How many bad samples among `read` do not stop a run.

    Were exactly `max_share` of a dataset bad, the count among `read` samples would scatter around share·read by its
    square root, so a run within its share stays below three of these above it. And bad samples come together: one
    damaged stretch of a shard costs a whole chunk, however early it is met. A share of 0 allows none.
    """
    expected = max_share * read
    return expected + 3 * math.sqrt(expected) + chunk_samples if max_share else 0.0


class Quarantine:
    """Counts a rank's samples and records the bad ones, each once, as JSON lines (shard, key, reason, step, split).

    A split is train or held_out; "other train" and "other held_out" are those of data.other_url.

    Lines of a step are one file, `FOLDER/step-00000012-rank-0003-CRC32.jsonl`: object storage cannot append. Samples
    that are read outside the steps, for validation and the like, have step -1 and `outside` in place of the step.

    The counts are of the training samples since the last `take()`: whoever calls it adds them up over ranks and
    restarts, and judges the sum by `too_many`.
    """

    def __init__(
        self, folder_url: str, rank: int, max_share: float = 0.001, chunk_samples: int = CHUNK_SAMPLES
    ) -> None:
        if not 0 <= max_share <= 1:
            raise BadRequest(f"data: the largest share of bad samples is {max_share}; it must be between 0 and 1")
        self.folder, self.rank, self.max_share, self.chunk_samples = folder_url, rank, max_share, chunk_samples
        self.last: dict[str, Any] | None = None  # the last bad sample that this rank met
        self._read = self._bad = self._read_before = self._bad_before = 0
        self._recorded: set[tuple[str, str]] | None = None  # split and key

    def add(self, keys: Sequence[str], reasons: Sequence[str], step: int, split: str = "train") -> None:
        """Count a training batch, and record its bad samples."""
        self._read += len(keys)
        self._bad += sum(map(bool, reasons))
        self.record(keys, reasons, step, split)

    def record(self, keys: Sequence[str], reasons: Sequence[str], step: int = -1, split: str = "train") -> None:
        """Record those samples that have a reason and that this rank did not record before, without counting them."""
        lines = []
        for key, reason in zip(keys, reasons, strict=True):
            if not reason:
                continue
            shard, _, inner = key.partition(".tar/")
            self.last = {"shard": f"{shard}.tar", "key": inner, "reason": reason, "step": step, "split": split}
            if self._recorded is None:
                known = read_quarantine(self.folder, self.rank)
                self._recorded = {(entry["split"], entry["key"]) for entry in known}
            if (split, key) not in self._recorded:
                self._recorded.add((split, key))
                lines.append(json.dumps(self.last))
        if lines:
            data = ("\n".join(lines) + "\n").encode()
            when = f"step-{step:08d}" if step >= 0 else "outside"
            # The checksum, since a step that is done again by another number of ranks gives this rank other samples.
            name = f"{when}-rank-{self.rank:04d}-{zlib.crc32(data):08x}.jsonl"
            write_bytes(join(self.folder, name), data)

    def take(self) -> tuple[int, int]:
        """(bad, read) of this rank since the last call."""
        bad, read = self._bad - self._bad_before, self._read - self._read_before
        self._bad_before, self._read_before = self._bad, self._read
        return bad, read

    def check(self) -> None:
        """Stop at once, without waiting for the other ranks' counts, where the case is clear.

        Raises DataFailure where everything that this rank read since it started is bad, and more than a chunk (a
        misnamed caption member, say), or where `max_share` is 0 and a sample is bad.
        """
        hopeless = self._bad == self._read or not self.max_share
        if hopeless and self.too_many(self._bad, self._read):
            raise self.failure(f"{self._bad} of the {self._read} samples that rank {self.rank} read", self.last)

    def too_many(self, bad: int, read: int) -> bool:
        """Whether the counts of all ranks since the run began should stop it."""
        return bad > allowed_bad(self.max_share, read, self.chunk_samples)

    def failure(self, counts: str, last: dict[str, Any] | None) -> DataFailure:
        """The error that says what cannot be used (`counts`), names `last`, if any, and where all are listed."""
        where = " of the other set" if last and last["split"].startswith("other") else ""
        named = f"the last: shard {last['shard']}{where}, key {last['key']}: {last['reason']}; " if last else ""
        return DataFailure(
            f"{counts} cannot be used (data.max_bad_share={self.max_share:g}); {named}all are listed in {self.folder}"
        )


def read_quarantine(folder_url: str, rank: int | None = None) -> list[dict[str, Any]]:
    """The records under a quarantine folder, of one rank or of all; `key` is given as `shard/key`, each one of a
    split once."""
    filesystem, path = open_filesystem(folder_url)
    pattern = "*.jsonl" if rank is None else f"*-rank-{rank:04d}-*.jsonl"
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for name in sorted(filesystem.glob(f"{path}/{pattern}")):
        for line in read_bytes(join(folder_url, name.rpartition("/")[2])).decode().splitlines():
            record = json.loads(line)
            key = f"{record['shard']}/{record['key']}"
            records.setdefault((record["split"], key), {**record, "key": key})
    return list(records.values())
