"""Data sets of the Hugging Face hub, or in its formats on disk, through the library `datasets` (the extra ``hub``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from mezzotint.data.base import DecodedImages, content_identity, first_readable, report_unreadable
from mezzotint.data.splits import held_out, pick_split
from mezzotint.data.transforms import check_channels, check_size
from mezzotint.errors import MezzotintError, closest

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]  # its image still encoded: {"bytes": ..., "path": ...}, one of them perhaps None

IDENTITY_ROWS = 16  # that the identity is a digest of


@dataclass(frozen=True)
class Columns:
    """Where a row keeps its image and its label, and how to decode them."""

    image: str
    label: str | None
    class_names: tuple[str, ...]
    decoder: datasets.Image

    def decode(self, row: Row) -> tuple[Image.Image, int]:
        """Picture and label, −1 without a label column. Raises `MezzotintError` for a label that is no class."""
        label = -1
        if self.label is not None:
            label = row[self.label]
            if label is None or not 0 <= label < len(self.class_names):
                raise MezzotintError(
                    f"column {self.label!r} has the label {label}, expected 0 to {len(self.class_names) - 1}; "
                    "mend the data set or set data.labels=false"
                )
        if row[self.image] is None:
            raise ValueError("the image is missing")
        return self.decoder.decode_example(row[self.image]), label

    def content(self, row: Row) -> bytes:
        """What is in `row`, the same on every machine."""
        image = row[self.image] or {"bytes": None, "path": None}
        label = None if self.label is None else row[self.label]
        return (image["bytes"] or Path(image["path"] or "").name.encode()) + repr(label).encode()


class StreamExample(NamedTuple):
    """A row and its running number, over all epochs."""

    epoch: int
    number: int
    row: Row


@dataclass(frozen=True)
class HubPictures:
    """The pictures of a data set on disk, for `DecodedImages`."""

    dataset: datasets.Dataset
    columns: Columns
    where: str

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return _example_name(self.where, index, self.dataset[index][self.columns.image])

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.columns.decode(self.dataset[index])


@dataclass(eq=False)
class HubStream:
    """An `ImageStream` over a streamed data set; see `hugging_face`. Unreadable images are counted in each epoch."""

    dataset: datasets.IterableDataset
    columns: Columns
    where: str
    image_shape: tuple[int, int, int]
    identity: str
    shuffle_buffer: int
    max_unreadable: int
    _unreadable: dict[tuple[int, int], str] = field(default_factory=dict)  # names, by epoch and example number

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.columns.class_names

    def read(self, start: int, seed: int) -> Iterator[StreamExample]:
        """The examples from number `start` on, without end, each epoch shuffled anew by `seed`.

        A stream cannot be entered in the middle and does not know its length: to reach `start`, up to two epochs are
        read, though not decoded.
        """
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        epoch, skip, number = 0, start, start
        while True:
            shuffled.set_epoch(epoch)
            length = 0
            for length, example in enumerate(shuffled, 1):
                if length > skip:
                    yield StreamExample(epoch, number, example)
                    number += 1
            if skip >= length:  # `start` is in a later epoch, and now the length of an epoch is known
                epoch, skip = divmod(start, length)
            else:
                epoch, skip = epoch + 1, 0

    def decode(self, window: Sequence[StreamExample], position: int) -> tuple[Tensor, int]:
        """Image and label of ``window[position]``, or of the next readable example in `window`, which wraps around."""
        candidates = ((position + i) % len(window) for i in range(len(window)))
        return first_readable(
            candidates,
            lambda i: self.columns.decode(window[i].row),
            lambda i, error: self._report(window[i], error),
            self.image_shape,
        )

    def _report(self, example: StreamExample, error: Exception) -> None:
        epoch, number, row = example
        if (epoch, number) not in self._unreadable:
            name = self._unreadable[epoch, number] = _example_name(self.where, number, row[self.columns.image])
            names = [name for (e, _), name in self._unreadable.items() if e == epoch]
            report_unreadable(name, error, names, self.max_unreadable)


def hugging_face(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    labels: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    test_fraction: float = 0.0,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    max_unreadable: int = 10,
) -> DecodedImages | HubStream:
    """A data set by its name on the hub, or in a folder: written by ``save_to_disk``, or with parquet or image files.

    Columns are recognised by type, `Image` and `ClassLabel`, when they are not given; `label_column` may also hold
    integers, unless streaming. Images become squares of `size` pixels by `adm_center_crop`. A test split is the set's
    own (test, else validation) or `test_fraction` of the training images. With `streaming` nothing is stored, and the
    order is that of the files, shuffled within `shuffle_buffer` examples. Raises `MezzotintError` when `datasets` is
    not installed, or the set cannot be loaded, or its columns or splits are not clear.
    """
    try:
        import datasets
    except ImportError:
        raise MezzotintError(
            "Hugging Face data sets need the library 'datasets', which is not installed; "
            "install it with: pip install 'mezzotint[hub]'"
        ) from None
    check_channels(channels)
    check_size(size)
    if streaming and test_fraction:
        raise MezzotintError("a stream cannot hold images out for testing; set data.test_fraction=0 or streaming=false")
    where = f"Hugging Face data set {path}"
    parts = _load_parts(path, config, streaming)
    part = pick_split(parts, split, test_fraction, where)

    image = _image_column(part.features or {}, image_column, where)
    label: str | None = None
    class_names: tuple[str, ...] = ()
    if labels:
        label = _label_column(part.features or {}, label_column, where)
        class_names = _class_names(parts.get("train", part), label, where)
    columns = Columns(image, label, class_names, datasets.Image())
    part = part.select_columns([image, label] if label else [image]).cast_column(image, datasets.Image(decode=False))

    shape = (channels, size, size)
    name = f"{Path(path).name}-{config}" if config else Path(path).name

    def identity(rows: Iterable[Row], length: int | None) -> str:
        content = [str(length).encode(), *map(columns.content, rows)]
        return content_identity(name, split, shape, class_names, content)

    if isinstance(part, datasets.IterableDataset):
        first = list(part.take(IDENTITY_ROWS))
        if not first:
            raise MezzotintError(f"{where} holds no images in its {split} split; choose another split or data set")
        return HubStream(part, columns, str(path), shape, identity(first, None), shuffle_buffer, max_unreadable)

    part = part.select(held_out(len(part), split, test_fraction))
    some = np.linspace(0, len(part) - 1, num=min(IDENTITY_ROWS, len(part)), dtype=int)
    return DecodedImages(
        HubPictures(part, columns, str(path)),
        image_shape=shape,
        class_names=class_names,
        identity=identity(part.select(some), len(part)),
        max_unreadable=max_unreadable,
    )


def _load_parts(path: str | Path, config: str | None, streaming: bool) -> Mapping[str, Any]:
    """The splits of the data set, by its own names for them."""
    import datasets

    folder = Path(path).expanduser()
    saved_splits, saved = (folder / "dataset_dict.json").is_file(), (folder / "state.json").is_file()
    try:
        if not saved and not saved_splits:
            source = str(folder) if folder.is_dir() else str(path)
            parts: Mapping[str, Any] = datasets.load_dataset(source, config, streaming=streaming)
            return parts
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` has a dozen unrelated types for a wrong name, no network, a broken file...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MezzotintError(
            f"Hugging Face data set {path} cannot be loaded ({reason}); expected a name on the hub within reach, or a "
            "folder that was written by save_to_disk or holds parquet or image files"
        ) from error
    parts = loaded if saved_splits else {"train": loaded}
    return {name: part.to_iterable_dataset() for name, part in parts.items()} if streaming else parts


def _image_column(features: Mapping[str, Any], wanted: str | None, where: str) -> str:
    import datasets

    fitting = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if wanted is None:
        return _only(fitting, features, "image", where)
    if wanted not in fitting:
        raise MezzotintError(f"{where} has no image column {wanted!r}; {closest(wanted, fitting or features)}")
    return wanted


def _label_column(features: Mapping[str, Any], wanted: str | None, where: str) -> str:
    import datasets

    if wanted is None:
        fitting = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        return _only(fitting, features, "label", where)
    if wanted not in features:
        raise MezzotintError(f"{where} has no column {wanted!r}; {closest(wanted, features)} (set data.label_column)")
    return wanted


def _only(fitting: Sequence[str], features: Mapping[str, Any], kind: str, where: str) -> str:
    if len(fitting) == 1:
        return fitting[0]
    found = f"several {kind} columns, {', '.join(fitting)}" if fitting else f"no {kind} column"
    remedy = " or data.labels=false" if kind == "label" else ""
    raise MezzotintError(
        f"{where} has {found}; expected exactly one, so set data.{kind}_column{remedy} "
        f"(its columns: {', '.join(features)})"
    )


def _class_names(dataset: Any, column: str, where: str) -> tuple[str, ...]:
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if isinstance(dataset, datasets.Dataset) and str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        highest = max((label for label in dataset[column] if label is not None), default=-1)
        return tuple(str(label) for label in range(highest + 1))
    raise MezzotintError(
        f"column {column!r} of {where} is {feature}, not labels; expected ClassLabel, or integers unless streaming, "
        "so set data.label_column to another column or data.labels=false"
    )


def _example_name(where: str, number: int, image: Mapping[str, Any] | None) -> str:
    """Where a person finds the example: its file, when it has one, and its place in the data set."""
    file = (image or {}).get("path")
    return f"{file} (example {number} of {where})" if file else f"example {number} of {where}"
