"""Representations: which space x lives in. Each encodes images to x and decodes x to images."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mezzotint.representations.kl import KLAutoencoder
from mezzotint.representations.pixels import Pixels

__all__ = ["KLAutoencoder", "Pixels", "Representation"]


class Representation(Protocol):
    """Images float32 (B, C, H, W) in [-1, 1] to x and back."""

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...
