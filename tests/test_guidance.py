"""Classifier-free guidance against the exact scores of a mixture whose components are the classes."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from exact import PATHS, ExactBackbone, Mixture, at, exact_denoiser
from torch import Tensor, nn

from mezzotint.backbones.dit import DiT
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.interpolants import interpolant
from mezzotint.samplers import Sampler
from mezzotint.targets import TARGETS, Target, time_range

CLASSES = torch.tensor([0, 2, 1, 2, 3])  # 3 is the null class


def data() -> Mixture:
    """Three classes in 4 channels of one pixel."""
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(3, 4, 1, 1, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + 0.4 * torch.rand(3, 4, 1, 1, generator=generator), [0.2, 0.5, 0.3])


def state() -> Tensor:
    return torch.randn(5, 4, 1, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def network(model: ConditionalModel) -> ExactBackbone:
    backbone = model.denoiser.backbone
    assert isinstance(backbone, ExactBackbone)
    return backbone


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("target", TARGETS)
def test_guiding_any_target_is_the_same(path: str, target: Target) -> None:
    """Guided data, noise, velocity, score and v are all u + 3 (c − u) of the exact ones, to 1e-9 in absolute terms.

    c is the class's own Gaussian and u the mixture; the score is ∇ [3 log p(x_t | y) − 2 log p(x_t)] by autograd.
    """
    model = ConditionalModel(exact_denoiser(data(), PATHS[path], target, conditional=True), CLASSES, Guidance(scale=3))
    for t in (0.07, 0.5, 0.93):
        x, c = state().requires_grad_(), at(PATHS[path], t)
        guided = model(x, t)
        for what in TARGETS:
            conditional, null = (data().predict(what, x, c, y) for y in (CLASSES, torch.full((5,), 3)))
            torch.testing.assert_close(guided.to(what), 3 * conditional - 2 * null, rtol=1e-9, atol=1e-9)
        log = 3 * data().log_prob(x, c, CLASSES) - 2 * data().log_prob(x, c)
        (score,) = torch.autograd.grad(log.sum(), x)
        torch.testing.assert_close(guided.score, score, rtol=1e-9, atol=1e-9)


def test_both_branches_are_one_batch() -> None:
    """One call with the conditional labels and then the null class; a tensor of times is repeated for it."""
    model = ConditionalModel(exact_denoiser(data(), PATHS["linear"], conditional=True), CLASSES, Guidance(scale=1.5))
    whole = model(state(), 0.5)
    separate = model(state(), torch.full((5,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(whole.output, separate.output)
    for time, y in network(model).calls:
        assert time.tolist() == [500.0] * 10
        assert y is not None
        assert y.tolist() == [0, 2, 1, 2, 3, 3, 3, 3, 3, 3]
    assert len(network(model).calls) == 2
    assert whole.x_t.shape == whole.output.shape == (5, 4, 1, 1)


@pytest.mark.parametrize(
    ("guidance", "y", "labels"),
    [
        (Guidance(scale=1), CLASSES, [0, 2, 1, 2, 3]),  # the conditional model alone
        (Guidance(scale=0), CLASSES, [3, 3, 3, 3, 3]),  # the unconditional model alone
        (Guidance(scale=4), None, [3, 3, 3, 3, 3]),  # no labels: both branches are the same
        (Guidance(scale=0, channels=3), CLASSES, [0, 2, 1, 2, 3, 3, 3, 3, 3, 3]),  # the other channel is conditional
    ],
)
def test_shortcuts(guidance: Guidance, y: Tensor | None, labels: list[int]) -> None:
    """Scales 0 and 1 cost one evaluation of half the size, and give the conditional or unconditional model exactly."""
    model = ConditionalModel(exact_denoiser(data(), PATHS["gvp"], conditional=True), y, guidance)
    got = model(state(), 0.3).output
    ((_, seen),) = network(model).calls
    assert seen is not None
    assert seen.tolist() == labels
    c = at(PATHS["gvp"], 0.3)
    conditional, null = (data().predict("velocity", state(), c, which) for which in (CLASSES, torch.full((5,), 3)))
    expected = conditional if guidance.scale == 1 else null
    if guidance.channels:
        expected = torch.cat([null[:, :3], conditional[:, 3:]], dim=1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_channel_subset_is_the_official_rule(target: Target) -> None:
    """DiT's evaluation guides noise on the first 3 of 4 channels; here that holds whatever the network predicts."""
    path, x = PATHS["ddpm"], state()
    guidance = Guidance(scale=1.5, channels=3)
    noise = ConditionalModel(exact_denoiser(data(), path, target, conditional=True), CLASSES, guidance)(x, 0.6).noise
    c = at(path, 0.6)
    conditional, null = (data().predict("noise", x, c, y) for y in (CLASSES, torch.full((5,), 3)))
    torch.testing.assert_close(noise[:, :3], (null + 1.5 * (conditional - null))[:, :3])
    torch.testing.assert_close(noise[:, 3:], conditional[:, 3:])


def test_learned_variance_is_the_conditional_branchs() -> None:
    """As in DiT, guidance leaves the variance alone."""

    class Labelled(nn.Module):
        in_channels, input_size, num_classes = 1, (1, 1), 3

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, x * 0 + y.reshape(-1, 1, 1, 1)], dim=1)

    denoiser = Denoiser(Labelled(), interpolant("ddpm"), "noise", learned_variance=True)
    model = ConditionalModel(denoiser, torch.tensor([2, 0]), Guidance(scale=2))
    assert model.learned_variance
    variance = model(torch.ones(2, 1, 1, 1), 0.5).variance
    assert variance is not None
    assert variance.flatten().tolist() == [2, 0]


@pytest.mark.parametrize(
    ("t", "guided"), [(0.0, False), (0.29, False), (0.3, True), (0.5, True), (0.8, True), (0.81, False), (1.0, False)]
)
def test_interval(t: float, guided: bool) -> None:
    """Inside the closed interval both branches, outside the conditional one alone, for a number and a tensor of t."""
    guidance = Guidance(scale=2, interval=(0.3, 0.8))
    model = ConditionalModel(exact_denoiser(data(), PATHS["linear"], conditional=True), CLASSES, guidance)
    outputs = [model(state(), t).output, model(state(), torch.full((5,), t, dtype=torch.float64)).output]
    assert [len(time) for time, _ in network(model).calls] == [10 if guided else 5] * 2
    c = at(PATHS["linear"], t)
    conditional, null = (data().predict("velocity", state(), c, y) for y in (CLASSES, torch.full((5,), 3)))
    for output in outputs:
        torch.testing.assert_close(output, 2 * conditional - null if guided else conditional)


def test_interval_saves_evaluations_in_sampling() -> None:
    """10 Euler steps at t = 1, 0.9, … 0.1, of which 0.7, 0.6, 0.5 lie in the interval: 13 network rows per example."""
    guidance = Guidance(scale=2, interval=(0.45, 0.75))
    model = ConditionalModel(exact_denoiser(data(), PATHS["linear"], conditional=True), CLASSES, guidance)
    sampler = Sampler(sampler="ode-euler", steps=10)
    assert len(list(sampler.path(model, state(), torch.Generator()))) == 10
    assert len(network(model).calls) == sampler.evaluations(model) == 10
    assert sum(len(time) for time, _ in network(model).calls) == 13 * 5


def test_model_passes_on_its_denoisers_facts() -> None:
    model = ConditionalModel(exact_denoiser(data(), PATHS["linear"], "noise", conditional=True), CLASSES)
    assert model.interpolant is PATHS["linear"]
    assert not model.learned_variance
    assert model.time_range("velocity", eps=0.01) == time_range(PATHS["linear"], "noise", ("velocity",), 0.01)


def test_unconditional_models_ignore_labels() -> None:
    model = ConditionalModel(exact_denoiser(data(), PATHS["linear"]), CLASSES)
    model(state(), 0.5)
    assert network(model).calls[0][1] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda plain, _: ConditionalModel(plain, None, Guidance(scale=2)), "needs a conditional model"),
        (
            lambda _, full: ConditionalModel(full, torch.tensor([4])),
            r"labels must lie in 0..2, or 3 for the null class",
        ),
        (lambda _, full: ConditionalModel(full, torch.tensor([-1])), r"labels must lie in 0..2"),
        (lambda _, full: ConditionalModel(full, CLASSES, Guidance(scale=2, channels=5)), r"the model has 4 channel"),
        (lambda *_: Guidance.parse({"scale": -1}), "scale = -1 is not valid"),
        (lambda *_: Guidance.parse({"interval": (0.8, 0.3)}), r"0 <= low <= high <= 1 .*got \[0.8, 0.3\]"),
        (lambda *_: Guidance.parse({"interval": (0.0, 1.5)}), r"got \[0.0, 1.5\]"),
        (lambda *_: Guidance.parse({"channels": 0}), "channels = 0 is not valid"),
        (lambda *_: Guidance.parse({"scales": 2}), "key 'scales' is unknown; closest: scale"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    plain = exact_denoiser(data(), PATHS["linear"])
    with pytest.raises(MezzotintError, match=message):
        make(plain, exact_denoiser(data(), PATHS["linear"], conditional=True))


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        Guidance(scale=0),
        Guidance(scale=2.5),
        Guidance(scale=2.5, channels=1),
        Guidance(scale=2, interval=(0.3, 0.6)),
    ],
)
def test_conditions_computed_ahead_are_those_computed_at_each_call(
    conditioning: Literal["adaln-zero", "in-context"], guidance: Guidance
) -> None:
    """The same predictions to rounding, also at a time that was not announced; each (time, class) is asked for once."""
    torch.manual_seed(0)
    network = DiT(
        input_size=4, patch_size=2, in_channels=2, width=16, depth=2, heads=2, num_classes=3, conditioning=conditioning
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    denoiser = Denoiser(network, interpolant("linear"))
    plain, ahead = (ConditionalModel(denoiser, CLASSES, guidance) for _ in range(2))
    times = [i / 40 for i in range(40, 0, -1)]
    ahead.expect(times)
    asked = []
    original = network.condition

    def counted(t: Tensor, y: Tensor) -> list[Tensor]:
        asked.extend(zip(t.tolist(), y.tolist(), strict=True))
        return original(t, y)

    x = torch.randn(5, 2, 4, 4)
    with torch.no_grad():
        expected = [plain(x, t).output for t in [*times, 0.123]]
        network.condition = counted  # type: ignore[method-assign]
        found = [ahead(x, t).output for t in times]
        assert len(asked) == len(set(asked)) == 40 * 4, "three classes and the null class, at every time"
        found.append(ahead(x, 0.123).output)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_conditions_ahead_of_an_unconditional_model_change_nothing() -> None:
    network = DiT(input_size=4, patch_size=2, in_channels=2, width=16, depth=1, heads=2)
    model = ConditionalModel(Denoiser(network, interpolant("linear")))
    x = torch.randn(3, 2, 4, 4)
    before = model(x, 0.5).output
    model.expect([0.5, 0.0])
    assert torch.equal(model(x, 0.5).output, before)
