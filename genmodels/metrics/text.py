"""How well pictures and sentences fit, in the common space of an image and a text encoder."""

from __future__ import annotations

import numpy as np

_ROWS = 2048  # whose similarities to all others are held at once


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 · max(cos, 0) of each picture and its own sentence (Hessel et al. 2021, without its factor of 2.5); (n,).

    Args:
        images, texts: embeddings, float (n, dimensions), row by row of the same pair; of any length.
    """
    images, texts = _unit(images, texts)
    return 100.0 * np.clip((images * texts).sum(axis=1), 0.0, None)


def retrieval_recall(images: np.ndarray, texts: np.ndarray, k: int = 1) -> tuple[float, float]:
    """How often a picture's own sentence is among the k nearest of all, and a sentence's own picture; shares 0 … 1.

    Equal similarities count against: of n equal sentences each is found with rank n.

    Args:
        images, texts: as for `clip_scores`.
        k: 1 … n.
    """
    images, texts = _unit(images, texts)
    if not 1 <= k <= len(images):
        raise ValueError(f"k must be between 1 and {len(images)}, not {k}")
    return _recall(images, texts, k), _recall(texts, images, k)


def _recall(queries: np.ndarray, answers: np.ndarray, k: int) -> float:
    found = 0
    for start in range(0, len(queries), _ROWS):
        similarity = queries[start : start + _ROWS] @ answers.T
        own = similarity[np.arange(len(similarity)), start + np.arange(len(similarity))]
        found += int(((similarity >= own[:, None]).sum(axis=1) <= k).sum())
    return found / len(queries)


def _unit(images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, texts = (np.asarray(x, dtype=np.float64) for x in (images, texts))
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise ValueError(f"embeddings must be (pairs, dimensions) and of one shape: {images.shape} and {texts.shape}")
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    if not all(np.isfinite(length).all() and (length > 0).all() for length in lengths):
        raise ValueError("embeddings hold NaN, infinity, or a vector of length 0")
    return images / lengths[0], texts / lengths[1]
