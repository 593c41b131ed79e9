"""Representations: which space x lives in. Each encodes images to x and decodes x to images."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mezzotint.representations.kl import KLAutoencoder
from mezzotint.representations.pixels import Pixels

__all__ = ["KLAutoencoder", "Pixels", "Representation"]


class Representation(Protocol):
    """Images float32 (B, C, H, W) in [-1, 1] to x and back."""

    #: whether `encode` draws from a posterior, with eps ~ N(0, 1) of x's shape
    stochastic: bool

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...
