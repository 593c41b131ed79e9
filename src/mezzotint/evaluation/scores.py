"""Scores of a trained pipeline against real images that it never saw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.data import ImageDataset
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.classifier import Classifier
from mezzotint.evaluation.frechet import frechet_distance
from mezzotint.evaluation.manifold import precision_recall
from mezzotint.guidance import ConditionalModel
from mezzotint.pipeline import Pipeline, choose_labels, sample
from mezzotint.recipe import DataSettings
from mezzotint.samplers import example_generators
from mezzotint.samplers.likelihood import bits_per_dim, log_likelihood

#: real images compared with, at most: enough for pixel statistics, and quick
MAX_REAL = 10_000
#: images on either side of precision and recall, at most: their time grows with the square
MAX_MANIFOLD = 2_000


def evaluate(
    pipeline: Pipeline,
    *,
    count: int = 1000,
    guidance: float | None = None,
    likelihood: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> dict[str, Any]:
    """Score `count` class-balanced samples, and as many guided ones with a `guidance` scale, against held-out images.

    Fréchet distance (up to 10,000 images), precision and recall (up to 2,000) are taken in pixels, with the same
    figures for real training images against the held-out ones beside them (``…_real``). For labelled data, an
    independent classifier fitted on the held-out images, which the model never saw, tells the share of samples of
    the class that was asked for; its own accuracy is measured on the training images, which it never saw.
    `likelihood` adds the bits per dimension of so many held-out images. Raises `MezzotintError` where the data have
    no held-out split.
    """
    settings = pipeline.recipe.data
    train, train_labels = real_images(settings, "train")
    held_out, held_out_labels = real_images(settings, "test")
    # One feature space for every data set of this size; its name goes with the numbers.
    features = Classifier.features
    real = features(held_out)
    scores: dict[str, Any] = {
        "recipe": pipeline.recipe.name,
        "samples": count,
        "features": "pixels",
        "reference": f"{len(held_out)} held-out images of {settings.name}",
        **_distances(real, features(train), "_real"),
    }
    classifier = None
    if pipeline.denoiser.num_classes and train_labels is not None and held_out_labels is not None:
        classifier = Classifier.fit(held_out, held_out_labels)
        judged = slice(2000)  # an SVC takes milliseconds an image
        scores["classifier"] = "SVC on the pixels of the held-out images"
        scores["classifier_accuracy"] = classifier.accuracy(train[judged], train_labels[judged])
    labels = choose_labels(pipeline, None, count)
    for suffix, scale in {"": 1.0, "_guided": guidance}.items():
        if scale is None:
            continue
        images = sample(pipeline, None, count, guidance=scale, seed=seed, batch_size=batch_size, progress=progress)
        pixels = to_uint8(images)
        if suffix:
            scores["guidance"] = scale
        if classifier is not None and labels is not None:
            scores[f"class_agreement{suffix}"] = classifier.agreement(pixels, labels)
        scores |= _distances(real, features(pixels), suffix)
    if likelihood:
        some = slice(likelihood)
        some_labels = None if held_out_labels is None else held_out_labels[some]
        scores |= mean_bits_per_dim(pipeline, held_out[some], some_labels, seed=seed, batch_size=batch_size)
    return scores


def mean_bits_per_dim(
    pipeline: Pipeline, images: Tensor, labels: Tensor | None, *, seed: int = 0, batch_size: int = 256
) -> dict[str, float]:
    """Mean bits per dimension, and its standard error, of images uint8 (N, C, H, W) given their labels (N,).

    Images are uniformly dequantised and their density found through the probability-flow ODE with one Hutchinson probe
    each (`log_likelihood`). Raises `MezzotintError` for a latent model: a density of latents is not one of images.
    """
    if pipeline.recipe.representation.name != "pixels":
        raise MezzotintError("bits per dimension are those of pixels; this model's data are latents of an autoencoder")
    bits = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        generators = example_generators(seed, range(start, start + len(images[rows])))
        noise = torch.stack([torch.rand(images.shape[1:], generator=g) for g in generators]) - 0.5
        x = ((images[rows] + noise) / 127.5 - 1).to(pipeline.device)
        y = None if labels is None else labels[rows].to(pipeline.device)
        log_p = log_likelihood(ConditionalModel(pipeline.denoiser, y), x, generator=generators)
        bits.append(bits_per_dim(log_p, x[0].numel()).cpu())
    values = torch.cat(bits)
    return {"bits_per_dim": values.mean().item(), "bits_per_dim_error": (values.std() / len(values) ** 0.5).item()}


def _distances(real: np.ndarray, fake: np.ndarray, suffix: str) -> dict[str, float]:
    precision, recall = precision_recall(real[:MAX_MANIFOLD], fake[:MAX_MANIFOLD])
    return {
        f"frechet{suffix}": frechet_distance(real, fake),
        f"precision{suffix}": precision,
        f"recall{suffix}": recall,
    }


def real_images(settings: DataSettings, split: str) -> tuple[Tensor, Tensor | None]:
    """Up to 10,000 images uint8 (N, C, H, W) of a split, in a fixed random order, and their labels where it has any."""
    dataset = settings.load(split)
    if not isinstance(dataset, ImageDataset):
        raise MezzotintError("a streamed data set cannot be evaluated against; set data.streaming=false")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:MAX_REAL]
    images, labels = zip(*(dataset[i] for i in chosen.tolist()), strict=True)
    return torch.stack(images), torch.tensor(labels) if dataset.class_names else None
