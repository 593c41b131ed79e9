"""Likelihoods through the probability-flow ODE against closed-form log densities."""

from __future__ import annotations

import math

import pytest
import torch
from exact import PATHS, ExactModel, Mixture, at, exact_denoiser, gaussian, marginal, two_bumps
from torch import Tensor
from torch.distributions import Normal

from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel
from mezzotint.interpolants import interpolant
from mezzotint.randomness import generator_for
from mezzotint.samplers.likelihood import bits_per_dim, log_likelihood
from mezzotint.targets import TARGETS, Target

paths = pytest.mark.parametrize("path", list(PATHS))
TIGHT = {"divergence": "exact", "rtol": 1e-6, "atol": 1e-6}
X = torch.tensor([[-0.9, 0.2], [0.3, -0.5], [1.1, -1.6]], dtype=torch.float64).reshape(3, 1, 1, 2)


def from_prior(path: str, target: Target) -> Tensor:
    """log of the density that the flow of Gaussian data makes of the sampler's prior, by the change of variables.

    The flow is affine: x ↦ mean_1 + std_1 / std·(x − mean). What it starts from is N(0, prior_std²), which is p_1 up to
    the data's share in it.
    """
    data = gaussian()
    t_min, t_max = ExactModel(data, PATHS[path], target).time_range("velocity", eps=1e-4)
    (mean, std), (end_mean, end_std) = (marginal(data, at(PATHS[path], t)) for t in (t_min, t_max))
    z = end_mean + end_std / std * (X - mean)
    return (Normal(0.0, PATHS[path].prior_std).log_prob(z) + (end_std / std).log()).flatten(1).sum(1)


@paths
def test_gaussian(path: str) -> None:
    """Exact divergence, every path, to 2e-4 nats; discrete ones, whose velocity jumps, to 2e-2 at rtol 3e-4.

    Where the path ends in pure noise and its velocity exists at 0, that is the data's own log density.
    """
    model = ConditionalModel(exact_denoiser(gaussian(), PATHS[path]))
    discrete = PATHS[path].num_steps is not None
    settings = TIGHT | ({"rtol": 3e-4, "atol": 3e-4} if discrete else {})
    got = log_likelihood(model, X, eps=1e-4, **settings)
    torch.testing.assert_close(got, from_prior(path, "velocity"), rtol=0, atol=2e-2 if discrete else 2e-4)
    if path in ("linear", "gvp", "linear/4"):
        torch.testing.assert_close(got, gaussian().log_prob(X, at(PATHS[path], 0.0)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", ["linear", "vp"])
def test_every_target(path: str, target: Target) -> None:
    """The likelihood between the ends of the target's range (2e-4), which is the data's up to those ends (1e-2)."""
    model = ConditionalModel(exact_denoiser(gaussian(), PATHS[path], target))
    got = log_likelihood(model, X, eps=1e-4, **TIGHT)
    torch.testing.assert_close(got, from_prior(path, target), rtol=0, atol=2e-4)
    torch.testing.assert_close(got, gaussian().log_prob(X, at(PATHS[path], 0.0)), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("path", "tolerance"),
    [
        ("linear", 1e-4),
        ("gvp", 1e-4),
        ("linear/4", 1e-4),
        ("vp", 5e-3),  # alpha(1) = 0.0066: p_1 is N(0, 1) up to the data's share
        ("vp/2", 2e-3),
        ("linear-variance", 2e-2),  # stops at t = 0.9999, where alpha = 0.01
        ("ddpm", 2e-2),
        ("cosine", 2e-2),
    ],
)
def test_mixture(path: str, tolerance: float) -> None:
    """Exact divergence of a mixture's flow, against log p at the time that x stands for (0, or the smallest usable)."""
    data = two_bumps()
    model = ConditionalModel(exact_denoiser(data, PATHS[path]))
    x = torch.tensor([-1.0, -0.7, -0.1, 0.5, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    settings = TIGHT | ({"rtol": 1e-4, "atol": 1e-4} if PATHS[path].num_steps else {})
    got = log_likelihood(model, x, eps=1e-4, **settings)
    start = at(PATHS[path], model.time_range("velocity", eps=1e-4)[0])
    torch.testing.assert_close(got, data.log_prob(x, start), rtol=0, atol=tolerance)


def test_exploding_variance() -> None:
    """With sigma up to 80 the prior N(0, 80²) hides the data, and the flow's likelihood is theirs, to 1e-2."""
    data, path = two_bumps(), interpolant("variance-exploding", sigma_max=80.0)
    x = torch.tensor([-1.0, -0.1, 0.5], dtype=torch.float64).reshape(-1, 1, 1, 1)
    got = log_likelihood(ConditionalModel(exact_denoiser(data, path)), x, **TIGHT)
    torch.testing.assert_close(got, data.log_prob(x, at(path, 0.0)), rtol=0, atol=1e-2)


def correlated() -> Mixture:
    """Two dimensions that depend on each other, so that the velocity's Jacobian is not diagonal."""
    return Mixture([[[[-0.6, -0.5]]], [[[0.6, 0.5]]]], [[[[0.3, 0.3]]], [[[0.4, 0.2]]]], [0.4, 0.6])


def test_hutchinson_is_unbiased() -> None:
    """The mean over all four sign patterns of two pixels is the exact integral, to 1e-4; one alone is not.

    With Rademacher probes zᵀJz = tr J + 2 z₁z₂ J₁₂ in two dimensions: four probes average to the trace exactly.
    """
    model = ConditionalModel(exact_denoiser(correlated(), PATHS["linear"]))
    exact = log_likelihood(model, X, **TIGHT)
    torch.testing.assert_close(exact, correlated().log_prob(X, at(PATHS["linear"], 0.0)), rtol=0, atol=2e-4)
    same = torch.cat([X] * 64)
    estimates = log_likelihood(model, same, generator=torch.Generator().manual_seed(0), rtol=1e-6, atol=1e-6)
    for values, truth in zip(estimates.reshape(64, 3).T, exact, strict=True):
        # Only z₁z₂ = ±1 matters, so there are two values, evenly around the truth.
        low, high = values.min(), values.max()
        assert ((values - low).abs() < 1e-4).logical_or((values - high).abs() < 1e-4).all()
        assert high - low > 1e-2
        assert ((low + high) / 2).item() == pytest.approx(truth.item(), abs=2e-4)
        assert 0.25 < (values > (low + high) / 2).double().mean() < 0.75


def test_hutchinson_of_independent_pixels_is_exact() -> None:
    """A diagonal Jacobian leaves nothing to chance: z² = 1."""
    model = ConditionalModel(exact_denoiser(gaussian(), PATHS["gvp"]))
    got = log_likelihood(model, X, generator=torch.Generator().manual_seed(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, gaussian().log_prob(X, at(PATHS["gvp"], 0.0)), rtol=0, atol=1e-4)


def test_the_defaults_are_enough_and_repeat() -> None:
    """Without a generator the probe is that of seed 0: the same numbers again."""
    model = exact_denoiser(gaussian(), PATHS["gvp"])
    got = log_likelihood(model, X)
    assert got.equal(log_likelihood(model, X))
    assert got.equal(log_likelihood(model, X, generator=generator_for(0)))
    torch.testing.assert_close(got, gaussian().log_prob(X, at(PATHS["gvp"], 0.0)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "x", "options", "sentence"),
    [
        (None, X, {"divergence": "exakt"}, "divergence 'exakt' is unknown; closest: exact"),
        (3, X, {}, "not of a int; give its denoiser"),
        (None, X.to(torch.uint8), {}, "floating-point data"),
    ],
)
def test_mistakes_are_said(model: object, x: Tensor, options: dict[str, str], sentence: str) -> None:
    asked = exact_denoiser(gaussian(), PATHS["gvp"]) if model is None else model
    with pytest.raises(MezzotintError, match=sentence):
        log_likelihood(asked, x, **options)  # type: ignore[arg-type]


def test_class_conditional() -> None:
    """With labels it is the class's likelihood."""
    denoiser = exact_denoiser(correlated(), PATHS["linear"], conditional=True)
    y = torch.tensor([1, 0, 2])
    got = log_likelihood(ConditionalModel(denoiser, y), X, **TIGHT)
    torch.testing.assert_close(got, correlated().log_prob(X, at(PATHS["linear"], 0.0), y), rtol=0, atol=5e-4)


def test_float32_and_gradients() -> None:
    """float32 images keep their dtype (1e-3), and no gradient is left behind."""
    model = ConditionalModel(exact_denoiser(gaussian(), PATHS["linear"]))
    got = log_likelihood(model, X.float(), divergence="exact")
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), gaussian().log_prob(X, at(PATHS["linear"], 0.0)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("path", ["vp", "ddpm", "linear-variance"])
def test_asks_within_the_range(path: str) -> None:
    """The adaptive solver's trial steps included."""
    model = ExactModel(gaussian(), PATHS[path])
    log_likelihood(model, X, divergence="exact", rtol=1e-2, atol=1e-2, eps=1e-3)
    low, high = model.time_range("velocity", eps=1e-3)
    assert low <= min(model.asked)
    assert max(model.asked) <= high


def test_the_tolerances_are_what_they_are_called() -> None:
    """The integral begins at 0, where an absolute tolerance allows for larger steps than a relative one as large."""
    asked = []
    for tolerances in ({"rtol": 1e-9, "atol": 1e-3}, {"rtol": 1e-3, "atol": 1e-9}):
        model = ExactModel(gaussian(), PATHS["linear"])
        log_likelihood(model, X, divergence="exact", **tolerances)
        asked.append(len(model.asked))
    assert asked[0] < asked[1]


def test_the_margin_is_where_the_integral_begins() -> None:
    model = ExactModel(gaussian(), PATHS["vp"])
    log_likelihood(model, X, divergence="exact", rtol=1e-2, atol=1e-2, eps=0.1)
    assert min(model.asked) == pytest.approx(0.1)


def test_bits_per_dim() -> None:
    """A uniform density on [−1, 1] (widened by half a bin each side) spends log2 of the number of levels."""
    for levels in (2, 8, 256):
        width = 2 / (levels - 1)  # of a bin; all `levels` of them span 2 + width
        uniform = torch.tensor([-3 * math.log(levels * width)])
        assert bits_per_dim(uniform, 3, levels=levels).item() == pytest.approx(math.log2(levels))
    # log p = 100 nats over 50 dimensions: −2 / log 2 + log2(127.5)
    assert bits_per_dim(torch.tensor([100.0]), 50).item() == pytest.approx(-2.885390 + 6.994353, abs=1e-5)
