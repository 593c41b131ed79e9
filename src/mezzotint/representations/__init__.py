"""Representations: which space x lives in. Each encodes images to x and decodes x to images."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.representations.kl import KLAutoencoder, scaled_latents
from mezzotint.representations.pixels import Pixels
from mezzotint.representations.pyramid import Encoder, Pyramid, PyramidEncoder

__all__ = [
    "Encoder",
    "KLAutoencoder",
    "Pixels",
    "Pyramid",
    "PyramidEncoder",
    "Representation",
    "representation",
    "scaled_latents",
]


class Representation(Protocol):
    """Images float32 (B, C, H, W) in [-1, 1] to x and back."""

    #: whether `encode` draws from a posterior, with eps ~ N(0, 1) of x's shape
    stochastic: bool

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...


def representation(
    name: str, *, path: str | None = None, device: torch.device | str = "cpu", **settings: Any
) -> Representation:
    """The representation `name`, pixels or kl, on `device`; `settings` are those of `KLAutoencoder`.

    Raises `MezzotintError` for a kl without a path, and as `KLAutoencoder` does.
    """
    if name == "pixels":
        return Pixels()
    if path is None:
        raise MezzotintError("representation.path must name the autoencoder's folder or hub model")
    return KLAutoencoder(path, device=device, **settings)
