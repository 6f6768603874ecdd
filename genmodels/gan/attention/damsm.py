"""The training of the deep attentional multimodal similarity model, before the GAN that it guides.

Xu et al. 2018, section 3.2. The softmax runs over the global batch.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from genmodels.gan.attention.config import DamsmConfig
from genmodels.gan.attention.encoders import Encoders
from genmodels.gan.attention.frozen import FrozenDamsm, gammas_of
from genmodels.gan.attention.layout import DAMSM, ENCODERS
from genmodels.gan.attention.matching import Matching, match, sentence_scores, word_scores
from genmodels.objective import Batch, Mean, Objective, Phase, PhaseLoss, Preview
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.weights import copy_weights, forward_flops, required_folder


class Damsm(Objective):
    """One network ("damsm"), one phase; nothing in it is random."""

    def __init__(self, config: DamsmConfig, tokenizer: CLIPTokenizer | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.encoders = Encoders(config, tokenizer)
        self.networks: dict[str, nn.Module] = {"damsm": self.encoders}
        self.frozen: dict[str, nn.Module] = {}
        self.phases = [Phase("damsm", self.loss, couples_samples=True)]

    @staticmethod
    def from_config(config: DamsmConfig, inputs: Path | None = None) -> Damsm:
        """Build from a configuration; `inputs` holds `tokenizer/`.

        Raises:
            ValueError: there is no tokenizer, or it does not fit.
        """
        return Damsm(config, load_tokenizer(required_folder(inputs, "tokenizer")))

    @staticmethod
    def abstract_networks(config: DamsmConfig) -> dict[str, nn.Module]:
        """The trained network on the meta device, to count parameters."""
        with torch.device("meta"):
            return {"damsm": Encoders(config)}

    def matching(self, batch: Batch) -> Matching:
        """Of a rank's samples, among those of the global batch."""
        features, texts = self.encoders(batch["images"], batch["token_ids"])
        return match(features, texts, batch["token_ids"], batch["weight"], gammas_of(self.config))

    def loss(self, batch: Batch) -> PhaseLoss:
        """The mean of L_DAMSM (eq. 12, 13) over all slots, quarantined ones counting 0."""
        found = self.matching(batch)
        return PhaseLoss((batch["weight"] * found.loss).mean(), _metrics(found, batch))

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The loss, and how often the right caption or image is the best of the batch."""
        found = self.matching(batch)
        right = {"accuracy_image_to_text": found.image_to_text, "accuracy_text_to_image": found.text_to_image}
        return _metrics(found, batch) | {name: Mean.of(value, batch["weight"]) for name, value in right.items()}

    def preview(self, batch: Batch) -> Preview:
        """The images, each with the best of their captions."""
        features, texts = self.encoders(batch["images"], batch["token_ids"])
        scores = word_scores(features.regions.float(), texts, gammas_of(self.config))
        best = (scores + sentence_scores(features.image.float(), texts.sentence)).argmax(1).tolist()
        return Preview(batch["images"], [batch["captions"][number] for number in best])

    def export(self, folder: Path) -> dict[str, Any]:
        """Write both encoders and the tokenizer, for `FrozenDamsm.from_folder`. Raises ValueError without one."""
        if self.tokenizer is None:
            raise ValueError("a DAMSM is exported with its tokenizer, and there is none")
        FrozenDamsm(self.config, self._copy(), self.tokenizer).save(folder)
        return {"layout": "own", "parameters": {"damsm": sum(p.numel() for p in self.encoders.parameters())}}

    def load_weights(self, folder: Path) -> None:
        """Start from an export. Raises ValueError where there is none, or it does not fit."""
        if not (folder / DAMSM).is_file():
            raise ValueError(f"init_from: {folder} is no export of a DAMSM (no {DAMSM} there)")
        copy_weights(load_file(folder / ENCODERS), self.encoders, folder)

    def flops_per_sample(self) -> float:
        """Of both encoders' forward pass."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        size, length = self.config.image_size, self.config.text_encoder.length
        return forward_flops(
            lambda: Encoders(self.config), ((1, 3, size, size), torch.float32), ((1, length), torch.int64)
        )

    def _copy(self) -> Encoders:
        """Of the encoders, which are trained on."""
        copy = Encoders(self.config, self.tokenizer)
        copy.load_state_dict(self.encoders.state_dict())
        return copy


def _metrics(found: Matching, batch: Batch) -> dict[str, Mean]:
    values = {"loss": found.loss, "word_loss": found.word_loss, "sentence_loss": found.sentence_loss}
    return {name: Mean.of(value, batch["weight"]) for name, value in values.items()}
