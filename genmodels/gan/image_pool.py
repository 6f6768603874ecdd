"""Images that a generator made before, so that a discriminator does not forget what it has seen.

Shrivastava et al., "Learning from Simulated and Unsupervised Images through Adversarial Training" (CVPR 2017), section
2.3, as Zhu et al. 2017, section 4, use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genmodels.random import uniform


class ImagePool:
    """Equal on all ranks, since each gives it the whole global batch; what it does follows from the samples' seeds."""

    def __init__(self, size: int, name: str = "") -> None:
        self.size, self.name = size, name
        self.images: list[Tensor] = []

    def exchange(self, images: Tensor, seeds: Tensor, weight: Tensor) -> Tensor:
        """What is shown in place of `images` (batch, 3, height, width), in order: half of them are kept here and an
        older one is shown; all are shown, and kept, until the pool is full. Those of weight 0 are not kept."""
        self.images = [kept.to(images) for kept in self.images]  # a checkpoint's are on the CPU
        chances = uniform(seeds, (2,), f"image pool {self.name}").tolist()
        shown = list(images)
        for row, (image, (chance, place), good) in enumerate(zip(images, chances, weight.tolist(), strict=True)):
            if not good:
                continue
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.size and chance < 0.5:
                number = int(place * self.size)
                shown[row], self.images[number] = self.images[number], image.clone()
        return torch.stack(shown)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The images in it; nothing of an empty pool."""
        return {name: torch.stack(self.images)} if self.images else {}

    def load(self, name: str, state: dict[str, Tensor]) -> None:
        """What `tensors` gave."""
        self.images = list(state[name]) if name in state else []
