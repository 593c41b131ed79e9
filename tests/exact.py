"""Exact models: data whose every diffusion quantity is known in closed form, and networks that answer with it.

The data are a mixture of Gaussians with diagonal covariances. At time t, x_t = alpha·x + sigma·eps is again a mixture,
of N(alpha·mean_k, alpha²·std_k² + sigma²), and conditioning within a component is linear regression. Everything is
float64 and differentiable in x_t and in t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.denoiser import Denoiser
from mezzotint.interpolants import Coefficients, Interpolant, interpolant
from mezzotint.targets import TARGETS, Target, time_range

#: Every interpolant of the library, and SNR shifts of each normalisation (alpha + sigma, alpha² + sigma², alpha kept).
PATHS: dict[str, Interpolant] = {
    "linear": interpolant("linear"),
    "gvp": interpolant("gvp"),
    "vp": interpolant("vp"),
    "ddpm": interpolant("ddpm"),
    "cosine": interpolant("cosine"),
    "linear-variance": interpolant("linear-variance"),
    "variance-exploding": interpolant("variance-exploding"),
    "linear/4": interpolant("linear", snr_divisor=4.0),
    "vp/2": interpolant("vp", snr_divisor=2.0),
    "cosine/4": interpolant("cosine", snr_divisor=4.0),
    "linear-variance/0.5": interpolant("linear-variance", snr_divisor=0.5),
    "variance-exploding/4": interpolant("variance-exploding", snr_divisor=4.0),
}


def at(path: Interpolant, t: float | Tensor) -> Coefficients:
    """The path's coefficients at t in float64, (B, 1, 1, 1) for a tensor (B,)."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return Coefficients(*(value.reshape(-1, 1, 1, 1) if t.ndim else value for value in path.at(t)))


def quantity(what: Target, x: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
    """What a target is, of one example and its noise."""
    return {
        "data": x,
        "noise": eps,
        "velocity": c.d_alpha * x + c.d_sigma * eps,
        "score": -eps / c.sigma,
        "v": c.alpha * eps - c.sigma * x,
    }[what]


class Mixture:
    """Σ_k weights_k N(means_k, diag stds_k²): means and stds (K, C, H, W), weights (K,). K = 1 is a Gaussian."""

    def __init__(self, means: Any, stds: Any, weights: Any = (1.0,)) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64).expand_as(self.means)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.shape = tuple(self.means.shape[1:])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[k] + self.stds[k] * torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)

    def _components(self, x_t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """x_t minus its mean in each component, and its variance there, both (K, B, C, H, W)."""
        means, stds = self.means[:, None], self.stds[:, None]
        return x_t - c.alpha * means, (c.alpha * stds) ** 2 + c.sigma**2

    def _log_joint(self, x_t: Tensor, c: Coefficients, y: Tensor | None) -> Tensor:
        """log of the density of (x_t, component k) given y (K, B). Class k is component k; class K is the mixture."""
        centred, variance = self._components(x_t, c)
        log_weights = self.weights[:, None].log()
        if y is not None:
            other = (torch.arange(len(self.weights))[:, None] != y) & (y != len(self.weights))
            log_weights = torch.where(y == len(self.weights), log_weights, 0.0).masked_fill(other, -math.inf)
        log_normal = -0.5 * (centred**2 / variance + variance.log() + math.log(2 * math.pi))
        return log_normal.flatten(2).sum(2) + log_weights

    def log_prob(self, x_t: Tensor, c: Coefficients, y: Tensor | None = None) -> Tensor:
        """log density of x_t (B,); at alpha = 1, sigma = 0 that of the data."""
        return self._log_joint(x_t, c, y).logsumexp(0)

    def predict(self, what: Target, x_t: Tensor, c: Coefficients, y: Tensor | None = None) -> Tensor:
        """The least-squares prediction of a quantity: its conditional expectation given x_t. `score` is ∇ log p_t."""
        centred, variance = self._components(x_t, c)
        means, stds = self.means[:, None], self.stds[:, None]
        z = centred / variance
        match what:
            case "data":
                each = means + c.alpha * stds**2 * z
            case "noise":
                each = c.sigma * z
            case "velocity":
                each = c.d_alpha * means + (c.alpha * c.d_alpha * stds**2 + c.sigma * c.d_sigma) * z
            case "score":
                each = -z
            case "v":
                each = c.alpha * c.sigma * (1 - stds**2) * z - c.sigma * means
        if len(each) == 1:
            return each[0]
        share = self._log_joint(x_t, c, y).softmax(0)
        return (share.reshape(*share.shape, *[1] * len(self.shape)) * each).sum(0)

    def cdf(self, x_t: Tensor, c: Coefficients) -> Tensor:
        """Distribution function of x_t, elementwise, of one-dimensional data."""
        centred, variance = self._components(x_t, c)
        normal = 0.5 * (1 + torch.erf(centred / (2 * variance).sqrt()))
        return (self.weights.reshape(-1, 1, 1, 1, 1) * normal).sum(0)


def gaussian(mean: Any = (0.3, -0.5), std: Any = (0.4, 0.8)) -> Mixture:
    """N(mean, diag std²) on examples of shape (1, 1, D)."""
    return Mixture([[[list(mean)]]], [[[list(std)]]])


def two_bumps() -> Mixture:
    """A one-dimensional mixture of shape (1, 1, 1), far from Gaussian."""
    return Mixture([[[[-0.8]]], [[[0.6]]]], [[[[0.15]]], [[[0.25]]]], [0.3, 0.7])


def marginal(data: Mixture, c: Coefficients) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_t for Gaussian data. The probability flow keeps (x_t − mean) / std."""
    return c.alpha * data.means[0], ((c.alpha * data.stds[0]) ** 2 + c.sigma**2).sqrt()


class ExactPrediction:
    """`Prediction` without conversions: each quantity is the data's own closed form."""

    def __init__(self, data: Mixture, x_t: Tensor, c: Coefficients) -> None:
        self.data_model, self.x_t, self.c = data, x_t, c

    def __getattr__(self, name: str) -> Tensor:
        if name not in TARGETS:
            raise AttributeError(name)
        return self.data_model.predict(name, self.x_t, self.c)


class ExactModel:
    """What samplers see, answered in closed form; `target` only decides where a model is asked (its time range)."""

    learned_variance = False

    def __init__(self, data: Mixture, path: Interpolant, target: Target = "velocity") -> None:
        self.data, self.interpolant, self.target = data, path, target
        self.asked: list[float] = []

    def time_range(self, *to: Target, eps: float = 1e-3) -> tuple[float, float]:
        return time_range(self.interpolant, self.target, to or (self.target,), eps)

    def __call__(self, x: Tensor, t: float | Tensor) -> Any:
        self.asked.append(float(t))
        return ExactPrediction(self.data, x, at(self.interpolant, t))


class ExactBackbone(nn.Module):
    """A network that knows the data: it undoes the affine network time and outputs `data.predict(target, ...)`.

    `conditional`: class k is component k, the null class the mixture. With `variance`, a function of (x, t), the output
    has a second half, as DiT's has.
    """

    def __init__(
        self,
        data: Mixture,
        path: Interpolant,
        target: Target,
        *,
        conditional: bool = False,
        time_input: tuple[float, float] = (1000.0, 0.0),
        variance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.data, self.path, self.target, self.time_input, self.variance = data, path, target, time_input, variance
        self.num_classes = len(data.weights) if conditional else 0
        self.in_channels = data.shape[0]
        self.input_size = data.shape[1:]
        self.calls: list[tuple[Tensor, Tensor | None]] = []  # (network time, y) of every call

    def forward(self, x: Tensor, network_time: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append((network_time, y))
        scale, offset = self.time_input
        t = (network_time.double() - offset) / scale
        c = at(self.path, t[0] if bool((t == t[0]).all()) else t)
        output = self.data.predict(self.target, x.double(), c, y)
        if self.variance is not None:
            output = torch.cat([output, self.variance(x.double(), t.reshape(-1, 1, 1, 1))], dim=1)
        return output.to(x.dtype)


def exact_denoiser(
    data: Mixture,
    path: Interpolant,
    target: Target = "velocity",
    *,
    conditional: bool = False,
    time_input: tuple[float, float] = (1000.0, 0.0),
    variance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Denoiser:
    """A real `Denoiser` around an `ExactBackbone`."""
    network = ExactBackbone(data, path, target, conditional=conditional, time_input=time_input, variance=variance)
    return Denoiser(network, path, target, learned_variance=variance is not None, time_input=time_input)


class FormulaNetwork(nn.Module):
    """A network given by a formula of (x, network time), for comparison with trajectories of the official code."""

    in_channels, num_classes = 1, 0

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor], input_size: tuple[int, int] = (1, 2)) -> None:
        super().__init__()
        self.formula, self.input_size = formula, input_size

    def forward(self, x: Tensor, network_time: Tensor, y: Tensor | None = None) -> Tensor:
        return self.formula(x, network_time.reshape(-1, 1, 1, 1))


def numbers(text: str) -> Tensor:
    """A float64 vector from whitespace-separated numbers."""
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)
