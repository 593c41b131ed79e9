"""Folders of images, or of videos, whose captions are in a file ``metadata.jsonl``, as Hugging Face's `imagefolder`.

Or in ``metadata.csv`` or ``metadata.parquet``, with the same keys as columns; of images also in text files beside them.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from mezzotint.data.base import DecodedImages, as_captions, content_identity
from mezzotint.data.folder import (
    CAPTION_ENDING,
    IMAGES,
    UNLABELLED,
    FileKind,
    PictureFiles,
    files_below,
    files_content,
    some,
    split_folder,
)
from mezzotint.data.pictures import background_rgb
from mezzotint.data.splits import held_out
from mezzotint.data.transforms import check_channels, check_size
from mezzotint.errors import MezzotintError
from mezzotint.files import parse_json, read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_KEYS = ("text", "caption", "captions")
"""Where captions are looked for, in this order, when no key is given."""


def captioned_folder(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    caption_column: str | None = None,
    test_fraction: float = 0.0,
    max_unreadable: int = 10,
    background: str = "white",
) -> DecodedImages:
    """Images at any depth with a file ``metadata.jsonl``: a line ``{"file_name": ..., "text": ...}`` per image.

    Or one of the other `METADATA`; without one, with a text file ``NAME.txt`` beside each image. The captions
    are a string or a list of strings under `caption_column`, by default the first of `CAPTION_KEYS` that has any;
    several lines about one image add up. Sub-folders called like splits are that (see `folder.split_folder`), each with
    its own file or all with that of `path`; otherwise `test_fraction` of the images is held out. Images become squares
    of `size` pixels by `adm_center_crop`. Raises `MezzotintError` for a missing folder or split, a file that is broken
    (with the line) or does not match the images, and, when indexed, for more than `max_unreadable` unreadable images.
    """
    check_channels(channels)
    check_size(size)
    colour = background_rgb(background)
    folder, root, _ = split_folder(path, split, test_fraction, IMAGES)
    metadata = find_metadata(folder, root)
    if metadata is None:
        samples = captioned_by_texts(root, caption_column)
    else:
        samples = captioned_files(root, metadata, caption_column, IMAGES)
    samples = [samples[i] for i in held_out(len(samples), split, test_fraction)]
    shape = (channels, size, size)
    about = repr(([texts for _, texts in samples], colour)).encode()
    content = [*files_content([file for file, _ in samples], root), about]
    return DecodedImages(
        PictureFiles([(file, -1) for file, _ in samples]),
        image_shape=shape,
        class_names=(),
        identity=content_identity(folder.resolve().name, split, shape, (), content),
        max_unreadable=max_unreadable,
        texts=[captions for _, captions in samples],
        background=colour,
    )


def find_metadata(folder: Path, root: Path) -> Path | None:
    """The file of captions of the split `root` of `folder`: its own, else the folder's."""
    for place in (root, folder):
        there = [name for name in METADATA if (place / name).is_file()]
        if len(there) > 1:
            raise MezzotintError(f"{place} has several files of captions, {', '.join(there)}; keep one of them")
        if there:
            return place / there[0]
    return None


def captioned_files(
    root: Path, metadata: Path, caption_column: str | None, kind: FileKind
) -> list[tuple[str, tuple[str, ...]]]:
    """Paths of the files below `root`, sorted, with their captions. Raises `MezzotintError` where the two differ."""
    files = [file for file, _ in files_below(root, UNLABELLED, kind)]
    names = [_name(os.path.relpath(file, metadata.parent)) for file in files]
    captions = read_metadata(metadata, caption_column, known := set(names))
    inside = "" if root == metadata.parent else root.name + os.sep
    if lost := {name for name in captions if name.startswith(inside)} - known:
        missing = any(not os.path.exists(metadata.parent / name) for name in lost)  # no name is too long for it
        problem = "not there" if missing else f"not read (hidden, or of other endings than {kind.likely}, ...)"
        raise MezzotintError(
            f"{metadata} names {len(lost)} {kind.noun}s that are {problem}: {some(lost)}; add the files or remove "
            "the lines"
        )
    if bare := [name for name in names if name not in captions]:
        raise MezzotintError(
            f"{len(bare)} {kind.noun}s have no caption in {metadata}: {some(bare)}; add a line for each or remove the "
            "files"
        )
    return [(file, tuple(captions[name])) for file, name in zip(files, names, strict=True)]


def captioned_by_texts(root: Path, caption_column: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """Paths of the images below `root`, sorted, each with the text in the file of its name that ends in .txt.

    Raises `MezzotintError` where one has none, or an empty one.
    """
    files = [file for file, _ in files_below(root, UNLABELLED, IMAGES)]
    texts = {file: Path(file).with_suffix(CAPTION_ENDING) for file in files}
    captions = {file: read_text(text).strip() for file, text in texts.items() if text.is_file()}
    if not captions:
        raise MezzotintError(
            f'image folder {root} has no file {METADATA[0]}; write one with a line {{"file_name": ..., "text": ...}} '
            "per image, or NAME.txt beside each image, or use data=folder:PATH for images without captions"
        )
    if caption_column is not None:
        raise MezzotintError(
            f"the captions of {root} are in text files, which have no key {caption_column!r}; leave "
            "data.caption_column out"
        )
    if bare := [os.path.relpath(file, root) for file in files if not captions.get(file)]:
        raise MezzotintError(
            f"{len(bare)} images in {root} have no caption in a text file beside them, as others have: {some(bare)}; "
            "write one of the same name that ends in .txt for each, or remove the images"
        )
    return [(file, (captions[file],)) for file in files]


def read_metadata(metadata: Path, caption_column: str | None, files: Container[str]) -> dict[str, list[str]]:
    """The captions in a file of `METADATA`, by file name: within its folder, as in `files` where it is one of them.

    Raises `MezzotintError`, with the line, for a broken one.
    """
    captions: dict[str, list[str]] = {}
    for where, entry in _entries(metadata, caption_column):
        file = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(file, str):
            raise MezzotintError(f'{where} names no file; expected {{"file_name": ..., "text": ...}}')
        found = caption_in(entry, caption_column)
        if found is None:
            wanted = caption_column or " or ".join(CAPTION_KEYS)
            raise MezzotintError(
                f"{where} has no caption; expected a string or a list of strings under the key {wanted}, not only "
                f"{', '.join(entry)} (see data.caption_column)"
            )
        forms = [file, file.replace("\\", "/")]  # the second: written on Windows
        names = [_name(os.path.relpath(form, metadata.parent) if os.path.isabs(form) else form) for form in forms]
        captions.setdefault(next((name for name in names if name in files), names[0]), []).extend(found)
    return captions


def caption_in(entry: dict[str, Any], caption_column: str | None) -> tuple[str, ...] | None:
    """The captions in a JSON object, under `caption_column` or the first of `CAPTION_KEYS` with any; None without."""
    for key in CAPTION_KEYS if caption_column is None else (caption_column,):
        value = entry.get(key)
        texts = value if isinstance(value, list) else [value]
        if all(text is None or isinstance(text, str) for text in texts) and (found := as_captions(texts)):
            return found
    return None


def _name(path: str) -> str:
    """A path in one spelling: macOS takes accents apart."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _entries(metadata: Path, caption_column: str | None) -> Iterator[tuple[str, Any]]:
    """What a file of captions says, line by line, and where it says it."""
    if metadata.suffix == ".parquet":
        for number, row in enumerate(_parquet_rows(metadata, ("file_name", caption_column, *CAPTION_KEYS)), 1):
            yield f"row {number} of {metadata}", row
        return
    text = read_text(metadata)
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        try:
            for row in reader:
                where = f"line {reader.line_num} of {metadata}"
                if None in row:
                    raise MezzotintError(
                        f"{where} has more fields than the first line; put texts with commas in quotes"
                    )
                yield where, {key: value or None for key, value in row.items()}  # what is empty is null there
        except csv.Error as error:
            raise MezzotintError(f"{metadata} is not CSV after line {reader.line_num} ({error}); mend it") from None
        return
    for number, line in enumerate(text.split("\n"), 1):  # not at U+2028, which JSON may hold
        if line.strip():
            where = f"line {number} of {metadata}"
            try:
                yield where, parse_json(line)
            except ValueError as error:
                raise MezzotintError(f"{where} is not JSON ({error}); expected one object per line") from None


def _parquet_rows(file: Path, columns: Container[str | None]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of those `columns` that it has."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MezzotintError(
            f"{file} needs the library 'pyarrow', which is not installed; install it with: "
            "pip install 'mezzotint[hub]', or write metadata.jsonl"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            there = [name for name in table.schema_arrow.names if name in columns]
            for batch in table.iter_batches(columns=there):
                yield from batch.to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise MezzotintError(f"{file} cannot be read ({error}); write it again as parquet") from None
