"""Baselines of probes: a masked autoencoder against transformers' own, PCA against scikit-learn's, pixel noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from test_cli import mezzotint as mezzotint

import mezzotint as library
from mezzotint.errors import MezzotintError
from mezzotint.evaluation import mae
from mezzotint.evaluation.features import feature_network
from mezzotint.evaluation.mae import MAESettings, open_mae, train_mae
from mezzotint.recipe import DataSettings, load_recipe

WORDS = ("backbone.patch_size=2", "backbone.width=16", "backbone.depth=4", "backbone.heads=2")
MAE_RECIPE = (*WORDS, "training.steps=60", "training.batch_size=64", "training.log_every=20")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("baselines") / "mae"
    metrics = train_mae(
        load_recipe("digits", MAE_RECIPE), folder, MAESettings(lr=1e-2, crop=1.0, norm_pix_loss=False), device="cpu"
    )
    return folder, metrics


def images(count: int = 5, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)


# ---- Masked autoencoder ----------------------------------------------------------------------------------------------


def test_a_masked_autoencoder_learns(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = trained
    pixels = library.data.load("digits", "train").images / 127.5 - 1
    assert metrics["last_loss"] < 0.9 * pixels.var().item() < metrics["first_loss"], "it knows where a patch is"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "vit_mae", "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16,
        "num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "decoder_hidden_size": 8, "mask_ratio": 0.75,
        "norm_pix_loss": False, "intermediate_size": 64,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_its_features_are_those_of_vit_mae(trained: tuple[Path, dict[str, Any]]) -> None:
    """The mean of a block's patch tokens with nothing hidden, in whichever order the patches are taken."""
    from transformers import ViTMAEForPreTraining

    network = ViTMAEForPreTraining.from_pretrained(trained[0]).vit.eval()
    network.config.mask_ratio = 0.0
    kept: list[torch.Tensor] = []
    blocks = [module for name, module in network.named_modules() if type(module).__name__ == "ViTMAELayer"]
    for block in blocks:
        block.register_forward_hook(
            lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        network(pixel_values=images() / 127.5 - 1)
    opened = open_mae(trained[0])
    assert opened.layers == ("1", "2")
    found = opened.features(images(), ["2", "1"])
    for layer in ("1", "2"):
        torch.testing.assert_close(found[layer], kept[int(layer) - 1][:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    assert torch.equal(found["1"], open_mae(trained[0]).features(images(), ["1"])["1"]), "nothing is drawn"


def test_the_same_seed_gives_the_same_masked_autoencoder(tmp_path: Path) -> None:
    recipe = load_recipe("digits", [*MAE_RECIPE, "training.steps=3"])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = train_mae(recipe, tmp_path / "a", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert train_mae(recipe, tmp_path / "b", device="cpu") == first
    assert open_mae(tmp_path / "a").name == open_mae(tmp_path / "b").name
    assert train_mae(recipe.model_copy(update={"seed": 1}), tmp_path / "c", device="cpu") != first


BASE: dict[str, Any] = {"lr": 1e-2}
OTHER: dict[str, Any] = {
    "depth": 1, "decoder_depth": 1, "decoder_width": 16, "decoder_heads": 1, "mask_ratio": 0.5, "norm_pix_loss": False,
    "lr": 2e-2, "warmup": 0.5, "weight_decay": 5.0, "betas": (0.5, 0.9), "crop": 1.0,
}  # fmt: skip
FEW = (*MAE_RECIPE, "training.steps=4", "training.batch_size=8")


def weights_of(out: Path, settings: dict[str, Any], words: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    train_mae(load_recipe("digits", [*FEW, *words]), out, MAESettings(**settings), device="cpu")
    return load_file(out / "model.safetensors")


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        tensor.shape != other[name].shape or not torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights_of(tmp_path_factory.mktemp("usual") / "mae", BASE)


def test_the_table_has_every_setting() -> None:
    assert set(OTHER) == set(MAESettings.model_fields)


@pytest.mark.parametrize("key", OTHER)
def test_every_setting_makes_another_masked_autoencoder(
    usual: dict[str, torch.Tensor], tmp_path: Path, key: str
) -> None:
    assert differ(usual, weights_of(tmp_path / "mae", BASE | {key: OTHER[key]}))


@pytest.mark.parametrize(
    "word", ["training.precision=bf16", "training.steps=3", "training.batch_size=4", "data.flip=true"]
)
def test_so_does_what_it_takes_from_the_recipe(usual: dict[str, torch.Tensor], tmp_path: Path, word: str) -> None:
    assert differ(usual, weights_of(tmp_path / "mae", BASE, (word,)))


def test_the_seed_is_that_of_each_thing_that_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first weights, the images and their crops, and the masks, which are other ones at every step."""
    from transformers import ViTMAEForPreTraining

    forward = ViTMAEForPreTraining.forward
    seen = []
    for seed in (0, 1):
        given: list[dict[str, torch.Tensor]] = []

        def looked_at(self: Any, given: list[Any] = given, **inputs: torch.Tensor) -> Any:
            given.append(inputs)
            return forward(self, **inputs)

        monkeypatch.setattr(ViTMAEForPreTraining, "forward", looked_at)
        weights = weights_of(tmp_path / str(seed), {"lr": 1e-12}, (f"seed={seed}",))  # which hardly move
        assert not torch.equal(given[0]["noise"], given[1]["noise"])
        seen.append([weights["vit.embeddings.cls_token"], given[0]["pixel_values"], given[0]["noise"]])
    for one, other in zip(*seen, strict=True):
        assert not torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_it_has_the_tokens_of_the_recipes_network() -> None:
    """A DiT-L/2 on latents of 32 × 32, and the DiT that sees patches of 16: both have 16 × 16 tokens."""
    for name in ("ldae-00-dit", "ldae-10-original-image"):
        sizes = mae._sizes(load_recipe(name), MAESettings(decoder_depth=8, decoder_width=512, decoder_heads=16))
        assert (sizes["image_size"], sizes["patch_size"], sizes["num_channels"]) == (256, 16, 3)
        assert (sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]) == (1024, 12, 16)
        assert (sizes["decoder_hidden_size"], sizes["decoder_num_hidden_layers"]) == (512, 8)


def test_a_stopped_masked_autoencoder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mae, "_check", stop)
    with pytest.raises(KeyboardInterrupt):
        train_mae(load_recipe("digits", [*MAE_RECIPE, "training.steps=1"]), tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_commands(mezzotint: Any, tmp_path: Path) -> None:
    out, result = tmp_path / "mae", tmp_path / "a.json"
    words = [*MAE_RECIPE, "training.steps=4", "mae.depth=3", "mae.mask_ratio=0.5", "--device", "cpu"]
    shown = mezzotint("train-mae", "digits", *words, "--out", out)
    assert shown.code == 0, shown.err
    assert "at last" in shown.out
    probe = ["--probe", "knn", "--count", 100, "--out", result]
    shown = mezzotint("probe", "digits", "--features", f"mae:{out}", *probe)
    assert shown.code == 0, shown.err
    assert [row["layer"] for row in json.loads(result.read_text())["rows"]] == ["1", "2", "3"]
    shown = mezzotint("probe", "digits", "--features", f"mae:{out}", "--layer", 2, *probe)
    assert [row["layer"] for row in json.loads(result.read_text())["rows"]] == ["2"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mae.mask_ratio=1"], "mask_ratio = 1 is not valid"),
        (["mae.mask_ratio=0.99"], "mae.mask_ratio 0.99 leaves 0 of 16 patches to see"),
        (["mae.mask_ration=0.5"], "key 'mask_ration' is unknown; closest: mask_ratio"),
        (["mae.decoder_width=9"], "mae.decoder_width 9 must be a multiple of 4 and of its 2 heads"),
        (["backbone=unet"], "takes its sizes from a recipe with backbone dit, such as digits; this one has unet"),
        (["training.step=1"], "key 'training.step' is unknown"),
        (["mae.lr=1e30", "training.log_every=1"], "the loss is NaN or infinite at step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_training_is_one_sentence(
    mezzotint: Any, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = mezzotint("train-mae", "digits", *MAE_RECIPE, *arguments, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--features", "mae:MAE", "--layer", "3"], "the network has no layer '3'; it has 1 to 2"),
        (["--features", "mae:MAE", "--t", "0.1"], "a masked autoencoder knows no times or noise; leave them out"),
        (["--features", "mae:nowhere"], "there is no masked autoencoder at 'nowhere'; give a folder that"),
        (["--features", "pca:65"], "65 principal components cannot be had of 64 pixels"),
        (["--features", "pca:0"], "pca:0 names no principal components of images; give their number, such as pca:16"),
        (["--features", "pca:many"], "pca:many names no principal components"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_probing_is_one_sentence(
    mezzotint: Any, trained: tuple[Path, Any], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    words = [word.replace("MAE", str(trained[0])) for word in arguments]
    result = mezzotint("probe", "digits", *words, "--out", tmp_path / "a.json")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert sentence in result.err


def test_images_of_another_size_and_models_of_another_kind(trained: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(MezzotintError, match=r"sees images of 8 × 8 pixels, not 16 × 16; set data.size=8$"):
        open_mae(trained[0]).features(images(size=16), ["1"])
    with pytest.raises(MezzotintError, match="it is a vit, expected a vit_mae"):
        open_mae(tmp_path)
    with pytest.raises(MezzotintError, match="precision 'fp8' is unknown"):
        open_mae(tmp_path, precision="fp8")


# ---- Principal components, pixel noise -------------------------------------------------------------------------------


def test_principal_components_of_pixels_are_scikit_learns(mezzotint: Any, tmp_path: Path) -> None:
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    train, test = library.data.load("digits", "train"), library.data.load("digits", "test")
    network = feature_network("pca:10", data=DataSettings())
    fitted = PCA(10, svd_solver="full").fit(train.images.flatten(1).double().numpy() / 255)
    for split in (train, test):
        found = network(split.images)["features"].double()
        expected = torch.from_numpy(fitted.transform(split.images.flatten(1).double().numpy() / 255))
        torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-5, rtol=1e-4)
    out = tmp_path / "a.json"
    shown = mezzotint("probe", "digits", "--features", "pca:10", "--probe", "knn", "--k", 1, "--out", out)
    assert shown.code == 0, shown.err
    row = json.loads(out.read_text())["rows"][0]
    rows = [fitted.transform(split.images.flatten(1).double().numpy() / 255) for split in (train, test)]
    neighbours = KNeighborsClassifier(1, metric="cosine").fit(rows[0], train.labels)
    assert row["layer"] == "pca:10"
    assert row["top1"] == pytest.approx(neighbours.score(rows[1], test.labels), abs=2 / 899)


@pytest.mark.parametrize("name", ["dae-digits", "dae-fashion-mnist"])
def test_pixel_noise_is_that_of_a_denoising_autoencoder(name: str) -> None:
    """x + √(1/3)·ε in pixels, and the clean image is what is predicted."""
    from mezzotint.training.loop import make_objective

    recipe = load_recipe(name)
    assert (recipe.representation.name, recipe.target) == ("pixels", "data")
    denoiser = library.build(recipe).denoiser
    objective = make_objective(recipe, denoiser)
    t = objective.draw(3, torch.Generator().manual_seed(0)).t
    c = denoiser.interpolant.at(t.double())
    torch.testing.assert_close(c.sigma, torch.full_like(c.sigma, (1 / 3) ** 0.5))
    torch.testing.assert_close(c.alpha, torch.ones_like(c.alpha))


def test_it_trains_and_is_probed(mezzotint: Any, tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("objective")]
    words += ["training.steps=60", "training.lr=1e-2", "training.checkpoint_every=60"]
    trained = mezzotint("train", "dae-digits", *words, "--out", tmp_path / "run")
    assert f"next: mezzotint probe {tmp_path / 'run'}" in trained.err, "it cannot be sampled"
    lines = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/train"] for line in lines if "loss/train" in line]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    out = ["--out", tmp_path / "a.json", "--probe", "ridge", "--count", 200]
    shown = mezzotint("probe", tmp_path / "run", *out)
    assert shown.code == 0, shown.err
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["top1"] > 0.2
