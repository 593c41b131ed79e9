"""Pixels: x is the image itself."""

from __future__ import annotations

from torch import Tensor


class Pixels:
    """The identity: images in [-1, 1] are the data."""

    stochastic = False

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """The images themselves."""
        return images

    def decode(self, x: Tensor) -> Tensor:
        """x as images, clamped to [-1, 1]."""
        return x.clamp(-1, 1)
