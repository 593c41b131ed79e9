"""What a data set is, and the two ways of being one: held in memory, or decoded on demand."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from mezzotint.data.pictures import WHITE
from mezzotint.data.transforms import picture_to_tensor
from mezzotint.errors import MezzotintError
from mezzotint.files import name_bytes
from mezzotint.progress import OWN

T = TypeVar("T")
logger = logging.getLogger("mezzotint")

KEPT_BYTES = 2**28
"""A set of pictures that needs no more than so many bytes once it is decoded stays in each process's memory: a
photograph of a phone takes a hundred times as long to decode as a small network to train on."""


class Example(NamedTuple):
    """A decoded example of a stream."""

    image: Tensor  # uint8, `image_shape`
    label: int  # −1 when unlabelled
    captions: tuple[str, ...] = ()  # all there are


class ImageInfo(Protocol):
    """What every data set says about itself."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image, or (F, C, H, W) of every clip, which is an image in every other respect."""

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

    def decode(self, window: Sequence[Any], position: int) -> Example:
        """``window[position]`` decoded, or the next readable example in `window`."""


@runtime_checkable
class Captioned(Protocol):
    """What may have captions."""

    @property
    def has_captions(self) -> bool: ...


@runtime_checkable
class CaptionedDataset(Captioned, ImageDataset, Protocol):
    """A data set whose captions are looked up apart from its images, so workers need not send them."""

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        """All captions of each of the images `indices`, as `__getitem__` has just given them; only with captions."""


def as_captions(value: str | Sequence[str | None] | None) -> tuple[str, ...]:
    """One caption, several or none: null is no caption, alone and in a list."""
    return (value,) if isinstance(value, str) else tuple(text for text in value or () if text is not None)


@dataclass(frozen=True, eq=False)
class InMemoryImages:
    """Images uint8 (N, C, H, W), labels int64 (N,) or None, and captions (N) or None, in memory."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    identity: str
    texts: Sequence[str | Sequence[str]] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def has_captions(self) -> bool:
        return self.texts is not None

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        assert self.texts is not None
        return [as_captions(self.texts[i]) for i in indices]

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

    def read(self, index: int) -> tuple[Image.Image | Sequence[Image.Image], int]:
        """Picture, or the frames of a clip, and label; what this raises, unless `MezzotintError`: unreadable."""


class DecodedImages:
    """Images decoded on demand. The next readable image stands in, always the same one, for an unreadable one.

    Unreadable images are counted over all worker processes of a loader, but by each training process for itself; more
    than `max_unreadable` raise `MezzotintError`. `texts`: the captions of each image, where there are any.
    `background`: red, green and blue behind what is transparent.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        image_shape: tuple[int, ...],
        class_names: tuple[str, ...],
        identity: str,
        max_unreadable: int,
        texts: Sequence[str | Sequence[str]] | None = None,
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.pictures = pictures
        self.image_shape = image_shape
        self.class_names = class_names
        self.identity = identity
        self.max_unreadable = max_unreadable
        self.texts = texts
        self.background = background
        self._unreadable = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()  # shared with the workers
        self._kept: dict[int, tuple[Tensor, int]] | None = (
            {} if len(pictures) * math.prod(image_shape) <= KEPT_BYTES else None
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return first_readable(_from(index, len(self)), self._decode, self.report)

    @property
    def has_captions(self) -> bool:
        return self.texts is not None

    def captions(self, indices: Sequence[int]) -> list[tuple[str, ...]]:
        assert self.texts is not None
        return [as_captions(self.texts[self._stand_in(i)]) for i in indices]

    def _stand_in(self, index: int) -> int:
        """The image that `index` was decoded from: in whatever process that was, it marked the unreadable ones."""
        return next((i for i in _from(index, len(self)) if not self._unreadable[i]), index)

    def _decode(self, index: int) -> tuple[Tensor, int]:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        picture, label = self.pictures.read(index)
        decoded = picture_to_tensor(picture, self.image_shape, self.background), label
        if self._kept is not None:
            self._kept[index] = decoded
        return decoded

    def report(self, index: int, error: Exception) -> None:
        """Counts image `index` as unreadable, for the reason `error`. Raises `MezzotintError` for too many."""
        if not self._unreadable[index]:
            self._unreadable[index] = True
            names = [self.pictures.name(i) for i in self._unreadable.nonzero().flatten().tolist()]
            report_unreadable(self.pictures.name(index), error, names, self.max_unreadable)


class StreamExample(NamedTuple):
    """An undecoded example and its running number, over all epochs."""

    epoch: int
    number: int
    row: Any


class ShuffledStream(ABC):
    """An `ImageStream` made of epochs. Unreadable images are counted in each epoch."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, ...],
        class_names: tuple[str, ...],
        identity: str,
        max_unreadable: int,
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.image_shape = image_shape
        self.class_names = class_names
        self.identity = identity
        self.max_unreadable = max_unreadable
        self.background = background
        self._unreadable: dict[tuple[int, int], str] = {}  # names, by epoch and example number

    @property
    @abstractmethod
    def has_captions(self) -> bool: ...

    @abstractmethod
    def rows(self, epoch: int, seed: int) -> Iterator[Any]:
        """The undecoded examples of an epoch, every one once, shuffled."""

    @abstractmethod
    def decode_row(self, row: Any) -> Example:
        """The example; what this raises, unless `MezzotintError`, makes it count as unreadable."""

    @abstractmethod
    def row_name(self, row: Any, number: int) -> str:
        """Where a person finds the example."""

    def read(self, start: int, seed: int) -> Iterator[StreamExample]:
        """The examples from number `start` on, without end, each epoch shuffled anew by `seed`.

        A stream cannot be entered in the middle and does not know its length: to reach `start`, up to two epochs are
        read, though not decoded. Raises `MezzotintError` for an empty stream.
        """
        epoch, skip, number = 0, start, start
        while True:
            length = 0
            for length, row in enumerate(self.rows(epoch, seed), 1):
                if length > skip:
                    yield StreamExample(epoch, number, row)
                    number += 1
            if length == 0:
                raise MezzotintError("the data set holds no examples; expected at least 1, so check data.path")
            if skip >= length:  # `start` is in a later epoch, and now the length of an epoch is known
                epoch, skip = divmod(start, length)
            else:
                epoch, skip = epoch + 1, 0

    def decode(self, window: Sequence[StreamExample], position: int) -> Example:
        """``window[position]`` decoded, or the next readable example in `window`, which wraps around."""
        return first_readable(
            _from(position, len(window)),
            lambda i: self.decode_row(window[i].row),
            lambda i, error: self._report(window[i], error),
        )

    def _report(self, example: StreamExample, error: Exception) -> None:
        epoch, number, row = example
        if (epoch, number) not in self._unreadable:
            name = self._unreadable[epoch, number] = self.row_name(row, number)
            names = [name for (e, _), name in self._unreadable.items() if e == epoch]
            report_unreadable(name, error, names, self.max_unreadable)


def _from(index: int, count: int) -> Iterator[int]:
    """0 to ``count − 1``, beginning at `index` and wrapping around."""
    return ((index + i) % count for i in range(count))


def first_readable(
    candidates: Iterable[int], decode: Callable[[int], T], report: Callable[[int, Exception], None]
) -> T:
    """What `decode` makes of the first of `candidates` that can be read; others go to `report`."""
    for candidate in candidates:
        try:
            return decode(candidate)
        except MezzotintError:
            raise
        except Exception as error:  # PIL's file formats fail with a dozen unrelated types
            report(candidate, error)
    raise MezzotintError("not one image could be read; check the files named in the warnings")


def report_unreadable(name: str, error: Exception, names: Sequence[str], limit: int) -> None:
    """Warns of the unreadable image `name`; raises `MezzotintError` once `names`, all so far, are more than `limit`."""
    logger.warning("unreadable image skipped: %s (%s)", name, error, extra=OWN)
    if len(names) > limit:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise MezzotintError(
            f"{len(names)} images cannot be read, and at most {limit} may be skipped: {listed}; "
            "mend or remove them, or raise data.max_unreadable"
        )


def same_content(identity: str, other: str) -> bool:
    """Whether two identities are of the same content, whatever the folders that it lies in are called."""
    return _without_name(identity) == _without_name(other)


def _without_name(identity: str) -> str:
    return re.sub(r"^.*-(?=\d+(?:x\d+)+-[^-]+-[0-9a-f]{12}(?:-|$))", "", identity)


def content_identity(
    name: str, split: str, image_shape: tuple[int, ...], class_names: Sequence[str], content: Iterable[bytes]
) -> str:
    """``name-CxHxW-split-digest``, safe as a file name; the digest is over `class_names` and `content`."""
    digest = hashlib.sha256(name_bytes("\0".join(class_names)))
    for part in content:
        digest.update(len(part).to_bytes(8, "little") + part)
    shape = "x".join(map(str, image_shape))
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', name)}-{shape}-{split}-{digest.hexdigest()[:12]}"
