"""How the embeddings of a CLIP are distributed, measured on training data: what priors and decoders are scaled by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_FILE = "statistics.safetensors"
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Mean and covariance of image embeddings, and the dot products of images with their own captions.

    Attributes:
        mean: float32 (embedding_dim,).
        covariance: float32 (embedding_dim, embedding_dim).
        dot_mean, dot_deviation: of the dot products.
        count: pairs that were measured.
    """

    mean: Tensor
    covariance: Tensor
    dot_mean: float
    dot_deviation: float
    count: int

    @staticmethod
    def measure(images: Tensor, texts: Tensor) -> EmbeddingStatistics:
        """Of unit vectors of images and of their captions, (n, embedding_dim) each. Raises ValueError below two."""
        if len(images) < 2:
            raise ValueError(f"statistics of {len(images)} embeddings: needs two at least")
        images, dots = images.double().cpu(), (images * texts).sum(1).double().cpu()
        centred = images - images.mean(0)
        covariance = centred.T @ centred / (len(images) - 1)
        return EmbeddingStatistics(
            images.mean(0).float(), covariance.float(), float(dots.mean()), float(dots.std()), len(images)
        )

    @property
    def deviation(self) -> Tensor:
        """Of each feature, float32 (embedding_dim,)."""
        return self.covariance.diagonal().clamp(min=0).sqrt().clamp(min=_LEAST_DEVIATION)

    def tensors(self) -> dict[str, Tensor]:
        """What `of` reads."""
        dots = torch.tensor([self.dot_mean, self.dot_deviation, float(self.count)], dtype=torch.float64)
        return {"mean": self.mean, "covariance": self.covariance, "dots_and_count": dots}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> EmbeddingStatistics:
        mean, deviation, count = tensors["dots_and_count"].tolist()
        return EmbeddingStatistics(tensors["mean"].cpu(), tensors["covariance"].cpu(), mean, deviation, int(count))

    def save(self, folder: Path) -> None:
        """Write them beside a model."""
        save_file({name: value.contiguous() for name, value in self.tensors().items()}, folder / _FILE)

    @staticmethod
    def load(folder: Path) -> EmbeddingStatistics | None:
        """Those beside a model; None where there are none."""
        return EmbeddingStatistics.of(load_file(folder / _FILE)) if (folder / _FILE).is_file() else None
