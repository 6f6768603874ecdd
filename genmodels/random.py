"""Random numbers that depend on a sample's seed alone: not on the batch it is in, the rank, or the device.

A counter-based generator: the n-th number of a sample is a hash of (seed, purpose, n), by the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). So a sample draws the same
noise at every world size and micro-batch size, and a picture depends on its prompt and seed only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64 shifts of torch keep the sign


def _hash(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def derive_seeds(seeds: Tensor, purpose: str) -> Tensor:
    """Independent seeds for a purpose ("noise", "timesteps", …). seeds: int64 (batch,); returns int64 (batch,)."""
    return _hash(_hash(seeds + _GOLDEN) ^ (zlib.crc32(purpose.encode()) * -_GOLDEN % (1 << 62)))


def _uniform64(seeds: Tensor, shape: Sequence[int], purpose: str) -> Tensor:
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    bits = _hash(derive_seeds(seeds, purpose)[:, None] + counter[None, :])
    return ((_shift_right(bits, 11).double() + 0.5) * 2.0**-53).reshape(len(seeds), *shape)


def uniform(seeds: Tensor, shape: Sequence[int] = (), purpose: str = "uniform") -> Tensor:
    """Uniform on (0, 1), float64 (batch, *shape)."""
    return _uniform64(seeds, shape, purpose)


def normal(seeds: Tensor, shape: Sequence[int], purpose: str = "noise", dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, (batch, *shape), by Box and Muller.

    >>> normal(torch.tensor([7, 8]), (2,)).equal(torch.cat([normal(torch.tensor([s]), (2,)) for s in (7, 8)]))
    True
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    u = _uniform64(seeds, (2, half), purpose)
    radius, angle = (-2.0 * u[:, 0].log()).sqrt(), (2.0 * math.pi) * u[:, 1]
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
    return z.reshape(len(seeds), *shape).to(dtype)


def integers(seeds: Tensor, high: int, purpose: str = "timesteps") -> Tensor:
    """Uniform on 0 … high-1, int64 (batch,)."""
    return (uniform(seeds, (), purpose) * high).long().clamp_(max=high - 1)
