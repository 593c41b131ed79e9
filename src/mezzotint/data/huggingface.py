"""Data sets of the Hugging Face hub, or in its formats on disk, through the library `datasets` (the extra ``hub``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mezzotint.data.base import DecodedImages, Example, ShuffledStream, as_captions, content_identity
from mezzotint.data.splits import held_out, pick_split
from mezzotint.data.transforms import check_channels, check_size, picture_to_tensor
from mezzotint.errors import MezzotintError, closest

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]  # its image still encoded: {"bytes": ..., "path": ...}, one of them perhaps None

IDENTITY_ROWS = 16  # that the identity is a digest of


@dataclass(frozen=True)
class Columns:
    """Where a row keeps its image, its label and its captions, and how to decode them."""

    image: str
    label: str | None
    caption: str | None
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
        for kind, column in (("image", self.image), ("caption", self.caption)):
            if column is not None and (row[column] is None or row[column] == []):
                raise ValueError(f"the {kind} is missing")
        return self.decoder.decode_example(row[self.image]), label

    def content(self, row: Row) -> bytes:
        """What is in `row`, the same on every machine."""
        image = row[self.image] or {"bytes": None, "path": None}
        label = None if self.label is None else row[self.label]
        picture = (image["bytes"] or Path(image["path"] or "").name.encode()) + repr(label).encode()
        return picture if self.caption is None else picture + repr(row[self.caption]).encode()

    @property
    def names(self) -> list[str]:
        """Of all columns in use."""
        return [name for name in (self.image, self.label, self.caption) if name is not None]


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


class HubStream(ShuffledStream):
    """An `ImageStream` over a streamed data set; see `hugging_face`."""

    def __init__(
        self, dataset: datasets.IterableDataset, columns: Columns, where: str, shuffle_buffer: int, **about: Any
    ) -> None:
        super().__init__(class_names=columns.class_names, **about)
        self.dataset, self.columns, self.where, self.shuffle_buffer = dataset, columns, where, shuffle_buffer

    @property
    def has_captions(self) -> bool:
        return self.columns.caption is not None

    def rows(self, epoch: int, seed: int) -> Iterator[Row]:
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        shuffled.set_epoch(epoch)
        yield from shuffled

    def decode_row(self, row: Row) -> Example:
        picture, label = self.columns.decode(row)
        captions = () if self.columns.caption is None else as_captions(row[self.columns.caption])
        return Example(picture_to_tensor(picture, self.image_shape), label, captions)

    def row_name(self, row: Row, number: int) -> str:
        return _example_name(self.where, number, row[self.columns.image])


def hugging_face(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    labels: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    config: str | None = None,
    test_fraction: float = 0.0,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    max_unreadable: int = 10,
) -> DecodedImages | HubStream:
    """A data set by its name on the hub, or in a folder: written by ``save_to_disk``, or with parquet or image files.

    Columns are recognised by type, `Image` and `ClassLabel`, when they are not given; `label_column` may also hold
    integers, unless streaming. `caption_column` holds a text or a list of texts per image; with it, a column of labels
    may be missing. Images become squares of `size` pixels by `adm_center_crop`. A test split is the set's
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
    features = part.features or {}
    caption = None if caption_column is None else _caption_column(features, caption_column, where)
    if labels and (label_column or caption is None or _label_columns(features)):
        label = _label_column(features, label_column, where)
        class_names = _class_names(parts.get("train", part), label, where)
    columns = Columns(image, label, caption, class_names, datasets.Image())
    part = part.select_columns(columns.names).cast_column(image, datasets.Image(decode=False))

    shape = (channels, size, size)
    name = f"{Path(path).name}-{config}" if config else Path(path).name

    def identity(rows: Iterable[Row], length: int | None) -> str:
        content = [str(length).encode(), *map(columns.content, rows)]
        return content_identity(name, split, shape, class_names, content)

    if isinstance(part, datasets.IterableDataset):
        first = list(part.take(IDENTITY_ROWS))
        if not first:
            raise MezzotintError(f"{where} holds no images in its {split} split; choose another split or data set")
        return HubStream(
            part,
            columns,
            str(path),
            shuffle_buffer,
            image_shape=shape,
            identity=identity(first, None),
            max_unreadable=max_unreadable,
        )

    part = part.select(held_out(len(part), split, test_fraction))
    some = np.linspace(0, len(part) - 1, num=min(IDENTITY_ROWS, len(part)), dtype=int)
    return DecodedImages(
        HubPictures(part, columns, str(path)),
        image_shape=shape,
        class_names=class_names,
        identity=identity(part.select(some), len(part)),
        max_unreadable=max_unreadable,
        texts=part[caption] if caption else None,
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
    if wanted is None:
        return _only(_label_columns(features), features, "label", where)
    return _known_column(features, wanted, "label", where)


def _label_columns(features: Mapping[str, Any]) -> list[str]:
    import datasets

    return [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]


def _caption_column(features: Mapping[str, Any], wanted: str, where: str) -> str:
    feature = features[_known_column(features, wanted, "caption", where)]
    texts = (
        feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    )  # of a list, what is in it
    if getattr(texts, "dtype", None) not in ("string", "large_string"):
        raise MezzotintError(
            f"column {wanted!r} of {where} is {feature}, not captions; expected strings or lists of strings, so set "
            "data.caption_column to another column"
        )
    return wanted


def _known_column(features: Mapping[str, Any], wanted: str, kind: str, where: str) -> str:
    if wanted not in features:
        raise MezzotintError(f"{where} has no column {wanted!r}; {closest(wanted, features)} (set data.{kind}_column)")
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
