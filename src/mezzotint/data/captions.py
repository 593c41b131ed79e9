"""Folders of images, or of videos, whose captions are in a file ``metadata.jsonl``, as Hugging Face's `imagefolder`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mezzotint.data.base import DecodedImages, as_captions, content_identity
from mezzotint.data.folder import IMAGES, UNLABELLED, FileKind, PictureFiles, file_content, files_below, split_folder
from mezzotint.data.splits import held_out
from mezzotint.data.transforms import check_channels, check_size
from mezzotint.errors import MezzotintError

METADATA = "metadata.jsonl"
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
) -> DecodedImages:
    """Images at any depth with a file ``metadata.jsonl``: a line ``{"file_name": ..., "text": ...}`` per image.

    The captions are a string or a list of strings under `caption_column`, by default the first of `CAPTION_KEYS`;
    several lines about one image add up. Sub-folders train and test are splits, each with its own file or all with
    that of `path`; otherwise `test_fraction` of the images is held out. Images become squares of `size` pixels by
    `adm_center_crop`. Raises `MezzotintError` for a missing folder or split, a file that is broken (with the line) or
    does not match the images, and, when indexed, for more than `max_unreadable` unreadable images.
    """
    check_channels(channels)
    check_size(size)
    folder, root, _ = split_folder(path, split, test_fraction, IMAGES)
    metadata = find_metadata(folder, root)
    if metadata is None:
        raise MezzotintError(
            f'image folder {root} has no file {METADATA}; write one with a line {{"file_name": ..., "text": ...}} per '
            "image, or use data=folder:PATH for images without captions"
        )
    samples = captioned_files(root, metadata, caption_column, IMAGES)
    samples = [samples[i] for i in held_out(len(samples), split, test_fraction)]
    shape = (channels, size, size)
    content = (file_content(file, root) + repr(captions).encode() for file, captions in samples)
    return DecodedImages(
        PictureFiles([(file, -1) for file, _ in samples]),
        image_shape=shape,
        class_names=(),
        identity=content_identity(folder.resolve().name, split, shape, (), content),
        max_unreadable=max_unreadable,
        texts=[captions for _, captions in samples],
    )


def find_metadata(folder: Path, root: Path) -> Path | None:
    """The file of captions of the split `root` of `folder`: its own, else the folder's."""
    return next((place / METADATA for place in (root, folder) if (place / METADATA).is_file()), None)


def captioned_files(
    root: Path, metadata: Path, caption_column: str | None, kind: FileKind
) -> list[tuple[str, tuple[str, ...]]]:
    """Paths of the files below `root`, sorted, with their captions. Raises `MezzotintError` where the two differ."""
    files = [file for file, _ in files_below(root, UNLABELLED, kind)]
    captions = read_metadata(metadata, caption_column)
    names = [os.path.relpath(file, metadata.parent) for file in files]
    inside = "" if root == metadata.parent else root.name + os.sep
    if lost := {name for name in captions if name.startswith(inside)} - set(names):
        raise MezzotintError(
            f"{metadata} names {len(lost)} {kind.noun}s that are not there: {_some(lost)}; add the files or remove "
            "the lines"
        )
    if bare := [name for name in names if name not in captions]:
        raise MezzotintError(
            f"{len(bare)} {kind.noun}s have no caption in {metadata}: {_some(bare)}; add a line for each or remove the "
            "files"
        )
    return [(file, tuple(captions[name])) for file, name in zip(files, names, strict=True)]


def read_metadata(metadata: Path, caption_column: str | None) -> dict[str, list[str]]:
    """The captions in a ``metadata.jsonl``, by file name. Raises `MezzotintError`, with the line, for a broken one."""
    captions: dict[str, list[str]] = {}
    try:
        lines = metadata.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise MezzotintError(f"{metadata} cannot be read ({error}); write it again as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {metadata}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise MezzotintError(f"{where} is not JSON ({error}); expected one object per line") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise MezzotintError(f'{where} names no file; expected {{"file_name": ..., "text": ...}}')
        found = caption_in(entry, caption_column)
        if found is None:
            wanted = caption_column or " or ".join(CAPTION_KEYS)
            raise MezzotintError(
                f"{where} has no caption; expected a string or a list of strings under the key {wanted}, not only "
                f"{', '.join(entry)} (see data.caption_column)"
            )
        captions.setdefault(os.path.normpath(entry["file_name"]), []).extend(found)
    return captions


def caption_in(entry: dict[str, Any], caption_column: str | None) -> tuple[str, ...] | None:
    """The captions in a JSON object, under `caption_column` or the first of `CAPTION_KEYS`; None without any."""
    keys = CAPTION_KEYS if caption_column is None else (caption_column,)
    value = next((entry[key] for key in keys if key in entry), None)
    if isinstance(value, str) or (value and isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return as_captions(value)
    return None


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
