"""Packed pyramids: each level is what it would be alone, in the path, in every sampler, in the loss and in the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import ExactModel, Mixture, at, quantity
from torch import Tensor, nn

from mezzotint.backbones.nested import NestedUNet, pack, unpack
from mezzotint.backbones.unet import UNet
from mezzotint.conditions.text import byte_tokens
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.interpolants import Coefficients, Interpolant, Pyramid, SNRShift, interpolant, transition
from mezzotint.objectives import Draw, Objective
from mezzotint.representations import Pixels, representation
from mezzotint.representations import Pyramid as PyramidImages
from mezzotint.samplers import SAMPLERS, Sampler, ddpm, sde
from mezzotint.samplers.sde import DIFFUSIONS
from mezzotint.targets import TARGETS, Target, time_range
from mezzotint.weightings import DiscreteSteps, Uniform, weighting

BASES = ("linear", "gvp", "vp", "ddpm", "cosine", "linear-variance")
POSITIONS, SIDES = (2, 4, 3), (2, 4, 16)
UNUSED = torch.Generator()


def pyramid(base: str = "cosine", power: float = 1.0) -> Pyramid:
    return Pyramid(interpolant(base), POSITIONS, SIDES, power)


def alone(base: str, power: float = 1.0) -> list[Interpolant]:
    """Each level's own path: its side is 1, 2 and 8 times the smallest one."""
    return [SNRShift(interpolant(base), ratio**power) for ratio in (1, 2, 8)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- path


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_every_level_has_its_own_shifted_path(base: str, power: float) -> None:
    """alpha, sigma and derivatives of each level; the ratio alpha²/sigma² itself is base's over side**power."""
    t = torch.tensor([0.02, 0.4, 0.77, 0.98], dtype=torch.float64)
    path = pyramid(base, power)
    for got, *levels in zip(path.at(t), *(each.at(t) for each in alone(base, power)), strict=True):
        torch.testing.assert_close(got, torch.stack(levels, dim=1), rtol=1e-12, atol=1e-14)
    plain, c = interpolant(base).at(t), path.at(t)
    for level, ratio in enumerate((1, 2, 8)):
        snr = (c.alpha[:, level] / c.sigma[:, level]).square()
        torch.testing.assert_close(snr * ratio**power, (plain.alpha / plain.sigma).square())
    torch.testing.assert_close(path.log_snr(t), interpolant(base).log_snr(t))


def test_values_are_spread_over_the_positions_of_their_level() -> None:
    path = pyramid()
    each = [0, 0, 1, 1, 1, 1, 2, 2, 2]
    rows = normal(5, 3)
    assert torch.equal(path.spread(rows, normal(5, 9)), rows[:, each])
    assert torch.equal(path.spread(rows[0], normal(5, 9)), rows[0][each])
    assert torch.equal(path.spread(rows, normal(5, 6)), rows[:, each[:6]]), "the first two levels alone"
    assert torch.equal(path.spread(rows, normal(5, 2)), rows[:, each[:2]])
    assert path.spread(rows, normal(5, 9).float()).dtype == torch.float32
    scalar = torch.tensor(0.5, dtype=torch.float64)
    assert path.spread(scalar, normal(5, 9)) is scalar


def test_coefficients_of_one_time_and_of_many() -> None:
    path, x = pyramid(), normal(2, 9)
    of_one, of_many = path.coefficients(0.3, x), path.coefficients(torch.tensor([0.3, 0.8]), x)
    for one, many in zip(of_one, of_many, strict=True):
        assert (one.shape, many.shape) == ((9,), (2, 9))
        torch.testing.assert_close(one, many[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(of_many.alpha[0], of_many.alpha[1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("target", TARGETS)
def test_times_are_those_at_which_every_level_is_finite(base: str, target: Target) -> None:
    each = [time_range(path, target, ("velocity", "data"), 0.01) for path in alone(base)]
    expected = max(low for low, _ in each), min(high for _, high in each)
    assert time_range(pyramid(base), target, ("velocity", "data"), 0.01) == expected


def test_a_pyramid_ends_in_noise_of_variance_one() -> None:
    with pytest.raises(MezzotintError, match="a pyramid needs an interpolant that ends in noise of variance 1: linear"):
        pyramid("variance-exploding")


# ----------------------------------------------------------------------------------------------------------- samplers


DATA = [
    Mixture([[0.3, -0.5]], [[0.4, 0.8]]),
    Mixture([[0.1, -0.2, 0.7, 0.0]], [[0.2, 0.5, 0.3, 1.1]]),
    Mixture([[-0.9, 0.4, 0.2]], [[0.6, 0.1, 0.9]]),
]
"""Each level's data, Gaussian and independent of the others'."""


def level_coefficients(path: Pyramid, t: float, level: int) -> Coefficients:
    return Coefficients(*(value[level] for value in path.at(torch.tensor(t, dtype=torch.float64))))


class LevelNetwork(nn.Module):
    """The exact prediction of `target` for the levels that it is given, each by its own data."""

    num_classes = 0

    def __init__(self, path: Pyramid, target: Target) -> None:
        super().__init__()
        self.path, self.target = path, target
        self.in_shape = (sum(POSITIONS),)
        self.level_shapes = tuple((count,) for count in POSITIONS)

    def forward(self, x: Tensor, time: Tensor, y: None) -> Tensor:
        levels = unpack(x, self.level_shapes)
        t = time[0].item() / 1000
        return pack(
            data.predict(self.target, level, level_coefficients(self.path, t, number))
            for number, (data, level) in enumerate(zip(DATA, levels, strict=False))
        )


class Alone(ExactModel):
    """One level by itself, at the times that the pyramid's model may be asked at."""

    def __init__(self, level: int, path: Pyramid, target: Target) -> None:
        super().__init__(DATA[level], path.paths[level], target)
        self.whole = path

    def time_range(self, *to: Target, eps: float = 1e-3) -> tuple[float, float]:
        return time_range(self.whole, self.target, to or (self.target,), eps)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the samplers' noise: draw k of a state is `columns` of one table's k-th page."""
    pages = normal(30, 4, sum(POSITIONS), seed=5)
    state: dict[str, Any] = {"columns": slice(None), "draws": iter(range(30))}
    for module in (ddpm, sde):
        monkeypatch.setattr(module, "randn_like", lambda x, generator: pages[next(state["draws"])][:, state["columns"]])
    return state


WAYS = [
    *({"sampler": name} for name in SAMPLERS),
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddim", "eta": 0.4},
    {"sampler": "ddpm", "variance": "upper"},
    *({"sampler": "sde", "diffusion": form} for form in DIFFUSIONS if form != "sigma"),
    *({"sampler": name, "last_step": step} for name in ("sde", "sde-heun") for step in ("tweedie", "euler", "none")),
]


def final(sampler: Sampler, model: Any, x: Tensor) -> Tensor:
    *_, last = sampler.path(model, x, UNUSED)
    return last


@pytest.mark.parametrize("settings", WAYS, ids=lambda way: " ".join(map(str, way.values())))
@pytest.mark.parametrize(
    ("base", "target"), [("cosine", "v"), ("linear", "velocity"), ("gvp", "data"), ("vp", "score"), ("ddpm", "noise")]
)
def test_every_level_is_sampled_as_if_alone(
    base: str, target: Target, settings: dict[str, Any], noise: dict[str, Any]
) -> None:
    """Same start, same noise: level r of the packed state is what its data's own closed form gives with r's path.

    The adaptive solver takes other steps for three levels than for one, and agrees within its tolerance, which the
    kinks of a discrete schedule widen.
    """
    path = pyramid(base)
    sampler = Sampler.parse({"steps": 5, "rtol": 1e-5, "atol": 1e-5} | settings)
    x = normal(4, sum(POSITIONS))
    tolerance = 1e-9 if sampler.sampler != "ode-dopri5" else 1e-3 if path.num_steps is None else 1e-2
    packed = final(sampler, Denoiser(LevelNetwork(path, target), path, target), x)
    assert packed.isfinite().all()
    start = 0
    for level, count in enumerate(POSITIONS):
        noise["columns"], noise["draws"] = slice(start, start + count), iter(range(30))
        got = final(sampler, Alone(level, path, target), x[:, start : start + count])
        torch.testing.assert_close(packed[:, start : start + count], got, rtol=tolerance, atol=tolerance)
        start += count


def test_a_prefix_is_sampled_as_in_the_whole() -> None:
    """The low resolutions of a state are not touched by the high ones."""
    path, x = pyramid(), normal(4, sum(POSITIONS))
    model = Denoiser(LevelNetwork(path, "v"), path, "v")
    for settings in ({"sampler": "ddim"}, {"sampler": "ode-heun"}, {"sampler": "dpm-solver++"}):
        sampler = Sampler.parse({"steps": 4} | settings)
        torch.testing.assert_close(final(sampler, model, x[:, :6]), final(sampler, model, x)[:, :6])


def test_steps_of_equal_log_snr_are_the_smallest_levels() -> None:
    path = pyramid("linear")
    sampler = Sampler(sampler="dpm-solver++", steps=6, spacing="log-snr")
    times = sampler.times(Denoiser(LevelNetwork(path, "velocity"), path, "velocity"))
    log_snr = interpolant("linear").log_snr(torch.tensor(times[1:-1], dtype=torch.float64))
    torch.testing.assert_close(log_snr.diff(), log_snr.diff()[0].expand(4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", ["linear", "cosine"])
def test_ancestral_steps_keep_each_levels_marginal(base: str) -> None:
    """With x known, mean and variance of x_s given x ~ q(x_s | x_t, x) are alpha_s·x and sigma_s², at every level."""
    path, t, s = pyramid(base), 0.7, 0.4
    step = transition(path, t, s)
    now, then = (path.at(torch.tensor(u, dtype=torch.float64)) for u in (t, s))
    torch.testing.assert_close(step.from_x_t * now.alpha + step.from_data, then.alpha)
    torch.testing.assert_close((step.from_x_t * now.sigma) ** 2 + step.lower, then.sigma**2)


@pytest.mark.parametrize("solver", ["ode-dopri5", "ode-rk4"])
def test_the_flow_moves_every_position_by_its_own_quantiles(solver: str) -> None:
    """Gaussian closed form: (x_t − mean_t) / std_t stays what it was at t = 1, and is undone at t = 0."""
    path, x = pyramid("linear"), normal(4, sum(POSITIONS))
    sampler = Sampler(sampler=solver, steps=60, rtol=1e-7, atol=1e-8)
    got = final(sampler, Denoiser(LevelNetwork(path, "velocity"), path, "velocity"), x)
    means = torch.cat([data.means[0] for data in DATA])
    stds = torch.cat([data.stds[0] for data in DATA])
    torch.testing.assert_close(got, means + stds * x, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- objective


class Scaled(nn.Module):
    """Every level times a parameter of its own; a level's parameter is not asked for where the level is absent."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (sum(POSITIONS),)
        self.level_shapes = tuple((count,) for count in POSITIONS)
        self.scales = nn.ParameterList(torch.tensor(v, dtype=torch.float64) for v in (0.5, -0.3, 1.2))

    def forward(self, x: Tensor, time: Tensor, y: None) -> Tensor:
        levels = zip(self.scales, unpack(x, self.level_shapes), strict=False)
        return pack(scale * torch.sin(level) for scale, level in levels)


def pyramid_objective(target: Target = "v", name: str = "none", base: str = "cosine", **options: Any) -> Objective:
    denoiser = Denoiser(Scaled(), pyramid(base), target)
    return Objective(denoiser, weighting=weighting(name), times=Uniform(0.01, 0.99), **options)


def batch(count: int) -> tuple[Tensor, Draw]:
    n = sum(POSITIONS)
    t = torch.linspace(0.1, 0.9, count, dtype=torch.float64)
    return normal(count, n), Draw(t, normal(count, n, seed=1), torch.zeros(count, dtype=torch.bool))


def level_errors(objective: Objective, x: Tensor, draw: Draw, i: int) -> list[tuple[Tensor, Coefficients]]:
    """Squared errors of example i's target at each level, from the level's own path, one level at a time."""
    network = objective.denoiser.backbone
    assert isinstance(network, Scaled)
    found, start = [], 0
    base = objective.denoiser.interpolant.base  # type: ignore[union-attr]
    for count, ratio, scale in zip(POSITIONS, (1, 2, 8), network.scales, strict=True):
        c = at(SNRShift(base, ratio), float(draw.t[i]))
        clean, eps = x[i, start : start + count], draw.eps[i, start : start + count]
        true = quantity(objective.denoiser.target, clean, eps, c)
        found.append(((scale * torch.sin(c.alpha * clean + c.sigma * eps) - true) ** 2, c))
        start += count
    return found


@pytest.mark.parametrize("base", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weights", [(), (4.0, 1.0, 0.25)])
def test_loss_is_the_sum_of_the_levels_means(base: str, target: Target, weights: tuple[float, ...]) -> None:
    objective = pyramid_objective(target, base=base, level_weights=weights)
    x, draw = batch(4)
    losses = objective(x, None, draw)
    for i in range(4):
        means = [errors.sum().item() / len(errors) for errors, _ in level_errors(objective, x, draw, i)]
        expected = sum(w * mean for w, mean in zip(weights or (1, 1, 1), means, strict=True))
        assert losses["loss"][i].item() == pytest.approx(expected, rel=1e-9)
        assert losses["mse"][i].item() == pytest.approx(sum(means) / 3, rel=1e-9)


def test_v_whose_loss_is_on_noise_is_weighted_by_each_levels_alpha() -> None:
    """eps = alpha·v + sigma·x_t where alpha² + sigma² = 1, so an error of v is one of eps times alpha, of its level."""
    objective = pyramid_objective("v", "noise")
    x, draw = batch(4)
    losses = objective(x, None, draw)
    for i in range(4):
        parts = [(c.alpha**2 * errors).mean().item() for errors, c in level_errors(objective, x, draw, i)]
        assert losses["loss"][i].item() == pytest.approx(sum(parts), rel=1e-9)


def test_low_resolutions_alone() -> None:
    """Weights of the first two levels train these alone, and give their part of the loss."""
    x, draw = batch(3)
    part = pyramid_objective(level_weights=(2.0, 1.0))
    losses = part(x, None, draw)
    expected = []
    for i in range(3):
        first, second, _ = (errors.mean() for errors, _ in level_errors(part, x, draw, i))
        expected.append(2 * first + second)
    torch.testing.assert_close(losses["loss"], torch.stack(expected))
    losses["loss"].sum().backward()
    assert [scale.grad is None for scale in part.denoiser.backbone.scales] == [False, False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shares", "count", "having"),
    [
        ((1.0, 2 / 3, 1 / 3), 9, [9, 6, 3]),
        ((1.0, 0.67, 0.3), 100, [100, 67, 30]),
        ((1.0, 0.5, 0.5), 4, [4, 2, 2]),
        ((1.0, 0.9, 0.01), 10, [10, 9, 1]),
        ((1.0, 0.4, 0.1), 1, [1, 1, 1]),
        ((1.0, 1.0, 1.0), 5, [5, 5, 5]),
    ],
)
def test_shares_of_the_examples_have_the_larger_levels(
    shares: tuple[float, ...], count: int, having: list[int]
) -> None:
    """Whoever has a level has all smaller ones; a level's loss is its mean over those that have it."""
    weights = (3.0, 1.0, 0.5)
    objective = pyramid_objective(level_weights=weights, level_shares=shares)
    groups = objective._groups(count)
    members: list[set[int]] = [set(), set(), set()]
    for rows, kept in groups:
        for level in range(len(kept)):
            members[level] |= set(rows.tolist())
    assert [len(rows) for rows in members] == having
    assert members[0] >= members[1] >= members[2]
    assert sum(len(rows) for rows, _ in groups) == count, "each example is in one group"
    x, draw = batch(count)
    losses = objective(x, None, draw)["loss"]
    means = [0.0, 0.0, 0.0]
    for level, rows in enumerate(members):
        for i in rows:
            means[level] += level_errors(objective, x, draw, i)[level][0].mean().item() / having[level]
    assert losses.mean().item() == pytest.approx(sum(w * mean for w, mean in zip(weights, means, strict=True)))
    for i in range(count):
        own = [level for level in range(3) if i in members[level]]
        parts = [weights[k] * count / having[k] * level_errors(objective, x, draw, i)[k][0].mean().item() for k in own]
        assert losses[i].item() == pytest.approx(sum(parts), rel=1e-9)


def test_shares_are_spread_evenly() -> None:
    """Any run of examples has its share of every level, to one: a process's part, a micro-batch."""
    objective = pyramid_objective(level_shares=(1.0, 0.6, 0.2))
    has = torch.zeros(100, 3)
    for rows, kept in objective._groups(100):
        has[rows, : len(kept)] = 1
    for level, share in enumerate((1.0, 0.6, 0.2)):
        for start in range(0, 90, 7):
            assert abs(has[start : start + 10, level].sum().item() - 10 * share) <= 1 + 1e-6


def test_shares_leave_the_expected_loss_as_it_is() -> None:
    """The mean over all ways to order the examples is the loss without shares."""
    x, draw = batch(6)
    shared, whole = pyramid_objective(level_shares=(1.0, 0.5, 1 / 3)), pyramid_objective()
    expected = whole(x, None, draw)["loss"].mean()
    got = [
        shared(x.roll(k, 0), None, Draw(draw.t.roll(k), draw.eps.roll(k, 0), draw.drop))["loss"].mean()
        for k in range(6)
    ]
    torch.testing.assert_close(torch.stack(got).mean(), expected)


def nested(**options: Any) -> NestedUNet:
    """4 → 8 pixels, with no parameter at zero."""
    shared: dict[str, Any] = {"channels": (8, 8), "resblocks": (1, 1), "heads": 2, "groups": 4}
    made = NestedUNet(UNet(input_size=4, in_channels=1, **shared | options), **shared)
    generator = torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return made


def test_examples_of_low_resolution_do_not_touch_the_outer_network() -> None:
    """The outer gradient is that of the full examples alone; with none of them there is none at all."""
    network = nested()
    path = Pyramid(interpolant("cosine"), (16, 64), (4, 8))
    denoiser = Denoiser(network, path, "v", time_input=(1000.0, -1.0))
    options: dict[str, Any] = {"weighting": weighting("none"), "times": DiscreteSteps(1000)}
    shared = Objective(denoiser, level_shares=(1.0, 0.25), **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 80, generator=generator)
    draw = shared.draw(8, generator)

    def outer_gradients(objective: Objective, x: Tensor, draw: Draw) -> dict[str, Tensor | None]:
        network.zero_grad()
        objective(x, None, draw)["loss"].mean().backward()
        return {name: p.grad for name, p in network.named_parameters() if not name.startswith("inner.")}

    full = next(rows for rows, kept in shared._groups(8) if len(kept) == 2)
    assert len(full) == 2
    got = outer_gradients(shared, x, draw)
    changed = x.clone()
    low = [i for i in range(8) if i not in full.tolist()]
    changed[low] = 5.0
    for name, gradient in outer_gradients(shared, changed, draw).items():
        assert gradient is not None, name
        torch.testing.assert_close(got[name], gradient, msg=name)
    only_full = outer_gradients(Objective(denoiser, level_weights=(0.25, 1.0), **options), x[full], draw.rows(full))
    for name, gradient in only_full.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    alone = outer_gradients(Objective(denoiser, level_weights=(1.0,), **options), x, draw)
    assert set(alone.values()) == {None}
    assert all(p.grad is not None for name, p in network.inner.named_parameters() if "norm_cond" not in name)


class Reader(nn.Module):
    """A network of captions that remembers what it was given."""

    in_channels, input_size, num_classes, text_features = 1, (1, 1), 0, 0

    def forward(self, x: Tensor, time: Tensor, y: Any) -> Tensor:
        self.seen = y
        return x


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_dropped_captions_become_the_null_one(dropout: float) -> None:
    network, words = Reader(), [f"word {i}" for i in range(40)]
    y, null = byte_tokens(words, 12), byte_tokens([""], 12)
    objective = Objective(
        Denoiser(network, interpolant("linear")),
        weighting=weighting("none"),
        times=Uniform(),
        condition_dropout=dropout,
        null=null,
    )
    draw = objective.draw(40, torch.Generator().manual_seed(0))
    assert draw.drop.sum().item() == {0.0: 0, 0.5: int(draw.drop.sum()), 1.0: 40}[dropout]
    assert dropout != 0.5 or 8 < draw.drop.sum() < 32
    objective(torch.zeros(40, 1, 1, 1), y, draw)
    expected = byte_tokens(["" if drop else word for word, drop in zip(words, draw.drop, strict=True)], 12)
    assert torch.equal(network.seen.tokens, expected.tokens)
    assert torch.equal(network.seen.mask, expected.mask)


# ----------------------------------------------------------------------------------------------------- representation


def test_levels_are_averages() -> None:
    """Each level is avg_pool2d of the image itself; decoding gives every level back, and the image as the last."""
    space = PyramidImages(Pixels(), [(3, 2, 2), (3, 4, 4), (3, 16, 16)])
    images = normal(2, 3, 16, 16).float().clamp(-1, 1)
    x = space.encode(images)
    assert x.shape == (2, 12 + 48 + 768)
    levels = space.decode_levels(x)
    for level, factor in zip(levels, (8, 4, 1), strict=True):
        torch.testing.assert_close(level, F.avg_pool2d(images, factor))
    assert torch.equal(space.decode(x), images)
    assert torch.equal(space.decode(x[:, :60]), levels[1]), "of fewer levels, the largest there is"


def test_a_level_of_fewer_frames_has_every_kth() -> None:
    space = PyramidImages(Pixels(), [(2, 1, 4, 4), (4, 1, 4, 4), (8, 1, 8, 8)])
    clips = normal(3, 8, 1, 8, 8).float().clamp(-1, 1)
    low, middle, high = space.decode_levels(space.encode(clips))
    assert torch.equal(high, clips)
    torch.testing.assert_close(middle, torch.stack([F.avg_pool2d(clips[:, f], 2) for f in (0, 2, 4, 6)], dim=1))
    torch.testing.assert_close(low, middle[:, [0, 2]])


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from test_latents import save_autoencoder

    return Path(save_autoencoder(tmp_path_factory.mktemp("vae")))


def test_a_pyramid_of_latents(vae: Path) -> None:
    """The autoencoder's latents (mean + std·eps), averaged; each level is decoded by the autoencoder."""
    base = representation("kl", path=str(vae), scale=None, device="cpu")
    space = PyramidImages(base, [(4, 2, 2), (4, 4, 4)])
    images = normal(2, 3, 32, 32).float().clamp(-1, 1)
    eps = normal(2, 4, 4, 4).float()
    latents = base.encode(images, eps)
    x = space.encode(images, eps)
    assert space.stochastic
    torch.testing.assert_close(x[:, 16:], latents.flatten(1))
    torch.testing.assert_close(x[:, :16], F.avg_pool2d(latents, 2).flatten(1))
    small, large = space.decode_levels(x)
    torch.testing.assert_close(small, base.decode(F.avg_pool2d(latents, 2)))
    torch.testing.assert_close(large, base.decode(latents))
    assert large.shape == (2, 3, 32, 32)


# -------------------------------------------------------------------------------------------------------------- whole


def test_a_denoiser_takes_first_levels_alone() -> None:
    """A prefix of the state is predicted by the inner networks as in the whole: x, time and coefficients go with it."""
    network = nested().eval()
    path = Pyramid(interpolant("cosine"), (16, 64), (4, 8))
    denoiser = Denoiser(network, path, "v", time_input=(1000.0, -1.0))
    assert denoiser.level_shapes == ((1, 4, 4), (1, 8, 8))
    assert denoiser.in_shape == (80,)
    x = normal(2, 80).float()
    given: list[tuple[int, ...]] = []
    network.inner.register_forward_hook(lambda module, inputs, output: given.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        low = denoiser(x[:, :16], 0.4)
    assert given == [(2, 1, 4, 4)]
    c = path.base.at(torch.tensor(0.4, dtype=torch.float64))
    expected = c.alpha * x[:, :16].double() - c.sigma * low.output.double()
    torch.testing.assert_close(low.data.double(), expected, atol=1e-5, rtol=1e-5)
    assert math.isclose(low.coefficients.alpha[0].item(), c.alpha.item(), rel_tol=1e-6)
