"""A search as one validated object: which keys of a preset vary, how trials are chosen, and how long each may train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from genmodels.config import Section
from infra.errors import BadRequest
from pipelines.training.config import TrainConfig, abstract_networks, folder_name, load_config
from pipelines.training.evaluation import MEASURED
from pipelines.training.explain import explain
from pipelines.training.presets import PRESETS, override, read_preset, read_yaml

# What a search sets itself, or what would make trials incomparable.
_NOT_SEARCHED = (
    "run.name", "run.root", "run.steps", "run.audit", "run.continue_from", "run.validate_every", "run.checkpoint_every",
    "run.validation_samples", "data.validation_url", "data.other_validation_url", "tracking", "evaluation", "best",
)  # fmt: skip
_DRAWS = 100  # attempts to draw trials that are all different


class Choice(Section):
    """One of several values."""

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=2, description="any YAML values that the key may have")

    def at(self, place: float) -> Any:
        """The value at a place from 0 to 1, 1 left out."""
        return self.values[int(place * len(self.values))]

    def nearest(self, value: Any) -> Any:
        return value

    @property
    def extremes(self) -> list[Any]:
        return self.values


class _Range(Section):
    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")

    @model_validator(mode="after")
    def _is_range(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self

    def nearest(self, value: float) -> float:
        """The value of the range that is nearest: population-based training multiplies past its ends."""
        return min(max(value, self.low), self.high)

    @property
    def extremes(self) -> list[Any]:
        return [self.low, self.high]


class Uniform(_Range):
    """Any number between two, each as likely."""

    kind: Literal["uniform"]

    def at(self, place: float) -> float:
        return float(f"{self.low + place * (self.high - self.low):.4g}")


class LogUniform(_Range):
    """Any number between two, each order of magnitude as likely."""

    kind: Literal["log_uniform"]

    @model_validator(mode="after")
    def _is_positive(self) -> LogUniform:
        if self.low <= 0:
            raise ValueError(f"low {self.low:g} of a log_uniform is to be above 0")
        return self

    def at(self, place: float) -> float:
        return float(f"{self.low * (self.high / self.low) ** place:.4g}")


class Integer(_Range):
    """Any whole number from one to another, both included."""

    kind: Literal["integer"]

    def at(self, place: float) -> int:
        return int(self.low) + int(place * (int(self.high) - int(self.low) + 1))

    def nearest(self, value: float) -> int:
        return round(super().nearest(value))

    @property
    def extremes(self) -> list[Any]:
        return [int(self.low), int(self.high)]


Domain = Annotated[Choice | Uniform | LogUniform | Integer, Field(discriminator="kind")]


class SearchConfig(Section):
    """Which trainings are tried, and which of them go on."""

    name: str = Field(description="names the search's folder and MLflow run; the same name resumes")
    method: Literal["random", "asha", "pbt", "optuna"] = Field(
        "asha",
        description="random: all trials to the end; asha: only the best part of them (asynchronous successive halving, "
        "Li et al. 2020); pbt: the worst go on from the best ones' weights with other values (Jaderberg et al. 2017); "
        "optuna: each trial chosen by what the earlier ones gave (needs the extra optuna)",
    )
    trials: int = Field(8, gt=0, description="trainings that are tried")
    at_once: int = Field(1, gt=0, description="trainings at the same time")
    steps: int = Field(gt=0, description="of a trial that is not cut off earlier; learning rates follow run.steps")
    interval: int = Field(gt=0, description="steps between held-out figures, each with a checkpoint")
    metric: str = Field("val_loss", description="held-out figure that decides")
    better: Literal["lower", "higher"] = Field("lower", description="which way is an improvement")
    seed: int = Field(0, description="of the values that are drawn")
    keep_one_of: int = Field(2, gt=1, description="asha: at each rung this share goes on, and the next is this far")
    worst_share: float = Field(0.25, gt=0, le=0.5, description="pbt: share that goes on from as many best ones")
    draw_anew: float = Field(0.25, ge=0, le=1, description="pbt: chance that a value is drawn anew, else by 20 % off")
    max_failures: int = Field(3, ge=0, description="restarts of a trial whose process or node died")
    space: dict[str, Domain] = Field(min_length=1, description="keys of the preset, and the values that they may take")

    _names_a_folder = field_validator("name")(folder_name)

    @model_validator(mode="after")
    def _fits(self) -> SearchConfig:
        wrong = []
        if self.steps % self.interval:
            wrong.append(f"steps={self.steps} is not a multiple of interval={self.interval}")
        if not self.metric.startswith("val_"):
            wrong.append(f"metric={self.metric}: take a held-out figure, whose name begins with val_")
        for key in self.space:
            if any(key == name or key.startswith(f"{name}.") for name in _NOT_SEARCHED):
                wrong.append(f"space.{key} is set by the search, or would make trials incomparable: leave it out")
        if self.method == "pbt" and self.trials < 2:
            wrong.append("method=pbt needs 2 trials at least: one goes on from another")
        elif self.method == "pbt" and self.at_once < self.trials:
            wrong.append(f"method=pbt trains its population side by side: set at_once={self.trials}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def draw_trials(self) -> list[dict[str, Any]]:
        """Values of all trials, each different, spread over every key's range (Latin hypercube, McKay et al. 1979).

        Raises BadRequest where the space holds fewer.
        """
        random, drawn = np.random.default_rng(self.seed), []
        for _ in range(_DRAWS):
            columns = [random.permutation(self.trials) + random.random(self.trials) for _ in self.space]
            for places in zip(*columns):
                values = {key: at.at(place / self.trials) for (key, at), place in zip(self.space.items(), places)}
                if values not in drawn:
                    drawn.append(values)
                if len(drawn) == self.trials:
                    return drawn
        raise BadRequest(f"trials={self.trials}: the space holds {len(drawn)} different trials only")


def load_search(preset: str, name: str, assignments: list[str]) -> tuple[dict[str, Any], SearchConfig]:
    """The tree of a preset, and a search (a YAML file by path, URL or name); `search.KEY=value` is for the search, any
    other override for the preset.

    Raises BadRequest, which names every mistake.
    """
    own = [text.removeprefix("search.") for text in assignments if text.startswith("search.")]
    theirs = [text for text in assignments if not text.startswith("search.")]
    tree = read_yaml(name, PRESETS / "searches", "search")
    if not isinstance(tree, dict):
        raise BadRequest(f"{name} must hold a mapping (name, method, trials, steps, interval, space, …)")
    try:
        search = SearchConfig.model_validate(override(tree, own))
    except ValidationError as error:
        raise BadRequest("; ".join(explain(error, SearchConfig))) from None
    return override(read_preset(preset), theirs), search


def trial_tree(base: dict[str, Any], search: SearchConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The preset's tree with the values of a trial; none of what a search sets for its trials."""
    tree = override(base, [])
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def trial_config(
    base: dict[str, Any], search: SearchConfig, run: str, values: dict[str, Any], continue_from: str | None = None
) -> TrainConfig:
    """The run of a trial: measured and saved at each interval, registered nowhere. Raises BadRequest."""
    tree = trial_tree(base, search, values)
    run_section, drawn = tree.setdefault("run", {}), search.metric in MEASURED
    run_section |= {"name": run, "checkpoint_every": search.interval, "preview_every": 0, "preview_samples": 0}
    # Another trial may go on from any of them, also after the search was cut off.
    kept = search.steps // search.interval if search.method == "pbt" else 2
    run_section |= {"continue_from": continue_from, "keep_checkpoints": kept}
    if continue_from is not None:
        run_section["init_from"] = None  # the other trial began with it
    if not drawn:
        run_section["validate_every"] = search.interval
    tree["evaluation"] = {**tree.get("evaluation", {}), "every": search.interval if drawn else 0}
    tree["tracking"] = {**tree.get("tracking", {}), "register_as": None, "system_metrics": False}
    tree.pop("best", None)
    try:
        return load_config(tree, [])
    except BadRequest as error:
        told = ", ".join(f"{key}={value}" for key, value in values.items())
        raise BadRequest(f"a trial with {told}: {error}") from None


def check_search(base: dict[str, Any], search: SearchConfig) -> None:
    """Raise BadRequest where a value of the space is none of the preset's, or trials could not be measured."""
    middle = {key: domain.extremes[0] for key, domain in search.space.items()}
    config = trial_config(base, search, search.name, middle)
    if config.run.steps <= search.steps:
        raise BadRequest(
            f"search.steps={search.steps}: a trial is a run that is cut off, and the best one goes on, so it is below "
            f"run.steps={config.run.steps}"
        )
    if config.data.validation_url is None or (search.metric not in MEASURED and not config.run.validation_samples):
        raise BadRequest(f"search.metric={search.metric} is measured on held-out samples: name data.validation_url")
    shapes = _shapes(config) if search.method == "pbt" else None
    for key, domain in search.space.items():
        for value in domain.extremes:
            other = trial_config(base, search, search.name, {**middle, key: value})
            if shapes is not None and _shapes(other) != shapes:
                raise BadRequest(
                    f"space.{key}: with pbt a trial goes on from another one's weights, and {value} has others"
                )


def _shapes(config: TrainConfig) -> dict[str, Any]:
    networks = abstract_networks(config)
    return {f"{name}.{key}": tuple(p.shape) for name, net in networks.items() for key, p in net.named_parameters()}
