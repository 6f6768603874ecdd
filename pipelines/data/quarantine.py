"""The record of samples that could not be used, and the rule that stops a run that has too many of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from infra.errors import BadRequest
from infra.storage import join, open_filesystem, read_bytes, write_bytes


class DataFailure(RuntimeError):
    """Too many samples could not be used; the message names one of them, the reason and the counts."""


class Quarantine:
    """Counts a rank's samples and records the bad ones, each once, as JSON lines (shard, key, reason, step).

    A step's lines are one file, `FOLDER/step-00000012-rank-0003.jsonl`: object storage cannot append, and a step that
    is done again after a restart writes the same file again.

    The rule: a run stops as soon as the bad samples exceed `max_share` of those read, where the first 1/max_share
    samples count as read from the start. So one bad sample never stops a run at its beginning, a second one within
    the first 1/max_share does, and a wrong caption column is noticed in the first batch. `max_share=0` stops at the
    first bad sample.
    """

    def __init__(self, folder_url: str, rank: int, max_share: float = 0.001) -> None:
        if not 0 <= max_share <= 1:
            raise BadRequest(f"data: the largest share of bad samples is {max_share}; it must be between 0 and 1")
        self.folder, self.rank, self.max_share = folder_url, rank, max_share
        self.read = self.bad = 0
        self._recorded = {record["key"] for record in read_quarantine(folder_url)}
        self._last: dict[str, object] = {}

    def add(self, keys: Sequence[str], reasons: Sequence[str], step: int) -> None:
        """Count a batch, and record those of its samples that have a reason and were not recorded before."""
        self.read += len(keys)
        lines = []
        for key, reason in zip(keys, reasons):
            if not reason:
                continue
            self.bad += 1
            shard, _, inner = key.partition(".tar/")
            self._last = {"shard": f"{shard}.tar", "key": inner, "reason": reason, "step": step}
            if key not in self._recorded:
                self._recorded.add(key)
                lines.append(json.dumps(self._last))
        if lines:
            name = f"step-{step:08d}-rank-{self.rank:04d}.jsonl"
            write_bytes(join(self.folder, name), ("\n".join(lines) + "\n").encode())

    def check(self) -> None:
        """Raises DataFailure where the rule above is broken."""
        if self.bad > self.max_share * self.read and self.bad > (1 if self.max_share else 0):
            raise DataFailure(
                f"{self.bad} of {self.read} samples that rank {self.rank} read cannot be used (allowed: "
                f"{self.max_share:.3%}); the last: shard {self._last['shard']}, key {self._last['key']}: "
                f"{self._last['reason']}; all are listed in {self.folder}"
            )


def read_quarantine(folder_url: str) -> list[dict[str, str]]:
    """All records under a quarantine folder, `key` given as `shard/key`; empty where there are none."""
    filesystem, path = open_filesystem(folder_url)
    records = []
    for name in sorted(filesystem.glob(f"{path}/*.jsonl")):
        for line in read_bytes(join(folder_url, name.rpartition("/")[2])).decode().splitlines():
            record = json.loads(line)
            records.append({**record, "key": f"{record['shard']}/{record['key']}"})
    return records
