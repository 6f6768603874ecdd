"""The entry scripts: from a folder, from tables, from the demo; and their bad requests."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from infra.errors import BadRequest
from pipelines.data.index import load_index
from pipelines.data.order import DataOrder
from pipelines.data.prepare import (
    digits_complete,
    folder_samples,
    is_held_out,
    table_samples,
    write_digits,
    write_samples,
)
from pipelines.data.read import read_steps
from pipelines.data.spec import SampleSpec
from pipelines.data.write import ShardWriter
from tests.pipelines.data.shards import encode, numbered_image, pairs, write_shards, write_tar

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)


def images(folder: Path, count: int, captions: bool = True) -> Path:
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        (folder / "deep" / f"v1.{number:03d}.png").write_bytes(encode(numbered_image(number)))
        if captions:
            (folder / "deep" / f"v1.{number:03d}.txt").write_text(f"caption ü {number}")
    return folder


def contents(url: Path) -> dict[str, str]:
    index = load_index(str(url), build=False)
    tables = read_steps(DataOrder(index, 0, 1, index.samples, index.samples), SampleSpec(8), 0, 1, 0, 1)
    return {row["key"]: row["caption"] or row["reason"] for table in tables for row in table.to_pylist()}


def test_images_of_one_name_are_samples_of_their_own(tmp_path):
    for number, name in enumerate(("x.png", "x.jpg", "a.b.png", "a_b.png")):
        suffix = name.rpartition(".")[2]
        (tmp_path / name).write_bytes(encode(numbered_image(number), {"jpg": "JPEG"}.get(suffix, "PNG")))
        (tmp_path / name).with_suffix(".txt").write_text(name.rpartition(".")[0])
    samples = folder_samples(tmp_path)
    assert len({sample.key for sample in samples}) == 4
    write_samples(samples, str(tmp_path / "out"), held_out=0, shard_samples=25, overwrite=False)
    assert sorted(contents(tmp_path / "out/train").values()) == ["a.b", "a_b", "x", "x"]
    with pytest.raises(ValueError, match="comes twice"), ShardWriter(str(tmp_path / "again")) as writer:
        for _ in range(2):
            writer.write("x", {"txt": b""})


def test_a_folder_becomes_shards_and_the_split_depends_on_the_key_alone(tmp_path):
    samples = folder_samples(images(tmp_path / "in", 60))
    write_samples(samples, str(tmp_path / "out"), held_out=0.2, shard_samples=25, overwrite=False)
    train, held_out = contents(tmp_path / "out/train"), contents(tmp_path / "out/held_out")
    assert len(train) + len(held_out) == 60 and 3 <= len(held_out) <= 25
    keys = {key.partition("/")[2] for key in held_out}
    assert keys == {sample.key for sample in samples if is_held_out(sample.key, 0.2)}
    assert {*train.values(), *held_out.values()} == {f"caption ü {n}" for n in range(60)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables(tmp_path, kind):
    folder = images(tmp_path / "in", 3, captions=False)
    rows = [{"file": f"deep/v1.{n:03d}.png", "text": f"t{n}", "source": n} for n in (0, 1, 2, 1)]
    table = tmp_path / f"t.{kind}"
    if kind == "csv":
        table.write_text("file,text,source\n" + "".join(f"{r['file']},{r['text']},{r['source']}\n" for r in rows))
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), table)
    write_samples(table_samples(table, folder, "file", "text"), str(tmp_path / "out"), 0.0, 10, False)
    assert sorted(contents(tmp_path / "out/train").values()) == ["t0", "t1", "t1", "t2"]
    with pytest.raises(BadRequest, match="no column 'caption'; it has file, source, text"):
        table_samples(table, folder, "file", "caption")


def test_bad_requests_leave_with_two_and_one_line(tmp_path):
    script = ROOT / "pipelines/prepare_shards.py"
    folder = images(tmp_path / "in", 3)
    (folder / "deep/v1.001.txt").unlink()
    bad = run(script, folder, tmp_path / "out")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert "1 of 3 images" in bad.stderr and "--no-captions" in bad.stderr
    summary = tmp_path / "s.json"
    good = run(script, folder, tmp_path / "out", "--no-captions", "--summary", summary)
    assert good.returncode == 0, good.stderr
    assert json.loads(summary.read_text())["train"]["samples"] == 3
    again = run(script, folder, tmp_path / "out", "--no-captions")
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_overwriting_leaves_nothing_of_the_old(tmp_path):
    write_shards(tmp_path, 30, 10, chunk_samples=4)
    with ShardWriter(str(tmp_path), 10, overwrite=True) as writer:
        writer.write("a", {"png": encode(numbered_image(1)), "txt": b"c"})
    kept = load_index(str(tmp_path))
    assert kept.samples == 1
    names = ["00000.tar", "00000.tar.index.json", f"index.{kept.digest[:16]}.json", "index.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(ValueError, match="dot"):
        ShardWriter(str(tmp_path / "b")).write("a.b", {})


def test_the_demo_writes_both_splits(tmp_path):
    done = run(ROOT / "pipelines/prepare_shards.py", tmp_path, "--demo", "digits", "--size", 16, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    assert load_index(f"{tmp_path}/train").samples == 1500
    assert len(contents(tmp_path / "held_out")) == 297


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_interrupted_drawing_is_not_complete_and_is_drawn_again(tmp_path, monkeypatch, split):
    stop_at = None

    def draw(which, size, repeats):
        for number in range(5):
            if which == stop_at and number == 3:
                raise KeyboardInterrupt
            yield f"{number}", numbered_image(number, size), "a caption", {}

    monkeypatch.setattr("pipelines.demo.digits.draw_split", draw)
    out = str(tmp_path / "digits")
    assert not digits_complete(out)
    stop_at = split
    with pytest.raises(KeyboardInterrupt):
        write_digits(out, 8, 1, 2, overwrite=False)
    assert (tmp_path / "digits" / split / "00000.tar").exists() and not digits_complete(out)
    stop_at = None
    write_digits(out, 8, 1, 2, overwrite=True)
    assert digits_complete(out) and load_index(f"{out}/{split}", build=False).samples == 5
    stop_at = split  # and an interrupted replacement is not the old one
    with pytest.raises(KeyboardInterrupt):
        write_digits(out, 8, 1, 2, overwrite=True)
    assert not digits_complete(out)


@pytest.mark.slow
def test_indexing_over_ray_equals_indexing_here(tmp_path):
    for number in range(9):
        write_tar(tmp_path / f"{number}.tar", pairs(5, first=10 * number))
    over_ray = run(ROOT / "pipelines/index_shards.py", tmp_path)
    assert over_ray.returncode == 0, over_ray.stderr
    index = load_index(str(tmp_path), build=False)
    (tmp_path / "index.json").unlink()
    assert load_index(str(tmp_path), progress=False).digest == index.digest
    assert run(ROOT / "pipelines/index_shards.py", tmp_path / "none").returncode == 2
