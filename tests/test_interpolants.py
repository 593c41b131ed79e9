"""Interpolants against 40-digit arithmetic, DDPM's own tables and Bayes' rule."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from exact import PATHS
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.interpolants import (
    INTERPOLANTS,
    Discrete,
    Interpolant,
    SNRShift,
    cosine_betas,
    interpolant,
    linear_betas,
    time_of_log_snr,
    transition,
)

mp.mp.dps = 40
INF = math.inf
TIMES = [0.00037, 0.0123, 0.13335, 0.50005, 0.77777, 0.98765, 0.99963]  # none on a step of a 1,000-step schedule
paths = pytest.mark.parametrize("name", list(PATHS))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@cache
def log_alpha_table(kind: str) -> list[mp.mpf]:
    """½ log of the cumulative product of 1 − β over 1,000 steps, from the schedules' definitions, in 40 digits."""

    def alpha_bar(i: int) -> mp.mpf:
        return mp.cos((mp.mpf(i) / 1000 + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2

    if kind == "ddpm":
        betas = [mp.mpf("1e-4") + (mp.mpf("2e-2") - mp.mpf("1e-4")) * i / 999 for i in range(1000)]
    else:
        betas = [min(1 - alpha_bar(i + 1) / alpha_bar(i), mp.mpf("0.999")) for i in range(1000)]
    table = [mp.mpf(0)]
    for beta in betas:
        table.append(table[-1] + mp.log(1 - beta) / 2)
    return table


def reference(name: str, t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """alpha and sigma at t from the definitions; a shift is applied to the ratio sigma / alpha and renormalised."""
    base, _, divisor = name.partition("/")
    if divisor:
        alpha, sigma = reference(base, t)
        ratio = mp.sqrt(mp.mpf(divisor)) * sigma / alpha
        norm = {"linear": 1 + ratio, "variance-exploding": mp.mpf(1)}.get(base, mp.sqrt(1 + ratio**2))
        return 1 / norm, ratio / norm
    if base in ("ddpm", "cosine"):
        table, i = log_alpha_table(base), int(mp.floor(1000 * t))
        alpha = mp.exp(table[i] + (1000 * t - i) * (table[i + 1] - table[i]))
        return alpha, mp.sqrt(1 - alpha**2)
    if base == "vp":  # the SDE's own definition: log alpha = −½ ∫ β
        alpha = mp.exp(-mp.quad(lambda s: mp.mpf("0.1") + s * (20 - mp.mpf("0.1")), [0, t]) / 2)
        return alpha, mp.sqrt(1 - alpha**2)
    return {
        "linear": (1 - t, t),
        "gvp": (mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2)),
        "linear-variance": (mp.sqrt(1 - t), mp.sqrt(t)),
        "variance-exploding": (mp.mpf(1), mp.sqrt(2) * t),
    }[base]


@paths
def test_values_and_derivatives(name: str) -> None:
    """alpha, sigma, alpha', sigma' equal the definitions and their numerical derivatives in 40 digits, to 1e-11."""
    got = PATHS[name].at(f64(*TIMES))
    for i, time in enumerate(TIMES):
        t = mp.mpf(time)
        expected = [*reference(name, t), *(mp.diff(lambda s, k=k: reference(name, s)[k], t) for k in (0, 1))]
        actual = [value[i].item() for value in got]
        assert actual == pytest.approx([float(value) for value in expected], rel=1e-11, abs=1e-14)


@paths
def test_derivatives_are_those_of_autograd(name: str) -> None:
    """A dense grid, to 1e-9; and a shift of a shift, whose divisors multiply."""
    t = (torch.arange(997, dtype=torch.float64) / 997 + 0.0005).requires_grad_()
    twice = SNRShift(SNRShift(PATHS[name], 3.0), 0.5)
    for path in (PATHS[name], twice):
        c = path.at(t)
        for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
            grad = torch.zeros_like(t)
            if value.requires_grad:  # alpha is a constant where the data are kept
                (grad,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
            torch.testing.assert_close(derivative, grad, rtol=1e-9, atol=1e-12)
    once = SNRShift(PATHS[name], 1.5)
    torch.testing.assert_close(twice.at(t), once.at(t), rtol=1e-12, atol=0)


ENDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # (alpha, sigma, alpha', sigma') at t = 0 and at t = 1, by hand; nan: whatever the schedule's last step gives
    "linear": ((1, 0, -1, 1), (0, 1, -1, 1)),
    "gvp": ((1, 0, 0, math.pi / 2), (0, 1, -math.pi / 2, 0)),
    "vp": ((1, 0, -0.05, INF), (math.exp(-5.025), math.sqrt(1 - math.exp(-10.05)), -10 * math.exp(-5.025), math.nan)),
    "ddpm": ((1, 0, 500 * math.log(1 - 1e-4), INF), (math.sqrt(4.035829765e-05), math.nan, math.nan, math.nan)),
    "cosine": ((1, 0, 500 * math.log(1 - 4.128422482e-05), INF), (math.sqrt(2.428766907e-09), 1, math.nan, math.nan)),
    "linear-variance": ((1, 0, -0.5, INF), (0, 1, -INF, 0.5)),
    "variance-exploding": ((1, 0, 0, math.sqrt(2)), (1, math.sqrt(2), 0, math.sqrt(2))),
    # r = √divisor: alpha' scales by r at t = 0 and 1 / r at t = 1 (linear), by r² and 1 / r (alpha² + sigma² = 1)
    "linear/4": ((1, 0, -2, 2), (0, 1, -0.5, 0.5)),
    "vp/2": ((1, 0, -0.1, INF), (math.nan, math.nan, math.nan, math.nan)),
    "cosine/4": ((1, 0, 2000 * math.log(1 - 4.128422482e-05), INF), (math.nan, 1, math.nan, math.nan)),
    "linear-variance/0.5": ((1, 0, -0.25, INF), (0, 1, -INF, 1.0)),
    "variance-exploding/4": ((1, 0, 0, 2 * math.sqrt(2)), (1, 2 * math.sqrt(2), 0, 2 * math.sqrt(2))),
}


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(name: str, dtype: torch.dtype) -> None:
    """Both ends by hand; a derivative that diverges is an infinity of the right sign, and never a nan."""
    got = torch.stack(PATHS[name].at(torch.tensor([0.0, 1.0], dtype=dtype)))
    assert not got.isnan().any()
    expected = torch.tensor(ENDS[name], dtype=dtype).T
    known = ~expected.isnan()
    torch.testing.assert_close(got[known], expected[known], rtol=2e-4 if dtype == torch.float32 else 1e-8, atol=1e-7)
    assert (got[1, 0] == 0) & (not torch.signbit(got[1, 0])) & (got[0, 0] == 1)


@paths
def test_float32_agrees_with_float64(name: str) -> None:
    """sigma to 1e-5 relative down to t = 1e-7, where 1 − alpha² cancels; alpha to 1e-5 (cosine's last steps: 3e-4).

    Cosine's alpha falls 30-fold within its last step, so that float32's rounding of t alone costs that much.
    """
    t = torch.tensor([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.7, 0.9, 0.99, 0.999, 0.99999, 1.0])
    single, double = PATHS[name].at(t), PATHS[name].at(t.double())
    torch.testing.assert_close(single.sigma.double(), double.sigma, rtol=1e-5, atol=0)
    rtol = 3e-4 if name.startswith("cosine") else 1e-5
    torch.testing.assert_close(single.alpha.double(), double.alpha, rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", ["ddpm", "cosine"])
def test_discrete_steps(kind: str) -> None:
    """At its 1,000 steps alpha² is DDPM's cumulative product, 1e-12 in float64; in float32 1e-5 (cosine 3e-4)."""
    if kind == "ddpm":
        betas = np.linspace(1e-4, 2e-2, 1000)
    else:
        level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    product = torch.from_numpy(np.cumprod(1 - betas))
    path, steps = PATHS[kind], torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(path.alpha(steps) ** 2, product, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.sigma(steps) ** 2, 1 - product, rtol=1e-11, atol=0)
    rtol = 3e-4 if kind == "cosine" else 1e-5
    single = path.at(steps.float())
    torch.testing.assert_close(single.alpha.double() ** 2, product, rtol=rtol, atol=0)
    torch.testing.assert_close(single.sigma.double() ** 2, 1 - product, rtol=1e-5, atol=0)
    # At a step the derivative is that of the interval which ends there, in either precision: −½ log(1 − β)·T.
    decay = torch.from_numpy(500 * np.log(1 - betas))
    for dtype in (torch.float32, torch.float64):
        c = path.at(steps.to(dtype))
        torch.testing.assert_close(
            (c.d_alpha / c.alpha).double(), decay, rtol=1e-3 if kind == "cosine" else 2e-4, atol=0
        )


def test_betas() -> None:
    """Numbers of the official code (facebookresearch/DiT), and DDPM's rule for another number of steps."""
    picked = [0, 1, 500, 998, 999]
    official = f64(4.128422482e-05, 4.614175274e-05, 3.155691442e-03, 7.499993929e-01, 9.99e-01)
    torch.testing.assert_close(cosine_betas()[picked], official, rtol=1e-8, atol=0)
    assert linear_betas()[[0, -1]].tolist() == pytest.approx([1e-4, 2e-2], rel=1e-14)
    assert linear_betas(100)[[0, -1]].tolist() == pytest.approx([1e-3, 2e-1], rel=1e-14)
    official = f64(0.9999, 9.997800921e-01, 7.779665837e-02, 4.118193638e-05, 4.035829765e-05)
    steps = (torch.tensor(picked) + 1) / 1000
    torch.testing.assert_close(PATHS["ddpm"].alpha(steps.double()) ** 2, official, rtol=1e-4, atol=0)
    torch.testing.assert_close(PATHS["ddpm"].alpha((f64(*picked) + 1) / 1000) ** 2, official, rtol=1e-9, atol=0)


@pytest.mark.parametrize("base", [*INTERPOLANTS])
@pytest.mark.parametrize("divisor", [0.1, 4.0, 256.0])
def test_shift_divides_the_ratio_and_keeps_the_norm(base: str, divisor: float) -> None:
    """SNR / divisor at every t, to 1e-12, with alpha + sigma, alpha² + sigma² or alpha as before."""
    t = f64(*TIMES)
    plain, shifted = interpolant(base), interpolant(base, snr_divisor=divisor)
    before, after = plain.at(t), shifted.at(t)
    ratio = (before.alpha / before.sigma) ** 2 / (after.alpha / after.sigma) ** 2
    torch.testing.assert_close(ratio, torch.full_like(t, divisor), rtol=1e-12, atol=0)
    norms = {"linear": lambda c: c.alpha + c.sigma, "variance-exploding": lambda c: c.alpha}
    norm = norms.get(base, lambda c: c.alpha**2 + c.sigma**2)
    torch.testing.assert_close(norm(after), norm(before), rtol=1e-14, atol=0)
    assert (shifted.num_steps, shifted.t_min) == (plain.num_steps, plain.t_min)


def test_shift_of_linear_is_a_change_of_time() -> None:
    """Stable Diffusion 3's shift s = √divisor: sigma(t) = s·t / (1 + (s − 1)·t)."""
    t = f64(0.0, *TIMES, 1.0)
    torch.testing.assert_close(PATHS["linear/4"].sigma(t), 2 * t / (1 + t), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "std"), [("linear", 1), ("cosine/4", 1), ("linear-variance/0.5", 1)])
def test_sampling_starts_from_unit_noise(name: str, std: float) -> None:
    assert PATHS[name].prior_std == std


def test_sampling_starts_from_all_of_an_exploding_variance() -> None:
    assert PATHS["variance-exploding"].prior_std == pytest.approx(math.sqrt(2))
    assert PATHS["variance-exploding/4"].prior_std == pytest.approx(2 * math.sqrt(2))
    assert interpolant("variance-exploding", sigma_max=80.0).prior_std == 80


@paths
def test_log_snr_and_its_inverse(name: str) -> None:
    """time_of_log_snr(log SNR(t)) = t, to 1e-9; log SNR decreases from +inf."""
    path, t = PATHS[name], f64(*TIMES)
    snr = path.log_snr(t)
    torch.testing.assert_close(snr, torch.log(path.alpha(t) ** 2 / path.sigma(t) ** 2), rtol=1e-10, atol=1e-10)
    assert (snr.diff() < 0).all()
    assert path.log_snr(f64(0.0)) == INF
    torch.testing.assert_close(time_of_log_snr(path, snr, 0.0, 1.0), t, rtol=1e-9, atol=1e-12)


@paths
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.6, 0.25), (0.501, 0.5), (0.002, 0.001)])
def test_transition_is_bayes_rule(name: str, t: float, s: float) -> None:
    """q(x_s | x_t, x) as the product of q(x_s | x) and q(x_t | x_s), precisions adding, in 40 digits; to 1e-9."""
    got = transition(PATHS[name], t, s)
    eps = mp.mpf(10) ** -30  # alpha(1) may be 0: its limit
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (reference(name, min(mp.mpf(str(u)), 1 - eps)) for u in (t, s))
    kept = alpha_t / alpha_s
    added = sigma_t**2 - kept**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + kept**2 / added)
    expected = [variance * kept / added, variance * alpha_s / sigma_s**2, variance, added]
    assert [v.item() for v in got] == pytest.approx([float(v) for v in expected], rel=1e-9, abs=1e-14)


def test_transition_to_data() -> None:
    """At s = 0 the posterior is the point x, whatever x_t is."""
    for path in PATHS.values():
        step = transition(path, 0.4, 0.0)
        assert (step.from_x_t, step.from_data, step.lower) == (0, 1, 0)
        assert step.upper > 0


def test_transition_is_ddpms() -> None:
    """Posterior coefficients and variances between neighbouring steps from DDPM's equations 6 and 7, to 1e-9."""
    betas = np.linspace(1e-4, 2e-2, 1000)
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    i = np.array([1, 2, 50, 500, 999])
    got = transition(PATHS["ddpm"], torch.from_numpy((i + 1) / 1000), torch.from_numpy(i / 1000))
    expected = (
        np.sqrt(1 - betas) * (1 - before) / (1 - bar),
        np.sqrt(before) * betas / (1 - bar),
        betas * (1 - before) / (1 - bar),
        betas,
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs[i]), rtol=1e-9, atol=0)


def test_coefficients_broadcast() -> None:
    """A number stays a float64 scalar; a tensor of times takes x's dtype and rank."""
    path, x = PATHS["gvp"], torch.zeros(3, 1, 2, 2)
    scalar = path.coefficients(0.25, x)
    assert scalar.alpha.shape == ()
    assert scalar.alpha.dtype == torch.float64
    column = path.coefficients(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64), x)
    assert all(value.shape == (3, 1, 1, 1) and value.dtype == torch.float32 for value in column)
    assert column.alpha[1].item() == pytest.approx(math.cos(math.pi / 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interpolant("linaer"), "interpolant 'linaer' is unknown; closest: linear"),
        (lambda: interpolant("ddpm", num_steps=0), "num_steps must be at least 1, got 0"),
        (lambda: interpolant("ddpm", num_steps=20), "use more than 20 steps"),
        (lambda: interpolant("vp", beta_min=0.0), "0 < beta_min <= beta_max"),
        (lambda: interpolant("vp", beta_min=3.0, beta_max=2.0), "0 < beta_min <= beta_max"),
        (lambda: interpolant("variance-exploding", sigma_max=0.0), "sigma_max > 0"),
        (lambda: interpolant("linear", snr_divisor=0.0), "above 0, got 0"),
        (lambda: Discrete(torch.tensor([0.1, 1.0])), "strictly between 0 and 1"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        make()


def test_options_reach_their_interpolant() -> None:
    path: Interpolant = interpolant("vp", beta_min=1.0, beta_max=3.0)
    assert path.alpha(f64(1.0)).item() == pytest.approx(math.exp(-1))
    assert interpolant("cosine", num_steps=50).num_steps == 50
    assert interpolant("ddpm", num_steps=21).t_min == 1 / 21
