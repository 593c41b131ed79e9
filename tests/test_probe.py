"""Probes against scikit-learn and by hand, and the features that they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHORT, TINY
from test_cli import mezzotint as mezzotint
from torch import Tensor, nn

import mezzotint as library
from mezzotint.backbones import DiffuSSM, DiT, NestedUNet, UNet
from mezzotint.backbones.unet import Level
from mezzotint.conditions.text import byte_tokens
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.evaluation import probe as probes
from mezzotint.evaluation import probing
from mezzotint.evaluation.lars import LARS
from mezzotint.evaluation.probe import Labelled, LinearProtocol, knn_probe, linear_probe, ridge_probe
from mezzotint.features import layers_of, pooled_features
from mezzotint.interpolants import interpolant
from mezzotint.recipe import load_recipe, override_recipe


def random_weights(module: nn.Module) -> None:
    """No weight is zero, so that no block is the identity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)


def model(backbone: nn.Module, path: str = "linear") -> Denoiser:
    denoiser = Denoiser(backbone, interpolant(path))  # type: ignore[arg-type]
    random_weights(denoiser)
    return denoiser.double().eval()


def dit(**options: Any) -> Denoiser:
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 2, "width": 16, "depth": 4, "heads": 2, "num_classes": 3}
    return model(DiT(**sizes | options))


def data(denoiser: Denoiser, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *denoiser.in_shape, generator=generator, dtype=torch.float64)


UNET = {
    "input_size": 8,
    "in_channels": 1,
    "channels": (8, 16),
    "resblocks": (2, 1),
    "attention": (0, 2),
    "heads": 2,
    "groups": 4,
    "num_classes": 3,
}


def unet(**options: Any) -> UNet:
    return UNet(**UNET | options)  # type: ignore[arg-type]


# ---- Features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln", "cross-attention", "in-context"])
def test_features_of_a_transformer_are_its_blocks_by_hand(conditioning: str) -> None:
    denoiser = dit(conditioning=conditioning)
    x, network = data(denoiser), denoiser.backbone
    assert isinstance(network, DiT)
    found = pooled_features(denoiser, x, 0.25, [1, "3"])
    assert list(found) == ["1", "3"]
    with torch.no_grad():
        conditions = network.condition(torch.full((3,), 250.0), torch.full((3,), 3))  # times are told in float32
        tokens = network.x_embedder(x) + network.pos_embed
        if conditioning == "in-context":
            tokens = torch.cat([tokens, *conditions], dim=1)
        for k, block in enumerate(network.blocks[:3], 1):
            given = [] if conditioning == "in-context" else [conditions[k - 1 if network.adaptive else 0]]
            tokens = block(tokens, *given)
            if str(k) in found:
                torch.testing.assert_close(found[str(k)], tokens[:, :4].mean(1))


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
def test_features_with_captions_are_those_of_the_image(conditioning: str) -> None:
    """Padding in front of the image's groups, and the tokens of a caption, are not averaged over."""
    sizes: Any = {"input_size": 4, "in_channels": 2, "width": 16, "depth": 2, "state": 4, "text_features": 0}
    denoiser = model(DiffuSSM(**sizes, conditioning=conditioning))
    x, null = data(denoiser), byte_tokens([""], 6)
    outputs: list[Tensor] = []
    denoiser.backbone.blocks[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))  # type: ignore
    denoiser(x, 0.5, null[torch.zeros(3).long()])
    found = pooled_features(denoiser, x, 0.5, [2], null=null)
    torch.testing.assert_close(found["2"], outputs[0][:, -8:].mean(1), rtol=1e-3, atol=1e-4)  # times in float32


def test_the_steps_of_a_unet() -> None:
    denoiser = model(unet())
    names = ["down.1.1", "down.1.2", "down.2.1", "middle.1", "middle.2"]
    assert list(layers_of(denoiser)) == [*names, "up.2.1", "up.2.2", "up.1.1", "up.1.2", "up.1.3"]
    outputs: dict[str, list[Tensor]] = {}
    levels = {name: part for name, part in denoiser.named_modules() if isinstance(part, Level)}
    for name, level in levels.items():

        def keep(module: Any, inputs: Any, given: list[Tensor], name: str = name, level: Level = level) -> None:
            outputs[name] = given[: len(level.resnets)]

        level.register_forward_hook(keep)
    x = data(denoiser)
    denoiser(x, 0.1)
    found = pooled_features(denoiser, x, 0.1)
    expected = [output.mean((2, 3)) for steps in outputs.values() for output in steps]
    assert len(expected) == len(found)
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_of_nested_networks_and_clips() -> None:
    outer: dict[str, Any] = {"channels": (8, 16), "resblocks": (1, 1), "groups": 4}
    around_dit = model(NestedUNet(DiT(**{**DIT, "in_channels": 1}), **outer))
    down, up = ["down.1.1", "down.2.1"], ["up.2.1", "up.2.2", "up.1.1", "up.1.2"]
    assert list(layers_of(around_dit)) == [*down, "inner.1", "inner.2", *up]
    assert list(layers_of(around_dit, [3, "up.1.2"])) == ["inner.1", "up.1.2"]
    assert pooled_features(around_dit, data(around_dit), 0.1, ["inner.2"])["inner.2"].shape == (3, 16)
    clips = model(unet(frames=3, temporal_attention=True, num_classes=0))
    x = data(clips)
    outputs: list[Tensor] = []
    handle = layers_of(clips, ["down.2.1"])["down.2.1"].module.register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    clips(x, 0.1)
    handle.remove()
    assert outputs[0].shape == (9, 16, 4, 4)
    expected = outputs[0].unflatten(0, (3, 3)).mean((1, 3, 4))
    torch.testing.assert_close(pooled_features(clips, x, 0.1, ["down.2.1"])["down.2.1"], expected)


DIT: dict[str, Any] = {"input_size": 4, "patch_size": 2, "in_channels": 2, "width": 16, "depth": 2, "heads": 2}


def test_the_pass_ends_with_the_last_layer_and_leaves_nothing() -> None:
    denoiser = dit()
    calls: list[int] = []
    for k, block in enumerate(denoiser.backbone.blocks, 1):  # type: ignore[arg-type]
        block.register_forward_pre_hook(lambda module, inputs, k=k: calls.append(k))
    x = data(denoiser)
    found = pooled_features(denoiser, x, 0.01, [2, 1])
    assert calls == [1, 2]
    assert not found["2"].requires_grad
    assert all(not module._forward_hooks for module in denoiser.modules())
    with pytest.raises(MezzotintError, match="input has shape"):
        pooled_features(denoiser, x[:, :1], 0.01)
    assert all(not module._forward_hooks for module in denoiser.modules())
    denoiser.backbone.compile(backend="eager")
    torch.testing.assert_close(pooled_features(denoiser, x, 0.01, [1, 2]), found)


def test_clean_and_noised_inputs() -> None:
    denoiser = dit()
    x = data(denoiser)
    eps = torch.randn_like(x)
    c = denoiser.interpolant.at(torch.tensor(0.3, dtype=torch.float64))
    noised = pooled_features(denoiser, x, 0.3, eps=eps)
    torch.testing.assert_close(noised, pooled_features(denoiser, c.alpha * x + c.sigma * eps, 0.3))
    other = pooled_features(denoiser, x, 0.4, eps=eps)
    assert not torch.allclose(noised["4"], other["4"])


def test_features_do_not_depend_on_the_batch_and_work_in_bf16() -> None:
    for denoiser in (dit(), model(unet())):
        x = data(denoiser, 5)
        whole, one = pooled_features(denoiser, x, 0.1), pooled_features(denoiser, x[3:4], 0.1)
        for name, features in whole.items():
            torch.testing.assert_close(features[3:4], one[name])
        denoiser.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = pooled_features(denoiser, x.float(), 0.1)
        for name, features in found.items():
            assert features.dtype == torch.float32
            assert (features - whole[name]).norm() < 0.1 * whole[name].norm()


def test_impossible_layers_and_times() -> None:
    with pytest.raises(MezzotintError, match=r"the network has no layer '5'; it has 1 to 4$"):
        layers_of(dit(), ["5"])
    with pytest.raises(MezzotintError, match=r"no layer 'down.3.1'; it has 1 to 10, or by name: down.1.1, down.1.2, "):
        layers_of(model(unet()), ["down.3.1"])
    with pytest.raises(MezzotintError, match=r"no layer '0'"):
        layers_of(dit(), [0])
    for t in (-0.1, 1.01, float("nan")):
        with pytest.raises(MezzotintError, match=r"is outside of \[0, 1\]"):
            pooled_features(dit(), torch.zeros(1, 2, 4, 4), t)


# ---- Probes ----------------------------------------------------------------------------------------------------------


def blobs(classes: int, dim: int, each: int, spread: float, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Training and test examples of Gaussian classes, the features of very different sizes."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, dim))
    labels = np.tile(np.arange(classes), 2 * each)
    scales = np.logspace(-3, 3, dim)
    features = (centres[labels] + spread * generator.normal(size=(len(labels), dim))) * scales + 5 * scales
    made = Labelled(torch.from_numpy(features).float(), torch.from_numpy(labels))
    half = classes * each
    return made.rows(torch.arange(half)), made.rows(torch.arange(half, 2 * half))


def test_lars_by_hand() -> None:
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    optimizer = LARS([w, b, zero], 0.5, momentum=0.9, weight_decay=0.1, trust=0.01)
    weights, bias = np.array([3.0, 4.0]), 1.0
    momentum, bias_momentum = np.zeros(2), 0.0
    for gradient in (np.array([1.0, -2.0]), np.array([0.5, 0.0])):
        w.grad, b.grad = torch.tensor(gradient).view(1, 2), torch.tensor([2.0], dtype=torch.float64)
        zero.grad = torch.tensor(gradient).view(1, 2)
        optimizer.step()
        decayed = gradient + 0.1 * weights
        momentum = 0.9 * momentum + 0.01 * np.linalg.norm(weights) / np.linalg.norm(decayed) * decayed
        bias_momentum = 0.9 * bias_momentum + 2.0
        weights, bias = weights - 0.5 * momentum, bias - 0.5 * bias_momentum
        np.testing.assert_allclose(w.detach().numpy()[0], weights, rtol=1e-14)
        assert b.item() == pytest.approx(bias, rel=1e-14)
    # 0 has no norm to go by: plain momentum in the first step.
    assert zero.detach()[0, 1].item() == pytest.approx(0.5 * 2 + 0.5 * (0.9 * 2) - 0.5 * 0.01 * 1 * 0, abs=0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_linear_probe_finds_what_logistic_regression_finds(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, test = blobs(4, 12, 50, 0.4)
    if optimizer == "lars":
        monkeypatch.setattr(probes, "BASE_LR", 8.0)  # MAE's for its own batch; 200 examples make one of 200
    protocol = LinearProtocol(optimizer=optimizer)
    scaler = StandardScaler().fit(train.features)
    fitted = LogisticRegression(C=1e3).fit(scaler.transform(train.features), train.labels)
    expected = fitted.score(scaler.transform(test.features), test.labels)
    assert expected > 0.98
    assert fitted.score(scaler.transform(train.features), train.labels) == 1
    both = Labelled(torch.cat([train.features, test.features]), torch.cat([train.labels, test.labels]))
    found = linear_probe(train, both, 4, protocol)
    assert found["top1"] == pytest.approx((1 + expected) / 2, abs=0.0075), "all of train, and 3 of 200 others"
    assert linear_probe(train, both, 4, protocol) == found


def test_the_plan_of_a_linear_probe() -> None:
    """MAE's numbers on ImageNet: 90 epochs of 1.28 million images in batches of 16,384, learning rate 6.4."""
    protocol = LinearProtocol(optimizer="lars")
    assert protocol.order(1_281_167).batch_size == 16384
    assert protocol.steps(1_281_167) == 7038
    assert (protocol.steps(898), protocol.steps(60_000), LinearProtocol(1000).steps(898)) == (300, 330, 1000)
    probe = probes.LinearProbe(3, 2, 1_281_167, protocol)
    rates = []
    for _ in range(7038):
        rates.append(probe.optimizer.param_groups[0]["lr"])
        probe.optimizer.step()
        probe.schedule.step()
    assert max(rates) == pytest.approx(6.4)
    assert np.argmax(rates) == 7038 // 9
    assert rates[7038 // 18] == pytest.approx(3.2, rel=1e-2)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0, abs=1e-5)
    assert not list(probe.model[0].parameters())


def test_nearest_neighbours_are_scikit_learns() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, test = blobs(12, 6, 20, 1.5, seed=3)
    train, test = (Labelled(part.features / train.features.std(0), part.labels) for part in (train, test))
    for k in (1, 7, 240):
        other = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(*train)
        found = knn_probe(train, test, 12, k=k)
        assert found["top1"] == pytest.approx(other.score(*test), abs=1e-9)
        five = other.predict_proba(test.features).argsort(axis=1)[:, -5:]
        if k == 240:
            hits = (five == test.labels.numpy()[:, None]).any(1).mean()
            assert found["top5"] == pytest.approx(hits, abs=1e-9)
    with pytest.raises(MezzotintError, match="k = 241 neighbours cannot be had of 240 training images; choose 1"):
        knn_probe(train, test, 12, k=241)


@pytest.mark.parametrize("dim", [10, 150], ids=["more examples", "more features"])
def test_ridge_is_scikit_learns(dim: int) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    train, test = blobs(3, dim, 30, 2.0)
    train.features[:, 0] = 7.0  # a constant says nothing, and breaks nothing
    path = probes._RidgePath(train, 3)
    scaler = StandardScaler().fit(train.features.double())
    x, x_test = (torch.from_numpy(scaler.transform(part.features.double())) for part in (train, test))
    targets = nn.functional.one_hot(train.labels, 3).double()
    for ridge in probes.RIDGES:
        other = Ridge(alpha=ridge * 90).fit(x[:, 1:], targets).predict(x_test[:, 1:])
        features = test.features.clone()
        features[:, 0] = 7.0
        np.testing.assert_allclose(path.at(ridge)(features), other, rtol=1e-5, atol=1e-6)
    found = ridge_probe(train, test, 3)
    best = Ridge(alpha=found["ridge"] * 90).fit(x[:, 1:], targets).predict(x_test[:, 1:])
    features = Labelled(torch.cat([train.features[:, :1], test.features[:, 1:]], dim=1), test.labels)
    assert ridge_probe(train, features, 3)["top1"] == (best.argmax(1) == test.labels.numpy()).mean()


def test_top5_is_counted_with_more_than_ten_classes() -> None:
    scores = torch.arange(12.0).repeat(12, 1)
    test = Labelled(scores, torch.arange(12))
    assert probes.accuracy(lambda features: features, test, 12, rows=5) == {"top1": 1 / 12, "top5": 5 / 12}
    assert probes.accuracy(lambda features: features[:, :10], test.rows(torch.arange(10)), 10) == {"top1": 0.1}


def test_impossible_probes() -> None:
    one = Labelled(torch.ones(1, 2), torch.zeros(1).long())
    for kind in (linear_probe, ridge_probe):
        with pytest.raises(MezzotintError, match="a probe needs at least 2 training images, got 1"):
            kind(one, one, 2)
    with pytest.raises(MezzotintError, match="optimizer 'adam' is unknown; known: sgd, lars"):
        LinearProtocol(optimizer="adam")
    with pytest.raises(MezzotintError, match="at least 1 epoch, got 0"):
        LinearProtocol(epochs=0)
    with pytest.raises(MezzotintError, match="temperature of a k-NN probe must be positive, got 0"):
        knn_probe(one, one, 2, k=1, temperature=0)


def test_the_seed_of_a_linear_probe_is_that_of_its_weights_and_order() -> None:
    one, other = (LinearProtocol(seed=seed) for seed in (0, 1))
    first, second = (probes.LinearProbe(4, 3, 10, protocol).head.weight for protocol in (one, other))
    assert not torch.allclose(first, second)
    assert not torch.equal(one.order(20_000).indices(0), other.order(20_000).indices(0))


def test_a_linear_probe_judges_an_example_by_itself() -> None:
    train, test = blobs(4, 12, 50, 0.4)
    probe = probes.LinearProbe(12, 4, 200, LinearProtocol())
    for _ in range(3):
        probe.step(*train)
    torch.testing.assert_close(probe(test.features[:1]), probe(test.features)[:1])


def test_a_temperature_decides_between_one_near_neighbour_and_two_others() -> None:
    train = Labelled(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1]))
    test = Labelled(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert knn_probe(train, test, 2, k=3, temperature=0.1)["top1"] == 1
    assert knn_probe(train, test, 2, k=3, temperature=10.0)["top1"] == 0


# ---- A model's -------------------------------------------------------------------------------------------------------


def test_features_are_kept(pipeline: library.Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path))
    calls: list[int] = []
    pipeline.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))

    def passes(**options: Any) -> tuple[int, Any]:
        before = sum(calls)
        rows = library.probe(pipeline, **{"count": 50, "probes": ["knn"], "k": 3} | options)["rows"]
        return sum(calls) - before, rows

    everything = 50 + 899
    number, rows = passes()
    assert number == everything
    assert passes() == (0, rows)
    assert passes(probes=["ridge"], seed=5)[0] == 0, "clean features are the same for every seed"
    assert passes(times=[0.02])[0] == everything
    assert passes(count=60)[0] == 60
    number, noised = passes(noise=True)
    assert number == everything
    assert passes(noise=True, seed=1)[0] == everything
    assert passes(noise=True) == (0, noised)
    assert passes(cache=False) == (everything, rows)
    file = next((tmp_path / "features").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    assert passes()[1] == rows, "a damaged file is made anew"
    with torch.no_grad():
        next(iter(pipeline.denoiser.parameters())).add_(0.1)
    assert passes()[0] == everything


def test_another_layer_costs_one_more_pass_and_noise_is_an_images_own(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path))
    made = library.build(override_recipe(tiny, ["backbone.depth=2"]))
    random_weights(made.denoiser)
    train, _ = probing.labelled_sources(made.recipe.data, None)
    few, _ = probing.labelled_sources(made.recipe.data, 20)
    calls: list[int] = []
    made.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    view = probing.model_view(made, [1], 0.5, True, 0)
    every = probing.features_of(view, train, probing.TRAIN, batch_size=500)["1"]
    some = probing.features_of(view, few, probing.TRAIN, batch_size=7)["1"]
    torch.testing.assert_close(some.features, every.features[few.indices])
    assert torch.equal(some.labels, every.labels[few.indices])
    calls.clear()
    both = probing.features_of(probing.model_view(made, [], 0.5, True, 0), few, probing.TRAIN)
    assert (list(both), calls) == (["1", "2"], [20])
    assert torch.equal(both["1"].features, some.features), "that one was kept"
    held_out = probing.features_of(view, few, probing.TEST, cache=False)["1"]
    assert not torch.allclose(held_out.features, some.features), "another split, other noise"


def test_what_is_asked_of_each_probe_arrives(pipeline: library.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    for name in ("linear_probe", "knn_probe", "ridge_probe"):

        def asked(train: Labelled, test: Labelled, classes: int, name: str = name, **options: Any) -> dict[str, float]:
            given[name] = len(train.labels), options
            return {"top1": 0.0}

        monkeypatch.setattr(probing, name, asked)
    options = {"k": 5, "epochs": 7, "optimizer": "lars", "seed": 3, "count": 30}
    library.probe(pipeline, probes=["linear", "knn", "ridge"], **options)
    assert given == {
        "linear_probe": (30, {"protocol": LinearProtocol(7, "lars", 3)}),
        "knn_probe": (30, {"k": 5}),
        "ridge_probe": (30, {"seed": 3}),
    }


def test_augmented_probes(pipeline: library.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 4)
    options: dict[str, Any] = {"count": 30, "epochs": 2, "augment": True, "times": [0.3], "noise": True}
    first = library.probe(pipeline, **options, batch_size=256)
    again = library.probe(pipeline, **options, batch_size=13, probes=["linear", "ridge"])
    assert first["rows"][0] == again["rows"][0], "whatever the batch size"
    assert first["rows"] != library.probe(pipeline, **options | {"augment": False})["rows"]
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    crops = probing.crop_and_flip(images, [1, 2, 3])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(crops[1:2], probing.crop_and_flip(images[1:2], [2]))
    assert not torch.equal(crops, probing.crop_and_flip(images, [4, 5, 6]))


# ---- The command -----------------------------------------------------------------------------------------------------

UNET_WORDS = ("backbone=unet", "backbone.channels=[8,16]", "backbone.resblocks=[1,1]", "backbone.attention=[0,1]")
NETWORKS = {
    "dit": (TINY, "1"),
    "diffussm": (("backbone=diffussm", "backbone.width=16", "backbone.depth=1", "backbone.state=4", *SHORT), "1"),
    "unet": ((*UNET_WORDS, "backbone.heads=2", "backbone.groups=4", *SHORT), "middle.1"),
    "nested": (
        (
            "data.size=16",
            *UNET_WORDS,
            "backbone.heads=2",
            "backbone.groups=4",
            "backbone.outer=[{channels: [8, 8], resblocks: [1, 1], groups: 4}]",
            "interpolant=cosine",
            "target=v",
            *SHORT,
        ),
        "inner.middle.1",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("probe")
    for name, (words, _) in NETWORKS.items():
        library.train(load_recipe("digits", [*words, "training.steps=2"]), folder / name, quiet=True)
    return {name: folder / name for name in NETWORKS}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_command(mezzotint: Any, runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    layer = NETWORKS[name][1]
    arguments = ["--layer", layer, "--t", 0.01, "--t", 0.2, "--probe", "knn,ridge", "--count", 100]
    files = ["--out", tmp_path / "a.json", "--figure", tmp_path / "a.png"]
    shown = mezzotint("probe", runs[name], *arguments, *files)
    assert shown.code == 0, shown.err
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(row["layer"], row["t"], row["probe"]) for row in result["rows"]] == [
        (layer, t, kind) for t in (0.01, 0.2) for kind in ("knn", "ridge")
    ]
    assert (result["train_images"], result["test_images"], result["classes"]) == (100, 899, 10)
    assert f"{result['rows'][0]['top1']:.1%}" in shown.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_baselines(mezzotint: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    out = ["--out", tmp_path / "a.json", "--probe", "knn", "--k", 1]
    shown = mezzotint("probe", "digits", "--features", "pixels", *out)
    assert shown.code == 0, shown.err
    row = json.loads((tmp_path / "a.json").read_text())["rows"][0]
    train, test = library.data.load("digits", "train"), library.data.load("digits", "test")
    other = KNeighborsClassifier(1, metric="cosine").fit(train.images.flatten(1).double(), train.labels)
    expected = other.score(test.images.flatten(1).double(), test.labels)
    assert (row["layer"], row["t"]) == ("pixels", None)
    assert row["top1"] == pytest.approx(expected, abs=2 / 899)
    fresh = mezzotint("probe", runs["dit"], "--random", *out)
    assert fresh.code == 0, fresh.err
    assert "digits, fresh weights, clean images; 898 images of digits-1x8x8-train-" in fresh.out
    trained = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert mezzotint("probe", runs["dit"], *out).code == 0
    assert trained != json.loads((tmp_path / "a.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layer", "7"], "the network has no layer '7'; it has 1 to 1"),
        (["--t", "1.5"], "t = 1.5 is outside of [0, 1]"),
        (["--probe", "knn", "--k", "899"], "k = 899 neighbours cannot be had of 898 training images"),
        (["--probe", "lineer"], "probe 'lineer' is unknown; closest: linear"),
        (["--optimizer", "adam"], "optimizer 'adam' is unknown"),
        (["--count", "1000"], "has 898 images, fewer than the 1000 asked for"),
        (["data.labels=false"], "has no labels, which classifiers are fitted to; set data.labels=true"),
        (["backbone.width=8"], "would change the trained model"),
        (["--features", "pixels", "--t", "0.1"], "the features pixels have no layers, times or noise to choose"),
        (["--features", "pixels", "--random"], "--random and --features are baselines of their own"),
        (["--features", "pixls"], "feature network 'pixls' is unknown; closest: pixels"),
        (["--features", "classifier"], "the classifier was fitted on the held-out images"),
        (["data=folder:FOLDER"], "has no test split, only train; set data.test_fraction"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(
    mezzotint: Any,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / "train" / name / "0.png")
    result = mezzotint("probe", runs["dit"], *[word.replace("FOLDER", "photos") for word in arguments])
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert not (runs["dit"] / "probe.json").exists()


def test_features_that_are_not_finite(pipeline: library.Pipeline) -> None:
    with torch.no_grad():
        next(iter(pipeline.denoiser.parameters())).fill_(float("nan"))
    with pytest.raises(MezzotintError, match=r"features of layer 1 at t = 0.01 are NaN or infinite"):
        library.probe(pipeline, probes=["ridge"], count=10)
