"""From a checkpoint to what others open: the averaged weights in the family's export layout."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels.families import build_objective
from genmodels.objective import Objective
from genmodels.power_ema import combination
from infra import storage
from infra.errors import BadRequest, RunFailed
from infra.registry import resolve_model
from pipelines.training.checkpoint import Checkpoint, assemble, list_checkpoints, newest_verified
from pipelines.training.config import TrainConfig, absolute_url
from pipelines.training.ema import power_average
from pipelines.training.engine import freeze, trainable
from pipelines.training.run_folder import RunFolder

_BUILDING = threading.Lock()


def initial_objective(config: TrainConfig, inputs: Path) -> Objective:
    """The objective of a run as its training begins, on the CPU: fresh weights by the run's seed, or those given."""
    with _BUILDING:  # the seed is of the whole process, and another thread may build another run's
        torch.manual_seed(config.run.seed)
        objective = build_objective(config.objective, inputs)
    if (inputs / "init").is_dir():
        objective.load_weights(inputs / "init")
    return objective


def load_objective(
    config: TrainConfig, checkpoint: Checkpoint, inputs: Path, weights: dict[str, dict[str, Tensor]] | None = None
) -> Objective:
    """The objective of a run on the CPU, with the averaged weights of a checkpoint, or the `weights` given."""
    objective = initial_objective(config, inputs)
    weights = assemble(checkpoint, "ema") if weights is None else weights
    state = checkpoint.objective_state()
    for name, module in objective.networks.items():
        buffers = {key.split("|", 2)[2]: value for key, value in state.items() if key.startswith(f"buffer|{name}|")}
        freeze(module, config.optimizer_of(name).freeze, name, objective.trained.get(name, ["*"]))
        if absent := {key for key, _ in trainable(module)} - weights[name].keys():
            raise ValueError(f"{checkpoint.url} lacks {min(absent)} of {name}")
        module.load_state_dict({**module.state_dict(), **weights[name], **buffers})  # frozen ones are as at first
        module.requires_grad_(True)
        module.eval()
    own = {key.removeprefix("own|"): value for key, value in state.items() if key.startswith("own|")}
    objective.load_state_dict(own)
    return objective


def power_averages(folder: RunFolder, checkpoint: Checkpoint, length: float) -> tuple[dict[str, Any], float]:
    """Weights averaged with a power-function profile of relative `length`, made of those that the run stored.

    Returns {network: {parameter: tensor}}, and the relative error of the profile: the largest over the networks.

    Raises:
        BadRequest: the run stored none, or the length is out of range.
    """
    lengths = folder.config().ema.lengths
    newest: dict[int, Checkpoint] = {}  # a step that was done again may be there twice
    for found in list_checkpoints(folder.averages):
        if found.step <= checkpoint.step:
            newest.setdefault(found.step, found)
    stored = [(each, kept) for kept in newest.values() for each in lengths]
    if not stored:
        raise BadRequest(
            f"{folder.url} stored no averages up to step {checkpoint.step}: train with ema.lengths=[0.05,0.1]"
        )
    worst, factors = 0.0, {}
    for network, described in checkpoint.manifest["networks"].items():
        times = [(each, kept.manifest["networks"][network]["optimizer_steps"]) for each, kept in stored]
        if not described["optimizer_steps"]:
            raise BadRequest(f"network {network!r} has not been trained yet at step {checkpoint.step}")
        try:
            factors[network], error = combination(times, length, described["optimizer_steps"])
        except ValueError as wrong:
            raise BadRequest(f"--ema-length: {wrong}") from None
        worst = max(worst, error)
    summed: dict[str, dict[str, Tensor]] = {}
    for number, (each, kept) in enumerate(stored):
        for network, parameters in assemble(kept, power_average(each)).items():
            into = summed.setdefault(network, {})
            for name, values in parameters.items():
                share = float(factors[network][number]) * values.double()
                into[name] = into[name] + share if name in into else share
    return {network: {k: v.float() for k, v in values.items()} for network, values in summed.items()}, worst


def to_publish(folder: RunFolder, newest: Checkpoint) -> Checkpoint:
    """What stands for a run: the best checkpoint where one is kept, else the newest.

    Raises:
        RunFailed: the best checkpoint is damaged.
    """
    if folder.config().best.metric is None or not list_checkpoints(folder.best):
        return newest
    best = newest_verified(folder.best)
    if best is None:
        raise RunFailed(f"the best checkpoint of {folder.url} is damaged: see {folder.best}")
    return best


def export_run(
    folder: RunFolder, checkpoint: Checkpoint | None = None, ema_length: float | None = None
) -> tuple[str, dict[str, Any]]:
    """Export a checkpoint of a run (the newest, unless given), once; returns the export's URL and its facts.

    With `ema_length`, its weights are averaged by a power-function profile of that relative length.

    Raises:
        BadRequest: the folder holds no run, or no checkpoint yet, or no averages of which that one can be made.
    """
    from pipelines.training.inputs import local_inputs

    config = folder.config()
    checkpoint = checkpoint or newest_verified(folder.checkpoints)
    if checkpoint is None:
        raise BadRequest(f"{folder.url} has no checkpoint yet: train it for at least run.checkpoint_every steps")
    kind = "-best" if checkpoint.url.startswith(f"{folder.best}/") else ""
    name = f"{checkpoint.step:08d}{kind}" + ("" if ema_length is None else f"-{power_average(ema_length)}")
    target = folder.path("export", name)
    done = folder.read(f"export/{name}.json")
    if done is not None and done["checkpoint"] == checkpoint.url:
        return target, done["facts"]
    weights = error = None
    if ema_length is not None:
        weights, error = power_averages(folder, checkpoint, ema_length)
    objective = load_objective(config, checkpoint, local_inputs(folder), weights)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        local = Path(temporary) / "export"
        local.mkdir()
        facts = json.loads(json.dumps(objective.export(local), default=str))
        if ema_length is not None:
            facts |= {"ema_length": ema_length, "ema_profile_error": error}
        storage.upload_folder(local, target)
    folder.write(f"export/{name}.json", {"checkpoint": checkpoint.url, "facts": facts})
    return target, facts


def find_run(reference: str, root: str) -> RunFolder | None:
    """The folder of a run that is given by its URL, or by its name under `root`; None where it is no run."""
    alone = storage.is_remote(reference) or Path(reference).is_absolute()
    for url in (reference,) if alone else (reference, storage.join(root, reference)):
        if all(storage.exists(storage.join(url, part)) for part in ("config.json", "checkpoints")):
            return RunFolder(str(absolute_url(url)))
    return None


def find_export(reference: str, root: str) -> tuple[RunFolder, Checkpoint] | None:
    """The run and the checkpoint that are named by a run (its folder or name), or by one of its checkpoints; None where
    it is none.

    Raises:
        BadRequest: the run has no checkpoint yet.
    """
    if (folder := find_run(reference, root)) is not None:
        newest = newest_verified(folder.checkpoints)
        if newest is None:
            raise BadRequest(f"{folder.url} has no checkpoint yet: train it for at least run.checkpoint_every steps")
        return folder, to_publish(folder, newest)
    for kind in ("checkpoints", "best"):
        run, _, name = str(absolute_url(reference)).rpartition(f"/{kind}/")
        for checkpoint in list_checkpoints(f"{run}/{kind}") if run else ():
            if checkpoint.url.rstrip("/").endswith(f"/{name.rstrip('/')}"):
                return RunFolder(run), checkpoint
    return None


def resolve_reference(reference: str, root: str, tracking_uri: str | None = None, finished: bool = False) -> Path:
    """A local export folder for a model named in any way: models:/NAME, an export, a run (its folder or name), or one
    of its checkpoints.

    Raises:
        BadRequest: there is no such model, or its training has not ended and `finished` asks for that.
    """
    found = None if reference.startswith("models:") else find_export(reference, root)
    if found is None:
        return resolve_model(reference, tracking_uri)
    folder, checkpoint = found
    newest = newest_verified(folder.checkpoints) if finished else None
    if finished and not (newest is not None and newest.finished):
        raise BadRequest(f"the training of {folder.url} has not ended: type its command again first")
    return resolve_model(export_run(folder, checkpoint)[0], tracking_uri)
