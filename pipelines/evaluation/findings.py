"""What the figures say in words: where generated pictures are told from real ones, and how."""

from __future__ import annotations

from typing import Literal, NamedTuple

from genmodels.metrics.figure import Figure
from pipelines.evaluation.figures import COPY_QUANTILE, Measured

_SHORTFALL = 0.8  # of what real pictures reach; a figure whose whole interval is below it stands out
_COPIES = 3  # times as many near copies as among real pictures
_ALIKE = 1.15  # times the similarity of real pictures
_FARTHER = 2  # times the distance of real pictures


class Finding(NamedTuple):
    """One sentence; `kind` says of what."""

    kind: Literal["copies", "modes", "quality", "distance", "captions", "none"]
    text: str


def findings(measured: Measured) -> list[Finding]:
    """What stands out. A figure counts when its whole interval is on the wrong side of what real pictures get."""
    figures = {figure.name: figure for figure in measured.figures}
    found: list[Finding] = []
    copies = figures.get("copy_share")
    if copies is not None and _low(copies) > _COPIES * COPY_QUANTILE:
        found.append(
            Finding(
                "copies",
                f"{copies.value:.0%} of the pictures are nearer to a training picture than {1 - COPY_QUANTILE:.0%} of "
                "real held-out pictures are: the model repeats its training data.",
            )
        )
    for name, kind, what in (
        ("recall", "modes", "of the real pictures have a generated one around them: much of what is real is not drawn"),
        ("coverage", "modes", "of the real pictures are covered: much of what is real is not drawn"),
        ("precision", "quality", "of the pictures lie where real ones do: the others look like none"),
        ("caption_consistency", "captions", "of the pictures show what their captions say"),
    ):
        figure, real = figures.get(name), measured.real.get(name)
        if figure is None or real is None or _high(figure) >= _SHORTFALL * real:
            continue
        if kind not in {finding.kind for finding in found}:
            found.append(Finding(kind, f"{figure.value:.0%} {what}. Of real ones it would be {real:.0%}."))  # type: ignore[arg-type]
    alike, real = figures.get("ms_ssim"), measured.real.get("ms_ssim")
    if alike is not None and real is not None and _low(alike) > _ALIKE * real + 0.02:
        found.append(
            Finding(
                "modes",
                f"two pictures have a structural similarity of {alike.value:.2f}, two real ones {real:.2f}: they are "
                "more alike than real ones.",
            )
        )
    distance, real = figures.get("frechet_distance"), measured.real.get("frechet_distance")
    if distance is not None and real is not None and _low(distance) > _FARTHER * max(real, 0.0):
        found.append(
            Finding(
                "distance",
                f"The Fréchet distance to real pictures is {distance.value:.3g}, that of real ones "
                f"{max(real, 0.0):.2g}: taken together they look otherwise.",
            )
        )
    if not found:
        found.append(Finding("none", "By these figures the pictures are not told from real ones."))
    return found


def _low(figure: Figure) -> float:
    return figure.value if figure.low is None else figure.low


def _high(figure: Figure) -> float:
    return figure.value if figure.high is None else figure.high
