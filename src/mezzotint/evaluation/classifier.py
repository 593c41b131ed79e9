"""Independent classifiers for small images: is a sample the class that was asked for?"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

from mezzotint.data.loader import BatchOrder
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.sources import (
    DatasetSource,
    ImageSource,
    image_source,
    of_first,
    to_channels,
)
from mezzotint.files import cache_folder, keep, parse_json, read_tensors, tensors_digest
from mezzotint.pipeline import load_tensors, save_weights
from mezzotint.randomness import generator_for
from mezzotint.recipe import DataSettings

logger = logging.getLogger("mezzotint")


#: raise whenever a change to the network or its training changes what it computes: it is part of the cache's key
VERSION = 2
#: images that it is fitted on, and its accuracy measured on, at most
MAX_EXAMPLES = 10_000
#: sides in pixels above which images are shrunk first
MAX_SIDE = 32


class ConvNet(nn.Module):
    """Four 3 × 3 convolutions, global average pooling and a linear layer; 96 features. For images of few pixels."""

    width = 24

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        """stride: of the first layer, 2 for images of 16 pixels or more along a side."""
        super().__init__()
        self.shape, w = (channels, num_classes, stride), self.width
        self.body = nn.Sequential(
            *_layer(channels, w, stride), *_layer(w, 2 * w, 2), *_layer(2 * w, 2 * w), *_layer(2 * w, 4 * w, 2)
        )
        self.head = nn.Linear(4 * w, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) to features (B, 96) and logits (B, num_classes)."""
        x = images.float() / 127.5 - 1
        if max(x.shape[2:]) > MAX_SIDE:
            scale = MAX_SIDE / max(x.shape[2:])
            size = [max(1, round(side * scale)) for side in x.shape[2:]]
            x = interpolate(x, size, mode="bilinear", antialias=True)
        features = self.body(x).mean((2, 3))
        return features, self.head(features)


def _layer(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(frozen=True, eq=False)
class ClassifierNetwork:
    """A `ConvNet` fitted on real images that the generative model never saw: a judge of classes, and a feature network.

    Images are uint8 (N, C, H, W), labels int64 (N,). Its errors bound what agreement can say, so report `tested`, too.
    """

    net: ConvNet
    class_names: tuple[str, ...] = ()
    tested: float | None = None
    """Its accuracy on images that fitting did not touch: those of the other split."""
    fitted_on: str = ""
    """The identity of the images that it was fitted on."""
    seed: int = 0
    """Of its initial weights, and of the order of the images."""

    @property
    def name(self) -> str:
        """What tells it apart: the images it was fitted on, seed, accuracy, and a digest of its weights."""
        right = "" if self.tested is None else f", {self.tested:.1%} right"
        return f"classifier ({self.fitted_on}, seed {self.seed}{right}, {tensors_digest(self.net.state_dict())})"

    @classmethod
    def fit(
        cls, images: Tensor, labels: Tensor, class_names: tuple[str, ...], *, seed: int = 0, seen: int = 36_000
    ) -> ClassifierNetwork:
        """Fits on `images`: each 8 times, or more often, until `seen` have gone by. Raises with fewer than 2 classes.

        On one thread of the CPU, so that the same images and seed give the same bits on a machine, whatever is set.
        899 digits take 10 s of a 2.5 GHz core, 10,000 images of Fashion-MNIST 40 s.
        """
        if len(labels.unique()) < 2:
            raise MezzotintError("a classifier needs examples of at least 2 classes; the labels given hold fewer")
        batch_size, rate, threads = 64, 0.01, torch.get_num_threads()
        steps = max(1, max(8 * len(images), seen) // batch_size)
        order = BatchOrder(len(images), batch_size, seed)
        generator = generator_for(seed)
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(seed)
                net = ConvNet(images.shape[1], len(class_names), 2 if min(images.shape[2:]) >= 16 else 1).train()
                # Chosen once, on digits and Fashion-MNIST, like width and strides: a dozen variants by cost and by
                # accuracy on the training images. Those are thousands, so that looking at them flatters little.
                optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
                for step in range(steps):
                    rows = order.indices(step)
                    _, logits = net(_shifted(images[rows], generator))
                    loss = cross_entropy(logits, labels[rows], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        finally:
            torch.set_num_threads(threads)
        return cls(net.eval().requires_grad_(False), class_names, seed=seed)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features (N, 96) and logits (N, classes), float32, on the device of the network, which images must be on."""
        features, logits = self.net(images)
        return {"features": features, "logits": logits}

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Predicted classes int64 (N,), on the CPU."""
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise MezzotintError(
                f"images must be uint8 (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}"
            )
        images, device = to_channels(images, self.net.shape[0]), self.net.head.weight.device
        return torch.cat([self.net(rows.to(device))[1].argmax(1).cpu() for rows in images.split(500)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images whose predicted class is their label, in [0, 1]; for generated ones, that was asked for."""
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise MezzotintError(
                f"labels must be {len(images)} integers, one an image, got {labels.dtype} of {tuple(labels.shape)}"
            )
        return (self.predict(images) == labels.cpu()).double().mean().item()

    agreement = accuracy

    def save(self, path: Path) -> None:
        """Write weights and everything else as safetensors."""
        values = {key: getattr(self, key) for key in ("class_names", "tested", "fitted_on", "seed")}
        save_weights(self.net, path, {"classifier": json.dumps(values), "shape": json.dumps(self.net.shape)})

    @classmethod
    def load(cls, path: Path) -> ClassifierNetwork:
        """What `save` wrote. Raises `MezzotintError` where it is damaged or something else."""
        tensors, metadata = read_tensors(path)
        try:
            values, shape = parse_json(metadata["classifier"]), parse_json(metadata["shape"])
            with torch.random.fork_rng(devices=[]):
                net = ConvNet(*shape)
            known = cls(net, **values | {"class_names": tuple(values["class_names"])})
        except (KeyError, TypeError, ValueError):
            raise MezzotintError(f"{path} is not a classifier of this library; remove it") from None
        load_tensors(net, tensors, str(path))
        net.eval().requires_grad_(False)
        return known


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to a pixel either way, its border repeated: a moved digit is the same digit."""
    height, width = images.shape[2:]
    top, left = torch.randint(3, (2,), generator=generator).tolist()
    return pad(images.float(), (1, 1, 1, 1), mode="replicate")[:, :, top : top + height, left : left + width]


def trained_classifier(
    spec: DataSettings | str, *, seed: int = 0, cache: bool = True, fit_on: str = "test", **options: Any
) -> ClassifierNetwork:
    """The classifier of a labelled data set: fitted on its held-out images, tested on its training images.

    Up to 10,000 of either. fit_on="train" is the other way round, for what may see training images alone. spec and
    options are those of `image_source` for a data set. It is fitted once and kept under `cache_folder`, by the identity
    of both sets of images, the seed and `VERSION`; of several processes the first one does so. Raises `MezzotintError`
    where the data have no labels or no held-out images.
    """
    splits = (fit_on, "test" if fit_on == "train" else "train")
    fitted, other = (image_source(spec, split=split, **options) for split in splits)
    if not fitted.class_names:
        raise MezzotintError(
            f"the data set {fitted.identity} has no labels, which a classifier needs; choose other features, such as "
            "pixels"
        )
    key = hashlib.sha256(json.dumps([fitted.identity, other.identity, seed, VERSION, MAX_EXAMPLES]).encode())
    file = cache_folder() / "classifiers" / f"{fitted.identity}-seed-{seed}-{key.hexdigest()[:8]}.safetensors"

    def make() -> ClassifierNetwork:
        if cache and os.path.isfile(file):  # a folder that is not ours to look into has none
            try:
                return ClassifierNetwork.load(file)
            except MezzotintError:
                logger.warning("the cached classifier %s is damaged; fitting it anew", file)
        images, labels = _some(fitted)
        network = ClassifierNetwork.fit(images, labels, fitted.class_names, seed=seed)
        network = replace(network, fitted_on=fitted.identity, tested=network.accuracy(*_some(other)))
        if cache:
            keep(file, network.save)
        return network

    return of_first(make)


def _some(source: ImageSource) -> tuple[Tensor, Tensor]:
    """Up to MAX_EXAMPLES images and labels of a data set."""
    assert isinstance(source, DatasetSource)
    total = len(source.dataset)
    some = DatasetSource(source.dataset, min(total, MAX_EXAMPLES), workers=source.workers)
    images, labels = zip(*some.batches(500), strict=True)
    return torch.cat(images), torch.cat(labels)
