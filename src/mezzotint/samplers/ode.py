"""Probability-flow ODE solvers, dx = v(x, t) dt from noise to data (SiT, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from mezzotint.denoiser import Model
from mezzotint.errors import MezzotintError

State = TypeVar("State", Tensor, tuple[Tensor, Tensor])


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
    yield from integrate(lambda t, state: model(state, t).velocity, x, times, rtol=rtol, atol=atol)[1:]


def integrate(
    slope: Callable[[float, State], State], start: State, times: Sequence[float], *, rtol: float, atol: float
) -> State:
    """Solve d state / dt = slope(t, state) by dopri5, asking no t outside `times`; the states at those, stacked.

    Raises `MezzotintError` where no step is small enough, as where the slope is NaN.
    """
    from torchdiffeq import odeint

    low, high = sorted((times[0], times[-1]))
    device = start.device if isinstance(start, Tensor) else start[0].device
    grid = torch.tensor(times, dtype=torch.float64, device=device)

    # Left alone, the solver steps past the end, where a path may not exist, and interpolates back: step_t ends a step
    # there. The clamp is for the trial evaluation that chooses its first step, and for float32's rounding of t.
    def inside(t: Tensor, state: State) -> State:
        return slope(min(max(t.item(), low), high), state)

    try:
        return odeint(inside, start, grid, rtol=rtol, atol=atol, method="dopri5", options={"step_t": grid[-1:]})
    except AssertionError as error:  # the solver's word for steps that have become too small, and for NaN
        raise MezzotintError(
            f"dopri5 came to no end ({error}); look for NaN in the model's weights, or raise rtol and atol"
        ) from None
