"""What was measured of a set of pictures, row by row, in memory-mapped files: all figures are computed from these.

FOLDER/features.npy         float32 (n, dimensions)
       probabilities.npy    float32 (n, classes), of an extractor that classifies
       embeddings.npy       float32 (n, dimensions), of a CLIP beside the extractor
       thumbnails.npy       uint8 (n, side, side, 3), sides of at most 64 pixels
       similarity.npy       float32 (n,): structural similarity to the other picture of a pair; NaN for the second
       psnr.npy, ssim.npy, lpips.npy   float32 (n,), of reconstructions against their originals
       texts.json           keys and captions
       facts.json           written last: how many rows, and what they are of
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import BadRequest

SCORES = ("psnr", "ssim", "lpips")
ARRAYS = ("features", "probabilities", "embeddings", "thumbnails", "similarity", *SCORES)


@dataclass(frozen=True)
class FeatureStore:
    """Rows of one set. Arrays are memory-mapped: take what is needed of them."""

    folder: Path
    count: int
    features: np.ndarray
    thumbnails: np.ndarray
    similarity: np.ndarray
    captions: list[str]
    keys: list[str]
    probabilities: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    psnr: np.ndarray | None = None
    ssim: np.ndarray | None = None
    lpips: np.ndarray | None = None

    @staticmethod
    def open(folder: Path) -> FeatureStore | None:
        """What a `StoreWriter` wrote and closed; None where there is none."""
        if not (folder / "facts.json").is_file():
            return None
        count = json.loads((folder / "facts.json").read_text())["count"]
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")[:count]
            for name in ARRAYS
            if (folder / f"{name}.npy").is_file()
        }
        return FeatureStore(folder, count, **arrays, **json.loads((folder / "texts.json").read_text()))

    def facts(self) -> dict[str, Any]:
        """What was said of it when it was written."""
        return dict(json.loads((self.folder / "facts.json").read_text()))


class StoreWriter:
    """Writes rows in order, at most `room` of them, beside a folder, which it takes the place of when it is closed.

    Raises BadRequest where that folder is there and is no store.
    """

    def __init__(self, target: Path, room: int) -> None:
        if target.exists() and not (target / "facts.json").is_file():
            raise BadRequest(f"{target}: is there, and was not written by an evaluation: name another --out")
        self.target, self.room, self.count = target, room, 0
        self.folder = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        self.folder.mkdir(parents=True)
        self._arrays: dict[str, np.ndarray] = {}
        self._texts: dict[str, list[str]] = {"captions": [], "keys": []}

    def add(self, arrays: dict[str, np.ndarray], captions: list[str], keys: list[str]) -> None:
        """Rows of `ARRAYS`, by name, the same ones at each call."""
        for name, rows in arrays.items():
            if name not in self._arrays:
                self._arrays[name] = np.lib.format.open_memmap(
                    self.folder / f"{name}.npy", "w+", rows.dtype, (self.room, *rows.shape[1:])
                )
            self._arrays[name][self.count : self.count + len(rows)] = rows
        self._texts["captions"] += captions
        self._texts["keys"] += keys
        self.count += len(captions)

    def close(self, facts: dict[str, Any]) -> FeatureStore:
        """Complete it. Raises BadRequest where no row was written."""
        if not self.count:
            raise BadRequest(f"{self.target.name}: no picture could be used")
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]
        self._arrays.clear()
        (self.folder / "texts.json").write_text(json.dumps(self._texts))
        (self.folder / "facts.json").write_text(json.dumps({**facts, "count": self.count}, indent=2) + "\n")
        if self.target.exists():  # of an earlier evaluation, or another one was faster
            old = self.folder.with_suffix(".old")
            os.replace(self.target, old)
            os.replace(self.folder, self.target)
            shutil.rmtree(old)
        else:
            os.replace(self.folder, self.target)
        store = FeatureStore.open(self.target)
        assert store is not None
        return store

    def discard(self) -> None:
        """Remove what was not completed."""
        shutil.rmtree(self.folder, ignore_errors=True)
