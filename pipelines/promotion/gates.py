"""What a version has to show before it becomes the champion, and whether it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import Field

from genmodels.config import Section
from genmodels.metrics.figure import Figure, compare
from pipelines.evaluation.figures import COPY_QUANTILE
from pipelines.evaluation.slices import BY_WORD

_COPIES = 3  # times as many near copies as among real pictures are too many
_OF_CAPTIONS = ("caption_consistency", "clip_score")


class Gates(Section):
    """Every gate has to be passed. Figures that an evaluation does not have are passed over, but for those named in
    `least`, `most` and `improve_by`."""

    least: dict[str, float] = Field({}, description="figures, and the value that each has to reach")
    most: dict[str, float] = Field({}, description="figures, and the value that none may exceed")
    share_of_real: dict[str, float] = Field(
        {"caption_consistency": 0.6, "coverage": 0.3, "precision": 0.3},
        description="figures, and the share of what real pictures get that each has to reach",
    )
    captions: bool = Field(
        True, description="whether a model that is told captions needs a figure that looks at them (--clip gives one)"
    )
    improve: list[str] = Field(
        ["caption_consistency", "clip_score", "frechet_distance"],
        min_length=1,
        description="figures of which one has to improve on the champion's",
    )
    improve_by: dict[str, float] = Field({}, description="by how much, in the figure's own unit [more than nothing]")
    certain: bool = Field(True, description="whether the intervals of the improved figure may not overlap")
    not_worse: list[str] = Field(
        ["caption_consistency", "clip_score", "frechet_distance", "coverage"],
        description="figures whose interval may not lie on the worse side of the champion's",
    )
    slice_loss: float = Field(
        0.1,
        ge=0,
        le=1,
        description="of its share of right pictures (or, unread, of real ones found) that a word of the captions may "
        "lose; more than chance explains",
    )
    copies: bool = Field(
        True, description="whether many copies of training pictures are refused, and more than the champion's"
    )


class Check(NamedTuple):
    """One gate: whether it was passed, and a clause that says what was found."""

    gate: str
    passed: bool
    told: str


@dataclass(frozen=True)
class Evaluated:
    """Of a version: figures by name, what real pictures get, and the slices by word, name → (pictures, share)."""

    figures: dict[str, Figure]
    real: dict[str, float] = field(default_factory=dict)
    slices: dict[str, tuple[int, float]] = field(default_factory=dict)
    conditional: bool = True

    @staticmethod
    def of(summary: Mapping[str, Any], conditional: bool = True) -> Evaluated:
        """From the summary of an evaluation. How its sampler was set is the model's own affair: it is not compared."""
        figures = [_measured_alike(Figure.model_validate(row)) for row in summary["figures"]]
        slices = {}
        for each in summary.get("slices", {}).get(BY_WORD, []):
            share = each["shares"].get("as asked", each["shares"].get("recall"))
            if share is not None:
                slices[each["name"]] = (each["pictures"], share)
        return Evaluated(
            {figure.name: figure for figure in figures}, dict(summary.get("real", {})), slices, conditional
        )


def _measured_alike(figure: Figure) -> Figure:
    own: dict[str, Any] = {"sampler": None, "num_steps": None, "guidance_scale": None, "options": {}, "precision": None}
    return figure.model_copy(update={"conditions": figure.conditions.model_copy(update=own)})


def judge(candidate: Evaluated, champion: Evaluated | None, gates: Gates) -> list[Check]:
    """All checks, in the order in which they are told.

    Raises:
        ValueError: a figure that a gate names was not measured, or the two were measured differently.
    """
    checks = _alone(candidate, gates)
    if champion is None:
        return checks
    checks.append(_improved(candidate, champion, gates))
    for name in gates.not_worse:
        if name in candidate.figures and name in champion.figures:
            ours, theirs = candidate.figures[name], champion.figures[name]
            verdict = compare(ours, theirs)
            checks.append(Check(f"{name} not worse", verdict != "worse", f"{_pair(ours, theirs)}: {verdict}"))
    checks += _slices(candidate, champion, gates.slice_loss)
    if gates.copies and "copy_share" in candidate.figures and "copy_share" in champion.figures:
        ours, theirs = candidate.figures["copy_share"], champion.figures["copy_share"]
        checks.append(Check("no more copies", compare(ours, theirs) != "worse", _pair(ours, theirs)))
    return checks


def reason_of(checks: list[Check]) -> str:
    """One sentence: what failed, or what was improved."""
    failed = [f"{check.gate}: {check.told}" for check in checks if not check.passed]
    if failed:
        return "; ".join(failed)
    improved = [check.told for check in checks if check.gate == "better than the champion"]
    return "; ".join(improved) or "all thresholds are reached, and there was no champion"


def _alone(candidate: Evaluated, gates: Gates) -> list[Check]:
    found: list[Check] = []
    for name, bound in gates.least.items():
        value = _figure(candidate, name).value
        found.append(Check(f"{name} at least {bound:g}", value >= bound, f"{value:.4g}"))
    for name, bound in gates.most.items():
        value = _figure(candidate, name).value
        found.append(Check(f"{name} at most {bound:g}", value <= bound, f"{value:.4g}"))
    for name, share in gates.share_of_real.items():
        if name in candidate.figures and name in candidate.real:
            value, real = candidate.figures[name].value, candidate.real[name]
            passed, told = real > 0 and value >= share * real, f"{value:.4g} of {real:.4g}"
            found.append(Check(f"{name} at least {share:g} of real", passed, told))
    if gates.captions and candidate.conditional:
        looked = [name for name in _OF_CAPTIONS if name in candidate.figures]
        found.append(Check("captions are looked at", bool(looked), ", ".join(looked) or "by no figure: name a --clip"))
    if gates.copies and "copy_share" in candidate.figures:
        found.append(_few_copies(candidate))
    return found


def _improved(candidate: Evaluated, champion: Evaluated, gates: Gates) -> Check:
    """Whether one of the figures is better; told of the first that is, or of all that are there."""
    told = []
    for name in gates.improve:
        if name in gates.improve_by:
            _figure(candidate, name)
        if name not in candidate.figures or name not in champion.figures:
            continue
        ours, theirs = candidate.figures[name], champion.figures[name]
        verdict = compare(ours, theirs)
        gain = (ours.value - theirs.value) * (1 if ours.better == "higher" else -1)
        pair = f"{name} {_pair(ours, theirs)}"
        if gain > 0 and gain >= gates.improve_by.get(name, 0.0) and (verdict == "better" or not gates.certain):
            return Check("better than the champion", True, pair)
        told.append(f"{pair}: no more than chance" if verdict == "undecided" and gates.certain else pair)
    if not told:
        raise ValueError(f"gate on {', '.join(gates.improve)}: none was measured of both")
    return Check("better than the champion", False, "; ".join(told))


def _slices(candidate: Evaluated, champion: Evaluated, loss: float) -> list[Check]:
    """The slice that lost most, where the loss is above `loss` and above what chance gives the worst of so many."""
    common = candidate.slices.keys() & champion.slices.keys()
    lost = []
    for name in common:
        (count, ours), (others, theirs) = candidate.slices[name], champion.slices[name]
        pooled = (count * ours + others * theirs) / (count + others)
        deviation = math.sqrt(max(pooled * (1 - pooled), 1e-9) * (1 / count + 1 / others))
        certain = theirs - ours > _deviations(len(common)) * deviation
        lost.append((theirs - ours, theirs - ours > loss and certain, name, theirs, ours))
    if not lost:
        return []
    fallen = [each for each in lost if each[1]]
    _, failed, name, theirs, ours = max(fallen or lost)
    return [Check("no slice falls", not failed, f"{name!r} from {theirs:.3f} to {ours:.3f}")]


def _deviations(slices: int) -> float:
    """How many standard deviations the worst of so many slices falls by chance in one of twenty comparisons."""
    from scipy.stats import norm

    return float(norm.isf(0.05 / slices))


def _few_copies(candidate: Evaluated) -> Check:
    figure = candidate.figures["copy_share"]
    low = figure.value if figure.low is None else figure.low
    return Check("few copies", low <= _COPIES * COPY_QUANTILE, f"{figure.value:.4g} of the pictures")


def _figure(found: Evaluated, name: str) -> Figure:
    if name not in found.figures:
        raise ValueError(f"gate on {name}: it was not measured; there are {', '.join(found.figures)}")
    return found.figures[name]


def _pair(ours: Figure, theirs: Figure) -> str:
    return f"{ours.told()} against {theirs.told()}"
