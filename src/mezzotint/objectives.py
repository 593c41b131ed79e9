"""Training objectives: what is minimised, given a denoiser, clean data and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mezzotint.conditions import Condition, Text
from mezzotint.conditions.text import replaced
from mezzotint.denoiser import Denoiser, Prediction
from mezzotint.interpolants import transition
from mezzotint.targets import true_value
from mezzotint.weightings import DiscreteSteps, TimeDistribution, Uniform, Weighting, WeightingName, training_range
from mezzotint.weightings import weighting as named_weighting


class Draw(NamedTuple):
    """One training batch's random numbers: t (B,), eps (B, *in_shape), drop (B,) bool (conditions to leave out)."""

    t: Tensor
    eps: Tensor
    drop: Tensor

    def rows(self, which: slice | Tensor) -> Draw:
        return Draw(self.t[which], self.eps[which], self.drop[which])


class Objective(nn.Module):
    """Weighted denoising loss, w(t)·‖prediction − target‖², plus DiT's variational bound for a learned variance.

    Of a packed pyramid it is the sum over levels of each level's own mean, times its weight (MDM, section 3.2).

    With a `residual_weight` the network predicts the original image (l-DAE, section 4.4): of the residual
    r = V(image − network) in the full PCA basis the first d components, which are x's, count 1 and all others this
    weight, w(t)·(Σ_{i ≤ d} r_i² + residual_weight·Σ_{i > d} r_i²) / d.

    A module, so that data parallelism can wrap it: it owns the denoiser and its forward is one training loss.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weighting: Weighting | WeightingName = "none",
        times: TimeDistribution | None = None,
        condition_dropout: float = 0.1,
        null: Text | None = None,
        stratified: bool = False,
        vlb_weight: float = 1.0,
        level_weights: Sequence[float] = (),
        level_shares: Sequence[float] = (),
        residual_weight: float = 0.0,
    ) -> None:
        """weighting: one, or its name. times: of training; None: uniform over those at which target and weight are
        finite, or over the steps of an interpolant that has steps.

        condition_dropout: share of labels replaced by the null class, of captions by `null`, the empty one.

        vlb_weight: factor on the bound (1: as DiT). level_weights, level_shares: of a pyramid's levels, smallest first;
        of a prefix of them to train these alone. A share is that of the examples which have this level and all smaller
        ones (the first: 1); the others are not computed there, and the level's loss is the mean over those that are.
        Empty: 1 for all.

        Raises `MezzotintError` for an unknown weighting, and for a denoiser that does not know its `in_shape`.
        """
        super().__init__()
        path = denoiser.interpolant
        self.denoiser = denoiser
        self.weighting = named_weighting(weighting) if isinstance(weighting, str) else weighting
        if times is None:
            t_min, t_max = training_range(path, denoiser.target, self.weighting)
            times = Uniform(t_min, t_max) if path.num_steps is None else DiscreteSteps(path.num_steps)
        self.times = times
        self.null = null
        self.condition_dropout = condition_dropout if denoiser.num_classes or denoiser.text else 0.0
        self.stratified = stratified
        self.vlb_weight = vlb_weight
        self.residual_weight = residual_weight
        self.sizes = [math.prod(shape) for shape in denoiser.level_shapes]
        self.level_weights = tuple(level_weights) or (1.0,) * len(self.sizes)
        self.level_shares = tuple(level_shares) or (1.0,) * len(self.level_weights)
        self.sizes = self.sizes[: len(self.level_weights)]

    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """The random numbers for a batch of this size, on the generator's device."""
        device, shape = generator.device, self.denoiser.in_shape
        t = self.times.sample(batch_size, generator, stratified=self.stratified)
        eps = torch.randn((batch_size, *shape), generator=generator, device=device)
        drop = torch.rand(batch_size, generator=generator, device=device) < self.condition_dropout
        return Draw(t, eps, drop)

    def forward(self, x: Tensor, y: Condition | None, draw: Draw) -> dict[str, Tensor]:
        """Losses per example, each (B,): ``loss`` to minimise, ``mse`` unweighted on the target, ``vlb`` if learned.

        x (B, *in_shape) clean data, with a residual weight all D components (B, D, h, w); y B labels int64 or captions,
        or None.
        """
        if isinstance(y, Text):
            assert self.null is not None, "captions need the null caption"
            y = replaced(y, draw.drop, self.null)
        elif y is not None and self.denoiser.num_classes:
            y = torch.where(draw.drop, self.denoiser.num_classes, y)
        if min(self.level_shares) == 1:
            return self._losses(x, y, draw, self.level_weights)
        groups = self._groups(len(x))
        parts = []
        for rows, weights in groups:
            chosen = rows.to(x.device)
            parts.append(self._losses(x[chosen], None if y is None else y[chosen], draw.rows(chosen), weights))
        back = torch.cat([rows for rows, _ in groups]).argsort().to(x.device)
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _groups(self, batch: int) -> list[tuple[Tensor, list[float]]]:
        """Examples that have the same levels, spread evenly over any part of a batch, and the weights of these."""
        levels, rows = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
        weights = []
        for weight, before, share in zip(
            self.level_weights, (1.0, *self.level_shares[:-1]), self.level_shares, strict=True
        ):
            index, kept = torch.arange(len(rows), dtype=torch.float64), share / before
            rows = rows[((index + 1) * kept - 1e-6).ceil() > (index * kept - 1e-6).ceil()]
            levels[rows] += 1
            weights.append(weight * batch / len(rows))  # the mean is over those that have the level
        found = [((levels == k).nonzero().flatten(), weights[:k]) for k in range(1, len(weights) + 1)]
        return [(rows, kept) for rows, kept in found if len(rows)]

    def _losses(self, x: Tensor, y: Condition | None, draw: Draw, weights: Sequence[float]) -> dict[str, Tensor]:
        """`forward` for examples that have as many levels as there are weights."""
        denoiser, (t, eps, _) = self.denoiser, draw
        sizes = self.sizes[: len(weights)]
        if len(denoiser.level_shapes) > 1:
            x, eps = x[:, : sum(sizes)], eps[:, : sum(sizes)]
        left_out = None
        if self.residual_weight:
            x, left_out = x.tensor_split([denoiser.in_shape[0]], dim=1)
        c = denoiser.interpolant.coefficients(t, x)
        x_t = c.alpha * x + c.sigma * eps
        prediction = denoiser(x_t, t, y)
        squared = (prediction.output - true_value(denoiser.target, x, eps, c)).square()
        mse = _level_means(squared, sizes)
        weighted = _level_means(self.weighting.on(denoiser.target, c) * squared, sizes)
        losses = {"mse": torch.stack(mse).mean(0)}
        losses["loss"] = torch.stack([w * mean for w, mean in zip(weights, weighted, strict=True)]).sum(0)
        if left_out is not None:
            assert prediction.left_out is not None
            squared = self.weighting.on(denoiser.target, c) * (prediction.left_out - left_out).square()
            losses["loss"] = losses["loss"] + self.residual_weight * squared.flatten(1).sum(1) / sizes[0]
        if denoiser.learned_variance:
            losses["vlb"] = variational_bound(denoiser, prediction, x, t)
            losses["loss"] = losses["loss"] + self.vlb_weight * losses["vlb"]
        return losses


def _level_means(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The mean of each example's levels, each (B,); of what is no pyramid: of all of it."""
    return [part.mean(1) for part in values.flatten(1).split(list(sizes), dim=1)]


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
