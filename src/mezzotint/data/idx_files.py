"""IDX files, the format of MNIST and its family (Fashion-MNIST, KMNIST), plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from mezzotint.data.base import InMemoryImages, content_identity
from mezzotint.data.splits import check_split
from mezzotint.data.transforms import grey_to_channels
from mezzotint.errors import MezzotintError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist installs its files."""

FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

PREFIXES = {"train": "train", "test": "t10k"}
MAX_BYTES = 2**33  # 8 GiB of images, held in memory; EMNIST has 0.6
MAX_RATIO = 200  # that gzip shrinks more than `ANY_RATIO` bytes by: images to about a tenth, bombs to a thousandth
ANY_RATIO = 2**26
UNSIGNED_BYTE = 8  # IDX's code for the type of the elements


def idx(
    path: str | Path = FASHION_MNIST,
    split: str = "train",
    size: int | None = None,
    channels: int = 1,
    labels: bool = True,
    class_names: tuple[str, ...] | None = None,
) -> InMemoryImages:
    """Images of the files ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte`` (or ``.gz``) in a folder.

    They are padded to `size` with 0, the background, the image in the middle. `class_names` are by default those of
    Fashion-MNIST in Debian's folder, else the numbers from "0" to at least "9". Raises `MezzotintError` for a missing
    or malformed file, a size smaller than the images, or labels that do not fit.
    """
    check_split(split)
    folder = Path(path).expanduser()
    array = read_idx(_find(folder, f"{PREFIXES[split]}-images-idx3-ubyte"), dimensions=3)
    images = _padded(torch.from_numpy(array).unsqueeze(1), size)
    targets: torch.Tensor | None = None
    names: tuple[str, ...] = ()
    if labels:
        targets = torch.from_numpy(read_idx(_find(folder, f"{PREFIXES[split]}-labels-idx1-ubyte"), dimensions=1)).long()
        if len(targets) != len(images):
            raise MezzotintError(
                f"{folder} has {len(images)} {split} images but {len(targets)} labels; expected one each, "
                "so fetch the files again or set data.labels=false"
            )
        names = class_names or _class_names(folder, int(targets.max()))
        if targets.max() >= len(names):
            raise MezzotintError(
                f"{folder} has the label {int(targets.max())}, for which the {len(names)} class names are too few; "
                "name every class"
            )
    content = [images.numpy().tobytes()] + ([] if targets is None else [targets.numpy().tobytes()])
    images = grey_to_channels(images, channels)
    shape = (channels, images.shape[2], images.shape[3])
    return InMemoryImages(images, targets, names, content_identity(folder.resolve().name, split, shape, names, content))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in the IDX file `path`. Raises `MezzotintError` unless it is whole and has so many dimensions.

    And for more bytes than `MAX_BYTES`, or than gzip makes so small, before they are read.
    """
    header = 4 + 4 * dimensions
    try:
        compressed, there = path.suffix == ".gz", path.stat().st_size
        with gzip.open(path) if compressed else open(path, "rb") as file:
            start = file.read(header)
            if start[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)) or len(start) < header:
                raise MezzotintError(
                    f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions: it begins with "
                    f"{start[:4].hex()}, expected 000008{dimensions:02x}; check data.path"
                )
            shape = struct.unpack(f">{dimensions}I", start[4:])
            length = math.prod(shape)
            if length == 0:
                raise MezzotintError(f"IDX file {path} is empty; expected at least one element")
            if not compressed and there != header + length:
                raise MezzotintError(
                    f"IDX file {path} has {there} bytes, but its header says {header + length}; fetch it again"
                )
            if length > MAX_BYTES or (compressed and length > max(ANY_RATIO, MAX_RATIO * there)):
                raise MezzotintError(
                    f"the header of IDX file {path}, which has {there:,} bytes, says {length:,}; expected at most "
                    f"{MAX_BYTES:,}, as they are held in memory, and of a file made by gzip {MAX_RATIO} times its size"
                )
            data = bytearray(length)
            found = header + file.readinto(data) + len(file.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise MezzotintError(f"IDX file {path} cannot be read ({error}); fetch it again") from error
    if found != header + length:
        more = "more than" if found > header + length else "only"
        raise MezzotintError(
            f"IDX file {path} has {more} {found} bytes, but its header says {header + length}; fetch it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise MezzotintError(
        f"{folder} has no file {name} or {name}.gz; set data.path to a folder with the files of MNIST or a set like "
        "it, or install Debian's package dataset-fashion-mnist, whose files are found without a path"
    )


def _padded(images: torch.Tensor, size: int | None) -> torch.Tensor:
    height, width = images.shape[2:]
    if size is None or (height, width) == (size, size):
        return images
    if size < max(height, width):
        raise MezzotintError(f"data.size is {size}, less than the {height}×{width} pixels of the images; enlarge it")
    left, top = (size - width) // 2, (size - height) // 2
    return pad(images, (left, size - width - left, top, size - height - top))


def _class_names(folder: Path, highest: int) -> tuple[str, ...]:
    if folder == FASHION_MNIST:
        return FASHION_CLASSES
    return tuple(str(label) for label in range(max(10, highest + 1)))
