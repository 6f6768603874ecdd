"""Checkpoints that are complete or absent, and readable at another world size and ZeRO stage.

    checkpoints/00000200-3fa9c1/rank-00000.safetensors   the fragments that rank 0 owns, fp32
                                rank-00001.safetensors   …
                                objective.safetensors    the objective's own state, and the networks' buffers
                                manifest.json            written last: sizes, sha256, step, shapes, facts

Every attempt has a folder of its own; a folder without a manifest is no checkpoint. Loading takes the last commit whose
files verify: the manifests of a run are numbered, since one that is restarted may commit a step again, or an earlier
one. A key in a rank's file is `network|what|parameter|start`, where `what` is param, exp_avg, exp_avg_sq, ema or
ema-LENGTH, and `start` the first element in the flattened parameter. Safetensors and JSON only: nothing here unpickles.

Taking a snapshot (a copy in host memory) and committing it (the upload) are two calls: the second needs nothing of the
training's state.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from infra import storage
from pipelines.training.ema import Ema
from pipelines.training.engine import MOMENTS, Engine

VERSION = 1


@dataclass
class NetworkState:
    """What of a network goes into a checkpoint."""

    engine: Engine
    ema: Ema


@dataclass
class Snapshot:
    """One rank's part of a checkpoint, serialised in host memory."""

    step: int
    files: dict[str, bytes]
    facts: dict[str, Any] = field(default_factory=dict)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if _world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _gather(value: Any) -> list[Any]:
    if _world_size() == 1:
        return [value]
    values: list[Any] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values


def take_snapshot(
    step: int,
    networks: dict[str, NetworkState],
    own_state: dict[str, Tensor],
    facts: dict[str, Any],
    averages_only: bool = False,
) -> Snapshot:
    """Copy this rank's share of the state to host memory. No communication.

    Args:
        step: training steps done.
        networks: engines and averages by network.
        own_state: the objective's own state and buffers; equal on all ranks, written by rank 0.
        facts: JSON that goes into the manifest (position, MLflow run id, …).
        averages_only: of the averages, those with a power-function profile, and nothing else.
    """
    rank, world_size = _rank(), _world_size()
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for network, state in networks.items():
        fragments = state.engine.fragments()
        for number, fragment in enumerate(fragments):
            begin, end = 0, fragment.numel
            if state.engine.replicated:  # everyone has it all: each rank writes its share
                begin, end = fragment.numel * rank // world_size, fragment.numel * (rank + 1) // world_size
            if begin == end:
                continue
            kept = {name: values[number] for name, values in state.ema.averages.items()}
            if averages_only:
                del kept["ema"]  # it is in the checkpoints
            else:
                kept |= fragment.values
            for what, values in kept.items():
                key = f"{network}|{what}|{fragment.name}|{fragment.start + begin}"
                tensors[key] = values[begin:end].detach().to("cpu", copy=True)
        described[network] = {
            "optimizer_steps": state.engine.optimizer_steps(),
            "shapes": {fragment.name: list(fragment.shape) for fragment in fragments},
        }
    files = {f"rank-{rank:05d}.safetensors": save(tensors)}
    if rank == 0:
        files["objective.safetensors"] = save(
            {key: value.detach().cpu().contiguous() for key, value in own_state.items()}
        )
    return Snapshot(step, files, {**facts, "networks": described})


def commit_snapshot(folder: str, snapshot: Snapshot) -> str:
    """Upload every rank's part, then the manifest. Collective. Returns the checkpoint's URL."""
    attempt = _broadcast(f"{snapshot.step:08d}-{secrets.token_hex(4)}")
    target = storage.join(folder, attempt)
    written = {}
    for name, data in snapshot.files.items():
        storage.write_bytes(storage.join(target, name), data)
        written[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    parts = _gather((written, snapshot.facts["networks"]))
    if _rank() == 0:
        facts = dict(snapshot.facts)
        facts["networks"] = _merged([networks for _, networks in parts])
        manifest = {
            "version": VERSION,
            "step": snapshot.step,
            "number": 1 + max((c.manifest.get("number", 0) for c in list_checkpoints(folder)), default=0),
            "world_size": _world_size(),
            "files": {name: entry for files, _ in parts for name, entry in files.items()},
            **facts,
        }
        storage.write_bytes(storage.join(target, "manifest.json"), json.dumps(manifest, indent=1).encode())
    if dist.is_initialized():
        dist.barrier()
    return target


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Shapes of all parameters: under ZeRO 1 and 2 a rank knows only of those it holds a piece of."""
    merged: dict[str, Any] = {}
    for networks in ranks:
        for network, described in networks.items():
            into = merged.setdefault(network, {"optimizer_steps": 0, "shapes": {}})
            into["optimizer_steps"] = max(into["optimizer_steps"], described["optimizer_steps"])
            into["shapes"] |= described["shapes"]
    return merged


@dataclass
class Checkpoint:
    """A committed checkpoint: where it is, and its manifest."""

    url: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def finished(self) -> bool:
        """Whether the training had ended, and what is measured at the end is in it."""
        return bool(self.manifest.get("finished"))

    def read_file(self, name: str) -> bytes:
        """One of its files, checked against the manifest. Raises ValueError naming the file."""
        data = storage.read_bytes(storage.join(self.url, name))
        expected = self.manifest["files"][name]
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise ValueError(
                f"{self.url}/{name} is not what its manifest says: {len(data)} bytes, expected {expected['bytes']}"
            )
        return data

    def rank_files(self) -> list[str]:
        return sorted(name for name in self.manifest["files"] if name.startswith("rank-"))

    def objective_state(self) -> dict[str, Tensor]:
        return load(self.read_file("objective.safetensors"))


def list_checkpoints(folder: str) -> list[Checkpoint]:
    """Committed checkpoints, the last one first. Folders of attempts that never got a manifest are left out."""
    found = []
    for name in sorted(storage.list_folders(folder), reverse=True):
        url = storage.join(folder, name)
        try:
            manifest = json.loads(storage.read_bytes(storage.join(url, "manifest.json")))
        except FileNotFoundError:
            continue
        if manifest.get("version") == VERSION:
            found.append(Checkpoint(url, manifest))
    return sorted(found, key=lambda c: (c.manifest.get("number", 0), c.step), reverse=True)


def newest_verified(folder: str, tell: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint whose files all verify; the ranks share the reading. Collective, the same on all ranks.

    `tell` is called on rank 0 with a line about each checkpoint that is passed over.
    """
    candidates = [(c.url, c.manifest) for c in list_checkpoints(folder)] if _rank() == 0 else None
    for url, manifest in _broadcast(candidates):
        checkpoint = Checkpoint(url, manifest)
        mine = sorted(manifest["files"])[_rank() :: _world_size()]
        problems = [problem for problem in _gather(_verify(checkpoint, mine)) if problem]
        if not problems:
            return checkpoint
        if _rank() == 0:
            tell(f"checkpoint {url} is damaged and passed over: {problems[0]}")
    return None


def adopt(source: Checkpoint, folder: str) -> Checkpoint:
    """Copy a checkpoint of another run, as the first one of a run: where that one stands, this one begins.

    Raises ValueError where its files are not what its manifest says.
    """
    target = storage.join(folder, f"{source.step:08d}-{secrets.token_hex(4)}")
    for name in source.manifest["files"]:
        storage.write_bytes(storage.join(target, name), source.read_file(name))
    ended = ("finished", "stopped_early", "figures", "measured", "best", "training_hours")  # of the other run
    manifest = {key: value for key, value in source.manifest.items() if key not in ended} | {"number": 1}
    storage.write_bytes(storage.join(target, "manifest.json"), json.dumps(manifest, indent=1).encode())
    return Checkpoint(target, manifest)


def find_checkpoint(url: str) -> Checkpoint | None:
    """The checkpoint in a folder, or the newest one that verifies of a run's folder; None where there is none."""
    if not storage.exists(storage.join(url, "manifest.json")):
        return newest_verified(storage.join(url, "checkpoints"))
    found = Checkpoint(url, json.loads(storage.read_bytes(storage.join(url, "manifest.json"))))
    return found if _verify(found, found.manifest["files"]) is None else None


def _verify(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    for name in names:
        try:
            checkpoint.read_file(name)
        except (ValueError, OSError) as error:
            return f"{name}: {error}"
    return None


def prune(folder: str, keep: int) -> None:
    """Remove all but the last `keep` checkpoints, and attempts for earlier steps that never completed."""
    checkpoints = list_checkpoints(folder)
    if len(checkpoints) <= keep:
        return
    kept, others = ({checkpoint.url for checkpoint in part} for part in (checkpoints[:keep], checkpoints[keep:]))
    oldest = f"{min(checkpoint.step for checkpoint in checkpoints[:keep]):08d}"
    for name in storage.list_folders(folder):
        url = storage.join(folder, name)
        if url in others or (url not in kept and name[:8] <= oldest):
            storage.remove(url)


class _Pieces:
    """The tensors of a checkpoint's rank files, by (network, what, parameter); a file is read once, when needed,
    and only `wanted` kinds are kept."""

    def __init__(self, checkpoint: Checkpoint, wanted: Collection[str]) -> None:
        self.checkpoint, self.wanted = checkpoint, wanted
        self.unread = checkpoint.rank_files()
        self.pieces: dict[tuple[str, str, str], list[tuple[int, Tensor]]] = {}

    def read(self, name: str) -> None:
        self.unread.remove(name)
        for key, tensor in load(self.checkpoint.read_file(name)).items():
            network, what, parameter, start = key.split("|")
            if what in self.wanted:
                self.pieces.setdefault((network, what, parameter), []).append((int(start), tensor))

    def copy(self, key: tuple[str, str, str], start: int, into: Tensor) -> bool:
        """Fill `into` with the elements from `start` on. False where the checkpoint has none of this kind."""
        while True:
            missing = into.numel()
            for begin, tensor in self.pieces.get(key, []):
                low, high = max(begin, start), min(begin + tensor.numel(), start + into.numel())
                if low < high:
                    into[low - start : high - start] = tensor[low - begin : high - begin].to(into.device)
                    missing -= high - low
            if missing == 0:
                return True
            if not self.unread:
                if missing == into.numel():
                    return False
                raise ValueError(f"{self.checkpoint.url} lacks {missing} elements of {'|'.join(key)}")
            self.read(self.unread[0])


def restore(checkpoint: Checkpoint, networks: dict[str, NetworkState]) -> None:
    """Load weights, moments and averages into the engines, whatever world size and stage wrote them. Collective.

    Raises:
        ValueError: a network or parameter is missing in the checkpoint, or has another shape.
    """
    averages = {name for state in networks.values() for name in state.ema.averages}
    pieces = _Pieces(checkpoint, ("param", *MOMENTS, *averages))
    own = f"rank-{_rank():05d}.safetensors"
    if own in pieces.unread:  # at the same world size and stage, the only file this rank needs
        pieces.read(own)
    for network, state in networks.items():
        described = checkpoint.manifest["networks"].get(network)
        if described is None:
            raise ValueError(f"{checkpoint.url} has no network {network!r}")
        if described["optimizer_steps"]:
            state.engine.make_optimizer_state(described["optimizer_steps"])
        with torch.no_grad():
            for number, fragment in enumerate(state.engine.fragments()):
                shape = described["shapes"].get(fragment.name)
                if shape != list(fragment.shape):
                    raise ValueError(
                        f"{network}.{fragment.name}: {list(fragment.shape)} here, {shape} in {checkpoint.url}"
                    )
                for what in ("param", *MOMENTS):
                    if what in fragment.values and not pieces.copy(
                        (network, what, fragment.name), fragment.start, fragment.values[what]
                    ):
                        raise ValueError(f"{checkpoint.url} has no {what} of {network}.{fragment.name}")
                for name, values in state.ema.averages.items():
                    if not pieces.copy((network, name, fragment.name), fragment.start, values[number]):
                        values[number].copy_(fragment.values["param"])
        state.engine.publish()


def assemble(checkpoint: Checkpoint, what: str = "ema") -> dict[str, dict[str, Tensor]]:
    """Whole tensors of every network, on the CPU: {network: {parameter: tensor}}; `what` as in the files' keys."""
    pieces = _Pieces(checkpoint, (what,))
    assembled: dict[str, dict[str, Tensor]] = {}
    for network, described in checkpoint.manifest["networks"].items():
        for name, shape in described["shapes"].items():
            flat = torch.empty(torch.Size(shape).numel())
            if pieces.copy((network, what, name), 0, flat):
                assembled.setdefault(network, {})[name] = flat.view(shape)
    return assembled
