"""The mark is found with its key and with no other, at the stated rates, and cannot be seen."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from genmodels.drawing import open_drawing_model
from genmodels.families import build_objective
from infra.errors import BadRequest, main_exit
from pipelines import detect_watermark, generate, watermark
from pipelines.batch_generation import Work, draw_shard
from pipelines.demo import digits
from pipelines.watermark import detect, detect_jointly, embed, read_key, threshold, traces, z_scores
from tests.genmodels import tiny

KEY = "the key of these tests"
LIMIT = threshold()


def drawn_digits(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, 3)."""
    rng, colours = np.random.default_rng(seed), list(digits.COLOURS.values())
    pictures = []
    for _ in range(count):
        ink, paper = (np.array(colours[i]) for i in rng.choice(len(colours), 2, replace=False))
        mask = digits.stroke_mask(int(rng.integers(1797)), size)[..., None]
        pictures.append(np.rint(mask * ink + (1 - mask) * paper).astype(np.uint8))
    return np.stack(pictures)


def textures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Clouds whose amplitudes fall as 1/f^1.2, like those of photos."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = (rng.normal(size=(count, 4, *frequency.shape, 2)) @ [1, 1j]) / frequency**1.2
    clouds = np.fft.irfft2(spectrum, s=(size, size))
    clouds = clouds[:, :1] + 0.4 * clouds[:, 1:]  # mostly grey
    clouds = clouds / clouds.std(axis=(2, 3), keepdims=True) * rng.uniform(20, 50, (count, 1, 1, 1)) + 128
    return clouds.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def rate(images: np.ndarray, key: str = KEY) -> float:
    return float((detect(images, key) >= LIMIT).mean())


def test_false_alarms_are_as_rare_as_stated() -> None:
    """Of pictures without the mark, over many keys: a binomial count, alone and together."""
    found = np.concatenate([traces(drawn_digits(16, 32)), traces(textures(16, 32)), traces(textures(4, 64))])
    together = found[:32].reshape(4, 8, *found.shape[1:]).sum(axis=1)
    scores = np.concatenate([z_scores(np.concatenate([found, together]), f"no key {i}") for i in range(150)])
    for share in (1e-3, 1e-2):
        assert (scores >= threshold(share)).sum() <= binom.isf(1e-4, scores.size, share)


@pytest.mark.parametrize(
    ("make", "size", "least"), [(drawn_digits, 32, 0.9), (drawn_digits, 64, 0.95), (textures, 64, 0.8)]
)
def test_it_is_found_at_the_stated_rates_with_its_key_alone(make: Any, size: int, least: float) -> None:
    images = make(24, size)
    marked = embed(images, KEY)
    assert rate(marked) >= least
    assert rate(marked, "another key of a test") <= 1 / 24 and rate(images) <= 1 / 24
    assert min(detect(marked, KEY)) >= 0


def test_at_256_pixels_it_survives_what_the_table_says() -> None:
    marked = embed(np.concatenate([drawn_digits(2, 256), textures(2, 256)]), KEY)
    noise = np.random.default_rng(1).normal(0, 5, marked.shape)
    half = [np.asarray(Image.fromarray(image).resize((192, 192), Image.Resampling.BICUBIC)) for image in marked]
    assert rate(np.stack([jpeg(image, 50) for image in marked])) == 1
    assert rate((marked + noise).clip(0, 255).astype(np.uint8)) == 1
    assert rate((marked * 1.1).clip(0, 255).astype(np.uint8)) == 1
    assert rate(marked[:, 1:-2, 5:]) == 1, "cropped"
    assert rate(np.stack(half)) == 0, "of another size"
    assert (
        rate(
            np.stack(
                [np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC)) for image in half]
            )
        )
        == 1
    )


def test_several_pictures_together_are_surer() -> None:
    """Of textures of 32 pixels a side, few are found alone."""
    images = textures(32, 32)
    marked = embed(images, KEY)
    assert rate(marked) < 0.6
    assert detect_jointly(marked, KEY) > max(LIMIT, float(np.median(detect(marked, KEY))))
    assert detect_jointly(marked, "another key of a test") < LIMIT and detect_jointly(images, KEY) < LIMIT
    same = np.repeat(images[:1], 32, axis=0)
    joint = [z_scores(traces(same).sum(0, keepdims=True), f"no key {i}")[0] for i in range(20)]
    assert max(joint) < LIMIT, "the same picture again and again is no evidence"


@pytest.mark.parametrize("strength", [1.5, watermark.STRENGTH])
def test_the_mark_is_as_weak_as_stated(strength: float) -> None:
    images = np.concatenate([textures(4, 64), drawn_digits(4, 64)])
    error = np.square(embed(images, KEY, strength).astype(float) - images).mean(axis=(1, 2, 3))
    assert error.max() < strength**2 + 0.2  # rounding adds a little
    if strength == watermark.STRENGTH:
        assert (10 * np.log10(255**2 / error)).min() >= 38


def test_pictures_of_any_size_from_one_tile_on() -> None:
    images = np.full((1, 45, 100, 3), 128, np.uint8)
    marked = embed(images, KEY)
    assert marked.shape == images.shape and marked.dtype == np.uint8 and rate(marked) == 1
    assert (embed(images, KEY) == marked).all() and (images == 128).all()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "must be uint8"),
        (np.zeros((32, 32, 3), np.uint8), "must be uint8"),
        (np.zeros((1, 32, 32, 4), np.uint8), "must be uint8"),
        (np.zeros((1, 32, 8, 3), np.uint8), "pixels a side or more, not 8 by 32"),
    ],
)
def test_what_is_no_picture_is_refused(images: np.ndarray, said: str) -> None:
    for function in (embed, detect):
        with pytest.raises(ValueError, match=said):
            function(images, KEY)


def test_keys_and_strengths_that_mark_nothing_are_refused() -> None:
    for key, strength in (("", 3.0), (KEY, 0.0), (KEY, float("nan"))):
        with pytest.raises(ValueError, match="needs a key, and a strength above 0"):
            embed(np.zeros((1, 32, 32, 3), np.uint8), key, strength)


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("MARK", KEY)
    assert read_key("MARK") == read_key(str(tmp_path / "key")) == KEY
    monkeypatch.setenv("MARK", "too short")
    with pytest.raises(BadRequest, match="can be guessed") as caught:
        read_key("MARK")
    assert "too short" not in str(caught.value)
    with pytest.raises(BadRequest, match="neither an environment variable nor a file"):
        read_key(str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained GAN that draws 32×32 pixels."""
    folder = tmp_path_factory.mktemp("gan")
    build_objective(tiny.gan_config(image_size=32)).export(folder)
    return folder


def run(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    try:
        main_exit(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_generate_marks_pictures_and_the_detector_finds_them(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARK", KEY)
    told = ["--model", export, "--count", "8", "--device", "cpu", "--out"]
    for name, more in (("plain", []), ("marked", ["--watermark", "MARK"])):
        assert run(generate.main, monkeypatch, *told, tmp_path / name, *more) == 0
    files = {name: sorted((tmp_path / name).glob("0*.png")) for name in ("plain", "marked")}
    plain, marked = (np.stack([np.asarray(Image.open(file)) for file in files[name]]) for name in ("plain", "marked"))
    assert (marked == embed(plain, KEY)).all()
    assert Image.open(files["marked"][0]).text["Watermark"] == "yes"  # type: ignore[attr-defined]
    assert "Watermark" not in Image.open(files["plain"][0]).text  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "marked" / "generate.json").read_text())["watermark"] == "yes"
    assert not any(KEY.encode() in file.read_bytes() for file in (tmp_path / "marked").iterdir())

    summary = tmp_path / "found.json"
    for name in files:
        assert run(detect_watermark.main, monkeypatch, *files[name], "--key", "MARK", "--summary", summary) == 0
        found = json.loads(summary.read_text())
        assert found["found"] == (name == "marked") and len(found["pictures"]) == 8
    output = capsys.readouterr()
    assert "all together" in output.out and KEY not in output.out + output.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--key", "MARK", "none.txt"], "none.txt: cannot be looked at"),
        (["--key", "NOWHERE", "none.txt"], "neither an environment variable nor a file"),
        (["--key", "MARK", "none.txt", "--false-alarms", "2"], "--false-alarms must be above 0 and below 0.5"),
        (["--key", "MARK", "none.txt", "--size", "8"], "cannot be looked at"),
    ],
)
def test_the_detectors_bad_requests_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARK", KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.txt").write_text("no picture")
    assert run(detect_watermark.main, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_models_of_smaller_pictures_cannot_be_asked_for_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARK", KEY)
    build_objective(tiny.gan_config()).export(tmp_path / "export")
    assert run(generate.main, monkeypatch, "--model", tmp_path / "export", "--watermark", "MARK") == 2
    assert "--watermark needs pictures of 32 pixels a side, and this model draws 16" in capsys.readouterr().err


def test_shards_have_marked_pictures_and_no_key(tmp_path: Path) -> None:
    import tarfile

    export = tmp_path / "export"
    build_objective(tiny.gan_config(image_size=32, classes=tiny.CAPTIONS[:2])).export(export)
    model, out = open_drawing_model(export), tmp_path / "out"
    work = Work(
        tiny.CAPTIONS[:2], np.arange(2), str(export), None, "fp32", "m", "d", {}, None, 8, str(out), watermark=KEY
    )
    out.mkdir()
    draw_shard(work, 0, model)
    with tarfile.open(out / "000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    picture = Image.open(io.BytesIO(members["000000000.png"]))
    expected = embed(model.draw(tiny.CAPTIONS[:2], [0, 1]), KEY)[0]  # of a batch as large: rounding may depend on it
    assert (np.asarray(picture) == expected).all() and picture.text["Watermark"] == "yes"  # type: ignore[attr-defined]
    assert KEY not in repr(work) and not any(KEY.encode() in file.read_bytes() for file in out.iterdir())
