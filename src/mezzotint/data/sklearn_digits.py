"""scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels that need no download."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

from mezzotint.data.base import InMemoryImages, content_identity
from mezzotint.data.splits import check_split, held_out
from mezzotint.data.transforms import check_size, grey_to_channels

NATIVE_SIZE = 8


def digits(split: str = "train", size: int = NATIVE_SIZE, channels: int = 1, labels: bool = True) -> InMemoryImages:
    """The digits 0 to 9; the 17 grey levels are spread over 0 to 255, and other sizes than 8 are bicubic.

    `split` is "train" (898 images), "test" (899) or "all"; the halves are stratified by class and never change.
    """
    from sklearn.datasets import load_digits  # seconds to import

    check_split(split, ("train", "test", "all"))
    check_size(size)
    source = load_digits()
    chosen = held_out(len(source.target), split, 0 if split == "all" else 0.5, stratify=source.target)
    images = torch.from_numpy(np.rint(source.images[chosen] * (255 / 16))).unsqueeze(1)
    if size != NATIVE_SIZE:
        images = interpolate(images, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    images = grey_to_channels(images.to(torch.uint8), channels)
    targets = torch.from_numpy(source.target[chosen]).long() if labels else None
    names = tuple(map(str, source.target_names)) if labels else ()
    identity = content_identity("digits", split, (channels, size, size), names, [images.numpy().tobytes()])
    return InMemoryImages(images, targets, names, identity)
