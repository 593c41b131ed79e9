"""Pictures to tensors, and what training does to them on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.pictures import WHITE, flatten
from mezzotint.errors import MezzotintError
from mezzotint.finite import nonfinite

PIL_MODES = {1: "L", 3: "RGB"}
"""PIL's name for an image of so many channels."""

LONG = 16
"""A picture whose longer side is more than so many times its shorter one is cropped before it is resized."""


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
    """The inverse of `to_float`, any shape: rounds to the nearest level and clamps what lies outside [−1, 1].

    Raises `MezzotintError` for NaN and infinities, which would be black, white or anything.
    """
    if nonfinite({"images": images}) is not None:
        raise MezzotintError("the images hold NaN or infinite numbers; look at the model or the data that gave them")
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
    width, height = round(picture.width * scale), round(picture.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) > LONG * size:  # 400,000 × 1 pixels would become billions
        return _resized_middle(picture, size, width, height)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def _resized_middle(picture: Image.Image, size: int, width: int, height: int) -> Image.Image:
    """To rounding, the square of `size` in the middle of the picture resized to `width` × `height`; no more is made."""
    places, window = [], []
    for side, resized in zip(picture.size, (width, height), strict=True):
        first = (resized - size) // 2
        start, end = first * side / resized, (first + size) * side / resized
        reach = math.ceil(2 * max(1, side / resized)) + 1  # of the kernel, and one for rounding
        window.append((max(0, math.floor(start) - reach), min(side, math.ceil(end) + reach)))
        places.append((start - window[-1][0], end - window[-1][0]))
    (left, right), (top, bottom) = places
    picture = picture.crop((window[0][0], window[1][0], window[0][1], window[1][1]))
    # Rows first, as Pillow does when both are enlarged: it rounds, and clips, between the two.
    picture = picture.resize((size, picture.height), Image.Resampling.BICUBIC, box=(left, 0, right, picture.height))
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))


def picture_to_tensor(
    picture: Image.Image | Sequence[Image.Image],
    image_shape: tuple[int, ...],
    background: tuple[int, int, int] = WHITE,
) -> Tensor:
    """`adm_center_crop` of a picture of any mode and size, as uint8 of `image_shape` (C, S, S).

    Of the F pictures of a clip, uint8 (F, C, S, S). `background`: red, green and blue behind what is transparent.
    """
    channels, size, _ = image_shape[-3:]
    if not isinstance(picture, Image.Image):
        return torch.stack([picture_to_tensor(frame, image_shape[1:], background) for frame in picture])
    pixels = np.array(adm_center_crop(flatten(picture, PIL_MODES[channels], background), size))
    return torch.from_numpy(pixels).view(size, size, channels).permute(2, 0, 1)


def grey_to_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images (N, 1, H, W) as (N, channels, H, W), sharing memory. Raises `MezzotintError` unless 1 or 3."""
    check_channels(channels)
    return images.expand(-1, channels, -1, -1)
