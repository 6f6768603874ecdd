"""From a checkpoint to what others open: the averaged weights in the family's export layout."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from genmodels.families import build_objective
from genmodels.objective import Objective
from infra import storage
from infra.errors import BadRequest
from infra.registry import resolve_model
from pipelines.training.checkpoint import Checkpoint, assemble, list_checkpoints, newest_verified
from pipelines.training.config import TrainConfig, absolute_url
from pipelines.training.run_folder import RunFolder


def load_objective(config: TrainConfig, checkpoint: Checkpoint, inputs: Path, what: str = "ema") -> Objective:
    """The objective of a run on the CPU, with the weights of a checkpoint: "ema", or "param" for those in training."""
    objective = build_objective(config.objective, inputs)
    weights = assemble(checkpoint, what)
    state = checkpoint.objective_state()
    for name, module in objective.networks.items():
        buffers = {key.split("|", 2)[2]: value for key, value in state.items() if key.startswith(f"buffer|{name}|")}
        module.load_state_dict({**weights[name], **buffers})
        module.eval()
    own = {key.removeprefix("own|"): value for key, value in state.items() if key.startswith("own|")}
    objective.load_state_dict(own)
    return objective


def export_run(folder: RunFolder, checkpoint: Checkpoint | None = None) -> tuple[str, dict[str, Any]]:
    """Export a checkpoint of a run (the newest, unless given), once; returns the export's URL and its facts.

    Raises:
        BadRequest: the folder holds no run, or no checkpoint yet.
    """
    from pipelines.training.inputs import local_inputs

    config = folder.config()
    checkpoint = checkpoint or newest_verified(folder.checkpoints)
    if checkpoint is None:
        raise BadRequest(f"{folder.url} has no checkpoint yet: train it for at least run.checkpoint_every steps")
    name = f"{checkpoint.step:08d}"
    target = folder.path("export", name)
    done = folder.read(f"export/{name}.json")
    if done is not None and done["checkpoint"] == checkpoint.url:
        return target, done["facts"]
    objective = load_objective(config, checkpoint, local_inputs(folder))
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        local = Path(temporary) / "export"
        local.mkdir()
        facts = json.loads(json.dumps(objective.export(local), default=str))
        storage.upload_folder(local, target)
    folder.write(f"export/{name}.json", {"checkpoint": checkpoint.url, "facts": facts})
    return target, facts


def resolve_reference(reference: str, root: str, tracking_uri: str | None = None, finished: bool = False) -> Path:
    """A local export folder for a model named in any way: models:/NAME, an export, a run (its folder or name), or one
    of its checkpoints.

    Raises:
        BadRequest: there is no such model, or its training has not ended and `finished` asks for that.
    """
    if reference.startswith("models:"):
        return resolve_model(reference, tracking_uri)
    for url in (reference, storage.join(root, reference)):
        if all(storage.exists(storage.join(url, part)) for part in ("config.json", "checkpoints")):
            folder = RunFolder(str(absolute_url(url)))
            checkpoint = newest_verified(folder.checkpoints)
            if finished and not (checkpoint is not None and checkpoint.finished):
                raise BadRequest(f"the training of {url} has not ended: type its command again first")
            return resolve_model(export_run(folder, checkpoint)[0], tracking_uri)
    run, _, name = str(absolute_url(reference)).rpartition("/checkpoints/")
    for checkpoint in list_checkpoints(f"{run}/checkpoints") if run else ():
        if checkpoint.url.rstrip("/").endswith(f"/{name.rstrip('/')}"):
            return resolve_model(export_run(RunFolder(run), checkpoint)[0], tracking_uri)
    return resolve_model(reference, tracking_uri)
