"""What `generate_shards.py` does: prompts in, shards of pictures out, over Ray Data actors."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from infra import storage
from infra.errors import BadRequest, check_summary, write_summary
from infra.exports import export_kind, folder_digest
from infra.registry import find_version, resolve_model
from pipelines.data.index import Location, write_index
from pipelines.data.made import begin, facts_of, make_over_ray, written
from pipelines.data.scan import CHUNK_SAMPLES, ShardFacts
from pipelines.data.write import ShardBuffer
from pipelines.drawing_options import complete_options, drawing_options
from pipelines.generation import check_room, find_export, watermark_key
from pipelines.pictures import provenance
from pipelines.watermark import embed, fingerprint

if TYPE_CHECKING:
    from genmodels.drawing import DrawingModel

REQUEST = "generation.json"  # in the new folder from the start: what is being drawn there


@dataclass(frozen=True)
class Work:
    """What every actor needs.

    Args:
        prompts, seeds: of all pictures.
        reference, tracking_uri, precision: of the model; `model` and `digest` are what pictures say of it.
        options: of `draw`.
        shard_samples: pictures of a shard; the last one may have fewer.
        folder: of the shards.
        watermark: key of the mark that pictures get, if they do; never written or shown.
    """

    prompts: list[str]
    seeds: np.ndarray
    reference: str
    tracking_uri: str | None
    precision: str
    model: str
    digest: str
    options: dict[str, Any]
    negative: str | None
    shard_samples: int
    folder: str
    watermark: str | None = field(default=None, repr=False)

    def rows(self, shard: int) -> range:
        """The pictures of a shard."""
        return range(shard * self.shard_samples, min((shard + 1) * self.shard_samples, len(self.prompts)))


def generate_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Carry out what the arguments of `generate_shards.py` ask for; returns and writes the summary.

    Raises:
        BadRequest: the prompts or the model cannot be used, or OUT holds something else.
    """
    began = time.perf_counter()
    check_summary(arguments.summary)
    for name in ("shard_samples", "actors"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise BadRequest(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    options, key = drawing_options(arguments), watermark_key(arguments.watermark)
    prompts, seeds = read_prompts(arguments.prompts, arguments.seed)
    work = _work(arguments, options, prompts, seeds, key)
    content = json.dumps([prompts, seeds.tolist()]).encode()
    request = {
        "prompts": hashlib.sha256(content).hexdigest(),
        "pictures": len(prompts),
        "model": work.digest,
        "options": {**work.options, "negative": work.negative, "precision": work.precision},
        "shard_samples": work.shard_samples,
    }
    request = json.loads(json.dumps(request))
    request["options"].pop("batch_size", None)  # it changes no picture
    if key is not None:  # so that no folder has pictures of two keys
        request["options"]["watermark"] = fingerprint(key)
    begin(work.folder, REQUEST, request, arguments.overwrite, "generate_shards.py", by=work.model)
    names = [f"{shard:06d}.tar" for shard in range(-(-len(prompts) // work.shard_samples))]
    before = {name: written(work.folder, name, CHUNK_SAMPLES) for name in names}
    done = {name: scan.facts for name, scan in before.items() if scan is not None}
    refused = sum(len(scan.flaws) for scan in before.values() if scan is not None)
    missing = [shard for shard, name in enumerate(names) if name not in done]
    drawn, drawing = sum(len(work.rows(shard)) for shard in missing), time.perf_counter()
    if missing:
        rows = [{"shard": shard} for shard in missing]
        for made, facts in make_over_ray(
            rows, ShardDrawer, work, work.folder, "drawing", drawn, arguments.actors, arguments.gpus
        ):
            done[names[made["shard"]]], refused = facts, refused + made["refused"]
    index = write_index(Location(work.folder, "*.tar"), work.folder, done, CHUNK_SAMPLES)
    seconds = time.perf_counter() - drawing
    summary = {
        "url": work.folder,
        "pictures": index.samples,
        "shards": len(names),
        "drawn_now": drawn,
        "refused": refused,
        "model": work.model,
        "digest": work.digest,
        **({} if key is None else {"watermark": "yes"}),
        "index_digest": index.digest,
        "seconds": round(time.perf_counter() - began, 2),
        "pictures_per_second": round(drawn / seconds, 3) if drawn else None,
    }
    write_summary(arguments.summary, summary)
    print(
        f"{index.samples} pictures in {len(names)} shards at {work.folder} ({drawn} drawn now"
        + (f", {summary['pictures_per_second']:g} a second" if drawn else "")
        + (f"; {refused} prompts could not be drawn: their samples say why)" if refused else ")")
    )
    return summary


def read_prompts(path: str, seed: int) -> tuple[list[str], np.ndarray]:
    """Prompts of a file, and seeds int64, one each: seed + line, unless the line has its own.

    Raises:
        BadRequest: the file cannot be read, or a line is none; it names the line.
    """
    url = path if storage.is_remote(path) else storage.open_filesystem(path)[1]
    try:
        lines = storage.read_bytes(url).decode("utf-8").split("\n")  # not at the other signs that splitlines knows
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: cannot be read as UTF-8 text ({error})") from error
    prompts: list[str] = []
    seeds: list[int] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        text, own = line.strip(), seed + len(prompts)
        if path.endswith(".jsonl"):
            try:
                told = json.loads(line)
                text, own = str(told["prompt"]).strip(), int(told.get("seed", own))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadRequest(f'{path}, line {number + 1}: write {{"prompt": "…", "seed": 1}}') from None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(f"{path}, line {number + 1}: {text[:60]!a} is no text ({error.reason})") from None
        if own not in range(-(2**63), 2**63):
            raise BadRequest(f"{path}, line {number + 1}: a seed is a whole number of at most 63 bits")
        prompts.append(text)
        seeds.append(own)
    if not prompts:
        raise BadRequest(f"{path} holds no prompts: write one a line")
    return prompts, np.array(seeds, np.int64)


def _work(
    arguments: argparse.Namespace, options: dict[str, Any], prompts: list[str], seeds: np.ndarray, key: str | None
) -> Work:
    """With the model settled: an alias may be another version's while this runs."""
    from pipelines.training.config import absolute_url

    folder = find_export(arguments.model, arguments.tracking_uri)
    if export_kind(folder) != "text_to_image":
        raise BadRequest(f"{arguments.model} is of kind {export_kind(folder)}, which draws nothing from prompts")
    model, reference = arguments.model, str(folder)
    if model.startswith("models:"):
        version = find_version(model, arguments.tracking_uri)
        model = reference = f"models:/{version.name}/{version.version}"
    from genmodels.drawing import open_drawing_model

    try:
        opened = open_drawing_model(folder)
    except ValueError as error:
        raise BadRequest(f"{arguments.model}: {error}") from None
    if not opened.conditional or opened.given_size:
        raise BadRequest(f"{arguments.model} does not draw from prompts alone: use generate.py")
    check_room(key, opened.image_size)
    try:
        out = str(absolute_url(arguments.out))
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return Work(
        prompts=prompts,
        seeds=seeds,
        reference=reference,
        tracking_uri=arguments.tracking_uri,
        precision=arguments.precision,
        model=model,
        digest=folder_digest(folder),
        options=complete_options(options, folder),
        negative=arguments.negative,
        shard_samples=arguments.shard_samples,
        folder=Location.parse(out).folder,
        watermark=key,
    )


class ShardDrawer:
    """One actor: draws the prompts of a shard, and writes it."""

    def __init__(self, shared: list[Any]) -> None:
        import ray
        import torch

        from genmodels.drawing import open_drawing_model

        cuda = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        if not cuda:
            torch.set_num_threads(1)
        self._work: Work = ray.get(shared[0])
        folder = resolve_model(self._work.reference, self._work.tracking_uri)
        self._model = open_drawing_model(folder, "cuda" if cuda else "cpu", self._work.precision)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        shard = int(batch["shard"][0])
        facts, refused = draw_shard(self._work, shard, self._model)
        return facts_of(facts, shard=shard, refused=refused)


def draw_shard(work: Work, shard: int, model: DrawingModel) -> tuple[ShardFacts, int]:
    """Write one shard: its facts, and how many prompts could not be drawn; their samples hold the reason."""
    buffer, refused, size = ShardBuffer(), 0, int(work.options.get("batch_size", 64))
    rows = work.rows(shard)
    for first in range(rows.start, rows.stop, size):
        part = range(first, min(first + size, rows.stop))
        for row, drawn in zip(part, _draw(work, part, model), strict=True):
            told = {"prompt": work.prompts[row], "seed": int(work.seeds[row]), "model": work.model}
            members = {"txt": work.prompts[row].encode()}
            if isinstance(drawn, str):
                refused += 1
                buffer.flaw(drawn)
                told["refused"] = drawn
            else:
                members["png"] = _png(drawn, work, row)
            buffer.add(f"{row:09d}", {**members, "json": json.dumps(told, ensure_ascii=False).encode()})
    return buffer.write(work.folder, f"{shard:06d}.tar", CHUNK_SAMPLES), refused


def _draw(work: Work, rows: Sequence[int], model: DrawingModel) -> list[np.ndarray | str]:
    """A picture for each row, or why there is none."""
    prompts, seeds = [work.prompts[row] for row in rows], [int(work.seeds[row]) for row in rows]
    negative = None if work.negative is None else [work.negative] * len(rows)
    try:
        return list(model.draw(prompts, seeds, negative_prompts=negative, **work.options))
    except ValueError as error:
        if len(rows) == 1:
            return [" ".join(str(error).split())]
    return [found for row in rows for found in _draw(work, [row], model)]


def _png(picture: np.ndarray, work: Work, row: int) -> bytes:
    facts = {"Model": work.model, "Model digest": work.digest, "Prompt": work.prompts[row]}
    settings = {**work.options, "negative_prompt": work.negative}
    if work.watermark is not None:
        picture, facts["Watermark"] = embed(picture[None], work.watermark)[0], "yes"
    info = provenance({**facts, "Seed": int(work.seeds[row]), "Settings": settings})
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()
