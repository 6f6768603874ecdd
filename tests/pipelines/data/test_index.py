"""Indices: of shards we write, of shards others made, and of damaged ones."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from functools import partial

import pytest
import webdataset

from infra.errors import BadRequest
from pipelines.data.index import build_index, load_index, refresh_index, scan_here, with_share_of_new
from pipelines.data.order import DataOrder
from pipelines.data.scan import CHUNK_SAMPLES, scan_file, scan_shard
from pipelines.data.tar import split_name
from pipelines.data.write import ShardBuffer
from tests.pipelines.data.shards import encode, numbered_image, pairs, write_shards, write_tar


def test_what_is_written_is_what_a_scan_finds_and_webdataset_opens(tmp_path):
    index = write_shards(tmp_path / "s", samples=25, per_shard=10, chunk_samples=4)
    assert index.names == ["00000.tar", "00001.tar", "00002.tar"]
    assert index.shard_samples.tolist() == [10, 10, 5]
    raw = (tmp_path / "s" / "00001.tar").read_bytes()
    scan = index.sidecar(1)
    assert scan == scan_file(io.BytesIO(raw), 4)
    assert [chunk[2] for chunk in scan.chunks] == [4, 4, 2]
    assert all(zlib.crc32(raw[at : at + length]) == crc32 for at, length, _, crc32 in scan.chunks)
    assert scan.sha256 == hashlib.sha256(raw).hexdigest() and not scan.damage

    opened = list(webdataset.WebDataset(str(tmp_path / "s" / "00001.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in opened] == [f"{n:06d}" for n in range(10, 20)]
    assert opened[3]["txt"] == b"number 13" and opened[3]["png"] == encode(numbered_image(13))


def test_equal_samples_give_equal_bytes_and_digest(tmp_path):
    first, second = (write_shards(tmp_path / name, 9, 4) for name in "ab")
    assert first.digest == second.digest
    assert (tmp_path / "a/00001.tar").read_bytes() == (tmp_path / "b/00001.tar").read_bytes()
    assert write_shards(tmp_path / "c", 8, 4).digest != first.digest


def test_two_chunk_sizes_live_beside_each_other(tmp_path):
    index = write_shards(tmp_path, 20, 10)
    other = build_index(f"{tmp_path}/0000?.tar", partial(scan_here, progress=False), chunk_samples=3)
    assert len(other.sidecar(0).chunks) == 4 and len(index.sidecar(0).chunks) == 1
    assert load_index(str(tmp_path)).chunk_samples == 32


def test_an_index_is_built_on_first_use_and_found_on_the_second(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", pairs(40))
    write_tar(tmp_path / "b.tar", pairs(3, first=40))
    index = load_index(str(tmp_path), progress=False)
    assert index.samples == 43 and index.names == ["a.tar", "b.tar"]
    assert load_index(str(tmp_path), build=False).digest == index.digest
    assert load_index(f"{tmp_path}/a.tar", progress=False).samples == 40
    write_tar(tmp_path / "c.tar", pairs(1))
    with pytest.raises(BadRequest, match=r"out of date.*c\.tar.*index_shards"):
        load_index(str(tmp_path))


def test_img2dataset_layout(tmp_path):
    members = []
    for number in range(5):
        facts = json.dumps({"caption": f"json {number}", "key": f"{number:09d}", "width": 8}).encode()
        image = encode(numbered_image(number), "JPEG")
        members += [(f"{number:09d}.jpg", image), (f"{number:09d}.txt", b"t"), (f"{number:09d}.json", facts)]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"beside")
    (tmp_path / "00000_stats.json").write_text("{}")
    index = load_index(str(tmp_path), progress=False)
    assert index.samples == 5 and not index.sidecar(0).flaws


def test_a_folder_that_cannot_be_written_keeps_its_index_elsewhere(tmp_path, monkeypatch):
    import pipelines.data.index as module

    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "a.tar", pairs(4))
    check = module.check_access

    def read_only(url, write=False):
        if write and str(url) == str(shards):
            raise BadRequest("read-only")
        check(url, write)

    monkeypatch.setattr(module, "check_access", read_only)
    with pytest.raises(BadRequest, match="--index-root"):
        load_index(str(shards), progress=False)
    index = load_index(str(shards), index_root=str(tmp_path / "run"), progress=False)
    assert index.samples == 4 and sorted(p.name for p in shards.iterdir()) == ["a.tar"]
    assert index.sidecar(0).samples == 4
    assert load_index(str(shards), index_root=str(tmp_path / "run"), build=False).digest == index.digest


def test_an_interrupted_indexing_goes_on_where_it_was(tmp_path, monkeypatch):
    for name in "abcde":
        write_tar(tmp_path / f"{name}.tar", pairs(3, first=ord(name)))
    scanned, lost = [], ["c"]

    def scan(url, chunk_samples):
        scanned.append(url[-5])
        if url.endswith("c.tar") and lost:
            lost.clear()
            raise ConnectionResetError(url)
        return scan_shard(url, chunk_samples)

    monkeypatch.setattr("pipelines.data.index.scan_shard", scan)
    with pytest.raises(ConnectionResetError):
        load_index(str(tmp_path), progress=False)
    write_tar(tmp_path / "a.tar", pairs(3))  # of the same size, but newer than its sidecar
    (tmp_path / "b.tar.index.json").write_bytes(b'{"version": 1')
    index = load_index(str(tmp_path), progress=False)
    assert scanned == [*"abc", *"abcde"]
    scanned.clear()
    build = partial(build_index, str(tmp_path))
    assert build(partial(scan_here, progress=False)).digest == index.digest and not scanned
    with (tmp_path / "d.tar").open("ab") as file:  # another size, and a date that is older than the sidecar
        file.write(b"\0" * 512)
    os.utime(tmp_path / "d.tar", (1, 1))
    assert build(partial(scan_here, progress=False)).digest != index.digest and scanned == ["d"]
    scanned.clear()
    build(partial(scan_here, progress=False, rescan=True))
    assert scanned == [*"abcde"]


@pytest.mark.parametrize(
    ("blocks", "whole", "word"),
    [
        (24, 6, "end marker"),  # all six samples, each of four blocks: only the marker is gone
        (3, 0, "inside member '0000.txt'"),
        (5, 1, "inside member '0001.png'"),
        (6, 2, "end marker"),  # the second sample has its image only, and is quarantined when it is read
    ],
)
def test_a_truncated_shard_is_indexed_as_far_as_it_is_whole(tmp_path, blocks, whole, word, capsys):
    write_tar(tmp_path / "good.tar", pairs(3))
    write_tar(tmp_path / "z.tar", pairs(6))
    (tmp_path / "z.tar").write_bytes((tmp_path / "z.tar").read_bytes()[: blocks * 512])
    index = load_index(str(tmp_path), progress=False)
    assert index.samples == 3 + whole
    assert "z.tar" in capsys.readouterr().err
    assert word in index.sidecar(1).damage


def test_a_bad_header_in_the_middle_is_no_silent_end(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", pairs(6))
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmembers()[4].offset
    raw[third + 5] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(raw)
    index = load_index(str(tmp_path), progress=False)
    assert index.samples == 2
    assert f"no tar header at byte {third}" in capsys.readouterr().err


def test_empty_and_zeroed_shards_are_named_and_the_others_used(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", pairs(2))
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(b"\0" * 10240)
    assert load_index(str(tmp_path), progress=False).shard_samples.tolist() == [2, 0, 0]
    warnings = capsys.readouterr().err
    assert "b.tar" in warnings and "c.tar: holds no samples" in warnings
    (tmp_path / "a.tar").unlink()
    (tmp_path / "index.json").unlink()
    with pytest.raises(BadRequest, match="hold no samples"):
        load_index(str(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("/nowhere/at/all", "no shard matches"),
        ("pipe:cat x.tar", "commands are not run"),
        ("/data/{000..010}.tar", "braces"),
        ("ftp://host/x", "scheme"),
    ],
)
def test_bad_addresses_are_one_clear_line(url, word):
    with pytest.raises(BadRequest, match=word) as caught:
        load_index(url)
    assert "\n" not in str(caught.value)


def test_long_names_and_keys_by_webdatasets_rule(tmp_path):
    name = "folder.with.dots/" + "n" * 150
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
            for suffix in ("png", "txt"):
                stem = name if kind != tarfile.USTAR_FORMAT else "p" * 90 + "/" + "n" * 80
                info = tarfile.TarInfo(f"{stem}.{suffix}")
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        scan = scan_file(io.BytesIO((tmp_path / "a.tar").read_bytes()), 32)
        assert scan.samples == 1 and not scan.damage and not scan.flaws
    assert split_name("a.b/c.d.e") == webdataset.tariterators.base_plus_ext("a.b/c.d.e")
    assert split_name("README") is None and split_name("a/.hidden") is None


def test_an_index_is_read_by_its_digest_whatever_has_arrived_since(tmp_path):
    first = load_index(write(tmp_path, "a", 40), progress=False)
    write(tmp_path, "b", 24)
    with pytest.raises(BadRequest, match="out of date"):
        load_index(str(tmp_path), progress=False)
    both = refresh_index(str(tmp_path))
    assert (first.samples, both.samples) == (40, 64) and first.digest != both.digest
    pinned = load_index(str(tmp_path), build=False, progress=False, digest=first.digest)
    assert (pinned.names, pinned.digest, pinned.samples) == (["a.tar"], first.digest, 40)
    assert [pinned.sidecar(0).samples, both.sidecar(1).samples] == [40, 24]
    with pytest.raises(BadRequest, match="has no index 000000000000 any more"):
        load_index(str(tmp_path), digest="0" * 64)
    other = tmp_path / "b.tar"
    write(tmp_path, "c", 24)  # as many bytes, and other samples
    assert (tmp_path / "c.tar").stat().st_size == other.stat().st_size
    (tmp_path / "c.tar").rename(other)
    os.utime(other, (now := (tmp_path / "index.json").stat().st_mtime + 1, now))
    rewritten = refresh_index(str(tmp_path))
    assert rewritten.names == both.names and rewritten.digest != both.digest
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadRequest, match=r"1 shards of index \w{12} of .* are gone or changed, first a.tar"):
        load_index(str(tmp_path), digest=first.digest)


@pytest.mark.parametrize(
    ("share", "times"), [(0.5, (1, 5)), (0.25, (2, 3)), (0.2, (3, 4)), (0.05, (4, 1)), (0.9, (1, 45))]
)
def test_new_shards_come_as_often_as_their_share_asks_for(tmp_path, share, times):
    for name in "abcde":
        write(tmp_path, name, 32)
    old = load_index(str(tmp_path), progress=False)
    write(tmp_path, "f", 32)
    mixed, reached = with_share_of_new(refresh_index(str(tmp_path)), old, share)
    assert [mixed.names.count(f"{name}.tar") for name in "abcdef"] == [times[0]] * 5 + [times[1]]
    assert mixed.samples == 32 * (5 * times[0] + times[1])
    assert reached == times[1] / (5 * times[0] + times[1]) and abs(reached - share) < 0.1 * min(share, 1 - share)
    order = DataOrder(mixed, 0, lanes=4, global_batch=16, slots_per_lane=8)
    assert order.samples == mixed.samples
    with pytest.raises(BadRequest, match=r"data.new_share=.*: 0 samples are new, and 160 are not"):
        with_share_of_new(old, old, share)


def write(folder, name, samples):
    """A shard of so many samples; returns the folder."""
    buffer = ShardBuffer()
    for number in range(samples):
        buffer.add(f"{name}-{number}", {"png": b"p", "txt": b"t"})
    buffer.write(str(folder), f"{name}.tar", CHUNK_SAMPLES)
    return str(folder)
