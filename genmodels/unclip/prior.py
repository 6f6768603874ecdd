"""What both priors of unCLIP share: captions in, image embeddings of a CLIP out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels import random
from genmodels.clip.frozen import FrozenClip
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.diffusion.sampler import Condition
from genmodels.objective import Batch, Mean, Objective, once
from genmodels.unclip.config import AutoregressivePriorConfig, DiffusionPriorConfig
from genmodels.unclip.layout import FACTS
from genmodels.weights import required_folder


class Prior(Objective):
    """Base of the objectives that learn p(image embedding | caption).

    Embeddings are those of images that are embedded as they come, or are read from the samples
    (`batch["image_embeddings"]`).
    """

    frozen: dict[str, Any]

    def __init__(self, config: DiffusionPriorConfig | AutoregressivePriorConfig, clip: FrozenClip) -> None:
        if clip.statistics is None:
            raise ValueError("this CLIP came without the statistics of its embeddings, which a prior is scaled by")
        self.config = config
        self.frozen = {"clip": clip}
        self.statistics: EmbeddingStatistics = clip.statistics
        self._empty_ids = clip.tokens([""])

    @property
    def clip(self) -> FrozenClip:
        """Whose embeddings are predicted."""
        return self.frozen["clip"]

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Embeddings of images and captions."""
        for batch in batches:
            self.embeddings(batch)
            self.told(batch, dropout=True)

    def embeddings(self, batch: Batch) -> Tensor:
        """Unit vectors of the images, float32 (batch, embedding_dim)."""
        if self.config.embedding_member is not None:
            return batch["image_embeddings"].float()
        images = batch["images"]
        return once(batch, ("clip images", self.clip), (images,), lambda: self.clip.embed_images(images))

    def told(self, batch: Batch, dropout: bool) -> Condition:
        """What is told of the captions; with `dropout`, by their seeds, some samples are told the empty one."""
        seeds, token_ids = batch["seeds"], batch["token_ids"]
        if not dropout:
            return read_captions(self.clip, token_ids)
        share = self.config.condition_dropout
        dropped = random.uniform(seeds, (), "dropout") < share
        empty = self._empty_ids.to(token_ids.device)
        kept = torch.where(dropped[:, None], empty, token_ids)
        return once(batch, ("clip texts", self.clip, share), (token_ids, seeds), lambda: read_captions(self.clip, kept))

    def agreement(self, drawn: Tensor, batch: Batch, told: Condition) -> dict[str, Mean]:
        """How near drawn embeddings are to the images' own, and how near those of the captions are: cosines."""
        images, weight = self.embeddings(batch), batch["weight"]
        return {
            "cosine": Mean.of((drawn * images).sum(1), weight),
            "cosine_of_text": Mean.of((told["embedding"] * images).sum(1), weight),
        }

    def write_facts(self, folder: Path) -> None:
        """Write what marks the export, and a copy of its CLIP."""
        content = {"kind": self.config.kind, "clip": self.clip.describe()}
        (folder / FACTS).write_text(json.dumps(content, indent=2) + "\n")
        self.clip.save(folder / "clip")


def read_captions(clip: FrozenClip, token_ids: Tensor) -> Condition:
    """What a prior is told of captions, int64 (batch, length): "features" of their tokens, "mask" of which are text,
    and their "embedding"."""
    features, mask, embedding = clip.read_texts(token_ids)
    return {"features": features, "mask": mask, "embedding": embedding}


def open_clip(inputs: Path | None) -> FrozenClip:
    """The CLIP among the inputs of a run. Raises ValueError where there is none."""
    return FrozenClip.from_folder(required_folder(inputs, "clip"))
