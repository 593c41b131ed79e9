"""Samplers against the exact flow and marginals of Gaussian and mixture data, and against the official code.

For Gaussian data every update of every sampler is affine in the state and in the noises, so the distribution of what it
returns is computed, not sampled, from one batch: row 0 starts at the mean and meets no noise, row 1 starts one standard
deviation away, and row 2 + k receives a unit of noise at draw k alone (`output_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact import (
    PATHS,
    ExactBackbone,
    ExactModel,
    FormulaNetwork,
    Mixture,
    at,
    exact_denoiser,
    gaussian,
    marginal,
    numbers,
    two_bumps,
)
from torch import Tensor

from mezzotint.denoiser import Denoiser, Model
from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel
from mezzotint.interpolants import Interpolant, interpolant
from mezzotint.samplers import SAMPLERS, Sampler, ddpm, example_generators, multistep, ode, randn, sde
from mezzotint.samplers.times import SPACINGS, respaced_times, time_grid
from mezzotint.targets import TARGETS, Target

paths = pytest.mark.parametrize("path", list(PATHS))
UNUSED = torch.Generator()
Noise = Callable[[Callable[[Tensor, int], Tensor]], None]


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    """Replace the samplers' random numbers by a function of (x, number of the draw), counted anew at each call."""

    def replace(values: Callable[[Tensor, int], Tensor]) -> None:
        count = iter(range(10**6))
        for module in (ddpm, sde):
            monkeypatch.setattr(module, "randn_like", lambda x, generator: values(x, next(count)).to(x))

    return replace


def impulse(x: Tensor, draw: int) -> Tensor:
    """A unit of noise to row 2 + draw alone."""
    out = torch.zeros_like(x)
    out[2 + draw] = 1
    return out


def waves(x: Tensor, draw: int) -> Tensor:
    """Noise by formula, as in the runs of the official code."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64) + draw + 1).reshape(x.shape)


def final(sampler: Sampler, model: Model, x: Tensor) -> Tensor:
    *_, last = sampler.path(model, x, UNUSED)
    return last


def output_of(noise: Noise, run: Callable[[Tensor], Tensor], draws: int, start: tuple[Tensor, Tensor]) -> Tensor:
    """Mean and standard deviation (2, 1, 1, D) of what `run` makes of N(start); draws: how often it may draw noise."""
    mean, std = start
    x = mean.expand(2 + draws, *mean.shape).clone()
    x[1] += std
    noise(impulse)
    out = run(x)
    return torch.stack([out[0], (out[1:] - out[0]).square().sum(0).sqrt()])


# ------------------------------------------------------------------------------- every sampler and path: Gaussian data

W: dict[str, Callable[[Any, float], Any]] = {  # w(t) by hand; halves of angles instead of the library's 1 ± cos
    "constant": lambda c, t: 1.0,
    "sigma": lambda c, t: c.sigma,
    "linear": lambda c, t: t,
    "sbdm": lambda c, t: 2 * c.sigma * (c.d_sigma - c.d_alpha * c.sigma / c.alpha),
    "sin2": lambda c, t: math.sin(math.pi * t) ** 2,
    "increasing": lambda c, t: math.sin(math.pi * t / 2) ** 4,
    "decreasing": lambda c, t: math.cos(math.pi * t / 2) ** 4,
}


def limit(sampler: Sampler, model: ExactModel) -> Tensor:
    """Mean and standard deviation of a sampler's output for ever finer steps, but for the last: in closed form."""
    times, path = sampler.times(model), model.interpolant
    last_step = sampler.last_step if sampler.sampler.startswith("sde") else "tweedie"
    if sampler.sampler.startswith("ode") and model.time_range("velocity")[0] == 0:
        last_step = "none"  # a step like the others
    if last_step == "none":
        return torch.stack(marginal(model.data, at(path, times[-1])))
    t = times[-2]
    c = at(path, t)

    def last(x: Tensor) -> Tensor:
        if last_step == "tweedie":
            return model.data.predict("data", x, c)
        drift = model.data.predict("velocity", x, c)
        if last_step == "mean":
            w = sampler.diffusion_scale * W[sampler.diffusion](c, t)
            drift = drift - w / 2 * model.data.predict("score", x, c)
        return x - t * drift

    mean, std = marginal(model.data, c)
    centre, there = last(torch.stack([mean, mean + std]))
    return torch.stack([centre, (there - centre).abs()])


def extrapolated_error(noise: Noise, settings: dict[str, Any], path: Interpolant, order: int) -> float:
    """The error's limit for ever finer steps, by Richardson's rule from n steps and 2n."""
    errors = []
    for steps in (settings["steps"], 2 * settings["steps"]):
        sampler, model = Sampler(**settings | {"steps": steps}), ExactModel(gaussian(), path)
        start = marginal(model.data, at(path, sampler.times(model)[0]))
        got = output_of(noise, lambda x, s=sampler, m=model: final(s, m, x), steps, start)
        errors.append(got - limit(sampler, model))
    return (errors[1] + (errors[1] - errors[0]) / (2**order - 1)).abs().max().item()


# settings, order by which the error is extrapolated, tolerance on mean and standard deviation
EXACT: dict[str, tuple[dict[str, Any], int, float]] = {
    "ddpm-lower": ({"sampler": "ddpm", "steps": 25}, 1, 1e-2),
    "ddpm-upper": ({"sampler": "ddpm", "steps": 25, "variance": "upper"}, 1, 1e-2),
    "ddim": ({"sampler": "ddim", "steps": 25}, 1, 1e-2),
    "ddim-0.6": ({"sampler": "ddim", "steps": 25, "eta": 0.6}, 1, 1e-2),
    "ode-euler": ({"sampler": "ode-euler", "steps": 25}, 1, 5e-3),
    "ode-heun": ({"sampler": "ode-heun", "steps": 20}, 2, 1e-3),
    "ode-rk4": ({"sampler": "ode-rk4", "steps": 10}, 4, 1e-3),
    "ode-dopri5": ({"sampler": "ode-dopri5", "steps": 2, "rtol": 1e-4, "atol": 1e-6}, 1, 1e-3),
    "sde": ({"sampler": "sde", "steps": 25}, 1, 5e-3),
    "sde-heun": ({"sampler": "sde-heun", "steps": 25}, 1, 5e-3),
    "dpm-solver++": ({"sampler": "dpm-solver++", "steps": 25}, 2, 2e-3),
}


@paths
@pytest.mark.parametrize("name", list(EXACT))
def test_reproduces_gaussian_data(path: str, name: str, noise: Noise) -> None:
    """Mean and standard deviation of the output are the data's, as the steps become finer."""
    settings, order, tolerance = EXACT[name]
    assert extrapolated_error(noise, {"spacing": "log-snr", **settings}, PATHS[path], order) < tolerance


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion", list(sde.DIFFUSIONS))
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
@pytest.mark.parametrize("sampler", ["sde", "sde-heun"])
def test_every_diffusion_and_last_step(path: str, diffusion: str, last_step: str, sampler: str, noise: Noise) -> None:
    """Whatever w(t), the marginals are the flow's; then the last step is the formula of its name."""
    settings = {"sampler": sampler, "steps": 30, "spacing": "log-snr", "diffusion": diffusion, "last_step": last_step}
    assert extrapolated_error(noise, settings | {"diffusion_scale": 0.7}, PATHS[path], 1) < 1e-2
