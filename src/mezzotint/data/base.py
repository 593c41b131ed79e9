"""What a data set is, and the two ways of being one: held in memory, or decoded on demand."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.transforms import picture_to_tensor
from mezzotint.errors import MezzotintError

logger = logging.getLogger("mezzotint")


class ImageInfo(Protocol):
    """What every data set says about itself."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class; empty when the set is unlabelled."""

    @property
    def identity(self) -> str:
        """Tells data sets apart by content: name, shape, split and a digest. Safe as a file name."""


@runtime_checkable
class ImageDataset(ImageInfo, Protocol):
    """A finite set of images with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Image uint8 (C, H, W) and its label, −1 when unlabelled."""


@runtime_checkable
class BatchedDataset(ImageDataset, Protocol):
    """A data set so quick to index that it needs no worker processes."""

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) for `indices` int64 (B,); floats are taken as they are."""


@runtime_checkable
class ImageStream(ImageInfo, Protocol):
    """An endless sequence of images that is read in its own order. Reading is serial; decoding can be spread."""

    def read(self, start: int, seed: int) -> Iterator[Any]:
        """Undecoded examples from number `start` on, one epoch after another, shuffled by `seed`."""

    def decode(self, window: Sequence[Any], position: int) -> tuple[Tensor, int]:
        """Image uint8 (C, H, W) and label of ``window[position]``, or of the next readable example in `window`."""


@dataclass(frozen=True, eq=False)
class InMemoryImages:
    """Images uint8 (N, C, H, W) and labels int64 (N,), or None, in memory."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    identity: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1 if self.labels is None else int(self.labels[index])

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) and labels int64 (B,), −1 when unlabelled, for `indices` int64 (B,)."""
        return self.images[indices], torch.full_like(indices, -1) if self.labels is None else self.labels[indices]


class Pictures(Protocol):
    """Encoded images with random access."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where a person finds image `index`."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Picture and label; whatever this raises, except `MezzotintError`, makes the image count as unreadable."""


class DecodedImages:
    """Images decoded on demand. The next readable image stands in, always the same one, for an unreadable one.

    Unreadable images are counted over all worker processes of a loader, but by each training process for itself; more
    than `max_unreadable` raise `MezzotintError`.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        image_shape: tuple[int, int, int],
        class_names: tuple[str, ...],
        identity: str,
        max_unreadable: int,
    ) -> None:
        self.pictures = pictures
        self.image_shape = image_shape
        self.class_names = class_names
        self.identity = identity
        self.max_unreadable = max_unreadable
        self._unreadable = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()  # shared with the workers

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        candidates = ((index + i) % len(self) for i in range(len(self)))
        return first_readable(candidates, self.pictures.read, self._report, self.image_shape)

    def _report(self, index: int, error: Exception) -> None:
        if not self._unreadable[index]:
            self._unreadable[index] = True
            names = [self.pictures.name(i) for i in self._unreadable.nonzero().flatten().tolist()]
            report_unreadable(self.pictures.name(index), error, names, self.max_unreadable)


def first_readable(
    candidates: Iterable[int],
    read: Callable[[int], tuple[Image.Image, int]],
    report: Callable[[int, Exception], None],
    image_shape: tuple[int, int, int],
) -> tuple[Tensor, int]:
    """Image uint8 of `image_shape` and label of the first of `candidates` that can be read; others go to `report`."""
    for candidate in candidates:
        try:
            picture, label = read(candidate)
            return picture_to_tensor(picture, image_shape), label
        except MezzotintError:
            raise
        except Exception as error:  # PIL's file formats fail with a dozen unrelated types
            report(candidate, error)
    raise MezzotintError("not one image could be read; check the files named in the warnings")


def report_unreadable(name: str, error: Exception, names: Sequence[str], limit: int) -> None:
    """Warns of the unreadable image `name`; raises `MezzotintError` once `names`, all so far, are more than `limit`."""
    logger.warning("unreadable image skipped: %s (%s)", name, error)
    if len(names) > limit:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise MezzotintError(
            f"{len(names)} images cannot be read, and at most {limit} may be skipped: {listed}; "
            "mend or remove them, or raise data.max_unreadable"
        )


def content_identity(
    name: str, split: str, image_shape: tuple[int, int, int], class_names: Sequence[str], content: Iterable[bytes]
) -> str:
    """``name-CxHxW-split-digest``, safe as a file name; the digest is over `class_names` and `content`."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for part in content:
        digest.update(len(part).to_bytes(8, "little") + part)
    shape = "x".join(map(str, image_shape))
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', name)}-{shape}-{split}-{digest.hexdigest()[:12]}"
