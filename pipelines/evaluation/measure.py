"""From pictures to features: sources stream through Ray Data actors, each with the extractor, into feature stores.

A block is measured by one actor with one thread of its own, and blocks are written in order: what comes out does not
depend on the number of actors.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genmodels.features.extractor import FeatureExtractor
from genmodels.features.resize import resize
from infra.errors import BadRequest
from pipelines.data.actors import map_by_actors
from pipelines.evaluation.sources import Block, Source
from pipelines.evaluation.store import FeatureStore, StoreWriter

_THUMBNAIL = 64  # pixels
_MOST_UNUSED = 0.01  # of the samples of a dataset
_PAIR_PIXELS = 1 << 22  # of the pairs whose similarity is computed at once


@dataclass(frozen=True)
class Extractors:
    """What looks at the pictures: the extractor of the features, and a CLIP for how well sentences fit, if any."""

    features: FeatureExtractor
    clip: FeatureExtractor | None = None


def measure(
    sources: Mapping[str, Source],
    folders: Mapping[str, Path],
    facts: Mapping[str, dict[str, Any]],
    extractors: Extractors,
    actors: int,
    use_gpu: bool = False,
    progress: Callable[[str, int], None] = lambda name, pictures: None,
) -> dict[str, FeatureStore]:
    """Measure every source, each into its folder; Ray is running.

    Args:
        sources: by name.
        folders: where each one's store goes.
        facts: what is written into each store.
        extractors: sent to every actor as they are, so all use the same weights.
        actors: processes that measure, one CPU each, or one GPU with `use_gpu`.
        progress: told the source and how many pictures more are done.

    Raises:
        BadRequest: a source cannot be read; whatever else an actor raises is raised here.
    """
    import ray

    rows = [
        {"source": name, "start": start, "stop": min(start + source.block, source.count)}
        for name, source in sources.items()
        for start in range(0, source.count, source.block)
    ]
    writers = {name: StoreWriter(folders[name], source.count) for name, source in sources.items()}
    shared = ray.put((dict(sources), extractors))
    stream = map_by_actors(rows, _Measurer, shared, actors, use_gpu)
    unused: dict[str, list[str]] = {name: [] for name in sources}
    told = {name: dict(facts[name]) for name in sources}
    try:
        for row in stream.iter_rows():
            name = row["source"]
            if row["refused"]:
                raise BadRequest(row["refused"])
            arrays = dict(np.load(io.BytesIO(row["arrays"])))
            captions, keys, reasons = (arrays.pop(text).tolist() for text in ("captions", "keys", "unused"))
            if captions:
                writers[name].add(arrays, captions, keys)
            unused[name] += reasons
            if row["precision"]:
                told[name]["precision"] = row["precision"]
            progress(name, row["stop"] - row["start"])
        for name, reasons in unused.items():
            _check_unused(name, reasons, sources[name].count)
        return {name: writer.close({**told[name], "unused": unused[name]}) for name, writer in writers.items()}
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    finally:
        for writer in writers.values():
            writer.discard()


def _check_unused(name: str, reasons: list[str], count: int) -> None:
    """Tell of samples that cannot be used. Raises BadRequest where they are more than a few."""
    if not reasons:
        return
    what = f"{name.replace('_', '-')}: {len(reasons)} of {count} samples cannot be used, the first: {reasons[0]}"
    if len(reasons) > max(3, _MOST_UNUSED * count):
        raise BadRequest(what)
    print(f"note: {what}", file=sys.stderr, flush=True)


class _Measurer:
    """One actor: opens a source when its first block comes, and closes the one before; they come in order."""

    def __init__(self, shared: list[Any]) -> None:
        import ray
        import torch

        self._cuda = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        if not self._cuda:
            torch.set_num_threads(1)
        self._sources, self._extractors = ray.get(shared[0])
        self._device = torch.device("cuda" if self._cuda else "cpu")
        for extractor in (self._extractors.features, self._extractors.clip):
            if extractor is not None:
                extractor.to(self._device)
        self._open: dict[str, Any] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        name, start, stop = str(batch["source"][0]), int(batch["start"][0]), int(batch["stop"][0])
        told = {"source": [name], "start": [start], "stop": [stop]}
        try:
            if name not in self._open:
                self._open.clear()  # two models need not have room at once
                self._open[name] = self._sources[name].open(self._device)
            block = self._open[name](start, stop)
        except (BadRequest, ValueError) as error:
            return {**told, "refused": [str(error)], "arrays": [b""], "precision": [""]}
        buffer, rows = io.BytesIO(), measured_rows(block, self._extractors)
        np.savez(buffer, unused=np.array(block.unused, np.str_), **rows)  # type: ignore[arg-type]
        precision = getattr(self._open[name], "precision", "")
        return {**told, "refused": [""], "arrays": [buffer.getvalue()], "precision": [precision]}


def measured_rows(block: Block, extractors: Extractors) -> dict[str, np.ndarray]:
    """The rows of a block, by the names of `store.ARRAYS`, and its captions and keys as text."""
    texts = {"captions": np.array(block.captions, np.str_), "keys": np.array(block.keys, np.str_)}
    if not len(block.pictures):
        return texts
    found = extractors.features(block.pictures)
    arrays = {
        "features": found.features.astype(np.float32),
        "thumbnails": thumbnails(block.pictures),
        "similarity": pair_similarity(block.pictures),
    }
    if found.probabilities is not None:
        arrays["probabilities"] = found.probabilities.astype(np.float32)
    if extractors.clip is not None:
        arrays["embeddings"] = extractors.clip(block.pictures).features.astype(np.float32)
    return {**texts, **arrays, **block.scores}


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """Pictures, uint8 (n, height, width, 3), with a longer side of at most 64 pixels."""
    height, width = pictures.shape[1:3]
    longer = max(height, width)
    if longer <= _THUMBNAIL:
        return pictures
    small = resize(pictures, max(1, height * _THUMBNAIL // longer), max(1, width * _THUMBNAIL // longer))
    return small.round().clip(0, 255).astype(np.uint8)


def pair_similarity(pictures: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity of pictures 0 and 1, 2 and 3, …; NaN at the second of each pair, and at one
    that is left over; float32 (n,)."""
    import torch

    from genmodels.metrics.image import ms_ssim

    found = np.full(len(pictures), np.nan, np.float32)
    height, width = pictures.shape[1:3]
    if min(height, width) < 11:
        return found
    at_once = max(2, 2 * (_PAIR_PIXELS // (height * width) // 2))
    for start in range(0, len(pictures) - 1, at_once):
        part = pictures[start : min(start + at_once, len(pictures) // 2 * 2)]
        images = torch.from_numpy(np.array(part)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found[start : start + len(part) : 2] = ms_ssim(images[::2], images[1::2]).numpy()
    return found
