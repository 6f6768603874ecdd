"""Adaptive augmentation: as much as keeps the discriminator from knowing real images by heart."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class AugmentationState:
    """How probable each alteration is, and the signs of the discriminator's outputs since that was last changed.

    Karras et al. 2020, section 3.1: r_t, the mean sign for real images, is held at a target. Equal on all ranks.
    """

    def __init__(self, probability: float = 0.0, signs: float = 0.0, count: float = 0.0) -> None:
        self.probability, self.signs, self.count = probability, signs, count

    @staticmethod
    def of(state: dict[str, Tensor]) -> AugmentationState:
        return AugmentationState(*state["augmentation"].tolist())

    def tensors(self) -> dict[str, Tensor]:
        """What `of` reads."""
        return {"augmentation": torch.tensor([self.probability, self.signs, self.count], dtype=torch.float64)}

    def see(self, logits: Tensor, weight: Tensor) -> None:
        """Outputs for real images of this rank, (batch,), above or below 0 where they are not told. Collective."""
        logits, weight = logits.detach(), weight.to(logits)
        seen = torch.stack([(logits.sign() * weight).sum(), weight.sum()]).double()
        if dist.is_initialized():
            dist.all_reduce(seen)
        self.signs += float(seen[0])
        self.count += float(seen[1])

    def change(self, target: float, images: float) -> None:
        """Towards the target, by as much as was seen of the `images` in which it can go from 0 to 1."""
        if self.count:
            step = self.count / images
            self.probability += step if self.signs / self.count > target else -step
            self.probability = min(max(self.probability, 0.0), 1.0)
        self.signs = self.count = 0.0
