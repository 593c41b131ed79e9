"""Multistep exponential integrators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mezzotint.denoiser import Model


def dpm_solver_pp_2m(model: Model, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in one evaluation a step, for any interpolant.

    The step that ends at t = 0, where log SNR is infinite, and the first one are of first order.
    """
    spread = model.interpolant.spread
    previous: Tensor | None = None
    h_previous = torch.tensor(torch.inf, dtype=torch.float64)
    for t, s in pairwise(times):
        now, then = (model.interpolant.at(torch.tensor(u, dtype=torch.float64)) for u in (t, s))
        data = model(x, t).data
        h = (then.alpha / then.sigma).log() - (now.alpha / now.sigma).log()
        estimate = data
        if previous is not None and s > 0:
            # Linear extrapolation of the data prediction in log SNR to the middle of the step.
            estimate = previous + spread(1 + h / (2 * h_previous), x) * (data - previous)
        x = spread(then.sigma / now.sigma, x) * x - spread(then.alpha * torch.expm1(-h), x) * estimate
        previous, h_previous = data, h
        yield x
