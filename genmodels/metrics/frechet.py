"""The Fréchet (2-Wasserstein) distance of two Gaussians, as used by Heusel et al., "GANs Trained by a Two Time-Scale
Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017."""

from __future__ import annotations

import numpy as np


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Fréchet distance ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), never below zero.

    With Σ = L Lᵀ the last trace is the nuclear norm of L_aᵀ L_b (Dowson and Landau, 1982). No square root of a
    non-symmetric product is taken, so singular covariances are no special case.

    Args:
        mean_a, mean_b: float (dimensions,).
        cov_a, cov_b: float (dimensions, dimensions), symmetric and positive semi-definite.

    Raises ValueError where shapes differ or a value is not finite.
    """
    mean_a, mean_b, cov_a, cov_b = (np.asarray(x, dtype=np.float64) for x in (mean_a, mean_b, cov_a, cov_b))
    if mean_a.ndim != 1 or mean_a.shape != mean_b.shape or not cov_a.shape == cov_b.shape == (mean_a.size,) * 2:
        raise ValueError(f"shapes differ: {mean_a.shape}, {cov_a.shape} against {mean_b.shape}, {cov_b.shape}")
    if not all(np.isfinite(x).all() for x in (mean_a, mean_b, cov_a, cov_b)):
        raise ValueError("means and covariances must be finite")
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return max(float(distance), 0.0)  # rounding may leave -1e-15 for equal Gaussians


def _factor(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * np.sqrt(values.clip(min=0.0))


def sample_frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features `a` and `b`, float (samples ≥ 2, dimensions).

    Biased upwards by about 1/samples: compare at equal numbers of samples only.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (two samples or more, dimensions), not {a.shape} and {b.shape}")
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b)]
    return frechet_distance(a.mean(axis=0), covariances[0], b.mean(axis=0), covariances[1])
