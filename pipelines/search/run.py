"""The driver of a search: draw trials, let Ray Tune run and stop them, rank them, write down the best one."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import yaml
from rich.console import Console

from infra import storage, tracking
from infra.errors import BadRequest, RunFailed
from infra.mlflow_store import open_client, patiently
from pipelines.search.config import SearchConfig, check_search, trial_config, trial_tree
from pipelines.search.record import Trial, ranked, read_trials, same, write_text
from pipelines.search.trial import run_trial
from pipelines.training import cluster
from pipelines.training.config import TrainConfig, logged
from pipelines.training.inputs import prepare_inputs
from pipelines.training.launch import git_commit, prepare_data
from pipelines.training.lease import Lease
from pipelines.training.presets import override
from pipelines.training.run_folder import RunFolder

# What trials need of the driver's environment, where they run on another node or in a Ray that was there before.
_ENVIRONMENT = ("RUN_ROOT", *cluster.LIMITS.values())


def search_best(base: dict[str, Any], search: SearchConfig) -> dict[str, Any]:
    """Carry out (or resume, or report as finished) a search; returns its summary.

    Raises:
        BadRequest: the request cannot be carried out; nothing was started.
        RunFailed: no trial could be trained.
    """
    started = time.time()
    check_search(base, search)
    drawn = [] if search.method == "optuna" else search.draw_trials()
    configs = [trial_config(base, search, f"{search.name}-{n:04d}", values) for n, values in enumerate(drawn)]
    config = trial_config(base, search, search.name, drawn[0] if drawn else {})
    folder = RunFolder.of(config)
    if folder.read("config.json") is not None:
        raise BadRequest(f"{folder.url} is a run's: take another search.name")
    for each in (config, *configs):
        cluster.check_local_room(each)
    storage.check_access(folder.url, write=True)
    uri = tracking.check_tracking(config.tracking.uri)
    with Lease(folder) as lease:
        known_index = _begin(folder, base, search)
        if (known := folder.read("result.json")) is not None:
            print(f"search {search.name!r} is finished: nothing to do", flush=True)
            return {**known, "outcome": "already finished"}
        if known_index is not None:  # all trials read the same shards, whatever has arrived since
            base = override(base, [f"data.index={known_index}"])
            config = trial_config(base, search, search.name, drawn[0] if drawn else {})
        data, _ = prepare_data(config, folder)
        base = override(base, [f"data.index={data.train.digest}"])
        folder.write("search.json", {**(folder.read("search.json") or {}), "index": data.train.digest})
        prepare_inputs(config, folder, data.train)  # what is trained first is trained once, for all trials
        run_id = _open_run(config, search, folder, uri)
        try:
            # By name: what a trial's process finds in its environment may be another server.
            of_trials = override(base, [f"tracking.uri={json.dumps(uri)}"])
            _run_trials(of_trials, search, config, folder, drawn, run_id)
            lease.check()
            summary = _conclude(base, search, config, folder, uri, run_id)
        except BaseException:
            _close_runs(config, search, folder, uri)
            tracking.finish_run(uri, run_id, "FAILED")
            raise
        tracking.finish_run(uri, run_id, "FINISHED")
        folder.write("result.json", summary)
        storage.remove(folder.path("ray"))  # of Ray Tune, which keeps pickles: nothing here reads them
    return {**summary, "outcome": "searched", "seconds": time.time() - started}


def _begin(folder: RunFolder, base: dict[str, Any], search: SearchConfig) -> str | None:
    """Write down what is searched, or check that it is still the same; returns the digest of the shards of an earlier
    launch. Raises BadRequest."""
    request = {"base": base, "search": search.model_dump(mode="json")}
    known = folder.read("search.json")
    if known is not None and not same(_lasting(known), _lasting(request)):
        raise BadRequest(
            f"search {search.name!r} began with another preset or space: undo that to resume, or start anew with "
            "search.name=ANOTHER_NAME"
        )
    index = None if known is None else known.get("index")
    folder.write("search.json", {**request, "index": index})
    return index


def _lasting(request: dict[str, Any]) -> dict[str, Any]:
    """Without what a resumed search may change."""
    kept = {key: value for key, value in request["search"].items() if key not in ("at_once", "max_failures")}
    base = {key: value for key, value in request["base"].items() if key not in ("workers", "tracking")}
    return {"base": base, "search": kept}


def _open_run(config: TrainConfig, search: SearchConfig, folder: RunFolder, uri: str) -> str:
    """The MLflow run of the search; its trials' runs are nested in it."""
    known = (folder.read("run.json") or {}).get("mlflow_run_id")
    tags = {"git_commit": git_commit(), "run_folder": folder.url, "pipeline": "search"}
    params = logged({"search": search.model_dump(mode="json")})
    run_id = tracking.start_run(uri, config.tracking.experiment, search.name, known, params, tags)
    folder.write("run.json", {"mlflow_run_id": run_id, "tracking_uri": uri})
    return run_id


def _run_trials(
    base: dict[str, Any],
    search: SearchConfig,
    config: TrainConfig,
    folder: RunFolder,
    drawn: list[dict[str, Any]],
    run_id: str,
) -> None:
    """Let Ray Tune run the trials. Raises KeyboardInterrupt where it was stopped by hand."""
    cluster.join(search.at_once * cluster.local_cpus(config))
    cluster.check_shared(folder.url, "the search's folder")
    tracking.check_tracking(config.tracking.uri, cluster.node_count())
    room = cluster.resources()
    cluster.check_room(config, room | {"CPU": room["CPU"] / search.at_once, "GPU": room["GPU"] / search.at_once})
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end the search as if it were through
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has what these would write
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints frames of its own, also when told not to
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    from ray import tune

    from pipelines.search.suggestions import Progress, Suggestions, domains, population, scheduler

    filesystem, path = (
        storage.ray_filesystem(folder.path("ray")) if storage.is_remote(folder.url) else (None, folder.path("ray"))
    )
    job = {
        "base": base,
        "search": search.model_dump(mode="json"),
        "folder": folder.url,
        "parent_run": run_id,
        "environment": {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
    }
    ways = population if search.method == "pbt" else Suggestions
    tuner = tune.Tuner(
        # Its training asks for CPUs and GPUs itself, and Ray Tune does not place what asks for nothing.
        tune.with_resources(tune.with_parameters(run_trial, job=job), {"memory": 1 << 20}),
        tune_config=tune.TuneConfig(
            search_alg=ways(search, drawn, read_trials(folder), folder),
            scheduler=scheduler(search),
            num_samples=search.trials,
            max_concurrent_trials=search.at_once,
            metric=search.metric,
            mode="min" if search.better == "lower" else "max",
        ),
        param_space=domains(search) if search.method == "pbt" else None,
        run_config=tune.RunConfig(
            name=f"{search.name}-{time.time_ns()}",  # a launch of its own: what is resumed is our record
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
            callbacks=[Progress(search)],
            verbose=0,
        ),
    )
    results = tuner.fit()
    died = {n: " ".join(str(result.error).split())[-500:] for n, result in enumerate(results) if result.error}
    for number, error in died.items():
        print(f"trial {number}: {error}", file=sys.stderr)
    if died:
        raise RunFailed(
            f"{len(died)} of {search.trials} trials died {search.max_failures + 1} times each, as said above; what is "
            "known of them is kept: type the same command again to go on"
        )
    if len(read_trials(folder)) < search.trials:
        raise KeyboardInterrupt


def _conclude(
    base: dict[str, Any], search: SearchConfig, config: TrainConfig, folder: RunFolder, uri: str, run_id: str
) -> dict[str, Any]:
    """Rank the trials, write the best one's preset, and record both."""
    _close_runs(config, search, folder, uri)
    trials = ranked(read_trials(folder), search.metric, search.better)
    best = trials[0]
    if best.value(search.metric) is None or best.failed is not None:
        raise RunFailed(f"no trial could be trained; trial {best.number}: {best.failed or 'its process died'}")
    preset = write_text(folder, "best.yaml", _best_preset(base, search, best))
    summary = {
        "search": search.name,
        "folder": folder.url,
        "metric": search.metric,
        "trials": [_told(trial, search) for trial in trials],
        "best": _told(best, search),
        "preset": preset,
        "mlflow_run_id": run_id,
        "tracking_uri": uri,
    }
    _log(uri, run_id, search, folder, trials, preset)
    return summary


def _told(trial: Trial, search: SearchConfig) -> dict[str, Any]:
    value = trial.value(search.metric)
    told = {"number": trial.number, "values": trial.values, "steps": trial.step, search.metric: value}
    return told | {"run": trial.run, "complete": trial.complete, "failed": trial.failed}


def _best_preset(base: dict[str, Any], search: SearchConfig, best: Trial) -> str:
    """The best trial's configuration as a preset, which goes on from its checkpoint."""
    tree = trial_tree(base, search, best.values)
    goes_on = {"init_from": None, "continue_from": best.reports[-1]["checkpoint"]}
    tree["run"] = {**tree["run"], "name": f"{search.name}-best", **goes_on}
    told = ", ".join(f"{key}={value}" for key, value in best.values.items())
    head = (
        f"# Trial {best.number} of the search {search.name}: {told}\n"
        f"# ({search.metric} {best.value(search.metric):.6g} after {best.step} of {tree['run']['steps']} steps)\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _close_runs(config: TrainConfig, search: SearchConfig, folder: RunFolder, uri: str) -> None:
    """End the MLflow runs of trials that were cut off: nobody else does, since their processes were stopped."""
    client = open_client(uri)
    root = folder.url.removesuffix(f"/{search.name}")
    for trial in read_trials(folder):
        for name in (*trial.earlier, trial.run):
            known = (RunFolder(storage.join(root, name)).read("run.json") or {}).get("mlflow_run_id")
            if known is None or patiently(client.get_run, known).info.status != "RUNNING":
                continue
            steps = max((each["step"] for each in trial.reports if each["run"] == name), default=0)
            tracking.set_tags(uri, known, {"search.cut_off_at": steps})
            tracking.finish_run(uri, known, "FINISHED")


def _log(uri: str, run_id: str, search: SearchConfig, folder: RunFolder, trials: list[Trial], preset: str) -> None:
    """The search's own run gets the best figure, the table of trials, the preset and the picture."""
    from pipelines.search.chart import draw_search

    client = open_client(uri)
    picture = draw_search(search, trials)
    storage.write_bytes(folder.path("search.png"), picture)
    best = trials[0].value(search.metric)
    assert best is not None
    patiently(client.log_metric, run_id, f"best_{search.metric}", best)
    tracking.set_tags(uri, run_id, {"best_trial": trials[0].number, "best_run": trials[0].run})
    patiently(client.log_dict, run_id, {"trials": [asdict(trial) for trial in trials]}, "search/trials.json")
    patiently(client.log_text, run_id, storage.read_bytes(preset).decode(), "search/best.yaml")
    import io

    from PIL import Image

    patiently(client.log_image, run_id, Image.open(io.BytesIO(picture)), "search/search.png")


def show(summary: dict[str, Any]) -> None:
    """Print the trials, the best one first, and where the best one's preset is."""
    from rich.table import Table

    console, metric = Console(soft_wrap=True), summary["metric"]
    console.width = max(console.width, 100)
    table = Table(title=f"{summary['search']}: {summary['outcome']}", padding=(0, 1, 0, 0))
    keys = list(summary["best"]["values"])
    for column in ("trial", *keys, "steps", metric, ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for trial in summary["trials"]:
        value = "–" if trial[metric] is None else f"{trial[metric]:.5g}"
        state = "failed" if trial["failed"] else "" if trial["complete"] else "cut off"
        cells = [str(trial["values"].get(key, "")) for key in keys]
        table.add_row(str(trial["number"]), *cells, str(trial["steps"]), value, state)
    console.print(table, highlight=False)
    for trial in summary["trials"]:
        if trial["failed"]:
            console.print(f"  trial {trial['number']} failed: {trial['failed']}", markup=False, highlight=False)
    console.print(f"  best       {summary['preset']}", highlight=False, markup=False)
    console.print(f"  mlflow     {summary['tracking_uri']}  run {summary['mlflow_run_id']}", highlight=False)
