"""The training objective of CycleGAN: two generators that undo each other, and a discriminator for each set of images.

Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (ICCV 2017), eqs. 1–3 and
section 5.2 (identity loss). The images of data.url are set A, those of data.other_url set B.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genmodels.autoencoder.network import PatchDiscriminator
from genmodels.gan.base import TranslationObjective
from genmodels.gan.export import write_networks
from genmodels.gan.image_pool import ImagePool
from genmodels.gan.networks.translation import Pair, ResNetTranslator
from genmodels.gan.ranks import global_batch
from genmodels.gan.translation_config import CycleGanConfig
from genmodels.objective import Batch, Drawing, Mean, PhaseLoss, Preview
from genmodels.weights import forward_flops


class CycleGan(TranslationObjective):
    """Networks "discriminator", of `a` and `b`, and "generator", of `ab` (from A to B) and `ba`, each a pair.

    A sample of A and one of B share a row of the batch and nothing else; where either is quarantined, the row counts
    for nothing. The objective's own state are the two image pools.
    """

    def __init__(self, config: CycleGanConfig) -> None:
        super().__init__(config)
        self.config = config
        self.pools = {name: ImagePool(config.pool_size, name) for name in ("a", "b")}
        # Least squares without Mao's half (section 4): the other losses' weights are meant beside it.
        self._scale = 2.0 if config.loss == "least_squares" else 1.0

    @staticmethod
    def build(config: CycleGanConfig) -> tuple[nn.Module, nn.Module]:
        """Discriminators of A and of B, and generators from A to B and back."""
        return build_discriminators(config), build_generators(config)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """What the discriminators are shown as made in this step: new images, or such of earlier steps."""
        sizes = [len(batch["seeds"]) for batch in batches]
        for name, pool in self.pools.items():
            made = torch.cat([self._made(batch)[name] for batch in batches]).float()
            seeds, weight = torch.cat([batch["seeds"] for batch in batches]), torch.cat([*map(_weight, batches)])
            (everyone, first), (all_seeds, _), (all_weights, _) = map(global_batch, (made, seeds, weight))
            shown = pool.exchange(everyone, all_seeds, all_weights)[first : first + len(made)]
            for batch, part in zip(batches, shown.split(sizes), strict=True):
                batch[f"shown {name}"] = part

    def discriminator_loss(self, batch: Batch) -> PhaseLoss:
        """The games' losses, each half as strong as the generators' (section 7.1), over all patches."""
        per_sample = torch.zeros_like(_weight(batch))
        scores: dict[str, Tensor] = {}
        for name, real in _sets(batch).items():
            of_real, of_made = (self.discriminator(name, images) for images in (real, batch[f"shown {name}"]))
            per_sample = per_sample + self._scale * self.game.of_discriminator(of_real, of_made).flatten(1).mean(1) / 2
            scores |= {f"score_real_{name}": of_real, f"score_fake_{name}": of_made}
        facts = {name: value.flatten(1).mean(1) for name, value in scores.items()}
        return _phase_loss(per_sample, {"loss": per_sample, **facts}, batch)

    def generator_loss(self, batch: Batch) -> PhaseLoss:
        """The games' other losses, the distance of images from what comes back, and from what is left as it is."""
        real = _sets(batch)
        # What is made, and what should be left alone, in one pass of each generator.
        made_b, kept_b = self.generator("ab", torch.cat([real["a"], real["b"]])).chunk(2)
        made_a, kept_a = self.generator("ba", torch.cat([real["b"], real["a"]])).chunk(2)
        adversarial = torch.zeros_like(_weight(batch))
        for name, made in (("a", made_a), ("b", made_b)):
            of_real = None
            if self.game.paired:
                with torch.no_grad():
                    of_real = self.discriminator(name, real[name])
            scores = self.discriminator(name, made)
            adversarial = adversarial + self._scale * self.game.of_generator(scores, of_real).flatten(1).mean(1)
        cycle = _distance(self.generator("ba", made_b), real["a"]) + _distance(self.generator("ab", made_a), real["b"])
        identity = _distance(kept_a, real["a"]) + _distance(kept_b, real["b"])
        per_sample = adversarial + self.config.cycle_weight * cycle + self.config.identity_weight * identity
        facts = {"generator_loss": per_sample, "adversarial": adversarial, "cycle": cycle, "identity": identity}
        return _phase_loss(per_sample, facts, batch)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """`loss`, the distance of held-out images of both sets from what comes back, and `cycle_a` and `cycle_b`."""
        real, made = _sets(batch), self._made(batch)
        back = {"a": self.generator("ba", made["b"]), "b": self.generator("ab", made["a"])}
        values = {f"cycle_{name}": _distance(back[name], real[name]) for name in back}
        values["loss"] = values["cycle_a"] + values["cycle_b"]
        return {name: Mean.of(value, _weight(batch)) for name, value in values.items()}

    def preview(self, batch: Batch) -> Preview:
        """Rows of an image of A, what is made of it, and what comes back; and the same of B."""
        count = self.config.preview_samples
        real, made = _sets(batch), self._made(batch)
        back = {"a": self.generator("ba", made["b"]), "b": self.generator("ab", made["a"])}
        rows = torch.stack([real["a"], made["b"], back["a"], real["b"], made["a"], back["b"]], 1)[:count].flatten(0, 1)
        return Preview(rows, ["A", "as B", "back", "B", "as A", "back"] * (len(rows) // 6), columns=6)

    def draw(self, batch: Batch, drawing: Drawing) -> Tensor:
        """What is made of held-out images of A: images of B."""
        return self._made(batch)["b"]

    def state_dict(self) -> dict[str, Tensor]:
        """The image pools."""
        return {key: value for name, pool in self.pools.items() for key, value in pool.tensors(f"pool {name}").items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, pool in self.pools.items():
            pool.load(f"pool {name}", state)

    def export(self, folder: Path) -> dict[str, Any]:
        """Write all four networks, for `TranslationModel.from_folder`."""
        return write_networks(folder, self.config, self.networks, image_condition={"kind": "member"})

    def flops_per_sample(self) -> float:
        """Of one pass of one image of each set through all networks."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        image = ((1, 3, self.config.image_size, self.config.image_size), torch.float32)
        generator = forward_flops(lambda: build_generators(self.config)["ab"], image)
        return 2 * (generator + forward_flops(lambda: build_discriminators(self.config)["a"], image))

    def _made(self, batch: Batch) -> dict[str, Tensor]:
        """Of each set what is made of images of the other."""
        real = _sets(batch)
        return {"a": self.generator("ba", real["b"]), "b": self.generator("ab", real["a"])}


def build_generators(config: CycleGanConfig) -> Pair:
    """From A to B and back, freshly initialised."""
    shape = (config.channels, config.halvings, config.blocks)
    return Pair({"ab": ResNetTranslator(*shape), "ba": ResNetTranslator(*shape)})


def build_discriminators(config: CycleGanConfig) -> Pair:
    """Of A and of B, freshly initialised."""
    shape = (config.discriminator.channels, config.discriminator.layers)
    return Pair({"a": PatchDiscriminator(*shape), "b": PatchDiscriminator(*shape)})


def _sets(batch: Batch) -> dict[str, Tensor]:
    return {"a": batch["images"], "b": batch["other"]["images"]}


def _weight(batch: Batch) -> Tensor:
    return batch["weight"] * batch["other"]["weight"]


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().flatten(1).mean(1)


def _phase_loss(per_sample: Tensor, facts: dict[str, Tensor], batch: Batch) -> PhaseLoss:
    weight = _weight(batch)
    return PhaseLoss((weight * per_sample).mean(), {name: Mean.of(value, weight) for name, value in facts.items()})
