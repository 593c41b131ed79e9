"""Targets: every conversion, where it exists, and the denoiser's readings against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from exact import PATHS, ExactBackbone, FormulaNetwork, Mixture, at, exact_denoiser, quantity, two_bumps
from torch import Tensor

from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.interpolants import Coefficients, interpolant
from mezzotint.targets import TARGETS, Target, convert, row, time_range, true_value

paths = pytest.mark.parametrize("path", list(PATHS))
sources = pytest.mark.parametrize("source", TARGETS)


def three_modes() -> Mixture:
    """A two-dimensional mixture of shape (1, 1, 2) with unequal weights and anisotropic components."""
    means = [[[[-0.7, 0.4]]], [[[0.5, -0.1]]], [[[0.2, 0.9]]]]
    stds = [[[[0.2, 0.5]]], [[[0.6, 0.1]]], [[[0.3, 0.3]]]]
    return Mixture(means, stds, [0.5, 0.3, 0.2])


def grid(path: str, source: Target, *to: Target, eps: float = 1e-3) -> Tensor:
    """Times over the whole range on which `source` converts to all of `to`, ends included."""
    t_min, t_max = time_range(PATHS[path], source, to, eps)
    return t_min + (t_max - t_min) * torch.tensor([0, 0.003, 0.11, 0.5, 0.83, 0.996, 1], dtype=torch.float64)


# ------------------------------------------------------------------------------------------- the data models themselves


def test_posterior_mean_by_quadrature() -> None:
    """E[x | x_t] and E[eps | x_t] of the mixture equal integrals over x of p(x) N(x_t; alpha x, sigma²), to 1e-9."""
    data, c = two_bumps(), at(PATHS["linear"], 0.35)
    x_t = torch.tensor([-1.0, -0.2, 0.1, 0.7], dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = np.linspace(-4, 4, 20001)
    prior = sum(
        w * np.exp(-0.5 * ((x - m) / s) ** 2) / s for w, m, s in ((0.3, -0.8, 0.15), (0.7, 0.6, 0.25))
    )  # up to a constant
    for i, value in enumerate(x_t.flatten().tolist()):
        posterior = prior * np.exp(-0.5 * ((value - 0.65 * x) / 0.35) ** 2)
        mean = (posterior * x).sum() / posterior.sum()
        assert data.predict("data", x_t, c)[i].item() == pytest.approx(mean, abs=1e-9)
        assert data.predict("noise", x_t, c)[i].item() == pytest.approx((value - 0.65 * mean) / 0.35, abs=1e-9)


@paths
def test_score_and_velocity_of_the_mixture(path: str) -> None:
    """The score is the gradient of log p_t, and the velocity carries p_t: ∂ log p / ∂t + div v + v·score = 0."""
    data = two_bumps()
    t = grid(path, "velocity", "score").clone().requires_grad_()
    x_t = torch.linspace(-1.5, 1.5, len(t), dtype=torch.float64).reshape(-1, 1, 1, 1).requires_grad_()
    c = at(PATHS[path], t)
    score, rate = torch.autograd.grad(data.log_prob(x_t, c).sum(), (x_t, t), retain_graph=True)
    torch.testing.assert_close(data.predict("score", x_t, c), score, rtol=1e-9, atol=1e-9)
    velocity = data.predict("velocity", x_t, c)
    (divergence,) = torch.autograd.grad(velocity.sum(), x_t)
    residual = rate + (divergence + velocity * score).flatten()
    scale = rate.abs() + divergence.flatten().abs() + 1
    assert (residual.abs() < 1e-8 * scale).all()


# ---------------------------------------------------------------------------------------------------------- conversions


@paths
@sources
def test_conversion(path: str, source: Target) -> None:
    """All 25 pairs: converting what one target is of (x, eps) gives what the other is, to 1e-9."""
    for to in TARGETS:
        t = grid(path, source, to)
        c = at(PATHS[path], t)
        generator = torch.Generator().manual_seed(0)
        x, eps = torch.randn(2, len(t), 1, 2, 3, generator=generator, dtype=torch.float64)
        got = convert(quantity(source, x, eps, c), c.alpha * x + c.sigma * eps, c, source, to)
        # Near an end some conversions amplify rounding by up to 1 / alpha (2e4 for the cosine schedule).
        torch.testing.assert_close(got, quantity(to, x, eps, c), rtol=1e-9, atol=1e-9)


@sources
def test_rows_and_true_values(source: Target) -> None:
    """a·x + b·eps is the target's definition."""
    c = at(PATHS["vp"], torch.tensor([0.2, 0.7]))
    x, eps = torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64).reshape(2, 2, 1, 1, 1)
    a, b = row(source, c)
    torch.testing.assert_close(a * x + b * eps, quantity(source, x, eps, c))
    torch.testing.assert_close(true_value(source, x, eps, c), quantity(source, x, eps, c))


def test_unknown_target() -> None:
    with pytest.raises(MezzotintError, match="target 'velocty' is unknown; closest: velocity"):
        row("velocty", at(PATHS["vp"], 0.5))  # type: ignore[arg-type]
    with pytest.raises(MezzotintError, match="target 'nose' is unknown"):
        Denoiser(ExactBackbone(two_bumps(), PATHS["vp"], "noise"), PATHS["vp"], "nose")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- time ranges


# path, source, to: is t = 0 cut off, is t = 1 cut off, and why
RANGES: list[tuple[str, Target, Target, bool, bool]] = [
    ("linear", "velocity", "velocity", False, False),  # constant derivatives
    ("linear", "velocity", "data", False, False),  # x_t − t·v
    ("linear", "velocity", "noise", False, False),  # x_t + (1 − t)·v
    ("linear", "velocity", "score", True, False),  # −noise / sigma, sigma(0) = 0
    ("linear", "noise", "data", False, True),  # alpha(1) = 0: x_t has no data left
    ("linear", "noise", "velocity", False, True),  # eps − data
    ("linear", "data", "noise", True, False),  # sigma(0) = 0: x_t has no noise left
    ("linear", "data", "velocity", True, False),
    ("linear", "data", "data", False, False),
    ("linear", "score", "score", True, False),
    ("linear", "score", "data", True, True),
    ("linear", "v", "velocity", False, False),
    ("linear/4", "noise", "velocity", False, True),
    ("linear/4", "velocity", "velocity", False, False),
    ("gvp", "velocity", "data", False, False),
    ("gvp", "v", "velocity", False, False),  # velocity = π/2·v
    ("gvp", "noise", "v", False, True),
    ("vp", "velocity", "velocity", True, False),  # sigma'(0) = ∞
    ("vp", "noise", "velocity", True, False),
    ("vp", "noise", "data", False, False),  # alpha(1) > 0
    ("vp", "v", "data", False, False),  # x = alpha·x_t − sigma·v always
    ("vp", "data", "score", True, False),
    ("vp/2", "velocity", "velocity", True, False),
    ("linear-variance", "velocity", "velocity", True, True),  # sigma'(0) = ∞, alpha'(1) = −∞
    ("linear-variance", "noise", "data", False, True),
    ("linear-variance", "v", "noise", False, False),
    ("linear-variance/0.5", "v", "velocity", True, True),
    ("variance-exploding", "velocity", "velocity", False, False),  # √2·eps
    ("variance-exploding", "noise", "data", False, False),  # alpha = 1 throughout
    ("variance-exploding", "data", "velocity", True, False),
    ("variance-exploding", "velocity", "score", True, False),
]


@pytest.mark.parametrize(("path", "source", "to", "cut_0", "cut_1"), RANGES)
def test_time_range(path: str, source: Target, to: Target, cut_0: bool, cut_1: bool) -> None:
    """The ends at which the quantity or its conversion diverges, by hand."""
    expected = (0.01 if cut_0 else 0.0, 0.99 if cut_1 else 1.0)
    assert time_range(PATHS[path], source, (to,), 0.01) == pytest.approx(expected)


@sources
@pytest.mark.parametrize("path", ["ddpm", "cosine", "cosine/4"])
def test_time_range_of_steps(path: str, source: Target) -> None:
    """A discrete model is never asked before its first step; at t = 1 everything exists, since alpha(1) > 0."""
    for eps, t_min in ((1e-5, 1e-3), (1e-2, 1e-2)):
        assert time_range(PATHS[path], source, ("velocity", "score", "data", "noise"), eps) == (t_min, 1.0)


def test_time_range_of_several_targets_is_the_intersection() -> None:
    assert time_range(PATHS["linear"], "noise", ("velocity", "score"), 0.02) == (0.02, 0.98)
    with pytest.raises(MezzotintError, match=r"between 0 and 0\.5, got 0\.5"):
        time_range(PATHS["linear"], "noise", ("velocity",), 0.5)


# --------------------------------------------------------------------------------------------------------- the denoiser


@paths
@sources
def test_exact_model_reads_as_everything(path: str, source: Target) -> None:
    """A network that knows a mixture, trained for any target, gives its exact data, noise, velocity, score and v.

    Over the whole usable range of t, ends included; 1e-7 (relative) because some conversions amplify rounding there.
    """
    data = three_modes()
    denoiser = exact_denoiser(data, PATHS[path], source)
    x_t = torch.randn(7, 1, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for to in TARGETS:
        t = grid(path, source, to)
        got = denoiser(x_t, t).to(to)
        torch.testing.assert_close(got, data.predict(to, x_t, at(PATHS[path], t)), rtol=1e-7, atol=1e-7)
        one = denoiser(x_t, t[3].item())  # one number for the batch
        torch.testing.assert_close(getattr(one, to), data.predict(to, x_t, at(PATHS[path], t[3])), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_input(dtype: torch.dtype) -> None:
    """(1000, −1) is DiT's step index and (−1, 1) SiT's reversed time; default 1000·t."""
    for scale, offset, t, expected in ((1000, -1, 0.058, 57.0), (-1, 1, 0.25, 0.75), (1000, 0, 0.25, 250.0)):
        denoiser = exact_denoiser(two_bumps(), PATHS["ddpm"], "noise", time_input=(scale, offset))
        x = torch.zeros(2, 1, 1, 1, dtype=dtype)
        for time in (t, torch.tensor(t, dtype=dtype), torch.tensor([t, t], dtype=dtype)):
            denoiser(x, time)
        for seen, _ in denoiser.backbone.calls:
            assert seen.shape == (2,)
            assert seen.dtype == dtype
            torch.testing.assert_close(seen, torch.full((2,), expected, dtype=dtype), rtol=0, atol=1e-5)


def test_doubled_output() -> None:
    """The second half is dropped (SiT), or kept as the learned variance (DiT)."""
    network = FormulaNetwork(lambda x, t: torch.cat([2 * x, x - 5], dim=1))
    x = torch.ones(1, 1, 1, 2)
    dropped = Denoiser(network, PATHS["ddpm"], "noise")(x, 0.5)
    assert dropped.variance is None
    assert (dropped.output == 2).all()
    learned = Denoiser(network, PATHS["ddpm"], "noise", learned_variance=True)(x, 0.5)
    assert learned.variance is not None
    assert (learned.variance == -4).all()
    assert (learned.output == 2).all()
    with pytest.raises(MezzotintError, match="needs an interpolant with steps"):
        Denoiser(network, PATHS["linear"], "noise", learned_variance=True)


def test_labels_default_to_the_null_class() -> None:
    data = three_modes()
    denoiser = exact_denoiser(data, PATHS["linear"], conditional=True)
    x = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    denoiser(x, 0.5)
    denoiser(x, 0.5, torch.tensor([0, 2]))
    assert [y.tolist() for _, y in denoiser.backbone.calls] == [[3, 3], [0, 2]]
    assert denoiser.num_classes == 3
    assert denoiser.in_shape == (1, 1, 2)


def test_reading_outside_the_range_is_not_finite() -> None:
    """Asking for what does not exist gives inf or nan, as documented, and never a wrong number."""
    denoiser = exact_denoiser(two_bumps(), interpolant("linear"), "noise")
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert not denoiser(x, 1.0).data.isfinite().any()
    assert denoiser(x, 1.0).noise.isfinite().all()
    assert denoiser.time_range() == (0.0, 1.0)
    assert denoiser.time_range("data", eps=0.1) == (0.0, 0.9)


def test_singular_rows_are_infinite() -> None:
    c: Any = Coefficients(*(torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.0, -1.0, 1.0)))
    assert row("score", c)[1] == -math.inf
