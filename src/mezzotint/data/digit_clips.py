"""Clips of scikit-learn's digits that move about a frame and bounce off its edges, as in Moving MNIST."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mezzotint.data.base import content_identity
from mezzotint.data.sklearn_digits import NATIVE_SIZE, digits
from mezzotint.data.splits import check_split
from mezzotint.data.transforms import check_channels, grey_to_channels
from mezzotint.errors import MezzotintError

SPEED = (1 / 32, 1 / 16)  # least and greatest, in sides of the frame per frame; Moving MNIST: 1 / 18

MAX_PLACES = 2**25  # of digits in frames: 0.5 GiB


@dataclass(frozen=True, eq=False)
class MovingDigits:
    """N clips, drawn when they are asked for, each of K digits of one class on a black frame."""

    sprites: Tensor  # uint8 (M, s, s), of twice the resolution of the frames
    chosen: Tensor  # int64 (N, K): which of the sprites
    corners: Tensor  # int64 (N, F, K, 2): top and left of each in each frame, in half pixels
    labels: Tensor  # int64 (N,)
    image_shape: tuple[int, int, int, int]
    class_names: tuple[str, ...]
    identity: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clips, labels = self.get_batch(torch.tensor([index]))
        return clips[0], int(labels[0])

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Clips uint8 (B, F, C, H, W) and labels int64 (B,), −1 when unlabelled. The brighter of two digits is seen."""
        frames, channels, size, _ = self.image_shape
        count, side = len(indices), torch.arange(self.sprites.shape[-1])
        clips = torch.zeros(count, frames, 2 * size, 2 * size, dtype=torch.uint8)
        batch = torch.arange(count)[:, None, None, None]
        frame = torch.arange(frames)[:, None, None]
        for k in range(self.chosen.shape[1]):
            top, left = self.corners[indices, :, k].unbind(-1)
            rows, columns = top[..., None, None] + side[:, None], left[..., None, None] + side
            layer = torch.zeros_like(clips)
            layer[batch, frame, rows, columns] = self.sprites[self.chosen[indices, k]][:, None]
            clips = torch.maximum(clips, layer)
        labels = self.labels[indices] if self.class_names else torch.full_like(indices, -1)
        grey = avg_pool2d(clips.flatten(0, 1).unsqueeze(1).float(), 2).round().to(torch.uint8)
        return grey_to_channels(grey, channels).unflatten(0, (count, frames)), labels


def moving_digits(
    split: str = "train",
    size: int = 16,
    frames: int = 16,
    channels: int = 1,
    labels: bool = True,
    objects: int = 1,
    examples: int = 10_000,
) -> MovingDigits:
    """Clips (F, C, H, W) of a digit, or of `objects` digits of one class, half as large as the frame of `size` pixels.

    Each starts anywhere, moves at a speed of 1/32 to 1/16 of the frame per frame in any direction, and bounces; its
    place is rounded to half pixels, for it is drawn twice as large and shrunk by the mean of four pixels. Clip i shows
    class i mod 10 and is the same for any number of `examples`. `split` is "train" or "test", made of different digits:
    those of `digits`. Raises `MezzotintError` for a size that is odd or less than 16, for other numbers below 1, and
    for too many clips.
    """
    check_split(split)
    check_channels(channels)
    if size < 2 * NATIVE_SIZE or size % 2:
        raise MezzotintError(
            f"moving digits need a frame of an even number of pixels from 16, not {size}; set data.size"
        )
    for key, value in (("frames", frames), ("objects", objects), ("examples", examples)):
        if value < 1:
            raise MezzotintError(f"data.{key} is {value}; expected at least 1")
    if (placed := frames * objects * examples) > MAX_PLACES:
        raise MezzotintError(
            f"{examples} clips of {frames} frames place digits {placed:,} times; expected at most {MAX_PLACES:,}, "
            "which are held in memory, so lower data.examples"
        )
    source = digits(split, size)
    assert source.labels is not None
    by_class = [torch.nonzero(source.labels == label).flatten() for label in range(10)]
    classes = torch.arange(examples) % 10

    # One stream of numbers, example after example, so that a clip does not depend on how many follow it.
    generator = np.random.default_rng(0 if split == "train" else 1)
    which, top, left, direction, speed = torch.from_numpy(generator.random((examples, objects, 5))).unbind(-1)
    counts, offsets = torch.tensor([len(i) for i in by_class]), torch.cat(by_class)
    starts = counts.cumsum(0) - counts
    chosen = offsets[starts[classes][:, None] + (which * counts[classes][:, None]).long()]

    room = size  # the greatest coordinate of a corner, in half pixels
    slow, fast = (2 * size * limit for limit in SPEED)
    angle, step = 2 * math.pi * direction, slow + (fast - slow) * speed
    start = room * torch.stack([top, left], -1)
    velocity = step[..., None] * torch.stack([angle.sin(), angle.cos()], -1)
    path = start[:, None] + torch.arange(frames)[:, None, None] * velocity[:, None]
    corners = (room - (path.remainder(2 * room) - room).abs()).round().long()  # there and back: a triangle wave

    shape = (frames, channels, size, size)
    names = source.class_names if labels else ()
    content = [source.identity.encode(), chosen.numpy().tobytes(), corners.numpy().tobytes()]
    identity = content_identity("moving-digits", split, shape, names, content)
    return MovingDigits(source.images[:, 0], chosen, corners, classes, shape, names, identity)
