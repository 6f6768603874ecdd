"""Writing shards that webdataset reads, with their index, the same bytes for the same samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

from infra.errors import BadRequest
from infra.storage import open_filesystem, write_bytes
from pipelines.data.index import DatasetIndex, Location, write_index
from pipelines.data.scan import CHUNK_SAMPLES, ShardFacts, scan_file, sidecar_name
from pipelines.data.tar import padded


class ShardBuffer:
    """One shard, put together in memory."""

    def __init__(self) -> None:
        self._buffer, self.samples = io.BytesIO(), 0
        self._keys: set[str] = set()
        self._flaws: dict[str, str] = {}

    def flaw(self, reason: str) -> None:
        """Say of the sample that is added next that it cannot be used: it is quarantined, and keeps its slot."""
        self._flaws[str(self.samples)] = reason

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: suffix to bytes. The key may hold slashes, but no dot in its last part."""
        if "." in key.rpartition("/")[2] or not key:
            raise ValueError(f"key {key!r}: a dot would end it early, and it may not be empty")
        if key in self._keys:
            raise ValueError(f"key {key!r} comes twice in a shard: the two samples would be read as one")
        self._keys.add(key)
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")  # time, owner and group 0: equal samples give equal bytes
            info.size, info.mode = len(data), 0o644
            self._buffer.write(info.tobuf(tarfile.GNU_FORMAT))
            self._buffer.write(data)
            self._buffer.write(b"\0" * (padded(len(data)) - len(data)))
        self.samples += 1

    def write(self, folder: str, name: str, chunk_samples: int) -> ShardFacts:
        """Write the shard, and then its sidecar, which says that it is complete."""
        self._buffer.write(b"\0" * 1024)
        self._buffer.seek(0)
        scan = scan_file(self._buffer, chunk_samples)
        scan.flaws |= self._flaws
        write_bytes(f"{folder}/{name}", self._buffer.getvalue())
        write_bytes(f"{folder}/{sidecar_name(name, chunk_samples)}", scan.to_json())
        return scan.facts


class ShardWriter:
    """Writes samples to `FOLDER/00000.tar`, … and, on leaving the `with` block, the index.

    A shard is put together in memory, so `shard_samples` times the size of a sample must fit there. `index.json` comes
    last: a folder without one is incomplete. Raises BadRequest where the folder holds shards already, unless
    `overwrite`.

    Example:
        with ShardWriter("shards/train") as writer:
            writer.write("000001", {"png": png_bytes, "txt": b"a red seven"})
    """

    def __init__(
        self, url: str, shard_samples: int = 1000, chunk_samples: int = CHUNK_SAMPLES, overwrite: bool = False
    ) -> None:
        if shard_samples < 1 or chunk_samples < 1:
            raise BadRequest("samples per shard and per chunk must be at least 1")
        self._location = Location.parse(url)
        self._shard_samples, self._chunk_samples = shard_samples, chunk_samples
        self._shards: dict[str, ShardFacts] = {}
        self._shard = ShardBuffer()
        self.index: DatasetIndex | None = None
        self._empty_folder(overwrite)

    def _empty_folder(self, overwrite: bool) -> None:
        filesystem, path = open_filesystem(self._location.folder)
        old = [
            name
            for pattern in ("*.tar", "*.tar.index*.json", "index*.json")
            for name in filesystem.glob(f"{path}/{pattern}")
        ]
        if old and not overwrite:
            raise BadRequest(f"{self._location.folder} holds shards already; name another folder, or give --overwrite")
        for name in sorted(old, key=lambda name: not name.rpartition("/")[2].startswith("index")):  # these go first
            filesystem.rm_file(name)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample, see `ShardBuffer.add`."""
        self._shard.add(key, members)
        if self._shard.samples == self._shard_samples:
            self._finish_shard()

    def _finish_shard(self) -> None:
        name = f"{len(self._shards):05d}.tar"
        self._shards[name] = self._shard.write(self._location.folder, name, self._chunk_samples)
        self._shard = ShardBuffer()

    def close(self) -> DatasetIndex:
        """Write what is left and the index. Raises BadRequest where no sample was written."""
        if self._shard.samples:
            self._finish_shard()
        if not self._shards:
            raise BadRequest(f"{self._location.folder}: there were no samples to write")
        self.index = write_index(self._location, self._location.folder, self._shards, self._chunk_samples)
        return self.index

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
