"""Representations: which space x lives in. Each encodes images to x and decodes x to images."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.representations.kl import KLAutoencoder, scaled_latents
from mezzotint.representations.pixels import Pixels
from mezzotint.representations.pyramid import Encoder, Pyramid, PyramidEncoder
from mezzotint.representations.tokenizer import TOKENIZERS, FitSettings, PatchPCA, Tokenizer, open_tokenizer

__all__ = [
    "TOKENIZERS",
    "Encoder",
    "FitSettings",
    "KLAutoencoder",
    "PatchPCA",
    "Pixels",
    "Pyramid",
    "PyramidEncoder",
    "Representation",
    "Tokenizer",
    "open_tokenizer",
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
    """The representation `name`, pixels, kl or one of `TOKENIZERS`, on `device`; `settings` are `KLAutoencoder`'s.

    Raises `MezzotintError` for a kl or a tokenizer without a path, and as `KLAutoencoder` and `open_tokenizer` do.
    """
    if name == "pixels":
        return Pixels()
    if name in TOKENIZERS:
        if path is None:
            raise MezzotintError(
                f"the representation {name} is not fitted yet; run 'mezzotint fit-tokenizer' and set "
                "representation.path to the folder that it writes"
            )
        wanted = {key: settings.get(key) for key in ("stride", "channels")}
        return open_tokenizer(path, name=name, device=device, **wanted)
    if path is None:
        raise MezzotintError("representation.path must name the autoencoder's folder or hub model")
    return KLAutoencoder(path, device=device, **settings)
