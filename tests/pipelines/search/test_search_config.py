"""What a search may ask for, how trials are drawn, and what is on record of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import BadRequest
from pipelines.search.config import SearchConfig, check_search, load_search, trial_config
from pipelines.search.record import Trial, ranked, read_trials
from pipelines.training.run_folder import RunFolder

RATE = {"optimizer.learning_rate": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}}
SEARCH: dict[str, Any] = {"name": "s", "trials": 8, "steps": 100, "interval": 20, "space": RATE}


def load(tmp_path: Path, *assignments: str, **changed: Any) -> tuple[dict[str, Any], SearchConfig]:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SEARCH | changed))
    return load_search("ldm_demo", str(tmp_path / "s.yaml"), list(assignments))


def test_trials_are_different_and_spread_over_the_range(tmp_path: Path) -> None:
    space = RATE | {"ema.decay": {"kind": "choice", "values": [0.9, 0.99]}, "run.seed": INTEGER}
    _, search = load(tmp_path, space=space)
    drawn = search.draw_trials()
    assert drawn == search.draw_trials() and len(drawn) == 8
    rates = sorted(values["optimizer.learning_rate"] for values in drawn)
    for eighth, rate in enumerate(rates):  # each in an eighth of the two orders of magnitude
        assert 1e-4 * 10 ** (eighth / 4) * 0.999 <= rate <= 1e-4 * 10 ** ((eighth + 1) / 4) * 1.001
    assert sorted(values["ema.decay"] for values in drawn) == [0.9] * 4 + [0.99] * 4
    assert sorted({values["run.seed"] for values in drawn}) == [3, 4, 5, 6]
    assert drawn != load(tmp_path, "search.seed=1", space=space)[1].draw_trials()


INTEGER = {"kind": "integer", "low": 3, "high": 6}


def test_a_space_that_is_too_small(tmp_path: Path) -> None:
    _, search = load(tmp_path, space={"run.seed": INTEGER})
    with pytest.raises(BadRequest, match="trials=8: the space holds 4 different trials only"):
        search.draw_trials()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"steps": 90}, "steps=90 is not a multiple of interval=20"),
        ({"metric": "loss"}, "metric=loss: take a held-out figure"),
        ({"method": "grid"}, "method"),
        ({"trials": 1, "method": "pbt"}, "method=pbt needs 2 trials"),
        ({"method": "pbt", "at_once": 2}, "method=pbt trains its population side by side: set at_once=8"),
        ({"space": {"run.steps": INTEGER}}, "space.run.steps is set by the search"),
        ({"space": {"evaluation.count": INTEGER}}, "space.evaluation.count is set by the search"),
        ({"space": {"run.seed": {"kind": "integer", "low": 3, "high": 3}}}, "low 3 is not below high 3"),
        ({"space": {"ema.decay": {"kind": "log_uniform", "low": 0, "high": 1}}}, "to be above 0"),
        ({"space": {"ema.decay": {"kind": "normal"}}}, "there is no normal"),
        ({"trails": 3}, "did you mean trials"),
        ({"name": "a/b"}, "names no folder"),
    ],
)
def test_bad_searches(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    with pytest.raises(BadRequest, match=match):
        load(tmp_path, **changed)


@pytest.mark.parametrize(
    ("assignments", "changed", "match"),
    [
        (["search.steps=400"], {}, "it is below run.steps=330"),
        (["data.validation_url=null"], {}, "name data.validation_url"),
        (["run.validation_samples=0"], {}, "name data.validation_url"),
        ([], {"space": {"optimizer.learning": RATE["optimizer.learning_rate"]}}, "unknown key optimizer.learning"),
        ([], {"space": {"ema.decay": {"kind": "uniform", "low": 0.5, "high": 2}}}, "a trial with ema.decay=2.0: ema"),
        (
            ["search.method=pbt", "search.at_once=8"],
            {"space": {"objective.denoiser.head_dim": {"kind": "choice", "values": [32, 64]},
                       "objective.denoiser.layers_per_block": {"kind": "choice", "values": [1, 2]}}},
            "with pbt a trial goes on from another one's weights, and 2 has others",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_preset(
    tmp_path: Path, assignments: list[str], changed: dict[str, Any], match: str
) -> None:
    base, search = load(tmp_path, *assignments, **changed)
    with pytest.raises(BadRequest, match=match):
        check_search(base, search)


def test_a_trial_is_the_presets_run_measured_at_each_interval(tmp_path: Path) -> None:
    base, search = load(tmp_path, "optimizer.warmup_steps=7")
    config = trial_config(base, search, "s-0003", {"optimizer.learning_rate": 0.005})
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps, config.run.steps) == (0.005, 7, 330)
    assert (config.run.validate_every, config.run.checkpoint_every, config.evaluation.every) == (20, 20, 0)
    assert config.tracking.register_as is None and base["tracking"]["register_as"] == "ldm-demo"
    drawn = trial_config(base, search.model_copy(update={"metric": "val_frechet_distance"}), "s", {})
    assert (drawn.run.validate_every, drawn.evaluation.every) == (330, 20)


def entry(step: int, value: float) -> dict[str, Any]:
    return {"step": step, "figures": {"val_loss": value}, "checkpoint": f"c{step}"}


def test_the_record_of_a_trial(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    trial = Trial.new("s", 3, {"a": 1}).reported(entry(20, 0.5)).reported(entry(40, 0.4))
    assert [each["step"] for each in trial.reported(entry(20, 0.45)).reports] == [20]  # the run was resumed
    fork = trial.forked({"a": 2}, "elsewhere").reported(entry(20, 0.3))
    assert (fork.run, fork.earlier, fork.continue_from, fork.step) == ("s-0003-1", ["s-0003"], "elsewhere", 20)
    assert [each["run"] for each in fork.reports] == ["s-0003", "s-0003", "s-0003-1"]
    for each in (Trial.new("s", 0, {}), Trial.new("s", 1, {}), fork):
        each.save(folder)
    assert [each.number for each in read_trials(folder)] == [0, 1]  # 2 is not there
    (tmp_path / "trials" / "0002.json").write_text((tmp_path / "trials" / "0003.json").read_text())
    assert read_trials(folder)[3] == fork


def test_the_best_trial_is_one_that_came_furthest() -> None:
    far = Trial.new("s", 0, {}).reported(entry(40, 0.5))
    better = Trial.new("s", 1, {}).reported(entry(40, 0.4))
    early = Trial.new("s", 2, {}).reported(entry(20, 0.1))
    failed = Trial(3, {}, "s-0003", reports=[entry(40, 0.1)], failed="the loss was not finite")
    trials = [Trial.new("s", 4, {}), failed, far, early, better]
    assert [trial.number for trial in ranked(trials, "val_loss", "lower")][:3] == [1, 0, 2]
    assert [trial.number for trial in ranked(trials, "val_loss", "higher")][:3] == [0, 1, 2]


def test_optuna_learns_from_what_is_on_record(tmp_path: Path) -> None:
    from pipelines.search.suggestions import Suggestions

    _, search = load(tmp_path, "search.method=optuna", "search.trials=25")
    folder = RunFolder(str(tmp_path))

    def loss(values: dict[str, Any]) -> float:
        return abs(math.log10(values["optimizer.learning_rate"]) + 3.5)  # the best is 3.2e-4

    first = Suggestions(search, [], [], folder)
    for number in range(14):
        point = first.suggest(f"t{number}")
        assert point is not None and point["number"] == number and 1e-4 <= point["optimizer.learning_rate"] <= 1e-2
        trial = replace(read_trials(folder)[number].reported(entry(100, loss(point))), complete=True)
        trial.save(folder)
        first.on_trial_complete(f"t{number}", {"val_loss": loss(point), "config": point})
    again = Suggestions(search, [], read_trials(folder), folder)  # as after a killed driver
    points = [again.suggest(f"u{number}") for number in range(26)]
    assert points.pop() is None
    values = [{key: value for key, value in point.items() if key != "number"} for point in points if point is not None]
    assert values == [trial.values for trial in read_trials(folder)]
    assert sum(map(loss, values[14:])) / 11 < 0.7 * sum(map(loss, values[:10])) / 10  # ten are drawn at random
