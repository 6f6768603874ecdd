"""A measured figure with everything that it depends on, so that only what was measured alike is compared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genmodels.config import Section


class Conditions(Section):
    """How a figure was measured. Two figures are comparable when all of this is equal."""

    count: int = Field(gt=0, description="pictures that were measured")
    seed: int | None = Field(None, description="picture i was drawn from seed · count + i; none for given pictures")
    sampler: str | None = Field(None, description="that drew them")
    num_steps: int | None = Field(None, description="of the sampler")
    guidance_scale: float | None = Field(None, description="of the sampler")
    options: dict[str, float | int | str | bool] = Field({}, description="what else the sampler was told")
    precision: str | None = Field(None, description="of the denoiser's products, fp32 or bf16")
    extractor: str | None = Field(None, description="digest of the network that gave the features")
    clip: str | None = Field(None, description="digest of the CLIP that gave the embeddings of captions")
    data: str | None = Field(None, description="digest of the real pictures that they were compared with")
    data_count: int | None = Field(None, description="of those")
    training_count: int | None = Field(None, description="of those")
    training_data: str | None = Field(None, description="digest of the training pictures among which copies are sought")


class Figure(Section):
    """One number, its confidence interval, and its conditions."""

    name: str = Field(description="of the metric")
    value: float = Field(description="the figure")
    low: float | None = Field(None, description="lower end of the interval")
    high: float | None = Field(None, description="upper end of the interval")
    better: Literal["higher", "lower"] = Field(description="which way is an improvement")
    conditions: Conditions = Field(description="how it was measured")

    def told(self) -> str:
        """In a line: the value, and its interval."""
        return f"{self.value:.5g}" + ("" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]")


Verdict = Literal["better", "worse", "undecided"]


def compare(candidate: Figure, champion: Figure) -> Verdict:
    """Whether a figure improves on another; undecided where their intervals overlap, or one has none.

    Raises:
        ValueError: they are of different metrics, or were measured differently; the message names each difference.
    """
    if candidate.name != champion.name:
        raise ValueError(f"{candidate.name!r} and {champion.name!r} are different metrics")
    found = differences(candidate.conditions, champion.conditions)
    if found:
        told = "; ".join(f"{name} is {one!r} and {other!r}" for name, (one, other) in found.items())
        raise ValueError(f"{candidate.name}: measured differently, so not compared: {told}")
    ends = (candidate.low, candidate.high, champion.low, champion.high)
    if None in ends:
        return "undecided"
    low, high, other_low, other_high = (float(end) for end in ends if end is not None)
    above, below = low > other_high, high < other_low
    if not above and not below:
        return "undecided"
    return "better" if above == (candidate.better == "higher") else "worse"


def differences(one: Conditions, other: Conditions) -> dict[str, tuple[object, object]]:
    """The conditions that are not equal, each with both values."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in Conditions.model_fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
