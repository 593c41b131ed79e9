"""End-to-end fine-tuning as a classifier: its layers, its losses, its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, TINY
from test_cli import mezzotint as mezzotint
from test_probe import dit, model, random_weights, unet
from torch import Tensor, nn

import mezzotint as library
from mezzotint.backbones import DiffuSSM, DiT, NestedUNet
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.evaluation import end_to_end
from mezzotint.evaluation.end_to_end import (
    Classifier,
    FinetuneSettings,
    add_drop_path,
    augmentation,
    finetune_classifier,
    layer_depths,
    layer_groups,
    load_classifier,
    mixing,
    score,
)
from mezzotint.evaluation.probing import labelled_sources
from mezzotint.evaluation.sources import DatasetSource
from mezzotint.features import layers_of, pooled_features
from mezzotint.files import read_tensors
from mezzotint.recipe import load_recipe

PLAIN: dict[str, Any] = {
    "drop_path": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "randaugment": 0,
    "crop": 1.0,
    "ema": None,
    "weight_decay": 0.0,
}
"""Nothing but the images as they are."""


def made(denoiser: Denoiser, layers: int) -> tuple[Classifier, list[str]]:
    names = list(layers_of(denoiser, range(1, layers + 1)))
    return Classifier(denoiser.float(), names[-1], 0.1, 3), names


def depths_by_name(classifier: Classifier, names: list[str]) -> dict[str, int]:
    depths = layer_depths(classifier, names)
    named = {parameter: name for name, parameter in classifier.denoiser.backbone.named_parameters()}
    return {named[parameter]: depth for parameter, depth in depths.items()}


# ---- Layers ----------------------------------------------------------------------------------------------------------


def test_layer_decay_against_a_table_by_hand() -> None:
    """Two of four blocks; rates are 0.8 · 0.5^(3 − k): embeddings 0.1, block 1 0.2, block 2 0.4, the head 0.8."""
    classifier, names = made(dit(), 2)
    depths = layer_depths(classifier, names)
    classifier.denoiser.requires_grad_(False)
    for parameter in depths:
        parameter.requires_grad_(True)
    groups = layer_groups(classifier, depths, 2, 0.8, FinetuneSettings(layer_decay=0.5, weight_decay=0.3))
    found = {p: (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {}
    for name, parameter in classifier.named_parameters():
        part = name.removeprefix("denoiser.backbone.").split(".")
        if part[0] == "final_layer" or part[:2] in (["blocks", "2"], ["blocks", "3"]):
            continue
        rate = {"blocks": 0.2 if part[1] == "0" else 0.4, "norm": 0.8, "head": 0.8}.get(part[0], 0.1)
        expected[parameter] = (pytest.approx(rate), 0.0 if parameter.ndim == 1 else 0.3)
    assert found == expected
    frozen = {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
    assert all(".blocks.2." in name or ".blocks.3." in name or ".final_layer." in name for name in frozen)
    assert frozen


def test_depths_of_other_networks() -> None:
    classifier, names = made(model(DiffuSSM(input_size=4, in_channels=2, width=16, depth=3, state=4)), 2)
    found = depths_by_name(classifier, names)
    assert {name.split(".")[0]: k for name, k in found.items() if "blocks" not in name}.keys() == {
        "x_embedder",
        "t_embedder",
    }
    assert all(k == int(name.split(".")[1]) + 1 for name, k in found.items() if name.startswith("blocks"))
    assert all(k == 0 for name, k in found.items() if not name.startswith("blocks"))
    depths = layer_depths(classifier, names)
    groups = layer_groups(classifier, depths, 2, 1.0, FinetuneSettings())
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & set(classifier.denoiser.backbone.ssm_parameters())  # type: ignore[operator]

    classifier, names = made(model(unet()), 4)
    assert names == ["down.1.1", "down.1.2", "down.2.1", "middle.1"]
    found = depths_by_name(classifier, names)
    parts = {"down_blocks.0.resnets.0": 1, "down_blocks.0.resnets.1": 2, "down_blocks.0.resample": 3}
    parts |= {"down_blocks.1": 3, "mid_blocks.0": 4, "t_embedder": 0, "y_embedder": 0, "conv_in": 0}
    for name, k in found.items():
        assert [value for part, value in parts.items() if name.startswith(part)] == [k], name

    nested = NestedUNet(
        DiT(input_size=4, patch_size=2, in_channels=1, width=16, depth=2, heads=2),
        channels=(8, 16), resblocks=(1, 1), groups=4,
    )  # fmt: skip
    classifier, names = made(model(nested), 4)
    assert names == ["down.1.1", "down.2.1", "inner.1", "inner.2"]
    found = depths_by_name(classifier, names)
    assert {k for name, k in found.items() if name.startswith("inner.blocks.1.")} == {4}
    assert {k for name, k in found.items() if name.startswith("inner.x_embedder")} == {3}
    assert not any(name.startswith("up_blocks") for name in found)


def test_drop_path_keeps_the_expectation() -> None:
    """A block's MLP and attention are each left out for an image with the block's chance, and made up for."""
    denoiser = dit().float()
    add_drop_path(denoiser, ["1", "2", "3"], 0.5)
    blocks: Any = denoiser.backbone.blocks
    assert [len(block.attn._forward_hooks) for block in blocks] == [0, 1, 1, 0]  # 0, 0.25, 0.5; the last is not chosen
    block, tokens = blocks[2], torch.randn(4000, 1, 16, generator=torch.Generator().manual_seed(0))
    for branch in (block.attn, block.mlp):
        with torch.no_grad():
            block.eval()
            whole = branch(tokens)
            block.train()
            torch.manual_seed(0)
            dropped = branch(tokens)
            ratio = (dropped / whole).mean((1, 2))
            assert set(ratio.round(decimals=3).tolist()) == {0.0, 2.0}
            assert ratio.mean().item() == pytest.approx(1, abs=5 / 4000**0.5)
            torch.manual_seed(0)
            quarter = blocks[1].train().mlp(tokens)
    kept = quarter.abs().sum((1, 2)) > 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 4000) ** 0.5)
    state_space = model(DiffuSSM(input_size=4, in_channels=2, width=16, depth=2, state=4))
    add_drop_path(state_space, ["1", "2"], None)
    assert [len(block.w3._forward_hooks) for block in state_space.backbone.blocks] == [0, 1]  # type: ignore


def test_drop_path_needs_blocks() -> None:
    denoiser = model(unet())
    add_drop_path(denoiser, ["down.1.1", "middle.1"], None)
    assert not any(module._forward_hooks for module in denoiser.modules())
    with pytest.raises(MezzotintError, match=r"^drop_path 0.2 is of the blocks of a DiT or DiffuSSM, and there are no"):
        add_drop_path(denoiser, ["down.1.1", "middle.1"], 0.2)


def test_a_classifier_by_hand() -> None:
    classifier, _ = made(dit(), 2)
    random_weights(classifier)
    x = torch.randn(3, 2, 4, 4)
    features = pooled_features(classifier.denoiser, x, 0.1, ["2"])["2"]
    normed = F.layer_norm(features, (16,), classifier.norm.weight, classifier.norm.bias, 1e-6)
    torch.testing.assert_close(classifier(x), normed @ classifier.head.weight.T + classifier.head.bias)


# ---- Images ----------------------------------------------------------------------------------------------------------


def test_mixing_gives_soft_targets() -> None:
    images = torch.stack([torch.full((1, 16, 16), value) for value in (-1.0, 0.0, 1.0)])
    labels = torch.tensor([2, 0, 1])
    torch.manual_seed(0)
    both = mixing(FinetuneSettings(mixup=0.8, cutmix=1.0), 3)
    kinds = set()
    for _ in range(20):
        mixed, targets = both(images, labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(3))
        share = targets[torch.arange(3), labels]
        assert torch.allclose(share, share[0].expand(3))
        expected = share.view(3, 1) * images[:, 0, 0, :1] + (1 - share).view(3, 1) * images.roll(1, 0)[:, 0, 0, :1]
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected[:, 0], atol=1e-5, rtol=1e-5)
        kinds.add(bool(torch.isin(mixed, images).all()))  # of CutMix every pixel is one of the two images'
    assert kinds == {True, False}
    torch.manual_seed(0)
    only = mixing(FinetuneSettings(mixup=0.0), 3)
    assert all(torch.isin(only(images, labels)[0], images).all() for _ in range(5))
    assert mixing(FinetuneSettings(mixup=0.0, cutmix=0.0), 3) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    change = augmentation(FinetuneSettings(erase=0.25), 8, True)
    for _ in range(40):
        changed = change(image)
        assert (changed.shape, changed.dtype) == ((channels, 8, 8), torch.float32)
    plain = augmentation(FinetuneSettings(**PLAIN), 8, False)
    torch.testing.assert_close(plain(image), image / 127.5 - 1)


# ---- Training --------------------------------------------------------------------------------------------------------

SMALL = ("backbone.patch_size=4", "backbone.width=64", "backbone.depth=2", "backbone.heads=2", *SHORT)


@pytest.fixture(autouse=True)
def _few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 899 held-out digits, so many that an epoch is over soon."""

    def few(settings: Any, count: int | None) -> Any:
        train, test = labelled_sources(settings, count)
        return train, DatasetSource(test.dataset, 60)

    monkeypatch.setattr(end_to_end, "labelled_sources", few)


def test_it_learns_32_digits_by_heart(tmp_path: Path) -> None:
    pipeline = library.build(load_recipe("digits", SMALL))
    before = {name: tensor.clone() for name, tensor in pipeline.denoiser.state_dict().items()}
    settings = FinetuneSettings(**PLAIN | {"epochs": 20, "batch_size": 8, "lr": 1e-2, "layer_decay": 1.0})
    metrics = finetune_classifier(pipeline, tmp_path / "out", settings, count=32, quiet=True)
    assert metrics["epochs"][-1]["loss"] < 0.1
    assert metrics["train_images"] == 32
    assert 0.4 < metrics["top1"] == metrics["epochs"][-1]["top1"]
    again, classifier = load_classifier(tmp_path / "out")
    train, test = labelled_sources(again.recipe.data, 32)
    assert score(classifier, again, train, 32) == {"top1": 1.0}
    some = DatasetSource(test.dataset, 60)
    assert score(classifier, again, some, 100)["top1"] == pytest.approx(metrics["top1"])
    assert again.class_names == tuple("0123456789")
    for name, tensor in pipeline.denoiser.state_dict().items():
        assert torch.equal(tensor, before[name]), "the pipeline is not changed"
    names = dict(classifier.denoiser.backbone.named_parameters())
    old = library.build(load_recipe("digits", SMALL)).denoiser.backbone
    for name, tensor in old.named_parameters():
        same = torch.equal(names[name], tensor)
        assert same == name.startswith(("blocks.1.", "final_layer.")), name


@pytest.fixture
def small() -> library.Pipeline:
    pipeline = library.build(load_recipe("digits", TINY))
    random_weights(pipeline.denoiser)
    return pipeline


def test_the_same_seed_gives_the_same_classifier(small: library.Pipeline, tmp_path: Path) -> None:
    settings = FinetuneSettings(epochs=2, batch_size=20, erase=0.25)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = finetune_classifier(small, tmp_path / "a", settings, count=40, quiet=True)
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator is left as it was"
    torch.manual_seed(8)
    assert finetune_classifier(small, tmp_path / "b", settings, count=40, quiet=True) == first
    one, other = (load_classifier(tmp_path / name)[1].state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = settings.model_copy(update={"seed": 1})
    assert finetune_classifier(small, tmp_path / "c", changed, count=40, quiet=True)["epochs"] != first["epochs"]


def test_the_average_is_kept(small: library.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch of two steps: θ₀ → θ₁ → θ₂, averaged with decays 2/11 and 3/12."""
    thetas: list[Tensor] = []

    class Kept(end_to_end.EMA[Classifier]):
        def update(self, module: nn.Module, step: int) -> None:
            thetas.append(module.head.bias.detach().double().clone())  # type: ignore
            super().update(module, step)

    monkeypatch.setattr(end_to_end, "EMA", Kept)
    settings = FinetuneSettings(**PLAIN | {"epochs": 1, "batch_size": 16, "ema": 0.9999, "lr": 0.1})
    finetune_classifier(small, tmp_path / "out", settings, count=32, quiet=True)
    average = 3 / 12 * (2 / 11 * 0 + 9 / 11 * thetas[0]) + 9 / 12 * thetas[1]
    torch.testing.assert_close(load_classifier(tmp_path / "out")[1].head.bias.detach().double(), average)


@pytest.mark.parametrize("when", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stopped_run_leaves_nothing(
    small: library.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: Any
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise when

    if isinstance(when, OSError):
        monkeypatch.setattr(end_to_end, "save_weights", stop)
    else:
        monkeypatch.setattr(end_to_end, "score", stop)
    with pytest.raises((KeyboardInterrupt, MezzotintError)):
        finetune_classifier(small, tmp_path / "out", FinetuneSettings(**PLAIN, epochs=1), count=32, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite(small: library.Pipeline, tmp_path: Path) -> None:
    settings = FinetuneSettings(**PLAIN | {"epochs": 3, "lr": 1e30})
    with pytest.raises(MezzotintError, match=r"^the loss is NaN or infinite in epoch \d; lower the learning rate"):
        finetune_classifier(small, tmp_path / "out", settings, count=32, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["backbone=diffussm", "backbone.width=16", "backbone.depth=2", "backbone.state=4"],
        ["backbone=unet", "backbone.channels=[8,16]", "backbone.resblocks=[1,1]", "backbone.groups=4"],
    ],
    ids=["diffussm", "unet"],
)
def test_other_networks(tmp_path: Path, words: list[str]) -> None:
    pipeline = library.build(load_recipe("digits", [*words, *SHORT]))
    settings = FinetuneSettings(epochs=2, batch_size=16, precision="bf16")
    metrics = finetune_classifier(pipeline, tmp_path / "out", settings, count=32, quiet=True)
    assert len(metrics["epochs"]) == 2
    again, classifier = load_classifier(tmp_path / "out")
    test = DatasetSource(again.recipe.data.load("test"), 60)
    assert score(classifier, again, test, 300)["top1"] == pytest.approx(metrics["top1"], abs=0.01)


def test_the_folder_of_a_model_on_latents_needs_no_other(tmp_path: Path) -> None:
    words = ["representation={name: patch-pca, stride: 2, channels: 3}", "backbone.patch_size=1"]
    recipe = load_recipe("digits", [*TINY, *words, "training.steps=1"])
    pipeline = library.train(recipe, tmp_path / "run", quiet=True)
    metrics = finetune_classifier(pipeline, tmp_path / "out", FinetuneSettings(epochs=1), count=16, quiet=True)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    again, classifier = load_classifier(tmp_path / "out")
    test = DatasetSource(again.recipe.data.load("test"), 60)
    assert score(classifier, again, test, 300)["top1"] == pytest.approx(metrics["top1"], abs=0.01)


# ---- Every setting does something ------------------------------------------------------------------------------------

DEEP = [*TINY, "backbone.depth=4"]  # of which two blocks are trained, as drop_path leaves the first as it is
BASE: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.01, "layer_decay": 0.9}
OTHER: dict[str, Any] = {
    "epochs": 3, "batch_size": 4, "lr": 0.02, "warmup": 0.5, "weight_decay": 0.5, "betas": (0.5, 0.9),
    "layer_decay": 0.5, "drop_path": 0.7, "label_smoothing": 0.0, "mixup": 0.1, "cutmix": 0.0, "randaugment": 0,
    "magnitude": 1, "crop": 1.0, "erase": 1.0, "ema": 0.01, "precision": "bf16", "seed": 1,
}  # fmt: skip


def deep(words: Sequence[str] = ()) -> library.Pipeline:
    pipeline = library.build(load_recipe("digits", [*DEEP, *words]))
    random_weights(pipeline.denoiser)
    return pipeline


def weights_of(out: Path, settings: dict[str, Any], words: Sequence[str] = (), **options: Any) -> dict[str, Tensor]:
    finetune_classifier(deep(words), out, FinetuneSettings(**settings), quiet=True, **{"count": 16} | options)
    return read_tensors(out / "classifier.safetensors")[0]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "score", lambda *_: {"top1": 0.0})
        return weights_of(tmp_path_factory.mktemp("usual") / "out", BASE)


def test_the_table_has_every_setting() -> None:
    assert set(OTHER) == set(FinetuneSettings.model_fields)


@pytest.mark.parametrize("key", OTHER)
def test_every_setting_makes_another_classifier(
    usual: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(end_to_end, "score", lambda *_: {"top1": 0.0})
    found = weights_of(tmp_path / "out", BASE | {key: OTHER[key]})
    assert any(not torch.equal(found[name], tensor) for name, tensor in usual.items())


@pytest.mark.parametrize("options", [{"t": 0.5}, {"layers": 1}, {"count": 8}, {"words": ["data.flip=true"]}], ids=str)
def test_so_does_every_argument(
    usual: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(end_to_end, "score", lambda *_: {"top1": 0.0})
    found = weights_of(tmp_path / "out", BASE, **options)
    assert any(not torch.equal(found[name], tensor) for name, tensor in usual.items())


def test_the_seed_is_that_of_each_thing_that_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new layers' weights, the images and their changes, and what is drawn in a step, here the mixed targets."""
    seen: dict[int, list[Tensor]] = {}
    batches, cross_entropy = end_to_end.augmented_batches, F.cross_entropy
    monkeypatch.setattr(end_to_end, "score", lambda *_: {"top1": 0.0})
    for seed in (0, 1):
        images: list[Tensor] = []
        shares: list[Tensor] = []  # of the greater of a target's classes

        def looked_at(*arguments: Any, images: list[Tensor] = images) -> Iterator[tuple[Tensor, Tensor | None]]:
            for batch in batches(*arguments):
                images.append(batch[0])
                yield batch

        def loss(logits: Tensor, targets: Tensor, shares: list[Tensor] = shares, **more: Any) -> Tensor:
            shares.append(targets.max(1).values.sort().values)
            return cross_entropy(logits, targets, **more)

        monkeypatch.setattr(end_to_end, "augmented_batches", looked_at)
        monkeypatch.setattr(F, "cross_entropy", loss)
        settings = BASE | {"epochs": 1, "batch_size": 16, "seed": seed, "lr": 1e-12, "layer_decay": 1.0, "ema": None}
        weights = weights_of(tmp_path / str(seed), settings)  # which hardly move
        seen[seed] = [weights["head.weight"], images[0], shares[0]]
    for one, other in zip(*seen.values(), strict=True):
        assert not torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-7)


def test_an_epoch_is_scored_without_stochastic_depth(tmp_path: Path) -> None:
    settings = FinetuneSettings(**PLAIN | BASE | {"drop_path": 0.9, "epochs": 1})
    pipeline = deep()
    metrics = finetune_classifier(pipeline, tmp_path / "out", settings, layers=4, count=16, quiet=True)
    again, classifier = load_classifier(tmp_path / "out")
    test = DatasetSource(again.recipe.data.load("test"), 60)
    assert score(classifier, again, test)["top1"] == metrics["top1"]
    classifier.train()
    add_drop_path(classifier.denoiser, ["1", "2", "3", "4"], 0.9)
    torch.manual_seed(0)
    assert score(classifier, again, test)["top1"] != metrics["top1"], "which would be another figure"


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    library.train(load_recipe("digits", [*TINY, "training.steps=1"]), folder, quiet=True)
    return folder


@pytest.mark.parametrize("random", [False, True])
def test_the_command(mezzotint: Any, run: Path, tmp_path: Path, random: bool) -> None:
    out = tmp_path / "out"
    words = ["finetune.mixup=0", "--epochs", 2, "--lr", 0.01, "--batch-size", 16, "--count", 32, "--t", 0.1]
    shown = mezzotint("finetune", run, *words, "--layers", 1, "--out", out, *(["--random"] if random else []))
    assert shown.code == 0, shown.err
    assert "epoch 2/2: loss" in shown.err
    metrics = json.loads((out / "metrics.json").read_text())
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["epochs"], settings["lr"], settings["mixup"], settings["cutmix"]) == (2, 0.01, 0.0, 1.0)
    assert (metrics["layers"], metrics["t"], metrics["test_images"]) == (1, 0.1, 60)
    assert f"top-1 {metrics['top1']:.2%} of 60 images" in shown.out
    assert ("fresh weights" in shown.out) == random
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layers", "7"], "the network has no layer '7'; it has 1 to 1"),
        (["--layers", "0"], "the network has no layer '0'; it has 1 to 1"),
        (["--t", "1.5"], "t = 1.5 is outside of [0, 1]"),
        (["--epochs", "0"], "epochs = 0 is not valid"),
        (["--lr", "-1"], "lr = -1.0 is not valid"),
        (["finetune.mixap=1"], "key 'mixap' is unknown; closest: mixup"),
        (["finetune.layer_decay=1.5"], "layer_decay = 1.5 is not valid"),
        (["finetune.magnitude=11"], "magnitude = 11 is not valid"),
        (["finetune=1"], "key 'finetune' is unknown"),
        (["backbone.width=8"], "would change the trained model"),
        (["data.labels=false"], "has no labels, which classifiers are fitted to"),
        (["--count", "1000"], "has 898 images, fewer than the 1000 asked for"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(
    mezzotint: Any, run: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = mezzotint("finetune", run, *arguments, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_and_one_without_a_classifier(mezzotint: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    result = mezzotint("finetune", run, "--out", tmp_path)
    assert (result.code, "exists already; choose another place" in result.err) == (2, True)
    with pytest.raises(MezzotintError, match="holds no fine-tuned classifier"):
        load_classifier(run)
    shutil.copytree(run, tmp_path / "other")
    shutil.copy(run / "model.safetensors", tmp_path / "other" / end_to_end.WEIGHTS)
    with pytest.raises(MezzotintError, match="names no layer and time"):
        load_classifier(tmp_path / "other")
