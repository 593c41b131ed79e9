"""Images out: grids, single PNGs, animations, videos and ADM's .npz."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate, pad

from mezzotint.data.transforms import to_uint8
from mezzotint.data.video import pyav
from mezzotint.errors import MezzotintError, check_count, expect
from mezzotint.files import atomic_path

IMAGES = "images, a tensor (N, C, H, W) in [-1, 1] with 1 or 3 channels"
#: of what surrounds the images of a grid; pixels of a line of text, lines above an image, and of a label beside a row
GREY, LINE, LABEL_LINES, MARGIN = 128, 14, 2, 140
#: letters of a label that are looked at, more than there is room for
MAX_LABEL = 500
FRAME_RATES = {".gif": (0.1, 50), ".mp4": (0.1, 1000)}
"""Least and greatest. A GIF counts in hundredths of a second, and viewers slow down what is shown for one."""


def grid_image(images: Tensor, columns: int, *, labels: Sequence[str] = (), min_side: int = 48) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] as one picture; tiny ones are enlarged, unsmoothed, to min_side pixels or more.

    labels: N texts, class names or captions. Where all of a row are of one it stands to the row's left, else each is
    written above its image, on as many lines as `LABEL_LINES` and cut beyond; images are then twice as large at least.
    """
    from torchvision.utils import make_grid  # seconds to import

    if expect(images, Tensor, IMAGES).ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise MezzotintError(f"expected {IMAGES}, not one of shape {tuple(images.shape)}")
    check_count("columns", columns)
    if labels and len(labels) != len(images):
        raise MezzotintError(f"there are {len(labels)} labels for {len(images)} images; give one for each, or none")
    labels = [label[:MAX_LABEL] for label in labels]
    texts = [labels[first : first + columns] for first in range(0, len(labels), columns)]  # of each row
    of_rows = columns > 1 and all(len(set(row)) == 1 for row in texts)
    above = LABEL_LINES * LINE if labels and not of_rows else 0
    scale = max(1, -(-(2 * min_side if above else min_side) // images.shape[-1]))
    pixels = to_uint8(images.cpu()).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    padded = pad(pixels, (0, 0, above, 0), value=GREY)
    padding = 2 if len(images) > 1 else 0  # as make_grid has it
    grid = make_grid(padded, nrow=columns, padding=padding, pad_value=GREY)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    width, height = pixels.shape[-1], padded.shape[-2]
    if above:
        for number, label in enumerate(labels):
            row, column = divmod(number, columns)
            place = padding + column * (width + padding), padding + row * (height + padding)
            _write(picture, label, (*place, place[0] + width, place[1] + above))
    elif labels:
        margin = 2 * LINE + round(max(_font().getlength(row[0]) for row in texts))
        margin = min(margin, MARGIN)
        picture = ImageOps.expand(picture, (margin, 0, 0, 0), (GREY,) * 3)
        for number, of_row in enumerate(texts):
            top = padding + number * (height + padding)
            _write(picture, of_row[0], (padding, top, margin, top + height))
    return picture


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(LINE - 3)


def _write(picture: Image.Image, text: str, box: tuple[int, int, int, int]) -> None:
    """Write `text` in the middle of a box (left, top, right, bottom), in lines of its width, and cut where it is full.

    Accents are left out, since PIL's own font has none.
    """
    text = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    left, top, right, bottom = box
    font, room, most = _font(), right - left - 4, max(1, (bottom - top) // LINE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    if most < len(lines):
        lines = [*lines[: most - 1], f"{lines[most - 1]} {lines[most]}…"]
    for number, line in enumerate(lines):
        line = line if len(line) <= room else line[: room - 1] + "…"
        while font.getlength(line) > room and len(line) > 1:
            line = line.removesuffix("…")[:-1] + "…"
        lines[number] = line
    start = (top + bottom - LINE * len(lines)) // 2
    for number, line in enumerate(lines):
        place = ((left + right) // 2, start + number * LINE + LINE // 2)
        ImageDraw.Draw(picture).text(place, line, fill=(0, 0, 0), font=font, anchor="mm")


def save_grid(images: Tensor, path: str | Path, columns: int = 10, *, labels: Sequence[str] = ()) -> None:
    """Write `grid_image` as a PNG."""
    with atomic_path(path) as temporary:
        grid_image(images, columns, labels=labels).save(temporary, format="PNG")


def save_pyramid_grid(
    levels: Sequence[Tensor], path: str | Path, columns: int = 1, *, labels: Sequence[str] = ()
) -> None:
    """Write the levels of a pyramid, each (N, C, h, w) in [-1, 1], as a PNG with all levels of an image side by side.

    Smaller ones are enlarged, unsmoothed, to the last one's size. `columns`: images in a row.
    """
    largest = levels[-1].shape[-2:]
    enlarged = [interpolate(level.float(), largest, mode="nearest-exact") for level in levels]
    each = [label for label in labels for _ in levels]
    save_grid(torch.stack(enlarged, dim=1).flatten(0, 1), path, columns * len(levels), labels=each)


def save_pngs(images: Tensor, folder: str | Path, *, first: int = 0) -> None:
    """Write each image (N, C, H, W) in [-1, 1] as folder/000000.png, folder/000001.png, ..., counting from `first`.

    What else is in the folder stays; see `others_in`.
    """
    for i, pixels in enumerate(to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy(), first):
        with atomic_path(Path(folder) / f"{i:06d}.png") as temporary:
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, format="PNG")


def others_in(folder: str | Path, count: int) -> list[str]:
    """Names of what is in the folder beside the PNGs that `save_pngs` writes of `count` images.

    Raises `MezzotintError` where it is a file.
    """
    if Path(folder).is_file():
        raise MezzotintError(f"{folder} is a file; choose a folder for the PNGs")
    if not Path(folder).is_dir():
        return []
    own = {f"{i:06d}.png" for i in range(count)}
    return sorted(path.name for path in Path(folder).iterdir() if path.name not in own)


def adm_pixels(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as ADM's arr_0: uint8 (N, H, W, 3), grey ones repeated."""
    return to_uint8(images.cpu()).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()


def save_npz(images: Tensor, labels: Tensor | None, path: str | Path) -> None:
    """Write ADM's .npz: arr_0 uint8 (N, H, W, 3), and arr_1 int64 labels (N,) where there are any."""
    arrays = [adm_pixels(images)]
    if labels is not None:
        arrays.append(labels.cpu().numpy())
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *arrays)


def save_animation(
    trajectory: Tensor,
    path: str | Path,
    columns: int = 10,
    *,
    milliseconds: int = 80,
    labels: Sequence[str] = (),
) -> None:
    """Write states (S, N, C, H, W) in [-1, 1] as a GIF of S grids, holding the last one for a second."""
    frames = [grid_image(state, columns, labels=labels) for state in trajectory]
    _save_gif(frames, [milliseconds] * (len(frames) - 1) + [1000], path)


def save_video(
    clips: Tensor, path: str | Path, fps: float = 8, *, columns: int | None = None, labels: Sequence[str] = ()
) -> None:
    """Write a clip (F, C, H, W) in [-1, 1], or a grid of clips (N, F, C, H, W), as GIF or MP4, by the suffix of `path`.

    MP4 is H.264 where PyAV has it, else MPEG-4, and repeats the last row and column of odd sizes. Raises
    `MezzotintError` for another suffix, for MP4 without PyAV, and for a rate outside `FRAME_RATES`.
    """
    suffix = check_video(path, fps)
    if clips.ndim == 4:
        frames = [Image.fromarray(pixels) for pixels in adm_pixels(clips)]
    else:
        columns = columns or math.ceil(math.sqrt(len(clips)))
        frames = [grid_image(state, columns, labels=labels) for state in clips.transpose(0, 1)]
    if suffix == ".mp4":
        _save_mp4(frames, Fraction(fps).limit_denominator(1000), path)
    else:
        ends = [10 * round(100 * i / fps) for i in range(len(frames) + 1)]  # so that rounding does not add up
        _save_gif(frames, [end - start for start, end in pairwise(ends)], path)


def check_video(path: str | Path, fps: float) -> str:
    """The suffix of `path`. Raises `MezzotintError` as `save_video` does, but for what the clips may bring."""
    suffix = Path(path).suffix.lower()
    if suffix not in FRAME_RATES:
        raise MezzotintError(f"videos are written as .gif or .mp4, not {Path(path).name}; change the suffix")
    slowest, fastest = FRAME_RATES[suffix]
    if not slowest <= fps <= fastest:
        raise MezzotintError(f"{suffix} shows {slowest} to {fastest} frames per second, not {fps}; change fps")
    if suffix == ".mp4":
        pyav("MP4 files")
    return suffix


def _save_gif(frames: Sequence[Image.Image], milliseconds: list[int], path: str | Path) -> None:
    with atomic_path(path) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _save_mp4(frames: Sequence[Image.Image], fps: Fraction, path: str | Path) -> None:
    av = pyav("MP4 files")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    odd = frames[0].height % 2, frames[0].width % 2  # of two by two pixels one colour is kept
    with atomic_path(path) as temporary, av.open(os.path.abspath(temporary), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "18"} if codec == "libx264" else {"qscale": "2"})
        stream.height, stream.width = frames[0].height + odd[0], frames[0].width + odd[1]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            pixels = np.pad(np.asarray(picture), ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
