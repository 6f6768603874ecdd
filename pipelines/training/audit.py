"""A record of every sample that the objective was given, for proofs that none is lost or seen twice."""

from __future__ import annotations

import hashlib
import json
import socket
import time

from infra import storage
from pipelines.data.batch import RankBatch
from pipelines.training.run_data import parts
from pipelines.training.run_folder import RunFolder

_CONTENT = ("images", "image_embeddings", "latent_moments")  # the first of these that a batch has is hashed


class Audit:
    """Writes what each rank was given, as JSON lines: step, key, seed, weight and a hash of the pixels, or of what was
    read in their place; "set" is "other" in those of a second set.

    Each `write`, at a checkpoint and at the end, is a file of its own: all steps before a checkpoint are there however
    the run ends, and a restart overwrites nothing. A step that was done again may be there twice, with equal lines.
    """

    def __init__(self, folder: RunFolder, rank: int, start: int) -> None:
        self.url = folder.path("audit", f"from-{start:08d}-rank-{rank:04d}-{socket.gethostname()}-{time.time_ns()}")
        self.lines: list[str] = []
        self.written = 0

    def record(self, batch: RankBatch) -> None:
        for name, part in parts(batch):
            seen = next(part[content] for content in _CONTENT if content in part)  # type: ignore[literal-required]
            for row, key in enumerate(part["keys"]):
                digest = hashlib.sha256(seen[row].contiguous().numpy().tobytes()).hexdigest()[:16]
                line = {
                    "step": part["step"],
                    "key": key,
                    "seed": int(part["seeds"][row]),
                    "weight": float(part["weight"][row]),
                    "pixels": digest,
                }
                self.lines.append(json.dumps(line | ({"set": name} if name else {})))

    def write(self) -> None:
        """Write what was recorded since the last time."""
        if self.lines:
            storage.write_bytes(f"{self.url}-{self.written:06d}.jsonl", ("\n".join(self.lines) + "\n").encode())
            self.lines, self.written = [], self.written + 1
