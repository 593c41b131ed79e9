"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation.frechet import feature_pair


def precision_recall(
    real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 3, *, block: int = 1024
) -> tuple[float, float]:
    """Share of `fake` (M, D) inside the manifold of `real` (N, D), and share of `real` inside that of `fake`.

    A set's manifold is the union of balls around its samples, each just reaching its k-th nearest other sample (eq. 1).
    `block` rows of distances are held at a time; the result does not depend on it. Raises `MezzotintError` when a set
    has no k-th neighbour (k samples or fewer), or on features that `feature_pair` refuses.
    """
    if k < 1 or block < 1:
        raise MezzotintError(f"precision and recall need k and block of at least 1, got k = {k}, block = {block}")
    real, fake = feature_pair(real, fake, at_least=k + 1)
    real_radii, fake_radii = _radii(real, k, block), _radii(fake, k, block)
    covered_fake = 0
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(fake.split(block), fake_radii.split(block), strict=True):
        distances = _distances(rows, real)
        covered_fake += int((distances <= real_radii).any(1).sum())
        covered_real |= (distances <= radii[:, None]).any(0)
    return covered_fake / len(fake), int(covered_real.sum()) / len(real)


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Distance (N,) from each sample to its k-th nearest other one: the (k + 1)-th smallest, as its own 0 counts."""
    return torch.cat([_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(block)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M), as sums of squared differences.

    The faster |a|² + |b|² − 2ab rounds differently in every block, which decides ties (copies, quantised pixels) by
    chance; summed directly, equal pairs are equal to the last bit.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
