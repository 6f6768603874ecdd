"""The Fréchet (2-Wasserstein) distance of two Gaussians, as used by Heusel et al., "GANs Trained by a Two Time-Scale
Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh
from scipy.linalg.blas import dsyrk

from genmodels.metrics.intervals import Interval, jackknife, random_blocks

_ROWS = 4096  # of features that are made float64 at once
_WIDE = 512  # dimensions; above, each distance costs seconds


@dataclass
class FeatureSums:
    """Number, sum and sum of outer products of features: all that the Fréchet distance needs to know of a set.

    Sums of disjoint parts add up to those of the whole (`a + b`, or `a - b` to leave a part out), so parts can be
    summed anywhere. All in float64.

    Attributes:
        count: of samples.
        total: their sum, (dimensions,).
        outer: the sum of their outer products, (dimensions, dimensions); only the upper triangle is kept.
    """

    count: int
    total: np.ndarray
    outer: np.ndarray

    @staticmethod
    def zero(dimensions: int) -> FeatureSums:
        """Of no samples."""
        return FeatureSums(0, np.zeros(dimensions), np.zeros((dimensions, dimensions), order="F"))

    @staticmethod
    def of(features: np.ndarray) -> FeatureSums:
        """Of `features`, (samples, dimensions)."""
        features = np.asarray(features)
        if features.ndim != 2:
            raise ValueError(f"features must be (samples, dimensions), not {features.shape}")
        return FeatureSums.zero(features.shape[1]).add(features)

    def add(self, features: np.ndarray) -> FeatureSums:
        """Add samples, (samples, dimensions), in place; memory does not grow. Raises ValueError for NaN or infinity."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise ValueError(f"features must be (samples, {len(self.total)}), not {features.shape}")
        for start in range(0, len(features), _ROWS):
            rows = np.ascontiguousarray(features[start : start + _ROWS], dtype=np.float64)
            if not np.isfinite(rows).all():
                raise ValueError("features hold NaN or infinity")
            # Half the work of a product: the sum of outer products is symmetric.
            self.outer = dsyrk(1.0, rows.T, beta=1.0, c=self.outer, overwrite_c=1)
            self.total = self.total + rows.sum(axis=0)
            self.count += len(rows)
        return self

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def gaussian(self) -> Gaussian:
        """The Gaussian with their mean and (unbiased) covariance. Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a Gaussian needs two samples or more, not {self.count}")
        mean = self.total / self.count
        upper = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, np.triu(upper) + np.triu(upper, 1).T)


def total(parts: Iterable[FeatureSums]) -> FeatureSums:
    """The sum of one part or more."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


class Gaussian:
    """Mean and covariance, and a factor L of the covariance, Σ = L Lᵀ, found when it is first asked for.

    Args:
        mean: float (dimensions,).
        covariance: float (dimensions, dimensions), symmetric and positive semi-definite.

    Raises ValueError where shapes do not fit or a value is not finite.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        self.mean, self.covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
        if self.mean.ndim != 1 or self.covariance.shape != (self.mean.size,) * 2:
            raise ValueError(f"shapes differ: {self.mean.shape}, {self.covariance.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("means and covariances must be finite")
        self._factor: np.ndarray | None = None

    @property
    def factor(self) -> np.ndarray:
        if self._factor is None:
            values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
            self._factor = vectors * np.sqrt(values.clip(min=0.0))
        return self._factor

    def distance(self, other: Gaussian) -> float:
        """Squared Fréchet distance ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), never below zero.

        With Σ = L Lᵀ the last trace is the nuclear norm of L_aᵀ L_b (Dowson and Landau, 1982). No square root of a
        non-symmetric product is taken, so singular covariances are no special case.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"shapes differ: {self.mean.shape} against {other.mean.shape}")
        cross = np.linalg.svd(self.factor.T @ other.factor, compute_uv=False).sum()
        traces = np.trace(self.covariance) + np.trace(other.covariance)
        distance = np.square(self.mean - other.mean).sum() + traces - 2.0 * cross
        return max(float(distance), 0.0)  # rounding may leave -1e-15 for equal Gaussians

    def quick_distance(self, covered: Gaussian) -> float:
        """The distance to `covered` from eigenvalues alone: several times as fast where one Gaussian is asked for many.

        The trace of (Σ_a Σ_b)^½ is the sum of the roots of the eigenvalues of L_aᵀ Σ_b L_a. Roots of what is rounded to
        nearly zero keep half the digits: for differences of distances, as `jackknife` takes them.
        """
        if self.mean.shape != covered.mean.shape:
            raise ValueError(f"shapes differ: {self.mean.shape} against {covered.mean.shape}")
        roots = np.sqrt(eigvalsh(self.factor.T @ covered.covariance @ self.factor, check_finite=False).clip(min=0.0))
        traces = np.trace(self.covariance) + np.trace(covered.covariance)
        return float(np.square(self.mean - covered.mean).sum() + traces - 2.0 * roots.sum())


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians given by means and covariances: see `Gaussian.distance`."""
    return Gaussian(mean_a, cov_a).distance(Gaussian(mean_b, cov_b))


def sample_frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features `a` and `b`, float (samples ≥ 2, dimensions).

    Biased upwards by about 1/samples: compare at equal numbers of samples only.
    """
    return FeatureSums.of(a).gaussian().distance(FeatureSums.of(b).gaussian())


def frechet_interval(features: np.ndarray, real: Gaussian, blocks: int | None = None) -> Interval:
    """The Fréchet distance to a Gaussian, its bias of order 1/samples taken off, by leaving blocks out in turn.

    Args:
        features: float (samples, dimensions).
        real: what real features are like.
        blocks: 2 to 50; as many as there are samples at most [20, or 10 where a distance costs seconds].
    """
    blocks = blocks or min(20 if features.shape[1] <= _WIDE else 10, len(features) // 2)
    parts = [FeatureSums.of(features[rows]) for rows in random_blocks(len(features), blocks)]
    whole = total(parts)
    without = [real.quick_distance((whole - part).gaussian()) for part in parts]
    found, exact = jackknife(real.quick_distance(whole.gaussian()), without), whole.gaussian().distance(real)
    rounding = exact - found.bias - found.value  # of the quick distances, the same in all of them
    return Interval(found.value + rounding, found.low + rounding, found.high + rounding, found.bias)
