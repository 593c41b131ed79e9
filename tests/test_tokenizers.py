"""Tokenizers: PCA against scikit-learn, losses against closed forms, and runs that carry their tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as D
from safetensors.torch import load_file
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch import Tensor
from typer.testing import CliRunner

import mezzotint
from mezzotint.cli import app
from mezzotint.data import digits
from mezzotint.data.latents import cached_latents
from mezzotint.data.transforms import to_float
from mezzotint.encoding import encode
from mezzotint.errors import MezzotintError
from mezzotint.recipe import Recipe, override_recipe
from mezzotint.representations import PatchPCA, open_tokenizer, representation
from mezzotint.representations.pca import Moments, principal_components
from mezzotint.representations.tokenizer import INFO, FitSettings, TokenizerInfo, patches
from mezzotint.training import tokenizer_losses
from mezzotint.training.parallel import World
from mezzotint.training.tokenizer_losses import (
    PatchDiscriminator,
    VGG16Features,
    adaptive_weight,
    feature_maps,
    hinge_loss,
    kl_divergence,
    perceptual_distance,
)
from mezzotint.training.tokenizers import TokenizerLosses, fit_tokenizer, measure, own_tokenizer, sampled_batches

P, DIM, KEPT = 4, 16, 5
PCA_RECIPE = ("representation=patch-pca", f"representation.stride={P}", f"representation.channels={KEPT}")
CONV = (
    "representation=conv-vae",
    "representation.stride=2",
    "representation.channels=3",
    "representation.fit.widths=[8, 8]",
    "representation.fit.groups=4",
    "representation.fit.layers=1",
    "representation.fit.steps=4",
    "representation.fit.batch_size=16",
    "representation.fit.examples=32",
)
ADVERSARIAL = (
    "representation.fit.adversarial_weight=0.5",
    "representation.fit.adversarial_start=2",
    "representation.fit.discriminator_width=4",
    "representation.fit.discriminator_layers=1",
)


@pytest.fixture(scope="module")
def train_images() -> Tensor:
    return to_float(digits("train").images)


@pytest.fixture(scope="module")
def train_patches(train_images: Tensor) -> Tensor:
    """(N, D) float64, cut out one by one."""
    corners = [(y, x) for y in range(0, 8, P) for x in range(0, 8, P)]
    cut = torch.stack([train_images[:, :, y : y + P, x : x + P].flatten(1) for y, x in corners], dim=1)
    return cut.flatten(0, 1).double()


@pytest.fixture
def pca(tiny: Recipe, tmp_path: Path) -> PatchPCA:
    fit_tokenizer(override_recipe(tiny, PCA_RECIPE), tmp_path / "pca", quiet=True)
    tokenizer = open_tokenizer(tmp_path / "pca")
    assert isinstance(tokenizer, PatchPCA)
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------- PCA


def test_patches_are_cut_in_reading_order(train_images: Tensor, train_patches: Tensor) -> None:
    torch.testing.assert_close(patches(train_images, P).double(), train_patches, rtol=0, atol=0)
    colour = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert torch.equal(patches(colour, 2)[5], colour[1, :, 0:2, 2:4].flatten())


def test_pca_is_scikit_learns(pca: PatchPCA, train_patches: Tensor) -> None:
    expected = PCA().fit(train_patches.numpy())
    torch.testing.assert_close(pca.mean.double(), torch.from_numpy(expected.mean_), rtol=0, atol=1e-6)
    variances = torch.from_numpy(expected.explained_variance_)
    torch.testing.assert_close(pca.variances.double(), variances, rtol=0, atol=2e-7 * variances[0].item())
    cosines = (pca.basis.double() * torch.from_numpy(expected.components_)).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones(DIM).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(pca.basis @ pca.basis.T, torch.eye(DIM), rtol=0, atol=1e-6)
    largest = pca.basis.gather(1, pca.basis.abs().argmax(1, keepdim=True))
    assert (largest > 0).all(), "the sign is determined"


def test_latents_are_scikit_learns_up_to_one_scale(pca: PatchPCA, train_images: Tensor, train_patches: Tensor) -> None:
    z = torch.from_numpy(PCA(KEPT).fit_transform(train_patches.numpy()))
    scale = z.var(0).mean().sqrt()
    x = pca.encode(train_images)
    assert x.shape == (898, KEPT, 2, 2)
    rows = x.movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(rows.abs(), (z / scale).abs(), rtol=0, atol=1e-4)
    assert rows.var(0).mean().item() == pytest.approx(1, abs=1e-5), "unit variance on average"
    ratios = pca.variances[:KEPT] / pca.variances[0]
    torch.testing.assert_close(rows.var(0) / rows[:, 0].var(), ratios.double(), rtol=1e-5, atol=0)


def test_pca_then_its_inverse_is_the_orthogonal_projection(pca: PatchPCA) -> None:
    """As a matrix on a whole image, less what a zero image becomes: symmetric, idempotent, of rank d per patch."""
    units = torch.eye(64).view(64, 1, 8, 8)
    zero = pca.decode(pca.encode(torch.zeros(1, 1, 8, 8)), clamp=False)
    projection = (pca.decode(pca.encode(units), clamp=False) - zero).flatten(1).double()
    torch.testing.assert_close(projection, projection.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-6)
    assert projection.trace().item() == pytest.approx(4 * KEPT, abs=1e-4)


def test_the_full_basis_loses_nothing(pca: PatchPCA, train_images: Tensor) -> None:
    images = train_images[:7]
    coefficients = pca.coefficients(images)
    assert coefficients.shape == (7, DIM, 2, 2)
    torch.testing.assert_close(pca.from_coefficients(coefficients), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(coefficients[:, :KEPT] / pca.latent_scale, pca.encode(images), rtol=0, atol=1e-4)
    norms = [
        each.flatten(1).norm(dim=1)
        for each in (coefficients - pca.coefficients(images.flip(0)), images - images.flip(0))
    ]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-5)


def test_a_stream_of_blocks_is_one_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(300, 300, generator=generator, dtype=torch.float64)
    vectors = torch.randn(5000, 300, generator=generator, dtype=torch.float64) @ mixing + 100
    moments = Moments(300)
    for block in vectors.split([1, 2, 2500, 2497]):
        moments.update(block)
    torch.testing.assert_close(moments.mean, vectors.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, vectors.T.cov(), rtol=0, atol=1e-10 * vectors.var().item())
    basis, variances = principal_components(moments.covariance)
    torch.testing.assert_close(
        variances, torch.linalg.svdvals(vectors - vectors.mean(0)) ** 2 / 4999, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(basis @ basis.T, torch.eye(300).double(), rtol=0, atol=1e-12)


def test_whitened_components_have_unit_variance(tiny: Recipe, tmp_path: Path, train_images: Tensor) -> None:
    recipe = override_recipe(tiny, [*PCA_RECIPE, "representation.fit.whiten=true"])
    fit_tokenizer(recipe, tmp_path / "white", quiet=True)
    tokenizer = open_tokenizer(tmp_path / "white")
    x = tokenizer.encode(train_images)
    torch.testing.assert_close(x.movedim(1, -1).flatten(0, 2).T.cov(), torch.eye(KEPT), rtol=0, atol=1e-4)
    back = tokenizer.decode(x, clamp=False)
    torch.testing.assert_close(tokenizer.encode(back), x, rtol=0, atol=1e-4)
    constant = override_recipe(recipe, ["representation.channels=16"])
    with pytest.raises(MezzotintError, match=r"only 15 components of these patches vary, and 16 cannot be whitened"):
        constant_corner(constant, tmp_path)


def constant_corner(recipe: Recipe, tmp_path: Path) -> None:
    """Fit to images whose corner pixels are always black."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = digits("train").images.clone()
    pixels[:, :, ::P, ::P] = 0
    for i, picture in enumerate(pixels[:200, 0].numpy()):
        Image.fromarray(picture).save(folder / f"{i}.png")
    settings = [f"data=folder:{folder}", "data.labels=false"]
    fit_tokenizer(override_recipe(recipe, settings), tmp_path / "never", quiet=True)


def test_explained_variance_is_pcas_own(tiny: Recipe, pca: PatchPCA, train_images: Tensor) -> None:
    found = measure(pca, train_images.split(300))
    share = (pca.variances[:KEPT].sum() / pca.variances.sum()).item()
    assert found["explained_variance"] == pytest.approx(share, abs=1e-6)
    made = pca.decode(pca.encode(train_images))
    mse = ((made - train_images) ** 2).mean().item()
    assert found["mse"] == pytest.approx(mse, rel=1e-5)
    assert found["psnr"] == pytest.approx(20 * math.log10(2 / math.sqrt(mse)), abs=1e-4)
    assert found["images"] == 898


def test_mirror_images_count_where_training_flips(tiny: Recipe, tmp_path: Path, train_images: Tensor) -> None:
    fit_tokenizer(override_recipe(tiny, [*PCA_RECIPE, "data.flip=true"]), tmp_path / "flip", quiet=True)
    both = torch.cat([train_images, train_images.flip(-1)])
    expected = PCA().fit(patches(both, P).double().numpy()).explained_variance_
    found = load_file(tmp_path / "flip" / "tokenizer.safetensors")["variances"]
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=2e-7 * expected[0])


# ------------------------------------------------------------------------------------------------- trained tokenizers


def test_the_linear_autoencoder_spans_the_pca_subspace(tiny: Recipe, tmp_path: Path) -> None:
    """Baldi & Hornik (1989): every minimum of ‖x − UᵀVx‖² spans the first principal components."""
    settings = [
        "representation=patch-ae",
        "representation.stride=2",
        "representation.channels=2",
        "representation.fit.steps=500",
        "representation.fit.lr=0.03",
    ]
    metrics = fit_tokenizer(override_recipe(tiny, settings), tmp_path / "ae", quiet=True)
    tensors = load_file(tmp_path / "ae" / "tokenizer.safetensors")
    vectors = patches(to_float(digits("train").images), 2).double().numpy()
    components = PCA(2).fit(vectors).components_
    for name in ("encoder", "decoder"):
        angles = subspace_angles(tensors[name].double().numpy().T, components.T)
        assert angles.max() < 0.03, f"{name}: {angles} rad"
    fit_tokenizer(override_recipe(tiny, [*settings[1:3], "representation=patch-pca"]), tmp_path / "pca", quiet=True)
    best = json.loads((tmp_path / "pca" / "metrics.json").read_text())
    assert metrics["explained_variance"] == pytest.approx(best["explained_variance"], abs=1e-3)


@pytest.mark.parametrize("name", ["patch-vae", "conv-vae"])
def test_draws_are_from_the_posterior_and_have_unit_variance(tiny: Recipe, tmp_path: Path, name: str) -> None:
    settings = [*CONV, f"representation={name}", "representation.fit.kl_weight=1"]
    if name == "patch-vae":
        settings = [each for each in settings if not any(word in each for word in ("widths", "groups", "layers"))]
    recipe = override_recipe(tiny, settings)
    fit_tokenizer(recipe, tmp_path / "vae", quiet=True)
    tokenizer = open_tokenizer(tmp_path / "vae")
    images = torch.cat([*sampled_batches(digits("train"), 32, 32, recipe)])
    eps = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = tokenizer.encode(images, eps)
    assert tokenizer.stochastic
    assert x.var((0, 2, 3)).mean().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(tokenizer.encode(images).mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    mean, log_variance = tokenizer.moments(images[:5])
    assert log_variance is not None
    z = mean + log_variance.exp().sqrt() * eps[:5]
    torch.testing.assert_close(tokenizer.decode(x[:5]), tokenizer.reconstruct(z).clamp(-1, 1), rtol=0, atol=1e-4)


def test_fitting_again_gives_the_same(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, [*CONV, *ADVERSARIAL, "data.flip=true"])
    torch.manual_seed(1)
    metrics = fit_tokenizer(recipe, tmp_path / "one", quiet=True)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert fit_tokenizer(recipe, tmp_path / "two", quiet=True) == metrics
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    one, two = (load_file(tmp_path / name / "tokenizer.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {*metrics["losses"]} == {"loss", "reconstruction", "kl", "adversarial", "discriminator"}


def test_images_are_mirrored_in_fitting_where_training_flips(tiny: Recipe, tmp_path: Path) -> None:
    words = ["representation={name: patch-ae, stride: 4, channels: 3}", "representation.fit={steps: 2, batch_size: 8}"]
    made = []
    for flip in ("true", "false"):
        fit_tokenizer(override_recipe(tiny, [*words, f"data.flip={flip}"]), tmp_path / flip, quiet=True)
        made.append(load_file(tmp_path / flip / "tokenizer.safetensors")["decoder"])
    assert not torch.equal(*made)


def test_first_weights_are_drawn_by_the_seed(tiny: Recipe, tmp_path: Path) -> None:
    words = ["representation={name: patch-ae, stride: 4, channels: 3}", "representation.fit={steps: 1, lr: 1.0e-12}"]
    drawn = []
    for seed in (0, 1):  # a step hardly moves them
        fit_tokenizer(override_recipe(tiny, [*words, f"seed={seed}"]), tmp_path / str(seed), quiet=True)
        drawn.append(load_file(tmp_path / str(seed) / "tokenizer.safetensors")["encoder"])
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- losses


def test_kl_is_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    posterior = D.Independent(D.Normal(mean, log_variance.div(2).exp()), 3)
    prior = D.Independent(D.Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    torch.testing.assert_close(kl_divergence(mean, log_variance), D.kl_divergence(posterior, prior))


def test_hinge_loss() -> None:
    real, generated = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, generated).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = 2 * layer.square().sum(), layer.sum()  # gradients 4·(3, 4) and (1, 1)
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(20 / (math.sqrt(2) + 1e-6), rel=1e-6)
    assert adaptive_weight(reconstruction, 0 * layer.sum(), layer).item() == 1e4
    assert layer.grad is None


def test_perceptual_distance_in_a_closed_form() -> None:
    """With the image itself as its only feature map, unit vectors per position: 2 − 2·cosine."""
    one = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    other = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    found = perceptual_distance(lambda images: [images, 7 * images], one, other)
    assert found.item() == pytest.approx(2 * (2 - 2 * 0.6), rel=1e-6)
    assert perceptual_distance(lambda images: [images], one, 5 * one).item() == pytest.approx(0, abs=1e-12)


def edges(images: Tensor) -> list[Tensor]:
    """A feature network of the tests' own: differences along both axes."""
    assert images.requires_grad or not torch.is_grad_enabled(), "the original's features need no gradient"
    down, right = images.diff(dim=-2)[..., :-1], images.diff(dim=-1)[..., :-1, :]
    return [torch.cat([down, right], dim=1)]


def test_each_loss_can_be_switched_off_alone(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    perceptual = (
        "representation.fit.perceptual_weight=0.5",
        "representation.fit.perceptual_network=test_tokenizers:edges",
    )
    images = to_float(digits("train").images[:4])
    found: dict[tuple[bool, bool], dict[str, Tensor]] = {}
    for with_features in (False, True):
        for with_critic in (False, True):
            recipe = override_recipe(
                tiny, [*CONV, *(perceptual if with_features else ()), *(ADVERSARIAL if with_critic else ())]
            )
            losses, tokenizer = losses_of(recipe)
            assert (losses.features is not None, losses.discriminator is not None) == (with_features, with_critic)
            generator = torch.Generator().manual_seed(0)
            parts, _ = losses.tokenizer_loss(tokenizer, images, generator, adversarial=True)
            assert ("perceptual" in parts, "adversarial" in parts) == (with_features, with_critic)
            found[with_features, with_critic] = {name: part.detach() for name, part in parts.items()}
    both = found[True, True]
    torch.testing.assert_close(both["reconstruction"], found[False, False]["reconstruction"])
    sums = both["reconstruction"] + 0.5 * 64 * both["perceptual"] + 1e-6 * both["kl"]
    torch.testing.assert_close(found[True, False]["loss"], sums)
    assert both["loss"] != sums

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed, though its weight is 0")

    for name in ("feature_maps", "PatchDiscriminator", "perceptual_distance", "adaptive_weight", "kl_divergence"):
        monkeypatch.setattr(f"mezzotint.training.tokenizers.{name}", never)
    losses, tokenizer = losses_of(override_recipe(tiny, [*CONV, "representation.fit.kl_weight=0"]))
    losses.tokenizer_loss(tokenizer, images, torch.Generator(), adversarial=True)


def losses_of(recipe: Recipe) -> tuple[TokenizerLosses, Any]:
    from mezzotint.representations.tokenizer import ConvVAE

    settings = recipe.representation
    info = TokenizerInfo(
        name=settings.name, image_channels=1, stride=settings.stride, channels=settings.channels, fit=settings.fit
    )
    torch.manual_seed(0)
    return TokenizerLosses(info, 8, 0, torch.device("cpu"), trust_code=True), ConvVAE(info)


def test_the_discriminator_starts_when_told(tiny: Recipe, tmp_path: Path) -> None:
    late = override_recipe(tiny, [*CONV, *ADVERSARIAL, "representation.fit.adversarial_start=4"])
    never = override_recipe(tiny, CONV)
    tensors = []
    for name, recipe in (("late", late), ("never", never)):
        fit_tokenizer(recipe, tmp_path / name, quiet=True)
        tensors.append(load_file(tmp_path / name / "tokenizer.safetensors"))
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_absolute_differences(tiny: Recipe) -> None:
    losses, tokenizer = losses_of(override_recipe(tiny, [*CONV, "representation.fit.reconstruction=l1"]))
    images = to_float(digits("train").images[:4])
    parts, made = losses.tokenizer_loss(tokenizer, images, torch.Generator().manual_seed(0), adversarial=False)
    expected = (images - made).abs().sum((1, 2, 3)).mean()
    torch.testing.assert_close(parts["reconstruction"], expected)


@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (2, 12), (3, 24)])
def test_the_discriminators_smallest_image(layers: int, smallest: int) -> None:
    critic = PatchDiscriminator(1, width=2, layers=layers).eval()
    assert critic(torch.zeros(1, 1, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        critic(torch.zeros(1, 1, smallest - 2, smallest - 2))


def test_vgg16_gives_five_maps_with_gradients() -> None:
    with torch.device("meta"):
        network = VGG16Features()
        images = torch.zeros(2, 1, 32, 32, requires_grad=True)
        maps = network(images)
    assert [tuple(each.shape[1:]) for each in maps] == [
        (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2),
    ]  # fmt: skip
    assert maps[-1].requires_grad


def test_no_vgg16_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **options: Any) -> None:
        assert options["weights_only"]
        raise OSError("no network")

    monkeypatch.setattr(tokenizer_losses.torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(
        MezzotintError, match=r"cannot be downloaded \(no network\).*perceptual_weight=0, or.*module:fun"
    ):
        feature_maps("vgg16", 32)
    with pytest.raises(MezzotintError, match=r"vgg16 needs images of 16 × 16 or more, not 8 × 8"):
        feature_maps("vgg16", 8)
    with pytest.raises(MezzotintError, match="'lpips' is neither vgg16 nor module:function"):
        feature_maps("lpips", 8)


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("settings", [PCA_RECIPE, CONV], ids=["patch-pca", "conv-vae"])
def test_train_sample_and_load_from_a_moved_folder(tiny: Recipe, tmp_path: Path, settings: tuple[str, ...]) -> None:
    recipe = override_recipe(tiny, [*settings, "backbone.patch_size=1", "training.sample_every=6"])
    trained = mezzotint.train(recipe, tmp_path / "run", quiet=True)
    expected = mezzotint.sample(trained, count=3)
    assert expected.shape == (3, 1, 8, 8)
    assert mezzotint.load_recipe(tmp_path / "run").representation.path == str(tmp_path / "run" / "tokenizer")
    (tmp_path / "run").rename(tmp_path / "moved")
    pipeline = mezzotint.load(tmp_path / "moved")
    torch.testing.assert_close(mezzotint.sample(pipeline, count=3), expected, rtol=0, atol=1e-6)
    longer = override_recipe(recipe, ["training.steps=8"])
    mezzotint.train(longer, tmp_path / "moved", resume=True, quiet=True)
    other = override_recipe(longer, ["representation.fit.examples=3"])
    with pytest.raises(MezzotintError, match=r"belongs to another recipe: representation.fit.examples"):
        mezzotint.train(other, tmp_path / "moved", resume=True, quiet=True)


def test_resuming_ends_with_the_same_weights(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, [*PCA_RECIPE, "backbone.patch_size=1"])
    mezzotint.train(recipe, tmp_path / "whole", quiet=True)
    mezzotint.train(override_recipe(recipe, ["training.steps=4"]), tmp_path / "parts", quiet=True)
    mezzotint.train(recipe, tmp_path / "parts", resume=True, quiet=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_fitted_tokenizer_is_copied_into_the_run(tiny: Recipe, pca: PatchPCA, tmp_path: Path) -> None:
    recipe = override_recipe(
        tiny, [*PCA_RECIPE, f"representation.path={tmp_path / 'pca'}", "backbone.patch_size=1", "training.steps=2"]
    )
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "pca")
    loaded = mezzotint.load(tmp_path / "run").representation
    assert getattr(loaded, "digest", None) == pca.digest
    mezzotint.convert(tmp_path / "run", tmp_path / "converted")
    shutil.rmtree(tmp_path / "run")
    assert mezzotint.sample(mezzotint.load(tmp_path / "converted"), count=2).shape == (2, 1, 8, 8)


def test_a_kill_just_after_fitting_leaves_a_run_that_starts(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, [*PCA_RECIPE, "backbone.patch_size=1", "training.steps=2"])
    own_tokenizer(recipe, tmp_path / "run", World(0, 1, torch.device("cpu")), quiet=True)
    (tmp_path / "run" / ".tokenizer.123.tmp").mkdir()
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("settings", [PCA_RECIPE, CONV], ids=["patch-pca", "conv-vae"])
def test_training_from_cached_latents_is_training_on_images(
    tiny: Recipe, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    fit_tokenizer(override_recipe(tiny, settings), tmp_path / "fitted", quiet=True)
    path = f"representation.path={tmp_path / 'fitted'}"
    recipe = override_recipe(tiny, [*settings, path, "backbone.patch_size=1", "data.flip=true"])
    encode(recipe, tmp_path / "latents", shard_size=500, progress=False)
    cached = override_recipe(recipe, [f"data=latents:{tmp_path / 'latents'}"])
    dataset, images = cached_latents(tmp_path / "latents"), to_float(digits("train").images)
    tokenizer = open_tokenizer(tmp_path / "fitted")
    moments, _ = dataset.get_batch(torch.arange(6))
    torch.testing.assert_close(dataset.encode(moments), tokenizer.encode(images[:6]), rtol=0, atol=1e-5)
    assert moments.shape[1] == tokenizer.channels * (2 if tokenizer.stochastic else 1)
    weights = []
    for name, each in (("from-images", recipe), ("from-latents", cached)):
        mezzotint.train(each, tmp_path / name, quiet=True)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)
    other = override_recipe(recipe, ["seed=1", "representation.path=null", "representation.fit.examples=50"])
    fit_tokenizer(other, tmp_path / "other", quiet=True)
    mistaken = override_recipe(cached, [f"representation.path={tmp_path / 'other'}"])
    with pytest.raises(MezzotintError, match="were encoded by another tokenizer"):
        mezzotint.train(mistaken, tmp_path / "never", quiet=True)
    with pytest.raises(MezzotintError, match=r"which no tokenizer can be fitted to; set representation.path"):
        mezzotint.train(override_recipe(cached, ["representation.path=null"]), tmp_path / "nor this", quiet=True)


def test_the_command_line(tmp_path: Path) -> None:
    arguments = ["fit-tokenizer", "digits", *PCA_RECIPE, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "899 held-out images: reconstruction MSE" in result.output
    names = {"tokenizer.json", "tokenizer.safetensors", "metrics.json", "filters.png", "reconstructions.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, MezzotintError)
    assert "exists already" in str(again.exception)


def test_nothing_is_left_of_a_fit_that_fails(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = override_recipe(tiny, [*CONV, "representation.fit.lr=1e30", "representation.fit.steps=4"])
    with pytest.raises(MezzotintError, match=r"the loss became .* of fitting; lower representation.fit.lr"):
        fit_tokenizer(bad, tmp_path / "bad", quiet=True)
    monkeypatch.setattr("mezzotint.training.tokenizers.save_filters", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(MezzotintError, match="cannot write"):
        fit_tokenizer(override_recipe(tiny, PCA_RECIPE), tmp_path / "full", quiet=True)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["representation.stride=3"], r"patches of 3 × 3 do not tile images of 8 × 8"),
        (["representation.channels=17"], r"channels=17 is more than the 16 numbers in a patch of 1 × 4 × 4"),
        (["representation.fit.perceptual_weight=1"], r"perceptual_weight means nothing for patch-pca.*conv-vae's"),
        (["representation=patch-ae", "representation.fit.whiten=true"], r"whiten means nothing for patch-ae"),
        ([*CONV, "representation.stride=4"], r"2 widths make a stride of 2, not representation.stride=4"),
        ([*CONV, "representation.fit.groups=3"], r"groups=3 does not divide the width 8"),
        (
            [*CONV, "representation.fit.adversarial_weight=1"],
            r"a discriminator of 3 layers needs images of 24 × 24 or more, not 8 × 8",
        ),
        (["representation.fit.stepps=1"], r"key 'representation.fit.stepps' is unknown; closest: steps"),
        (["data=moving-digits", "data.frames=4", "data.size=16"], r"of images, not of clips"),
    ],
)
def test_what_means_nothing_fails_at_once(tiny: Recipe, overrides: list[str], sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        override_recipe(override_recipe(tiny, [*PCA_RECIPE, "backbone.patch_size=1"]), overrides)


def test_images_that_the_tokenizer_does_not_take(pca: PatchPCA) -> None:
    with pytest.raises(MezzotintError, match=r"takes images of 1 channel\(s\), these have 3; set data.channels=1"):
        pca.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(MezzotintError, match=r"patches of 4 × 4 do not tile images of 8 × 10"):
        pca.encode(torch.zeros(1, 1, 8, 10))
    assert pca.encode(torch.zeros(1, 1, 12, 8)).shape == (1, KEPT, 3, 2), "other sizes do"


def test_folders_that_are_no_tokenizer_or_another(tiny: Recipe, pca: PatchPCA, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match=r"not a tokenizer's folder: it has no tokenizer.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(
        MezzotintError, match=r"patch-pca with a stride of 4 and 5 channels, the recipe's patch-ae with 4"
    ):
        open_tokenizer(tmp_path / "pca", name="patch-ae")
    with pytest.raises(MezzotintError, match="the representation patch-pca is not fitted yet"):
        representation("patch-pca")
    with pytest.raises(MezzotintError, match="'pixels' is not fitted; set representation to one of patch-pca"):
        fit_tokenizer(tiny, tmp_path / "never", quiet=True)
    file = tmp_path / "pca" / "tokenizer.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(MezzotintError, match=r"tokenizer.safetensors cannot be read"):
        open_tokenizer(tmp_path / "pca")
    (tmp_path / "pca" / "tokenizer.json").write_text('{"format": 1}')
    with pytest.raises(MezzotintError, match=r"tokenizer.json is damaged: key 'name' is missing"):
        open_tokenizer(tmp_path / "pca")
    for text in ("[", "[" * 100_000):
        (tmp_path / "pca" / "tokenizer.json").write_text(text)
        with pytest.raises(MezzotintError, match=r"tokenizer.json cannot be read"):
            open_tokenizer(tmp_path / "pca")


def test_a_mistaken_path_leaves_no_run_behind(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, [*PCA_RECIPE, "backbone.patch_size=1", "representation.path=nowhere"])
    with pytest.raises(MezzotintError, match="nowhere is not a tokenizer's folder"):
        mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_too_few_patches() -> None:
    moments = Moments(3)
    moments.update(torch.zeros(1, 3))
    with pytest.raises(MezzotintError, match=r"cannot be measured on 1 patch\(es\)"):
        _ = moments.covariance


def test_settings_have_the_papers_defaults() -> None:
    fit = FitSettings()
    assert (fit.perceptual_weight, fit.adversarial_weight) == (0, 0), "no outside weights unless asked for"


def test_a_tokenizer_knows_what_it_was_fitted_to(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, ["representation=patch-pca", "representation.stride=2", "representation.channels=2"])
    fit_tokenizer(recipe, tmp_path / "pca", quiet=True)
    info = json.loads((tmp_path / "pca" / INFO).read_text())
    assert info["data"] == recipe.data.load("train").identity


def test_images_are_mirrored_in_fitting(tiny: Recipe, tmp_path: Path) -> None:
    fit = {"steps": 2, "widths": [8, 8], "groups": 4}
    section = {"name": "conv-vae", "stride": 2, "channels": 2, "fit": fit}
    recipe = override_recipe(tiny, {"representation": section})
    fitted = []
    for flip in ("false", "true"):
        fit_tokenizer(override_recipe(recipe, [f"data.flip={flip}"]), tmp_path / flip, quiet=True)
        fitted.append(load_file(next((tmp_path / flip).glob("*.safetensors"))))
    assert any(not torch.equal(tensor, fitted[1][name]) for name, tensor in fitted[0].items() if "conv" in name)
