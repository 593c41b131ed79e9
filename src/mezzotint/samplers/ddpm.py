"""The discrete-time family: ancestral DDPM and DDIM, on any interpolant and any decreasing list of times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from mezzotint.denoiser import Model, Prediction
from mezzotint.interpolants import Transition, transition
from mezzotint.samplers.noise import Generators, randn_like

Variance = Literal["learned", "lower", "upper"]


def step_variance(kind: Variance, prediction: Prediction, step: Transition) -> Tensor:
    """The variance of one ancestral step: learned, or DDPM's lower (beta-tilde) or upper (beta) bound."""
    if kind == "learned":
        return prediction.log_variance(step).exp()
    return step.lower if kind == "lower" else step.upper


def transition_at(model: Model, t: float, s: float, x: Tensor) -> Transition:
    """The transition from t to s, shaped to broadcast against x."""
    interpolant = model.interpolant
    return Transition(*(interpolant.spread(value, x) for value in transition(interpolant, t, s)))


def ddpm(
    model: Model, x: Tensor, times: Sequence[float], *, generator: Generators, variance: Variance = "lower"
) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): draw x_s from q(x_s | x_t, predicted data). Yields each x_s."""
    for t, s in pairwise(times):
        prediction = model(x, t)
        step = transition_at(model, t, s, x)
        x = step.from_x_t * x + step.from_data * prediction.data
        if s > 0:  # the last step is the mean: at s = 0 the posterior is a point
            x = x + step_variance(variance, prediction, step).sqrt() * randn_like(x, generator)
        yield x


def ddim(
    model: Model, x: Tensor, times: Sequence[float], *, generator: Generators, eta: float = 0.0
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, equation 12): eta 0 is deterministic, 1 has the ancestral variance. Yields each x_s."""
    for t, s in pairwise(times):
        prediction = model(x, t)
        then = model.interpolant.coefficients(s, x)
        noise_variance = eta**2 * transition_at(model, t, s, x).lower
        kept = (then.sigma**2 - noise_variance).clamp(min=0).sqrt()
        x = then.alpha * prediction.data + kept * prediction.noise
        if eta > 0 and s > 0:
            x = x + noise_variance.sqrt() * randn_like(x, generator)
        yield x
