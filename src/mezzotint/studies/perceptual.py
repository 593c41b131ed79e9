"""Perceptual networks for images too small for VGG16: the layers of a classifier of the data set itself.

>>> load_recipe("ldae-00-dit", ["representation.fit.perceptual_network=mezzotint.studies.perceptual:digits", ...])

Like VGG16 it is trained with labels, those of up to 10,000 training images; held-out images are never looked at but to
measure its accuracy. It is fitted when first used, and kept (`trained_classifier`).
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn

from mezzotint.evaluation.classifier import ClassifierNetwork, trained_classifier
from mezzotint.recipe import DataSettings


def digits(images: Tensor) -> list[Tensor]:
    """The four layers' maps of images (B, 1, 8, 8) in [-1, 1]."""
    return _maps(_classifier(DataSettings(name="digits", size=8)), images)


def fashion_mnist(images: Tensor) -> list[Tensor]:
    """The four layers' maps of images (B, 1, 32, 32) in [-1, 1]."""
    return _maps(_classifier(DataSettings(name="idx", size=32)), images)


@lru_cache
def _classifier(data: DataSettings) -> ClassifierNetwork:
    return trained_classifier(data, fit_on="train")


def _maps(classifier: ClassifierNetwork, images: Tensor) -> list[Tensor]:
    maps = []
    for layer in classifier.net.to(images.device).body:
        images = layer(images)
        if isinstance(layer, nn.ReLU):
            maps.append(images)
    return maps
