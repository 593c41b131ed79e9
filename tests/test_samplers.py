"""Samplers against the exact flow and marginals of Gaussian and mixture data, and against the official code.

For Gaussian data every update of every sampler is affine in the state and in the noises, so the distribution of what it
returns is computed, not sampled, from one batch: row 0 starts at the mean and meets no noise, row 1 starts one standard
deviation away, and row 2 + k receives a unit of noise at draw k alone (`output_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact import (
    PATHS,
    ExactBackbone,
    ExactModel,
    FormulaNetwork,
    at,
    exact_denoiser,
    gaussian,
    marginal,
    numbers,
    two_bumps,
)
from torch import Tensor

from mezzotint.denoiser import Denoiser, Model
from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel
from mezzotint.interpolants import Interpolant, interpolant
from mezzotint.samplers import SAMPLERS, Sampler, ddpm, example_generators, multistep, ode, randn, sde
from mezzotint.samplers.times import respaced_times, time_grid
from mezzotint.targets import TARGETS, Target

#: every interpolant, and one of the SNR shifts (whose alpha and sigma are proved with the others')
WALKED = [name for name in PATHS if "/" not in name or name == "cosine/4"]
paths = pytest.mark.parametrize("path", WALKED)
UNUSED = torch.Generator()
Noise = Callable[[Callable[[Tensor, int], Tensor]], None]


@pytest.fixture(scope="module", autouse=True)
def _grids_once() -> Iterator[None]:
    """Compute each grid of times once: those in log SNR are found by bisection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mezzotint.samplers.time_grid", cache(time_grid))
        yield


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    """Replace the samplers' random numbers by a function of (x, number of the draw), counted anew at each call."""

    def replace(values: Callable[[Tensor, int], Tensor]) -> None:
        count = iter(range(10**6))
        for module in (ddpm, sde):
            monkeypatch.setattr(module, "randn_like", lambda x, generator: values(x, next(count)).to(x))

    return replace


def impulse(x: Tensor, draw: int) -> Tensor:
    """A unit of noise to row 2 + draw alone."""
    out = torch.zeros_like(x)
    out[2 + draw] = 1
    return out


def waves(x: Tensor, draw: int) -> Tensor:
    """Noise by formula, as in the runs of the official code."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64) + draw + 1).reshape(x.shape)


def named(settings: dict[str, Any]) -> str:
    """A test's name from a sampler's settings."""
    return "-".join(map(str, settings.values()))


def final(sampler: Sampler, model: Model, x: Tensor) -> Tensor:
    *_, last = sampler.path(model, x, UNUSED)
    return last


def output_of(noise: Noise, run: Callable[[Tensor], Tensor], draws: int, start: tuple[Tensor, Tensor]) -> Tensor:
    """Mean and standard deviation (2, 1, 1, D) of what `run` makes of N(start); draws: how often it may draw noise."""
    mean, std = start
    x = mean.expand(2 + draws, *mean.shape).clone()
    x[1] += std
    noise(impulse)
    out = run(x)
    return torch.stack([out[0], (out[1:] - out[0]).square().sum(0).sqrt()])


# ------------------------------------------------------------------------------- every sampler and path: Gaussian data

W: dict[str, Callable[[Any, float], Any]] = {  # w(t) by hand; halves of angles instead of the library's 1 ± cos
    "constant": lambda c, t: 1.0,
    "sigma": lambda c, t: c.sigma,
    "linear": lambda c, t: t,
    "sbdm": lambda c, t: 2 * c.sigma * (c.d_sigma - c.d_alpha * c.sigma / c.alpha),
    "sin2": lambda c, t: math.sin(math.pi * t) ** 2,
    "increasing": lambda c, t: math.sin(math.pi * t / 2) ** 4,
    "decreasing": lambda c, t: math.cos(math.pi * t / 2) ** 4,
}


def limit(sampler: Sampler, model: ExactModel, times: list[float]) -> Tensor:
    """Mean and standard deviation of a sampler's output for ever finer steps, but for the last: in closed form."""
    path = model.interpolant
    last_step = sampler.last_step if sampler.sampler.startswith("sde") else "tweedie"
    if sampler.sampler.startswith("ode") and model.time_range("velocity")[0] == 0:
        last_step = "none"  # a step like the others
    if last_step == "none":
        return torch.stack(marginal(model.data, at(path, times[-1])))
    t = times[-2]
    c = at(path, t)

    def last(x: Tensor) -> Tensor:
        if last_step == "tweedie":
            return model.data.predict("data", x, c)
        drift = model.data.predict("velocity", x, c)
        if last_step == "mean":
            w = sampler.diffusion_scale * W[sampler.diffusion](c, t)
            drift = drift - w / 2 * model.data.predict("score", x, c)
        return x - t * drift

    mean, std = marginal(model.data, c)
    centre, there = last(torch.stack([mean, mean + std]))
    return torch.stack([centre, (there - centre).abs()])


def extrapolated_error(noise: Noise, settings: dict[str, Any], path: Interpolant, order: int) -> float:
    """The error's limit for ever finer steps, by Richardson's rule from n steps and 2n."""
    errors = []
    for steps in (settings["steps"], 2 * settings["steps"]):
        sampler, model = Sampler(**settings | {"steps": steps}), ExactModel(gaussian(), path)
        times = sampler.times(model)
        start = marginal(model.data, at(path, times[0]))
        got = output_of(noise, lambda x, s=sampler, m=model: final(s, m, x), steps, start)
        errors.append(got - limit(sampler, model, times))
    return (errors[1] + (errors[1] - errors[0]) / (2**order - 1)).abs().max().item()


# settings, order by which the error is extrapolated, tolerance on mean and standard deviation
EXACT: dict[str, tuple[dict[str, Any], int, float]] = {
    "ddpm-lower": ({"sampler": "ddpm", "steps": 25}, 1, 2.5e-2),
    "ddpm-upper": ({"sampler": "ddpm", "steps": 25, "variance": "upper"}, 1, 1e-2),
    "ddim": ({"sampler": "ddim", "steps": 25}, 1, 5e-3),
    "ddim-0.6": ({"sampler": "ddim", "steps": 25, "eta": 0.6}, 1, 1.5e-2),
    "ode-euler": ({"sampler": "ode-euler", "steps": 25}, 1, 7e-3),
    "ode-heun": ({"sampler": "ode-heun", "steps": 20}, 2, 1e-3),
    "ode-rk4": ({"sampler": "ode-rk4", "steps": 10}, 4, 3e-3),  # 3e-5 but for the cosine path's kinks
    "ode-dopri5": ({"sampler": "ode-dopri5", "steps": 2, "rtol": 1e-4, "atol": 1e-6}, 1, 4e-3),
    "sde": ({"sampler": "sde", "steps": 25}, 1, 5e-3),
    "sde-heun": ({"sampler": "sde-heun", "steps": 20}, 1, 5e-3),
    "dpm-solver++": ({"sampler": "dpm-solver++", "steps": 20}, 2, 2e-3),
}


@paths
@pytest.mark.parametrize("name", list(EXACT))
def test_reproduces_gaussian_data(path: str, name: str, noise: Noise) -> None:
    """Mean and standard deviation of the output are the data's, as the steps become finer."""
    settings, order, tolerance = EXACT[name]
    assert extrapolated_error(noise, {"spacing": "log-snr", **settings}, PATHS[path], order) < tolerance


@paths
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_target_takes_the_same_path(path: str, target: Target, name: str, noise: Noise) -> None:
    """A network of any target, through the library's conversions, walks as the closed forms do, to 1e-6.

    At the times of its own range. With the test above: every interpolant, target and sampler reproduces the data.
    """
    data, steps = gaussian(), 2 if name == "ode-dopri5" else 3
    denoiser = ConditionalModel(exact_denoiser(data, PATHS[path], target))
    truth = ExactModel(data, PATHS[path], target)
    sampler = Sampler(sampler=name, steps=steps, eta=0.5, rtol=1e-2, atol=1e-4)
    assert sampler.times(denoiser) == sampler.times(truth)
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 1, 1, 2)
    outputs = []
    for model in (denoiser, truth):
        noise(waves)
        outputs.append(torch.stack(list(sampler.path(model, x, UNUSED))))
    assert len(outputs[0]) == steps
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("diffusion", list(sde.DIFFUSIONS))
@pytest.mark.parametrize("sampler", ["sde", "sde-heun"])
def test_every_diffusion(diffusion: str, sampler: str, noise: Noise) -> None:
    """Whatever w(t), the SDE has the marginals of the flow, to where the score ends (last step none)."""
    settings = {"sampler": sampler, "steps": 30, "spacing": "log-snr", "diffusion": diffusion, "last_step": "none"}
    assert extrapolated_error(noise, settings | {"diffusion_scale": 0.7}, PATHS["linear"], 1) < 1e-2


@paths
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
@pytest.mark.parametrize("name", ["sde", "sde-heun"])
def test_every_last_step(path: str, last_step: str, name: str, noise: Noise) -> None:
    """The last step takes the state before it to its own formula, for every w(t), to 1e-9."""
    model = ExactModel(gaussian(), PATHS[path])
    for diffusion in sde.DIFFUSIONS:
        sampler = Sampler(sampler=name, steps=2, diffusion=diffusion, last_step=last_step, diffusion_scale=1.3)
        noise(waves)
        before, after = sampler.path(model, torch.ones(2, 1, 1, 2, dtype=torch.float64), UNUSED)
        t = sampler.times(model)[1]
        assert t == pytest.approx(0.04)
        c = at(PATHS[path], t)
        velocity, score = (model.data.predict(what, before, c) for what in ("velocity", "score"))
        w = 1.3 * W[diffusion](c, t)
        expected = {
            "mean": before - t * (velocity - w / 2 * score),
            "tweedie": (before + c.sigma**2 * score) / c.alpha,  # Tweedie's formula
            "euler": before - t * velocity,
        }[last_step]
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)


SMOOTH = ["linear", "gvp", "vp", "variance-exploding", "linear/4"]  # no kinks at steps, no infinite slopes
# solver, coarse number of steps, order
ORDERS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "euler": (ode.euler, 32, 1),
    "heun": (ode.heun, 32, 2),
    "rk4": (ode.rk4, 16, 4),
    "dpm-solver++": (multistep.dpm_solver_pp_2m, 32, 2),
    "ddim": (lambda *a: ddpm.ddim(*a, generator=UNUSED, eta=0.0), 32, 1),
    "ddim-0.5": (lambda *a: ddpm.ddim(*a, generator=UNUSED, eta=0.5), 32, 1),
    "ddpm": (lambda *a: ddpm.ddpm(*a, generator=UNUSED), 32, 1),
    "sde": (lambda *a: sde.euler_maruyama(*a, generator=UNUSED, last_step="none"), 32, 1),
    "sde-heun": (lambda *a: sde.stochastic_heun(*a, generator=UNUSED, last_step="none"), 32, 1),
}


@pytest.mark.parametrize("path", SMOOTH)
@pytest.mark.parametrize("name", list(ORDERS))
def test_order_of_convergence(path: str, name: str, noise: Noise) -> None:
    """From t = 0.9 to 0.2, twice the steps divide the error of mean and deviation by 2^order (to 20 %), or more."""
    solver, steps, order = ORDERS[name]
    model = ExactModel(gaussian(), PATHS[path])
    start, end = (marginal(model.data, at(PATHS[path], t)) for t in (0.9, 0.2))
    errors = []
    for n in (steps, 2 * steps):
        times = torch.linspace(0.9, 0.2, n + 1, dtype=torch.float64).tolist()
        got = output_of(noise, lambda x, times=times: list(solver(model, x, times))[-1], n, start)
        errors.append((got - torch.stack(end)).abs().max().item())
    assert errors[0] / errors[1] > 0.8 * 2**order


def test_stochastic_heun_integrates_its_drift_to_second_order(noise: Noise) -> None:
    """Without the noise it is Heun's method: doubling the steps divides the error of the mean by 4, Euler's by 2."""
    model = ExactModel(gaussian(), PATHS["vp"])
    start, end = (marginal(model.data, at(PATHS["vp"], t))[0] for t in (0.9, 0.2))
    noise(lambda x, draw: torch.zeros_like(x))
    for solver, order in ((sde.stochastic_heun, 2), (sde.euler_maruyama, 1)):
        errors = []
        for n in (64, 128):
            times = torch.linspace(0.9, 0.2, n + 1, dtype=torch.float64).tolist()
            *_, got = solver(model, start, times, generator=UNUSED, last_step="none")
            errors.append((got - end).abs().max().item())
        assert 0.8 * 2**order < errors[0] / errors[1] < 1.25 * 2**order


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("path", ["linear", "vp", "ddpm", "variance-exploding"])
def test_ancestral_sampling_of_one_point_is_exact(path: str, name: str, noise: Noise) -> None:
    """When all data are one point the lower variance is the truth, for any eta and few steps."""
    model = ExactModel(gaussian(std=(0.0, 0.0)), PATHS[path])
    times = [0.95, 0.6, 0.55, 0.1]
    start = marginal(model.data, at(PATHS[path], 0.95))
    for eta in (0.0, 0.3, 1.0):
        solver = ddpm.ddpm if name == "ddpm" else lambda *a, eta=eta, **k: ddpm.ddim(*a, eta=eta, **k)
        got = output_of(noise, lambda x, f=solver: list(f(model, x, times, generator=UNUSED))[-1], 3, start)
        torch.testing.assert_close(got, torch.stack(marginal(model.data, at(PATHS[path], 0.1))), rtol=1e-9, atol=1e-9)


def test_ancestral_sampling_of_unit_noise_is_exact(noise: Noise) -> None:
    """When data are N(0, 1) and the path preserves variance, the upper variance is the truth: x_s ~ N(0, 1)."""
    model = ExactModel(gaussian((0.0, 0.0), (1.0, 1.0)), PATHS["cosine"])
    start = marginal(model.data, at(PATHS["cosine"], 1.0))
    run = lambda x: list(ddpm.ddpm(model, x, [1.0, 0.7, 0.3], generator=UNUSED, variance="upper"))[-1]  # noqa: E731
    got = output_of(noise, run, 2, start)
    torch.testing.assert_close(
        got, torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 1, 2)
    )


# ------------------------------------------------------------------------------------------------------- mixture data


@paths
@pytest.mark.parametrize("name", ["ode-rk4", "ode-dopri5", "dpm-solver++"])
def test_flow_of_a_mixture_keeps_quantiles(path: str, name: str) -> None:
    """In one dimension the flow maps quantile to quantile: F_0(x_0) = F_1(x_1), from a velocity network, to 1e-2."""
    data = two_bumps()
    model = ConditionalModel(exact_denoiser(data, PATHS[path], "v" if name == "dpm-solver++" else "velocity"))
    sampler = Sampler(sampler=name, steps={"ode-rk4": 25, "ode-dopri5": 2}.get(name, 60), spacing="log-snr", rtol=1e-4)
    times = sampler.times(model)
    c = at(PATHS[path], times[0])
    x = torch.linspace(-2.2, 2.2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1) * c.sigma
    *_, before, end = [x, *sampler.path(model, x, UNUSED)]
    reached = (end, times[-1]) if model.time_range("velocity")[0] == 0 else (before, times[-2])
    got = data.cdf(reached[0], at(PATHS[path], reached[1]))
    torch.testing.assert_close(got, data.cdf(x, c), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("ddpm", {"sampler": "ddpm", "steps": 100, "variance": "upper"}),
        ("cosine", {"sampler": "ddim", "steps": 100, "eta": 0.5}),
        ("linear", {"sampler": "sde", "steps": 100, "last_step_size": 0.01}),
        ("gvp", {"sampler": "sde-heun", "steps": 60, "last_step_size": 0.01, "diffusion": "sin2"}),
        ("vp", {"sampler": "dpm-solver++", "steps": 40, "spacing": "log-snr"}),
    ],
    ids=["ddpm", "ddim", "sde", "sde-heun", "dpm-solver++"],
)
def test_samples_of_a_mixture(path: str, settings: dict[str, Any]) -> None:
    """4,000 samples: Kolmogorov-Smirnov distance below 0.045, mode weight 0.3 within 0.035 (5 standard errors)."""
    data, n = two_bumps(), 4000
    model = ConditionalModel(exact_denoiser(data, PATHS[path], "noise"))
    generator = torch.Generator().manual_seed(1)
    x = randn((n, 1, 1, 1), generator, dtype=torch.float64)
    *_, samples = Sampler(**settings).path(model, x, generator)
    ordered = samples.flatten().sort().values.reshape(-1, 1, 1, 1)
    distance = (data.cdf(ordered, at(PATHS[path], 0.0)).flatten() - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 0.045
    assert (samples < -0.2).double().mean().item() == pytest.approx(0.3, abs=0.035)


# ------------------------------------------------------------------------------------------ the official code's numbers

SIT_X = numbers("-1.1 0.4 0.7 1.6 -0.2 0.9").reshape(3, 1, 1, 2)
SIT_TIMES = numbers("0.2 0.55 0.9")  # the official code's: 0 is noise


def sit_denoiser(path: str, target: Target = "velocity") -> Denoiser:
    """The formula given to the official SiT code; its velocity points the other way, as its time does."""
    sign = -1 if target == "velocity" else 1
    network = FormulaNetwork(lambda x, time: sign * (0.3 * x + torch.sin(x + 2 * time)))
    return Denoiser(network, interpolant(path), target, time_input=(-1.0, 1.0))


# what the official network predicts, and how it is read
SIT_READINGS: dict[tuple[str, Target, Target], str] = {
    ("linear", "velocity", "score"): "1.131445578 -0.290660977 -0.108630673 -2.446535702 10.456162427 -2.723581078",
    ("linear", "velocity", "noise"): "-0.905156463 0.232528782 0.048883803 1.100941066 -1.045616243 0.272358108",
    ("linear", "score", "velocity"): "-9.396870749 5.349424364 2.24132988 3.651492629 -0.117825155 1.077486653",
    ("linear", "noise", "velocity"): "-0.628911564 -2.186780454 -0.879722965 1.259309309 -1.266192892 0.225133466",
    ("linear", "noise", "score"): "1.217772109 -1.046695114 -2.630772513 -2.016399734 -9.39573603 -6.973798802",
    ("gvp", "velocity", "score"): "0.898482776 -0.226792639 0.182423432 -0.923651755 3.976577624 1.903089872",
    ("gvp", "velocity", "noise"): "-0.854507899 0.215692617 -0.118474542 0.59986383 -0.622073793 -0.297708846",
    ("gvp", "score", "velocity"): "-10.027627016 5.981891603 2.527345121 3.363867759 0.183998293 0.397411657",
    ("gvp", "noise", "velocity"): "-0.36570845 -2.322685975 -1.506403337 0.272133571 -1.544033718 -0.885185846",
    ("vp", "velocity", "score"): "0.978374821 -0.295461162 -0.438520678 -1.399584786 1.099113496 -0.232650832",
    ("vp", "velocity", "noise"): "-0.977599794 0.295227111 0.409619181 1.307342625 -0.353972288 0.07492579",
    ("vp", "score", "velocity"): "-16.614483675 9.911222288 8.529120149 11.352162408 0.772854415 1.669261975",
    ("vp", "noise", "velocity"): "-1.001329841 -3.508539673 -2.568796456 2.845978016 -3.257739901 -1.322366751",
}


@pytest.mark.parametrize(("path", "source", "to"), list(SIT_READINGS))
def test_readings_of_official_sit(path: str, source: Target, to: Target) -> None:
    """Velocity (the ODE's drift), score and noise from each prediction, to 1e-7."""
    got = getattr(sit_denoiser(path, source)(SIT_X, 1 - SIT_TIMES), to).flatten()
    expected = numbers(SIT_READINGS[path, source, to])
    torch.testing.assert_close(got, -expected if to == "velocity" else expected, rtol=1e-7, atol=1e-8)


# path, form here, form there: half of w and the drift of the first of two pixels at the three times, of velocity models
SIT_DIFFUSIONS = {
    ("linear", "constant", "constant"): ("1 1 1", "0.157227891 1.075216958 11.39573603"),
    ("linear", "sbdm", "SBDM"): ("8 1.636363636 0.222222222", "3.551564626 1.094967989 2.101369428"),
    ("linear", "sigma", "sigma"): ("0.8 0.45 0.1", "-0.069061225 1.134963828 1.985189846"),
    ("linear", "linear", "linear"): ("0.8 0.45 0.1", "-0.069061225 1.134963828 1.985189846"),
    ("linear", "increasing", "decreasing"): (
        "0.8181356215 0.1779007029 5.988661493e-4",
        "-0.048541756 1.164522158 0.945835445",
    ),
    ("linear", "sin2", "inccreasing-decreasing"): (
        "0.345491503 0.975528258 0.095491503",
        "-0.583312854 1.077875339 1.938048267",
    ),
    ("gvp", "constant", "constant"): ("1 1 1", "-0.075734911 1.366271062 4.916151227"),
    ("gvp", "sbdm", "SBDM"): ("9.66882799 2.683173608 0.497579394", "3.36942002 1.428584499 1.928905145"),
    ("gvp", "sigma", "sigma"): ("0.951056516 0.649448048 0.156434465", "-0.119709788 1.302322172 1.561647396"),
    ("gvp", "increasing", "decreasing"): (
        "0.8181356215 0.1779007029 5.988661493e-4",
        "-0.239136923 1.216300888 0.941955041",
    ),
    ("gvp", "sin2", "inccreasing-decreasing"): (
        "0.345491503 0.975528258 0.095491503",
        "-0.663799523 1.361806843 1.319302976",
    ),
    ("vp", "constant", "constant"): ("1 1 1", "0.004157133 0.745326953 2.038687099"),
    ("vp", "sbdm", "SBDM"): ("16.02 9.055 2.09", "6.862564626 -0.801554738 2.088147206"),
    ("vp", "sigma", "sigma"): ("0.999207843 0.934093195 0.322052536", "0.003382107 0.77422845 1.293545891"),
    ("vp", "linear", "linear"): ("0.8 0.45 0.1", "-0.191517831 0.986513326 1.049484953"),
}


@pytest.mark.parametrize(("path", "ours", "theirs"), list(SIT_DIFFUSIONS))
def test_diffusions_of_official_sit(path: str, ours: str, theirs: str) -> None:
    """w = 2·diffusion and drift of its reverse SDE, to 1e-7. Its "decreasing" falls in its own time, so rises in ours.

    Its SBDM is already half of g², so that form is w itself at scale 1; the others need scale 2.
    """
    half, drift = (numbers(text) for text in SIT_DIFFUSIONS[path, ours, theirs])
    reverse = sde.ReverseSDE(sit_denoiser(path), ours, 1.0 if ours == "sbdm" else 2.0)
    for i, t in enumerate((1 - SIT_TIMES).tolist()):
        w = half[i] if ours == "sbdm" else 2 * half[i]
        assert reverse.w(t).item() == pytest.approx(w.item(), rel=1e-7)
        got = reverse.drift(SIT_X[i : i + 1], t)[0, 0, 0, 0].item()
        assert -got == pytest.approx(drift[i].item(), rel=1e-7)


SIT_SAMPLES: list[tuple[str, dict[str, Any], str]] = [
    ("linear", {"sampler": "ode-euler"}, "-2.243102925 1.298873769 1.620085847 2.314618898 0.312223572 1.799733568"),
    ("linear", {"sampler": "ode-heun"}, "-2.221616544 1.286388978 1.58250607 2.244591524 0.388203518 1.750530952"),
    ("linear", {"sampler": "ode-dopri5"}, "-2.221455379 1.292200783 1.587310109 2.246720622 0.395560036 1.754695619"),
    ("linear", {"sampler": "sde"}, "-0.854204665 0.5984335 0.863288047 1.378442409 1.115401285 1.469677344"),
    (
        "linear",
        {"sampler": "sde", "last_step": "tweedie"},
        "-0.912830704 0.590758149 0.87347038 1.426255804 1.143839566 1.524096918",
    ),
    (
        "linear",
        {"sampler": "sde", "diffusion": "increasing"},
        "-1.63074776 0.637510203 1.125914638 1.817320536 1.022454756 1.62373277",
    ),
    ("linear", {"sampler": "sde-heun"}, "-0.698233849 0.631841691 0.8703196 1.346860856 1.070812621 1.399403039"),
    (
        "linear",
        {"sampler": "sde-heun", "diffusion": "increasing"},
        "-1.640194134 0.668115208 1.131308396 1.812107349 1.050336889 1.617311727",
    ),
    ("gvp", {"sampler": "sde"}, "-1.384341348 0.620619575 0.981985743 1.689327191 1.282091118 1.825517495"),
    (
        "gvp",
        {"sampler": "sde", "last_step": "tweedie"},
        "-1.387243907 0.601163619 0.968388409 1.688823171 1.274188223 1.827099372",
    ),
    (
        "gvp",
        {"sampler": "sde", "last_step": "euler"},
        "-1.389991189 0.602311268 0.970273845 1.692159337 1.276689727 1.830713098",
    ),
    ("gvp", {"sampler": "sde-heun"}, "-1.334049516 0.674851008 1.014151048 1.693524649 1.282542382 1.784357116"),
    ("vp", {"sampler": "sde"}, "-0.892278367 0.350778839 0.644075639 1.424230145 1.125649721 1.677232237"),
    (
        "vp",
        {"sampler": "sde", "diffusion": "sbdm", "diffusion_scale": 1.0},
        "0.575838175 0.007964619 -0.120626666 0.323798572 0.970915659 1.179781682",
    ),
    (
        "vp",
        {"sampler": "sde", "last_step": "none", "steps": 9},
        "-0.880657867 0.36435851 0.633174618 1.390810735 1.104393427 1.678869704",
    ),
    (
        "vp",
        {"sampler": "sde-heun", "last_step": "none", "steps": 9},
        "-0.785975828 0.403313514 0.673206309 1.421638668 1.107629584 1.644166359",
    ),
    (
        "vp",
        {"sampler": "sde-heun", "diffusion": "sbdm", "diffusion_scale": 1.0},
        "0.621822897 0.185551294 0.137456296 0.599499041 1.056103241 1.177651761",
    ),
]


@pytest.mark.parametrize(
    ("path", "settings", "expected"),
    SIT_SAMPLES,
    ids=[f"{path}-{named(settings)}" for path, settings, _ in SIT_SAMPLES],
)
def test_samples_of_official_sit(path: str, settings: dict[str, Any], expected: str, noise: Noise) -> None:
    """Whole runs of 10 steps with the same noises, to 1e-6: its diffusion norm of 1 is scale 2 here (SBDM: 1)."""
    noise(waves)
    sampler = Sampler(**{"steps": 10, "diffusion_scale": 2.0, "rtol": 1e-9, "atol": 1e-9} | settings)
    got = final(sampler, sit_denoiser(path), SIT_X)
    torch.testing.assert_close(got.flatten(), numbers(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ode-euler", "-2.242134196 1.298523157 1.619933109 2.314737303 0.311399305 1.799678283"),
        ("ode-heun", "-2.220728192 1.286159645 1.582466927 2.244812205 0.387422485 1.750584665"),
        ("ode-dopri5", "-2.220568882 1.291962091 1.587264105 2.246939694 0.39476173 1.754743812"),
    ],
    ids=["euler", "heun", "dopri5"],
)
def test_vp_flow_of_official_sit(name: str, expected: str) -> None:
    """The official VP flow stops at t = 1e-3; here that is the state before the last step, which jumps to the data."""
    sampler = Sampler(sampler=name, steps=11, rtol=1e-9, atol=1e-9)
    *_, before, _ = sampler.path(sit_denoiser("vp"), SIT_X, UNUSED)
    torch.testing.assert_close(before.flatten(), numbers(expected), rtol=1e-6, atol=1e-6)


DIT_X = numbers("-1 0.3 -0.485714286 -0.128571429 0.228571429 0.585714286 0.942857143 1.3").reshape(4, 1, 1, 2)


def dit_denoiser() -> Denoiser:
    """The formula given to the official DiT code: noise, and the variance's fraction."""

    def network(x: Tensor, index: Tensor) -> Tensor:
        return torch.cat([0.5 * x + 0.3 * torch.sin(2 * x + index / 200), 0.9 * torch.tanh(x - index / 500)], dim=1)

    return Denoiser(FormulaNetwork(network), interpolant("ddpm"), "noise", learned_variance=True, time_input=(1000, -1))


# respacing there and here; means and learned variances of one step from the retained steps number 1, 2, 4 and 6
DIT_STEPS = {
    "250": (
        (250, "uniform"),
        "-0.982728708 0.292739259 -0.474893363 -0.125686369 0.222468979 0.572621951 0.926142514 1.282978651",
        "0.000116024 0.000290502 0.000506726 0.000571696 0.001299406 0.001380351 0.0020772 0.002115201",
    ),
    "ddim50": (
        (50, "ddim"),
        "-0.941847967 0.27410817 -0.444179659 -0.121381641 0.193249485 0.527176263 0.885687648 1.253802253",
        "0.00018302 0.001250617 0.005969446 0.007017553 0.023239744 0.025124579 0.041822626 0.042935954",
    ),
    "7": (
        (7, "uniform"),
        "-0.704919785 0.086524211 -0.688938245 -0.44278381 0.760454507 1.559898548 1.556867886 1.889922844",
        "2.342692652e-4 4.501398111e-3 0.2432606075 0.2608569218 0.8086282165 0.8129358643 0.9539172743 0.9539831434",
    ),
}


@pytest.mark.parametrize("respacing", list(DIT_STEPS))
def test_steps_of_official_dit(respacing: str, noise: Noise) -> None:
    """Mean (to 1e-6) and learned variance (to 1e-9) of single ancestral steps on respaced schedules."""
    (steps, spacing), means, variances = DIT_STEPS[respacing]
    times = Sampler(sampler="ddpm", steps=steps, spacing=spacing).times(dit_denoiser())
    got = []
    for example, k in zip(DIT_X, (1, 2, 4, 6), strict=True):
        pair = times[-2 - k : -k or None][:2]
        x = example.expand(2, 1, 1, 2)
        noise(lambda x, draw: torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand_as(x))
        (both,) = ddpm.ddpm(dit_denoiser(), x, pair, generator=UNUSED, variance="learned")
        got.append(torch.stack([both[0], (both[1] - both[0]).square()]))
    mean, variance = torch.stack(got, dim=1)
    torch.testing.assert_close(mean.flatten(), numbers(means), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(variance.flatten(), numbers(variances), rtol=1e-6, atol=1e-9)


DIT_SAMPLES: list[tuple[dict[str, Any], str, str]] = [
    # settings; on 7 uniform steps; on 50 whole strides
    (
        {"sampler": "ddpm"},
        "-8.544966166 2.831727778 -5.499607838 3.780080082 5.549810298 7.006208942 5.189950682 2.788457843",
        "-0.52284429 1.244474875 -0.443587201 1.436886538 1.437667446 1.367101047 1.311814269 1.332110581",
    ),
    (
        {"sampler": "ddpm", "variance": "upper"},
        "-8.05483722 2.919573177 -5.305848506 3.726902991 5.477687952 6.989588415 5.264314916 2.890838712",
        "-0.549314559 1.261454623 -0.380447699 1.445282791 1.432587956 1.356082995 1.308237034 1.343544295",
    ),
    (
        {"sampler": "ddpm", "variance": "lower"},
        "-8.547513646 2.391339048 -5.508842579 3.994398769 6.098602367 7.261952888 4.87303558 2.320713707",
        "-0.511138119 1.236398938 -0.451426476 1.407859637 1.463123412 1.433460179 1.367921007 1.337233992",
    ),
    (
        {"sampler": "ddim", "eta": 0.0},
        "-15.975063049 7.624332594 -3.604611174 5.066492427 7.334796884 8.647500898 11.471893447 15.657725981",
        "-9.471581607 3.041625508 -3.556470678 2.565647483 2.940552394 3.928365218 5.389850925 8.304029782",
    ),
    (
        {"sampler": "ddim", "eta": 0.7},
        "-11.674494916 2.705703794 -6.824266897 4.889434327 8.13822263 10.258587197 9.394134461 8.12245344",
        "-3.215670525 1.928072502 -2.624598291 2.015554841 2.076265793 2.061752946 2.017535238 2.001438716",
    ),
    (
        {"sampler": "ddim", "eta": 1.0},
        "-8.547513646 2.391339048 -5.508842579 3.994398769 6.098602367 7.261952888 4.87303558 2.320713707",
        "-0.511138119 1.236398938 -0.451426476 1.407859637 1.463123412 1.433460179 1.367921007 1.337233992",
    ),
]


@pytest.mark.parametrize(("settings", "seven", "fifty"), DIT_SAMPLES, ids=[named(row[0]) for row in DIT_SAMPLES])
def test_samples_of_official_dit(settings: dict[str, Any], seven: str, fifty: str, noise: Noise) -> None:
    """Whole ancestral and DDIM runs on respaced schedules with the same noises, to 1e-6."""
    for respacing, expected in (({"steps": 7}, seven), ({"steps": 50, "spacing": "ddim"}, fifty)):
        noise(waves)
        got = final(Sampler(**settings | respacing), dit_denoiser(), DIT_X)
        torch.testing.assert_close(got.flatten(), numbers(expected), rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- times


def indices(times: Sequence[float], num_steps: int = 1000) -> list[int]:
    """Steps of a respaced schedule, ascending, without the final 0."""
    assert times[-1] == 0
    return [round(t * num_steps) - 1 for t in reversed(times[:-1])]


def test_respacing_of_official_dit() -> None:
    """Its retained steps, including counts at which summing the stride rounds otherwise than multiplying it."""
    assert indices(respaced_times(1000, 7)) == [0, 166, 333, 500, 666, 832, 999]
    fine = indices(respaced_times(1000, 250))
    assert (len(fine), fine[:4], fine[-4:]) == (250, [0, 4, 8, 12], [987, 991, 995, 999])
    assert indices(respaced_times(1000, 50, "ddim")) == list(range(0, 1000, 20))
    assert indices(respaced_times(1000, 21))[9:12] == [450, 499, 549]  # 10·49.95 = 499.5 would round to 500
    assert indices(respaced_times(1000, 43))[3:23] == [
        *(71, 95, 119, 143, 166, 190, 214, 238, 262, 285),
        *(309, 333, 357, 381, 404, 428, 452, 476, 499, 523),
    ]
    assert indices(respaced_times(1000, 1000)) == list(range(1000))


@pytest.mark.parametrize("num_steps", [1, 10, 37])
def test_respacing_to_any_count(num_steps: int) -> None:
    """Every count gives that many different steps, from the first to the last; one step alone starts from noise."""
    for steps in range(1, num_steps + 1):
        kept = indices(respaced_times(num_steps, steps), num_steps)
        assert len(kept) == len(set(kept)) == steps
        assert kept[-1] == num_steps - 1
        assert steps == 1 or kept[0] == 0


@pytest.mark.parametrize("path", ["linear", "vp", "ddpm", "linear-variance", "variance-exploding"])
@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "log-snr"])
def test_times(path: str, name: str, spacing: str) -> None:
    """steps + 1 strictly decreasing times to 0, at all but the last of which the model can be read as it has to be."""
    needs: tuple[Target, ...] = ("velocity",)
    if name.startswith("sde"):
        needs = ("velocity", "score")
    elif not name.startswith("ode"):
        needs = ("data", "noise")
    for target in ("velocity", "noise", "data"):
        model = ExactModel(gaussian(), PATHS[path], target)
        low, high = model.time_range(*needs)
        for steps in (2, 40):
            times = Sampler(sampler=name, steps=steps, spacing=spacing).times(model)
            assert len(times) == steps + 1
            assert all(t > s for t, s in pairwise(times))
            assert (times[0], times[-1]) == (high, 0)
            assert times[-2] >= low


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_whole_strides_are_for_discrete_steps(name: str) -> None:
    """Spacing ddim serves the samplers of a discrete schedule, and no other."""
    sampler, model = Sampler(sampler=name, steps=40, spacing="ddim"), ExactModel(gaussian(), PATHS["ddpm"])
    if name in ("ddpm", "ddim", "dpm-solver++"):
        assert sampler.times(model)[:2] == pytest.approx([0.976, 0.951])
    else:
        with pytest.raises(MezzotintError, match="'ddim' is for ddpm and ddim"):
            sampler.times(model)
    with pytest.raises(MezzotintError, match="'ddim' is for ddpm and ddim"):
        sampler.times(ExactModel(gaussian(), PATHS["linear"]))


def test_grids_by_hand() -> None:
    """Equal steps in t, in √t and in log SNR."""
    assert time_grid(PATHS["linear"], 4, 0.0, 1.0, "uniform") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert time_grid(PATHS["linear"], 4, 0.04, 1.0, "quadratic") == pytest.approx([1, 0.64, 0.36, 0.16, 0.04])
    times = time_grid(PATHS["linear"], 4, 0.2, 0.8, "log-snr")
    # log((1 − t)² / t²) from −log 16 to log 16: t / (1 − t) = 4, 2, 1, ½, ¼
    assert times == pytest.approx([4 / 5, 2 / 3, 1 / 2, 1 / 3, 1 / 5], rel=1e-9)


def test_singular_diffusion_starts_inside() -> None:
    """SBDM's w is infinite at t = 1 where alpha is 0, so that SDE starts eps earlier."""
    model = ExactModel(gaussian(), PATHS["linear"])
    for diffusion, start in (("sigma", 1.0), ("sbdm", 0.99)):
        assert Sampler(sampler="sde", diffusion=diffusion, eps=0.01).times(model)[0] == pytest.approx(start)


@pytest.mark.parametrize("path", ["vp", "ddpm", "cosine", "linear-variance", "linear-variance/0.5"])
@pytest.mark.parametrize("name", ["ode-dopri5", "ode-rk4", "ode-heun"])
def test_solvers_ask_within_the_range(path: str, name: str) -> None:
    """No solver, the adaptive one with its trial steps included, asks the model where it is not defined."""
    model = ExactModel(gaussian(), PATHS[path])
    low, high = model.time_range("velocity")
    for dtype in (torch.float32, torch.float64):
        x = torch.full((2, 1, 1, 2), 0.7, dtype=dtype)
        out = final(Sampler(sampler=name, steps=3), model, x)
        assert out.isfinite().all()
    assert low <= min(model.asked)
    assert max(model.asked) <= high


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("path", ["linear", "vp", "ddpm"])
@pytest.mark.parametrize("name", [name for name, cost in SAMPLERS.items() if cost])
@pytest.mark.parametrize("last_step", ["mean", "none"])
def test_evaluations_are_the_calls(path: str, name: str, last_step: str) -> None:
    """`evaluations` counts the network's calls, for regular and singular paths and with or without a last step."""
    model = ConditionalModel(exact_denoiser(gaussian(), PATHS[path]))
    sampler = Sampler(sampler=name, steps=7, last_step=last_step)
    states = list(sampler.path(model, torch.ones(1, 1, 1, 2, dtype=torch.float64), torch.Generator().manual_seed(0)))
    backbone = model.denoiser.backbone
    assert isinstance(backbone, ExactBackbone)
    assert len(backbone.calls) == sampler.evaluations(model)
    assert len(states) == 7


def test_margin_and_last_step_are_as_large_as_is_said() -> None:
    """Data cannot be told from noise at t = 1, nor a score from a velocity at t = 0."""
    noise, velocity = (ExactModel(gaussian(), PATHS["linear"], target) for target in ("noise", "velocity"))
    for name in ("ddim", "dpm-solver++", "ode-euler"):
        assert Sampler(sampler=name, steps=4, eps=0.1).times(noise)[0] == pytest.approx(0.9)
    assert Sampler(sampler="sde", steps=4, eps=0.1, last_step="none").times(velocity)[-1] == pytest.approx(0.1)
    assert Sampler(sampler="sde", steps=4, last_step_size=0.2).times(velocity)[-2:] == pytest.approx([0.2, 0])


def test_evaluations_by_hand() -> None:
    regular, singular = (ExactModel(gaussian(), PATHS[name]) for name in ("linear", "vp"))
    assert Sampler(sampler="ode-heun", steps=10).evaluations(regular) == 20
    assert Sampler(sampler="ode-heun", steps=10).evaluations(singular) == 19
    assert Sampler(sampler="sde", steps=250).evaluations(regular) == 250
    assert Sampler(sampler="sde-heun", steps=250).evaluations(regular) == 499
    assert Sampler(sampler="sde-heun", steps=250, last_step="none").evaluations(regular) == 500
    assert Sampler(sampler="dpm-solver++", steps=20).evaluations(singular) == 20
    assert Sampler(sampler="ode-dopri5").evaluations(regular) is None


def test_shorthand() -> None:
    """`sde-sigma` is sde with w = sigma, and so on for every form."""
    for form in sde.DIFFUSIONS:
        for name in ("sde", "sde-heun"):
            sampler = Sampler.parse({"sampler": f"{name}-{form}"})
            assert (sampler.sampler, sampler.diffusion) == (name, form)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0 is not valid"),
        ({"sampler": "ode-hein"}, "sampler 'ode-hein' is unknown; closest: ode-heun"),
        ({"sampler": "sde-sigm"}, "sde diffusion 'sigm' is unknown; closest: sigma"),
        ({"diffusion": "simga"}, "sde diffusion 'simga' is unknown; closest: sigma"),
        ({"last_step": "tweedy"}, "last_step = 'tweedy' is not valid"),
        ({"variance": "big"}, "variance = 'big' is not valid"),
        ({"eta": 1.5}, "eta = 1.5 is not valid"),
        ({"spacing": "karras"}, "spacing = 'karras' is not valid"),
        ({"step": 5}, "key 'step' is unknown; closest: steps"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        Sampler.parse(values)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("linear", {"sampler": "sde", "steps": 1}, "at least 2 for sde"),
        ("vp", {"sampler": "ode-euler", "steps": 1}, "at least 2 for ode-euler with this model"),
        ("ddpm", {"sampler": "ddpm", "steps": 1001}, "steps must be 1 to 1000"),
        ("ddpm", {"sampler": "ddpm", "steps": 999, "spacing": "ddim"}, "cannot make exactly 999 steps of 1000"),
        ("ddpm", {"sampler": "ddim", "steps": 1, "spacing": "ddim"}, "cannot make exactly 1 steps of 1000"),
        ("ddpm", {"sampler": "ddpm", "variance": "learned"}, "this model has none"),
        ("linear", {"sampler": "ddpm", "spacing": "ddim"}, "on an interpolant with steps"),
    ],
)
def test_meaningless_combinations(path: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        list(Sampler(**settings).path(ExactModel(gaussian(), PATHS[path]), torch.zeros(1, 1, 1, 2), UNUSED))


def test_grid_needs_a_step() -> None:
    with pytest.raises(MezzotintError, match="at least 1, got 0"):
        time_grid(PATHS["linear"], 0, 0.0, 1.0, "uniform")
    with pytest.raises(MezzotintError, match="'quadratic' is not for a discrete schedule"):
        respaced_times(10, 5, "quadratic")


# -------------------------------------------------------------------------------------------- batches, precision, noise


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ode-dopri5"])
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    """Example i of seed s is the same alone, in twos and in fives; another seed gives another."""
    model = ConditionalModel(exact_denoiser(gaussian(), PATHS["linear"], "noise"))
    sampler = Sampler(sampler=name, steps=5, eta=0.5)

    def draw(seed: int, members: range) -> Tensor:
        generators = example_generators(seed, members)
        return final_from(sampler, model, randn((len(members), 1, 1, 2), generators, dtype=torch.float64), generators)

    whole = draw(7, range(5))
    for size in (1, 2):
        parts = [draw(7, range(i, min(i + size, 5))) for i in range(0, 5, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(draw(8, range(5)), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 5


def final_from(sampler: Sampler, model: Model, x: Tensor, generator: Any) -> Tensor:
    *_, last = sampler.path(model, x, generator)
    return last


def test_noise_of_one_generator() -> None:
    """One generator for the batch draws as torch.randn does."""
    got = randn((3, 2), torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("learned", [False, True])
def test_float32(name: str, learned: bool, noise: Noise) -> None:
    """Sampling in float32, as networks do, learned variance included: the dtype is kept, float64's result to 1e-3."""
    denoiser = dit_denoiser() if learned else exact_denoiser(gaussian(), PATHS["linear"])
    sampler = Sampler(sampler=name, steps=6, eta=0.3, rtol=1e-4, atol=1e-4)
    outputs = []
    for dtype in (torch.float32, torch.float64):
        noise(waves)
        x = torch.linspace(-1, 1, 6, dtype=dtype).reshape(3, 1, 1, 2)
        states = list(sampler.path(denoiser, x, UNUSED))
        assert all(state.dtype == dtype for state in states)
        outputs.append(states[-1].double())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
