"""What all ranks have of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
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
