"""Pictures to tensors, and what training does to them on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.errors import MezzotintError

PIL_MODES = {1: "L", 3: "RGB"}
"""PIL's name for an image of so many channels."""


def check_channels(channels: int) -> None:
    """Raises `MezzotintError` unless images can have so many channels."""
    if channels not in PIL_MODES:
        raise MezzotintError(f"images have 1 (grey) or 3 (RGB) channels, not {channels}; set data.channels to 1 or 3")


def check_size(size: int) -> None:
    """Raises `MezzotintError` unless images can have sides of so many pixels."""
    if size < 1:
        raise MezzotintError(f"images have sides of at least 1 pixel, not {size}; set data.size, for example to 64")


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [−1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`, any shape: rounds to the nearest level and clamps what lies outside [−1, 1]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flip(images: Tensor, which: Tensor) -> Tensor:
    """Mirrors those of `images` (B, ..., W) left to right for which `which` (B,) is true."""
    return torch.where(which.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def adm_center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels that ADM (Dhariwal & Nichol, 2021) trains on, and DiT, SiT and DiffuSSM after it.

    Halves the picture by a box filter while its shorter side is at least twice `size`, brings that side to `size` by a
    bicubic filter, and cuts the middle out.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def picture_to_tensor(picture: Image.Image | Sequence[Image.Image], image_shape: tuple[int, ...]) -> Tensor:
    """`adm_center_crop` of a picture of any mode and size, as uint8 of `image_shape` (C, S, S).

    Of the F pictures of a clip, uint8 (F, C, S, S).
    """
    channels, size, _ = image_shape[-3:]
    if not isinstance(picture, Image.Image):
        return torch.stack([picture_to_tensor(frame, image_shape[1:]) for frame in picture])
    pixels = np.array(adm_center_crop(picture.convert(PIL_MODES[channels]), size))
    return torch.from_numpy(pixels).view(size, size, channels).permute(2, 0, 1)


def grey_to_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images (N, 1, H, W) as (N, channels, H, W), sharing memory. Raises `MezzotintError` unless 1 or 3."""
    check_channels(channels)
    return images.expand(-1, channels, -1, -1)
