"""What passes the gates and what does not, and that the reason names it."""

from __future__ import annotations

from typing import Any

import pytest

from genmodels.metrics.figure import Conditions, Figure
from infra.errors import BadRequest
from pipelines.promotion.command import read_gates
from pipelines.promotion.gates import Evaluated, Gates, judge, reason_of

REAL = {"caption_consistency": 0.95, "coverage": 0.9, "precision": 0.9}
BETTER = {"frechet_distance": "lower", "copy_share": "lower"}


def evaluated(slices: dict[str, tuple[int, float]] | None = None, width: float = 0.02, **values: float) -> Evaluated:
    usual = {
        "caption_consistency": 0.8,
        "coverage": 0.6,
        "precision": 0.7,
        "frechet_distance": 10.0,
        "copy_share": 0.05,
    }
    figures = {
        name: Figure.model_validate(
            {
                "name": name,
                "value": value,
                "low": value - width,
                "high": value + width,
                "better": BETTER.get(name, "higher"),
                "conditions": Conditions(count=1000),
            }
        )
        for name, value in (usual | values).items()
    }
    return Evaluated(figures, REAL, slices or {"red": (300, 0.8), "seven": (100, 0.8)})


def failed(candidate: Evaluated, champion: Evaluated | None, **gates: Any) -> list[str]:
    return [check.gate for check in judge(candidate, champion, Gates(**gates)) if not check.passed]


def test_a_better_one_passes_and_its_reason_says_by_how_much() -> None:
    checks = judge(evaluated(caption_consistency=0.9), evaluated(), Gates())
    assert all(check.passed for check in checks)
    assert reason_of(checks) == "caption_consistency 0.9 [0.88, 0.92] against 0.8 [0.78, 0.82]"


@pytest.mark.parametrize(
    ("candidate", "gate"),
    [
        ({"caption_consistency": 0.8}, "better than the champion"),  # the same
        ({"caption_consistency": 0.83}, "better than the champion"),  # chance could do that
        ({"caption_consistency": 0.7}, "caption_consistency not worse"),
        ({"caption_consistency": 0.9, "frechet_distance": 12.0}, "frechet_distance not worse"),
        ({"caption_consistency": 0.9, "coverage": 0.5}, "coverage not worse"),
        ({"caption_consistency": 0.9, "copy_share": 0.2}, "no more copies"),
        ({"caption_consistency": 0.9, "coverage": 0.2}, "coverage at least 0.3 of real"),
        ({"caption_consistency": 0.9, "slices": {"red": (300, 0.95), "seven": (100, 0.5)}}, "no slice falls"),
    ],
)
def test_each_gate_stops_what_it_is_for(candidate: dict[str, Any], gate: str) -> None:
    assert gate in failed(evaluated(**candidate), evaluated())


def test_a_slice_that_chance_explains_does_not_stop_it() -> None:
    candidate = evaluated(caption_consistency=0.9, slices={"red": (300, 0.9), "seven": (20, 0.65)})
    assert not failed(candidate, evaluated(slices={"red": (300, 0.8), "seven": (20, 0.8)}))
    assert failed(candidate, evaluated(slices={"red": (300, 0.8), "seven": (20, 0.8)}), not_worse=["coverage"]) == []


def test_the_first_champion_has_thresholds_alone() -> None:
    assert failed(evaluated(), None) == []
    assert reason_of(judge(evaluated(), None, Gates())) == "all thresholds are reached, and there was no champion"
    assert failed(evaluated(caption_consistency=0.4), None) == ["caption_consistency at least 0.6 of real"]
    assert failed(evaluated(copy_share=0.4), None) == ["few copies"]
    assert failed(evaluated(), None, least={"precision": 0.75}, most={"frechet_distance": 9.0}) == [
        "precision at least 0.75",
        "frechet_distance at most 9",
    ]


def test_what_must_improve_and_by_how_much_is_configured() -> None:
    nearer = evaluated(frechet_distance=9.5)
    assert failed(nearer, evaluated(), improve=["frechet_distance"]) == []
    assert failed(nearer, evaluated()) == [], "any of the figures will do"
    assert failed(nearer, evaluated(), improve_by={"frechet_distance": 1.0}) == ["better than the champion"]
    assert failed(evaluated(caption_consistency=0.83), evaluated(), certain=False) == []
    with pytest.raises(ValueError, match="gate on clip_score: it was not measured; there are caption_consistency"):
        judge(nearer, evaluated(), Gates(improve=["clip_score"], improve_by={"clip_score": 0.1}))
    with pytest.raises(ValueError, match="gate on clip_score: none was measured of both"):
        judge(nearer, evaluated(), Gates(improve=["clip_score"]))


def test_captions_that_no_figure_looks_at_stop_it() -> None:
    """Or a model that learnt wrong captions would pass, as its pictures are as good as before."""
    blind = evaluated()
    del blind.figures["caption_consistency"]
    nearer = Evaluated(
        {**blind.figures, "frechet_distance": evaluated(frechet_distance=9.0).figures["frechet_distance"]}
    )
    assert failed(nearer, blind) == ["captions are looked at"]
    assert failed(nearer, blind, captions=False) == []
    assert failed(Evaluated(nearer.figures, conditional=False), blind) == []


def test_real_pictures_that_do_not_follow_their_captions_pass_nothing() -> None:
    nothing = Evaluated(evaluated().figures, {**REAL, "caption_consistency": 0.0})
    assert failed(nothing, None) == ["caption_consistency at least 0.6 of real"]


def test_how_a_sampler_is_set_is_not_compared_and_words_that_are_not_read_are_found() -> None:
    conditions = {"count": 100, "num_steps": 20, "sampler": "ddim", "options": {"eta": 0.0}}
    row = {"name": "coverage", "value": 0.5, "low": 0.4, "high": 0.6, "better": "higher"}
    words = [{"name": "red", "pictures": 30, "shares": {"precision": 0.8, "recall": 0.7}}]
    told = {"figures": [{**row, "conditions": conditions}], "real": {}, "slices": {"By word of the caption": words}}
    other = {**told, "figures": [{**row, "conditions": {"count": 100}}]}
    found = [Evaluated.of(each, conditional=False) for each in (told, other)]
    assert found[0].slices == {"red": (30, 0.7)}
    assert failed(*found, improve=["coverage"]) == ["better than the champion"]


def test_what_was_measured_otherwise_is_not_compared() -> None:
    other = evaluated()
    changed = {
        name: figure.model_copy(update={"conditions": Conditions(count=9)}) for name, figure in other.figures.items()
    }
    with pytest.raises(ValueError, match="measured differently, so not compared: count is 1000 and 9"):
        judge(evaluated(), Evaluated(changed, REAL), Gates())


def test_gates_are_read_from_a_file_and_the_command_line(tmp_path: Any) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text("improve_by: {coverage: 0.01}\nslice_loss: 0.2\n")
    gates = read_gates(str(file), ["improve_by.coverage=0.05", "least.precision=0.5"])
    assert (gates.improve_by, gates.slice_loss, gates.least) == ({"coverage": 0.05}, 0.2, {"precision": 0.5})
    with pytest.raises(BadRequest, match=r"unknown key improve_bye \(did you mean improve_by\?\)"):
        read_gates(None, ["improve_bye.x=1"])
    with pytest.raises(BadRequest, match="cannot be read as YAML"):
        read_gates(str(tmp_path / "none.yaml"), [])
