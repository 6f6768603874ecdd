"""A codebook that follows its data: van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genmodels import random


class Quantised(NamedTuple):
    """Latents (batch, channels, height, width) on the codebook, the codes (batch, height, width) that they are, and the
    commitment loss (batch,)."""

    latents: Tensor
    codes: Tensor
    commitment: Tensor


class VectorQuantiser(nn.Module):
    """Replaces each latent vector by the nearest code; the codes are running means of what they replace (appendix A.1).

    The codebook is no parameter but a buffer, the same on all ranks: `update` sums over them. It begins with latents of
    the first batch. Codes that are hardly used are put on latents of the present batch (Dhariwal et al., "Jukebox",
    2020, section 3.1).

    Args:
        size: codes.
        channels: features of a latent vector.
        decay: share of the old means kept at each update.
        revive_below: a code is put elsewhere when it is used less than this share of an even use.
    """

    codebook: Tensor  # (size, channels)
    usage: Tensor  # (size,): running mean of how often each code is used in a batch
    totals: Tensor  # (size, channels): running mean of the sums of what each replaces

    def __init__(self, size: int, channels: int, decay: float = 0.99, revive_below: float = 0.03) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("codebook", torch.randn(size, channels))
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("totals", torch.zeros(size, channels))

    def restart(self) -> None:
        """Take the codebook as it is for the running means, evenly used: after it was loaded."""
        self.usage.fill_(1.0)
        self.totals.copy_(self.codebook)

    def forward(self, latents: Tensor) -> Quantised:
        """Quantise; the gradient at what comes out is that at `latents` (straight-through)."""
        vectors = latents.float().permute(0, 2, 3, 1)  # (batch, height, width, channels)
        codes = torch.cdist(vectors.flatten(0, 2).detach(), self.codebook).argmin(1).view(vectors.shape[:3])
        nearest = self.codebook[codes]
        commitment = (vectors - nearest).square().flatten(1).mean(1)
        through = vectors + (nearest - vectors).detach()
        return Quantised(through.permute(0, 3, 1, 2).to(latents.dtype), codes, commitment)

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor, weight: Tensor, step: int) -> Tensor:
        """Move the codes towards what they replaced. Collective: every rank calls it with as many samples.

        Args:
            latents: (batch, channels, height, width), before they were quantised.
            codes: (batch, height, width), of `forward`.
            weight: (batch,), 0 for samples that do not count.
            step: of the training; what is drawn at random follows from it.

        Returns:
            The perplexity of the batch over all ranks: how many codes an even use would have been spread over.
        """
        vectors = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        counts = weight.float().repeat_interleave(codes[0].numel())
        used = torch.zeros_like(self.usage).index_add_(0, codes.flatten(), counts)
        sums = torch.zeros_like(self.totals).index_add_(0, codes.flatten(), counts[:, None] * vectors)
        for total in (used, sums):
            if dist.is_initialized():
                dist.all_reduce(total)
        share = used / used.sum().clamp(min=1)
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
        if not sums.isfinite().all() or not used.any():  # the same on all ranks; such a step trains nothing else either
            return perplexity
        keep = self.decay if self.usage.any() else 0.0
        self.usage.mul_(keep).add_(used, alpha=1 - keep)
        self.totals.mul_(keep).add_(sums, alpha=1 - keep)
        seen = self.usage > 1e-6
        self.codebook[seen] = self.totals[seen] / self.usage[seen, None]
        self._revive(vectors, counts, step)
        return perplexity

    def _revive(self, vectors: Tensor, counts: Tensor, step: int) -> None:
        even = self.usage.mean()
        dead = self.usage < self.revive_below * even
        if not dead.any():
            return
        candidates = torch.cat(_from_all_ranks(vectors))[torch.cat(_from_all_ranks(counts)) > 0]
        seed = torch.tensor([step], device=vectors.device)
        drawn = random.uniform(seed, (int(dead.sum()),), "revived codes")[0]
        self.codebook[dead] = candidates[(drawn * len(candidates)).long().clamp_(max=len(candidates) - 1)]
        self.usage[dead] = even
        self.totals[dead] = even * self.codebook[dead]


def _from_all_ranks(own: Tensor) -> list[Tensor]:
    if not dist.is_initialized():
        return [own]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.contiguous())
    return found
