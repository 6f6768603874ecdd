import pytest

from genmodels.metrics.figure import Conditions, Figure, compare

CONDITIONS = {
    "count": 2000, "seed": 0, "sampler": "ddim", "num_steps": 20, "guidance_scale": 2.0, "options": {"eta": 0.0},
    "precision": "fp32", "extractor": "0123456789abcdef", "data": "fedcba9876543210", "data_count": 594,
    "clip": "c1", "training_data": "t1", "training_count": 5,
}  # fmt: skip
OTHER = {
    "count": 1000, "seed": 1, "sampler": "euler", "num_steps": 10, "guidance_scale": 3.0, "options": {"eta": 1.0},
    "precision": "bf16", "extractor": "1", "data": "2", "clip": "c2", "training_data": "t2", "training_count": 6,
    "data_count": 3,
}  # fmt: skip


def figure(low, high, better="lower", **changes):
    conditions = Conditions(**{**CONDITIONS, **changes})
    return Figure(name="frechet", value=(low + high) / 2, low=low, high=high, better=better, conditions=conditions)


@pytest.mark.parametrize(
    ("candidate", "champion", "better", "verdict"),
    [
        ((1, 2), (3, 4), "lower", "better"),
        ((3, 4), (1, 2), "lower", "worse"),
        ((3, 4), (1, 2), "higher", "better"),
        ((1, 2), (3, 4), "higher", "worse"),
        ((1, 3), (2, 4), "lower", "undecided"),
    ],
)
def test_intervals_that_do_not_overlap_decide(candidate, champion, better, verdict):
    assert compare(figure(*candidate, better), figure(*champion, better)) == verdict


@pytest.mark.parametrize("name", OTHER)
def test_what_was_measured_differently_is_not_compared_and_the_difference_named(name):
    assert set(OTHER) == set(Conditions.model_fields)
    with pytest.raises(ValueError, match="measured differently") as error:
        compare(figure(1, 2, **{name: OTHER[name]}), figure(3, 4))
    assert f"{name} is {OTHER[name]!r} and {CONDITIONS[name]!r}" in str(error.value)


def test_other_metrics_and_figures_without_interval():
    one = figure(1, 2)
    with pytest.raises(ValueError, match="different metrics"):
        compare(one, one.model_copy(update={"name": "kernel"}))
    assert compare(one.model_copy(update={"low": None}), one) == "undecided"
    assert Figure.model_validate_json(one.model_dump_json()) == one
