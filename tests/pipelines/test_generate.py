"""`generate.py` from the command line: prompts in, pictures and their origin out; what a bad request reads like."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genmodels.families import build_objective
from infra.errors import BadRequest, main_exit
from pipelines import generate, generation
from pipelines.data.decode import decode_image
from pipelines.evaluation.subject import find_subject

UNET = {"kind": "unet", "channels": [8], "layers_per_block": 1, "head_dim": 8, "norm_groups": 4}
TEXT = {"kind": "trained", "width": 8, "layers": 1, "heads": 1, "vocab_size": 520, "length": 12}


def _export(folder: Path, text_encoder: dict, **changes: object) -> Path:
    from genmodels.diffusion.config import LatentDiffusionConfig
    from genmodels.diffusion.objective import LatentDiffusion
    from genmodels.text.tokenizer import save, train_tokenizer

    unet = {**UNET, "attention": [text_encoder["kind"] != "none"]}
    config = LatentDiffusionConfig.model_validate(
        {"image_size": 8, "denoiser": unet, "text_encoder": text_encoder, **changes}
    )
    save(train_tokenizer(["a red seven", "a blue one"], 520, 12), folder / "inputs" / "tokenizer")
    LatentDiffusion.from_config(config, folder / "inputs").export(folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return _export(tmp_path_factory.mktemp("text"), TEXT)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return _export(tmp_path_factory.mktemp("unconditional"), {"kind": "none"})


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    return _export(tmp_path_factory.mktemp("inpainting"), {"kind": "none"}, image_condition={"kind": "mask"})


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command; returns exit code, standard error and the summary."""

    def command(*arguments: str, stdin: str = "", steps: bool = True) -> tuple[int, str, dict]:
        summary = tmp_path / "summary.json"
        options = [
            *(["--num-steps", "2"] if steps else []),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out"),
            "--summary",
            str(summary),
        ]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments), *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main_exit(generate.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err, json.loads(summary.read_text()) if summary.exists() else {}

    return command


def pixels(summary: dict, number: int) -> np.ndarray:
    return np.asarray(Image.open(Path(summary["out"]) / summary["pictures"][number]["file"]))


def test_a_hole_is_filled_in_and_all_else_stays(run, inpainting, tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    hole = np.zeros((8, 8), dtype=np.uint8)
    hole[2:5, 3:7] = 255
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(hole).save(tmp_path / "hole.png")
    files = ["--image", tmp_path / "given.png", "--mask", tmp_path / "hole.png"]
    code, _, summary = run("--model", inpainting, "--seeds", "1,2", *files)
    assert code == 0 and summary["mask"] == str(tmp_path / "hole.png")
    one, two = pixels(summary, 0), pixels(summary, 1)
    assert (one[hole == 0] == given[hole == 0]).all() and (two[hole == 0] == given[hole == 0]).all()
    assert (one[hole > 0] != two[hole > 0]).any()


def test_a_cycle_gan_goes_both_ways(run, unconditional, tmp_path):
    from tests.genmodels import tiny

    export = tmp_path / "export"
    build_objective(tiny.cycle_config()).export(export)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    made = {}
    for direction in ("ab", "ba"):
        told = ["--model", export, "--image", tmp_path / "a.png", "--direction", direction]
        code, _, summary = run(*told, steps=False)
        assert code == 0 and summary["direction"] == direction and len(summary["pictures"]) == 1
        made[direction] = pixels(summary, 0)
    assert made["ab"].shape == (16, 16, 3) and (made["ab"] != made["ba"]).any()
    code, error, _ = run("--model", unconditional, "--direction", "ba")
    assert code == 2 and "--direction is of CycleGANs" in error


def test_a_photo_is_read_as_in_training(run, tmp_path):
    """The square in the middle, upright, over white, bicubic: as the data path makes it of a sample."""
    from tests.genmodels import tiny

    export = tmp_path / "export"
    build_objective(tiny.cycle_config()).export(export)
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 4), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((640, 360))
    photo.save(tmp_path / "photo.png", exif=_turned(photo))
    as_read = np.empty((3, 16, 16), np.uint8)
    decode_image((tmp_path / "photo.png").read_bytes(), 16, as_read)
    Image.fromarray(as_read.transpose(1, 2, 0)).save(tmp_path / "square.png")
    made = []
    for name in ("photo.png", "square.png"):
        code, _, summary = run("--model", export, "--image", tmp_path / name, steps=False)
        assert code == 0
        made.append(pixels(summary, 0))
    assert (made[0] == made[1]).all()


def _turned(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = 6
    return exif


def test_a_cycle_gan_is_judged_by_its_training(tmp_path):
    from tests.genmodels import tiny

    export = tmp_path / "export"
    build_objective(tiny.cycle_config()).export(export)
    with pytest.raises(BadRequest, match="judged by training's own evaluation"):
        find_subject(str(export), None)


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("inpainting", [], "takes an --image FILE"),
        ("inpainting", ["--image", "nowhere.png", "--mask", "nowhere.png"], "--image nowhere.png: cannot be read"),
        ("unconditional", ["--image", "nowhere.png"], "--image: this model takes none"),
    ],
)
def test_images_are_asked_for(run, request, model, arguments, said):
    code, error, _ = run("--model", request.getfixturevalue(model), *arguments)
    assert code == 2 and said in error


def test_prompts_seeds_and_files(run, export, tmp_path):
    (tmp_path / "more.txt").write_text("a blue one\n\n")
    code, _, summary = run("a red seven", "--file", tmp_path / "more.txt", "--seeds", "1,2", "--model", export)
    assert code == 0
    made = [(picture["prompt"], picture["seed"]) for picture in summary["pictures"]]
    assert made == [("a red seven", 1), ("a red seven", 2), ("a blue one", 1), ("a blue one", 2)]
    assert pixels(summary, 0).shape == (8, 8, 3)
    assert Path(summary["grid"]).is_file()
    assert json.loads((tmp_path / "out" / "generate.json").read_text()) == summary
    assert summary["num_steps"] == 2 and summary["model"] == str(export) and len(summary["digest"]) == 64


def test_a_picture_says_what_made_it(run, export):
    code, _, summary = run("--model", export, "a réd seven", "--seeds", "3,4", "--guidance-scale", "1.5")
    assert code == 0
    for picture in summary["pictures"]:
        told = Image.open(Path(summary["out"]) / picture["file"]).text
        assert (told["Model"], told["Prompt"], told["Seed"]) == (str(export), "a réd seven", str(picture["seed"]))
        assert told["Model digest"] == summary["digest"] and told["Software"] == "genmodels"
        assert json.loads(told["Settings"])["guidance_scale"] == 1.5


def test_a_picture_depends_on_its_prompt_and_seed_only(run, export):
    together = run("a blue one", "a red seven", "--seed", "4", "--model", export)[2]
    first, second = pixels(together, 0), pixels(together, 1)
    alone = run("a red seven", "--seed", "5", "--batch-size", "1", "--model", export)[2]
    assert np.abs(pixels(alone, 0).astype(int) - second).max() <= 1
    assert (first != second).any()


def test_prompts_from_stdin(run, export):
    code, _, summary = run("--model", export, stdin="a red seven\n")
    assert code == 0 and [picture["prompt"] for picture in summary["pictures"]] == ["a red seven"]


def test_a_negative_prompt_changes_the_picture(run, export):
    plain = pixels(run("a red seven", "--guidance-scale", "7", "--model", export)[2], 0)
    steered = pixels(run("a red seven", "--guidance-scale", "7", "--negative", "a blue one", "--model", export)[2], 0)
    assert (plain != steered).any()


def test_unconditional_models_take_a_count(run, unconditional):
    code, _, summary = run("--count", "3", "--model", unconditional)
    assert code == 0 and [picture["seed"] for picture in summary["pictures"]] == [0, 1, 2]
    code, error, _ = run("a red seven", "--model", unconditional)
    assert code == 2 and "without captions" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "EXPORT"], "no prompts"),
        (["x", "--seeds", "1,b", "--model", "EXPORT"], "whole numbers"),
        (["x", "--batch-size", "0", "--model", "EXPORT"], "--batch-size must be at least 1"),
        (["x", "--file", "/nowhere.txt", "--model", "EXPORT"], "cannot be read"),
        (["x", "--model", "/nowhere"], "no such folder"),
        (["x", "--count", "2", "--model", "EXPORT"], "--count is for unconditional"),
        (["x", "--model", "models:/absent/1"], "no registered model"),
    ],
)
def test_bad_requests_are_one_line(run, export, arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, error, _ = run(*(str(export) if argument == "EXPORT" else argument for argument in arguments))
    assert code == 2
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


def test_plan():
    assert generation.picture_plan(["a", "b"], [], 5) == [("a", 5), ("b", 6)]
