"""What all ranks have of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor


def global_batch(own: Tensor) -> tuple[Tensor, int]:
    """Values of all ranks, (samples, …), in the order of the global batch, and where this rank's part of it begins.

    `own` is of equal length on all ranks. Collective; no gradient runs through it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own, 0
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts), dist.get_rank() * len(own)


def differentiable_global_batch(own: Tensor) -> Tensor:
    """The values that `global_batch` gives; gradients reach each rank's own. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    rank, count = dist.get_rank(), len(own)
    before, after = rank * count, (dist.get_world_size() - 1 - rank) * count
    zeros = [own.new_zeros(rows, *own.shape[1:]) for rows in (before, after)]
    return collectives.all_reduce(torch.cat([zeros[0], own, zeros[1]]))
