"""Figures from a classifier's probabilities."""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr


def inception_score(probabilities: np.ndarray) -> float:
    """exp E KL(p(y|x) ‖ p(y)): 1 for samples that all look alike to the classifier, K for K classes drawn evenly.

    Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016. It never sees real data: report it beside
    others, not alone.

    Args:
        probabilities: float (samples, classes), rows that sum to 1.

    Raises ValueError for another shape, or rows that do not sum to 1.

    >>> inception_score(np.eye(4))
    4.0
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"probabilities must be (samples, classes), not {probabilities.shape}")
    if (probabilities < 0).any() or not np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-4):
        raise ValueError("probabilities must be rows that sum to 1")
    divergence = rel_entr(probabilities, probabilities.mean(axis=0)).sum(axis=1)
    return float(np.exp(divergence.mean()))
