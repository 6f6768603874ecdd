"""The training objective of AttnGAN: at each stage a game with and without the caption, and the DAMSM's judgement.

Xu et al. 2018, eq. 3 to 6. The discriminators are trained as one network, and so are the stages of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genmodels import random
from genmodels.gan.attention.config import AttnGanConfig
from genmodels.gan.attention.frozen import FrozenDamsm
from genmodels.gan.attention.matching import Texts
from genmodels.gan.attention.networks import Discriminators, Generator, Pictures, StageScores, divergence
from genmodels.gan.base import AdversarialObjective
from genmodels.gan.export import write_networks
from genmodels.gan.losses import adversarial_loss
from genmodels.gan.networks.blocks import halved
from genmodels.gan.penalties import penalty
from genmodels.gan.ranks import global_batch
from genmodels.objective import Batch, Drawing, Mean, Phase, PhaseLoss, Preview, once
from genmodels.random import derive_seeds
from genmodels.text.tokenizer import save as save_tokenizer
from genmodels.weights import forward_flops, required_folder

_PREVIEW_SEED = 1234
_GAME = adversarial_loss("non_saturating")


class AttnGan(AdversarialObjective):
    """Networks "discriminator", of all stages, and "generator", a phase each. All randomness is `batch["seeds"]`'s."""

    def __init__(self, config: AttnGanConfig, damsm: FrozenDamsm) -> None:
        super().__init__(Discriminators(config, damsm.embedding_dim), Generator(config, damsm.embedding_dim))
        self.config, self.tokenizer = config, damsm.tokenizer
        self.frozen["damsm"] = damsm
        self.phases = [
            Phase("discriminator", self.discriminator_loss, double_backward=config.penalties.any),
            Phase("generator", self.generator_loss, couples_samples=config.damsm_weight > 0),
        ]

    @staticmethod
    def from_config(config: AttnGanConfig, inputs: Path | None = None) -> AttnGan:
        """Build from a configuration; `inputs` holds `damsm/`. Raises ValueError where it is missing."""
        return AttnGan(config, FrozenDamsm.from_folder(required_folder(inputs, "damsm")))

    @staticmethod
    def abstract_networks(config: AttnGanConfig) -> dict[str, nn.Module]:
        """The trained networks on the meta device, to count parameters."""
        with torch.device("meta"):
            return {
                "discriminator": Discriminators(config, config.damsm_dim),
                "generator": Generator(config, config.damsm_dim),
            }

    @property
    def damsm(self) -> FrozenDamsm:
        """What reads the captions, and says how well pictures match them."""
        damsm = self.frozen["damsm"]
        assert isinstance(damsm, FrozenDamsm)
        return damsm

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Read the captions; of each sample also a wrong one, its neighbour's in the global batch."""
        own = [self.texts(batch).sentence for batch in batches]
        if not self.config.matching_aware:
            return
        sizes = [len(each) for each in own]
        everyone, first = global_batch(torch.cat(own))
        wrong = everyone.roll(-1, 0)[first : first + sum(sizes)]
        for batch, part in zip(batches, wrong.split(sizes), strict=True):
            batch["wrong sentence"] = part

    def texts(self, batch: Batch) -> Texts:
        """What the DAMSM reads in the captions."""
        token_ids, damsm = batch["token_ids"], self.damsm
        return once(batch, ("texts", damsm), (token_ids,), lambda: damsm.read_texts(token_ids))

    def generate(self, seeds: Tensor, texts: Texts, purpose: str) -> Pictures:
        """Pictures of all stages, from `seeds` and a `purpose`."""
        return self.generator(*noises(self.config, derive_seeds(seeds, purpose)), *texts)

    def discriminator_loss(self, batch: Batch) -> PhaseLoss:
        """Half the game without the caption and half that with it, over all stages (eq. 5, 6), and penalties."""
        texts, weight = self.texts(batch), batch["weight"]
        with torch.no_grad():
            drawn = self.generate(batch["seeds"], texts, "discriminator").images
        real = self.sizes_of(batch["images"])
        wrong = [batch["wrong sentence"]] if self.config.matching_aware else []
        of_real = self.discriminator(real, texts.sentence, *wrong)
        of_fake = self.discriminator(drawn, texts.sentence)
        per_sample = self._games(of_real, of_fake, texts.sentence, wrong)
        metrics = self._facts(of_real, of_fake)
        if wrong:
            metrics["score_wrong"] = of_real[-1].told[1]
        if self.config.penalties.any and batch["step"] % self.config.penalties.every == 0:
            metrics["penalty"] = self._penalty(real, drawn, texts.sentence, batch["seeds"])
            per_sample = per_sample + self.config.penalties.every * metrics["penalty"]
        metrics["loss"] = per_sample
        logged = {name: Mean.of(value, weight) for name, value in metrics.items()}
        return PhaseLoss((weight * per_sample).mean(), logged)

    def generator_loss(self, batch: Batch) -> PhaseLoss:
        """The other side of the games (eq. 4), the divergence of the condition, and λ L_DAMSM (eq. 3)."""
        texts, weight = self.texts(batch), batch["weight"]
        drawn = self.generate(batch["seeds"], texts, "generator")
        scores = self.discriminator(drawn.images, texts.sentence)
        games = [(_GAME.of_generator(of.alone) + _GAME.of_generator(of.told[0])) / 2 for of in scores]
        adversarial = torch.stack(games).sum(0)
        metrics = {"adversarial": adversarial, "divergence": divergence(drawn.mean, drawn.log_variance)}
        per_sample = adversarial + self.config.kl_weight * metrics["divergence"]
        if self.config.damsm_weight:
            metrics["damsm_loss"] = self.damsm.match(drawn.images[-1], texts, batch["token_ids"], weight).loss
            per_sample = per_sample + self.config.damsm_weight * metrics["damsm_loss"]
        metrics["generator_loss"] = per_sample
        logged = {name: Mean.of(value, weight) for name, value in metrics.items()}
        return PhaseLoss((weight * per_sample).mean(), logged)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The discriminators on held-out images, and how well the DAMSM matches what is drawn for their captions:
        `damsm_loss`, and how often the right caption is the best of the batch, `caption_found`."""
        texts, weight = self.texts(batch), batch["weight"]
        drawn = self.generate(batch["seeds"], texts, "validation").images
        of_real = self.discriminator(self.sizes_of(batch["images"]), texts.sentence)
        of_fake = self.discriminator(drawn, texts.sentence)
        matched = self.damsm.match(drawn[-1], texts, batch["token_ids"], weight)
        values = {"loss": self._games(of_real, of_fake, texts.sentence, []), **self._facts(of_real, of_fake)}
        values |= {"damsm_loss": matched.loss, "caption_found": matched.image_to_text}
        return {name: Mean.of(value, weight) for name, value in values.items()}

    def preview(self, batch: Batch) -> Preview:
        """Pictures of the last stage for held-out captions."""
        count = min(self.config.preview_samples, len(batch["seeds"]))
        seeds = torch.arange(_PREVIEW_SEED, _PREVIEW_SEED + count, device=batch["seeds"].device)
        texts = Texts(*(value[:count] for value in self.texts(batch)))
        return Preview(self.generate(seeds, texts, "drawing").images[-1], list(batch["captions"][:count]))

    def draw(self, batch: Batch, drawing: Drawing) -> Tensor:
        """A picture for each sample, in one pass; nothing of `drawing` applies."""
        return self.generate(batch["seeds"], self.texts(batch), "drawing").images[-1]

    def export(self, folder: Path) -> dict[str, Any]:
        """Write both networks, the DAMSM and its tokenizer, for `AttnGanModel.from_folder`."""
        facts = write_networks(folder, self.config, self.networks)
        self.damsm.save(folder / "damsm")
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        return facts

    def flops_per_sample(self) -> float:
        """Of one pass through both networks."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        config, dim, length = self.config, self.damsm.embedding_dim, self.damsm.length
        drawn_from = [((1, count), torch.float32) for count in (config.latent_dim, config.condition_dim)]
        sentence = ((1, dim), torch.float32)
        words = (((1, length, dim), torch.float32), ((1, length), torch.bool))
        total = forward_flops(lambda: Generator(config, dim), *drawn_from, *words, sentence)
        for stage, size in enumerate(config.sizes):
            image = ((1, 3, size, size), torch.float32)
            total += forward_flops(lambda stage=stage: Discriminators(config, dim).stages[stage], image, sentence)  # type: ignore[misc]
        return total

    def sizes_of(self, images: Tensor) -> list[Tensor]:
        """Images at the size of each stage."""
        found = [images]
        while len(found) < self.config.stages:
            found.insert(0, halved(found[0]))
        return found

    def _games(self, real: list[StageScores], fake: list[StageScores], sentence: Tensor, wrong: list[Tensor]) -> Tensor:
        """Over all stages, (batch,): half the game alone, and half that with the caption: against drawn images, and
        against real ones with a wrong caption."""
        games = []
        for of, drawn in zip(real, fake, strict=True):
            told = _GAME.of_discriminator(of.told[0], drawn.told[0])
            if wrong:
                against = _GAME.of_discriminator(of.told[0], of.told[1])
                # A sample whose neighbour is told the same has no wrong caption.
                told = torch.where((wrong[0] != sentence).any(1), (told + against) / 2, told)
            games.append((_GAME.of_discriminator(of.alone, drawn.alone) + told) / 2)
        return torch.stack(games).sum(0)

    def _penalty(self, real: list[Tensor], drawn: list[Tensor], sentence: Tensor, seeds: Tensor) -> Tensor:
        """Of both scores at each stage, (batch,)."""

        def at(stage: int) -> Tensor:
            def score(images: Tensor) -> Tensor:
                (of,) = self.discriminator([images], sentence, first=stage)
                return (of.alone + of.told[0]) / 2

            return penalty(score, real[stage], drawn[stage], seeds, self.config.penalties)

        return torch.stack([at(stage) for stage in range(self.config.stages)]).sum(0)

    def _facts(self, real: list[StageScores], fake: list[StageScores]) -> dict[str, Tensor]:
        """What the last stage's discriminator says, (batch,) each, and how often it is right."""
        (real_alone, real_told), (fake_alone, fake_told) = (
            (of[-1].alone.detach(), of[-1].told[0].detach()) for of in (real, fake)
        )
        return {
            "score_real": real_alone,
            "score_fake": fake_alone,
            "told_real": real_told,
            "told_fake": fake_told,
            "accuracy_real": (real_told > 0).float(),
            "accuracy_fake": (fake_told < 0).float(),
        }


def noises(config: AttnGanConfig, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (batch, latent_dim), and what conditions are drawn with (batch, condition_dim), of seeds (batch,)."""
    latents = random.normal(seeds, (config.latent_dim,), "latent")
    return latents, random.normal(seeds, (config.condition_dim,), "condition")
