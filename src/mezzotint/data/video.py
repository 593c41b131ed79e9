"""Folders of videos: GIF through Pillow, every other format through PyAV (the extra ``video``)."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.data.base import DecodedImages, content_identity
from mezzotint.data.captions import captioned_files, find_metadata
from mezzotint.data.folder import FileKind, classified_files, files_content, split_folder
from mezzotint.data.pictures import background_rgb, check_pixels, open_picture
from mezzotint.data.splits import held_out
from mezzotint.data.transforms import check_channels, check_size
from mezzotint.errors import MezzotintError

VIDEOS = FileKind("video", (".gif", ".mp4", ".webm", ".mov", ".mkv", ".avi"))

TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # clockwise by 90 degrees
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""What is done to a frame by the signs of its display matrix; turns by other angles are left out, as players do."""


@dataclass(frozen=True)
class VideoFiles:
    """Video files and their labels, for `DecodedImages`; of each, the frames that `frame_numbers` picks."""

    samples: Sequence[tuple[str, int]]
    frames: int
    stride: int | None

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def read(self, index: int) -> tuple[list[Image.Image], int]:
        path, label = self.samples[index]
        return (_read_gif if _is_gif(path) else _read_video)(path, self.frames, self.stride), label


def video_folder(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    frames: int = 16,
    frame_stride: int | None = None,
    labels: bool = True,
    caption_column: str | None = None,
    test_fraction: float = 0.0,
    max_unreadable: int = 10,
    background: str = "white",
) -> DecodedImages:
    """Clips (F, C, H, W), one of each GIF, MP4 or other video file, in one sub-folder per class or with captions.

    A clip is `frames` frames, from the video's first to its last, or, with a `frame_stride`, so many frames apart from
    its middle. A file ``metadata.jsonl``, as of `captioned_folder`, makes the videos captioned and unlabelled;
    otherwise classes and splits are as of `image_folder`. Frames are squares of `size` pixels by `adm_center_crop`. A
    video with too few frames counts as unreadable. Raises `MezzotintError` as those two do, for numbers below 1, and
    for other files than GIFs where PyAV is not installed.
    """
    check_channels(channels)
    check_size(size)
    colour = background_rgb(background)
    for key, value in (("frames", frames), ("frame_stride", frame_stride)):
        if value is not None and value < 1:
            raise MezzotintError(f"data.{key} is {value}; expected at least 1")
    folder, root, training = split_folder(path, split, test_fraction, VIDEOS)
    metadata = find_metadata(folder, root)
    texts: list[tuple[str, ...]] | None = None
    class_names: tuple[str, ...] = ()
    if metadata is not None:
        captioned = captioned_files(root, metadata, caption_column, VIDEOS)
        samples = [(file, -1) for file, _ in captioned]
    else:
        class_names, samples = classified_files(root, training, VIDEOS, labels)
    chosen = held_out(len(samples), split, test_fraction)
    if metadata is not None:
        texts = [captioned[i][1] for i in chosen]
    samples = [samples[i] for i in chosen]
    if not all(_is_gif(file) for file, _ in samples):
        pyav("videos other than GIFs")

    shape = (frames, channels, size, size)
    content = [*files_content([file for file, _ in samples], root), repr((frame_stride, texts, colour)).encode()]
    return DecodedImages(
        VideoFiles(samples, frames, frame_stride),
        image_shape=shape,
        class_names=class_names,
        identity=content_identity(folder.resolve().name, split, shape, class_names, content),
        max_unreadable=max_unreadable,
        texts=texts,
        background=colour,
    )


def frame_numbers(count: int, frames: int, stride: int | None) -> list[int]:
    """Which `frames` of `count` frames make up a clip: see `video_folder`. Raises `ValueError` for too few."""
    span = frames if stride is None else (frames - 1) * stride + 1
    if count < span:
        raise ValueError(f"it has {count} frames, and the clip needs {span}")
    if stride is None:
        return [int(number) for number in np.linspace(0, count - 1, frames).round()]
    first = (count - span) // 2
    return list(range(first, first + span, stride))


def pyav(what: str) -> ModuleType:
    """The module `av`. Raises `MezzotintError`, which says `what` needs it, where it is not installed."""
    try:
        import av
    except ImportError:
        raise MezzotintError(
            f"{what} need the library PyAV, which is not installed; install it with: pip install 'mezzotint[video]'"
        ) from None
    return av


def _is_gif(path: str) -> bool:
    return path.lower().endswith(".gif")


def _read_gif(path: str, frames: int, stride: int | None) -> list[Image.Image]:
    clip = []
    with open_picture(path) as picture:
        for number in frame_numbers(getattr(picture, "n_frames", 1), frames, stride):
            picture.seek(number)
            clip.append(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    return clip


def _picture(frame: Any) -> Image.Image:
    """A frame with its transparency, not yet turned."""
    from av.video.reformatter import VideoReformatter

    # The frame's own converter has threads and would stay in the frame. One whose side data were looked at is in a
    # cycle, and the garbage collector of a worker, which has no such threads, would wait for them for ever.
    if any(component.is_alpha for component in frame.format.components):
        return Image.fromarray(VideoReformatter().reformat(frame, format="rgba").to_ndarray())
    return VideoReformatter().reformat(frame, format="rgb24").to_image()


def _turn(frame: Any) -> Image.Transpose | None:
    """How the pictures of a video are turned and mirrored to be seen, by a frame's display matrix."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))  # (x, y) is shown at (ax + cy, bx + dy), y downwards
            return TURNS.get((_sign(a), _sign(b), _sign(c), _sign(d)))
    return None


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _read_video(path: str, frames: int, stride: int | None) -> list[Image.Image]:
    av = pyav("videos other than GIFs")
    path = os.path.abspath(path)  # what stands before a colon is a protocol to FFmpeg
    with av.open(path) as container:  # packets are counted without decoding them; a frame is one, if rarely none
        check_pixels(container.streams.video[0].width, container.streams.video[0].height)
        count = sum(packet.size > 0 for packet in container.demux(video=0))
    while True:
        wanted = frame_numbers(count, frames, stride)
        clip: list[Image.Image] = []
        decoded = 0
        with av.open(path) as container:
            for decoded, frame in enumerate(container.decode(video=0), 1):
                if decoded - 1 == wanted[len(clip)]:
                    clip.append(_picture(frame))
                    if len(clip) == frames:
                        turn = _turn(frame)
                        return clip if turn is None else [picture.transpose(turn) for picture in clip]
        count = decoded  # fewer than there are packets
