"""A sample's seed, from (seed, lane, position), and the uniform numbers that the data path draws from it.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in numpy. `uniform` gives the same numbers as
`genmodels.random.uniform` without torch, whose import would cost each reading process seconds.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1

Seeds = NDArray[np.int64]


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def mix(*words: int) -> NDArray[np.uint64]:
    """One 64-bit word, shape (1,), that depends on all the given integers and on their order."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _hash((state ^ np.uint64(word & _WORD)) + _GOLDEN)
    return state


def sample_seeds(seed: int, lane: int, positions: NDArray[np.int64]) -> Seeds:
    """Seeds of the samples at `positions` (n,) of a lane's sequence, int64 (n,): equal at every world size."""
    counter = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return _hash(mix(seed, lane) + counter).view(np.int64)


def uniform(seeds: Seeds, purpose: str) -> NDArray[np.float64]:
    """Uniform on (0, 1), float64 (n,); another `purpose` ("crop_x", "flip", …) gives independent numbers."""
    tag = np.uint64(zlib.crc32(purpose.encode()) * 0x61C8864680B583EB % (1 << 62))
    derived = _hash(_hash(np.asarray(seeds).view(np.uint64) + _GOLDEN) ^ tag)
    bits = _hash(derived + _GOLDEN)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
