"""Pictures drawn during training, measured on all ranks: the Fréchet distance to real held-out ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from genmodels.clip.frozen import fit
from genmodels.features.extractor import FeatureExtractor
from genmodels.metrics.frechet import FeatureSums, Gaussian
from genmodels.objective import Drawing
from pipelines.data.batch import RankBatch
from pipelines.training.trainer import Trainer

FRECHET_DISTANCE = "val_frechet_distance"
"""Of equal numbers each time, so its bias of order 1/samples is the same at all steps; `evaluate.py` takes it off."""


class DrawnPictures:
    """Draws the same captions with the same seeds each time, so that figures compare from step to step.

    Every rank draws and measures its part; what is summed over ranks is the mean and the outer products of features,
    never the samples. All of it is collective.
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
        for batch in real:
            images = batch["images"]
            if image_size not in (None, images.shape[-1]):
                images = _bytes(fit(images.float() / 127.5 - 1, image_size))
            self._add(sums, images.permute(0, 2, 3, 1).cpu().numpy(), batch["weight"])
        self.real = self._summed(sums)

    def measure(self, trainer: Trainer, step: int) -> dict[str, float]:
        """`val_frechet_distance` of the averaged weights; the same on all ranks."""
        sums = FeatureSums.zero(self.extractor.dimensions)
        with trainer.with_ema(), trainer.autocast():
            for batch in self.asked:
                drawn = trainer.objective.draw(trainer.to_device(batch, step), self.drawing)
                assert drawn is not None  # `check_phases` refuses objectives that draw nothing
                pictures = _bytes(drawn.float())
                with torch.autocast(trainer.device.type, enabled=False):  # as real pictures are measured
                    self._add(sums, pictures.permute(0, 2, 3, 1).cpu().numpy(), batch["weight"])
        found = torch.tensor(0.0, dtype=torch.float64, device=trainer.device)
        gaussian = self._summed(sums)
        if _rank() == 0:  # takes seconds where features are wide: once is enough
            found.fill_(gaussian.distance(self.real))
        if dist.is_initialized():
            dist.broadcast(found, 0)
        return {FRECHET_DISTANCE: float(found)}

    def _add(self, sums: FeatureSums, pictures: np.ndarray, weight: Tensor) -> None:
        good = weight.cpu().numpy() > 0  # neither quarantined nor padding
        if good.any():
            sums.add(self.extractor(pictures[good]).features)

    def _summed(self, sums: FeatureSums) -> Gaussian:
        """Over all ranks."""
        parts = [torch.tensor(float(sums.count), dtype=torch.float64), *map(torch.from_numpy, (sums.total, sums.outer))]
        if dist.is_initialized():
            parts = [part.contiguous().to(self.extractor.device) for part in parts]
            for part in parts:
                dist.all_reduce(part)
        count, total, outer = (part.cpu().numpy() for part in parts)
        return FeatureSums(round(float(count)), total, outer).gaussian()


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
