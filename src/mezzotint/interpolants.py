"""Interpolants: the signal and noise scales of x_t = alpha(t)·x + sigma(t)·eps.

t = 0 is data and t = 1 is noise, for every interpolant. An interpolant is one method, `at`, which gives alpha, sigma
and their derivatives at t; everything else in the library (targets, samplers, weights) is arithmetic on those four.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives in t, each of t's shape, or shaped to broadcast against x_t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Interpolant(ABC):
    """alpha(t) and sigma(t) on [0, 1], the signal-to-noise ratio falling. Yours is a class with `at` alone.

    >>> class Cosine(Interpolant):
    ...     def at(self, t):
    ...         angle = math.pi / 2 * t
    ...         alpha, sigma = angle.cos(), angle.sin()
    ...         return Coefficients(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)

    A derivative that diverges at an end is returned as an infinity there.
    """

    #: number of steps of a discrete schedule; None when the interpolant is defined in continuous time only
    num_steps: int | None = None
    #: smallest t at which a model is ever asked for a prediction (a discrete schedule's first step)
    t_min: float = 0.0
    #: standard deviation of the noise that sampling starts from
    prior_std: float = 1.0

    @abstractmethod
    def at(self, t: Tensor) -> Coefficients:
        """alpha, sigma, alpha', sigma' at t in [0, 1], in t's shape and dtype."""

    def shifted(self, c: Coefficients, root: float) -> Coefficients:
        """This path's c with sigma / alpha multiplied by `root`, in c's dtype: the point of the path with that ratio.

        A family that keeps alpha + sigma, √(alpha² + sigma²) or alpha at 1 divides by it instead, and knows the
        derivatives by the quotient rule. Here the point's time s is found by bisection of the log SNR, to float64's
        precision. The derivatives are those at s times ds/dt, which follows from both sides of log(sigma / alpha)(s) =
        log(sigma / alpha)(t) + log root; they are exact, too. Past an end whose ratio is neither 0 nor infinite, the
        path goes on along its tangent there. Where a derivative diverges, ds/dt is that of a square root.
        """
        here = Coefficients(*(value.double() for value in c))
        a, b = here.alpha, root * here.sigma
        log_snr = 2 * (a.log() - b.log())
        s = time_of_log_snr(self, log_snr, 0.0, 1.0)
        s = torch.where(b == 0, 0.0, torch.where(a == 0, 1.0, s))
        there = self.at(s)
        turning = there.alpha * there.d_sigma - there.sigma * there.d_alpha
        # Where the ray (a, b) meets the path's tangent at s; where that is infinite, s itself is such a point.
        norm = turning / (a * there.d_sigma - b * there.d_alpha)
        norm = torch.where(norm.isfinite(), norm, torch.hypot(there.alpha, there.sigma) / torch.hypot(a, b))
        speed = (here.alpha * here.d_sigma - here.sigma * here.d_alpha) / turning
        limit = torch.where(b == 0, root**2, root**-2)
        speed = torch.where(speed.isnan(), limit, root * norm.square() * speed)
        slopes = (there.d_alpha * speed, there.d_sigma * speed)
        return Coefficients(*(value.to(c.alpha) for value in (norm * a, norm * b, *slopes)))

    def alpha(self, t: Tensor) -> Tensor:
        return self.at(t).alpha

    def sigma(self, t: Tensor) -> Tensor:
        return self.at(t).sigma

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha² / sigma²): +inf at t = 0, decreasing in t."""
        c = self.at(t)
        return 2 * (c.alpha.log() - c.sigma.log())

    def coefficients(self, t: float | Tensor, x: Tensor) -> Coefficients:
        """`at(t)` shaped to broadcast against x (B, ...).

        A number (one time for the whole batch, as in sampling) stays a float64 scalar on the CPU, which multiplies
        a tensor on any device without a copy or a synchronisation; a tensor (B,) becomes (B, 1, ...) in x's dtype.
        """
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        return Coefficients(*(self.spread(value, x) for value in self.at(t)))

    def spread(self, value: Tensor, x: Tensor) -> Tensor:
        """A value that was made of `at`'s, scalar or (B,), shaped to broadcast against x (B, ...)."""
        return value if value.ndim == 0 else value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class _VariancePreserving(Interpolant):
    def shifted(self, c: Coefficients, root: float) -> Coefficients:
        norm = torch.hypot(c.alpha, root * c.sigma)
        slope = root / norm**3
        return Coefficients(c.alpha / norm, root * c.sigma / norm, root * slope * c.d_alpha, slope * c.d_sigma)

    @staticmethod
    def _from_log_alpha(log_alpha: Tensor, d_log_alpha: Tensor) -> Coefficients:
        # expm1 keeps sigma's relative precision near t = 0, where 1 − alpha² would cancel.
        alpha = log_alpha.exp()
        sigma = torch.expm1(2 * log_alpha).abs().sqrt()
        d_alpha = alpha * d_log_alpha
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


class Linear(Interpolant):
    """alpha = 1 − t, sigma = t (SiT, Table 1; rectified flow)."""

    def at(self, t: Tensor) -> Coefficients:
        return Coefficients(1 - t, t.clone(), torch.full_like(t, -1.0), torch.ones_like(t))

    def shifted(self, c: Coefficients, root: float) -> Coefficients:
        norm = c.alpha + root * c.sigma
        slope = root / norm**2
        return Coefficients(c.alpha / norm, root * c.sigma / norm, slope * c.d_alpha, slope * c.d_sigma)


class GVP(_VariancePreserving):
    """Generalised variance preserving: alpha = cos(πt/2), sigma = sin(πt/2) (SiT, Table 1)."""

    def at(self, t: Tensor) -> Coefficients:
        half_pi = math.pi / 2
        # cos(πt/2) as sin(π(1 − t)/2), so that alpha is exactly 0 at t = 1 and accurate near it.
        alpha, sigma = torch.sin(half_pi * (1 - t)), torch.sin(half_pi * t)
        return Coefficients(alpha, sigma, -half_pi * sigma, half_pi * alpha)


class VP(_VariancePreserving):
    """SBDM's variance-preserving path, alpha = exp(−¼t²(β_max − β_min) − ½tβ_min) (SiT, Table 1). sigma'(0) = +inf."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise MezzotintError(f"vp needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def at(self, t: Tensor) -> Coefficients:
        slope = self.beta_max - self.beta_min
        return self._from_log_alpha(-0.25 * t**2 * slope - 0.5 * t * self.beta_min, -0.5 * (t * slope + self.beta_min))


class LinearVariance(_VariancePreserving):
    """l-DAE's schedule: alpha² falls linearly from 1 to 0. sigma'(0) = +inf, alpha'(1) = −inf."""

    def at(self, t: Tensor) -> Coefficients:
        alpha, sigma = (1 - t).sqrt(), t.sqrt()
        return Coefficients(alpha, sigma, -0.5 / alpha, 0.5 / sigma)


class VarianceExploding(Interpolant):
    """l-DAE without input scaling: alpha ≡ 1, sigma = sigma_max·t, sigma_max = √2 in the paper."""

    def __init__(self, sigma_max: float = math.sqrt(2)) -> None:
        if not sigma_max > 0:
            raise MezzotintError(f"variance-exploding needs sigma_max > 0, got {sigma_max}")
        self.sigma_max = self.prior_std = sigma_max

    def at(self, t: Tensor) -> Coefficients:
        return Coefficients(
            torch.ones_like(t), self.sigma_max * t, torch.zeros_like(t), torch.full_like(t, self.sigma_max)
        )

    def shifted(self, c: Coefficients, root: float) -> Coefficients:
        return Coefficients(c.alpha, root * c.sigma, c.d_alpha, root * c.d_sigma)


class Discrete(_VariancePreserving):
    """A DDPM schedule of T betas, usable at its T steps and at any t between them.

    Step i (0-based, as networks number it) is t = (i + 1) / T, where alpha² is exactly ∏_{j ≤ i} (1 − β_j); t = 0 is
    clean data. Between steps log alpha² is interpolated linearly, which is the path of an SDE whose rate is constant
    over each step: the schedule is continuous, and its derivative is the exact one of that path (at a step, that of the
    interval which ends there). sigma'(0) = +inf.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise MezzotintError("a discrete schedule needs a vector of betas, each strictly between 0 and 1")
        self.num_steps = len(betas)
        self.t_min = 1 / len(betas)
        self.log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-betas).cumsum(0)])
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, t: Tensor) -> Coefficients:
        assert self.num_steps is not None
        key = (t.device, t.dtype)
        if key not in self._tables:  # copied to a GPU once, not at every step
            self._tables[key] = self.log_alpha.to(t)
        table = self._tables[key]
        position = t * self.num_steps
        # A step's time may round to either side of the step: shrunk by more than that rounding, it is never past it.
        i = (position.detach() * (1 - 4 * torch.finfo(t.dtype).eps)).ceil().long().clamp(1, self.num_steps) - 1
        start, step = table[i], table[i + 1] - table[i]
        return self._from_log_alpha(start + (position - i) * step, step * self.num_steps)


def linear_betas(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tensor:
    """DDPM's linear betas (num_steps,), float64; for another number of steps the ends scale by 1000 / num_steps."""
    scale = 1000 / num_steps
    if scale * beta_end >= 1:
        raise MezzotintError(
            f"linear betas scaled to {num_steps} steps reach {scale * beta_end:g}, and must stay below 1: "
            f"use more than {math.floor(1000 * beta_end)} steps, or the cosine schedule"
        )
    return torch.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int = 1000, max_beta: float = 0.999) -> Tensor:
    """Improved DDPM's cosine schedule ("squaredcos_cap_v2") as betas (num_steps,), float64, capped at max_beta."""
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_squared = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=max_beta)


class SNRShift(Interpolant):
    """`base` with its signal-to-noise ratio divided by `divisor` at every t, in base's own normalisation.

    MDM shifts a level s times larger per side by divisor = s**power (Gu et al. 2023; Hoogeboom et al. 2023).
    For `Linear` it is the timestep shift of Stable Diffusion 3 with factor √divisor.
    """

    def __init__(self, base: Interpolant, divisor: float) -> None:
        if not divisor > 0:
            raise MezzotintError(f"an SNR shift divides the ratio by a number above 0, got {divisor}")
        self.base, self.divisor = base, divisor
        self.num_steps, self.t_min = base.num_steps, base.t_min
        end = self.at(torch.ones((), dtype=torch.float64))
        # A path that ends in (nearly) pure noise keeps its norm there; one that keeps its data (alpha = 1) spreads.
        self.prior_std = base.prior_std if end.alpha < 0.5 else end.sigma.item()

    def at(self, t: Tensor) -> Coefficients:
        return self.base.shifted(self.base.at(t), math.sqrt(self.divisor))

    def shifted(self, c: Coefficients, root: float) -> Coefficients:
        return self.base.shifted(c, root)


class Pyramid(Interpolant):
    """A packed pyramid: several resolutions in one state (B, N), smallest first, each level with its own path.

    Level r has `base`'s signal-to-noise ratio divided by (its side over the smallest side)**power, so that images of
    every size are equally hard to read at the same t (MDM, section 3.2). `at` gives one value per level, in a last
    dimension of its own; `spread` gives each position that of its level. A state of fewer positions is one of the
    first levels alone.

    Raises `MezzotintError` for a base whose noisy end is not of unit variance.
    """

    def __init__(self, base: Interpolant, positions: Sequence[int], sides: Sequence[float], power: float = 1.0) -> None:
        """positions: numbers in each level; sides: pixels along a side of each."""
        self.base = base
        self.num_steps, self.t_min = base.num_steps, base.t_min
        divisors = [(side / sides[0]) ** power for side in sides]
        self.paths = [base if divisor == 1 else SNRShift(base, divisor) for divisor in divisors]
        if any(path.prior_std != 1 for path in self.paths):
            raise MezzotintError(
                "a pyramid needs an interpolant that ends in noise of variance 1: linear, gvp, vp, ddpm, cosine or "
                "linear-variance"
            )
        self.positions = list(positions)
        self.level = torch.repeat_interleave(torch.arange(len(positions)), torch.tensor(positions))
        self._on: dict[torch.device, Tensor] = {}

    def at(self, t: Tensor) -> Coefficients:
        levels = [path.at(t) for path in self.paths]
        return Coefficients(*(torch.stack(values, dim=-1) for values in zip(*levels, strict=True)))

    def shifted(self, c: Coefficients, root: float) -> Coefficients:
        return self.base.shifted(c, root)

    def log_snr(self, t: Tensor) -> Tensor:
        """That of the smallest level, in t's shape."""
        return self.base.log_snr(t)

    def spread(self, value: Tensor, x: Tensor) -> Tensor:
        """(levels,) → (N,), (B, levels) → (B, N), in x's dtype and on its device; a scalar stays what it is."""
        if value.ndim == 0:
            return value
        if x.device not in self._on:
            self._on[x.device] = self.level.to(x.device)
        return value.to(x).index_select(-1, self._on[x.device][: x.shape[1]])

    def split(self, x: Tensor) -> list[Tensor]:
        """The levels that x (B, N) has, each (B, positions)."""
        ends = list(accumulate(self.positions))
        return list(x.split(self.positions[: ends.index(x.shape[1]) + 1], dim=1))


class Transition(NamedTuple):
    """q(x_s | x_t, x) = N(from_x_t·x_t + from_data·x, lower): the exact posterior of the forward process, s < t.

    `lower` is DDPM's beta-tilde (the variance when x is known) and `upper` its beta (when x ~ N(0, 1)): the two
    bounds between which a learned variance interpolates.
    """

    from_x_t: Tensor
    from_data: Tensor
    lower: Tensor
    upper: Tensor


def transition(interpolant: Interpolant, t: float | Tensor, s: float | Tensor) -> Transition:
    """The transition from t to s (0 <= s < t <= 1), in float64 because variances of short steps cancel.

    DDPM, equations 6-7, written for any (alpha, sigma). At s = 0 the posterior is the point x.
    """
    t, s = torch.as_tensor(t, dtype=torch.float64), torch.as_tensor(s, dtype=torch.float64)
    now, then = interpolant.at(t), interpolant.at(s)
    ratio = now.alpha / then.alpha
    upper = now.sigma**2 - (ratio * then.sigma) ** 2
    share = then.sigma**2 / now.sigma**2
    return Transition(ratio * share, then.alpha * upper / now.sigma**2, upper * share, upper)


InterpolantName = Literal["linear", "gvp", "vp", "ddpm", "cosine", "linear-variance", "variance-exploding"]
INTERPOLANTS: tuple[InterpolantName, ...] = get_args(InterpolantName)


def interpolant(
    name: str,
    *,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    num_steps: int = 1000,
    sigma_max: float = math.sqrt(2),
    snr_divisor: float = 1.0,
) -> Interpolant:
    """An interpolant by name, one of `INTERPOLANTS`; an option that does not concern it is ignored.

    Raises `MezzotintError` for an unknown name or an option out of range.
    """
    if num_steps < 1:
        raise MezzotintError(f"interpolant.num_steps must be at least 1, got {num_steps}")
    makers = {
        "linear": Linear,
        "gvp": GVP,
        "vp": lambda: VP(beta_min, beta_max),
        "ddpm": lambda: Discrete(linear_betas(num_steps)),
        "cosine": lambda: Discrete(cosine_betas(num_steps)),
        "linear-variance": LinearVariance,
        "variance-exploding": lambda: VarianceExploding(sigma_max),
    }
    if name not in makers:
        raise MezzotintError(f"interpolant {name!r} is unknown; {closest(name, makers)}")
    made: Interpolant = makers[name]()
    return made if snr_divisor == 1.0 else SNRShift(made, snr_divisor)


def time_of_log_snr(interpolant: Interpolant, log_snr: Tensor, t_min: float, t_max: float) -> Tensor:
    """The t in [t_min, t_max] at which the interpolant has this log SNR, by bisection to float64 precision."""
    low = torch.full_like(log_snr, t_min, dtype=torch.float64)
    high = torch.full_like(low, t_max)
    for _ in range(60):
        middle = (low + high) / 2
        above = interpolant.log_snr(middle) > log_snr
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
