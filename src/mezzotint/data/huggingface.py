"""Data sets of the Hugging Face hub, or in its formats on disk, through the library `datasets` (the extra ``hub``)."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mezzotint.data.base import DecodedImages, Example, ShuffledStream, as_captions, content_identity
from mezzotint.data.folder import some
from mezzotint.data.pictures import background_rgb, read_picture
from mezzotint.data.splits import held_out, pick_split, split_of
from mezzotint.data.transforms import check_channels, check_size, picture_to_tensor
from mezzotint.errors import MezzotintError, closest
from mezzotint.files import content_digests

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]  # its image still encoded: {"bytes": ..., "path": ...}, one of them perhaps None

STREAM_ROWS, SET_ROWS = 16, 256  # whose images are in the identity, of a stream its first, of a set all over it
CHUNK = 100_000  # rows of a column that are looked through at a time
MAX_SPARSE_CLASSES = 1000  # numbered classes that may be more than there are images
CAPTION_MISSING = "the caption is missing"


@dataclass(frozen=True)
class Columns:
    """Where a row keeps its image, its label and its captions."""

    image: str
    label: str | None
    caption: str | None
    class_names: tuple[str, ...]

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
        if self.caption is not None and not as_captions(row[self.caption]):
            raise ValueError(CAPTION_MISSING)
        return _read_image(row[self.image]), label

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
        return Example(picture_to_tensor(picture, self.image_shape, self.background), label, captions)

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
    background: str = "white",
) -> DecodedImages | HubStream:
    """A data set by its name on the hub, or in a folder: written by ``save_to_disk``, or with parquet or image files.

    Columns are recognised by type, `Image` and `ClassLabel`, when they are not given; `label_column` may also hold
    integers, unless streaming. `caption_column` holds a text or a list of texts per image; with it, a column of labels
    may be missing, and an image without a text counts as unreadable. Images become squares of `size` pixels by
    `adm_center_crop`, on the colour `background`. A test split is the set's own (test, else validation; with `labels`
    one whose labels are known) or `test_fraction` of the training images. With `streaming` nothing is stored, and the
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
    colour = background_rgb(background)
    if streaming and test_fraction:
        raise MezzotintError("a stream cannot hold images out for testing; set data.test_fraction=0 or streaming=false")
    where = f"Hugging Face data set {path}"
    parts = _load_parts(path, config, streaming)

    def labelled(part: Any) -> bool:
        names = [label_column] if label_column else _label_columns(part.features or {})
        return not labels or len(names) != 1 or _has_labels(part, names[0])

    part = pick_split(parts, split, test_fraction, where, labelled)

    image = _image_column(part.features or {}, image_column, where)
    label: str | None = None
    class_names: tuple[str, ...] = ()
    features = part.features or {}
    caption = None if caption_column is None else _caption_column(features, caption_column, where)
    if labels and (label_column or caption is None or _label_columns(features)):
        label = _label_column(features, label_column, where)
        training = next((part for name, part in parts.items() if split_of(name, within=True) == "train"), part)
        class_names = _class_names(training, label, where)
        _check_labels(part, label, len(class_names), where)
    columns = Columns(image, label, caption, class_names)
    part = part.select_columns(columns.names).cast_column(image, datasets.Image(decode=False))

    shape = (channels, size, size)
    name = f"{Path(path).name}-{config}" if config else Path(path).name

    def identity(content: Iterable[bytes]) -> str:
        return content_identity(name, split, shape, class_names, [repr(colour).encode(), *content])

    if isinstance(part, datasets.IterableDataset):
        first = list(part.take(STREAM_ROWS))
        if not first:
            raise MezzotintError(f"{where} holds no images in its {split} split; choose another split or data set")
        return HubStream(
            part,
            columns,
            str(path),
            shuffle_buffer,
            image_shape=shape,
            identity=identity(map(columns.content, first)),
            max_unreadable=max_unreadable,
            background=colour,
        )

    part = part.select(held_out(len(part), split, test_fraction))
    images = DecodedImages(
        HubPictures(part, columns, str(path)),
        image_shape=shape,
        class_names=class_names,
        identity=identity(_content(part, columns)),
        max_unreadable=max_unreadable,
        texts=part[caption] if caption else None,
        background=colour,
    )
    if caption is not None:
        bare = _without_caption(part, caption)
        if len(bare) > max_unreadable:
            raise MezzotintError(
                f"{len(bare)} of {len(part)} images of {where} have no caption in the column {caption!r}, example "
                f"{bare[0]} among them, and at most {max_unreadable} may be skipped; add captions, or raise "
                "data.max_unreadable"
            )
        for index in bare:
            images.report(index, ValueError(CAPTION_MISSING))
    return images


def _content(part: datasets.Dataset, columns: Columns) -> Iterator[bytes]:
    """Of a set on disk: every label, caption and image file, the size of every image that is in the set, and some.

    To read all of those would be to read the set.
    """
    import pyarrow.compute as pc

    others = [name for name in (columns.label, columns.caption) if name is not None]
    yield repr([part[name][:] for name in others]).encode()
    images, order = part.data.column(columns.image), part._indices  # before rows were chosen
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).fill_null(-1)
    paths = pc.if_else(pc.equal(sizes, -1), pc.struct_field(images, "path"), None)
    if order is not None:
        sizes, paths = sizes.take(order.column(0)), paths.take(order.column(0))
    yield sizes.to_numpy().astype("<i8").tobytes()
    yield b"".join(content_digests([path for path in paths.to_pylist() if path is not None]))
    rows = np.linspace(0, len(part) - 1, num=min(SET_ROWS, len(part)), dtype=int)
    yield from map(columns.content, part.select(rows))


def _load_parts(path: str | Path, config: str | None, streaming: bool) -> Mapping[str, Any]:
    """The splits of the data set, by its own names for them."""
    import datasets

    folder = Path(path).expanduser()
    saved_splits, saved = (folder / "dataset_dict.json").is_file(), (folder / "state.json").is_file()
    try:
        if saved or saved_splits:
            loaded = datasets.load_from_disk(str(folder))
            for part in loaded.values() if saved_splits else [loaded]:
                part.data.validate(full=True)  # offsets that point outside of a damaged file would end the process
        elif folder.is_dir():
            if glob.has_magic(str(folder)):
                raise MezzotintError(
                    f"{folder} has *, ? or [ in its name, which the library 'datasets' takes for a pattern; rename it, "
                    "or link to it from elsewhere"
                )
            builder = datasets.load_dataset_builder(str(folder), config)
            _check_nothing_hidden(folder, builder.config.data_files)
            if streaming:
                return dict(builder.as_streaming_dataset())
            builder.download_and_prepare()
            return dict(builder.as_dataset())
        else:
            return dict(datasets.load_dataset(str(path), config, streaming=streaming))
    except MezzotintError:
        raise
    except Exception as error:  # `datasets` has a dozen unrelated types for a wrong name, no network, a broken file...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MezzotintError(
            f"Hugging Face data set {path} cannot be loaded ({reason}); expected a name on the hub within reach, or a "
            "folder that was written by save_to_disk or holds parquet or image files"
        ) from error
    parts = loaded if saved_splits else {"train": loaded}
    return {name: part.to_iterable_dataset() for name, part in parts.items()} if streaming else parts


def _check_nothing_hidden(folder: Path, data_files: Mapping[Any, Sequence[str]] | None) -> None:
    """Raises `MezzotintError` where `datasets` leaves out files of `folder`: once one has a split in its name.

    Not where a README.md says which files belong to which split.
    """
    taken = {os.path.relpath(file, folder.absolute()) for files in (data_files or {}).values() for file in files}
    endings = {os.path.splitext(file)[1] for file in taken} - {".json", ".jsonl", ".csv", ".txt"}
    readme = folder / "README.md"
    if readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace"):
        return
    hidden = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files = [os.path.relpath(os.path.join(place, name), folder) for name in names if name[0] != "."]
        hidden += [file for file in files if os.path.splitext(file)[1] in endings and file not in taken]
    if hidden:
        splits = ", ".join(map(str, data_files or {}))
        raise MezzotintError(
            f"the names of {len(taken)} files in {folder} tell of splits ({splits}), so the library 'datasets' would "
            f"leave out the other {len(hidden)}: {some(hidden)}; name all or none of them so, or read images by "
            f"data=folder:{folder}"
        )


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
    if isinstance(dataset, datasets.Dataset) and _is_integer(feature):
        highest = int(_integers(dataset, column).max(initial=-1))
        if highest >= max(len(dataset), MAX_SPARSE_CLASSES):
            raise MezzotintError(
                f"column {column!r} of {where} has the label {highest}, but there are {len(dataset)} images; expected "
                "classes numbered from 0 without gaps"
            )
        return tuple(str(label) for label in range(highest + 1))
    raise MezzotintError(
        f"column {column!r} of {where} is {feature}, not labels; expected ClassLabel, or integers unless streaming, "
        "so set data.label_column to another column or data.labels=false"
    )


def _is_integer(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _has_labels(part: Any, column: str) -> bool:
    """Whether one label at least is known, of a stream one of the first; true for what is no column of labels."""
    import datasets

    if not _is_integer((part.features or {}).get(column)):
        return True
    if isinstance(part, datasets.IterableDataset):
        first = [row[column] for row in part.select_columns([column]).take(STREAM_ROWS)]
        return not first or any(label is not None and label >= 0 for label in first)
    return len(part) == 0 or bool((_integers(part, column) >= 0).any())


def _check_labels(part: Any, column: str, num_classes: int, where: str) -> None:
    """Raises `MezzotintError` for labels that are no class; in a stream they are found when they come."""
    import datasets

    if isinstance(part, datasets.Dataset):
        labels = _integers(part, column)
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
            raise MezzotintError(
                f"column {column!r} of {where} has the label {labels[wrong[0]]}, expected 0 to {num_classes - 1}, in "
                f"example {wrong[0]}, one of {len(wrong)} that are no class; mend the data set or set data.labels=false"
            )


def _column(part: datasets.Dataset, column: str) -> Iterator[Any]:
    """A column as arrays of pyarrow, of `CHUNK` rows each."""
    table = part.select_columns([column]).with_format("arrow")
    for start in range(0, len(table), CHUNK):
        yield table[start : start + CHUNK][column].combine_chunks()


def _integers(part: datasets.Dataset, column: str) -> np.ndarray:
    """A column of integers, int64 (N,), −1 for null."""
    chunks = [chunk.cast("int64", safe=False).fill_null(-1).to_numpy() for chunk in _column(part, column)]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int64)


def _without_caption(part: datasets.Dataset, column: str) -> list[int]:
    """The rows whose caption is null, an empty list, or a list of nulls."""
    chunks = (text for chunk in _column(part, column) for text in chunk.to_pylist())
    return [number for number, text in enumerate(chunks) if not as_captions(text)]


def _read_image(image: Mapping[str, Any]) -> Image.Image:
    """The picture of a row: its bytes, or the file that it names, here or on the hub."""
    if image["bytes"] is not None:
        return read_picture(io.BytesIO(image["bytes"]))
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:
        return read_picture(io.BytesIO(file.read()))


def _example_name(where: str, number: int, image: Mapping[str, Any] | None) -> str:
    """Where a person finds the example: its file, when it has one, and its place in the data set."""
    file = (image or {}).get("path")
    return f"{file} (example {number} of {where})" if file else f"example {number} of {where}"
