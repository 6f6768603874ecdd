"""Folders of shards that a job makes over Ray Data actors: a shard is complete or absent, and an interrupted job goes
on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from infra import storage
from infra.errors import BadRequest
from pipelines.data.actors import map_by_actors
from pipelines.data.scan import ShardFacts, ShardScan, sidecar_name


def begin(
    folder: str,
    record: str,
    request: dict[str, Any],
    overwrite: bool,
    command: str,
    also: Sequence[str] = (),
    **more: Any,
) -> None:
    """Say in the folder, in the file `record`, what is being made there; what another request made is removed with
    `overwrite`.

    Args:
        folder: new, or one in which this request was begun before.
        record: name of the file.
        request: what the shards depend on.
        overwrite: begin anew where the folder holds something else.
        command: script that the user would type with --overwrite.
        also: names of other files that belong to the shards.
        more: noted beside the request; it may differ.

    Raises:
        BadRequest: the folder holds something else, or cannot be written.
    """
    path = storage.join(folder, record)
    storage.check_access(folder, write=True)
    if storage.exists(path):
        known = json.loads(storage.read_bytes(path))
        if {key: known.get(key) for key in request} == request:
            return
        different = ", ".join(key for key in request if known.get(key) != request[key])
        if not overwrite:
            made = f", made by {known['by']}" if known.get("by") else ""
            raise BadRequest(
                f"{folder} holds shards of another request (other {different}{made}): undo that to go on with it, name "
                f"another folder, or write this one again by {command} --overwrite"
            )
    filesystem, local = storage.open_filesystem(folder)
    others = [name for pattern in ("*.tar", "index*.json") for name in filesystem.glob(f"{local}/{pattern}")]
    if others and not overwrite and not storage.exists(path):
        raise BadRequest(f"{folder} holds other shards: name another folder, or --overwrite")
    for pattern in ("index*.json", "*.tar.index*.json", "*.tar", *also):
        for name in filesystem.glob(f"{local}/{pattern}"):
            filesystem.rm_file(name)
    storage.write_bytes(path, json.dumps({**request, **more}, indent=2).encode())


def written(folder: str, name: str, chunk_samples: int) -> ShardScan | None:
    """A shard that is complete: its sidecar is written last."""
    path = storage.join(folder, sidecar_name(name, chunk_samples))
    return ShardScan.from_json(storage.read_bytes(path)) if storage.exists(path) else None


def make_over_ray(
    rows: list[dict[str, Any]],
    actor: type,
    shared: Any,
    folder: str,
    title: str,
    samples: int,
    actors: int | None,
    gpus: bool,
) -> Iterator[tuple[dict[str, Any], ShardFacts]]:
    """Make shards, each by one actor, under a progress bar; yields what each actor gave back, and the shard's facts.

    Args:
        rows: one for each shard.
        actor: see `map_by_actors`; it gives back `facts_of` a shard, and what else it has to say.
        shared: what all actors need.
        folder: of the shards.
        title: of the bar.
        samples: in all shards together.
        actors: how many [one for each GPU of the cluster, or CPU; core of this machine].
        gpus: one GPU for each.

    Raises:
        BadRequest: there is no GPU, or the nodes do not share the folder.
    """
    import psutil
    import ray
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pipelines.training import cluster

    count = actors or (psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    cluster.join(count)
    room = cluster.resources()
    if gpus and room["GPU"] < 1:
        raise BadRequest(f"--gpus: Ray has no GPU{cluster.GROWS}")
    if actors is None and (gpus or os.environ.get("RAY_ADDRESS")):
        count = max(1, int(room["GPU" if gpus else "CPU"]))
    cluster.check_shared(folder, "OUT")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("samples", total=samples)
        stream = map_by_actors(rows, actor, ray.put(shared), min(count, len(rows)), gpus)
        try:
            for found in stream.iter_rows():
                bar.advance(row, found["samples"])
                yield found, ShardFacts(**{name: found[name] for name in ShardFacts._fields})
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


def facts_of(facts: ShardFacts, **more: Any) -> dict[str, list[Any]]:
    """What an actor gives back of a shard: a batch of one row."""
    return {key: [value] for key, value in {**more, **facts._asdict()}.items()}
