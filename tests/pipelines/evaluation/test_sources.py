"""Real pictures and files as sources: the right pixels, the right captions, and what cannot be used left out."""

import numpy as np
import pytest
from PIL import Image

from infra.errors import BadRequest
from pipelines.data.index import load_index
from pipelines.data.spec import SampleSpec
from pipelines.demo.digits import draw_split
from pipelines.evaluation.sources import Files, Shards
from pipelines.evaluation.store import FeatureStore, StoreWriter
from tests.pipelines.training import small_run

SIZE = small_run.IMAGE_SIZE


def test_all_samples_of_shards_come_once_without_those_that_are_damaged(tmp_path):
    damaged = {3, 50}
    small_run.write_digits(str(tmp_path), damage=lambda number, data: b"no image" if number in damaged else data)
    shards = Shards.spread(load_index(str(tmp_path)), SampleSpec(SIZE), 1000)
    assert shards.count == small_run.SAMPLES
    read = shards.open("cpu")
    blocks = [read(start, min(start + 20, shards.count)) for start in range(0, shards.count, 20)]
    drawn = list(draw_split("train", SIZE, 1))[: small_run.SAMPLES]
    good = [sample for number, sample in enumerate(drawn) if number not in damaged]
    assert (
        np.concatenate([block.pictures for block in blocks]) == np.stack([picture for _, picture, _, _ in good])
    ).all()
    assert [text for block in blocks for text in block.captions] == [caption for _, _, caption, _ in good]
    unused = [reason for block in blocks for reason in block.unused]
    assert len(unused) == 2 and all("image" in reason for reason in unused)
    assert shards.captions() == [caption for _, _, caption, _ in drawn], "a caption is there, whatever the image is"


def test_shards_without_captions_are_refused_by_name(tmp_path):
    small_run.write_digits(str(tmp_path), 8)
    with pytest.raises(BadRequest, match="--caption"):
        Shards.spread(load_index(str(tmp_path)), SampleSpec(SIZE, caption="json:text"), 8).captions()


def test_files_are_cut_to_squares_and_read_with_the_text_beside_them(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 40), "blue").save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("red\n")
    files = Files.under(tmp_path, 16)
    block = files.open("cpu")(0, 2)
    assert block.pictures.shape == (2, 16, 16, 3) and block.captions == files.captions == ["red", ""]
    assert (block.pictures[0] == (255, 0, 0)).all() and (block.pictures[1] == (0, 0, 255)).all()
    with pytest.raises(BadRequest, match="holds no pictures"):
        Files.under(tmp_path / "none", 16)


def test_a_store_is_complete_or_absent(tmp_path):
    writer = StoreWriter(tmp_path / "store", 10)
    rows = {
        "features": np.arange(12, dtype=np.float32).reshape(4, 3),
        "thumbnails": np.zeros((4, 2, 2, 3), np.uint8),
        "similarity": np.zeros(4, np.float32),
    }
    writer.add(rows, list("abcd"), list("wxyz"))
    assert FeatureStore.open(tmp_path / "store") is None, "not closed yet"
    store = writer.close({"digest": "d"})
    assert store.count == 4 and store.captions == list("abcd") and store.facts()["digest"] == "d"
    assert (store.features == rows["features"]).all() and store.probabilities is None
    assert {path.name for path in tmp_path.iterdir()} == {"store"}, "what is not complete stands beside, and is gone"
    again = StoreWriter(tmp_path / "store", 10)
    again.add({name: values[:2] for name, values in rows.items()}, list("ab"), list("wx"))
    assert again.close({}).count == 2 and store.features[3, 0] == 9, "an open one keeps its files"
    empty = StoreWriter(tmp_path / "empty", 3)
    with pytest.raises(BadRequest, match="no picture"):
        empty.close({})
    empty.discard()
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadRequest, match="not written by an evaluation"):
        StoreWriter(tmp_path / "mine", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "mine"}
