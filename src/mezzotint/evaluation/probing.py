"""Judging representations: probes of a model's features, over its layers and the times that it is told.

>>> result = probe(pipeline, layers=[6, 12], times=[0.01, 0.1], probes=["linear", "knn"])

    $MEZZOTINT_CACHE/features/IDENTITY-KEY.safetensors      features and labels of the images IDENTITY, one layer, one
                                                            time; KEY: 16 digits over all that they are a function of
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.data.loader import BatchOrder, dataset_batches
from mezzotint.data.transforms import to_float, to_uint8
from mezzotint.errors import MezzotintError, closest, expect
from mezzotint.evaluation.augmentation import crop_and_flip
from mezzotint.evaluation.features import FeatureNetwork
from mezzotint.evaluation.mae import MAE
from mezzotint.evaluation.probe import (
    Labelled,
    LinearProbe,
    LinearProtocol,
    accuracy,
    check_neighbours,
    knn_probe,
    linear_probe,
    ridge_probe,
)
from mezzotint.evaluation.sources import DatasetSource, image_source
from mezzotint.evaluation.sweep import figure_class
from mezzotint.features import check_time, chosen_layers, layers_of, pooled_features
from mezzotint.files import atomic_path, cache_folder, keep, read_tensors, save_tensors
from mezzotint.pipeline import A_PIPELINE, Pipeline
from mezzotint.progress import track
from mezzotint.randomness import mix
from mezzotint.recipe import DataSettings
from mezzotint.samplers import example_generators, randn

#: raise whenever the features change for the same settings
VERSION = 1
PROBES = ("linear", "knn", "ridge")
TIMES = (0.01,)
"""Told to the network where nothing else is asked for: step 10 of 1,000, l-DAE's."""
#: what random numbers are for
TRAIN, TEST, AUGMENTED = 0, 1, 2


@dataclass(frozen=True)
class View:
    """One way to look at images: the features of several layers at one time, or of a feature network."""

    t: float | None
    layers: tuple[str, ...]
    compute: Callable[[Tensor, Sequence[str], Sequence[torch.Generator]], Mapping[str, Tensor]]
    """Images uint8 (B, C, H, W), names of layers, a generator for each image → features (B, D) by layer."""
    key: list[Any] | None
    """What the features are a function of besides image and layer; None: they are not kept."""


def probe(
    model: Pipeline | FeatureNetwork | MAE,
    data: DataSettings | None = None,
    *,
    layers: str | int | Sequence[str | int] = (),
    times: float | Sequence[float] = (),
    noise: bool = False,
    probes: str | Sequence[str] = ("linear",),
    count: int | None = None,
    k: int = 20,
    epochs: int = 90,
    optimizer: str = "sgd",
    augment: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    cache: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Train `probes` (linear, knn, ridge) on features of a labelled data set's training images, score its test images.

    model: a pipeline, of whose network `layers` are looked at (numbers or names, see `layers_of`; none: all), told each
    of `times` in [0, 1] (none: 0.01) and no class or caption; a feature network, which has neither; or a masked
    autoencoder, which has layers. The network sees clean images, or with `noise` x_t of that time, the noise of an
    image being always the same. data: None for what the pipeline was trained on. count: a subset of the training
    images, always the same. k: neighbours of a k-NN probe; epochs, optimizer: see `LinearProtocol`. augment: train
    linear probes on random crops and flips, drawn anew in each epoch, each of which then takes a forward pass over the
    training images.

    Features, but for augmented ones, are kept under `cache_folder` by what they are a function of. Returns {"model",
    "data", …, "rows": [{"layer", "t", "probe", "top1", "top5"?, "ridge"?}, …]}, accuracies in [0, 1], top5 with more
    than ten classes. Raises `MezzotintError`, before any image is looked at, for an unknown layer or probe, a time
    outside of [0, 1], data without labels or held-out images, or a k above the number of training images.
    """
    expect(model, Pipeline | FeatureNetwork | MAE, f"{A_PIPELINE}, a feature network or a masked autoencoder")
    probes = [probes] if isinstance(probes, str) else probes
    times = [times] if isinstance(times, float | int) else times
    if unknown := [name for name in probes if name not in PROBES]:
        raise MezzotintError(f"probe {unknown[0]!r} is unknown; {closest(unknown[0], PROBES)}")
    if not probes:
        raise MezzotintError(f"no probe is named; expected some of {', '.join(PROBES)}")
    protocol = LinearProtocol(epochs, optimizer, seed)
    if isinstance(model, Pipeline):
        views = [model_view(model, layers, t, noise, seed) for t in dict.fromkeys(map(float, times or TIMES))]
        data, device, name = data or model.recipe.data, model.device, model.recipe.name
    else:
        if isinstance(model, MAE):
            if times or noise:
                raise MezzotintError("a masked autoencoder knows no times or noise; leave them out")
            views = [_mae_view(model, layers)]
        else:
            if layers or times or noise:
                raise MezzotintError(
                    f"the features {model.name} have no layers, times or noise to choose; leave them out"
                )
            views = [_network_view(model)]
        device, name = model.device, model.name
    if data is None:
        raise MezzotintError("a feature network is probed on a data set; name it")
    train, test = labelled_sources(data, count)
    if "knn" in probes:
        check_neighbours(k, len(train.indices))
    classes = len(train.class_names)
    fitted: dict[str, Callable[[Labelled, Labelled, int], dict[str, float]]] = {
        "linear": partial(linear_probe, protocol=protocol),
        "knn": partial(knn_probe, k=k),
        "ridge": partial(ridge_probe, seed=seed),
    }
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "cache": cache, "progress": progress}
    rows: list[dict[str, Any]] = []
    for view in views:
        looked = features_of(view, test, TEST, **shared)
        augmented = (
            _augmented_probes(view, train, protocol, device, batch_size) if augment and "linear" in probes else {}
        )
        learned = {} if augmented and set(probes) == {"linear"} else features_of(view, train, TRAIN, **shared)
        for layer in view.layers:
            held_out = looked.pop(layer).to(device)
            known = learned.pop(layer).to(device) if learned else None
            for kind in dict.fromkeys(probes):
                if kind == "linear" and augmented:
                    scores = accuracy(augmented[layer], held_out, classes)
                else:
                    assert known is not None
                    scores = fitted[kind](known, held_out, classes)
                rows.append({"layer": layer, "t": view.t, "probe": kind, **scores})
    return {
        "model": name,
        "data": train.identity,
        "test_data": test.identity,
        "train_images": len(train.indices),
        "test_images": len(test.indices),
        "classes": classes,
        "input": "noised" if noise else "clean",
        "augmented": augment,
        "epochs": epochs,
        "optimizer": optimizer,
        "k": k,
        "seed": seed,
        "rows": rows,
    }


def labelled_sources(settings: DataSettings, count: int | None) -> tuple[DatasetSource, DatasetSource]:
    """Training images, all or `count` of them, and test images.

    Raises `MezzotintError` for data without labels or without held-out images.
    """
    train, test = (
        image_source(settings, split=split, count=number) for split, number in (("train", count), ("test", None))
    )
    assert isinstance(train, DatasetSource)
    assert isinstance(test, DatasetSource)
    if not train.class_names:
        raise MezzotintError(
            f"the data set {train.dataset.identity} has no labels, which classifiers are fitted to; set "
            "data.labels=true, or name a labelled one by data=…"
        )
    if train.dataset.identity == test.dataset.identity:
        raise MezzotintError(
            f"the data set {test.identity} holds no images out for testing; set data.test_fraction, for example to 0.1"
        )
    return train, test


# ---- Features --------------------------------------------------------------------------------------------------------


def model_view(
    pipeline: Pipeline, layers: str | int | Sequence[str | int], t: float, noise: bool = False, seed: int = 0
) -> View:
    """A pipeline's layers, told t. Raises `MezzotintError` for an unknown layer or a time outside of [0, 1]."""
    check_time(t)
    denoiser, space = pipeline.denoiser, pipeline.representation
    null = pipeline.no_caption if denoiser.text else None

    def compute(images: Tensor, names: Sequence[str], generators: Sequence[torch.Generator]) -> Mapping[str, Tensor]:
        x = space.encode(to_float(images.to(pipeline.device)))
        eps = randn(x.shape, generators, device=x.device) if noise else None
        return pooled_features(denoiser, x, t, names, eps=eps, null=null)

    words = {"interpolant", "time_input", "representation", "backbone", "condition"}
    key = [
        pipeline.digests,
        pipeline.recipe.model_dump(mode="json", include=words),
        t,
        seed if noise else None,
    ]
    return View(t, tuple(layers_of(denoiser, layers)), compute, key)


def _network_view(network: FeatureNetwork) -> View:
    label = network.name.split(" ")[0]

    def compute(images: Tensor, names: Sequence[str], generators: Sequence[torch.Generator]) -> Mapping[str, Tensor]:
        return {label: network(images)["features"]}

    return View(None, (label,), compute, [network.name] if network.cacheable else None)


def _mae_view(network: MAE, layers: str | int | Sequence[str | int]) -> View:
    def compute(images: Tensor, names: Sequence[str], generators: Sequence[torch.Generator]) -> Mapping[str, Tensor]:
        return network.features(images, names)

    return View(None, tuple(chosen_layers(network.layers, layers)), compute, [network.name])


def features_of(
    view: View,
    source: DatasetSource,
    split: int,
    *,
    seed: int = 0,
    batch_size: int = 256,
    cache: bool = True,
    progress: bool = False,
) -> dict[str, Labelled]:
    """The features of all images of `source`, float32 on the CPU, by layer: those kept, and the others in one pass.

    Raises `MezzotintError` for images without a label, and for features that are not finite.
    """
    files: dict[str, Path] = {}
    if cache and view.key is not None and source.cacheable:
        for layer in view.layers:
            key = hashlib.sha256(json.dumps([VERSION, view.key, layer]).encode()).hexdigest()[:16]
            files[layer] = cache_folder() / "features" / f"{source.identity}-{key}.safetensors"
    known = {layer: kept for layer, file in files.items() if (kept := _read(file)) is not None}
    missing = [layer for layer in view.layers if layer not in known]
    if missing:
        parts: dict[str, list[Tensor]] = {layer: [] for layer in missing}
        labels: list[Tensor] = []
        steps = range(-(-len(source.indices) // batch_size))
        batches = zip(source.indices.split(batch_size), source.batches(batch_size), strict=True)
        for indices, (images, some) in track(batches, "features", total=len(steps), enabled=progress):
            assert some is not None
            labels.append(some)
            generators = example_generators(mix(seed, split), indices.tolist())
            for layer, features in view.compute(images, missing, generators).items():
                parts[layer].append(_checked(features, layer, view).cpu())
        every = torch.cat(labels)
        if (unlabelled := int((every < 0).sum())) > 0:
            raise MezzotintError(
                f"{unlabelled} of {len(every)} images of {source.identity} have no label; choose data that have"
            )
        for layer in missing:
            known[layer] = Labelled(torch.cat(parts.pop(layer)), every)
            if layer in files:
                keep(files[layer], partial(_write, known[layer]))
    return known


def _write(features: Labelled, file: Path) -> None:
    with atomic_path(file) as temporary:
        save_tensors(features._asdict(), temporary, {"format": "mezzotint"})


def _read(file: Path) -> Labelled | None:
    """What was kept; None where nothing was, or the file was damaged."""
    try:
        tensors, _ = read_tensors(file)
        return Labelled(tensors["features"], tensors["labels"])
    except (MezzotintError, KeyError):
        return None


def _checked(features: Tensor, layer: str, view: View) -> Tensor:
    if not features.isfinite().all():
        at = "" if view.t is None else f" at t = {view.t:g}"
        raise MezzotintError(f"the features of layer {layer}{at} are NaN or infinite; look at the network's weights")
    return features.float()


# ---- Augmentation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The batches of a probe of the images `chosen`, each in parts of `size` images for the network."""

    order: BatchOrder
    chosen: Tensor
    size: int

    @property
    def each(self) -> int:
        return -(-self.order.batch_size // self.size)

    def indices(self, step: int) -> Tensor:
        batch, part = divmod(step, self.each)
        return self.chosen[self.order.indices(batch).split(self.size)[part]]


def _augmented_probes(
    view: View, train: DatasetSource, protocol: LinearProtocol, device: torch.device, batch_size: int
) -> dict[str, LinearProbe]:
    """A linear probe of each layer, trained on images that are cropped and flipped anew each time they are met."""
    count, classes = len(train.indices), len(train.class_names)
    parts = _Parts(protocol.order(count), train.indices, batch_size)
    steps = protocol.steps(count)
    probes: dict[str, LinearProbe] = {}
    batches = dataset_batches(train.dataset, parts, range(steps * parts.each), slice(None), train.workers)
    for step in range(steps):
        features: dict[str, list[Tensor]] = {layer: [] for layer in view.layers}
        labels = []
        for _ in range(parts.each):
            batch = next(batches)
            assert batch.labels is not None
            seeds = [mix(protocol.seed, AUGMENTED, step, index) for index in batch.indices.tolist()]
            images = crop_and_flip(to_uint8(batch.images), seeds)
            generators = example_generators(mix(protocol.seed, AUGMENTED, step), batch.indices.tolist())
            for layer, found in view.compute(images, view.layers, generators).items():
                features[layer].append(_checked(found, layer, view))
            labels.append(batch.labels)
        for layer, found_parts in features.items():
            rows = torch.cat(found_parts).to(device)
            if layer not in probes:
                probes[layer] = LinearProbe(rows.shape[1], classes, count, protocol, device)
            probes[layer].step(rows, torch.cat(labels).to(device))
    return probes


# ---- What comes out --------------------------------------------------------------------------------------------------


def grids(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[float | None], dict[Any, dict[str, Any]]]]:
    """Of each probe: its name, the layers, the times, and the rows by (layer, t)."""
    rows = result["rows"]
    for kind in dict.fromkeys(row["probe"] for row in rows):
        own = {(row["layer"], row["t"]): row for row in rows if row["probe"] == kind}
        yield kind, list(dict.fromkeys(layer for layer, _ in own)), list(dict.fromkeys(t for _, t in own)), own


def plot_probe(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG of what `probe` returned: for each probe the top-1 accuracy over (layer, t).

    Raises `MezzotintError` without matplotlib.
    """
    found = list(grids(result))
    _, layers, times, _ = found[0]
    size = (max(3.2, 1.4 + 0.75 * len(times)) * len(found), max(2.6, 1.6 + 0.32 * len(layers)))
    picture = figure_class("the heat-map of a probe")(figsize=size, layout="constrained", dpi=120)
    for axes, (kind, _, _, rows) in zip(picture.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        values = [[100 * rows[layer, t]["top1"] for t in times] for layer in layers]
        shown = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis")
        low, high = shown.get_clim()
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "black" if value > (low + high) / 2 else "white"
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize="x-small", color=colour)
        axes.set_xticks(range(len(times)), ["" if t is None else f"{t:g}" for t in times])
        axes.set_yticks(range(len(layers)), layers)
        axes.set(xlabel="t", ylabel="layer")
        axes.set_title(f"{kind}, top-1 (%)", fontsize="medium")
        picture.colorbar(shown, ax=axes)
    title = f"{result['model']}: {result['input']} images of {result['test_data']}"
    picture.suptitle(title, fontsize="small", parse_math=False)
    with atomic_path(path) as temporary:
        picture.savefig(temporary, format="png")
