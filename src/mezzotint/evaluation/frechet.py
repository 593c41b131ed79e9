"""Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError


def frechet_distance(real: Tensor | np.ndarray, fake: Tensor | np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of the sets' means and unbiased covariances, in float64; 0 for equal sets.

    `real` is (N, D) and `fake` (M, D); N or M may be below D. Small sets read too high, so compare
    only figures from equally many samples. Raises `MezzotintError` on features that `feature_pair` refuses.
    """
    real, fake = feature_pair(real, fake, at_least=2)
    return frechet_distance_from_statistics(real.mean(0), _covariance(real), fake.mean(0), _covariance(fake))


def frechet_distance_from_statistics(
    mean1: Tensor | np.ndarray, cov1: Tensor | np.ndarray, mean2: Tensor | np.ndarray, cov2: Tensor | np.ndarray
) -> float:
    """The same distance from means (D,) and symmetric positive semi-definite covariances (D, D).

    Raises `MezzotintError` where the shapes do not fit together or a value is NaN or infinite.
    """
    mean1, cov1, mean2, cov2 = (_float64(statistic) for statistic in (mean1, cov1, mean2, cov2))
    shapes = [tuple(statistic.shape) for statistic in (mean1, cov1, mean2, cov2)]
    d = mean1.numel()
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise MezzotintError(f"Fréchet statistics must be shaped (D,), (D, D), (D,), (D, D) with one D, got {shapes}")
    if not all(statistic.isfinite().all() for statistic in (mean1, cov1, mean2, cov2)):
        raise MezzotintError("Fréchet statistics contain NaN or infinite values; look at the features they came from")
    # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½ = the sum of the singular values of Σ₁^½ Σ₂^½. The last form takes no root of
    # the product's eigenvalues, whose rounding (1e-16) would become 1e-8 in each direction without variance.
    cross = torch.linalg.matrix_norm(_square_root(cov1) @ _square_root(cov2), ord="nuc")
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, distance.item())


def feature_pair(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Both sets as detached float64 tensors (N, D) and (M, D) on the device of `real`.

    Raises `MezzotintError` unless both are 2-D, finite, equally wide and hold `at_least` samples each.
    """
    real = _float64(real)
    fake = _float64(fake).to(real.device)
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2:
            raise MezzotintError(f"{name} features must be 2-D (samples, width), got shape {tuple(features.shape)}")
        if len(features) < at_least:
            raise MezzotintError(f"{name} features hold {len(features)} samples; at least {at_least} are needed")
        if not features.isfinite().all():
            raise MezzotintError(f"{name} features contain NaN or infinite values; look at the images they came from")
    if real.shape[1] != fake.shape[1]:
        raise MezzotintError(
            f"real features are {real.shape[1]} wide and fake ones {fake.shape[1]}; extract both in the same way"
        )
    return real, fake


def _float64(values: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(values).detach().to(torch.float64)


def _covariance(features: Tensor) -> Tensor:
    """Unbiased covariance (D, D) of (N, D); `torch.cov` drops both axes when D is 1."""
    d = features.shape[1]
    return torch.cov(features.T).reshape(d, d)


def _square_root(cov: Tensor) -> Tensor:
    """Symmetric root of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
