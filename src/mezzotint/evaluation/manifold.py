"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020).

A set's manifold is the union of balls around its samples, each just reaching its k-th nearest other sample. Distances
are compared exactly, yet at the speed of matrix products: |a|² + |b|² − 2a·b in float32 decides wherever the bound on
its rounding error allows, and the few pairs that it cannot decide are summed as |a − b|² in float64. So copies lie on
the very edge of each other's balls, as they should, and nothing depends on the block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation.statistics import BLOCK, feature_pair

#: numbers gathered at a time for exact distances
GATHERED = 2**22
#: neighbours looked at beyond the k-th, which rounding may have put before it
SPARE = 5


def precision_recall(
    real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 3, *, block: int = 1024
) -> tuple[float, float]:
    """Share of `fake` (M, D) inside the manifold of `real` (N, D), and of `real` inside that of `fake` (eq. 1, 2).

    `block` rows of distances are held at a time. Raises `MezzotintError` when a set has no k-th neighbour (k samples
    or fewer), or on features that `feature_pair` refuses.
    """
    real_points, fake_points = _points(real, fake, k, block)
    real_radii, fake_radii = _radii(real_points, k, block), _radii(fake_points, k, block)
    covered_fake = torch.zeros(len(fake_points.rows), dtype=torch.bool, device=real_radii.device)
    covered_real = torch.zeros(len(real_points.rows), dtype=torch.bool, device=real_radii.device)
    for start, lower in _lower_bounds(fake_points, real_points, block):
        covered_fake[_inside(start, lower, fake_points, real_points, real_radii[None])[0]] = True
        radii = fake_radii[start : start + block, None]
        covered_real[_inside(start, lower, fake_points, real_points, radii)[1]] = True
    return covered_fake.double().mean().item(), covered_real.double().mean().item()


def density_coverage(
    real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int = 5, *, block: int = 1024
) -> tuple[float, float]:
    """Balls of `real` (N, D) that a sample of `fake` (M, D) lies in, over k; and share of them that hold a fake sample.

    Density may exceed 1; neither figure moves far for one outlier (Naeem et al., arXiv 2002.09797, section 3). Raises
    as `precision_recall`.
    """
    real_points, fake_points = _points(real, fake, k, block)
    radii = _radii(real_points, k, block)
    count = 0
    covered = torch.zeros(len(radii), dtype=torch.bool, device=radii.device)
    for start, lower in _lower_bounds(fake_points, real_points, block):
        balls = _inside(start, lower, fake_points, real_points, radii[None])[1]
        count += len(balls)
        covered[balls] = True
    return count / (k * len(fake_points.rows)), covered.double().mean().item()


@dataclass(frozen=True)
class _Points:
    """A set's rows (N, D) as given, and rounded to the products' type after a shift and a scale common to both sets.

    squares: |rounded row|² (N,). slack: (N,), such that |a|² + |b|² − 2a·b is within a's and b's slack of |a − b|².
    margin: the same, relative, for a distance squared, which may be rounded as well.
    """

    rows: Tensor
    rounded: Tensor
    squares: Tensor
    slack: Tensor
    scale: float
    margin: float


def _points(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, k: int, block: int) -> tuple[_Points, _Points]:
    if k < 1 or block < 1:
        raise MezzotintError(f"neighbours need k and block of at least 1, got k = {k}, block = {block}")
    sets = feature_pair(real, fake, at_least=k + 1)
    centre = sets[0].mean(0, dtype=torch.float64)  # near the origin, products lose least
    largest = max((part.double() - centre).square().sum(1).max().item() for s in sets for part in s.split(BLOCK))
    scale = largest**0.5 or 1.0

    def ready(rows: Tensor, dtype: torch.dtype) -> _Points:
        d, eps = rows.shape[1], torch.finfo(dtype).eps
        rounded = torch.cat([((part.double() - centre) / scale).to(dtype) for part in rows.split(BLOCK)])
        squares = torch.cat([part.double().square().sum(1) for part in rounded.split(BLOCK)]).to(dtype)
        # A sum of D products is off by D·eps/2·|a||b| at most (Higham 2002, section 3.1), and |a||b| ≤ (|a|² + |b|²)/2;
        # 16 eps are for rounding rows, squares and sums, 1e-30 for squares too small for the type.
        slack = (d / 2 + 16) * eps * squares + 1e-30
        margin = 8 * eps + 4 * d * torch.finfo(torch.float64).eps
        return _Points(rows, rounded, squares, slack, scale, margin)

    if sets[0].shape[1] <= 8192:  # beyond, the bound is too wide to decide much
        some = tuple(ready(rows[:256], torch.float32) for rows in sets)
        a, b = (points.rounded for points in some)
        # TF32 and bfloat16 modes, where they are on, break the bound: such products are noticed here.
        error = (2 * (a @ b.T) - 2 * (a.double() @ b.double().T)).abs()
        if (error <= 0.25 * (some[0].slack[:, None] + some[1].slack)).all():
            return ready(sets[0], torch.float32), ready(sets[1], torch.float32)
    return ready(sets[0], torch.float64), ready(sets[1], torch.float64)


def _lower_bounds(a: _Points, b: _Points, block: int) -> Iterator[tuple[int, Tensor]]:
    """Each block's start in `a`, and lower bounds (block, M) of its scaled squared distances to all of `b`."""
    least = b.squares - b.slack
    for start in range(0, len(a.rows), block):
        rows = slice(start, start + block)
        lower = torch.addmm(least[None], a.rounded[rows], b.rounded.T, alpha=-2)
        yield start, lower.add_((a.squares - a.slack)[rows, None])


def _radii(points: _Points, k: int, block: int) -> Tensor:
    """Exact distance float64 (N,) from each sample to its k-th nearest other one."""
    radii = []
    nearest = min(k + SPARE, len(points.rows) - 1)
    for start, lower in _lower_bounds(points, points, block):
        own = torch.arange(len(lower), device=lower.device)
        lower[own, start + own] = torch.inf
        bound, index = lower.topk(nearest, largest=False)
        upper = bound + 2 * (points.slack[start + own, None] + points.slack[index])
        possible = bound <= upper.kthvalue(k, dim=1, keepdim=True).values * (1 + points.margin)
        exact = torch.full(bound.shape, torch.inf, dtype=torch.float64, device=lower.device)
        exact[possible] = _exact(
            points.rows, (start + own)[:, None].expand_as(index)[possible], points.rows, index[possible]
        )
        radius = exact.kthvalue(k, dim=1).values
        # Where even the last one looked at is possible (copies), there may be more of them.
        crowded = possible[:, -1].nonzero()[:, 0] if nearest < len(points.rows) - 1 else own[:0]
        if len(crowded):
            rows = points.rows[start + crowded].double()
            radius[crowded] = _distances(rows, points.rows.double()).kthvalue(k + 1, dim=1).values  # its own 0 counts
        radii.append(radius)
    return torch.cat(radii)


def _inside(start: int, lower: Tensor, a: _Points, b: _Points, radii: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) whose distance is at most the radius, given as a row or a column beside `lower`."""
    limits = (radii / a.scale) ** 2
    i, j = (lower <= (limits * (1 + a.margin)).to(lower.dtype)).nonzero(as_tuple=True)
    upper = lower[i, j] + 2 * (a.slack[start + i] + b.slack[j])
    inside = upper <= (limits * (1 - a.margin)).expand(lower.shape)[i, j]
    unsure = ~inside
    exact = _exact(a.rows, start + i[unsure], b.rows, j[unsure])
    inside[unsure] = exact <= radii.expand(lower.shape)[i[unsure], j[unsure]]
    return start + i[inside], j[inside]


def _exact(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """Distances float64 (P,) of the pairs of rows a[i], b[j]."""
    step = max(1, GATHERED // a.shape[1])
    pairs = zip(i.split(step), j.split(step), strict=True)
    return torch.cat([_distances(a[x].double()[:, None], b[y].double()[:, None]).flatten() for x, y in pairs])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (…, N, M) as sums of squared differences: those of equal pairs are equal to the last bit."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
