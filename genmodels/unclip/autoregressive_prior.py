"""The autoregressive prior of unCLIP.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022), section 2.2: image embeddings
are reduced to their principal components, ordered by eigenvalue, each is quantised, and a transformer with a causal
mask predicts one after the other from the caption, its embedding, and a token that tells how well image and caption
agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import GPT2Config, GPT2Model

from genmodels import random
from genmodels.clip.frozen import FrozenClip
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.diffusion.sampler import NOTHING, Condition
from genmodels.objective import Batch, Mean, Phase, PhaseLoss
from genmodels.unclip.config import AutoregressivePriorConfig
from genmodels.unclip.prior import Prior, open_clip
from genmodels.weights import copy_weights

_INITIAL_DEVIATION = 0.02
_RANGE = 4.0  # deviations to either side that the buckets of a component cover
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class AutoregressivePriorNetwork(nn.Module):
    """The quantiser, as buffers, and the transformer.

    A sequence is: the caption's tokens, its embedding, the token of the dot product, the codes. The answer at the dot
    product's place is the first code's.
    """

    def __init__(
        self,
        config: AutoregressivePriorConfig,
        embedding_dim: int,
        text_width: int,
        length: int,
        statistics: EmbeddingStatistics | None = None,
    ) -> None:
        super().__init__()
        if config.components > embedding_dim:
            raise ValueError(f"components is {config.components}, and the embeddings have {embedding_dim} features")
        self.config = config
        self.sizes = (embedding_dim, text_width, length)
        width = config.width
        self.read_features = nn.Linear(text_width, width)
        self.read_embedding = nn.Linear(embedding_dim, width)
        self.dots = nn.Embedding(config.dot_buckets + 1, width)  # the last one: not told
        self.codes = nn.Embedding(config.buckets, width)
        self.transformer = GPT2Model(
            GPT2Config(
                vocab_size=1,  # tokens come as vectors
                n_positions=length + 2 + config.components,
                n_embd=width,
                n_layer=config.layers,
                n_head=config.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        self.transformer.wte = nn.Identity()
        self.answer = nn.Linear(width, config.buckets)
        # As GPT-2's own: vectors of another size would drown the positions, which say what component comes next.
        for part in (self.read_features, self.read_embedding, self.dots, self.codes, self.answer):
            nn.init.normal_(part.weight, std=_INITIAL_DEVIATION)
        mean, basis = torch.zeros(embedding_dim), torch.zeros(embedding_dim, config.components)
        deviation, dots = torch.ones(config.components), torch.tensor([0.0, 1.0])
        if statistics is not None:
            mean, dots = statistics.mean, torch.tensor([statistics.dot_mean, max(statistics.dot_deviation, 1e-6)])
            variances, vectors = torch.linalg.eigh(statistics.covariance.double())  # in ascending order
            basis = vectors.flip(1)[:, : config.components].float()
            deviation = variances.flip(0)[: config.components].clamp(min=1e-12).sqrt().float()
        self.mean, self.basis, self.deviation = nn.Buffer(mean), nn.Buffer(basis.contiguous()), nn.Buffer(deviation)
        self.dot_statistics = nn.Buffer(dots)

    def quantise(self, embeddings: Tensor) -> Tensor:
        """Codes, int64 (batch, components), of embeddings (batch, embedding_dim)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # half precision would move codes by buckets
            scores = (embeddings.float() - self.mean.float()) @ self.basis.float() / self.deviation
        buckets = self.config.buckets
        return ((scores + _RANGE) / (2 * _RANGE) * buckets).long().clamp(0, buckets - 1)

    def embed(self, codes: Tensor) -> Tensor:
        """Unit vectors of codes: the middles of their buckets."""
        scores = ((codes + 0.5) / self.config.buckets * 2 - 1) * _RANGE
        with torch.autocast(scores.device.type, enabled=False):
            return normalize((scores * self.deviation).float() @ self.basis.float().T + self.mean.float(), dim=1)

    def quantise_dots(self, dots: Tensor) -> Tensor:
        """Buckets of equal shares, int64 (batch,), of dot products (batch,); the highest agree most."""
        mean, deviation = self.dot_statistics
        share = torch.special.ndtr((dots - mean) / deviation)
        return (share * self.config.dot_buckets).long().clamp(0, self.config.dot_buckets - 1)

    def prefix(self, told: Condition, dots: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence before the codes, (batch, length + 2, width), and which of it is seen, (batch, length + 2)."""
        embedding = self.read_embedding(told["embedding"] * told["embedding"].shape[1] ** 0.5)
        parts = [self.read_features(told["features"]), embedding[:, None], self.dots(dots)[:, None]]
        mask = torch.cat([told["mask"], told["mask"].new_ones(len(dots), 2)], dim=1)
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=1), mask

    def forward(self, told: Condition, dots: Tensor, codes: Tensor) -> Tensor:
        """Logits of every code given those before it, float32 (batch, components, buckets)."""
        before, mask = self.prefix(told, dots)
        tokens = torch.cat([before, self.codes(codes[:, :-1]).to(before.dtype)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(codes), codes.shape[1] - 1)], dim=1)
        seen = self.transformer(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.answer(seen[:, before.shape[1] - 1 :]).float()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.gradient_checkpointing_enable()


class AutoregressivePrior(Prior):
    """One network ("prior"), one phase: the cross-entropy of the codes."""

    config: AutoregressivePriorConfig

    def __init__(self, config: AutoregressivePriorConfig, clip: FrozenClip) -> None:
        super().__init__(config, clip)
        self.prior = AutoregressivePriorNetwork(
            config, clip.embedding_dim, clip.text_width, clip.text_length, self.statistics
        )
        self.networks: dict[str, nn.Module] = {"prior": self.prior}
        self.phases = [Phase("prior", self.loss)]

    @staticmethod
    def from_config(config: AutoregressivePriorConfig, inputs: Path | None = None) -> AutoregressivePrior:
        """Build from a configuration; `inputs` holds `clip/`. Raises ValueError where it is missing or does not fit."""
        return AutoregressivePrior(config, open_clip(inputs))

    @staticmethod
    def abstract_networks(config: AutoregressivePriorConfig) -> dict[str, nn.Module]:
        """The trained network on the meta device, to count parameters."""
        with torch.device("meta"):
            return {"prior": AutoregressivePriorNetwork(config, config.clip_dim, config.clip_width, config.clip_length)}

    def loss(self, batch: Batch) -> PhaseLoss:
        """Mean over the slots of the codes' mean cross-entropy, in nats a code."""
        nats = self._nats(batch, dropout=True)
        return PhaseLoss((batch["weight"] * nats).mean(), {"loss": Mean.of(nats, batch["weight"])})

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The loss with no caption dropped, and how near drawn embeddings are."""
        told, nats = self.told(batch, dropout=False), self._nats(batch, dropout=False)
        drawn = draw_embeddings(self.prior, told, NOTHING, batch["seeds"])
        return {"loss": Mean.of(nats, batch["weight"]), **self.agreement(drawn, batch, told)}

    def export(self, folder: Path) -> dict[str, Any]:
        """Write `prior/` and which CLIP it belongs to."""
        save_network(self.prior, folder / "prior")
        self.write_facts(folder)
        count = sum(p.numel() for p in self.prior.parameters())
        return {"layout": "own", "parameters": {"prior": count}}

    def load_weights(self, folder: Path) -> None:
        """Start from an export. Raises ValueError where it is none, or has other shapes."""
        own = {name: buffer.clone() for name, buffer in self.prior.named_buffers()}  # of this run's CLIP
        copy_weights(open_prior(folder / "prior").state_dict(), self.prior, folder)
        for name, buffer in self.prior.named_buffers():
            buffer.copy_(own[name])

    def flops_per_sample(self) -> float:
        """Of the prior's forward pass; the CLIP is not counted."""
        (_, _, length), config = self.prior.sizes, self.config
        tokens = length + 1 + config.components
        weights = config.layers * 12 * config.width**2  # of a block's four products of attention, and two of its MLP
        attended = config.layers * 2 * tokens * config.width
        return 2.0 * (tokens * (weights + attended) + config.components * config.width * config.buckets)

    def _nats(self, batch: Batch, dropout: bool) -> Tensor:
        told, embeddings = self.told(batch, dropout), self.embeddings(batch)
        dots = self.prior.quantise_dots((embeddings * told["embedding"]).sum(1))
        if dropout:  # without its caption, a sample is not told how well it agrees with it
            dropped = random.uniform(batch["seeds"], (), "dropout") < self.config.condition_dropout
            dots = torch.where(dropped, self.config.dot_buckets, dots)
        codes = self.prior.quantise(embeddings)
        return cross_entropy(self.prior(told, dots, codes).transpose(1, 2), codes, reduction="none").mean(1)


def save_network(prior: AutoregressivePriorNetwork, folder: Path) -> None:
    """Write a network for `open_prior`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": prior.config.model_dump(), "sizes": prior.sizes, "_class_name": "AutoregressivePrior"}
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in prior.state_dict().items()}, folder / _WEIGHTS)


def open_prior(folder: Path) -> AutoregressivePriorNetwork:
    """The network of a folder, in evaluation mode. Raises ValueError where there is none."""
    content = json.loads((folder / _CONFIG).read_text()) if (folder / _CONFIG).is_file() else {}
    if content.get("_class_name") != "AutoregressivePrior":
        raise ValueError(f"{folder} holds no autoregressive prior")
    config = AutoregressivePriorConfig.model_validate(content["config"])
    prior = AutoregressivePriorNetwork(config, *content["sizes"])
    prior.load_state_dict(load_file(folder / _WEIGHTS))
    return prior.eval()


def draw_embeddings(
    prior: AutoregressivePriorNetwork,
    told: Condition,
    nothing: Condition,
    seeds: Tensor,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Image embeddings for captions: unit vectors, float32 (batch, embedding_dim).

    Of the dot product the upper half of its buckets is asked for, as in the paper.

    Args:
        prior: the network.
        told, nothing: of the captions, and of the empty one (see `read_captions`); NOTHING where there is no guidance.
        seeds: int64 (batch,): an embedding depends on its caption and seed alone.
        guidance_scale: 1 is the conditional model; more moves the logits away from those without a caption.
    """
    count, config = len(seeds), prior.config
    upper = config.dot_buckets // 2
    dots = upper + random.integers(seeds, config.dot_buckets - upper, "dot product")
    guided = bool(nothing) and guidance_scale != 1
    before, mask = prior.prefix(told, dots)
    if guided:
        without, other = prior.prefix(nothing, torch.full_like(dots, config.dot_buckets))
        before, mask = torch.cat([without, before]), torch.cat([other, mask])
    draws = random.uniform(seeds, (config.components,), "codes")
    codes = torch.empty(count, config.components, dtype=torch.int64, device=seeds.device)
    cache, tokens = None, before
    for number in range(config.components):
        read = prior.transformer(inputs_embeds=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = read.past_key_values
        logits = prior.answer(read.last_hidden_state[:, -1]).float()
        if guided:
            free, bound = logits.chunk(2)
            logits = free + guidance_scale * (bound - free)
        shares = logits.double().softmax(1).cumsum(1)
        found = (shares < draws[:, number, None] * shares[:, -1:]).sum(1).clamp(max=config.buckets - 1)
        codes[:, number] = found
        tokens = prior.codes(found)[:, None].to(before.dtype).repeat(2 if guided else 1, 1, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return prior.embed(codes)
