"""The training objective of GANs: the discriminator's phase, then the generator's.

Goodfellow et al., "Generative Adversarial Nets" (2014), algorithm 1, with any of the games in `losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTokenizer

from genmodels import random
from genmodels.clip.frozen import FrozenClip
from genmodels.gan.adaptive import AugmentationState
from genmodels.gan.augment import augmented
from genmodels.gan.base import AdversarialObjective
from genmodels.gan.build import build_discriminator, build_generator
from genmodels.gan.config import AdaptiveAugment, GanConfig
from genmodels.gan.export import write_networks
from genmodels.gan.losses import adversarial_loss
from genmodels.gan.networks.blocks import BatchNorm, Scores
from genmodels.gan.penalties import penalty
from genmodels.gan.ranks import global_batch
from genmodels.objective import Batch, Drawing, Mean, Phase, PhaseLoss, Preview, once
from genmodels.random import derive_seeds
from genmodels.text.encoder import TextEncoder, open_text_encoder, pooled_text
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.text.tokenizer import save as save_tokenizer
from genmodels.weights import forward_flops, required_folder

_PREVIEW_SEED = 1234
_LEAST_APART = 0.02  # mean difference of two pictures, below which they count as alike


class Gan(AdversarialObjective):
    """Networks "discriminator" and "generator", a phase each.

    All randomness comes from `batch["seeds"]`: latents, noise, augmentation. The objective's own state is that of
    adaptive augmentation.
    """

    def __init__(
        self,
        config: GanConfig,
        discriminator: nn.Module,
        generator: nn.Module,
        text_encoder: TextEncoder | None = None,
        tokenizer: CLIPTokenizer | None = None,
        clip: FrozenClip | None = None,
    ) -> None:
        super().__init__(discriminator, generator)
        self.config, self.tokenizer = config, tokenizer
        if text_encoder is not None:
            self.frozen["text_encoder"] = text_encoder.eval().requires_grad_(False)
        if clip is not None:
            self.frozen["clip"] = clip
        self.game = adversarial_loss(config.loss, config.real_target)
        coupled = {
            name: any(isinstance(part, BatchNorm) for part in network.modules())
            for name, network in self.networks.items()
        }
        self.phases = [
            Phase(
                "discriminator",
                self.discriminator_loss,
                couples_samples=any(coupled.values()) or config.semi_supervised is not None,
                double_backward=config.penalties.any,
                clip_weights=config.weight_clip,
            ),
            Phase(
                "generator",
                self.generator_loss,
                every=config.discriminator_steps,
                couples_samples=any(coupled.values()) or self._matches_features,
            ),
        ]
        self.augmentation = AugmentationState()

    @staticmethod
    def from_config(config: GanConfig, inputs: Path | None = None) -> Gan:
        """Build from a configuration; `inputs` holds `text_encoder/` and `tokenizer/`, or `clip/`, where it reads text.

        Raises:
            ValueError: an input is missing.
        """
        text_encoder = tokenizer = width = clip = None
        if config.clip is not None:
            clip = FrozenClip.from_folder(required_folder(inputs, "clip"))
            tokenizer, width = clip.tokenizer, clip.embedding_dim
        elif config.takes_text:
            text_encoder = open_text_encoder(required_folder(inputs, "text_encoder"))
            tokenizer = load_tokenizer(required_folder(inputs, "tokenizer"))
            width = int(text_encoder.config.hidden_size)
        discriminator, generator = build_discriminator(config, width), build_generator(config, width)
        return Gan(config, discriminator, generator, text_encoder, tokenizer, clip)

    @staticmethod
    def abstract_networks(config: GanConfig) -> dict[str, nn.Module]:
        """The trained networks on the meta device, to count parameters."""
        with torch.device("meta"):
            return {"discriminator": build_discriminator(config), "generator": build_generator(config)}

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Features of the texts, those of a wrong text for each sample, and how much is augmented in this step."""
        self._adapt(batches)
        if not self.config.conditional:
            return
        conditions = [self.condition(batch) for batch in batches]
        assert all(condition is not None for condition in conditions)
        sizes = [len(each) for each in conditions]  # type: ignore[arg-type]
        everyone, first = global_batch(torch.cat(conditions))  # type: ignore[arg-type]
        if self.config.matching_aware:
            wrong = everyone.roll(-1, 0)[first : first + sum(sizes)]
            for batch, part in zip(batches, wrong.split(sizes), strict=True):
                batch["wrong condition"] = part
        if self.config.matching_weight:
            for batch in batches:
                batch["all texts"] = everyone

    def condition(self, batch: Batch) -> Tensor | None:
        """Of each sample: features of its text, (batch, width), or its label, int64 (batch,); None without either."""
        if self.config.classes is not None:
            return self.labels(batch)
        if not self.config.takes_text:
            return None
        token_ids, encoder = batch["token_ids"], self.frozen.get("text_encoder") or self.frozen["clip"]

        def read() -> Tensor:
            if isinstance(encoder, FrozenClip):
                return encoder.read_texts(token_ids)[2] * math.sqrt(encoder.embedding_dim)
            return pooled_text(encoder, token_ids).float()  # type: ignore[arg-type]

        with torch.no_grad():
            return once(batch, ("pooled text", encoder), (token_ids,), read)

    def labels(self, batch: Batch) -> Tensor:
        """Labels int64 (batch,) of captions that name classes; any of quarantined samples, which have no caption.

        Raises:
            ValueError: a caption names no class.
        """
        assert self.config.classes is not None
        known = {name: label for label, name in enumerate(self.config.classes)}
        for caption, key, weight in zip(batch["captions"], batch["keys"], batch["weight"].tolist(), strict=True):
            if weight and caption not in known:
                raise ValueError(f"{key}: caption {caption!r} is not one of objective.classes")
        return torch.tensor([known.get(caption, 0) for caption in batch["captions"]], device=batch["seeds"].device)

    def generate(self, seeds: Tensor, condition: Tensor | None, purpose: str) -> Tensor:
        """Images (batch, 3, height, width) of latents that come from `seeds` and a `purpose`."""
        own = derive_seeds(seeds, purpose)
        latents = random.normal(own, (self.config.latent_dim,), "latent")
        return self.generator(latents, condition, own)

    def shown(self, images: Tensor, batch: Batch, purpose: str) -> Tensor:
        """What the discriminator sees of images: augmented, and with instance noise (Sønderby et al. 2017)."""
        seeds = derive_seeds(batch["seeds"], f"{purpose} shown")
        if self.config.augmentation is not None:
            images = augmented(images, seeds, self.config.augmentation.policies, self.augmentation_probability)
        if (deviation := self._instance_noise(batch["step"])) > 0:
            noise = random.normal(seeds, images.shape[1:], "instance noise")
            images = images + deviation * noise.to(images)
        return images

    @property
    def augmentation_probability(self) -> float:
        """Of each alteration of an image: 1 where it is not adaptive."""
        adaptive = isinstance(self.config.augmentation, AdaptiveAugment)
        return self.augmentation.probability if adaptive else 1.0

    def discriminator_loss(self, batch: Batch) -> PhaseLoss:
        """The game's loss, with penalties at the steps that have them."""
        condition, weight = self.condition(batch), batch["weight"]
        with torch.no_grad():
            drawn = self.generate(batch["seeds"], condition, "discriminator")
        real, fake = self.shown(batch["images"], batch, "real"), self.shown(drawn, batch, "fake")
        of_real, of_fake = self.discriminator(real, condition), self.discriminator(fake, condition)
        per_sample = self.game.of_discriminator(of_real.logits, of_fake.logits)
        metrics = self._facts(of_real, of_fake)
        if self.config.matching_aware:
            wrong = batch["wrong condition"]
            # What is read off an image does not depend on the condition, which enters in the head alone.
            of_wrong = self.discriminator.head(of_real.features, wrong).logits  # type: ignore[operator, union-attr]
            against = self.game.of_discriminator(of_real.logits, of_wrong)
            # A sample whose neighbour is told the same has no wrong condition.
            differs = (wrong != condition).flatten(1).any(1) if wrong.ndim > 1 else wrong != condition
            per_sample = torch.where(differs, (per_sample + against) / 2, per_sample)
            metrics["score_wrong"] = of_wrong
        if self._names_classes:
            named, metrics["class_loss"] = self._class_loss(of_real, batch)
            if self.config.auxiliary_weight:
                named = named + self._class_loss(of_fake, batch)[0]
            per_sample = per_sample + named
        if batch["step"] % self.config.penalties.every == 0 and self.config.penalties.any:
            metrics["penalty"] = self._penalty(real, fake, condition, batch["seeds"])
            per_sample = per_sample + self.config.penalties.every * metrics["penalty"]
        if isinstance(self.config.augmentation, AdaptiveAugment):
            assert self.game.border is not None
            self.augmentation.see(of_real.logits - self.game.border, weight)
            metrics["augmentation"] = torch.full_like(weight, self.augmentation.probability)
        metrics["loss"] = per_sample
        logged = {name: Mean.of(value, weight) for name, value in metrics.items()}
        if self._names_classes:
            logged["class_loss"] = Mean.of(metrics["class_loss"], weight * (self._known_labels(batch) >= 0))
        return PhaseLoss((weight * per_sample).mean(), logged)

    def generator_loss(self, batch: Batch) -> PhaseLoss:
        """The game's other loss; real images are seen only where outputs are compared in pairs."""
        condition, weight = self.condition(batch), batch["weight"]
        drawn = self.generate(batch["seeds"], condition, "generator")
        of_fake = self.discriminator(self.shown(drawn, batch, "generator"), condition)
        of_real = None
        if self.game.paired or self._matches_features:
            with torch.no_grad():
                of_real = self.discriminator(self.shown(batch["images"], batch, "beside generator"), condition)
        if self._matches_features:
            assert of_real is not None
            per_sample = self._feature_distance(of_fake.features, of_real.features, weight).expand(len(weight))
        else:
            per_sample = self.game.of_generator(of_fake.logits, None if of_real is None else of_real.logits)
        if self.config.auxiliary_weight:
            per_sample = per_sample + self._class_loss(of_fake, batch)[0]
        metrics = {"generator_loss": Mean.of(per_sample, weight)}
        if self.config.diversity_weight:
            seeking = self._seeking_loss(drawn, batch, condition)
            per_sample = per_sample + self.config.diversity_weight * seeking
            metrics["seeking_loss"] = Mean.of(seeking, weight)
        if self.config.matching_weight:
            matching = self._matching_loss(drawn, batch)
            per_sample = per_sample + self.config.matching_weight * matching
            metrics["matching_loss"] = Mean.of(matching, weight)
        return PhaseLoss((weight * per_sample).mean(), metrics)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The discriminator on held-out images: its loss, its scores, and how often it is right.

        Averaged weights, and images as they are. Where training shows it neither augmented nor noisy ones, held-out
        images that score lower than the training's (`score_real`) are told from them: it knows those by heart.
        """
        condition = self.condition(batch)
        drawn = self.generate(batch["seeds"], condition, "validation")
        of_real, of_fake = self.discriminator(batch["images"], condition), self.discriminator(drawn, condition)
        values = {"loss": self.game.of_discriminator(of_real.logits, of_fake.logits), **self._facts(of_real, of_fake)}
        metrics = {name: Mean.of(value, batch["weight"]) for name, value in values.items()}
        if of_real.classes is not None:
            labels = self._known_labels(batch)
            right = (of_real.classes.argmax(1) == labels).float()
            metrics["class_accuracy"] = Mean.of(right, batch["weight"] * (labels >= 0))
        return metrics

    def preview(self, batch: Batch) -> Preview:
        """Pictures for held-out captions, or of nothing but latents."""
        part = {
            name: value[: self.config.preview_samples] if isinstance(value, (Tensor, list)) else value
            for name, value in batch.items()
            if name != "once"
        }
        count, device = len(part["seeds"]), batch["seeds"].device
        seeds = torch.arange(_PREVIEW_SEED, _PREVIEW_SEED + count, device=device)
        drawn = self.generate(seeds, self.condition(part), "drawing")
        return Preview(drawn.clamp(-1, 1), list(part["captions"]) if self.config.conditional else [])

    def draw(self, batch: Batch, drawing: Drawing) -> Tensor:
        """A picture for each sample, in one pass; nothing of `drawing` applies."""
        return self.generate(batch["seeds"], self.condition(batch), "drawing").clamp(-1, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """The probability of augmentation, and what was seen since it was last changed."""
        return self.augmentation.tensors() if isinstance(self.config.augmentation, AdaptiveAugment) else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if isinstance(self.config.augmentation, AdaptiveAugment):
            self.augmentation = AugmentationState.of(state)

    def export(self, folder: Path) -> dict[str, Any]:
        """Write both networks, the text encoder and the tokenizer, for `GanModel.from_folder`."""
        facts = write_networks(folder, self.config, self.networks, classes=self.config.classes)
        if "text_encoder" in self.frozen:
            encoder: Any = self.frozen["text_encoder"]
            encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
        if isinstance(clip := self.frozen.get("clip"), FrozenClip):
            clip.save(folder / "clip")
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder / "tokenizer")
        return facts

    def flops_per_sample(self) -> float:
        """Of one pass through both networks."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        config, size = self.config, self.config.image_size
        width = None if not config.takes_text else int(self._text_width)
        told: tuple[Any, ...] = ()
        if config.conditional:
            told = (((1,), torch.int64) if config.classes is not None else ((1, width), torch.float32),)
        images = ((1, 3, size, size), torch.float32)
        generator = forward_flops(
            lambda: build_generator(config, width), ((1, config.latent_dim), torch.float32), *told
        )
        return generator + forward_flops(lambda: build_discriminator(config, width), images, *told)

    @property
    def _text_width(self) -> int:
        if isinstance(clip := self.frozen.get("clip"), FrozenClip):
            return clip.embedding_dim
        encoder: Any = self.frozen["text_encoder"]
        return int(encoder.config.hidden_size)

    @property
    def _names_classes(self) -> bool:
        return self.config.semi_supervised is not None or self.config.auxiliary_weight > 0

    @property
    def _matches_features(self) -> bool:
        return self.config.semi_supervised is not None and self.config.semi_supervised.feature_matching

    def _known_labels(self, batch: Batch) -> Tensor:
        """Number of each sample's class, int64 (batch,): -1 where it has none."""
        if self.config.semi_supervised is None:
            return self.labels(batch)
        number = {label: row for row, label in enumerate(self.config.semi_supervised.classes)}
        return torch.tensor([number.get(label, -1) for label in batch["labels"]], device=batch["seeds"].device)

    def _class_loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy of naming the class, weighted, and plain; (batch,) each, 0 for samples without a label."""
        assert scores.classes is not None
        labels = self._known_labels(batch)
        plain = cross_entropy(scores.classes, labels.clamp(min=0), reduction="none") * (labels >= 0)
        factor = self.config.auxiliary_weight
        if self.config.semi_supervised is not None:
            # The mean is over the samples that have a label, however few of the global batch these are.
            known = torch.stack([(batch["weight"] * (labels >= 0)).sum(), batch["weight"].sum()])
            if dist.is_initialized():
                dist.all_reduce(known)
            factor = float(known[1] / known[0].clamp(min=1))
        return factor * plain, plain.detach()

    def _seeking_loss(self, drawn: Tensor, batch: Batch, condition: Tensor | None) -> Tensor:
        """How far latents are apart over how far their pictures are, (batch,): Mao et al., "Mode Seeking Generative
        Adversarial Networks for Diverse Image Synthesis" (CVPR 2019), eq. 3, inverted to be minimised."""
        purposes = ("generator", "generator again")
        one, other = (
            random.normal(derive_seeds(batch["seeds"], purpose), (self.config.latent_dim,), "latent")
            for purpose in purposes
        )
        again = self.generate(batch["seeds"], condition, purposes[1])
        apart = (drawn - again).abs().flatten(1).mean(1)
        return (one - other).abs().mean(1) / (apart + _LEAST_APART)

    def _matching_loss(self, drawn: Tensor, batch: Batch) -> Tensor:
        """−log of the probability that the CLIP gives each picture's own caption among those of the global batch,
        (batch,): Xu et al. 2018, eq. 10, of the sentence. No gradient runs between samples: texts are given."""
        clip = self.frozen["clip"]
        assert isinstance(clip, FrozenClip)
        everyone, own = batch["all texts"], self.condition(batch)
        assert own is not None
        images = clip.embed_drawn(drawn).float()
        with torch.autocast(drawn.device.type, enabled=False):
            logits = clip.pair.log_scale.exp() / math.sqrt(clip.embedding_dim) * images @ everyone.T
        # A caption that is told more than once is as right as the sample's own.
        same = (own[:, None] == everyone).all(2)
        return logits.logsumexp(1) - logits.masked_fill(~same, -math.inf).logsumexp(1)

    def _feature_distance(self, fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
        """‖mean f(drawn) − mean f(real)‖² over the global batch (Salimans et al. 2016, section 3.1)."""
        total = torch.cat([(weight[:, None] * each).sum(0) for each in (fake, real)] + [weight.sum()[None]])
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = collectives.all_reduce(total)
        ours, theirs = total[:-1].chunk(2)
        return ((ours - theirs) / total[-1].clamp(min=1)).square().sum()

    def _penalty(self, real: Tensor, fake: Tensor, condition: Tensor | None, seeds: Tensor) -> Tensor:
        """Of images as the discriminator sees them."""

        def score(images: Tensor) -> Tensor:
            return self.discriminator(images, condition).logits

        return penalty(score, real, fake, seeds, self.config.penalties)

    def _facts(self, of_real: Scores, of_fake: Scores) -> dict[str, Tensor]:
        """What the discriminator says, (batch,) each, and how often it is right: of pairs, where only differences of
        what it says have a meaning."""
        real, fake = of_real.logits.detach(), of_fake.logits.detach()
        said = {"score_real": real, "score_fake": fake}
        if (border := self.game.border) is None:
            return {**said, "accuracy": (real > fake).float()}
        right = {"accuracy_real": (real > border).float(), "accuracy_fake": (fake < border).float()}
        return {**said, "sign_real": (real - border).sign(), **right}

    def _instance_noise(self, step: int) -> float:
        """Its deviation at a step."""
        steps = self.config.instance_noise_steps
        return self.config.instance_noise * (1.0 if steps is None else max(0.0, 1 - step / steps))

    def _adapt(self, batches: Sequence[Batch]) -> None:
        """Change the probability of augmentation at the steps that do."""
        chosen = self.config.augmentation
        if isinstance(chosen, AdaptiveAugment) and batches[0]["step"] % chosen.every == 0:
            self.augmentation.change(chosen.target, chosen.images)
