"""Training losses against hand computation, torch.distributions and the numbers of the official code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exact import PATHS, FormulaNetwork, at, exact_denoiser, gaussian, numbers, quantity
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from mezzotint.denoiser import Denoiser
from mezzotint.interpolants import interpolant
from mezzotint.objectives import Draw, Objective, discretised_log_likelihood, variational_bound
from mezzotint.targets import TARGETS, Target
from mezzotint.weightings import DiscreteSteps, Uniform, weighting


class Recorder(nn.Module):
    """A network that remembers the labels it was given and outputs its input, scaled by a parameter."""

    in_channels, input_size = 1, (1, 2)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))
        self.labels: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.labels = y
        return self.scale * x


def objective(denoiser: Denoiser, name: str = "none", **options: Any) -> Objective:
    return Objective(denoiser, weighting=weighting(name), times=Uniform(), **options)


def draw_of(t: Tensor, eps: Tensor) -> Draw:
    return Draw(t, eps, torch.zeros(len(t), dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------- plain losses


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("target", TARGETS)
def test_loss_by_hand(path: str, target: Target) -> None:
    """mean over pixels of w·(network(alpha x + sigma eps) − (a x + b eps))², with the min-SNR weight written out."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 4, 1, 1, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.95], dtype=torch.float64)
    denoiser = Denoiser(FormulaNetwork(lambda x_t, time: torch.sin(x_t) + time / 1000), PATHS[path], target)
    losses = objective(denoiser, "min-snr")(x, None, draw_of(t, eps))
    assert set(losses) == {"loss", "mse"}
    for i in range(4):
        c = at(PATHS[path], t[i])
        error = torch.sin(c.alpha * x[i] + c.sigma * eps[i]) + t[i] - quantity(target, x[i], eps[i], c)
        mse = error.square().sum().item() / 2
        assert losses["mse"][i].item() == pytest.approx(mse, rel=1e-10)
        # An error of the target is an error of the data prediction times alpha·b − sigma·a over b (or 1 for data).
        (a, b) = {
            "data": (1, 0),
            "noise": (0, 1),
            "velocity": (c.d_alpha, c.d_sigma),
            "score": (0, -1 / c.sigma),
            "v": (-c.sigma, c.alpha),
        }[target]
        to_data = c.sigma / (c.sigma * a - c.alpha * b)
        weight = min((c.alpha / c.sigma).item() ** 2, 5.0) * float(to_data) ** 2
        assert losses["loss"][i].item() == pytest.approx(weight * mse, rel=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_exact_model_has_the_posterior_variance_as_loss(target: Target) -> None:
    """The optimal data loss of Gaussian data at t is s²·sigma² / (alpha²s² + sigma²), within 4 standard errors.

    Every target reaches it under the `data` weighting, so no network could do better by predicting something else.
    """
    data, path, n = gaussian((0.3,), (0.6,)), PATHS["gvp"], 20000
    generator = torch.Generator().manual_seed(0)
    x, eps = data.sample(n, generator), torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    t = torch.full((n,), 0.4, dtype=torch.float64)
    loss = objective(exact_denoiser(data, path, target), "data")(x, None, draw_of(t, eps))["loss"]
    alpha, sigma = math.cos(0.2 * math.pi), math.sin(0.2 * math.pi)
    variance = (0.6 * sigma) ** 2 / ((0.6 * alpha) ** 2 + sigma**2)
    assert loss.mean().item() == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))


# Losses of the official SiT code for its three predictions, paths and weights, at x = DATA, noise = NOISE, its times
# 0.2, 0.55, 0.9 (0 is noise there) and the network 0.3·x + sin(x + 2·time).
SIT_X = numbers("-1.1 0.4 0.7 1.6 -0.2 0.9").reshape(3, 1, 1, 2)
SIT_NOISE = numbers("0.5 -1.3 1.1 0.2 -0.6 -0.9").reshape(3, 1, 1, 2)
SIT_TIMES = numbers("0.2 0.55 0.9")
SIT_LOSSES = {
    ("linear", "velocity", "none"): "5.597604259 1.277161805 0.641031974",
    ("linear", "score", "none"): "2.393482852 1.594698657 0.464965777",
    ("linear", "score", "velocity"): "59.837071293 5.271731096 0.574031823",
    ("linear", "score", "likelihood"): "14.959267823 6.443226895 5.166286407",
    ("linear", "noise", "none"): "0.120795398 0.472761748 2.609466448",
    ("linear", "noise", "velocity"): "3.019884949 1.562848754 3.221563516",
    ("linear", "noise", "likelihood"): "0.754971237 1.910148477 28.994071642",
    ("gvp", "velocity", "none"): "5.425726488 1.484866945 0.34802165",
    ("gvp", "score", "none"): "3.031857694 2.017359431 0.406853237",
    ("gvp", "score", "velocity"): "78.340049002 8.608589644 1.029052841",
    ("gvp", "score", "likelihood"): "16.204662877 6.416722065 4.136235758",
    ("gvp", "noise", "none"): "0.050050051 0.356570107 2.558407543",
    ("gvp", "noise", "velocity"): "1.293241252 1.521576016 6.470973581",
    ("gvp", "noise", "likelihood"): "0.267507345 1.134161437 26.009813335",
    ("vp", "velocity", "none"): "1.626899592 1.008720111 3.701980103",
    ("vp", "score", "none"): "3.98529296 3.069801854 0.24256616",
    ("vp", "score", "velocity"): "256.102380699 72.118526593 2.553932114",
    ("vp", "score", "likelihood"): "31.972831548 15.928995382 2.443954176",
    ("vp", "noise", "none"): "0.086917904 0.48684116 2.654702299",
    ("vp", "noise", "velocity"): "5.585507102 11.437307291 27.950846254",
    ("vp", "noise", "likelihood"): "0.697316742 2.526186039 26.747221296",
}


@pytest.mark.parametrize(("path", "target", "name"), list(SIT_LOSSES))
def test_losses_of_official_sit(path: str, target: Target, name: str) -> None:
    """To 1e-7. Its velocity points the other way (its time runs from noise); its plain score loss is `noise` here."""
    sign = -1 if target == "velocity" else 1
    network = FormulaNetwork(lambda x, time: sign * (0.3 * x + torch.sin(x + 2 * time)))
    denoiser = Denoiser(network, interpolant(path), target, time_input=(-1.0, 1.0))
    name = "noise" if (target, name) == ("score", "none") else name
    loss = objective(denoiser, name)(SIT_X, None, draw_of(1 - SIT_TIMES, SIT_NOISE))["loss"]
    torch.testing.assert_close(loss, numbers(SIT_LOSSES[path, target, "none" if name == "noise" else name]), **CLOSE)


CLOSE: dict[str, float] = {"rtol": 1e-7, "atol": 1e-8}


# ------------------------------------------------------------------------------------------------------ random numbers


def test_draw() -> None:
    """Shapes and laws of a batch's random numbers, repeatable from the generator's seed."""
    made = objective(Denoiser(Recorder(10), PATHS["linear"]), condition_dropout=0.25)
    draw = made.draw(4000, torch.Generator().manual_seed(0))
    assert (draw.t.shape, draw.eps.shape, draw.drop.shape) == ((4000,), (4000, 1, 1, 2), (4000,))
    assert draw.drop.float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert draw.eps.mean().item() == pytest.approx(0, abs=4 / math.sqrt(8000))
    assert draw.eps.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 8000))
    again = made.draw(4000, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(draw, again, strict=True))
    part = draw.rows(slice(3, 7))
    assert torch.equal(part.t, draw.t[3:7])
    assert torch.equal(part.eps, draw.eps[3:7])
    assert torch.equal(part.drop, draw.drop[3:7])


def test_stratified_draw() -> None:
    made = objective(Denoiser(Recorder(0), PATHS["linear"]), stratified=True)
    t = made.draw(8, torch.Generator().manual_seed(0)).t
    assert torch.equal((t.sort().values * 8).floor(), torch.arange(8.0))


def test_dropped_labels_become_the_null_class() -> None:
    network = Recorder(10)
    x, y = torch.zeros(4, 1, 1, 2), torch.tensor([0, 3, 9, 5])
    draw = Draw(torch.full((4,), 0.5), torch.zeros(4, 1, 1, 2), torch.tensor([True, False, True, False]))
    objective(Denoiser(network, PATHS["linear"]))(x, y, draw)
    assert network.labels is not None
    assert network.labels.tolist() == [10, 3, 10, 5]
    assert objective(Denoiser(network, PATHS["linear"]), condition_dropout=1.0).draw(50, torch.Generator()).drop.all()


def test_unconditional_models_have_no_labels_to_drop() -> None:
    network = Recorder(0)
    made = objective(Denoiser(network, PATHS["linear"]), condition_dropout=1.0)
    draw = made.draw(4, torch.Generator())
    assert not draw.drop.any()
    made(torch.zeros(4, 1, 1, 2), None, draw)
    assert network.labels is None


# ------------------------------------------------------------------------------------------------ the learned variance

# The official DiT code (its float32 tables widened to float64) on these inputs and the network below, at its steps
# 0, 1, 400 and 999.
DIT_X = numbers("-1 0.3 -0.485714286 -0.128571429 0.228571429 0.585714286 0.942857143 1.3").reshape(4, 1, 1, 2)
DIT_NOISE = torch.cos(3 * torch.arange(8, dtype=torch.float64)).reshape(4, 1, 1, 2)
DIT_TIMES = (numbers("0 1 400 999") + 1) / 1000
DIT_LOSSES = {
    "ddpm": (
        "2.411166968 1.320442912 0.504290685 0.051577458",
        "3.859224221 0.9095608955 3.674495843e-3 7.593224550e-4",
    ),
    "cosine": (
        "2.417441585 1.331021937 0.699743236 0.053607423",
        "3.129754173 0.8645888847 3.299848417e-3 38.63099568",
    ),
}


def dit_network(x: Tensor, index: Tensor) -> Tensor:
    noise = 0.5 * x + 0.3 * torch.sin(2 * x + index / 200)
    return torch.cat([noise, 0.9 * torch.tanh(x - index / 500)], dim=1)


def dit_denoiser(path: str = "ddpm", target: Target = "noise") -> Denoiser:
    return Denoiser(
        FormulaNetwork(dit_network), interpolant(path), target, learned_variance=True, time_input=(1000.0, -1.0)
    )


@pytest.mark.parametrize("path", list(DIT_LOSSES))
def test_losses_of_official_dit(path: str) -> None:
    """Mean squared error and bound at the first, second, 401st and last step, to 1e-6; the loss is their sum."""
    losses = objective(dit_denoiser(path))(DIT_X, None, draw_of(DIT_TIMES, DIT_NOISE))
    mse, bound = (numbers(text) for text in DIT_LOSSES[path])
    torch.testing.assert_close(losses["mse"], mse, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["vlb"], bound, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["loss"], mse + bound, rtol=1e-6, atol=0)


def test_highest_bin_of_official_dit() -> None:
    """White pixels at the first step, whose bin reaches to infinity."""
    t = torch.full((4,), 1e-3, dtype=torch.float64)
    losses = objective(dit_denoiser())(torch.ones_like(DIT_X), None, draw_of(t, 0.01 * DIT_NOISE))
    torch.testing.assert_close(losses["vlb"], numbers("1.535839921 1.535518869 1.53522269 1.534978012"), **CLOSE)


@pytest.mark.parametrize("target", TARGETS)
def test_bound_is_a_kl_divergence(target: Target) -> None:
    """KL(q(x_s | x_t, x) ‖ N(mean, learned variance)) by torch.distributions, for every target, in bits per dimension.

    The posterior is Bayes' rule by precisions; the interpolated variance is geometric, lower^(1 − f)·upper^f.
    """
    path = PATHS["ddpm"]
    denoiser = dit_denoiser(target=target)
    i = torch.tensor([2.0, 77.0, 500.0, 1000.0], dtype=torch.float64)
    now, then = at(path, i / 1000), at(path, (i - 1) / 1000)
    x_t = now.alpha * DIT_X + now.sigma * DIT_NOISE
    prediction = denoiser(x_t, i / 1000)
    kept = now.alpha / then.alpha
    upper = 1 - kept**2
    lower = 1 / (1 / then.sigma**2 + kept**2 / upper)

    def posterior_mean(x: Tensor) -> Tensor:
        return lower * (kept / upper * x_t + then.alpha / then.sigma**2 * x)

    fraction = (prediction.variance + 1) / 2
    learned = lower ** (1 - fraction) * upper**fraction
    kl = kl_divergence(
        Normal(posterior_mean(DIT_X), lower.sqrt()), Normal(posterior_mean(prediction.data), learned.sqrt())
    )
    expected = kl.flatten(1).mean(1) / math.log(2)
    got = variational_bound(denoiser, prediction, DIT_X, i / 1000)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_bound_in_float32() -> None:
    """What training uses, float32 throughout: to 2e-4 of float64, first and last step included."""
    single = objective(dit_denoiser())(DIT_X.float(), None, draw_of(DIT_TIMES.float(), DIT_NOISE.float()))
    assert single["vlb"].dtype == torch.float32
    torch.testing.assert_close(single["vlb"].double(), numbers(DIT_LOSSES["ddpm"][1]), rtol=2e-4, atol=0)


def test_bound_trains_the_variance_alone() -> None:
    """The bound's gradient reaches the output's second half and not its first; the squared error's the reverse."""
    output = dit_network(DIT_X, torch.tensor(300.0)).requires_grad_()
    denoiser = Denoiser(FormulaNetwork(lambda x, t: output), PATHS["ddpm"], "noise", learned_variance=True)
    losses = objective(denoiser)(DIT_X, None, draw_of(DIT_TIMES, DIT_NOISE))
    (of_bound,) = torch.autograd.grad(losses["vlb"].sum(), output, retain_graph=True)
    assert (of_bound[:, :1] == 0).all()
    assert (of_bound[:, 1:] != 0).all()
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert (of_mse[:, :1] != 0).all()
    assert (of_mse[:, 1:] == 0).all()


def test_bound_weight() -> None:
    losses = objective(dit_denoiser(), vlb_weight=0.25)(DIT_X, None, draw_of(DIT_TIMES, DIT_NOISE))
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.25 * losses["vlb"])


def test_bound_over_all_steps_bounds_the_likelihood() -> None:
    """The bound's T terms and the prior's, summed for an exact model, exceed −log p of Gaussian data, and not by much.

    Monte Carlo over 4,000 draws of x (standard error 0.02 bits): a wrong factor or a missing step breaks one side.
    """
    path, data, n = interpolant("ddpm", num_steps=100), gaussian((0.1,), (0.2,)), 4000
    generator = torch.Generator().manual_seed(0)
    x = data.sample(n, generator)
    denoiser = exact_denoiser(data, path, "noise", variance=lambda x_t, t: torch.ones_like(x_t))
    total = torch.zeros(n, dtype=torch.float64)
    for i in range(1, 101):
        t = torch.full((n,), i / 100, dtype=torch.float64)
        c = at(path, i / 100)
        x_t = c.alpha * x + c.sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        total += variational_bound(denoiser, denoiser(x_t, i / 100), x, t)
    end = at(path, 1.0)
    prior = kl_divergence(Normal(end.alpha * x, end.sigma.expand_as(x)), Normal(0.0, 1.0)).flatten() / math.log(2)
    # Of integer levels: a bin of width 2 / 255 holds the density times its width.
    exact = -(data.log_prob(x, at(path, 0.0)) + math.log(2 / 255)) / math.log(2)
    gap = (total + prior - exact).mean().item()
    assert 0 < gap < 0.25


def test_discretised_likelihood() -> None:
    """The bins' masses sum to 1, and each is the normal integral over its bin (4e-4: the tanh approximation)."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, std = torch.full_like(levels, 0.2), 0.15
    mass = discretised_log_likelihood(levels, mean, torch.full_like(levels, math.log(std))).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    normal = Normal(0.2, std)
    edges = torch.cat([levels - 1 / 255, levels[-1:] + 1 / 255]).clone()
    edges[0], edges[-1] = -1e6, 1e6
    cdf = normal.cdf(edges)
    torch.testing.assert_close(mass.cumsum(0), cdf[1:], rtol=0, atol=4e-4)


def test_learned_variance_trains_on_steps() -> None:
    """With DiT's settings a draw's times are the schedule's steps, so that the network sees whole indices."""
    made = Objective(dit_denoiser(), weighting=weighting("none"), times=DiscreteSteps(1000))
    t = made.draw(256, torch.Generator().manual_seed(0)).t
    torch.testing.assert_close(1000 * t, (1000 * t).round(), rtol=0, atol=1e-4)
    assert t.min() > 0
