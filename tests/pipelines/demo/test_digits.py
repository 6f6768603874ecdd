from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pipelines.demo.digits import (
    COLOURS,
    KEPT_OUT,
    SPLITS,
    TEMPLATES,
    Combination,
    caption,
    colour_pairs,
    draw_split,
    load_originals,
    paint,
    parse_caption,
    stroke_mask,
)
from pipelines.demo.judge import average_to


def test_two_combinations_of_every_digit_and_every_colour_are_kept_out():
    assert len(set(KEPT_OUT)) == 20
    assert Counter(c.digit for c in KEPT_OUT) == {digit: 2 for digit in range(10)}
    assert all(ink != paper and {ink, paper} <= set(COLOURS) for _, ink, paper in KEPT_OUT)
    for name in COLOURS:
        assert sum(c.ink == name for c in KEPT_OUT) >= 2 and sum(c.paper == name for c in KEPT_OUT) >= 2
    # This list is part of what published figures mean: a change must be meant.
    assert KEPT_OUT[0] == Combination(0, "black", "red") and KEPT_OUT[-1] == Combination(9, "magenta", "blue")


def test_training_never_shows_what_is_kept_out_and_shows_all_else():
    drawn = list(draw_split("train", 8, repeats=12))
    shown = Counter((m["digit"], m["ink"], m["paper"]) for *_, m in drawn)
    assert not set(shown) & set(KEPT_OUT)
    assert set(shown) == {(d, *pair) for d in range(10) for pair in colour_pairs(d, with_kept_out=False)}
    assert len(shown) == 540
    assert {m["source"] for *_, m in drawn} == set(range(1500))
    assert len({key for key, *_ in drawn}) == len(drawn) == 18000
    assert not any(m["kept_out"] for *_, m in drawn)
    said = {parse_caption(text) for _, _, text, _ in drawn}
    assert not said & set(KEPT_OUT)


def test_held_out_shows_other_digits_and_flags_kept_out_combinations():
    metas = [m for *_, m in draw_split("held_out", 8, repeats=6)]
    assert {m["source"] for m in metas} == set(range(1500, 1797)) == set(SPLITS["held_out"])
    flagged = [m for m in metas if m["kept_out"]]
    assert flagged and all((m["digit"], m["ink"], m["paper"]) in KEPT_OUT for m in flagged)
    assert all(m["kept_out"] for m in metas if (m["digit"], m["ink"], m["paper"]) in KEPT_OUT)


def test_repeats_of_a_digit_have_different_colours():
    drawn = list(islice(draw_split("train", 8, repeats=5), 7500))
    pairs = Counter((m["source"], m["ink"], m["paper"]) for *_, m in drawn)
    assert max(pairs.values()) == 1


def test_drawing_is_deterministic_and_depends_on_the_seed():
    first, again, other = (list(islice(draw_split("train", 16, 1, seed), 20)) for seed in (0, 0, 1))
    for (key, picture, text, meta), (key2, picture2, text2, meta2) in zip(first, again):
        assert (key, text, meta) == (key2, text2, meta2)
        assert picture.dtype == np.uint8 and picture.shape == (16, 16, 3)
        np.testing.assert_array_equal(picture, picture2)
    assert [row[2] for row in first] != [row[2] for row in other]


def test_every_caption_says_its_digit_ink_and_paper():
    rng = np.random.default_rng(0)
    texts = set()
    for combination in KEPT_OUT * 60:
        text = caption(*combination, rng)
        assert parse_caption(text) == combination
        texts.add(text)
    assert len(TEMPLATES) >= 12 and len(texts) > 400
    for template in TEMPLATES:
        assert parse_caption(template.format(digit=7, ink="red", paper="white")) == (7, "red", "white")
        assert parse_caption(template.format(digit="seven", ink="red", paper="white")) == (7, "red", "white")
    with pytest.raises(ValueError, match="no caption"):
        parse_caption("a red dog on a white background")


def test_strokes_are_sharp_and_larger_pictures_hold_more_detail():
    masks = {size: np.stack([stroke_mask(source, size) for source in range(40)]) for size in (16, 64)}
    soft = {size: ((mask > 0.1) & (mask < 0.9)).mean() for size, mask in masks.items()}
    assert soft[64] < 0.08 < soft[16]  # the edge stays a pixel wide while the picture grows
    blown_up = np.kron(masks[16], np.ones((1, 4, 4)))
    assert np.abs(blown_up - masks[64]).mean() > 0.03
    originals = load_originals()[0][:40].reshape(40, -1)
    alike = np.corrcoef(average_to(masks[64], 8).ravel(), originals.ravel())[0, 1]
    assert alike > 0.8


def test_paint_puts_ink_on_paper():
    picture = paint(np.array([[0.0, 1.0], [0.5, 0.0]], dtype=np.float32), "red", "white")
    assert tuple(picture[0, 0]) == COLOURS["white"] and tuple(picture[0, 1]) == COLOURS["red"]
    np.testing.assert_allclose(picture[1, 0], (np.array(COLOURS["red"]) + COLOURS["white"]) / 2, atol=0.5)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no split 'test'"):
        next(draw_split("test", 32, 1))
    with pytest.raises(ValueError, match="at least 8 pixels"):
        next(draw_split("train", 4, 1))
