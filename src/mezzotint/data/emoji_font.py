"""Emoji as captioned images, drawn from a colour font on this machine, which needs fontTools (the extra ``emoji``)."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont

from mezzotint.data.base import InMemoryImages, content_identity
from mezzotint.data.splits import check_split, held_out
from mezzotint.data.transforms import check_channels, picture_to_tensor
from mezzotint.errors import MezzotintError

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
FONT_FILES = ("NotoColorEmoji.ttf", "TwemojiMozilla.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
"""The fonts that are looked for, the best first."""

SIZES = (16, 128)  # least and greatest, in pixels; the greatest is what pictures in Noto's font have
OUTLINE_SIZE = 128  # pixels per em for fonts that are drawn, not made of pixels
NO_EMOJI = ("REGIONAL INDICATOR ", "EMOJI COMPONENT ")  # names of halves of flags, and of hair
VISIBLE_LEVELS, VISIBLE_SHARE = 16, 0.01  # a picture has so great a share of pixels that differ so much from white


def emoji(
    path: str | Path | None = None,
    split: str = "train",
    size: int = 32,
    channels: int = 3,
    test_fraction: float = 0.1,
) -> InMemoryImages:
    """Every emoji of one code point, on white, with its Unicode name in lower case as its caption: "grinning face".

    `path` is a colour font; None takes the first of `FONT_FILES` in the usual folders. Left out are code points that
    are no pictures by themselves (digits, halves of flags, tones of skin), those that Python's `unicodedata` has no
    name for, blank pictures, and pictures that another code point has already; and so are flags and variants of several
    code points, which have no Unicode names. `test_fraction` of the captions is held out (see `held_out`). Raises
    `MezzotintError` for a size outside `SIZES`, and where fontTools, a font or emoji in it are missing.
    """
    check_split(split)
    check_channels(channels)
    if not SIZES[0] <= size <= SIZES[1]:
        raise MezzotintError(
            f"emoji have {SIZES[0]} to {SIZES[1]} pixels, not {size}; set data.size, for example to 64"
        )
    if split == "test" and not test_fraction:
        raise MezzotintError("emoji have no test split of their own; set data.test_fraction, for example to 0.1")
    font = find_font() if path is None else Path(path).expanduser()
    pictures = draw_font(font)
    pictures = [pictures[i] for i in held_out(len(pictures), split, test_fraction)]
    shape = (channels, size, size)
    captions = tuple(caption for caption, _ in pictures)
    images = torch.stack([picture_to_tensor(picture, shape) for _, picture in pictures])
    content = ["\0".join(captions).encode(), images.numpy().tobytes()]
    return InMemoryImages(images, None, (), content_identity("emoji", split, shape, (), content), captions)


def find_font() -> Path:
    """The first of `FONT_FILES` on this machine. Raises `MezzotintError` where there is none."""
    found: dict[str, Path] = {}
    for folder in FONT_FOLDERS:
        for place, _, files in sorted(os.walk(os.path.expanduser(folder))):
            for name in files:
                found.setdefault(name, Path(place) / name)
    for name in FONT_FILES:
        if name in found:
            return found[name]
    raise MezzotintError(
        "no colour emoji font was found; install one (Debian, Ubuntu: apt install fonts-noto-color-emoji) or set "
        "data.path to a font file such as NotoColorEmoji.ttf"
    )


def draw_font(path: Path) -> list[tuple[str, Image.Image]]:
    """Caption and square picture (RGB, on white) of each emoji in a font, by code point; all on one scale.

    Raises `MezzotintError` for a file that is no colour font, or one without emoji.
    """
    code_points, em = _read_font(path)
    names = {point: unicodedata.name(chr(point), "") for point in code_points if _may_be_emoji(point)}
    names = {point: name for point, name in names.items() if name and not name.startswith(NO_EMOJI)}
    try:
        font = ImageFont.truetype(str(path), em)
        boxes = {point: _ink(font, chr(point), em) for point in names}
    except (OSError, ValueError) as error:
        raise MezzotintError(f"Pillow cannot draw the font {path} ({error}); set data.path to another font") from error
    side = max(
        (max(right - left, bottom - top) for left, top, right, bottom in filter(None, boxes.values())), default=0
    )
    pictures: dict[bytes, tuple[str, Image.Image]] = {}  # by pixels; the first code point keeps its picture
    for point, box in boxes.items():
        if box is not None and _is_visible(picture := _draw(font, chr(point), box, em, side)):
            pictures.setdefault(picture.tobytes(), (names[point].lower(), picture))
    if not pictures:
        raise MezzotintError(
            f"the font {path} has no emoji that Pillow can draw; set data.path to a font of bitmaps (CBDT, sbix) or "
            "layers (COLR version 0), such as NotoColorEmoji.ttf"
        )
    return list(pictures.values())


def _read_font(path: Path) -> tuple[Sequence[int], int]:
    """The code points of a font, ascending, and the size that its pictures are made for, in pixels per em."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise MezzotintError(
            "emoji need the library fontTools, which is not installed; install it with: pip install 'mezzotint[emoji]'"
        ) from None
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return sorted(font.getBestCmap() or {}), _em(font, path)
    except (OSError, TTLibError) as error:
        raise MezzotintError(f"font {path} cannot be read ({error}); set data.path to a font file") from error


def _em(font: TTFont, path: Path) -> int:
    if "CBLC" in font:
        return max(strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes)
    if "sbix" in font:
        return max(font["sbix"].strikes)
    if "COLR" in font:
        return OUTLINE_SIZE
    raise MezzotintError(f"the font {path} has no colours; set data.path to a colour font such as NotoColorEmoji.ttf")


def _may_be_emoji(point: int) -> bool:
    """Symbols, other than those that modify another one (tones of skin) and the plain ones of a keyboard."""
    return point > 0x7F and unicodedata.category(chr(point)) in ("So", "Sm")


def _ink(font: ImageFont.FreeTypeFont, text: str, em: int) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is painted when `text` is drawn at (em, em); None for a blank."""
    picture = Image.new("RGBA", (3 * em, 3 * em))
    ImageDraw.Draw(picture).text((em, em), text, font=font, embedded_color=True)
    return picture.getchannel("A").getbbox()


def _draw(font: ImageFont.FreeTypeFont, text: str, box: tuple[int, int, int, int], em: int, side: int) -> Image.Image:
    """The glyph, whose `_ink` is `box`, in the middle of a white square."""
    left, top, right, bottom = box
    place = em + (side - right - left) // 2, em + (side - bottom - top) // 2
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text(place, text, font=font, embedded_color=True)
    return picture


def _is_visible(picture: Image.Image) -> bool:
    red, green, blue = picture.split()
    levels = ImageChops.darker(ImageChops.darker(red, green), blue).histogram()
    return sum(levels[: 256 - VISIBLE_LEVELS]) >= VISIBLE_SHARE * sum(levels)
