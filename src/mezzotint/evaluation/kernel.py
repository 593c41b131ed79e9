"""Kernel distance between two feature sets (KID; Bińkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation.statistics import feature_pair
from mezzotint.randomness import check_seed


def kernel_distance(
    real: Tensor | np.ndarray,
    fake: Tensor | np.ndarray,
    *,
    subsets: int | None = 100,
    subset_size: int = 1000,
    seed: int = 0,
    block: int = 1024,
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the kernel (x·y/D + 1)³, in float64, and its standard error.

    The mean over `subsets` random pairs of `subset_size` of the features (N, D) and (M, D), drawn without replacement;
    its error is their deviation over √subsets, as though they shared no samples (other tools print the deviation). With
    subsets=None it is one estimate from all features, more exact and as unbiased, and its error that of the first-order
    term, good where the sets differ. Both may be below 0 for like sets. `block` rows of the kernel are held at a time.

    Raises `MezzotintError` on features that `feature_pair` refuses, with fewer than 2 samples or subsets, and with
    subsets larger than a set.
    """
    real, fake = feature_pair(real, fake, at_least=2)
    if subsets is None:
        return _discrepancy(real, fake, block)
    if subsets < 2 or subset_size < 2:
        raise MezzotintError(f"subsets and subset_size must be at least 2, got {subsets} and {subset_size}")
    for name, features in (("real", real), ("fake", fake)):
        if subset_size > len(features):
            raise MezzotintError(
                f"subset_size {subset_size} is above the number of {name} samples, {len(features)}; lower it, or pass "
                "subsets=None for one estimate from all"
            )
    generator = torch.Generator().manual_seed(check_seed(seed))

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]

    values = np.array([_discrepancy(draw(real), draw(fake), block)[0] for _ in range(subsets)])
    return float(values.mean()), float(values.std(ddof=1) / subsets**0.5)


def _discrepancy(x: Tensor, y: Tensor, block: int) -> tuple[float, float]:
    """The estimate from all pairs of x (N, D) and y (M, D), and its first-order standard error."""
    x, y = (values.double() / values.shape[1] ** 0.5 for values in (x, y))
    n, m = len(x), len(y)
    to_y, from_x = _kernel_sums(x, y, block)
    within = [
        (_kernel_sums(values, values, block)[0] - (values.square().sum(1) + 1) ** 3) / (len(values) - 1)
        for values in (x, y)
    ]
    estimate = within[0].mean() + within[1].mean() - 2 * to_y.sum() / (n * m)
    # Hoeffding's first projection: what a sample adds, apart from its pairing with particular others.
    variance = 4 * ((within[0] - to_y / m).var() / n + (within[1] - from_x / n).var() / m)
    return estimate.item(), variance.sqrt().item()


def _kernel_sums(x: Tensor, y: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Sums (N,) and (M,) of (x·y + 1)³ over the other set."""
    rows, columns = [], torch.zeros(len(y), dtype=y.dtype, device=y.device)
    for part in x.split(block):
        kernel = (part @ y.T).add_(1)
        kernel *= kernel.square()
        rows.append(kernel.sum(1))
        columns += kernel.sum(0)
    return torch.cat(rows), columns
