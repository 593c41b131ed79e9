"""Reverse-time SDE solvers, dX = v dt − ½ w s dt + √w dW̄, with any w(t) chosen at sampling time (SiT, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mezzotint.denoiser import Model
from mezzotint.interpolants import Coefficients
from mezzotint.samplers.noise import Generators, randn_like

LastStep = Literal["mean", "tweedie", "euler", "none"]

#: w(t), before `scale`, from alpha, sigma, their derivatives and t. SiT's public code gives these names to w / 2 (but
#: halves SBDM's, so that form is w here and there), in reversed time: its "decreasing" is `increasing` here.
DIFFUSIONS: dict[str, Callable[[Coefficients, Tensor], Tensor]] = {
    "constant": lambda c, t: torch.ones_like(t),
    "sigma": lambda c, t: c.sigma,
    "linear": lambda c, t: t,
    # the forward SDE's own: 2(sigma·sigma' − alpha'·sigma² / alpha)
    "sbdm": lambda c, t: 2 * (c.sigma * c.d_sigma - c.d_alpha / c.alpha * c.sigma**2),
    "sin2": lambda c, t: torch.sin(math.pi * t) ** 2,
    "increasing": lambda c, t: (1 - torch.cos(math.pi * t)) ** 2 / 4,
    "decreasing": lambda c, t: (1 + torch.cos(math.pi * t)) ** 2 / 4,
}


class ReverseSDE:
    """Drift and diffusion of a model's reverse SDE, for w(t) = scale·DIFFUSIONS[name](t)."""

    def __init__(self, model: Model, diffusion: str = "sigma", scale: float = 1.0) -> None:
        self.model, self.name, self.scale = model, diffusion, scale

    def w(self, t: float) -> Tensor:
        """w(t) >= 0 in float64, a scalar (of a pyramid: one for each level)."""
        time = torch.tensor(t, dtype=torch.float64)
        return self.scale * DIFFUSIONS[self.name](self.model.interpolant.at(time), time)

    def drift(self, x: Tensor, t: float) -> Tensor:
        """v − ½ w s, the drift in t (so a step towards data subtracts it)."""
        prediction = self.model(x, t)
        return prediction.velocity - self.model.interpolant.spread(self.w(t), x) / 2 * prediction.score

    def noise(self, x: Tensor, t: float, h: float, generator: Generators) -> Tensor:
        """What a step of size h adds to x: √(w h) dW."""
        return self.model.interpolant.spread((self.w(t) * h).sqrt(), x) * randn_like(x, generator)


def euler_maruyama(
    model: Model,
    x: Tensor,
    times: Sequence[float],
    *,
    generator: Generators,
    diffusion: str = "sigma",
    scale: float = 1.0,
    last_step: LastStep = "mean",
) -> Iterator[Tensor]:
    """Euler-Maruyama, one evaluation a step; the last is replaced by `last_step` (none: it is like the others)."""
    sde = ReverseSDE(model, diffusion, scale)
    for t, s in pairwise(times if last_step == "none" else times[:-1]):
        h = t - s
        x = x - h * sde.drift(x, t) + sde.noise(x, t, h, generator)
        yield x
    if last_step != "none":
        yield finish(sde, x, times[-2], times[-1], last_step)


def stochastic_heun(
    model: Model,
    x: Tensor,
    times: Sequence[float],
    *,
    generator: Generators,
    diffusion: str = "sigma",
    scale: float = 1.0,
    last_step: LastStep = "mean",
) -> Iterator[Tensor]:
    """SiT's stochastic Heun: add the step's noise, then one Heun step of the drift; two evaluations a step."""
    sde = ReverseSDE(model, diffusion, scale)
    for t, s in pairwise(times if last_step == "none" else times[:-1]):
        h = t - s
        x = x + sde.noise(x, t, h, generator)
        k1 = sde.drift(x, t)
        k2 = sde.drift(x - h * k1, s)
        x = x - h / 2 * (k1 + k2)
        yield x
    if last_step != "none":
        yield finish(sde, x, times[-2], times[-1], last_step)


def finish(sde: ReverseSDE, x: Tensor, t: float, s: float, last_step: LastStep) -> Tensor:
    """The last step, from t to s = 0, without noise (SiT, appendix): drift only, posterior mean or ODE step."""
    match last_step:
        case "tweedie":
            return sde.model(x, t).data
        case "euler":
            return x - (t - s) * sde.model(x, t).velocity
    return x - (t - s) * sde.drift(x, t)
