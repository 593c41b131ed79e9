"""Targets: what a network's output means.

Every target is a row (a, b) that stands for a·x + b·eps. Together with x_t = alpha·x + sigma·eps a prediction of one is
a 2×2 linear system in (x, eps), so a single solve turns any prediction into any other; there are no pairwise formulas.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest
from mezzotint.interpolants import Coefficients, Interpolant

Target = Literal["data", "noise", "velocity", "score", "v"]
TARGETS: tuple[Target, ...] = get_args(Target)


def row(target: Target, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(a, b) such that the target is a·x + b·eps.

    data x; noise eps; velocity alpha'·x + sigma'·eps (SiT); score −eps / sigma; v alpha·eps − sigma·x (Salimans and Ho
    2022).
    """
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    match target:
        case "data":
            return one, zero
        case "noise":
            return zero, one
        case "velocity":
            return c.d_alpha, c.d_sigma
        case "score":
            return zero, -1 / c.sigma
        case "v":
            return -c.sigma, c.alpha
    raise MezzotintError(f"target {target!r} is unknown; {closest(str(target), TARGETS)}")


def true_value(target: Target, x: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
    """a·x + b·eps: what a network with this target is trained to output."""
    match target:
        case "data":
            return x
        case "noise":
            return eps
    a, b = row(target, c)
    return a * x + b * eps


def conversion(source: Target, to: Target, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(k_x, k_p) such that `to` = k_x·x_t + k_p·(prediction of `source`): the 2×2 solve, once for all pairs.

    With rows (a, b) and (p, q) and the determinant alpha·b − sigma·a, solving for x and eps and substituting leaves
    k_x = (p·b − q·a) / det and k_p = (q·alpha − p·sigma) / det. Not finite where the conversion is singular.
    """
    (a, b), (p, q) = row(source, c), row(to, c)
    det = c.alpha * b - c.sigma * a
    return (p * b - q * a) / det, (q * c.alpha - p * c.sigma) / det


def convert(prediction: Tensor, x_t: Tensor, c: Coefficients, source: Target, to: Target) -> Tensor:
    """Turn a prediction of `source` at x_t into a prediction of `to`; c must broadcast against x_t."""
    if source == to:
        return prediction
    k_x, k_p = conversion(source, to, c)
    return k_x * x_t + k_p * prediction


def time_range(
    interpolant: Interpolant, source: Target, to: tuple[Target, ...], eps: float = 1e-3
) -> tuple[float, float]:
    """The largest [t_min, t_max] in [0, 1] on which `source` converts to every target in `to` with finite factors.

    An end at which a factor diverges (a score at t = 0, data from noise where alpha = 0, ...) is moved inwards by eps.
    """
    if not 0 < eps < 0.5:
        raise MezzotintError(f"the time margin eps must lie between 0 and 0.5, got {eps}")
    ends = interpolant.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    finite = torch.ones(2, dtype=torch.bool)
    for target in to:
        # Even where nothing is converted, the quantity itself may not exist at an end (a velocity with sigma' = inf).
        factors = row(target, ends) if target == source else conversion(source, target, ends)
        for factor in factors:
            finite &= factor.isfinite().reshape(2, -1).all(1)  # of a pyramid: at every level
    t_min = 0.0 if finite[0] else eps
    return max(t_min, interpolant.t_min), 1.0 if finite[1] else 1.0 - eps
