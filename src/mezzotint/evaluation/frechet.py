"""Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, arXiv 1706.08500).

The features give it its name: Inception's pooled ones make it FID, its spatial ones sFID, those of DINOv2 FD-DINOv2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation.statistics import FeatureStatistics, as_features, same_width
from mezzotint.randomness import check_seed

log = logging.getLogger("mezzotint")

#: rounding allowed in a distance, relative
TOLERANCE = 1e-6
#: negative eigenvalues of a covariance that count as rounding, relative to the largest: float32 files have 1e-7
NEGATIVE = 1e-6


def frechet_distance(
    real: Tensor | np.ndarray | FeatureStatistics, fake: Tensor | np.ndarray | FeatureStatistics
) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of the sets' means and unbiased covariances, in float64; 0 for equal sets.

    Each side is features (N, D), or their statistics. Small sets read too high (Chong and Forsyth 2020), so compare
    only figures from equally many samples; with N ≤ D the covariance is singular, which is computed exactly but
    warned of. Raises `MezzotintError` on features that `as_features` refuses, fewer than 2 samples, different widths,
    NaN or infinite statistics and a Σ with an eigenvalue below 0 beyond rounding.
    """
    gaussians = _gaussian(real, "real"), _gaussian(fake, "fake")
    for name, gaussian in zip(("real", "fake"), gaussians, strict=True):
        if gaussian.n is not None and gaussian.n <= len(gaussian.mean):
            log.warning(
                "%d %s samples leave the covariance of %d features singular, and the Fréchet distance far too high; "
                "compare it only with figures of as many samples",
                gaussian.n,
                name,
                len(gaussian.mean),
            )
    return _distance(*gaussians)


def frechet_distance_from_statistics(
    mean1: Tensor | np.ndarray, cov1: Tensor | np.ndarray, mean2: Tensor | np.ndarray, cov2: Tensor | np.ndarray
) -> float:
    """The same distance from means (D,) and symmetric positive semi-definite covariances (D, D)."""
    real, fake = (FeatureStatistics.from_arrays({"mu": m, "sigma": s}) for m, s in ((mean1, cov1), (mean2, cov2)))
    return frechet_distance(real, fake)


@dataclass(frozen=True)
class Extrapolation:
    """A line through distances (points,) at sample numbers `sizes`, over 1/N, and where it ends at N = ∞.

    standard_error: that of `value` from the fit's residuals. It tells how straight the line is, not how much another
    draw of all samples would change it: the sets at different N share samples.
    """

    value: float
    standard_error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_distance_infinity(
    real: Tensor | np.ndarray | FeatureStatistics,
    fake: Tensor | np.ndarray,
    *,
    points: int = 15,
    smallest: int = 5000,
    seed: int = 0,
) -> Extrapolation:
    """The Fréchet distance of infinitely many fake samples (FID∞; Chong and Forsyth 2020, arXiv 1911.07023).

    The distance's bias is proportional to 1/N. It is taken of random subsets of `fake` (N, D), at `points` sizes
    evenly spaced from `smallest` to N as in the paper, and the least-squares line over 1/N is read at 0. `real` keeps
    its size, and the bias from it. Raises `MezzotintError` as `frechet_distance` does, with fewer than 3 points, and
    unless 2 ≤ smallest < N.
    """
    fake = as_features(fake, "fake features", at_least=2)
    if points < 3:
        raise MezzotintError(f"a line and its error need at least 3 points, got {points}")
    if not 2 <= smallest < len(fake):
        raise MezzotintError(
            f"smallest must be at least 2 and below the {len(fake)} fake samples, got {smallest}; "
            "draw more samples or lower it"
        )
    reference = _gaussian(real, "real")
    generator = torch.Generator().manual_seed(check_seed(seed))
    sizes = np.linspace(smallest, len(fake), points).astype(int)
    distances = []
    for size in sizes.tolist():
        chosen = torch.randperm(len(fake), generator=generator)[:size].to(fake.device)
        distances.append(_distance(reference, _gaussian(fake[chosen], "fake")))
    x, y = 1 / sizes, np.array(distances)
    slope = ((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum()
    value = y.mean() - slope * x.mean()
    variance = ((y - value - slope * x) ** 2).sum() / (points - 2)
    error = (variance * (1 / points + x.mean() ** 2 / ((x - x.mean()) ** 2).sum())) ** 0.5
    return Extrapolation(float(value), float(error), tuple(sizes.tolist()), tuple(distances))


@dataclass(frozen=True)
class _Gaussian:
    """Mean (D,) and a root (r, D) of the covariance: rootᵀ·root = Σ, r ≥ rank Σ. n samples, None if unknown.

    log_det: log |det root| where the root is triangular, else None.
    """

    mean: Tensor
    root: Tensor
    n: int | None
    log_det: float | None = None


def _gaussian(source: Tensor | np.ndarray | FeatureStatistics, name: str) -> _Gaussian:
    if not isinstance(source, FeatureStatistics):
        features = as_features(source, f"{name} features", at_least=2)
        n, width = features.shape
        if n <= width:  # the centred rows are a root already: nothing is squared, so nothing is lost
            features = features.double()
            mean = features.mean(0)
            root = (features - mean) / (n - 1) ** 0.5
            _check_finite(mean, root, name)
            return _Gaussian(mean, root, n)
        source = FeatureStatistics.of(features)
    elif source.n is not None and source.n < 2:
        raise MezzotintError(f"{name} statistics hold {source.n} samples; at least 2 are needed")
    mean, cov = source.mean, source.covariance
    _check_finite(mean, cov, name)
    singular = source.n is not None and source.n <= len(cov)
    if not singular:
        lower, info = torch.linalg.cholesky_ex(cov)
        singular = bool(info)
    root = _singular_root(cov, source.n, name) if singular else lower.T
    # One product with a vector finds a failed factorisation at no cost.
    probe = torch.cos(torch.arange(len(cov), dtype=cov.dtype, device=cov.device))
    residual = torch.linalg.vector_norm(root.T @ (root @ probe) - cov @ probe)
    if not residual <= NEGATIVE * torch.linalg.matrix_norm(cov) * torch.linalg.vector_norm(probe):
        raise MezzotintError(f"no matrix root of the {name} covariance could be found; compute it anew, in float64")
    return _Gaussian(mean, root, source.n, None if singular else root.diagonal().log().sum().item())


def _check_finite(mean: Tensor, spread: Tensor, name: str) -> None:
    if not (mean.isfinite().all() and spread.isfinite().all()):
        raise MezzotintError(f"{name} statistics contain NaN or infinite values; look at the features they came from")


def _singular_root(cov: Tensor, n: int | None, name: str) -> Tensor:
    """The root √λ·vᵀ (r, D) of the r eigenvalues above rounding; it takes 60 times as long as Cholesky's."""
    d = len(cov)
    values, vectors = torch.linalg.eigh(cov)
    bottom, top = values[0].item(), values[-1].item()
    if bottom < -NEGATIVE * max(top, 0):
        raise MezzotintError(
            f"{name} covariance has an eigenvalue of {bottom:.3g} beside a largest of {top:.3g}, but no variance is "
            "negative; compute it anew from the features"
        )
    # The eigenvalues below 0 tell how large rounding made those that should be 0. n samples span n − 1 directions.
    keep = values > max(d * torch.finfo(cov.dtype).eps * top, -bottom)
    if n is not None:
        keep[: max(0, d - n + 1)] = False
    return values[keep].sqrt()[:, None] * vectors[:, keep].T


def _distance(a: _Gaussian, b: _Gaussian) -> float:
    """The distance; its cross term tr (Σ₁Σ₂)^½ is the sum of the singular values s of R₁R₂ᵀ, Rᵢ the roots.

    s² are eigenvalues of a symmetric matrix, which are found 3 times as fast. But rounding shifts each by about the
    same δ, hence s by δ/2s, which the distance of near-equal sets may show. The sum of log s², moved by Σ δ/s², is
    known from the determinants, and tells δ; where 100 times the error that follows could be seen, and for singular
    covariances, the singular values themselves are computed.
    """
    same_width(len(a.mean), len(b.mean))
    mean, root = b.mean.to(a.mean), b.root.to(a.root)
    product = a.root @ root.T
    rest = ((a.mean - mean).square().sum() + a.root.square().sum() + root.square().sum()).item()
    if a.log_det is not None and b.log_det is not None:
        squares = torch.linalg.eigvalsh(product @ product.T).clamp(min=0)
        s = squares.sqrt()
        distance = rest - 2 * s.sum().item()
        delta = abs(squares.log().sum() - 2 * (a.log_det + b.log_det)) / (1 / squares).sum()
        if 100 * (delta / s).sum() <= TOLERANCE * distance:  # not so for NaN, from an s of 0
            return distance
    return max(0.0, rest - 2 * torch.linalg.svdvals(product).sum().item())
