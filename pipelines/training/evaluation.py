"""Pictures drawn during training, measured on all ranks: the Fréchet distance to real held-out ones, and variety."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from genmodels.clip.frozen import fit
from genmodels.features.extractor import FeatureExtractor
from genmodels.metrics.collapse import THRESHOLDS, condition_variety, measure_variety
from genmodels.metrics.frechet import FeatureSums, Gaussian
from genmodels.objective import Drawing
from genmodels.random import derive_seeds
from pipelines.data.batch import RankBatch
from pipelines.training.trainer import Trainer

FRECHET_DISTANCE = "val_frechet_distance"
"""Of equal numbers each time, so its bias of order 1/samples is the same at all steps; `evaluate.py` takes it off."""

VARIETY = ("coverage", "recall", "spread", "nearest")
MEASURED = (FRECHET_DISTANCE, "val_collapsed", "val_of_one_condition", *(f"val_{name}" for name in VARIETY))
OF_ONE_CONDITION = "val_of_one_condition"
_FEWEST = 20  # pictures whose variety can be judged
_TWICE = 64  # conditions that a rank draws two pictures of, about


class _Twice(NamedTuple):
    """Features of two pictures for each of some conditions, batch by batch, and these."""

    one: list[np.ndarray]
    other: list[np.ndarray]
    conditions: list[str]


class DrawnPictures:
    """Draws the same captions with the same seeds each time, so that figures compare from step to step.

    Every rank draws and measures its part; what is summed over ranks is the mean and the outer products of features.
    For the variety as many features as there are pictures in one evaluation, and twice as many real ones, are gathered.
    All of it is collective.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        real: Iterable[RankBatch],
        asked: list[RankBatch],
        drawing: Drawing,
        image_size: int | None = None,
    ) -> None:
        """Args: `real` and `asked` are the rank's parts of the real pictures and of the samples to draw; `image_size`
        is that of drawn pictures, where a CLIP may read the real ones larger."""
        self.extractor, self.asked, self.drawing = extractor, asked, drawing
        sums = FeatureSums.zero(extractor.dimensions)
        self.reasons: tuple[str, ...] = ()  # why the latest pictures are taken for collapsed, on rank 0
        kept: list[np.ndarray] = []
        for batch in real:
            images = batch["images"]
            if image_size not in (None, images.shape[-1]):
                images = _bytes(fit(images.float() / 127.5 - 1, image_size))
            kept += self._add(sums, images.permute(0, 2, 3, 1).cpu().numpy(), batch["weight"])
        count = sum(len(batch["weight"]) for batch in asked) * (dist.get_world_size() if dist.is_initialized() else 1)
        self._real_features = _spread(self._gathered(kept), 2 * count)
        self.real = self._summed(sums)

    def measure(self, trainer: Trainer, step: int) -> dict[str, float]:
        """MEASURED, of the averaged weights; the same on all ranks.

        The variety is in shares of what real pictures have (see `measure_variety`), and `val_collapsed` is 1 where that
        sets the alarm off; of fewer than 20 pictures there is none.
        """
        sums = FeatureSums.zero(self.extractor.dimensions)
        features: list[np.ndarray] = []
        twice = _Twice([], [], [])
        every = -(-sum(len(batch["weight"]) for batch in self.asked) // _TWICE)
        with trainer.with_ema(), trainer.autocast():
            for batch in self.asked:
                drawn = trainer.objective.draw(trainer.to_device(batch, step), self.drawing)
                assert drawn is not None  # `check_phases` refuses objectives that draw nothing
                pictures = _bytes(drawn.float())
                with torch.autocast(trainer.device.type, enabled=False):  # as real pictures are measured
                    features += self._add(sums, pictures.permute(0, 2, 3, 1).cpu().numpy(), batch["weight"])
                if self._varies(trainer):
                    self._again(trainer, step, batch, pictures, every, twice)
        found = torch.tensor(0.0, dtype=torch.float64, device=trainer.device)
        gaussian = self._summed(sums)
        if _rank() == 0:  # takes seconds where features are wide: once is enough
            found.fill_(gaussian.distance(self.real))
        if dist.is_initialized():
            dist.broadcast(found, 0)
        return {FRECHET_DISTANCE: float(found), **self._variety(features, twice)}

    def _varies(self, trainer: Trainer) -> bool:
        """Whether pictures of one condition are to differ: they are told captions or classes, and no image."""
        told = getattr(trainer.objective, "config", None)
        return bool(getattr(told, "conditional", False)) and getattr(told, "image_condition", None) is None

    def _again(self, trainer: Trainer, step: int, batch: RankBatch, pictures: Tensor, every: int, into: _Twice) -> None:
        """Add features of every so many pictures of a batch, and of others for the same conditions: not of the first
        ones alone, which may all be of one class."""
        part: Any = {
            name: value[::every] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()
        }
        part["seeds"] = derive_seeds(part["seeds"], "another")
        drawn = trainer.objective.draw(trainer.to_device(part, step), self.drawing)
        assert drawn is not None
        good = part["weight"].cpu().numpy() > 0
        if not good.any():
            return
        with torch.autocast(trainer.device.type, enabled=False):
            for features, each in ((into.one, pictures[::every]), (into.other, _bytes(drawn.float()))):
                found = self.extractor(each.permute(0, 2, 3, 1).cpu().numpy()[good]).features
                features.append(np.asarray(found, np.float32))
        into.conditions.extend(caption for caption, use in zip(part["captions"], good.tolist(), strict=True) if use)

    def _variety(self, own: list[np.ndarray], twice: _Twice) -> dict[str, float]:
        drawn, real = self._gathered(own), self._real_features
        one, other, conditions = self._gathered(twice.one), self._gathered(twice.other), _all_ranks(twice.conditions)
        if min(len(drawn), len(real) // 2) < _FEWEST:
            return {}
        names = ["val_collapsed", *(f"val_{name}" for name in VARIETY)]
        names += [OF_ONE_CONDITION] if len({*conditions}) >= 2 else []
        told = torch.zeros(len(names), dtype=torch.float64, device=self.extractor.device)
        if _rank() == 0:
            variety = measure_variety(drawn, real[0::2], real[1::2])
            self.reasons, values = variety.reasons, [float(getattr(variety, name)) for name in VARIETY]
            if OF_ONE_CONDITION in names:
                values.append(condition_variety(one, other, conditions))
                if values[-1] < THRESHOLDS.of_one_condition:
                    self.reasons += (
                        f"two pictures for one condition differ {values[-1]:.2f} times as much as for two conditions",
                    )
            told += torch.tensor([float(bool(self.reasons)), *values], dtype=told.dtype, device=told.device)
        if dist.is_initialized():
            dist.broadcast(told, 0)
        return dict(zip(names, told.tolist(), strict=True))

    def _gathered(self, own: list[np.ndarray]) -> np.ndarray:
        """Features of all ranks, in order: float32 (samples, dimensions)."""
        none = np.empty((0, self.extractor.dimensions), np.float32)
        return np.concatenate([none, *_all_ranks(own)])

    def _add(self, sums: FeatureSums, pictures: np.ndarray, weight: Tensor) -> list[np.ndarray]:
        """Add the features of the good pictures; returns them."""
        good = weight.cpu().numpy() > 0  # neither quarantined nor padding
        if not good.any():
            return []
        features = self.extractor(pictures[good]).features
        sums.add(features)
        return [np.asarray(features, np.float32)]

    def _summed(self, sums: FeatureSums) -> Gaussian:
        """Over all ranks."""
        parts = [torch.tensor(float(sums.count), dtype=torch.float64), *map(torch.from_numpy, (sums.total, sums.outer))]
        if dist.is_initialized():
            parts = [part.contiguous().to(self.extractor.device) for part in parts]
            for part in parts:
                dist.all_reduce(part)
        count, total, outer = (part.cpu().numpy() for part in parts)
        return FeatureSums(round(float(count)), total, outer).gaussian()


def _all_ranks(own: list[Any]) -> list[Any]:
    """What the lists of all ranks hold, in order. Collective."""
    if not dist.is_initialized():
        return own
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return [each for part in parts for each in part]


def _spread(features: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, evenly spaced."""
    return features[np.linspace(0, len(features) - 1, min(count, len(features))).round().astype(int)]


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
