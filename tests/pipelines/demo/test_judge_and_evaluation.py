import numpy as np
import pytest

from pipelines.demo.digits import (
    KEPT_OUT,
    SPLITS,
    Combination,
    draw_split,
    load_originals,
    paint,
    parse_caption,
    stroke_mask,
)
from pipelines.demo.evaluation import correct, evaluate_digits, kept_out_prompts, mean_coverage, real_pictures
from pipelines.demo.judge import Judge, average_to, find_strokes

SIZE = 32


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.train(SIZE)


def draw_real(prompts: list[str], seeds: list[int], wrong_share: float = 0.0) -> np.ndarray:
    """Stands in for a perfect generator: real training digits; or for one that ignores a share of its prompts."""
    digits = load_originals()[1][SPLITS["train"].start : SPLITS["train"].stop]
    pictures = []
    for prompt, seed in zip(prompts, seeds):
        rng = np.random.default_rng(seed)
        wanted = parse_caption(prompt)
        if rng.random() < wrong_share:
            wanted = KEPT_OUT[rng.integers(len(KEPT_OUT))]
        source = rng.choice(np.flatnonzero(digits == wanted.digit))
        pictures.append(paint(stroke_mask(int(source), SIZE), wanted.ink, wanted.paper))
    return np.stack(pictures)


def test_real_held_out_digits_are_read_right(judge):
    for which in (0, 1):
        pictures, wanted = real_pictures("held_out", SIZE, which)
        right = correct(judge(pictures), wanted)
        assert right["all"].mean() >= 0.94
        assert right["ink"].all() and right["paper"].all()


def test_all_colour_pairs_are_read_right_even_through_noise(judge):
    drawn = list(draw_split("held_out", SIZE, 4))
    noise = np.random.default_rng(0).normal(size=(len(drawn), SIZE, SIZE, 3)) * 20
    pictures = (np.stack([row[1] for row in drawn]) + noise).clip(0, 255).astype(np.uint8)
    wanted = [Combination(m["digit"], m["ink"], m["paper"]) for *_, m in drawn]
    right = correct(judge(pictures), wanted)
    assert right["ink"].mean() > 0.995 and right["paper"].mean() > 0.995 and right["all"].mean() > 0.9


def test_each_kind_of_fault_is_seen(judge):
    source = next(i for i in SPLITS["train"] if load_originals()[1][i] == 3)
    reading = judge(np.stack([paint(stroke_mask(source, SIZE), "red", "white")]))
    assert correct(reading, [Combination(3, "red", "white")])["all"].all()
    for wrong, part in [((4, "red", "white"), "digit"), ((3, "blue", "white"), "ink"), ((3, "red", "cyan"), "paper")]:
        right = correct(reading, [Combination(*wrong)])
        assert not right[part][0] and not right["all"][0]
        assert sum(bool(right[name][0]) for name in ("digit", "ink", "paper")) == 2


def test_ink_and_paper_are_not_confused(judge):
    masks = [stroke_mask(source, SIZE) for source in range(60)]
    reading = judge(np.stack([paint(mask, "white", "black") for mask in masks]))
    assert set(reading.ink) == {"white"} and set(reading.paper) == {"black"}


def test_a_plain_picture_is_no_digit(judge):
    reading = judge(np.full((1, SIZE, SIZE, 3), 242, dtype=np.uint8))
    assert (reading.digit[0], reading.ink[0], reading.paper[0]) == (-1, "", "white")


def test_the_mask_is_the_stroke_whatever_its_colours():
    masks = np.stack([stroke_mask(source, SIZE) for source in range(20)])
    for ink, paper in [("red", "green"), ("white", "yellow"), ("blue", "magenta")]:
        found = find_strokes(np.stack([paint(mask, ink, paper) for mask in masks])).mask
        np.testing.assert_allclose(found, masks, atol=0.02)


def test_a_perfect_generator_and_a_careless_one():
    evaluation = evaluate_digits(draw_real, SIZE, count=1000)
    figures = evaluation.figures
    assert figures["consistency"] > 0.98 and figures["consistency_real"] >= 0.94
    assert abs(figures["consistency_shuffled"] - figures["consistency_chance"]) < 0.015
    assert 0.78 < figures["coverage_real"] < 0.92 and 0.9 < figures["coverage_ratio"] < 1.1
    assert [row["asked"] for row in figures["per_digit"]] == list(range(10))
    assert len(figures["per_combination"]) == 20

    careless = evaluate_digits(lambda p, s: draw_real(p, s, wrong_share=0.5), SIZE, count=400).figures
    assert careless["consistency"] == pytest.approx(0.525, abs=0.1)
    deaf = evaluate_digits(lambda p, s: draw_real(p, s, wrong_share=1.0), SIZE, count=400).figures
    assert deaf["consistency"] == pytest.approx(deaf["consistency_chance"], abs=0.04)


def test_a_generator_with_one_picture_for_each_prompt_does_not_cover():
    def collapsed(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return draw_real(prompts, [1] * len(seeds))

    figures = evaluate_digits(collapsed, SIZE, count=400).figures
    assert figures["consistency"] > 0.9 and figures["coverage_ratio"] < 0.4


def test_coverage_is_taken_at_equal_numbers():
    features = [average_to(find_strokes(real_pictures(split, SIZE, 0)[0]).mask, 8) for split in ("held_out", "train")]
    rng = np.random.default_rng(0)
    few, many = (mean_coverage(features[0], features[1][:number], rng)[1] for number in (297, 1485))
    assert few == pytest.approx(many, abs=0.08)  # five parts of 297, not one of 1,485, which would cover more


def test_prompts_are_balanced_and_pictures_are_checked():
    wanted, captions = kept_out_prompts(60)
    assert [parse_caption(text) for text in captions] == wanted == KEPT_OUT * 3
    with pytest.raises(ValueError, match="multiple of the 20"):
        kept_out_prompts(1001)
    with pytest.raises(ValueError, match="asked for 40 uint8 pictures"):
        evaluate_digits(lambda p, s: draw_real(p[:-1], s[:-1]), SIZE, count=40)
