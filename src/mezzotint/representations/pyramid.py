"""Pyramids: one image at several resolutions, packed into one state (MDM, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from mezzotint.backbones.nested import pack, unpack

if TYPE_CHECKING:
    from mezzotint.representations import Representation


class Encoder(Protocol):
    """Images to x."""

    stochastic: bool

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor: ...


class PyramidEncoder:
    """Images, or clips, to x (B, N): each level is the next larger one averaged, the largest what `base` makes.

    A level of fewer frames has every k-th of them.
    """

    def __init__(self, base: Encoder, shapes: Sequence[Sequence[int]]) -> None:
        """shapes: of the levels, (C, h, w) or (F, C, h, w), smallest first."""
        self.base, self.shapes = base, shapes
        self.stochastic = base.stochastic

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """eps, where `stochastic`, has the largest level's shape."""
        levels = [self.base.encode(images, eps)]
        for larger, shape in pairwise(reversed(self.shapes)):
            x = levels[-1]
            if len(shape) == 4:
                x = x[:, :: larger[0] // shape[0]]
            smaller = F.avg_pool2d(x.flatten(0, -4), larger[-1] // shape[-1])
            levels.append(smaller.unflatten(0, x.shape[:-3]))
        return pack(reversed(levels))


class Pyramid(PyramidEncoder):
    """`PyramidEncoder` and back: the largest level is the image."""

    base: Representation

    def decode(self, x: Tensor) -> Tensor:
        """The images of the largest level that x has."""
        return self.decode_levels(x)[-1]

    def decode_levels(self, x: Tensor) -> list[Tensor]:
        """The images of all levels, smallest first."""
        return [self.base.decode(level) for level in unpack(x, self.shapes)]
