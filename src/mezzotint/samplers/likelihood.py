"""Exact likelihood through the probability-flow ODE (Song et al. 2021, appendix D; SiT, section 2.3)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mezzotint.denoiser import Model
from mezzotint.errors import MezzotintError, closest
from mezzotint.randomness import generator_for
from mezzotint.samplers.noise import Generators, randn_like
from mezzotint.samplers.ode import integrate

Divergence = Literal["hutchinson", "exact"]


def log_likelihood(
    model: Model,
    x: Tensor,
    *,
    generator: Generators | None = None,
    divergence: Divergence = "hutchinson",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    eps: float = 1e-5,
) -> Tensor:
    """log p(x) in nats (B,), by integrating dx = v dt from data to noise with dopri5.

    model: a `Denoiser` (of an unconditional model, or for the null class), or a `ConditionalModel` with labels and
    guidance. x (B, *in_shape): data in the space that the denoiser works in, pixels in [-1, 1] or latents.

    d log p_t(x_t) / dt = −div v, so log p_0(x) = log N(x_1; 0, prior_std²) + ∫ div v dt. With ``hutchinson`` the
    divergence is estimated with one Rademacher probe per example, fixed along the path and drawn from `generator`
    (None: one of seed 0, so that a call gives the same numbers again; unbiased, so average calls with generators of
    several seeds); ``exact`` costs one backward pass per dimension. Where the velocity is singular
    at t = 0 the integral starts at eps, or at a discrete schedule's first step, with x standing for x_t there.

    Raises `MezzotintError` for an unknown divergence, and where no step of the solver is small enough.
    """
    if divergence not in get_args(Divergence):
        raise MezzotintError(f"divergence {divergence!r} is unknown; {closest(str(divergence), get_args(Divergence))}")
    if not callable(model):
        raise MezzotintError(
            f"the likelihood is that of a model called as model(x, t), not of a {type(model).__name__}; give its "
            "denoiser, or ConditionalModel(denoiser, labels)"
        )
    if not x.is_floating_point():
        raise MezzotintError(f"a likelihood is that of floating-point data, images in [-1, 1]; x is of {x.dtype}")
    if divergence == "hutchinson":
        generator = generator_for(0, device=x.device) if generator is None else generator
        probes = randn_like(x, generator).sign()[None]
    else:
        unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        probes = unit.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)

    def flow(t: float, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x_t = state[0].detach().requires_grad_()
            velocity = model(x_t, t).velocity
            trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for probe in probes:
                (product,) = torch.autograd.grad(velocity, x_t, probe, retain_graph=True)
                trace = trace + (product * probe).flatten(1).sum(1)
        return velocity.detach(), trace

    start = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    with torch.no_grad():
        states, integrals = integrate(flow, start, model.time_range("velocity", eps=eps), rtol=rtol, atol=atol)
    std = model.interpolant.prior_std
    prior = -0.5 * (states[-1] / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)
    return prior.flatten(1).sum(1) + integrals[-1]


def bits_per_dim(log_likelihood: Tensor, num_dims: int, *, levels: int = 256) -> Tensor:
    """Bits per dimension of images whose `levels` integer values were scaled to [-1, 1] and uniformly dequantised.

    A density on [-1, 1] becomes one on integer levels by the bin width 2 / (levels − 1).
    """
    return -log_likelihood / (num_dims * math.log(2)) + math.log2((levels - 1) / 2)
