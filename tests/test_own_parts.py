"""Parts of one's own: an interpolant that is `at` alone, a network that is any module."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import PATHS, ExactModel, gaussian
from torch import Tensor, nn

import mezzotint
from mezzotint.interpolants import Coefficients, Interpolant, Pyramid, SNRShift, interpolant
from mezzotint.samplers import SAMPLERS, Sampler, example_generators, randn
from mezzotint.targets import TARGETS

TIMES = torch.tensor([0.0, 1e-6, 3e-4, 0.1, 0.45, 0.9, 0.9997, 1.0], dtype=torch.float64)


class Bare(Interpolant):
    """A path of the library, of which only `at` is known."""

    def __init__(self, path: Interpolant) -> None:
        self.path = path
        self.num_steps, self.t_min, self.prior_std = path.num_steps, path.t_min, path.prior_std

    def at(self, t: Tensor) -> Coefficients:
        return self.path.at(t)


class Cubic(Interpolant):
    """alpha = 1 − t³, sigma = t: neither sum nor norm is 1."""

    def at(self, t: Tensor) -> Coefficients:
        return Coefficients(1 - t**3, t.clone(), -3 * t**2, torch.ones_like(t))


class Short(Interpolant):
    """alpha = 1 − 0.9·t, sigma = 0.1 + t: data and noise are mixed at both ends, along a straight line."""

    def at(self, t: Tensor) -> Coefficients:
        return Coefficients(1 - 0.9 * t, 0.1 + t, torch.full_like(t, -0.9), torch.ones_like(t))


@pytest.mark.parametrize("root", [0.3, 2.0, 16.0])
@pytest.mark.parametrize("name", [name for name in PATHS if "/" not in name])
def test_a_shift_is_the_closed_form_of_the_family(name: str, root: float) -> None:
    """To 1e-12, where the path has the ratio; beyond its end, by the tangent, a variance-preserving one's to 3e-5."""
    path = PATHS[name]
    got, wanted = (made.at(TIMES) for made in (SNRShift(Bare(path), root**2), SNRShift(path, root**2)))
    reached = -2 * (wanted.sigma / wanted.alpha).log() >= path.log_snr(torch.ones_like(TIMES)) - 1e-9
    assert reached[:3].all()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a[reached], b[reached], rtol=1e-7, atol=1e-12)  # GVP's sigma' cancels near t = 1
    for a, b in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=0)


@pytest.mark.parametrize("path", [Cubic(), Short()])
@pytest.mark.parametrize("divisor", [0.05, 9.0])
def test_a_shifted_path_of_ones_own(path: Interpolant, divisor: float) -> None:
    """The ratio is divided at every t, on the path itself; the derivatives are those of the shifted path."""
    shifted = SNRShift(path, divisor)
    t = TIMES[1:-1]
    c, base = shifted.at(t), path.at(t)
    torch.testing.assert_close((c.alpha / c.sigma) ** 2, (base.alpha / base.sigma) ** 2 / divisor, rtol=1e-12, atol=0)
    if isinstance(path, Cubic):
        torch.testing.assert_close(c.alpha, 1 - c.sigma**3, rtol=1e-9, atol=1e-12)
    else:  # the line through (1, 0.1) and (0.1, 1.1), on which both shifts leave [0, 1]
        torch.testing.assert_close(c.alpha, 1 - 0.9 * (c.sigma - 0.1), rtol=1e-12, atol=1e-12)
    h = 1e-6
    inner = t[1:-1]
    before, after, exact = (shifted.at(inner + step) for step in (-h, h, 0))
    for slope, low, high in zip(exact[2:], before[:2], after[:2], strict=True):
        torch.testing.assert_close(slope, (high - low) / (2 * h), rtol=1e-6, atol=1e-8)
    single = shifted.at(t.float())
    assert single.alpha.dtype == torch.float32
    torch.testing.assert_close(single.alpha.double(), c.alpha, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_walks_a_path_of_ones_own(sampler: str, shift: float) -> None:
    """Gaussian data of mean m and deviation s come out of exact predictions: of 400, within 5 standard errors."""
    data = gaussian()
    path: Interpolant = Cubic() if shift == 1 else SNRShift(Cubic(), shift)
    generators = example_generators(0, range(400))
    x = randn((400, *data.shape), generators, dtype=torch.float64)
    settings = Sampler(sampler=sampler, steps=60, spacing="log-snr" if sampler == "ddpm" else "uniform")
    *_, x = settings.path(ExactModel(data, path, "velocity"), x, generators)
    mean, std = x.mean(0), x.std(0)
    torch.testing.assert_close(mean, data.means[0], rtol=0, atol=5 * data.stds.max().item() / 20)
    torch.testing.assert_close(std / data.stds[0], torch.ones_like(std), rtol=0, atol=0.25)


@pytest.mark.parametrize("path", [Cubic(), SNRShift(Cubic(), 4.0)])
def test_the_likelihood_on_a_path_of_ones_own(path: Interpolant) -> None:
    data = gaussian()
    x = data.means + torch.tensor([[-1.0], [0.5]], dtype=torch.float64).reshape(2, 1, 1, 1) * data.stds
    wanted = torch.distributions.Normal(data.means, data.stds).log_prob(x).flatten(1).sum(1)
    got = mezzotint.log_likelihood(ExactModel(data, path, "velocity"), x, divergence="exact")
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_a_pyramid_on_a_path_of_ones_own() -> None:
    """Its second level is shifted, as that of the linear path is."""
    own, known = (Pyramid(path, [4, 16], [2, 4], 2.0) for path in (Bare(interpolant("linear")), interpolant("linear")))
    t = torch.rand(5, generator=torch.Generator().manual_seed(0))
    for a, b in zip(own.coefficients(t, torch.zeros(5, 20)), known.coefficients(t, torch.zeros(5, 20)), strict=True):
        torch.testing.assert_close(a, b)


class Plain(nn.Module):
    """A network as anybody writes it; what it calls layers and condition are not what the library's are."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)])
        self.condition = nn.Embedding(classes + 1, 16)
        self.seen: list[Any] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.seen.append(y)
        hidden = self.layers[0](x) + (t / 1000)[:, None, None, None]
        if y is not None:
            hidden = hidden + self.condition(y)[:, :, None, None]
        return self.layers[1](torch.relu(hidden))


@pytest.mark.parametrize("classes", [0, 3])
def test_a_plain_module_is_trained_and_sampled(classes: int) -> None:
    """Adam halves the loss of constant images; then every sampler draws them."""
    network = Plain(classes)
    torch.manual_seed(0)
    denoiser = mezzotint.Denoiser(network, "linear", in_shape=(1, 8, 8), num_classes=classes)
    objective = mezzotint.Objective(denoiser)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.full((32, 1, 8, 8), 0.5), torch.arange(32) % classes if classes else None
    losses = []
    for _ in range(60):
        loss = objective(x, y, objective.draw(32, generator))["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    if classes:
        assert any((given == classes).any() for given in network.seen), "no label was replaced by the null class"
    model = mezzotint.ConditionalModel(denoiser, None if y is None else y[:4], 2.0 if classes else None)
    for name in SAMPLERS:
        generators = example_generators(0, range(4))
        for states in Sampler(sampler=name, steps=3).path(model, randn((4, 1, 8, 8), generators), generators):
            assert states.shape == (4, 1, 8, 8)
            assert states.isfinite().all()
    model.expect([0.5])
    assert model(x[:4], 0.5).data.shape == (4, 1, 8, 8)


def test_a_pipeline_of_a_plain_module() -> None:
    recipe = mezzotint.load_recipe("digits", {"sampling": {"sampler": "ode-heun", "steps": 2}})
    pipeline = mezzotint.Pipeline(recipe, mezzotint.Denoiser(Plain(3), Cubic(), in_shape=(1, 8, 8), num_classes=3))
    assert mezzotint.sample(pipeline, classes=2, count=3).shape == (3, 1, 8, 8)
    assert "Plain, 369 parameters, 3 classes" in repr(pipeline)
    assert "Cubic, the network predicts velocity" in repr(pipeline)


@pytest.mark.parametrize("target", TARGETS)
def test_an_objective_keeps_to_the_times_that_its_target_has(target: Any) -> None:
    """A score has none at t = 0, and the data cannot be told from the noise at t = 1; steps are those of the path."""
    objective = mezzotint.Objective(mezzotint.Denoiser(Plain(), "linear", target, in_shape=(1, 8, 8)), weighting="data")
    t = objective.draw(20_000, torch.Generator().manual_seed(0)).t
    assert t.min() >= 1e-5 or target != "score"
    assert t.max() < 1 or target != "noise"
    assert t.min() < 1e-3
    assert t.max() > 1 - 1e-3
    steps = mezzotint.Objective(mezzotint.Denoiser(Plain(), "ddpm", target, in_shape=(1, 8, 8)))
    t = steps.draw(2_000, torch.Generator().manual_seed(0)).t * 1000
    torch.testing.assert_close(t, t.round(), rtol=0, atol=1e-3)


X = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda d: mezzotint.pooled_features(d, X, 0.1), "Plain does not name its layers"),
        (lambda d: d.conditions([0.1], torch.zeros(2, dtype=torch.int64)), r"has no method condition\(t, y\)"),
        (lambda d: mezzotint.Denoiser(Plain(), "linear").in_shape, r"in_shape=\(channels, height, width\)"),
        (lambda d: mezzotint.Objective(mezzotint.Denoiser(Plain(), "linear")), r"in_shape=\(channels"),
        (lambda d: mezzotint.ConditionalModel(d, guidance=2.0), "this one has no classes"),
        (lambda d: mezzotint.Denoiser(nn.ReLU, "linear"), "backbone is a torch.nn.Module, not a type"),
        (lambda d: mezzotint.Denoiser(Plain(), "liner"), "closest: linear"),
        (lambda d: mezzotint.Denoiser(Plain(), 3), "interpolant is a mezzotint.Interpolant or the name of one, not 3"),
        (lambda d: d(X, torch.zeros(3)), "x has 2 examples and t 3 times"),
    ],
)
def test_what_a_plain_module_lacks_is_said(ask: Any, sentence: str) -> None:
    with pytest.raises(mezzotint.MezzotintError, match=sentence):
        ask(mezzotint.Denoiser(Plain(), "linear", in_shape=(1, 8, 8)))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda x: x.mean(1, keepdim=True), r"gave a tensor of shape \(2, 1, 4, 4\) for x of shape \(2, 3, 4, 4\)"),
        (lambda x: {"sample": x}, "gave a dict, expected a tensor like x"),
    ],
)
def test_an_answer_that_is_not_like_x_is_refused(answer: Any, sentence: str) -> None:
    """One channel for three would be broadcast, and train on nonsense."""

    class Other(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Any:
            return answer(x)

    with pytest.raises(mezzotint.MezzotintError, match=sentence):
        mezzotint.Denoiser(Other(), "linear")(torch.zeros(2, 3, 4, 4), 0.5)


def test_shift_of_a_path_with_a_fixed_alpha_spreads() -> None:
    """Past the end, along the tangent: alpha stays 1 and sigma grows, as the library's own variance-exploding path."""
    shifted = SNRShift(Bare(interpolant("variance-exploding", sigma_max=3.0)), 16.0)
    end = shifted.at(torch.ones((), dtype=torch.float64))
    assert (end.alpha.item(), end.sigma.item()) == (1.0, pytest.approx(12.0))
    assert shifted.prior_std == pytest.approx(12.0)
    assert math.isclose(end.d_sigma.item(), 12.0)


def test_the_example_of_a_training_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss falls, and every command reads what it writes."""
    path = Path(__file__).parent.parent / "examples" / "training_loop.py"
    example = runpy.run_path(str(path))
    made = example["train"](tmp_path / "run", steps=40, batch_size=16)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses
    assert losses[-1] < 1.5  # of a velocity on data of this scale a fresh network, which answers 0, has 1.7
    again = mezzotint.load(tmp_path / "run")
    assert again.class_names == made.class_names == tuple("0123456789")
    options: dict[str, Any] = {"count": 2, "steps": 2, "sampler": "ode-heun"}
    assert mezzotint.sample(again, 3, **options).equal(mezzotint.sample(made, 3, **options))
    assert {*torch.load(tmp_path / "run" / "training.pt", weights_only=True)} == {"model", "optimizer"}


def test_a_network_of_ones_own_is_not_saved_as_what_could_not_be_loaded(tmp_path: Path) -> None:
    recipe = mezzotint.load_recipe("digits")
    pipeline = mezzotint.Pipeline(recipe, mezzotint.Denoiser(Plain(), "linear", in_shape=(1, 8, 8)))
    with pytest.raises(mezzotint.MezzotintError, match="a Plain is not what the recipe would build"):
        pipeline.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
