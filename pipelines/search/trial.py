"""One trial of a search, in an actor of Ray Tune: a training run that tells its figures and is paused at its end."""

from __future__ import annotations

import json
import os
import tempfile
import urllib.error
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import BadRequest, RunFailed
from pipelines.search.config import SearchConfig, trial_config
from pipelines.search.record import Trial, read_trial
from pipelines.training.run_folder import RunFolder, share_index

_POINTER = "pointer.json"
NUMBER = "number"  # of the trial, beside the values that Ray Tune hands over


def number_of(trial_id: str, point: Mapping[str, Any]) -> int:
    """A trial's number. In a population a trial takes over all that another one was given, but not its id, which
    ends with the number."""
    return int(point.get(NUMBER, trial_id.rpartition("_")[2]))


def run_trial(point: dict[str, Any], job: dict[str, Any]) -> None:
    """Train a trial from where it stands; Ray Tune calls it again where the process or node died.

    Args:
        point: the values of the keys that are searched, and (but in a population) the trial's NUMBER.
        job: `base` (the preset's tree), `search`, `folder`, `parent_run` (MLflow) and `environment`.
    """
    os.environ |= job["environment"]
    from ray import tune

    from pipelines.training.fit import Part
    from pipelines.training.launch import train

    search, folder = SearchConfig.model_validate(job["search"]), RunFolder(job["folder"])
    values = {key: value for key, value in point.items() if key != NUMBER}
    number = number_of(tune.get_context().get_trial_id(), point)
    trial = read_trial(folder, number) or Trial.new(search.name, number, values)
    pointer, since = _pointer(), -1
    if pointer is not None and pointer["number"] != trial.number:
        if (trial.values, trial.continue_from) != (values, pointer["checkpoint"]):  # else it died right after that
            trial = trial.forked(values, pointer["checkpoint"])  # population-based training chose it
            trial.save(folder)
    elif pointer is not None:
        since = pointer["step"]
    # What an earlier driver was told, this one is told too. A population goes on from where each one stands.
    known = trial.reports if search.method != "pbt" else trial.reports[-1:] if trial.complete else []
    if trial.complete:
        _tell_again(trial, known, since, search)
        return

    def on_measured(entry: dict[str, Any]) -> None:
        nonlocal trial
        if trial.reports and trial.reports[-1]["run"] == trial.run and entry["step"] <= trial.step:
            return  # told before the trial was started again
        trial = trial.reported(entry)
        trial.save(folder)
        if entry["step"] < search.steps:  # the last one, once the run is paused as it should be
            _tell(trial, entry, search)

    try:
        _tell_again(trial, known, since, search)
        config = trial_config(job["base"], search, trial.run, trial.values, trial.continue_from)
        share_index(folder, RunFolder.of(config))
        paused = train(config, lines=True, parent_run=job["parent_run"], part=Part(search.steps, on_measured))
        if paused.get("measured"):  # the driver may have missed it, as where the board was started again
            on_measured({"step": paused["steps"], "figures": paused["measured"], "checkpoint": paused["checkpoint"]})
        _check_measured(trial.reports[-1]["figures"] if trial.reports else {}, search)
    except (BadRequest, RunFailed) as error:
        if isinstance(error.__cause__, (*storage.ERRORS, urllib.error.URLError)):
            raise  # a server does not answer: Ray Tune starts the trial again
        trial = replace(trial, failed=" ".join(str(error).split())[:1000])
        trial.save(folder)
        # The worst of all values, so that what chooses the next trials learns from it.
        worst = float("inf") if search.better == "lower" else float("-inf")
        tune.report({search.metric: worst, "step": search.steps})
        return
    trial = replace(trial, complete=True)
    trial.save(folder)
    _tell(trial, trial.reports[-1], search)


def _check_measured(figures: dict[str, float], search: SearchConfig) -> None:
    """Raises RunFailed where figures lack the one that decides."""
    if search.metric not in figures:
        raise RunFailed(f"{search.metric} was not finite, or is not measured: there are {', '.join(sorted(figures))}")


def _tell_again(trial: Trial, known: list[dict[str, Any]], since: int, search: SearchConfig) -> None:
    for entry in known:
        if entry["step"] > since:
            _tell(trial, entry, search)


def _tell(trial: Trial, entry: dict[str, Any], search: SearchConfig) -> None:
    """Report a step's figures to Ray Tune, with where its checkpoint is: a population goes on from there."""
    from ray import tune

    pointer = {"number": trial.number, "step": entry["step"], "checkpoint": entry["checkpoint"]}
    _check_measured(entry["figures"], search)
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / _POINTER).write_text(json.dumps(pointer))
        tune.report({**entry["figures"], "step": entry["step"]}, checkpoint=tune.Checkpoint.from_directory(temporary))


def _pointer() -> dict[str, Any] | None:
    """What was reported last, by this trial or the one that it goes on from."""
    from ray import tune

    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return dict(json.loads((Path(folder) / _POINTER).read_text()))
