"""Reading in process: exact epochs, checked bytes, and every bad sample of TRAPS with its reason."""

import io
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import pipelines.data.read as read
from pipelines.data.batch import to_batch
from pipelines.data.fixed import fixed_batches
from pipelines.data.index import DatasetIndex, load_index
from pipelines.data.order import DataOrder
from pipelines.data.quarantine import DataFailure
from pipelines.data.spec import SampleSpec
from tests.pipelines.data.shards import encode, numbered_image, pairs, write_shards, write_tar


def words_tokenizer() -> str:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "?": 3, "number": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer.to_str()


SPEC = SampleSpec(image_size=8)


def rows(order, spec, first, last, world_size=1):
    found = []
    for step in range(first, last):
        for rank in range(world_size):
            (table,) = read.read_steps(order, spec, rank, world_size, step, step + 1)
            found += table.to_pylist()
    return found


def test_an_epoch_is_exact_and_the_same_at_world_sizes_one_two_and_four(tmp_path):
    index = write_shards(tmp_path, samples=96, per_shard=25, chunk_samples=4)
    order = DataOrder(index, seed=7, lanes=4, global_batch=8, slots_per_lane=6)
    runs = {size: rows(order, SPEC, 0, 24, size) for size in (1, 2, 4)}  # two epochs
    for size in (2, 4):
        assert runs[size] == runs[1]
    epoch = 12 * 8
    for part in (runs[1][:epoch], runs[1][epoch:]):
        expected = {(f"{n:06d}", numbered_image(n).transpose(2, 0, 1).tobytes(), f"number {n}") for n in range(96)}
        counts = Counter((row["key"].partition("/")[2], row["image"], row["caption"]) for row in part)
        # a row shuffles across the epoch's end only where it holds the end, which 96 slots in rows of 24 do not
        assert counts == Counter(expected)
    assert [r["key"] for r in runs[1][:epoch]] != [r["key"] for r in runs[1][epoch:]]
    assert len({row["seed"] for row in runs[1]}) == len(runs[1])
    assert [row["step"] for row in runs[1]] == [step for step in range(24) for _ in range(8)]


def test_a_start_in_the_middle_of_a_row_gives_the_same_batches(tmp_path):
    order = DataOrder(write_shards(tmp_path, 50, 20), seed=0, lanes=2, global_batch=4, slots_per_lane=16)
    whole = list(read.read_steps(order, SPEC, 1, 2, 0, 20))
    assert [t.to_pylist() for t in read.read_steps(order, SPEC, 1, 2, 5, 19)] == [t.to_pylist() for t in whole[5:19]]


def test_altered_bytes_are_quarantined_by_checksum_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_BACKOFF_SECONDS", 0.001)
    index = write_shards(tmp_path, samples=40, per_shard=20, chunk_samples=5)
    path = tmp_path / "00000.tar"
    raw = bytearray(path.read_bytes())
    offset, length, _, _ = index.sidecar(0).chunks[2]
    raw[offset + length - 600] ^= 1
    path.write_bytes(raw)
    found = rows(DataOrder(index, 0, 1, 8, 8), SPEC, 0, 5)
    bad = [row for row in found if row["reason"]]
    assert len(bad) == 5 and len(found) == 40
    assert all(row["reason"].startswith("checksum") and row["key"].startswith("00000.tar/chunk2/") for row in bad)
    assert all(row["weight"] == 0 and not any(row["image"]) for row in bad)
    assert all(
        row["weight"] == 1 and any(row["image"]) for row in found if not row["reason"] and "000000" not in row["key"]
    )


class Flaky:
    """A filesystem whose first `broken` range reads lose one chunk's connection and cut another chunk short."""

    def __init__(self, broken):
        self.broken, self.calls, self.real = broken, [], read.open_filesystem

    def __call__(self, url):
        self.filesystem, path = self.real(url)
        return self, path

    def cat_ranges(self, paths, starts, ends, **options):
        self.calls.append(len(paths))
        self.lost, self.cut = starts[:2] if len(self.calls) == 1 else (self.lost, self.cut)
        answers = self.filesystem.cat_ranges(paths, starts, ends, **options)
        if len(self.calls) > self.broken:
            return answers
        return [
            ConnectionResetError("connection reset")
            if start == self.lost
            else answer[: -7 * (start == self.cut) or None]
            for start, answer in zip(starts, answers)
        ]


def test_an_outage_is_waited_out_and_altered_bytes_are_read_three_times(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_BACKOFF_SECONDS", 0.001)
    index = write_shards(tmp_path, samples=20, per_shard=20, chunk_samples=5)
    wanted = [(0, chunk) for chunk in range(4)]
    short = Flaky(2)
    monkeypatch.setattr(read, "open_filesystem", short)
    assert not any(chunk.reason for chunk in read.read_chunks(index, wanted).values())
    assert short.calls == [4, 2, 2]

    long = Flaky(6)
    long.real = short.real
    monkeypatch.setattr(read, "open_filesystem", long)
    chunks = read.read_chunks(index, wanted)
    assert long.calls == [4, 2, 2, 1, 1, 1, 1]
    assert [chunks[chunk_id].reason[:8] for chunk_id in wanted] == ["", "checksum", "", ""]


@pytest.mark.parametrize("lost", ["00000.tar", "00000.tar.index.json"])
def test_what_cannot_be_read_is_an_error_and_no_bad_sample(tmp_path, monkeypatch, lost):
    monkeypatch.setattr(read, "_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(read, "_OUTAGE_SECONDS", 0.02)
    index = write_shards(tmp_path, samples=80, per_shard=40)
    (tmp_path / lost).unlink()
    assert read.read_chunks(index, [(1, 0)])[1, 0].samples
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"shard .*/00000\.tar could not be read for 0\.02 s: "):
        read.read_chunks(index, [(1, 1), (0, 1)])
    assert 0.02 <= time.monotonic() - begin < 2


def test_errors_of_the_object_storage_client_are_outages_too(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_OUTAGE_SECONDS", 0)
    index = write_shards(tmp_path, samples=4, per_shard=4)

    def unreachable(self, shard):
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

    monkeypatch.setattr(DatasetIndex, "sidecar", unreachable)
    with pytest.raises(OSError, match="sidecar: Could not connect to the endpoint"):
        read.read_chunks(index, [(0, 0)])


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"version": 1, "colour": "red"}'])
def test_a_damaged_sidecar_stops_the_run_and_says_what_to_do(tmp_path, damage):
    index = write_shards(tmp_path, samples=4, per_shard=4)
    (tmp_path / "00000.tar.index.json").write_bytes(damage)
    with pytest.raises(DataFailure, match=r"sidecar of shard .*00000\.tar: .*run pipelines/index_shards\.py again"):
        read.read_chunks(index, [(0, 0)])


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
BAD = {
    "truncated": ([(".jpg", encode(NOISE, "JPEG")[:2000]), (".txt", b"c")], "image: "),
    "no-caption": ([(".png", encode(numbered_image(1)))], "caption: no txt member"),
    "empty": ([(".png", encode(numbered_image(1))), (".txt", b" \n")], "caption: empty"),
    "not-utf8": ([(".png", encode(numbered_image(1))), (".txt", b"\xff\xfe\x00")], "caption: not UTF-8"),
    "no-image": ([(".txt", b"c")], "image: missing"),
    "two-images": ([(".png", encode(numbered_image(1))), (".jpg", b""), (".txt", b"c")], "image: several"),
    "twice": ([(".png", encode(numbered_image(1))), (".txt", b"c"), (".TXT", b"d")], "comes twice"),
    "pickle": ([(".png", encode(numbered_image(1))), (".txt", b"c"), (".pkl", b"cos\nsystem\n")], "unpickling"),
    "torch": ([(".png", encode(numbered_image(1))), (".txt", b"c"), (".x.pth", b"")], "unpickling"),
    "../up": ([(".png", encode(numbered_image(1))), (".txt", b"c")], "leaves the archive"),
    "/abs": ([(".png", encode(numbered_image(1))), (".txt", b"c")], "leaves the archive"),
    "0000": ([(".png", encode(numbered_image(1))), (".txt", b"c")], "comes again later"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_keeps_its_slot_with_weight_zero_and_a_reason(tmp_path, name):
    members, reason = BAD[name]
    write_tar(
        tmp_path / "a.tar", [*pairs(3), *((name + suffix, data) for suffix, data in members), *pairs(2, first=10)]
    )
    index = load_index(str(tmp_path), progress=False)
    assert index.samples == 6
    found = sorted(rows(DataOrder(index, 0, 1, 6, 6), SPEC, 0, 1), key=lambda row: row["weight"])
    assert [row["weight"] for row in found] == [0, 1, 1, 1, 1, 1]
    assert reason in found[0]["reason"] and not any(found[0]["image"])
    assert found[0]["key"] == f"a.tar/{name}"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_not_followed(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, data in pairs(2):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for member in ("x.png", "x.txt"):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    (bad, *good) = sorted(
        rows(DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 3, 3), SPEC, 0, 1),
        key=lambda row: row["weight"],
    )
    assert "is a link" in bad["reason"] and [row["weight"] for row in good] == [1, 1]


def test_tokens_keep_their_end_when_cut_and_are_padded(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", encode(numbered_image(1))), ("a.txt", b"number " * 20), *pairs(1)])
    spec = SampleSpec(8, tokenizer_json=words_tokenizer(), token_length=6, pad_token_id=2)
    order = DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 2, 2)
    tokens = {row["key"]: np.frombuffer(row["token_ids"], np.int32).tolist() for row in rows(order, spec, 0, 1)}
    assert tokens == {"a.tar/a": [0, 4, 4, 4, 4, 1], "a.tar/0000": [0, 4, 3, 1, 2, 2]}


def test_captions_from_json_and_a_choice_that_changes_from_epoch_to_epoch(tmp_path):
    facts = json.dumps({"long": "from json", "many": ["one", "two"], "none": None, "half": "cut \ud83d"}).encode()
    write_tar(tmp_path / "a.tar", [("a.png", encode(numbered_image(1))), ("a.json", facts), ("a.txt", b"from txt")])
    order = DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 1, 1)

    def captions(caption):
        return {row["caption"] or row["reason"] for row in rows(order, SampleSpec(8, caption=caption), 0, 40)}

    assert captions("json:long") == {"from json"}
    assert captions(("txt", "json:many", "json:absent")) == {"from txt", "one", "two"}
    assert captions("json:none") == {"caption: missing"}
    assert captions("cap") == {"caption: no cap member"}
    assert captions("json:half") == {"caption: not Unicode"}
    assert all(row["weight"] == 1 for row in rows(order, SampleSpec(8, caption=None), 0, 2))


def test_the_name_of_a_class_is_read_and_a_sample_without_one_is_kept(tmp_path):
    members = [("a.png", encode(numbered_image(1))), ("a.json", b'{"digit": 7}'), ("b.png", encode(numbered_image(2)))]
    more = [("b.json", b"[7]"), ("b.cls", b" seven\n"), ("c.png", members[0][1]), ("c.json", b'{"digit": "7\\ud83d"}')]
    write_tar(tmp_path / "a.tar", [*members, *more])
    index = load_index(str(tmp_path), progress=False)
    for label, wanted in (("json:digit", ["7", ""]), ("cls", ["", "seven"]), ("json:none", ["", ""])):
        (batch,) = fixed_batches(index, SampleSpec(8, caption=None, label=label), 3, 3)
        assert batch["labels"][:2] == wanted and batch["weight"].tolist() == [1, 1, 1]
        assert batch["labels"][2] == ("7" if label == "json:digit" else "")
    assert "labels" not in fixed_batches(index, SampleSpec(8, caption=None), 2, 2)[0]


def test_crop_and_flip_come_from_the_seed(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:] = np.arange(24, dtype=np.uint8)[None, :, None] * 10
    write_tar(tmp_path / "a.tar", [("a.png", encode(wide)), ("a.txt", b"c")])
    order = DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 1, 1)
    spec = SampleSpec(8, crop="random", horizontal_flip=True)
    images = [row["image"] for row in rows(order, spec, 0, 64)]
    assert len(set(images)) > 48 and images == [row["image"] for row in rows(order, spec, 0, 64)]
    flipped = np.mean([image[0] > image[7] for image in images])
    assert 0.25 < flipped < 0.75
    assert len({row["image"] for row in rows(order, SampleSpec(8), 0, 9)}) == 1


@pytest.mark.parametrize("count", [1, 10, 33, 70, 1000])
def test_fixed_batches_are_the_same_samples_at_any_world_size(tmp_path, count):
    index = write_shards(tmp_path, samples=70, per_shard=30, chunk_samples=4)
    whole = fixed_batches(index, SPEC, count, batch_size=9)
    expected = [pair for batch in whole for pair in zip(batch["keys"], batch["seeds"].tolist())]
    assert len(set(expected)) == len(expected) == min(count, 70)
    if count >= 10:
        assert len({key.partition("/")[0] for key, _ in expected}) == 3
    for size in (2, 3, 4):
        ranks = [fixed_batches(index, SPEC, count, 9, rank, size) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1
        found = [
            (key, seed)
            for batches in ranks
            for batch in batches
            for key, seed, weight in zip(batch["keys"], batch["seeds"].tolist(), batch["weight"].tolist())
            if weight
        ]
        assert found == expected


def test_read_tasks_do_not_import_torch():
    root = Path(__file__).resolve().parents[3]
    code = "import sys, pipelines.data.read; assert 'torch' not in sys.modules and 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def _with_maps(folder, pairs):
    """A shard of images with a map each, both as arrays."""
    files = []
    for number, (image, told) in enumerate(pairs):
        files += [(f"{number}.png", encode(image)), (f"{number}.txt", b"c")]
        files += [] if told is None else [(f"{number}.map.png", encode(told))]
    write_tar(folder / "a.tar", files)
    return DataOrder(load_index(str(folder), progress=False), 0, 1, 1, 1)


def test_another_image_is_cut_as_the_image_is_and_its_colours_are_not_mixed(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:] = (np.arange(48, dtype=np.uint8) // 2)[None, :, None] * 10
    order = _with_maps(tmp_path, [(wide, wide)])
    spec = SampleSpec(8, crop="random", horizontal_flip=True, condition_image="map.png")
    found = rows(order, spec, 0, 32)
    assert all(row["weight"] == 1 for row in found) and len({row["condition_image"] for row in found}) > 8
    for row in found:
        image, told = (np.frombuffer(row[name], np.uint8).reshape(3, 8, 8) for name in ("image", "condition_image"))
        assert np.abs(image.astype(int) - told).max() <= 10  # a pixel apart at most
        assert set(told.flatten().tolist()) <= set(range(0, 240, 10))


def test_a_sample_without_its_other_image_or_with_another_shape_is_quarantined(tmp_path):
    square, wide = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)
    larger = np.zeros((16, 16, 3), np.uint8)
    order = _with_maps(tmp_path, [(square, None), (square, wide), (square, larger)])
    spec = SampleSpec(8, condition_image="map.png")
    found = {row["key"]: row["reason"] for row in rows(order, spec, 0, 3)}
    assert found == {
        "a.tar/0": "map.png: missing",
        "a.tar/1": "map.png: 16x8 has other proportions than the image, 8x8",
        "a.tar/2": "",
    }


@pytest.mark.parametrize(
    ("told", "names", "reason"),
    [
        ({}, ("png",), ""),
        ({}, ("jpg", "png"), "image: several members (jpg, png); name one with data.image"),
        ({"image": "png"}, ("jpg", "png"), ""),
        ({"condition_image": "jpg"}, ("jpg", "png"), ""),
        ({"image": "photo.png", "condition_image": "sketch.png"}, ("photo.png", "sketch.png"), ""),
        ({"image": "photo.png"}, ("png",), "image: photo.png is missing"),
        ({}, ("photo.png",), "image: missing"),
    ],
)
def test_which_image_is_meant(tmp_path, told, names, reason):
    content = encode(np.zeros((8, 8, 3), np.uint8))
    write_tar(tmp_path / "a.tar", [*((f"a.{name}", content) for name in names), ("a.txt", b"c")])
    order = DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 1, 1)
    (row,) = rows(order, SampleSpec(8, **told), 0, 1)
    assert row["reason"] == reason


def test_captions_that_name_no_class_are_quarantined(tmp_path):
    content = encode(np.zeros((8, 8, 3), np.uint8))
    files = [(f"{n}.{kind}", data) for n, text in enumerate((b"cat", b"cow"))
             for kind, data in (("png", content), ("txt", text))]  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    order = DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 1, 1)
    found = {row["key"]: row["reason"] for row in rows(order, SampleSpec(8, classes=("cat", "dog")), 0, 2)}
    assert found == {"a.tar/0": "", "a.tar/1": "caption: 'cow' is not one of objective.classes"}


def test_the_original_size_and_the_crop_are_told(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:] = np.arange(48, dtype=np.uint8)[None, :, None]
    write_tar(tmp_path / "a.tar", [("a.png", encode(wide)), ("a.txt", b"c")])
    order = DataOrder(load_index(str(tmp_path), progress=False), 0, 1, 1, 1)

    def told(**changes):
        for row in rows(order, SampleSpec(8, sizes=True, **changes), 0, 32):
            yield np.frombuffer(row["size"], np.int32).tolist(), np.frombuffer(row["image"], np.uint8)

    assert all(
        size == [16, 48, 0, 8] for size, _ in told()
    )  # resized to 8×24, of which 8 columns are cut off at the left
    places = set()
    for (height, width, top, left), image in told(crop="random"):
        assert (height, width, top) == (16, 48, 0)
        assert abs(image[0] - 2 * left) <= 2  # the first column that is left shows twice its number
        places.add(left)
    assert len(places) > 8 and max(places) <= 16
    (table,) = read.read_steps(order, SampleSpec(8, sizes=True), 0, 1, 0, 1)
    assert to_batch(table, SampleSpec(8, sizes=True))["sizes"].tolist() == [[16, 48, 0, 8]]
