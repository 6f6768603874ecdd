"""`generate_shards.py` through Ray: pictures as generate.py draws them, each once, whatever was killed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genmodels.drawing import open_drawing_model
from genmodels.families import build_objective
from infra.errors import BadRequest
from pipelines import generate_shards as script
from pipelines.batch_generation import draw_shard, read_prompts
from pipelines.data.index import load_index
from pipelines.data.read import read_chunks
from tests.genmodels import tiny
from tests.pipelines.training import small_run

COUNT, SHARD = 44, 8
PROMPTS = [f"a {colour} {digit}" for colour in ("red", "blue", "green", "white") for digit in range(11)]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    inputs = tiny.write_inputs(folder / "inputs")
    build_objective(tiny.diffusion_config(), inputs).export(folder / "export")
    return folder / "export"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def samples(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    index = load_index(str(folder), progress=False)
    for shard in range(len(index.names)):
        for chunk in range(-(-int(index.shard_samples[shard]) // index.chunk_samples)):
            read = read_chunks(index, [(shard, chunk)])[shard, chunk]
            assert not read.reason
            for place, sample in enumerate(read.samples):
                yield sample.key, read.members(place)


def command(prompts: Path, out: Path, export: Path, *more: str) -> list[str]:
    told = ["--model", str(export), "--seed", "5", "--shard-samples", str(SHARD), "--num-steps", "2"]
    told += ["--precision", "fp32"]
    return [sys.executable, script.__file__, str(prompts), str(out), *told, "--actors", "2", *more]


@pytest.fixture
def run(local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def call(*arguments: str) -> dict[str, Any]:
        summary = tmp_path / "summary.json"
        monkeypatch.setattr(sys, "argv", [*arguments[1:], "--summary", str(summary)])
        script.main()
        return dict(json.loads(summary.read_text()))

    return call


@pytest.mark.slow
def test_each_prompt_has_its_picture_once_and_what_is_there_is_not_drawn_again(
    run: Any, prompts: Path, export: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = run(*command(prompts, out, export))
    assert (summary["pictures"], summary["shards"], summary["drawn_now"], summary["refused"]) == (COUNT, 6, COUNT, 0)
    assert summary["pictures_per_second"] > 0
    found = dict(samples(out))
    assert list(found) == [f"{number:09d}" for number in range(COUNT)]
    model = open_drawing_model(export)
    options = {"num_steps": 2, "guidance_scale": 2.0, "sampler": "ddim"}
    for number in (0, 7, 8, 43):
        drawn = Image.open(io.BytesIO(found[f"{number:09d}"]["png"]))
        (expected,) = model.draw([PROMPTS[number]], [5 + number], **options)  # type: ignore[arg-type]
        assert (np.asarray(drawn) == expected).all()
        assert (drawn.text["Prompt"], drawn.text["Seed"]) == (PROMPTS[number], str(5 + number))
        told = json.loads(found[f"{number:09d}"]["json"])
        assert told == {"prompt": PROMPTS[number], "seed": 5 + number, "model": str(export)}
    again = run(*command(prompts, out, export))
    assert again["drawn_now"] == 0 and again["index_digest"] == summary["index_digest"]
    for changed in (["--num-steps", "3"], ["--seed", "6"]):
        with pytest.raises(BadRequest, match=rf"holds shards of another request .*, made by {export}\)"):
            run(*command(prompts, out, export), *changed)
    anew = run(*command(prompts, out, export), "--seed", "6", "--overwrite")
    assert anew["drawn_now"] == COUNT and anew["index_digest"] != summary["index_digest"]


@pytest.mark.slow
def test_killed_and_typed_again_none_is_lost_and_none_comes_twice(
    run: Any, prompts: Path, export: Path, run_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = command(prompts, out, export, "--num-steps", "60", "--batch-size", "1")
    process = subprocess.Popen(
        line, env=small_run.environment(run_root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        small_run.wait_until(lambda: len(list(out.glob("*.tar.index*.json"))) >= 2, 120, "two shards")
    finally:
        small_run.kill_tree(process)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.tar.index*.json")}
    tars = {path: path.read_bytes() for path in (Path(str(each).partition(".index")[0]) for each in before)}
    assert 2 <= len(before) < 6, "the job was faster than the test: give it more steps"
    assert not (out / "index.json").exists()
    summary = run(*line)
    assert summary["drawn_now"] == COUNT - SHARD * len(before) and summary["pictures"] == COUNT
    assert {path: path.read_bytes() for path in tars} == tars
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert [key for key, _ in samples(out)] == [f"{number:09d}" for number in range(COUNT)]


def test_a_prompt_that_cannot_be_drawn_stops_none_of_the_others(tmp_path: Path) -> None:
    from pipelines.batch_generation import Work

    classes = tiny.CAPTIONS[:3]
    build_objective(tiny.gan_config(classes=classes)).export(tmp_path)
    texts = [classes[0], "a word that names no class", classes[2]]
    work = Work(texts, np.arange(3), str(tmp_path), None, "fp32", "m", "d", {}, None, 8, str(tmp_path))
    facts, refused = draw_shard(work, 0, open_drawing_model(tmp_path))
    assert (facts.samples, refused) == (3, 1)
    (sidecar,) = tmp_path.glob("*.tar.index*.json")
    assert "a word that names no class" in json.loads(sidecar.read_text())["flaws"]["1"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("none.txt", "\n \n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"bad\.jsonl, line 2: write"),
        ("half.jsonl", '{"prompt": "a"}\n{"prompt": "b \\ud83d"}\n', "line 2: .* is no text"),
        ("big.jsonl", '{"prompt": "a", "seed": 99999999999999999999}\n', "line 1: a seed is a whole number"),
    ],
)
def test_files_that_are_none_are_refused(name: str, content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadRequest, match=match):
        read_prompts(str(tmp_path / name), 0)
    with pytest.raises(BadRequest, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere.txt"), 0)


def test_lines_may_bring_their_seeds(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": " b ", "seed": 7}\n{"prompt": "c"}\n')
    texts, seeds = read_prompts(str(tmp_path / "p.jsonl"), 100)
    assert texts == ["a", "b", "c"] and seeds.tolist() == [100, 7, 102]
    (tmp_path / "p.txt").write_bytes("a\u2028b\r\n\x0b\n c\x85d".encode())
    assert read_prompts(str(tmp_path / "p.txt"), 0)[0] == ["a\u2028b", "c\x85d"]
