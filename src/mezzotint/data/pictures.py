"""Picture files: the one door that every loader reads them by, so that all agree on what a file says of its pixels."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps

from mezzotint.errors import MezzotintError

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "DDS": (".dds",),
    "ICO": (".ico",),
}
"""Pillow's names of the formats that are read, and their endings. Not documents (PDF), nor what other programs
draw for Pillow (PostScript), working files (PSD), measurements (FITS, HDF5) or videos."""

ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)

MAX_PIXELS = 178_956_970
"""A picture of more is not read; Pillow itself refuses as many."""

WHITE = (255, 255, 255)

TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
"""Tags: bits per level, and whether 0 is white."""

_LEVEL_OF_KEY = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
"""By PNG's raw mode: from the level that the file names transparent to Pillow's, which leaves that one as it is."""


def background_rgb(background: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a colour such as white, #808080 or rgb(0, 0, 0).

    Raises `MezzotintError` for what is no colour, or not an opaque one.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(background)
    except ValueError:
        alpha = [0]
    if alpha:
        raise MezzotintError(
            f"data.background is {background!r}, which is no opaque colour; expected a name such as white, or #rrggbb"
        )
    return red, green, blue


def check_pixels(width: int, height: int) -> None:
    """Raises `ValueError` for more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} × {height} pixels, more than {MAX_PIXELS:,}; make it smaller")


def open_picture(source: str | Path | BinaryIO) -> ImageFile.ImageFile:
    """The picture in a file, not decoded yet and perhaps of several frames; the caller closes it.

    Raises what Pillow does for a file that is none of `FORMATS`, and `ValueError` for more than `MAX_PIXELS`.
    """
    picture = Image.open(source, formats=_formats())
    if picture.format == "TIFF":
        picture.filename = ""  # one with a name may be mapped into memory, by the sides that it has once it is turned
    try:
        check_pixels(*picture.size)
    except ValueError:
        picture.close()
        raise
    return picture


def read_picture(source: str | Path | BinaryIO) -> Image.Image:
    """The picture in a file, upright: turned as its EXIF tag says. Of an animation the first frame.

    Grey of 9 to 16 bits is scaled to the 8 bits of L, floats from [0, 1]. Any other mode is as Pillow reads it, which
    takes the higher 8 of 16 bits of colours; `flatten` makes it grey or RGB. Raises as `open_picture`, what Pillow does
    for a damaged file, and `ValueError` where a file does not say which level is white.
    """
    with open_picture(source) as picture:
        raw_mode = picture.tile[0].args if picture.format == "PNG" and picture.tile else None
        picture.load()
        key = picture.info.get("transparency")
        if raw_mode in _LEVEL_OF_KEY and key is not None:
            scale = _LEVEL_OF_KEY[raw_mode]
            picture.info["transparency"] = (
                tuple(int(level * scale) for level in key) if isinstance(key, tuple) else int(key * scale)
            )
        with suppress(Exception):  # a damaged tag says nothing of the pixels, and fails with a dozen unrelated types
            ImageOps.exif_transpose(picture, in_place=True)
        return _deep_to_grey(picture) if picture.mode.startswith(("I", "F")) else picture


def flatten(picture: Image.Image, mode: str, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A picture of any of Pillow's modes as grey (L) or RGB, composed on `background` where it is transparent.

    CMYK is converted without a profile, as ADM does; no profile that a file carries is applied.
    """
    if picture.mode == "LAB":
        picture = ImageCms.applyTransform(picture, _lab_to_rgb()) or picture
    elif picture.mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture.convert("RGBA"))
    return picture.convert(mode)


def is_grey(picture: Image.Image) -> bool:
    """Whether a picture as `read_picture` gives it has levels of grey alone."""
    return picture.mode in ("1", "L", "LA")


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _deep_to_grey(picture: Image.Image) -> Image.Image:
    """L, or LA with a transparent level, of a picture of integers (I, I;16, ...) or floats (F)."""
    levels = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if picture.mode == "F":
        white = 1.0
        problem = "its floats are not all within 0 and 1; scale them, or save it with 8 or 16 bits"
    else:
        bits = tags.get(TIFF_BITS, (16,))[0]
        white = 2.0 ** min(bits, 16) - 1
        problem = f"its levels are not all within 0 and {white:.0f}, the white of {min(bits, 16)} bits; scale them"
    if not ((levels >= 0) & (levels <= white)).all():
        raise ValueError(f"which level is white is not known, as {problem}")
    shares = levels / white
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for up to 8 bits alone
        shares = 1 - shares
    grey = Image.fromarray(np.round(255 * shares).astype(np.uint8))
    key = picture.info.get("transparency")
    if key is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))
