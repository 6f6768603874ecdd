"""The tar format, read strictly: members with their byte ranges, grouped into webdataset samples.

Python's tarfile ends in silence at a bad header and at a cut between two members, so shards that lost half of their
samples look whole. Here every header's checksum is verified and the end marker must be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
_FOLDER, _GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL = b"5", b"L", b"K", b"x", b"g"
_FORBIDDEN_SUFFIXES = {"pkl", "pickle", "pyd", "pth", "pt"}  # decoders of other libraries unpickle these
_EXTENSION_LIMIT = 1 << 20  # bytes; a name longer than this is damage


class Source(Protocol):
    """Where a tar is read from, once and in order."""

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end."""

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns how many there were."""


class BytesSource:
    """A tar that is already in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def skip(self, count: int) -> int:
        passed = min(count, len(self._data) - self._at)
        self._at += passed
        return passed


class DamagedTar(Exception):
    """The tar cannot be read on from here; what came before is whole. `cut_member` names the member that is not."""

    def __init__(self, message: str, cut_member: str = "") -> None:
        super().__init__(message)
        self.cut_member = cut_member


@dataclass(frozen=True)
class Member:
    """One member: `start` is the offset of its first header, `data` of its content, `end` of its last padded block."""

    name: str
    kind: bytes
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + padded(self.size)


@dataclass
class TarSample:
    """The consecutive members of one key. `flaw` says why it cannot be used, or is empty."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    flaw: str = ""
    start: int = 0
    end: int = 0


def padded(size: int) -> int:
    """`size` rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def _number(raw: bytes) -> int:
    if raw[:1] in (b"\x80", b"\xff"):  # GNU base-256, for what does not fit in octal
        return int.from_bytes(raw[1:], "big")
    text = raw.split(b"\0", 1)[0].strip()
    return int(text, 8) if text else 0


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_path(raw: bytes) -> str | None:
    path, at = None, 0
    while at < len(raw):
        length = int(raw[at:].split(b" ", 1)[0])
        record = raw[at : at + length].split(b" ", 1)[1].rstrip(b"\n")
        name, _, value = record.partition(b"=")
        if name == b"path":
            path = value.decode("utf-8", "surrogateescape")
        if name == b"size":
            raise ValueError("members of 8 GiB and more are not read")
        at += length
    return path


def read_members(source: Source, whole: bool = True) -> Iterator[Member]:
    """Members in order, each yielded once its content was passed.

    `whole=False` reads a piece cut out of a tar, which has no end marker. Raises DamagedTar at a header that is none,
    at a cut, and at a missing end marker.
    """
    at, start, long_name = 0, None, None
    while True:
        header = source.take(BLOCK)
        if not header and start is None and not whole:
            return
        if len(header) < BLOCK:
            raise DamagedTar(f"cut at byte {at + len(header)}: the end marker is missing")
        if not header.strip(b"\0"):
            return
        try:
            stated, actual = _number(header[148:156]), sum(header[:148]) + 8 * 32 + sum(header[156:])
            size, kind = _number(header[124:136]), header[156:157]
        except ValueError as error:
            raise DamagedTar(f"no tar header at byte {at}") from error
        if stated != actual:
            raise DamagedTar(f"no tar header at byte {at}")
        start = at if start is None else start
        data = at + BLOCK
        at = data + padded(size)
        if kind in (_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL):
            raw = source.take(padded(size)) if size <= _EXTENSION_LIMIT else b""
            if len(raw) < padded(size):
                raise DamagedTar(f"cut or overlong name at byte {data}")
            try:
                if kind == _GNU_NAME:
                    long_name = _text(raw)
                elif kind == _PAX:
                    long_name = _pax_path(raw[:size]) or long_name
            except (ValueError, IndexError) as error:
                raise DamagedTar(f"extended header at byte {data}: {error}") from error
            continue
        prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
        name = long_name or (f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100]))
        passed = source.skip(padded(size))
        if passed < padded(size):
            raise DamagedTar(f"cut at byte {data + passed}, inside member {name!r}", name)
        yield Member(name, _FOLDER if name.endswith("/") else kind, start, data, size)
        start, long_name = None, None


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix by webdataset's rule (the key ends at the first dot of the last path part); None for no sample.

    >>> split_name("a.b/x.seg.PNG")
    ('a.b/x', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not dot or not stem or (name.startswith("__") and name.endswith("__")):
        return None
    return f"{folder}{slash}{stem}", suffix.lower()


def _flaw_of(member: Member, suffix: str, sample: TarSample) -> str:
    if member.kind not in REGULAR:
        return f"member {member.name!r} is a link or a device"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"member {member.name!r} leaves the archive's folder"
    if suffix.rpartition(".")[2] in _FORBIDDEN_SUFFIXES:
        return f"member {member.name!r} would need unpickling"
    if suffix in sample.members:
        return f"suffix {suffix!r} comes twice"
    return ""


def group_samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Consecutive members of the same key, each group as a sample; folders and names without a suffix are passed over.

    A DamagedTar from `members` is raised after the last sample; one whose member was cut off is not given.
    """
    sample: TarSample | None = None
    damage: DamagedTar | None = None
    stream = iter(members)
    while True:
        try:
            member = next(stream)
        except StopIteration:
            break
        except DamagedTar as error:
            damage = error
            break
        split = None if member.kind == _FOLDER else split_name(member.name)
        if split is None:
            continue
        key, suffix = split
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = TarSample(key, start=member.start)
        sample.flaw = sample.flaw or _flaw_of(member, suffix, sample)
        sample.members.setdefault(suffix, member)
        sample.end = member.end
    if sample is not None and not (damage and (split_name(damage.cut_member) or ("",))[0] == sample.key):
        yield sample
    if damage:
        raise damage
