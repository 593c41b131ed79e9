"""Probability-flow ODE solvers, dx = v(x, t) dt from noise to data (SiT, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mezzotint.denoiser import Model


def euler(model: Model, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Euler's method: one evaluation a step, first order."""
    for t, s in pairwise(times):
        x = x + (s - t) * model(x, t).velocity
        yield x


def heun(model: Model, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Heun's method: two evaluations a step, second order."""
    for t, s in pairwise(times):
        h = s - t
        k1 = model(x, t).velocity
        k2 = model(x + h * k1, s).velocity
        x = x + h / 2 * (k1 + k2)
        yield x


def rk4(model: Model, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """The classical Runge-Kutta method: four evaluations a step, fourth order."""
    for t, s in pairwise(times):
        h, middle = s - t, (t + s) / 2
        k1 = model(x, t).velocity
        k2 = model(x + h / 2 * k1, middle).velocity
        k3 = model(x + h / 2 * k2, middle).velocity
        k4 = model(x + h * k3, s).velocity
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield x


def dopri5(
    model: Model, x: Tensor, times: Sequence[float], *, rtol: float = 1e-3, atol: float = 1e-6
) -> Iterator[Tensor]:
    """Adaptive Dormand-Prince 5(4) through torchdiffeq; rtol and atol as SiT's. Yields the states at times[1:].

    The step is chosen for the batch as a whole, so a sample depends (within the tolerance) on its batch.
    """
    from torchdiffeq import odeint

    def velocity(t: Tensor, state: Tensor) -> Tensor:
        return model(state, t.item()).velocity

    grid = torch.tensor(list(times), dtype=torch.float64, device=x.device)
    yield from odeint(velocity, x, grid, rtol=rtol, atol=atol, method="dopri5")[1:]
