"""A dataset on disk: webdataset shards and their index.

    FOLDER/00000.tar                a webdataset shard: the members of a sample follow each other and share a key
    FOLDER/00000.tar.index.json     its sidecar (`.index-16.json` for chunks of 16 samples instead of 32):
        {"version": 1, "bytes": 512000, "sha256": "…", "samples": 1000,
         "chunks": [[offset, length, samples, crc32], …],   byte ranges of the tar, from the first header of the first
                                                            sample to the last padded block of the last one
         "flaws": {"17": "suffix 'txt' comes twice"},       samples (by number) that will be quarantined
         "damage": ""}                                      where the tar could not be read on
    FOLDER/index.json               the dataset:
        {"version": 1, "digest": "…", "samples": 1000, "chunk_samples": 32,
         "shards": [{"name", "bytes", "sha256", "samples", "chunks", "damage"}, …]}

Every chunk holds `chunk_samples` samples but the last of a shard, which may hold fewer. So the order of the data
follows from `index.json` alone, and a sidecar is fetched only to read its shard. The digest covers chunk_samples, names
and checksums. For a glob in place of a folder the file is `index-<crc32 of the pattern>.json`. Beside it stays a copy
under its digest, `index.<16 digits>.json`: what names that digest reads these shards, also when others have arrived.
Where the folder cannot be written, index and sidecars are kept in a folder that the caller names (`index_root`).
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infra.errors import BadRequest
from infra.storage import check_access, is_remote, open_filesystem, read_bytes, write_bytes
from pipelines.data.scan import CHUNK_SAMPLES, VERSION, ShardFacts, ShardScan, scan_shard, sidecar_name

_BUILD_HERE_BYTES = 64 << 30  # more than this is indexed by many machines
_SIDECARS_IN_MEMORY = 512

Scanner = Callable[["Location", str, Sequence[str], int], Iterable[tuple[str, ShardFacts]]]
"""Scans the named shards of a location and writes their sidecars under a root: (location, root, names, chunk_samples)
gives (name, facts) in any order."""


@dataclass
class DatasetIndex:
    """The shards of a dataset, as arrays: small enough to send to every reader at 10^5 shards."""

    url: str  # folder of the shards
    root: str  # folder of the sidecars
    digest: str
    chunk_samples: int
    names: list[str]
    shard_samples: NDArray[np.int64]  # (shards,)
    shard_bytes: NDArray[np.int64]  # (shards,)

    @property
    def samples(self) -> int:
        return int(self.shard_samples.sum())

    def shard_url(self, shard: int) -> str:
        return f"{self.url}/{self.names[shard]}"

    def sidecar(self, shard: int) -> ShardScan:
        """The sidecar of a shard, by number; the last few hundred used stay in memory. Raises OSError, ValueError."""
        scan = _load_sidecar(f"{self.root}/{sidecar_name(self.names[shard], self.chunk_samples)}", self.digest)
        if scan.samples != self.shard_samples[shard] or len(scan.chunks) != -(-scan.samples // self.chunk_samples):
            raise ValueError("it is not of this index")
        return scan


@lru_cache(_SIDECARS_IN_MEMORY)
def _load_sidecar(url: str, digest: str) -> ShardScan:
    return ShardScan.from_json(read_bytes(url))  # the digest is there so that a new index does not meet an old sidecar


class ListedShard(NamedTuple):
    """A shard as the storage lists it."""

    size: int  # bytes
    written: float  # seconds since 1970; 0 where the storage does not say

    @staticmethod
    def of(entry: dict[str, Any]) -> ListedShard:
        """From an entry of a detailed listing by fsspec."""
        when = entry.get("mtime", entry.get("LastModified"))  # of a file; of an object on S3
        written = when.timestamp() if isinstance(when, datetime) else float(when or 0)
        return ListedShard(int(entry["size"]), written)


@dataclass(frozen=True)
class Location:
    """What a dataset URL stands for: a folder, and the pattern of its shards."""

    folder: str
    pattern: str

    @staticmethod
    def parse(url: str) -> Location:
        """Raises BadRequest for what is neither a folder nor a glob of tars."""
        if url.startswith("pipe:"):
            raise BadRequest(f"data: {url}: commands are not run; give a folder or s3:// URL")
        if "{" in url:
            raise BadRequest(f"data: {url}: braces are not expanded; give the folder, or a glob such as FOLDER/*.tar")
        if not is_remote(url):
            url = open_filesystem(url)[1]
        url = url.rstrip("/")
        if not any(sign in url for sign in "*?["):
            if url.endswith(".tar"):
                folder, _, name = url.rpartition("/")
                return Location(folder, name)
            return Location(url, "*.tar")
        parts = url.split("/")
        first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
        return Location("/".join(parts[:first]), "/".join(parts[first:]))

    @property
    def index_name(self) -> str:
        return "index.json" if self.pattern == "*.tar" else f"index-{zlib.crc32(self.pattern.encode()):08x}.json"

    def pinned_name(self, digest: str) -> str:
        """Of the copy of an index that stays."""
        return f"{self.index_name.removesuffix('.json')}.{digest[:16]}.json"

    def sizes(self) -> dict[str, int]:
        """Bytes of each shard by name, sorted. Raises BadRequest where there is none or no access."""
        return {name: shard.size for name, shard in self.shards().items()}

    def shards(self) -> dict[str, ListedShard]:
        """What the storage lists, by name, sorted. Raises BadRequest where there is none or no access."""
        check_access(self.folder)
        filesystem, path = open_filesystem(self.folder)
        try:
            found = filesystem.glob(f"{path}/{self.pattern}", detail=True)
        except OSError as error:
            raise BadRequest(f"data: cannot list {self.folder}: {error}; check the address and your access") from error
        shards = {
            name[len(path) + 1 :]: ListedShard.of(entry) for name, entry in found.items() if entry["type"] == "file"
        }
        if not shards:
            raise BadRequest(f"data: no shard matches {self.folder}/{self.pattern}; prepare_shards.py makes some")
        return dict(sorted(shards.items()))


def _read_index(location: Location, root: str, digest: str | None = None) -> dict[str, Any] | None:
    path = f"{root}/{location.index_name if digest is None else location.pinned_name(digest)}"
    try:
        raw: dict[str, Any] = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadRequest(f"data: {path} is not JSON; run pipelines/index_shards.py again") from error
    if raw.get("version") != VERSION:
        raise BadRequest(f"data: {path} has another version; run pipelines/index_shards.py again")
    return raw


def _to_index(location: Location, root: str, raw: dict[str, Any]) -> DatasetIndex:
    shards = raw["shards"]
    if not raw["samples"]:
        raise BadRequest(f"data: the {len(shards)} shards of {location.folder} hold no samples")
    return DatasetIndex(
        url=location.folder,
        root=root,
        digest=raw["digest"],
        chunk_samples=raw["chunk_samples"],
        names=[shard["name"] for shard in shards],
        shard_samples=np.array([shard["samples"] for shard in shards], np.int64),
        shard_bytes=np.array([shard["bytes"] for shard in shards], np.int64),
    )


def _roots(location: Location, index_root: str | None) -> Iterator[str]:
    yield location.folder
    if index_root:
        # Another dataset of the same run has its own folder there.
        yield f"{index_root.rstrip('/')}/{hashlib.sha256(location.folder.encode()).hexdigest()[:12]}"


def write_index(location: Location, root: str, facts: dict[str, ShardFacts], chunk_samples: int) -> DatasetIndex:
    """Write the dataset's index, over sidecars that are already there; warns of damaged shards."""
    ordered = sorted(facts.items())
    digest = hashlib.sha256(f"{chunk_samples}\n".encode())
    shards = []
    for name, shard in ordered:
        digest.update(f"{name} {shard.sha256}\n".encode())
        size, sha256, samples, chunks, damage = shard
        shards.append(
            {"name": name, "bytes": size, "sha256": sha256, "samples": samples, "chunks": chunks, "damage": damage}
        )
    raw: dict[str, Any] = {
        "version": VERSION,
        "digest": digest.hexdigest(),
        "samples": sum(shard.samples for shard in facts.values()),
        "chunk_samples": chunk_samples,
        "shards": shards,
    }
    _warn_of_damage({name: shard.damage for name, shard in ordered if shard.damage})
    text = json.dumps(raw, separators=(",", ":")).encode()
    write_bytes(f"{root}/{location.pinned_name(raw['digest'])}", text)
    write_bytes(f"{root}/{location.index_name}", text)
    return _to_index(location, root, raw)


def _warn_of_damage(damage: dict[str, str]) -> None:
    for name, reason in list(damage.items())[:20]:
        print(f"warning: shard {name}: {reason}; only what is whole is used", file=sys.stderr)
    if len(damage) > 20:
        print(f"warning: and {len(damage) - 20} more damaged shards, listed in the index", file=sys.stderr)


def scan_to_sidecar(location: Location, root: str, name: str, chunk_samples: int, rescan: bool = False) -> ShardFacts:
    """Scan one shard and write its sidecar, unless it has one already; `rescan` reads it in any case."""
    shard, sidecar = f"{location.folder}/{name}", f"{root}/{sidecar_name(name, chunk_samples)}"
    scan = None if rescan else _earlier_scan(shard, sidecar)
    if scan is None:
        scan = scan_shard(shard, chunk_samples)
        write_bytes(sidecar, scan.to_json())
    return scan.facts


def _earlier_scan(shard: str, sidecar: str) -> ShardScan | None:
    """The sidecar where it is newer than the shard and gives the same size: what an interrupted indexing had done."""
    try:
        scan = ShardScan.from_json(read_bytes(sidecar))
    except (FileNotFoundError, ValueError):
        return None
    filesystem, path = open_filesystem(shard)
    sidecars, sidecar_path = open_filesystem(sidecar)
    if filesystem.size(path) != scan.size or sidecars.modified(sidecar_path) <= filesystem.modified(path):
        return None
    return scan


def writable_root(location: Location, index_root: str | None) -> str:
    """Where the index can be kept: beside the shards, else under `index_root`. Raises BadRequest where neither can."""
    for root in _roots(location, index_root):
        try:
            check_access(root, write=True)
        except BadRequest:
            continue
        return root
    raise BadRequest(
        f"data: the index can't be written beside {location.folder}; name a folder for it with --index-root"
    )


def build_index(
    url: str, scan: Scanner, index_root: str | None = None, chunk_samples: int = CHUNK_SAMPLES
) -> DatasetIndex:
    """Read every shard and write sidecars and index; `scan` says where the shards are read."""
    location = Location.parse(url)
    names = list(location.shards())
    root = writable_root(location, index_root)
    return write_index(location, root, dict(scan(location, root, names, chunk_samples)), chunk_samples)


def refresh_index(url: str, index_root: str | None = None) -> DatasetIndex:
    """The index of the dataset at `url` as its shards are now: where some were added or changed, these are read here,
    into chunks of as many samples as the others have. Raises BadRequest as `load_index` does."""
    location = Location.parse(url)
    shards = location.shards()
    for root in _roots(location, index_root):
        raw = _read_index(location, root)
        if raw is None:
            continue
        same = {shard["name"]: shard["bytes"] for shard in raw["shards"]} == {
            name: shard.size for name, shard in shards.items()
        }
        # Tars are padded: other samples may take as many bytes.
        if same and max(shard.written for shard in shards.values()) <= _written(f"{root}/{location.index_name}"):
            return _to_index(location, root, raw)
        facts = dict(scan_here(location, root, list(shards), raw["chunk_samples"], progress=False))
        return write_index(location, root, facts, raw["chunk_samples"])
    return load_index(url, index_root, progress=False)


def _written(url: str) -> float:
    """When a file was written, in seconds since 1970."""
    filesystem, path = open_filesystem(url)
    return float(filesystem.modified(path).timestamp())


def scan_here(
    location: Location,
    root: str,
    names: Sequence[str],
    chunk_samples: int,
    progress: bool = True,
    rescan: bool = False,
) -> Iterator[tuple[str, ShardFacts]]:
    """Scan shards one after another in this process, with a progress bar on the screen."""
    from rich.progress import track

    for name in track(names, description="indexing shards", disable=not progress):
        yield name, scan_to_sidecar(location, root, name, chunk_samples, rescan)


def load_index(
    url: str,
    index_root: str | None = None,
    build: bool = True,
    progress: bool = True,
    digest: str | None = None,
    present: bool = True,
) -> DatasetIndex:
    """The index of the dataset at `url`, a folder of tars or a glob of them, local or s3://; built where there is none.

    Damaged shards are told of each time, unless without `progress`: what they have lost nobody can count. With `digest`
    the index that had this digest, whatever has arrived since; its shards have to be there, unless not `present`.

    Raises BadRequest where nothing matches, access fails, the shards hold no samples, the shards are no longer those
    of the index, or the dataset is too large to be indexed by one process.
    """
    location = Location.parse(url)
    sizes = location.sizes()
    if digest is not None:
        return _load_pinned(location, index_root, digest, sizes, present)
    for root in _roots(location, index_root):
        raw = _read_index(location, root)
        if raw is None:
            continue
        known = {shard["name"]: shard["bytes"] for shard in raw["shards"]}
        if progress:
            _warn_of_damage({shard["name"]: shard["damage"] for shard in raw["shards"] if shard["damage"]})
        if known != sizes:
            changed = sorted(name for name in known.keys() | sizes.keys() if known.get(name) != sizes.get(name))
            raise BadRequest(
                f"data: the index of {location.folder} is out of date ({len(changed)} shards differ, first "
                f"{changed[0]}); run pipelines/index_shards.py {url}"
            )
        return _to_index(location, root, raw)
    if not build:
        raise BadRequest(f"data: {location.folder} has no index; run pipelines/index_shards.py {url}")
    if sum(sizes.values()) > _BUILD_HERE_BYTES:
        raise BadRequest(
            f"data: {location.folder} has no index and {sum(sizes.values()) >> 30} GiB of shards; index them over the "
            f"cluster with pipelines/index_shards.py {url}"
            + (f" (--index-root {index_root} where the shards' folder cannot be written)" if index_root else "")
        )
    return build_index(url, partial(scan_here, progress=progress), index_root)


def _load_pinned(
    location: Location, index_root: str | None, digest: str, sizes: dict[str, int], present: bool
) -> DatasetIndex:
    for root in _roots(location, index_root):
        raw = _read_index(location, root, digest) or _read_index(location, root)
        if raw is None or raw["digest"] != digest:
            continue
        known = {shard["name"]: shard["bytes"] for shard in raw["shards"]}
        if not present:
            return _to_index(location, root, raw)
        if changed := [name for name, size in known.items() if sizes.get(name) != size]:
            raise BadRequest(
                f"data: {len(changed)} shards of index {digest[:12]} of {location.folder} are gone or changed, first "
                f"{changed[0]}: put them back, or begin a run of another name"
            )
        return _to_index(location, root, raw)
    raise BadRequest(
        f"data: {location.folder} has no index {digest[:12]} any more: leave out data.index and data.old_index (which "
        "--new-share sets)"
    )


def with_share_of_new(index: DatasetIndex, old: DatasetIndex, share: float) -> tuple[DatasetIndex, float]:
    """An index in which shards come several times, so that about `share` of an epoch is of those that `old` lacks, or
    has in another size; and what that share is then.

    Whole numbers of times: the smallest with which neither's share is off by more than a tenth. Raises BadRequest where
    either is missing.
    """
    known = set(zip(old.names, old.shard_bytes.tolist(), strict=True))
    is_new = np.array([shard not in known for shard in zip(index.names, index.shard_bytes.tolist(), strict=True)])
    new, others = int(index.shard_samples[is_new].sum()), int(index.shard_samples[~is_new].sum())
    if not new or not others:
        raise BadRequest(f"data.new_share={share:g}: {new} samples are new, and {others} are not; leave it null")
    ratio = share * others / ((1 - share) * new)
    few = range(1, 6)
    choices = [(max(1, round(ratio * n)), n) for n in few] + [(n, max(1, round(n / ratio))) for n in few]

    def share_of(choice: tuple[int, int]) -> float:
        return choice[0] * new / (choice[0] * new + choice[1] * others)

    close = 0.1 * min(share, 1 - share)
    best = min(choices, key=lambda choice: (max(abs(share_of(choice) - share), close), sum(choice)))
    times = np.where(is_new, *best)
    places = np.repeat(np.arange(len(index.names)), times)
    names = [index.names[place] for place in places]
    mixed = replace(
        index, names=names, shard_samples=index.shard_samples[places], shard_bytes=index.shard_bytes[places]
    )
    return mixed, share_of(best)
