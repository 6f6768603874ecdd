"""One shard, read once from beginning to end: its sidecar, with checksums and the byte ranges of its chunks."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

from infra.storage import open_filesystem
from pipelines.data.tar import DamagedTar, group_samples, read_members

VERSION = 1
CHUNK_SAMPLES = 32
_PIECE = 1 << 20


def sidecar_name(shard: str, chunk_samples: int) -> str:
    """The sidecar's file name; one of another chunk size has another, so that two indices can share shards."""
    return f"{shard}.index.json" if chunk_samples == CHUNK_SAMPLES else f"{shard}.index-{chunk_samples}.json"


class ShardFacts(NamedTuple):
    """What the dataset's index says of a shard."""

    size: int  # bytes
    sha256: str
    samples: int
    chunks: int
    damage: str


@dataclass
class ShardScan:
    """A shard's sidecar; the format is described in `pipelines.data.index`."""

    size: int  # bytes
    sha256: str
    samples: int
    chunks: list[list[int]]  # [offset, length, samples, crc32]
    flaws: dict[str, str] = field(default_factory=dict)  # sample number -> why it cannot be used
    damage: str = ""
    version: int = VERSION

    def to_json(self) -> bytes:
        fields = asdict(self)
        return json.dumps({"bytes": fields.pop("size"), **fields}, separators=(",", ":")).encode()

    @staticmethod
    def from_json(raw: bytes) -> ShardScan:
        """Raises ValueError where `raw` is no sidecar of this version."""
        fields: dict[str, Any] = json.loads(raw)
        try:
            if fields.get("version") != VERSION:
                raise ValueError(f"sidecar version {fields.get('version')}, expected {VERSION}")
            return ShardScan(size=fields.pop("bytes"), **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("it is no sidecar") from error

    @property
    def facts(self) -> ShardFacts:
        return ShardFacts(self.size, self.sha256, self.samples, len(self.chunks), self.damage)


class _HashingSource:
    """Reads a file once, in order, for the tar parser, and keeps the checksums of what went by.

    That a sample is complete shows only at the next one's first header. So what went by is kept until `crc32` is asked
    for the chunk it belongs to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.at, self.sha256 = file, 0, hashlib.sha256()
        self.pieces: list[tuple[int, bytes]] = []  # what went by and belongs to no finished chunk yet

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._file.read(min(_PIECE, count - len(data)))
            if not piece:
                break
            data += piece
        self.sha256.update(data)
        self.pieces.append((self.at, data))
        self.at += len(data)
        return data

    def skip(self, count: int) -> int:
        passed = 0
        while passed < count:
            piece = len(self.take(min(_PIECE, count - passed)))
            if not piece:
                break
            passed += piece
        return passed

    def crc32(self, start: int, end: int) -> int:
        """Checksum of bytes [start, end), which are forgotten then, with all before them."""
        value, kept = 0, []
        for at, data in self.pieces:
            low, high = max(start - at, 0), min(end - at, len(data))
            if low < high:
                value = zlib.crc32(data[low:high], value)
            if at + len(data) > end:
                kept.append((at, data))
        self.pieces = kept
        return value


def scan_file(file: IO[bytes], chunk_samples: int) -> ShardScan:
    """Scan an open tar. Damage does not raise: what is whole is indexed, and `damage` says where the rest was lost."""
    source = _HashingSource(file)
    chunks: list[list[int]] = []
    flaws: dict[str, str] = {}
    keys: set[str] = set()
    damage, count, begin, end = "", 0, 0, 0

    def close_chunk() -> None:
        in_chunk = count - len(chunks) * chunk_samples
        chunks.append([begin, end - begin, in_chunk, source.crc32(begin, end)])

    try:
        for sample in group_samples(read_members(source)):
            if count and count % chunk_samples == 0:
                close_chunk()
            if count % chunk_samples == 0:
                begin = sample.start
            flaw = "key comes again later in the shard" if sample.key in keys else sample.flaw
            if flaw:
                flaws[str(count)] = flaw
            keys.add(sample.key)
            end, count = sample.end, count + 1
    except DamagedTar as error:
        damage = str(error)
    if count > len(chunks) * chunk_samples:
        close_chunk()
    source.pieces.clear()
    while source.take(_PIECE):  # the checksum is over the whole file
        source.pieces.clear()
    if not count:
        damage = damage or ("is empty" if source.at == 0 else "holds no samples")
    return ShardScan(source.at, source.sha256.hexdigest(), count, chunks, flaws, damage)


def scan_shard(url: str, chunk_samples: int) -> ShardScan:
    """Scan the tar at `url` (local path or s3://)."""
    filesystem, path = open_filesystem(url)
    with filesystem.open(path, "rb", block_size=8 * _PIECE) as file:
        return scan_file(file, chunk_samples)
