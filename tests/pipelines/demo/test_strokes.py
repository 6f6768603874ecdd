"""The small tasks of GANs: shards that are read back, strokes that differ, labels that are few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.data.fixed import fixed_batches
from pipelines.data.index import load_index
from pipelines.data.spec import SampleSpec
from pipelines.demo.digits import WORDS
from pipelines.demo.strokes import digits_of, draw_strokes, labelled, stroke_overlap, write_strokes


def test_thin_strokes_lie_within_bold_ones() -> None:
    thin, usual, bold = (draw_strokes("held_out", 16, weight) for weight in ("thin", "usual", "bold"))
    inked = [float((pictures > 127).mean()) for pictures in (thin, usual, bold)]
    assert inked == sorted(inked) and inked[0] < 0.5 * inked[2]
    assert ((thin > 127) <= (bold > 127)).all()
    assert stroke_overlap(usual, usual).min() == 1 and 0.3 < stroke_overlap(thin, bold).mean() < 0.5
    assert stroke_overlap(usual, np.zeros_like(usual)).max() == 0


def test_the_shards_hold_pairs_sets_and_few_labels(tmp_path: Path) -> None:
    indices = write_strokes(str(tmp_path), 16, 1000, overwrite=False)
    assert {name: index.samples for name, index in indices.items()} == {
        "digits/train": 1500, "pairs/train": 1500, "thin/train": 750, "bold/train": 750,
        "digits/held_out": 297, "pairs/held_out": 297, "thin/held_out": 148, "bold/held_out": 149,
    }  # fmt: skip
    (batch,) = fixed_batches(
        load_index(f"{tmp_path}/digits/train", build=False), SampleSpec(16, label="json:label"), 1500, 1500
    )
    digits = digits_of("train")
    assert batch["captions"] == [WORDS[digit] for digit in digits]
    told = np.array(batch["labels"])
    assert (told != "").sum() == 100 == labelled(digits).sum()
    assert (told[told != ""].astype(int) == digits[told != ""]).all() and np.unique(told).size == 11
    pairs = SampleSpec(16, caption=None, condition_image="thin.png")
    (batch,) = fixed_batches(load_index(f"{tmp_path}/pairs/held_out", build=False), pairs, 297, 297)
    for name, weight in (("images", "bold"), ("condition_images", "thin")):
        assert (batch[name].permute(0, 2, 3, 1).numpy() == draw_strokes("held_out", 16, weight)).all()  # type: ignore[literal-required]
    keys = [
        {
            key.rpartition("/")[2]
            for key in fixed_batches(
                load_index(f"{tmp_path}/{name}/train", build=False), SampleSpec(16, caption=None), 750, 750
            )[0]["keys"]
        }
        for name in ("thin", "bold")
    ]
    assert not keys[0] & keys[1], "no digit is in both sets"


def test_another_split_is_refused() -> None:
    with pytest.raises(KeyError):
        draw_strokes("validation", 16)
