"""Shards with latents and embeddings: what is stored is what the models compute, and bad images keep their slot."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels.autoencoder.codec import LatentCodec
from genmodels.clip.frozen import FrozenClip
from infra.errors import BadRequest
from pipelines import encode_latents
from pipelines.data.batch import to_batch
from pipelines.data.index import Location, load_index, write_index
from pipelines.data.read import build_batch, read_chunks
from pipelines.data.spec import ArraySpec, SampleSpec
from pipelines.data.write import ShardWriter
from pipelines.encoding import CLIP_MEMBER, LATENT_MEMBER, Encoders, encode, encode_shard
from tests.genmodels import tiny

SIZE, BROKEN = 16, 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven samples, one of them no image."""
    folder = str(tmp_path_factory.mktemp("source"))
    rng = np.random.default_rng(0)
    with ShardWriter(folder, shard_samples=7, chunk_samples=4) as writer:
        for number in range(7):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(buffer, "PNG")
            png = b"no image" if number == BROKEN else buffer.getvalue()
            writer.write(f"{number:03d}", {"png": png, "txt": f"number {number}".encode()})
    return folder


def read(folder: str, spec: SampleSpec) -> Any:
    index = load_index(folder)
    slots = np.array([[0, number // index.chunk_samples, number % index.chunk_samples] for number in range(7)])
    chunks = read_chunks(index, {(0, 0), (0, 1)})
    return to_batch(build_batch(index, spec, chunks, slots, np.arange(7), 0), spec)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_stored_is_what_the_models_compute(half: bool, source: str, inputs: Path, tmp_path: Path) -> None:
    clip = FrozenClip.from_folder(inputs / "clip")
    codec = LatentCodec.from_folder(inputs / "autoencoder")
    encoders = Encoders(clip, codec, SIZE, ("txt",), half, batch_size=3)
    out = str(tmp_path / "out")
    name, facts, bad = encode_shard(load_index(source), 0, out, encoders, torch.device("cpu"))
    write_index(Location(out, "*.tar"), out, {name: facts}, load_index(source).chunk_samples)
    assert (name, facts.samples, bad) == ("00000.tar", 7, 1)
    shape = codec.moments_shape(SIZE)
    arrays = (ArraySpec("image_embeddings", CLIP_MEMBER, (16,)), ArraySpec("latent_moments", LATENT_MEMBER, shape))
    images = read(source, SampleSpec(SIZE))
    found = read(out, SampleSpec(0, arrays=arrays))
    assert "images" not in found and found["captions"][0] == "number 0"
    keys = [[key.rpartition("/")[2] for key in batch["keys"]] for batch in (found, images)]
    assert keys[0] == keys[1]
    good = images["weight"] == 1
    assert found["weight"].equal(images["weight"]) and not good[BROKEN] and good.sum() == 6
    assert (
        found["reasons"][BROKEN].startswith("image: could not be used")
        and (found["image_embeddings"][BROKEN] == 0).all()
    )
    pixels = images["images"][good].float() / 127.5 - 1
    close = {"rtol": 2e-3, "atol": 2e-3} if half else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["image_embeddings"][good], clip.embed_images(pixels), **close)
    torch.testing.assert_close(found["latent_moments"][good], codec.moments(pixels), **close)
    wrong = read(out, SampleSpec(0, arrays=(ArraySpec("image_embeddings", CLIP_MEMBER, (24,)),)))
    assert not wrong["weight"].any() and "is float" in wrong["reasons"][0] and "(24,)" in wrong["reasons"][0]
    described = encoders.describe()
    assert described[CLIP_MEMBER]["digest"] == clip.digest and described[LATENT_MEMBER]["digest"] == codec.digest


@pytest.mark.slow
def test_shards_in_folders_of_their_own_are_written_beside_each_other(
    source: str, inputs: Path, tmp_path: Path, local_ray: None
) -> None:
    for part in ("one", "two"):
        shutil.copytree(source, tmp_path / "nested" / part, ignore=shutil.ignore_patterns("*index*"))
    encoders = Encoders(FrozenClip.from_folder(inputs / "clip"), None, 0, ("txt",))
    out = str(tmp_path / "out")
    found = encode(str(tmp_path / "nested" / "*" / "*.tar"), out, encoders)
    index = load_index(out)
    assert index.names == ["one--00000.tar", "two--00000.tar"]
    assert (found["shards"], found["samples"], index.digest) == (2, index.samples, found["index_digest"])
    assert encode(str(tmp_path / "nested" / "*" / "*.tar"), out, encoders)["written"] == 0


def test_an_array_that_is_no_array_is_a_bad_sample() -> None:
    spec = ArraySpec("image_embeddings", CLIP_MEMBER, (2,))
    pickled, buffer = io.BytesIO(), io.BytesIO()
    np.save(pickled, np.array([{}, {}], object), allow_pickle=True)
    np.save(buffer, np.array([1.0, np.inf]))
    for data, match in (
        (b"", "no array"),
        (b"text", "no array"),
        (pickled.getvalue(), "no array"),
        (buffer.getvalue(), "not finite"),
    ):
        with pytest.raises(Exception, match=f"clip.npy: .*{match}"):
            spec.read({CLIP_MEMBER: data})
    with pytest.raises(BadRequest, match="at least 1 pixel"):
        SampleSpec(0)


def test_bad_requests_are_one_clear_line(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Path
) -> None:
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    out = str(tmp_path / "out")
    for arguments, match in (
        ([source, out], "name --clip MODEL, --autoencoder MODEL or both"),
        ([source, out, "--autoencoder", "a"], "--autoencoder needs --image-size"),
        ([source, out, "--clip", "c", "--actors", "0"], "must be 1 or more"),
        ([source, out, "--clip", str(inputs / "autoencoder")], "--clip .*holds no CLIP"),
    ):
        monkeypatch.setattr("sys.argv", ["encode_latents.py", *arguments])
        with pytest.raises(BadRequest, match=match):
            encode_latents.main()
