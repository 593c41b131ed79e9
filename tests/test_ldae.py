"""l-DAE: its recipes, its noise, networks that work on images, the original image, and the exported encoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import PATHS, at, exact_denoiser, gaussian, marginal
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import mezzotint
from mezzotint.backbones import DiT
from mezzotint.cli import app
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.guidance import ConditionalModel
from mezzotint.interop import convert
from mezzotint.interop.vit import export_vit
from mezzotint.objectives import Draw, Objective
from mezzotint.pipeline import build
from mezzotint.recipe import Recipe, load_recipe, override_recipe, recipe_names
from mezzotint.representations import PatchPCA
from mezzotint.representations.image_space import FullBasisEncoder, ImageSpace
from mezzotint.representations.tokenizer import FitSettings, PatchAutoencoder, PatchTokenizer, TokenizerInfo
from mezzotint.samplers import SAMPLERS, Sampler
from mezzotint.training.loop import make_objective
from mezzotint.training.tokenizers import fit_tokenizer
from mezzotint.weightings import SingleLevel, Uniform, single_level, weighting

# ------------------------------------------------------------------------------------------------------- the trajectory

#: a recipe, the one before it, and all that the paper changed between the two
STEPS: list[tuple[str, str, dict[str, tuple[Any, Any]]]] = [
    ("ldae-01-no-classes", "ldae-00-dit", {"backbone.num_classes": (1000, 0)}),
    ("ldae-02-no-perceptual", "ldae-01-no-classes", {"representation.fit.perceptual_weight": (1.0, 0.0)}),
    ("ldae-03-no-adversarial", "ldae-02-no-perceptual", {"representation.fit.adversarial_weight": (0.5, 0.0)}),
    ("ldae-04-linear-variance", "ldae-03-no-adversarial", {"interpolant.name": ("ddpm", "linear-variance")}),
    (
        "ldae-05a-patch-vae",
        "ldae-04-linear-variance",
        {
            "representation.name": ("conv-vae", "patch-vae"),
            "representation.stride": (8, 16),
            "representation.channels": (4, 32),
            "representation.fit.kl_weight": (1e-6, 1.0),
            "backbone.patch_size": (2, 1),
        },
    ),
    (
        "ldae-05b-patch-ae",
        "ldae-05a-patch-vae",
        {"representation.name": ("patch-vae", "patch-ae"), "representation.fit.kl_weight": (1.0, 1e-6)},
    ),
    ("ldae-05c-patch-pca", "ldae-05b-patch-ae", {"representation.name": ("patch-ae", "patch-pca")}),
    (
        "ldae-06-clean-data",
        "ldae-05c-patch-pca",
        {"target": ("noise", "data"), "objective.weighting": ("none", "alpha-squared")},
    ),
    (
        "ldae-07-no-input-scaling",
        "ldae-06-clean-data",
        {
            "interpolant.name": ("linear-variance", "variance-exploding"),
            "objective.weighting": ("alpha-squared", "inverse-variance"),
        },
    ),
    (
        "ldae-08-image-input",
        "ldae-07-no-input-scaling",
        {"backbone.input": ("latent", "image"), "backbone.patch_size": (1, 16)},
    ),
    ("ldae-09-image-output", "ldae-08-image-input", {"backbone.output": ("latent", "image")}),
    ("ldae-10-original-image", "ldae-09-image-output", {"objective.residual_weight": (0.0, 0.1)}),
    ("ldae-single-level", "ldae-10-original-image", {"objective.times": ("auto", "single")}),
]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots between."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize(("name", "before", "changed"), STEPS, ids=[step[0] for step in STEPS])
def test_each_step_changes_what_the_paper_changed(name: str, before: str, changed: dict[str, Any]) -> None:
    then, now = (flat(load_recipe(each).model_dump(exclude={"name", "description"})) for each in (before, name))
    assert {key: (then[key], now[key]) for key in now if then[key] != now[key]} == changed


def test_the_trajectory_is_whole() -> None:
    """Every recipe of the trajectory is in the table, in its order; and what training is for all of them."""
    names = ["ldae-00-dit", *(step[0] for step in STEPS)]
    assert [name for name in recipe_names() if name.startswith("ldae-")] == names
    recipe = load_recipe("ldae-00-dit")
    training, images = recipe.training, 1_281_167
    assert (training.batch_size, training.lr, training.weight_decay) == (2048, 1e-4 * 2048 / 256, 0)
    assert training.steps == round(400 * images / 2048)
    assert training.warmup_steps == round(100 * images / 2048)
    assert (training.lr_schedule, recipe.data.name, recipe.data.size) == ("cosine", "folder", 256)
    final = load_recipe("ldae-10-original-image")
    assert (final.input_shape, final.output_shape, final.latent_shape) == ((3, 256, 256), (3, 256, 256), (32, 16, 16))


@pytest.mark.parametrize("name", ["ldae-00-dit", "ldae-05c-patch-pca", "ldae-08-image-input", "ldae-10-original-image"])
def test_cost(name: str) -> None:
    """Parameters and multiply-adds of a DiT-L of 256 tokens from the sizes of its layers alone."""
    d, depth, tokens, hidden, frequencies = 1024, 24, 256, 256, 256
    sides = {"ldae-00-dit": (16, 16), "ldae-05c-patch-pca": (32, 32), "ldae-08-image-input": (768, 32)}
    into, out = sides.get(name, (768, 768))
    linear = {  # in, out, times for each image
        "patch": (into, d, tokens),
        "time": (frequencies, d, 1),
        "time 2": (d, d, 1),
        "final": (d, out, tokens),
        "final adaLN": (d, hidden, 1),
        "final adaLN 2": (hidden, 2 * d, 1),
    }
    for k in range(depth):
        linear |= {f"qkv {k}": (d, 3 * d, tokens), f"proj {k}": (d, d, tokens)}
        linear |= {f"fc1 {k}": (d, 4 * d, tokens), f"fc2 {k}": (4 * d, d, tokens)}
        linear |= {f"adaLN {k}": (d, hidden, 1), f"adaLN 2 {k}": (hidden, 6 * d, 1)}
    classes = 1001 * d if name == "ldae-00-dit" else 0
    counted = recipe_cost(load_recipe(name))
    assert counted.trainable_params == sum(i * o + o for i, o, _ in linear.values()) + classes
    attention = depth * 2 * tokens**2 * d
    assert counted.gmacs == pytest.approx((sum(i * o * n for i, o, n in linear.values()) + attention) / 1e9, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_clean_data_on_the_linear_variance_path_with_every_sampler(name: str) -> None:
    """A network that knows E[x | x_t] of Gaussian data: samples have their mean and deviation (5 standard errors)."""
    data, n = gaussian(), 4000
    model = ConditionalModel(exact_denoiser(data, PATHS["linear-variance"], "data"))
    sampler = Sampler(sampler=name, steps=200, last_step_size=0.005)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *data.shape, generator=generator, dtype=torch.float64)
    *_, x = sampler.path(model, x, generator)
    mean, std = marginal(data, at(PATHS["linear-variance"], 0.0))
    assert ((x.mean(0) - mean[0]).abs() / std[0]).max() < 5 / math.sqrt(n) + 0.01
    assert (x.std(0) / std[0] - 1).abs().max() < 5 / math.sqrt(2 * n) + 0.01


@pytest.mark.parametrize(
    ("path", "t"),
    [  # solved by hand: sigma / alpha = √(1/3)
        ("variance-exploding", 1 / math.sqrt(6)),
        ("linear-variance", 1 / 4),
        ("linear", 1 / (1 + math.sqrt(3))),
        ("gvp", 1 / 3),
    ],
)
def test_single_level(path: str, t: float) -> None:
    times = single_level(PATHS[path], math.sqrt(1 / 3))
    assert times.t == pytest.approx(t, rel=1e-12)
    drawn = times.sample(5, torch.Generator().manual_seed(0), stratified=True)
    torch.testing.assert_close(drawn, torch.full((5,), t))


def test_single_level_recipe() -> None:
    recipe = load_recipe("digits", ["objective.times=single", "interpolant=variance-exploding"])
    times = make_objective(recipe, build(recipe).denoiser).times
    assert isinstance(times, SingleLevel)
    c = at(PATHS["variance-exploding"], times.t)
    assert (c.alpha, c.sigma) == (1, pytest.approx(math.sqrt(1 / 3)))


def test_levels_that_are_not_there() -> None:
    with pytest.raises(MezzotintError, match=r"noise_level 2 is never reached: sigma / alpha is at most 1.41421 here"):
        single_level(PATHS["variance-exploding"], 2.0)
    with pytest.raises(MezzotintError, match="noise_level must be above 0, got -1"):
        single_level(PATHS["linear"], -1.0)
    recipe = load_recipe("dit-s-8-256", ["objective.times=single", "backbone={width: 16, depth: 1, heads: 2}"])
    denoiser = build(recipe).denoiser
    with pytest.raises(MezzotintError, match=r"objective\.times must be discrete, not single"):
        make_objective(recipe, denoiser)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.times=single"], "trained at a single noise level"),
        (["interpolant=variance-exploding"], r"signal-to-noise ratio is 0\.5, which is not noise"),
        (["interpolant={name: vp, beta_max: 1}"], r"signal-to-noise ratio is 1\.4, which is not noise"),
    ],
)
def test_what_cannot_be_sampled(tiny: Recipe, tmp_path: Path, overrides: list[str], message: str) -> None:
    """At once, also where training would draw samples: no folder is left."""
    recipe = override_recipe(tiny, [*overrides, "backbone.num_classes=10"])
    with pytest.raises(MezzotintError, match=message):
        mezzotint.sample(build(recipe), count=1)
    with pytest.raises(MezzotintError, match=message):
        mezzotint.train(override_recipe(recipe, ["training.sample_every=2"]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- the network's sides

P, C, D, KEPT = 4, 3, 48, 5  # side of a patch, channels, numbers in it, components kept


def pca(dtype: torch.dtype = torch.float64, **fit: Any) -> PatchPCA:
    """A PCA that no data gave: any orthonormal basis, mean and scale."""
    info = TokenizerInfo(name="patch-pca", image_channels=C, stride=P, channels=KEPT, fit=FitSettings(**fit))
    tokenizer = PatchPCA(info).to(dtype)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
    tokenizer.basis.copy_(basis)
    tokenizer.mean.copy_(torch.randn(D, generator=generator))
    tokenizer.latent_mean.copy_(torch.randn(KEPT, 1, 1, generator=generator))
    tokenizer.latent_scale.fill_(1.7)
    return tokenizer


def patch_of(images: Tensor, row: int, column: int) -> Tensor:
    """One patch of each image, (B, D), channels slowest."""
    return images[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P].flatten(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_way_to_images_and_back() -> None:
    """Patch by patch, by the formulas: Vᵀz + mean, and V(patch − mean), with z = scale·x + latent mean."""
    space, tokenizer = ImageSpace((KEPT, 2, 3), input=True, output=True), pca()
    space.tokenizer = tokenizer
    x, images = normal(2, KEPT, 2, 3), 9 * normal(2, C, 2 * P, 3 * P, seed=1)  # far outside of [-1, 1]
    shown = space.to_network(x)
    got, left_out = space.from_network(images)
    assert left_out is not None
    for row in range(2):
        for column in range(3):
            z = tokenizer.latent_scale * x[:, :, row, column] + tokenizer.latent_mean.flatten()
            torch.testing.assert_close(patch_of(shown, row, column), z @ tokenizer.basis[:KEPT] + tokenizer.mean)
            c = (patch_of(images, row, column) - tokenizer.mean) @ tokenizer.basis.T
            expected = (c[:, :KEPT] - tokenizer.latent_mean.flatten()) / tokenizer.latent_scale
            torch.testing.assert_close(got[:, :, row, column], expected)
            torch.testing.assert_close(left_out[:, :, row, column], c[:, KEPT:] / tokenizer.latent_scale)
    back, nothing = space.from_network(shown)
    torch.testing.assert_close(back, x)
    assert nothing is not None
    assert nothing.abs().max() < 1e-12


def test_one_side_alone() -> None:
    space = ImageSpace((KEPT, 2, 2), input=True, output=False)
    space.tokenizer = pca()
    x = normal(1, KEPT, 2, 2)
    assert space.from_network(x) == (x, None)
    space = ImageSpace((KEPT, 2, 2), input=False, output=True)
    assert space.to_network(x) is x
    with pytest.raises(MezzotintError, match=r"through a tokenizer that is not there; set representation\.path"):
        space.from_network(x)


class Shifted(nn.Module):
    """A network on images whose output is its input and a little more, different at each place."""

    num_classes, in_channels, input_size = 0, C, (2 * P, 2 * P)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return x + normal(1, *x.shape[1:], seed=7).to(x)


def objective(residual_weight: float, tokenizer: PatchTokenizer) -> Objective:
    space = ImageSpace((KEPT, 2, 2), input=True, output=True)
    space.tokenizer = tokenizer
    denoiser = Denoiser(Shifted(), PATHS["variance-exploding"], "data", space=space)
    return Objective(
        denoiser, weighting=weighting("inverse-variance"), times=Uniform(), residual_weight=residual_weight
    )


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_loss_of_the_original_image(weight: float) -> None:
    """Σ_i w_i (V(image − network))_i² / (1 + σ²), patch by patch in float64; with w = 1 it is the images' distance."""
    tokenizer, images, t = pca(), normal(3, C, 2 * P, 2 * P), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = FullBasisEncoder(tokenizer).encode(images)
    eps = normal(3, KEPT, 2, 2, seed=2)
    got = objective(weight, tokenizer)(x, None, Draw(t, eps, torch.zeros(3, dtype=torch.bool)))["loss"]
    sigma, total = math.sqrt(2) * t, torch.zeros(3, dtype=torch.float64)
    weights = torch.full((D,), weight, dtype=torch.float64)
    weights[:KEPT] = 1
    distance = torch.zeros_like(total)
    for row in range(2):
        for column in range(2):
            patch = patch_of(images, row, column)
            z = (patch - tokenizer.mean) @ tokenizer.basis[:KEPT].T
            noisy = z + tokenizer.latent_scale * sigma[:, None] * eps[:, :, row, column]
            output = noisy @ tokenizer.basis[:KEPT] + tokenizer.mean
            output = output + patch_of(normal(1, C, 2 * P, 2 * P, seed=7), row, column)
            residual = (patch - output) @ tokenizer.basis.T / tokenizer.latent_scale
            total += (weights * residual**2).sum(1)
            distance += ((patch - output) / tokenizer.latent_scale).square().sum(1)
    torch.testing.assert_close(got, total / (1 + sigma**2) / (4 * KEPT))
    if weight == 1:
        torch.testing.assert_close(got, distance / (1 + sigma**2) / (4 * KEPT))


def test_without_residual_weight_only_latents_count() -> None:
    """Step 9 is step 10 at weight 0: any change outside of the first components leaves the loss as it is."""
    tokenizer, images = pca(), normal(2, C, 2 * P, 2 * P)
    draw = Draw(torch.tensor([0.2, 0.9], dtype=torch.float64), normal(2, KEPT, 2, 2, seed=2), torch.zeros(2).bool())
    hidden = tokenizer.assemble(normal(2, D - KEPT, 2, 2, seed=3), tokenizer.basis[KEPT:]) - tokenizer.assemble(
        torch.zeros(2, D - KEPT, 2, 2, dtype=torch.float64), tokenizer.basis[KEPT:]
    )
    losses = [objective(0.0, tokenizer)(tokenizer.encode(i), None, draw)["loss"] for i in (images, images + hidden)]
    torch.testing.assert_close(*losses)
    full = [FullBasisEncoder(tokenizer).encode(i) for i in (images, images + hidden)]
    changed = [objective(0.1, tokenizer)(x, None, draw)["loss"] for x in full]
    assert ((changed[0] - changed[1]).abs() > 1e-3).all()


def test_whitened_latents_have_no_common_units() -> None:
    space = ImageSpace((KEPT, 2, 2), input=True, output=True)
    space.tokenizer = pca(whiten=True)
    assert space.from_network(normal(1, C, 2 * P, 2 * P))[1] is None


# ----------------------------------------------------------------------------------------------------- the conditioning


def dit(**options: Any) -> DiT:
    return DiT(**{"input_size": 8, "patch_size": 4, "in_channels": 1, "width": 16, "depth": 2, "heads": 2} | options)


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln"])
def test_conditioning_mlp(conditioning: Any) -> None:
    """A hidden layer of a quarter of the width; adaln-zero is the identity at first, and every layer can be learnt."""
    torch.manual_seed(0)
    network = dit(conditioning=conditioning, adaln_ratio=0.25, num_classes=3)
    vectors = 6 if conditioning == "adaln-zero" else 4
    for layer, k in [*((block, vectors) for block in network.blocks), (network.final_layer, 2)]:
        shapes = [tuple(p.shape) for p in layer.adaLN_modulation.parameters()]
        assert shapes == [(4, 16), (4,), (16 * k, 4), (16 * k,)]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    if conditioning == "adaln-zero":
        _, tokens = network.forward_features(x, t, y, None)
        embedded = network.x_embedder(x) + network.pos_embed
        torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), embedded)
    for parameter in network.parameters():  # as training makes them
        nn.init.normal_(parameter, std=0.3)
    network(x, t, y).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())
    torch.testing.assert_close(network(x, t, y, condition=network.condition(t, y)), network(x, t, y))
    block, c = network.blocks[0], network.t_embedder(t) + network.y_embedder(y)
    one, two = block.adaLN_modulation[1], block.adaLN_modulation[3]
    by_hand = two(nn.functional.silu(one(nn.functional.silu(c))))
    torch.testing.assert_close(network.condition(t, y)[0].squeeze(1), by_hand)


def test_conditioning_mlp_learns_from_its_start() -> None:
    """A start at zero must not be a place that no gradient leaves."""
    network = dit(adaln_ratio=0.25)
    nn.init.normal_(network.final_layer.linear.weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        network(torch.ones(1, 1, 8, 8), torch.ones(1)).square().sum().backward()
        optimizer.step()
    assert network.blocks[0].adaLN_modulation[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("options", [{"adaln_ratio": 0.01}, {"adaln_ratio": 0.25, "conditioning": "in-context"}])
def test_conditioning_mlp_where_there_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(MezzotintError, match=r"adaln_ratio 0\.\d+ means nothing for a width of 16 and conditioning"):
        dit(**options)


def test_conditioning_mlp_in_other_formats(tiny: Recipe, tmp_path: Path) -> None:
    """Neither the official code nor diffusers has one."""
    run = tmp_path / "run"
    overrides = ["backbone.adaln_ratio=0.25", "training.steps=1", "interpolant=ddpm", "target=noise"]
    mezzotint.train(override_recipe(tiny, [*overrides, "time_input=[1000,-1]"]), run, quiet=True)
    with pytest.raises(MezzotintError, match=r"has no backbone\.adaln_ratio 0\.25, only None; convert to a run folder"):
        convert(run, tmp_path / "weights.pt", to="official")


# ----------------------------------------------------------------------------------------------------------- end to end

DIGITS = (
    "representation={name: patch-pca, stride: 4, channels: 4, fit: {examples: 200}}",
    "target=data",
    "objective.weighting=alpha-squared",
    "interpolant=linear-variance",
)
IMAGES = ("backbone.input=image", "backbone.output=image", "backbone.patch_size=4")
NETWORKS = {
    "dit": (),
    "diffussm": ("backbone={name: diffussm, width: 16, depth: 1, hourglass: 1, state: 4, patch_size: 4}",),
    "unet": ("backbone={name: unet, channels: [8], resblocks: [1], groups: 4, heads: 2}",),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "pca"
    fit_tokenizer(load_recipe("digits", DIGITS[:1]), folder, quiet=True)
    return folder


@pytest.mark.parametrize("network", list(NETWORKS))
def test_any_network_on_images(tiny: Recipe, tmp_path: Path, network: str) -> None:
    """Trained with its own tokenizer, loaded from the run alone, moved; data predictions and every sampler's images."""
    recipe = override_recipe(tiny, [*DIGITS, *IMAGES, "objective.residual_weight=0.1", *NETWORKS[network]])
    trained = mezzotint.train(recipe, tmp_path / "run", quiet=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded = mezzotint.load(tmp_path / "moved")
    x, t = torch.randn(2, 4, 2, 2), torch.tensor([0.1, 0.7])
    assert trained.denoiser.in_shape == loaded.denoiser.in_shape == (4, 2, 2)
    with torch.no_grad():
        one, other = trained.denoiser(x, t), loaded.denoiser(x, t)
    assert one.data.shape == x.shape
    assert torch.equal(one.data, other.data)
    assert other.left_out is not None
    assert other.left_out.shape == (2, 12, 2, 2)
    samplers = SAMPLERS if network == "dit" else ("ddim",)
    for sampler in samplers:
        images = mezzotint.sample(loaded, count=2, sampler=sampler, steps=3)
        assert images.shape == (2, 1, 8, 8)
        assert images.isfinite().all()


@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone.input=image", "backbone.patch_size=4"],
        ["backbone.output=image", "backbone.patch_size=1"],
        ["backbone.input=image", "backbone.patch_size=4", "target=noise", "objective.weighting=none"],
        ["backbone={name: diffussm, width: 16, depth: 1, hourglass: 1, patch_size: 4, input: image}"],
        [*IMAGES, "representation={name: patch-ae, fit: {steps: 3}}", "training.validate_every=3"],
        [*IMAGES, "representation={name: patch-vae, fit: {steps: 3}}", "training.precision=bf16"],
        [*IMAGES, "objective.times=single", "objective.residual_weight=0.1", "training.validate_every=3"],
        [*IMAGES, "interpolant=variance-exploding", "objective.weighting=inverse-variance", "training.ema=[]"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_step_trains(tiny: Recipe, tmp_path: Path, overrides: list[str]) -> None:
    recipe = override_recipe(tiny, [*DIGITS, *overrides])
    trained = mezzotint.train(recipe, tmp_path / "run", quiet=True)
    with torch.no_grad():
        prediction = trained.denoiser(torch.randn(2, 4, 2, 2), 0.5)
    assert prediction.output.shape == (2, 4, 2, 2)
    assert prediction.output.isfinite().all()


def test_resumes_bit_for_bit(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, [*DIGITS, *IMAGES, "objective.residual_weight=0.1"])
    whole = mezzotint.train(recipe, tmp_path / "whole", quiet=True)
    mezzotint.train(override_recipe(recipe, ["training.steps=4"]), tmp_path / "parts", quiet=True)
    parts = mezzotint.train(recipe, tmp_path / "parts", resume=True, quiet=True)
    for one, other in zip(whole.denoiser.parameters(), parts.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_network_without_its_tokenizer(tiny: Recipe) -> None:
    made = build(override_recipe(tiny, [*DIGITS, *IMAGES, "backbone.num_classes=0"]))
    with pytest.raises(MezzotintError, match="through a tokenizer that is not there"):
        made.denoiser(torch.zeros(1, 4, 2, 2), 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["representation=pixels"], "backbone.input=image is for patch-pca, patch-ae and patch-vae, not for pixels"),
        (["target=noise"], "a network that gives images predicts the data, not noise; set target=data"),
        (["variance=unused"], "backbone.input=image knows neither outer levels nor a learned variance"),
        (["backbone.patch_size=3"], "the input is 8 × 8, which a patch of 3 does not divide"),
        (["backbone.output=latent", "backbone.patch_size=2"], "4 × 4 patches cannot give an output of 2 × 2"),
        ([*NETWORKS["unet"], "backbone.output=latent"], "a unet's output has its input's sides"),
        (
            ["objective.residual_weight=0.1", "backbone.output=latent"],
            "residual_weight is for networks that give images",
        ),
        (
            ["objective.residual_weight=0.1", "representation.fit.whiten=true"],
            "residual_weight is for networks that give images on patch-pca, not whitened",
        ),
        (["objective.residual_weight=-1"], "objective.residual_weight = -1 is not valid"),
        (["backbone.adaln_ratio=0"], "backbone.adaln_ratio = 0 is not valid"),
        ([*NETWORKS["unet"], "backbone.adaln_ratio=0.25"], "backbone.adaln_ratio means nothing for unet"),
    ],
)
def test_sides_that_do_not_go_together(tiny: Recipe, overrides: list[str], message: str) -> None:
    with pytest.raises(MezzotintError) as error:
        override_recipe(tiny, [*DIGITS, *IMAGES, *overrides])
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------------- the encoder


def shaken(pipeline: mezzotint.Pipeline) -> mezzotint.Pipeline:
    """Weights that are nowhere zero, so that every fold matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.denoiser.backbone.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return pipeline


def tokens_after(pipeline: mezzotint.Pipeline, images: Tensor, t: float, layers: int) -> Tensor:
    """What the denoiser's block number `layers` gives for the images' x, with no class."""
    kept: list[Tensor] = []
    block = pipeline.denoiser.backbone.blocks[layers - 1]  # type: ignore[index]
    hook = block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    y = None
    if pipeline.denoiser.text:
        y = pipeline.no_caption[torch.zeros(len(images), dtype=torch.int64)]
    pipeline.denoiser(pipeline.representation.encode(images), t, y)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["representation=pixels", "backbone.num_classes=10"],
        ["representation=pixels", "backbone.conditioning=adaln", "time_input=[-1,1]", "backbone.patch_size=4"],
        ["representation=pixels", "condition=text", "backbone.text_features=0"],
        ["backbone.patch_size=1"],
        ["backbone.patch_size=2", "backbone.adaln_ratio=0.25"],
        [*IMAGES],
        ["backbone.input=image", "backbone.patch_size=8", "backbone.output=image"],
        ["representation=patch-ae", *IMAGES],
        ["representation=patch-vae", "backbone.patch_size=1"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
@torch.no_grad()
def test_exported_features_are_the_models(tiny: Recipe, tmp_path: Path, tokenizer: Path, overrides: list[str]) -> None:
    """transformers' model of the folder gives the tokens of the block, to 1e-5 of their size, from images alone."""
    from transformers import AutoModel

    recipe = override_recipe(tiny, [*DIGITS, "backbone.depth=3", "backbone.num_classes=0", *overrides])
    pipeline = shaken(build(recipe))
    if recipe.representation.name == "patch-pca":
        recipe = override_recipe(recipe, [f"representation.path={tokenizer}"])
        pipeline = shaken(build(recipe))
    elif recipe.representation.name != "pixels":
        info = TokenizerInfo(
            name=recipe.representation.name, image_channels=1, stride=4, channels=4, fit=recipe.representation.fit
        )
        pipeline.representation = PatchAutoencoder(info).requires_grad_(False)
        pipeline.representation.mean.normal_(std=0.2)
        pipeline.representation.latent_scale.fill_(0.8)
        pipeline.connect()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    folder = export_vit(pipeline, tmp_path / "vit", t=0.02, layers=2)
    model, problems = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(problems[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "IJepaModel"
    found = model(images, output_hidden_states=True)
    expected = tokens_after(pipeline, images, 0.02, 2)
    assert (found.hidden_states[-1] - expected).abs().max() < 1e-5 * expected.abs().max()
    normed = nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    torch.testing.assert_close(found.last_hidden_state, normed, rtol=1e-5, atol=1e-5)


def test_exported_folder(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    """It says what it is, its processor makes of an image what the data set does, and the command writes the same."""
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor

    run = tmp_path / "run"
    run.mkdir()
    mezzotint.pipeline.save_weights(pipeline.denoiser.backbone, run / "model.safetensors", {})
    (run / "recipe.yaml").write_text(override_recipe(pipeline.recipe, ["backbone.num_classes=10"]).to_yaml())
    arguments = ["export-vit", str(run), "--t", "0.01", "--layers", "1", "--out", str(tmp_path / "vit")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    keys = ("model_type", "hidden_act", "num_hidden_layers", "image_size", "patch_size", "num_channels")
    assert [config[key] for key in keys] == ["ijepa", "gelu_pytorch_tanh", 1, 8, 2, 1]
    export_vit(pipeline, tmp_path / "again")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("vit", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    grey = Image.fromarray((torch.arange(64).reshape(8, 8) * 4).byte().numpy())
    made = AutoImageProcessor.from_pretrained(tmp_path / "vit")(grey, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made.reshape(8, 8), torch.arange(64).reshape(8, 8) * 4 / 127.5 - 1)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"layers": 2}, "there are no 2 layers to export; the network has 1, so give 1 to 1"),
        ([], {"layers": 0}, "there are no 0 layers"),
        ([], {"t": 1.5}, r"t must be from 0 \(data\) to 1 \(noise\), got 1.5; step 10 of 1000 is 0.01"),
        (["backbone.conditioning=in-context"], {}, "this network is a dit with in-context"),
        ([*NETWORKS["diffussm"]], {}, "this network is a diffussm"),
        (
            ["backbone.outer=[{channels: [8, 8], resblocks: [1, 1], groups: 4, heads: 2}]"],
            {},
            "this network is a dit of several levels",
        ),
        (
            ["representation={name: conv-vae, stride: 2, fit: {widths: [8, 8], groups: 4}}"],
            {},
            "the representation conv-vae is not linear in patches",
        ),
    ],
)
def test_what_cannot_be_exported(
    tiny: Recipe, tmp_path: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    pipeline = build(override_recipe(tiny, ["backbone.num_classes=0", *overrides]))
    with pytest.raises(MezzotintError, match=message):
        export_vit(pipeline, tmp_path / "vit", **options)
    assert not (tmp_path / "vit").exists()


def test_a_place_that_is_taken(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(MezzotintError, match="exists already; choose another place"):
        export_vit(pipeline, tmp_path)
