"""What is measured of autoencoders, of models that are told an image, and of captions by a CLIP, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure

from genmodels.autoencoder.codec import LatentCodec
from genmodels.diffusion.image_condition import random_rectangles
from genmodels.diffusion.pipeline import TextToImage, to_pixels
from genmodels.families import build_objective
from genmodels.features.config import ClipFeatures
from genmodels.features.extractor import open_extractor
from genmodels.metrics.figure import Conditions
from pipelines.data.index import load_index
from pipelines.data.spec import SampleSpec
from pipelines.demo.classifier import digits_extractor
from pipelines.evaluation.figures import Sets, measure_figures
from pipelines.evaluation.measure import Extractors, measured_rows
from pipelines.evaluation.sources import Block, Drawn, Reconstructed, Shards
from pipelines.evaluation.store import FeatureStore, StoreWriter
from tests.genmodels import tiny
from tests.pipelines.training import small_run


def stored(block: Block, folder: Path, extractors: Extractors) -> FeatureStore:
    writer = StoreWriter(folder, len(block.pictures))
    rows = measured_rows(block, extractors)
    texts = [rows.pop(name).tolist() for name in ("captions", "keys")]
    writer.add(rows, *texts)
    return writer.close({})


@pytest.fixture
def shards(tmp_path) -> Shards:
    small_run.write_digits(str(tmp_path / "shards"), 40)
    return Shards.spread(load_index(str(tmp_path / "shards")), SampleSpec(16), 40)


def test_reconstructions_are_the_codecs_and_scored_against_their_originals(shards, tmp_path):
    tiny.write_inputs(tmp_path / "inputs")
    folder = tmp_path / "inputs" / "autoencoder"
    block = Reconstructed(str(folder), None, shards).open("cpu")(0, 40)
    originals = shards.open("cpu")(0, 40).pictures
    images = torch.from_numpy(originals).permute(0, 3, 1, 2).float() / 127.5 - 1
    codec = LatentCodec.from_folder(folder)
    with torch.no_grad():
        rebuilt = ((codec.decode(codec.encode(images)).clamp(-1, 1) + 1) * 127.5).round().numpy().transpose(0, 2, 3, 1)
    assert np.abs(block.pictures.astype(int) - rebuilt).max() <= 1
    rebuilt_images = torch.from_numpy(block.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    error = np.square((block.pictures.astype(float) - originals) / 127.5).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(block.scores["psnr"], 10 * np.log10(4 / error), rtol=1e-4)
    extractors = Extractors(digits_extractor())
    held_out = stored(shards.open("cpu")(0, 40), tmp_path / "held_out", extractors)
    sets = Sets(stored(block, tmp_path / "rebuilt", extractors), held_out)
    found = {figure.name: figure for figure in measure_figures(sets, Conditions(count=40)).figures}
    assert found["psnr"].value == pytest.approx(float(block.scores["psnr"].mean())) and found["psnr"].better == "higher"
    expected = structural_similarity_index_measure((rebuilt_images + 1) / 2, (images + 1) / 2, data_range=1.0)
    assert found["ssim"].value == pytest.approx(float(expected), abs=1e-3) and "lpips" not in found


def test_a_clip_of_ones_own_scores_captions(shards, tmp_path):
    torch.manual_seed(0)
    inputs = tiny.write_inputs(tmp_path / "inputs")
    build_objective(tiny.clip_config(), inputs).export(tmp_path / "clip")
    clip = open_extractor(ClipFeatures(path=str(tmp_path / "clip")))
    block = shards.open("cpu")(0, 40)
    extractors = Extractors(digits_extractor(), clip)
    store = stored(block, tmp_path / "store", extractors)
    assert store.embeddings is not None and np.allclose(np.linalg.norm(store.embeddings, axis=1), 1, atol=1e-5)
    texts = clip.texts(block.captions)
    found = measure_figures(Sets(store, store), Conditions(count=40), text_embeddings=texts)
    expected = np.clip((store.embeddings * texts).sum(axis=1), 0, None).mean() * 100
    assert found.value("clip_score") == pytest.approx(expected, rel=1e-4)
    similar = store.embeddings @ texts.T
    own = np.diag(similar)[:, None]
    assert found.value("retrieval_of_40") == pytest.approx(((similar >= own).sum(axis=1) == 1).mean(), abs=1e-6)


@pytest.mark.parametrize("kind", ["low_resolution", "mask", "edges"])
def test_a_model_that_is_told_an_image_is_told_that_of_each_real_picture(shards, tmp_path, kind):
    inputs = tiny.write_inputs(tmp_path / "inputs")
    told = {"low_resolution": {"factor": 2}, "mask": {"largest": 0.5}, "edges": {}}[kind]
    config = tiny.diffusion_config(image_condition={"kind": kind, **told})
    build_objective(config, inputs).export(tmp_path / "export")
    options = {"num_steps": 2, "batch_size": 8}
    source = Drawn(str(tmp_path / "export"), None, None, list(range(100, 140)), options, originals=shards)
    block, originals = source.open("cpu")(8, 16), shards.open("cpu")(8, 16)
    assert block.captions == originals.captions and block.pictures.shape == originals.pictures.shape
    model = TextToImage.from_folder(tmp_path / "export")
    images = torch.from_numpy(originals.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    given = {
        "low_resolution": lambda: {"images": to_pixels(avg_pool2d(images, 2))},
        "edges": lambda: {"images": originals.pictures},
        "mask": lambda: {
            "images": originals.pictures,
            "masks": random_rectangles(torch.arange(108, 116), 16, 0.5)[:, 0].numpy() > 0,
        },
    }[kind]()
    expected = model.draw(originals.captions, list(range(108, 116)), **options, **given)
    assert (block.pictures == expected).all() and np.ptp(expected) > 20
    if kind == "mask":
        kept = ~given["masks"]
        assert (block.pictures[kept] == originals.pictures[kept]).all()
    error = np.square((expected.astype(float) - originals.pictures) / 127.5).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(block.scores["psnr"], 10 * np.log10(4 / error), rtol=1e-4)
    assert source.first(5).count == 5 and source.first(5).originals.count == 5
