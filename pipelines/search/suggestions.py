"""What Ray Tune asks of a search: the values of the next trial, which trials go on, and what is shown meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from rich.console import Console

from infra.errors import BadRequest
from pipelines.search.config import Choice, Integer, LogUniform, SearchConfig, Uniform
from pipelines.search.record import Trial
from pipelines.search.trial import NUMBER, number_of
from pipelines.training.run_folder import RunFolder

_CONSOLE = Console(soft_wrap=True)  # of the module: Ray Tune pickles what it is given


class Suggestions(Searcher):
    """Numbered trials: those that are on record with their values, then new ones, drawn before or chosen by Optuna.

    Not for populations: Ray Tune's own list of points does for those (`population`).

    Args:
        drawn: values of all trials; none where Optuna chooses.
        known: trials of an earlier launch, by number.
        folder: where a new trial is put on record.
    """

    def __init__(
        self, search: SearchConfig, drawn: list[dict[str, Any]], known: list[Trial], folder: RunFolder
    ) -> None:
        super().__init__(metric=search.metric, mode="min" if search.better == "lower" else "max")
        self.search, self.drawn, self.known, self.folder = search, drawn, known, folder
        self.count = 0
        self.resumed: dict[str, Trial] = {}
        self.optuna = _optuna(search, known) if search.method == "optuna" else None

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's number and values; None where all are there."""
        if self.count == self.search.trials:
            return None
        number = self.count
        if number < len(self.known):
            trial = self.resumed[trial_id] = _tried_again(self.known[number], self.folder)
        else:
            values = self.drawn[number] if self.optuna is None else self.optuna.suggest(trial_id)
            if values is None:
                return None
            trial = Trial.new(self.search.name, number, values)
            trial.save(self.folder)
        self.count += 1
        return {NUMBER: number, **trial.values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self.optuna is None:
            return
        if trial_id not in self.resumed:
            self.optuna.on_trial_complete(trial_id, result, error)
        elif not self.resumed[trial_id].complete and result is not None and not error:
            self.optuna.add_evaluated_point(self.resumed[trial_id].values, result[self.search.metric])

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials are on record as JSON."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: as `save`."""


def _tried_again(trial: Trial, folder: RunFolder) -> Trial:
    """A trial of an earlier launch: what made it fail may be mended by now."""
    if trial.failed is not None:
        trial = replace(trial, failed=None)
        trial.save(folder)
    return trial


def domains(search: SearchConfig) -> dict[str, Any]:
    """The space as Ray Tune's own."""

    def domain(of: Choice | Uniform | LogUniform | Integer) -> Any:
        if isinstance(of, Choice):
            return tune.choice(of.values)
        if isinstance(of, Integer):
            return tune.randint(int(of.low), int(of.high) + 1)
        return tune.loguniform(of.low, of.high) if isinstance(of, LogUniform) else tune.uniform(of.low, of.high)

    return {key: domain(of) for key, of in search.space.items()}


def _optuna(search: SearchConfig, known: list[Trial]) -> Any:
    """Optuna's tree-structured Parzen estimator, told of the trials that are complete."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise BadRequest("search.method=optuna needs optuna: pip install 'genmodels-on-ray[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mode = "min" if search.better == "lower" else "max"
    space = OptunaSearch.convert_search_space(domains(search))
    # Another seed, or it would choose again what the trials on record have.
    chooser = OptunaSearch(space, metric=search.metric, mode=mode, seed=search.seed + len(known))
    for trial in known:
        value = trial.value(search.metric)
        if trial.complete and value is not None:
            chooser.add_evaluated_point(trial.values, value)
    return chooser


def scheduler(search: SearchConfig) -> TrialScheduler:
    """What decides at each interval which trials go on."""
    if search.method == "asha":
        return ASHAScheduler(
            time_attr="step", max_t=search.steps, grace_period=search.interval, reduction_factor=search.keep_one_of
        )
    if search.method == "pbt":
        ways = domains(search)

        def within(values: dict[str, Any]) -> dict[str, Any]:
            return {key: search.space[key].nearest(value) if key in search.space else value
                    for key, value in values.items()}  # fmt: skip

        return _Population(
            last_step=search.steps,
            time_attr="step",
            perturbation_interval=search.interval,
            # Of values in a list it takes a neighbour, or any; others it multiplies.
            hyperparam_mutations={
                key: domain.values if isinstance(domain, Choice) else ways[key] for key, domain in search.space.items()
            },
            quantile_fraction=search.worst_share,
            resample_probability=search.draw_anew,
            custom_explore_fn=within,
            log_config=False,
        )
    return FIFOScheduler()


class _Population(PopulationBasedTraining):
    """Population-based training in which nobody's weights replace those of a trial that is through."""

    def __init__(self, last_step: int, **how: Any) -> None:
        super().__init__(**how)
        self.last_step = last_step

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("step", 0) >= self.last_step:
            return str(TrialScheduler.STOP)
        return str(super().on_trial_result(tune_controller, trial, result))


def population(search: SearchConfig, drawn: list[dict[str, Any]], known: list[Trial], folder: RunFolder) -> Any:
    """The trials of population-based training, each with the values that it has now; all are put on record."""
    trials = [
        *(_tried_again(each, folder) for each in known),
        *(Trial.new(search.name, n, drawn[n]) for n in range(len(known), search.trials)),
    ]
    for trial in trials[len(known) :]:
        trial.save(folder)
    return BasicVariantGenerator(points_to_evaluate=[trial.values for trial in trials])


class Progress(Callback):
    """A line for each trial that begins, tells its figures, or ends."""

    def __init__(self, search: SearchConfig) -> None:
        self.search = search

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        values = ", ".join(f"{key}={value}" for key, value in trial.config.items() if key != NUMBER)
        self._print(trial, f"begins with {values}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        value = result.get(self.search.metric, float("nan"))
        self._print(trial, f"step {result.get('step')} of {self.search.steps}, {self.search.metric} {value:.5g}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        step = (trial.last_result or {}).get("step", 0)
        self._print(trial, "is complete" if step >= self.search.steps else f"is cut off at step {step}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._print(trial, "died")

    def _print(self, trial: Any, text: str) -> None:
        _CONSOLE.print(f"trial {number_of(trial.trial_id, trial.config)}: {text}", markup=False, highlight=False)
