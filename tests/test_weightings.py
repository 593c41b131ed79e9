"""Weightings mean the same loss for every target, and training times have the distribution that they claim."""

from __future__ import annotations

import math

import pytest
import torch
from exact import PATHS, at, quantity
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.interpolants import interpolant
from mezzotint.targets import TARGETS, Target
from mezzotint.weightings import (
    WEIGHTINGS,
    DiscreteSteps,
    LogitNormal,
    TimeDistribution,
    Uniform,
    WeightingName,
    time_distribution,
    training_range,
    weighting,
)

T = torch.tensor([0.0123, 0.2345, 0.50005, 0.81234, 0.98765], dtype=torch.float64)
paths = pytest.mark.parametrize("path", list(PATHS))


def pairs(path: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A true (x, eps) and a predicted one at the same x_t = alpha·x + sigma·eps, (5, 1, 1, 3) each."""
    c = at(PATHS[path], T)
    x, eps, x_hat = torch.randn(3, 5, 1, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x, eps), (x_hat, eps + c.alpha / c.sigma * (x - x_hat))


def defined_loss(name: WeightingName, path: str, target: Target) -> Tensor:
    """The weighting's loss from its definition in its paper: a weight on the error of a stated quantity."""
    t = T.clone().requires_grad_()
    c = at(PATHS[path], t)
    (x, eps), (x_hat, eps_hat) = pairs(path)
    snr = (c.alpha / c.sigma) ** 2
    (d_snr,) = torch.autograd.grad(snr.sum(), t, retain_graph=True)
    lam = c.sigma * c.d_sigma - c.d_alpha / c.alpha * c.sigma**2  # half the forward SDE's g²
    data, noise = (x_hat - x) ** 2, (eps_hat - eps) ** 2
    if name in ("none", "velocity", "v"):
        what: Target = target if name == "none" else name
        return (quantity(what, x_hat, eps_hat, c) - quantity(what, x, eps, c)) ** 2
    return {
        "noise": noise,
        "data": data,
        "likelihood": lam / c.sigma**2 * noise,
        "vdm": -0.5 * d_snr.reshape(c.alpha.shape) * data,
        "min-snr": torch.minimum(snr, torch.tensor(5.0)) * data,
        "snr": snr * data,
        "alpha-squared": c.alpha**2 * data,
        "inverse-variance": data / (1 + c.sigma**2),
    }[name]


@paths
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weighting_is_its_definition_for_every_target(path: str, name: WeightingName) -> None:
    """weight × squared error of whatever the network predicts equals the definition, to 1e-8."""
    c = at(PATHS[path], T)
    (x, eps), (x_hat, eps_hat) = pairs(path)
    for target in TARGETS:
        squared = (quantity(target, x_hat, eps_hat, c) - quantity(target, x, eps, c)) ** 2
        got = weighting(name).on(target, c) * squared
        torch.testing.assert_close(got, defined_loss(name, path, target).detach(), rtol=1e-8, atol=0)


@paths
def test_equivalences_of_the_papers(path: str) -> None:
    """SiT: noise or score models under `velocity` are velocity models; Kingma et al.: likelihood = VDM, SNR = noise."""
    c = at(PATHS[path], T)
    for target in ("noise", "score"):
        (x, eps), (x_hat, eps_hat) = pairs(path)
        error = quantity(target, x_hat, eps_hat, c) - quantity(target, x, eps, c)
        velocity = quantity("velocity", x_hat, eps_hat, c) - quantity("velocity", x, eps, c)
        weighted = weighting("velocity").on(target, c) * error**2
        torch.testing.assert_close(weighted, weighting("none").on("velocity", c) * velocity**2, rtol=1e-8, atol=0)
    # SiT's plain score loss, ‖sigma·s + eps‖², is the noise loss.
    torch.testing.assert_close(weighting("noise").on("score", c), c.sigma**2, rtol=1e-12, atol=0)
    for target in TARGETS:
        vdm, likelihood = (weighting(name).on(target, c) for name in ("vdm", "likelihood"))
        torch.testing.assert_close(vdm, likelihood, rtol=1e-9, atol=0)
        snr, noise = (weighting(name).on(target, c) for name in ("snr", "noise"))
        torch.testing.assert_close(snr, noise, rtol=1e-9, atol=0)


def test_min_snr_by_hand() -> None:
    """Hang et al.: min(SNR, γ) on data, that / SNR on noise, min(SNR, γ) / (SNR + 1) on v (variance preserving)."""
    c = at(PATHS["gvp"], torch.tensor([0.1, 0.5, 0.9]))
    snr = 1 / torch.tan(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * math.pi / 2) ** 2
    for gamma in (1.0, 5.0):
        capped = snr.clamp(max=gamma)
        for target, expected in (("data", capped), ("noise", capped / snr), ("v", capped / (snr + 1))):
            got = weighting("min-snr", min_snr_gamma=gamma).on(target, c).flatten()
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_l_dae_weights() -> None:
    """l-DAE: λ = alpha² = 1 − t for its schedule, and 1 / (1 + 2t²) without input scaling."""
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    squared = weighting("alpha-squared").on("data", at(PATHS["linear-variance"], t))
    torch.testing.assert_close(squared.flatten(), 1 - t)
    inverse = weighting("inverse-variance").on("data", at(PATHS["variance-exploding"], t))
    torch.testing.assert_close(inverse.flatten(), 1 / (1 + 2 * t**2))


@pytest.mark.parametrize(
    ("path", "target", "name", "cut_0", "cut_1"),
    [
        ("linear", "velocity", "none", False, False),
        ("linear", "noise", "none", False, False),
        ("linear", "noise", "velocity", False, True),  # (1 / alpha)²
        ("linear", "velocity", "noise", False, False),  # alpha²
        ("linear", "data", "velocity", True, False),  # (1 / sigma)²
        ("linear", "score", "none", True, False),  # the target itself diverges
        ("linear", "velocity", "likelihood", True, True),
        ("linear", "data", "snr", True, False),
        ("linear", "data", "min-snr", False, False),
        ("linear-variance", "data", "alpha-squared", False, False),
        ("linear-variance", "noise", "alpha-squared", False, True),  # alpha²·(sigma / alpha)², 0 / 0 at t = 1
        ("variance-exploding", "data", "inverse-variance", False, False),
        ("vp", "velocity", "none", True, False),
        ("vp", "noise", "velocity", True, False),  # sigma'(0) = ∞
    ],
)
def test_training_range(path: str, target: Target, name: str, cut_0: bool, cut_1: bool) -> None:
    """Ends at which the target or its weight diverges, by hand; everything in between is finite."""
    t_min, t_max = training_range(PATHS[path], target, weighting(name), 1e-4)
    assert (t_min, t_max) == pytest.approx((1e-4 if cut_0 else 0.0, 1 - 1e-4 if cut_1 else 1.0))
    ends = at(PATHS[path], torch.tensor([t_min, t_max], dtype=torch.float64))
    assert weighting(name).on(target, ends).isfinite().all()
    assert training_range(interpolant("ddpm"), target, weighting(name), 1e-4) == (1e-3, 1.0)


def test_unknown_weighting() -> None:
    with pytest.raises(MezzotintError, match="weighting 'velocit' is unknown; closest: velocity"):
        weighting("velocit")
    with pytest.raises(MezzotintError, match="min_snr_gamma must be above 0"):
        weighting("min-snr", min_snr_gamma=0.0)


# ------------------------------------------------------------------------------------------------------- training times

DISTRIBUTIONS: dict[str, TimeDistribution] = {
    "uniform": Uniform(0.0, 1.0),
    "uniform-clipped": Uniform(1e-3, 0.999),
    "logit-normal": LogitNormal(),
    "logit-normal-noisier": LogitNormal(0.8, 0.6),
}


def cdf(name: str, t: Tensor) -> Tensor:
    """Distribution functions from their definitions."""
    if name.startswith("uniform"):
        low, high = (0.0, 1.0) if name == "uniform" else (1e-3, 0.999)
        return (t - low) / (high - low)
    mean, std = (0.0, 1.0) if name == "logit-normal" else (0.8, 0.6)
    return 0.5 * (1 + torch.erf((torch.log(t / (1 - t)) - mean) / (std * math.sqrt(2))))


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
@pytest.mark.parametrize("stratified", [False, True])
def test_times_have_their_distribution(name: str, stratified: bool) -> None:
    """Kolmogorov-Smirnov: 20,000 times within 1.95 / √n of their law (p = 0.001); stratified ones within 2 / n."""
    n = 20000
    t = DISTRIBUTIONS[name].sample(n, torch.Generator().manual_seed(3), stratified=stratified)
    assert t.dtype == torch.float32
    distance = (cdf(name, t.double().sort().values) - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < (2 / n if stratified else 1.95 / math.sqrt(n))
    again = DISTRIBUTIONS[name].sample(n, torch.Generator().manual_seed(3), stratified=stratified)
    assert torch.equal(t, again)


def test_stratified_marginal() -> None:
    """Each single time of a stratified batch is uniform too (KS, 5,000 batches), and every stratum holds one time."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([Uniform().sample(4, generator, stratified=True) for _ in range(5000)])
    assert ((draws.sort(1).values * 4).floor() == torch.arange(4)).all()
    for column in draws.T:
        distance = (column.sort().values - (torch.arange(5000) + 0.5) / 5000).abs().max()
        assert distance < 1.95 / math.sqrt(5000)


@pytest.mark.parametrize("num_steps", [1, 7, 1000, 4000])
def test_discrete_times(num_steps: int) -> None:
    """Exactly the steps 1 / T … 1, each as often as the others."""
    u = (torch.arange(8 * num_steps, dtype=torch.float64) + 0.5) / (8 * num_steps)
    steps, counts = (DiscreteSteps(num_steps).quantile(u) * num_steps).round().long().unique(return_counts=True)
    assert torch.equal(steps, torch.arange(1, num_steps + 1))
    assert (counts == 8).all()


def test_discrete_times_stay_inside() -> None:
    """The extremes of torch.rand in float32, 0 and 1 − 2⁻²⁴, are the first and the last step, whatever their number."""
    for num_steps in range(1, 2001):
        first, last = DiscreteSteps(num_steps).quantile(torch.tensor([0.0, 1 - 2**-24])).tolist()
        assert (first, last) == (pytest.approx(1 / num_steps), 1.0)


def test_logit_normal_quantiles_and_clamp() -> None:
    """Median sigmoid(mean), one standard deviation at the normal's 84.13 %, and u = 0 clamped to t_min."""
    distribution = LogitNormal(0.5, 2.0, 1e-3, 0.99)
    u = torch.tensor([0.0, 0.15865525393, 0.5, 0.84134474607, 1 - 1e-16], dtype=torch.float64)
    sigmoid = [1 / (1 + math.exp(-z)) for z in (-1.5, 0.5, 2.5)]
    assert distribution.quantile(u).tolist() == pytest.approx([1e-3, *sigmoid, 0.99], rel=1e-9)


def test_uniform_ends() -> None:
    assert Uniform(0.001, 0.999).quantile(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.001, 0.5, 0.999])


def test_time_distribution_by_name() -> None:
    made = time_distribution("logit-normal", t_min=0.1, t_max=0.9, num_steps=None, mean=1.0, std=2.0)
    assert made == LogitNormal(1.0, 2.0, 0.1, 0.9)
    assert time_distribution("uniform", t_min=0.1, t_max=0.9, num_steps=None) == Uniform(0.1, 0.9)
    assert time_distribution("discrete", t_min=0.0, t_max=1.0, num_steps=10) == DiscreteSteps(10)
    for name, message in (("uniforn", "closest: uniform"), ("discrete", "needs an interpolant with steps")):
        with pytest.raises(MezzotintError, match=message):
            time_distribution(name, t_min=0.0, t_max=1.0, num_steps=None)
    with pytest.raises(MezzotintError, match="time_std must be above 0"):
        time_distribution("logit-normal", t_min=0.0, t_max=1.0, num_steps=None, std=0.0)
