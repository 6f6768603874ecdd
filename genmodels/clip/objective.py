"""Contrastive training of an image and a text encoder.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), figure 3. The
softmax runs over the global batch: embeddings are gathered from all ranks, and under accumulation from all
micro-batches, so the loss is the same however the batch is divided.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from genmodels.clip.config import ClipConfig, TransformerImageEncoder
from genmodels.clip.layout import FACTS
from genmodels.clip.network import Embeddings, build_pair, from_transformers, to_transformers
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.objective import Batch, Mean, Objective, Phase, PhaseLoss, Preview
from genmodels.text.tokenizer import encode
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.text.tokenizer import save as save_tokenizer
from genmodels.weights import copy_weights, forward_flops, load_into

_ENCODERS = "encoders.safetensors"  # of convolutions: all but the text encoder, which has a folder of its own
_SENTENCES_AT_ONCE = 512
_PIXELS = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # for transformers: to [-1, 1]


class Clip(Objective):
    """One network ("clip"), one phase; nothing in it is random."""

    def __init__(self, config: ClipConfig, tokenizer: CLIPTokenizer | None = None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.clip = build_pair(config, tokenizer)
        self.networks: dict[str, nn.Module] = {"clip": self.clip}
        self.frozen: dict[str, nn.Module] = {}
        self.phases = [Phase("clip", self.loss, couples_samples=True, caches_gradients=True)]
        self.statistics: EmbeddingStatistics | None = None
        self._classes: Tensor | None = None  # unit vectors (classes, embedding_dim), of this validation

    @staticmethod
    def from_config(config: ClipConfig, inputs: Path | None = None) -> Clip:
        """Build from a configuration; `inputs` holds `tokenizer/`.

        Raises:
            ValueError: there is no tokenizer, or it does not fit.
        """
        if inputs is None:
            raise ValueError("this configuration needs tokenizer/ among its inputs")
        return Clip(config, load_tokenizer(inputs / "tokenizer"))

    @staticmethod
    def abstract_networks(config: ClipConfig) -> dict[str, nn.Module]:
        """The trained network on the meta device, to count parameters."""
        with torch.device("meta"):
            return {"clip": build_pair(config)}

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Under accumulation: what the loss of the whole batch asks of the embeddings of each micro-batch.

        Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021), section
        3.2: all embeddings are computed without their activations, then the gradient of the loss with respect to them;
        each micro-batch is computed once more to pass its share of it on. Nothing in the encoders is random.
        """
        if len(batches) == 1:
            return
        parts = [self.clip(batch["images"], batch["token_ids"]) for batch in batches]
        images, texts = (torch.cat([getattr(part, side) for part in parts]) for side in ("images", "texts"))
        own = Embeddings(*(value.detach().requires_grad_() for value in (images, texts, parts[0].scale)))
        with torch.enable_grad():
            loss, metrics = self._whole(own, torch.cat([batch["weight"] for batch in batches]), len(batches))
        of_images, of_texts, of_scale = torch.autograd.grad(loss, own)
        first = 0
        for batch, logged in zip(batches, metrics, strict=True):
            part = slice(first, first := first + len(batch["weight"]))
            # The engine takes the mean over micro-batches, and the sum is what is wanted; of the scale each has all.
            factor = len(batches)
            cached = Embeddings(factor * of_images[part], factor * of_texts[part], of_scale)
            batch[self._cached] = (cached, loss.detach(), logged)

    def loss(self, batch: Batch) -> PhaseLoss:
        """The mean over all slots of the global batch, quarantined ones counting 0."""
        own = self.clip(batch["images"], batch["token_ids"])
        if self._cached not in batch:
            loss, (metrics,) = self._whole(own, batch["weight"], 1)
            return PhaseLoss(loss, metrics)
        gradients, value, metrics = batch[self._cached]
        passed_on = sum((mine * gradient).sum() for mine, gradient in zip(own, gradients, strict=True))
        return PhaseLoss(value + passed_on - passed_on.detach(), metrics)

    @property
    def _cached(self) -> str:
        return f"cached gradients {id(self)}"

    def _whole(self, own: Embeddings, weight: Tensor, micro_batches: int) -> tuple[Tensor, list[dict[str, Mean]]]:
        """The loss of the global batch, and the metrics of each of this rank's micro-batches."""
        whole, weight, mine = gather(own, weight)
        per_sample = contrastive_loss(whole, weight)
        # Every rank computes the whole loss, but differentiates its own embeddings alone; the engine takes the mean
        # over ranks, and the sum is what is wanted.
        loss = _world_size() * (weight * per_sample).mean()
        size = (mine.stop - mine.start) // micro_batches
        parts = [slice(first, first + size) for first in range(mine.start, mine.stop, size)]
        return loss, [self._metrics(whole, weight, per_sample, part) for part in parts]

    def begin_validation(self) -> None:
        """Embed the classes of zero-shot classification."""
        zero_shot = self.config.zero_shot
        if zero_shot is None or self.tokenizer is None:
            return
        device = next(self.clip.parameters()).device
        sentences = [
            template.replace("{}", name) for name in zero_shot.classes.values() for template in zero_shot.templates
        ]
        token_ids = encode(self.tokenizer, sentences)
        found = torch.cat([self.clip.embed_texts(part.to(device)) for part in token_ids.split(_SENTENCES_AT_ONCE)])
        self._classes = normalize(found.float().unflatten(0, (len(zero_shot.classes), -1)).mean(1), dim=1)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The loss, how often the right caption (recall_image) or image (recall_text) is the nearest in the batch, and
        where the configuration names classes how often the right one's sentences are (zero_shot_accuracy)."""
        own = self.clip(batch["images"], batch["token_ids"])
        whole, weight, mine = gather(own, batch["weight"])
        metrics = self._metrics(whole, weight, contrastive_loss(whole, weight), mine)
        if self.config.zero_shot is not None and self._classes is not None:
            number = {label: row for row, label in enumerate(self.config.zero_shot.classes)}
            labels = torch.tensor([number.get(label, -1) for label in batch["labels"]], device=own.images.device)
            right = (own.images.float() @ self._classes.T).argmax(1) == labels
            metrics["zero_shot_accuracy"] = Mean.of(right, batch["weight"] * (labels >= 0))
        return metrics

    def preview(self, batch: Batch) -> Preview:
        """The images, each with the nearest of their captions."""
        found = self.clip(batch["images"], batch["token_ids"])
        nearest = (found.images @ found.texts.T).argmax(1).tolist()
        return Preview(batch["images"], [batch["captions"][number] for number in nearest])

    def finish(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Measure the distribution of the embeddings, which what is trained on them starts from."""
        found = [(self.clip(batch["images"], batch["token_ids"]), batch["weight"] > 0) for batch in batches]
        images, texts = (torch.cat([getattr(own, side)[kept] for own, kept in found]) for side in ("images", "texts"))
        self.statistics = EmbeddingStatistics.measure(images, texts)
        gap = float((images.mean(0) - texts.mean(0)).norm())
        return {
            "modality_gap": gap,
            "dot_product": self.statistics.dot_mean,
            "temperature": 1 / float(found[0][0].scale),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The measured statistics, once there are any."""
        return {} if self.statistics is None else self.statistics.tensors()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.statistics = EmbeddingStatistics.of(state) if state else None

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors of sentences, float32 (len(texts), embedding_dim). Raises ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("embedding texts needs the tokenizer")
        return self.clip.embed_texts(encode(self.tokenizer, texts))

    def export(self, folder: Path) -> dict[str, Any]:
        """Write `text_encoder/` (a CLIPTextModel) and `tokenizer/`, which latent diffusion takes as its text encoder,
        and the rest for `open_pair`: with a vision transformer, as a CLIPModel that transformers opens."""
        self.clip.text_encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder / "tokenizer")
        if self._opens_in_transformers:
            to_transformers(self.clip).save_pretrained(folder, safe_serialization=True)
            size = {"height": self.config.image_size, "width": self.config.image_size}
            (folder / "preprocessor_config.json").write_text(json.dumps({**_PIXELS, "size": size}, indent=2) + "\n")
            if self.tokenizer is not None:
                save_tokenizer(self.tokenizer, folder)
        else:
            save_file(self._without_text_encoder(), folder / _ENCODERS)
        if self.statistics is not None:
            self.statistics.save(folder)
        (folder / FACTS).write_text(json.dumps(self.config.model_dump(), indent=2) + "\n")
        layout = "CLIPModel" if self._opens_in_transformers else "CLIP"
        return {"layout": layout, "parameters": {"clip": sum(p.numel() for p in self.clip.parameters())}}

    @property
    def _opens_in_transformers(self) -> bool:
        return isinstance(self.config.image_encoder, TransformerImageEncoder)

    def load_weights(self, folder: Path) -> None:
        """Start from an export.

        Raises:
            ValueError: a part is missing or has other shapes.
        """
        if self._opens_in_transformers:
            if not (folder / "config.json").is_file():
                raise ValueError(f"init_from: {folder} is no export of a CLIP (no config.json there)")
            pair = from_transformers(CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True))
            copy_weights(pair.state_dict(), self.clip, folder)
            return
        if not (folder / _ENCODERS).is_file():
            raise ValueError(f"init_from: {folder} is no export of a CLIP (no {_ENCODERS} there)")
        load_into(self.clip.text_encoder, folder / "text_encoder")
        own, given = self._without_text_encoder(), load_file(folder / _ENCODERS)
        wrong = sorted(
            key
            for key in own.keys() | given.keys()
            if key not in own or key not in given or own[key].shape != given[key].shape
        )
        if wrong:
            raise ValueError(f"init_from: the weights in {folder} do not fit this config: {', '.join(wrong[:3])}")
        self.clip.load_state_dict(given, strict=False)

    def flops_per_sample(self) -> float:
        """Of both encoders' forward pass."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        size, length = self.config.image_size, self.config.text_encoder.length
        return forward_flops(
            lambda: build_pair(self.config), ((1, 3, size, size), torch.float32), ((1, length), torch.int64)
        )

    def _without_text_encoder(self) -> dict[str, Tensor]:
        state = self.clip.state_dict()
        return {key: value.contiguous() for key, value in state.items() if not key.startswith("text_encoder.")}

    def _metrics(self, whole: Embeddings, weight: Tensor, per_sample: Tensor, mine: slice) -> dict[str, Mean]:
        with torch.no_grad():
            similarity = _masked(whole.images @ whole.texts.T, weight)
            target = torch.arange(len(weight), device=weight.device)
            recalls = {"recall_image": similarity.argmax(1) == target, "recall_text": similarity.argmax(0) == target}
        values = {"loss": per_sample, **recalls}
        return {name: Mean.of(value[mine], weight[mine]) for name, value in values.items()}


def contrastive_loss(embeddings: Embeddings, weight: Tensor) -> Tensor:
    """Each pair's loss (batch,): the mean of the cross-entropies of image to text and text to image.

    Args:
        embeddings: of the whole batch.
        weight: (batch,), 0 for pairs that are nobody's negatives.
    """
    logits = _masked(embeddings.scale * embeddings.images @ embeddings.texts.T, weight)
    target = torch.arange(len(weight), device=weight.device)
    cross_entropy = nn.functional.cross_entropy
    by_image = cross_entropy(logits, target, reduction="none")
    return (by_image + cross_entropy(logits.T, target, reduction="none")) / 2


def gather(own: Embeddings, weight: Tensor) -> tuple[Embeddings, Tensor, slice]:
    """Embeddings and weights of all ranks in order of rank, and where this rank's are; only these have a gradient.

    The scale is a parameter of every rank, so its gradient is divided among them. Collective; all ranks hold equally
    many.
    """
    count, world_size = len(weight), _world_size()
    if world_size == 1:
        return own, weight, slice(0, count)
    rank = dist.get_rank()
    mine = slice(rank * count, (rank + 1) * count)

    def whole(value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(parts, value.detach().contiguous())
        parts[rank] = value
        return torch.cat(parts)

    scale = own.scale.detach() + (own.scale - own.scale.detach()) / world_size
    return Embeddings(whole(own.images), whole(own.texts), scale), whole(weight), mine


def open_pair(folder: Path) -> Clip:
    """The encoders of an export, with its tokenizer, in evaluation mode."""
    config = ClipConfig.model_validate_json((folder / FACTS).read_text())
    clip = Clip(config, load_tokenizer(folder / "tokenizer"))
    clip.load_weights(folder)
    clip.statistics = EmbeddingStatistics.load(folder)
    clip.clip.eval()
    return clip


def _masked(similarity: Tensor, weight: Tensor) -> Tensor:
    """Similarities (batch, batch) with the pairs of weight 0 taken out of everyone's comparison but their own."""
    out = weight == 0
    own = torch.eye(len(weight), dtype=torch.bool, device=weight.device)
    return similarity.masked_fill((out[:, None] | out[None, :]) & ~own, -torch.inf)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
