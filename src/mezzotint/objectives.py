"""Training objectives: what is minimised, given a denoiser, clean data and noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mezzotint.denoiser import Denoiser, Prediction
from mezzotint.interpolants import transition
from mezzotint.targets import true_value
from mezzotint.weightings import TimeDistribution, Weighting


class Draw(NamedTuple):
    """One training batch's random numbers: t (B,), eps (B, C, H, W), drop (B,) bool (labels to replace by null)."""

    t: Tensor
    eps: Tensor
    drop: Tensor

    def rows(self, which: slice) -> Draw:
        return Draw(self.t[which], self.eps[which], self.drop[which])


class Objective(nn.Module):
    """Weighted denoising loss, w(t)·‖prediction − target‖², plus DiT's variational bound for a learned variance.

    A module, so that data parallelism can wrap it: it owns the denoiser and its forward is one training loss.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weighting: Weighting,
        times: TimeDistribution,
        label_dropout: float = 0.1,
        stratified: bool = False,
        vlb_weight: float = 1.0,
    ) -> None:
        """label_dropout: share of labels replaced by the null class; vlb_weight: factor on the bound (1: as DiT)."""
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting
        self.times = times
        self.label_dropout = label_dropout if denoiser.num_classes else 0.0
        self.stratified = stratified
        self.vlb_weight = vlb_weight

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """The random numbers for a batch of this size, on the generator's device."""
        device = generator.device
        t = self.times.sample(batch_size, generator, stratified=self.stratified)
        eps = torch.randn((batch_size, *self.denoiser.in_shape), generator=generator, device=device)
        drop = torch.rand(batch_size, generator=generator, device=device) < self.label_dropout
        return Draw(t, eps, drop)

    def forward(self, x: Tensor, y: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """Losses per example, each (B,): ``loss`` to minimise, ``mse`` unweighted on the target, ``vlb`` if learned.

        x (B, C, H, W) clean data; y (B,) int64 labels, or None.
        """
        denoiser, (t, eps, drop) = self.denoiser, draw
        if y is not None and denoiser.num_classes:
            y = torch.where(drop, denoiser.num_classes, y)
        c = denoiser.interpolant.coefficients(t, x)
        x_t = c.alpha * x + c.sigma * eps
        prediction = denoiser(x_t, t, y)
        squared = (prediction.output - true_value(denoiser.target, x, eps, c)).square()
        losses = {"mse": squared.flatten(1).mean(1)}
        losses["loss"] = (self.weighting.on(denoiser.target, c) * squared).flatten(1).mean(1)
        if denoiser.learned_variance:
            losses["vlb"] = variational_bound(denoiser, prediction, x, t)
            losses["loss"] = losses["loss"] + self.vlb_weight * losses["vlb"]
        return losses


def variational_bound(denoiser: Denoiser, prediction: Prediction, x: Tensor, t: Tensor) -> Tensor:
    """One step's term of the variational bound in bits per dimension (B,), with gradients to the variance alone.

    KL(q(x_s | x_t, x) ‖ N(predicted mean, learned variance)) for the step from t to s = t − 1/T, and at the first step
    the negative log-likelihood of x discretised to 256 levels of [-1, 1] (Nichol and Dhariwal 2021, section 3.1;
    DiT). The mean's gradient is stopped. The sum over T steps is the bound, so its mean over uniform t is 1/T of it.
    """
    num_steps = denoiser.interpolant.num_steps
    assert num_steps is not None
    i = (t.double() * num_steps).round()
    first = _column(i == 1, x)
    step = transition(denoiser.interpolant, i / num_steps, (i - 1) / num_steps)
    # A first step's posterior variance is zero; like the official code, use the second step's there.
    second = transition(denoiser.interpolant, 2 / num_steps, 1 / num_steps) if num_steps > 1 else step
    step = type(step)(*(_column(value, x) for value in step))
    floor = second.lower.to(x) if num_steps > 1 else step.upper
    true_log_variance = torch.where(step.lower > 0, step.lower, floor).log()
    log_variance = prediction.log_variance(step, floor)
    # Both means weigh x_t alike, so they differ by the data prediction's error alone.
    mean_error = step.from_data * (x - prediction.data.detach())
    kl = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + mean_error.square() * (-log_variance).exp()
        - 1
    )
    nll = -discretised_log_likelihood(x, x - mean_error, 0.5 * log_variance)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the mass that N(mean, std²) gives to x's bin of 256 in [-1, 1], elementwise (Ho et al. 2020, eq. 13)."""
    centred, inverse_std = x - mean, (-log_std).exp()
    upper = _normal_cdf(inverse_std * (centred + 1 / 255))
    lower = _normal_cdf(inverse_std * (centred - 1 / 255))
    # The outermost bins reach to infinity.
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    # The tanh approximation (error below 4e-4), not the exact function, because published losses were measured with it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, ...) to broadcast against x, in x's dtype unless boolean."""
    values = values.reshape(-1, *[1] * (x.ndim - 1))
    return values if values.dtype == torch.bool else values.to(x.dtype)
