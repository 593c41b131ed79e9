"""Loss weights, and the distributions of training times.

A weighting is a number w(t) on the squared error of one stated quantity (noise, data, velocity, or the model's own
target). Because any prediction converts to any other with a factor that depends on t alone, a weighting means the same
loss whatever the network predicts: `velocity` makes a noise model's loss equal a velocity model's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest
from mezzotint.interpolants import Coefficients, Interpolant, time_of_log_snr
from mezzotint.targets import Target, conversion, time_range


@dataclass(frozen=True)
class Weighting:
    """w(t) on ‖predicted − true‖² of `quantity` (None: of whatever the model predicts)."""

    quantity: Target | None
    weight: Callable[[Coefficients], Tensor]

    def on(self, target: Target, c: Coefficients) -> Tensor:
        """The same weighting expressed as a factor on the squared error of `target`, in c's shape."""
        weight = self.weight(c)
        if self.quantity is None or self.quantity == target:
            return weight
        # At a fixed x_t an error of `target` is an error of `quantity` times k_p.
        return weight * conversion(target, self.quantity, c)[1].square()


def _snr(c: Coefficients) -> Tensor:
    return (c.alpha / c.sigma).square()


def _likelihood(c: Coefficients) -> Tensor:
    # ½g²/sigma² with g² = 2(sigma·sigma' − alpha'·sigma²/alpha): half the decay rate of log SNR (Kingma et al. 2021,
    # equation 13, on noise; SiT's lambda / sigma²).
    return c.d_sigma / c.sigma - c.d_alpha / c.alpha


WeightingName = Literal[
    "none",
    "noise",
    "data",
    "velocity",
    "v",
    "likelihood",
    "vdm",
    "min-snr",
    "snr",
    "alpha-squared",
    "inverse-variance",
]
WEIGHTINGS: tuple[WeightingName, ...] = get_args(WeightingName)


def weighting(name: str, *, min_snr_gamma: float = 5.0) -> Weighting:
    """A weighting by name, one of `WEIGHTINGS`.

    - ``none``: 1 on the model's own target. ``noise``, ``data``, ``velocity``, ``v``: 1 on that quantity (SiT, section
      3); SiT's plain loss of a score model, ‖sigma·score + eps‖², is ``noise``.
    - ``likelihood``: lambda / sigma² on noise (SiT), which is ``vdm``: −½ SNR'(t) on data (Kingma et al. 2021).
    - ``min-snr``: min(SNR, gamma) on data (Hang et al. 2023). ``snr``: SNR on data, which is ``noise``.
    - ``alpha-squared``: alpha² on data, and ``inverse-variance``: 1 / (1 + sigma²) on data (l-DAE, sections 4.2-4.3).
    """
    known: dict[str, Weighting] = {
        "none": Weighting(None, lambda c: torch.ones_like(c.alpha)),
        "likelihood": Weighting("noise", _likelihood),
        "vdm": Weighting("data", lambda c: _likelihood(c) * _snr(c)),
        "snr": Weighting("data", _snr),
        "min-snr": Weighting("data", lambda c: _snr(c).clamp(max=min_snr_gamma)),
        "alpha-squared": Weighting("data", lambda c: c.alpha.square()),
        "inverse-variance": Weighting("data", lambda c: 1 / (1 + c.sigma.square())),
    }
    quantities: tuple[Target, ...] = ("noise", "data", "velocity", "v")
    known |= {quantity: Weighting(quantity, lambda c: torch.ones_like(c.alpha)) for quantity in quantities}
    if name not in known:
        raise MezzotintError(f"weighting {name!r} is unknown; {closest(name, WEIGHTINGS)}")
    if not min_snr_gamma > 0:
        raise MezzotintError(f"objective.min_snr_gamma must be above 0, got {min_snr_gamma}")
    return known[name]


def training_range(
    interpolant: Interpolant, target: Target, weighting: Weighting, eps: float = 1e-5
) -> tuple[float, float]:
    """The largest [t_min, t_max] in [0, 1] on which the target and its weight are finite, by margins of eps."""
    t_min, t_max = time_range(interpolant, target, (target,), eps)
    ends = interpolant.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    finite = weighting.on(target, ends).isfinite().reshape(2, -1).all(1)
    return t_min if finite[0] else max(t_min, eps), t_max if finite[1] else min(t_max, 1 - eps)


class TimeDistribution(ABC):
    """A distribution of training times on [0, 1], given by its quantile function."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Map u, uniform on [0, 1), to times."""

    def sample(self, n: int, generator: torch.Generator, *, stratified: bool = False) -> Tensor:
        """n times (n,), float32, on the generator's device.

        With `stratified`, one shared offset and n equal strata (Kingma et al. 2021, appendix I.1): the same marginal,
        less variance in the mean of the loss.
        """
        device = generator.device
        if stratified:
            offset = torch.rand((), generator=generator, device=device)
            u = (offset + torch.arange(n, device=device) / n) % 1
        else:
            u = torch.rand(n, generator=generator, device=device)
        return self.quantile(u)


@dataclass(frozen=True)
class Uniform(TimeDistribution):
    """Uniform on [t_min, t_max]."""

    t_min: float = 0.0
    t_max: float = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        return self.t_min + (self.t_max - self.t_min) * u


@dataclass(frozen=True)
class DiscreteSteps(TimeDistribution):
    """Uniform on the steps (i + 1) / num_steps, i = 0 … num_steps − 1, of a discrete schedule."""

    num_steps: int

    def quantile(self, u: Tensor) -> Tensor:
        return ((u * self.num_steps).floor() + 1) / self.num_steps


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """sigmoid(N(mean, std²)), as in Stable Diffusion 3, clamped to [t_min, t_max]. A positive mean favours noise."""

    mean: float = 0.0
    std: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        # ndtri(u) = √2·erfinv(2u − 1); u = 0 gives −inf, whose sigmoid is 0, and the clamp brings it into range.
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return torch.sigmoid(self.mean + self.std * normal).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class SingleLevel(TimeDistribution):
    """Always t: one noise level, as a classical denoising autoencoder has it (l-DAE, section 4.4)."""

    t: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.t)


def single_level(interpolant: Interpolant, noise_level: float) -> SingleLevel:
    """The time at which sigma / alpha is `noise_level`; of a packed pyramid, that of the smallest level.

    Raises `MezzotintError` where the interpolant never has this level.
    """
    if not noise_level > 0:
        raise MezzotintError(f"objective.noise_level must be above 0, got {noise_level}")
    asked = torch.tensor(-2 * math.log(noise_level), dtype=torch.float64)
    highest = (-0.5 * interpolant.log_snr(torch.ones_like(asked))).exp().item()
    if noise_level > highest:
        raise MezzotintError(
            f"objective.noise_level {noise_level:g} is never reached: sigma / alpha is at most {highest:g} here; lower "
            "it, or take another interpolant"
        )
    return SingleLevel(time_of_log_snr(interpolant, asked, interpolant.t_min, 1.0).item())


TIME_DISTRIBUTIONS = ("uniform", "discrete", "logit-normal")


def time_distribution(
    name: str, *, t_min: float, t_max: float, num_steps: int | None, mean: float = 0.0, std: float = 1.0
) -> TimeDistribution:
    """A distribution of training times by name, on [t_min, t_max] or the schedule's steps; not `single_level`.

    Raises `MezzotintError` for an unknown name, and where the interpolant or a number does not allow it.
    """
    match name:
        case "uniform":
            return Uniform(t_min, t_max)
        case "logit-normal":
            if not std > 0:
                raise MezzotintError(f"objective.time_std must be above 0, got {std}")
            return LogitNormal(mean, std, t_min, t_max)
        case "discrete":
            if num_steps is None:
                raise MezzotintError(
                    "objective.times 'discrete' needs an interpolant with steps (ddpm, cosine); use 'uniform' here"
                )
            return DiscreteSteps(num_steps)
    raise MezzotintError(f"objective.times {name!r} is unknown; {closest(name, TIME_DISTRIBUTIONS)}")
