"""Folders of image files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mezzotint.data.base import DecodedImages, content_identity
from mezzotint.data.listing import LeftAside, subfolders, walk, warn_once
from mezzotint.data.pictures import ENDINGS, background_rgb, read_picture
from mezzotint.data.splits import held_out, pick_split, split_of
from mezzotint.data.transforms import check_channels, check_size
from mezzotint.errors import MezzotintError
from mezzotint.files import content_digests, name_bytes

UNLABELLED = {"": -1}  # as sub-folder and its label: the folder itself, −1
METADATA = "metadata."  # how the names of files of captions begin
CAPTION_ENDING = ".txt"  # of a file beside an image, of the same name, that holds its caption


class FileKind(NamedTuple):
    """What a folder holds: its name, and the endings of the files."""

    noun: str
    endings: tuple[str, ...]

    @property
    def likely(self) -> str:
        """Some of the endings, for an error."""
        return ", ".join(self.endings[:6])


IMAGES = FileKind("image", ENDINGS)


@dataclass(frozen=True)
class PictureFiles:
    """Image files and their labels, for `DecodedImages`."""

    samples: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_picture(path), label


def image_folder(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    labels: bool = True,
    test_fraction: float = 0.0,
    max_unreadable: int = 10,
    background: str = "white",
) -> DecodedImages:
    """Images in one sub-folder per class, sorted by name, at any depth; with ``labels=False`` in any arrangement.

    When all sub-folders with images are called like splits (see `splits.split_of`), they are that; otherwise
    `test_fraction` of the images is held out (see `held_out`). Images become squares of `size` pixels by
    `adm_center_crop`, on the colour `background` where they are transparent. Raises `MezzotintError` for a folder that
    is missing, empty, without classes or without the split, a colour that is none, and, when indexed, for more than
    `max_unreadable` unreadable images.
    """
    check_channels(channels)
    check_size(size)
    colour = background_rgb(background)
    folder, root, training = split_folder(path, split, test_fraction, IMAGES, labels)
    class_names, samples = classified_files(root, training, IMAGES, labels)
    samples = [samples[i] for i in held_out(len(samples), split, test_fraction)]

    shape = (channels, size, size)
    content = [*files_content([file for file, _ in samples], root), repr(colour).encode()]
    return DecodedImages(
        PictureFiles(samples),
        image_shape=shape,
        class_names=class_names,
        identity=content_identity(folder.resolve().name, split, shape, class_names, content),
        max_unreadable=max_unreadable,
        background=colour,
    )


def split_folder(
    path: str | Path, split: str, test_fraction: float, kind: FileKind, labels: bool = False
) -> tuple[Path, Path, Path]:
    """The folder `path`, the folder within to take `split` from, perhaps itself, and that of the training files.

    With `labels` a split without classes is none. Raises `MezzotintError` for a folder that does not exist, lacks the
    split, or has sub-folders that may be splits or classes.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MezzotintError(f"{kind.noun} folder {folder} does not exist; set data.path to a folder of {kind.noun}s")
    where = f"{kind.noun} folder {folder}"
    parts = {name: folder / name for name in _split_names(folder, kind, where)} or {"train": folder}
    labelled = (lambda part: bool(subfolders(part))) if labels and len(parts) > 1 else None
    chosen = pick_split(parts, split, test_fraction, where, labelled)
    training = next((part for name, part in parts.items() if split_of(name, within=True) == "train"), chosen)
    return folder, chosen, training


def _split_names(folder: Path, kind: FileKind, where: str) -> list[str]:
    """The sub-folders of `folder` that are its splits; none where they are classes, or anything else.

    Raises `MezzotintError` where they may be either.
    """
    inside = subfolders(folder)
    named = [name for name in inside if split_of(name)]
    company = [name for name in inside if name not in named and _holds_any(folder / name, kind)] if named else []
    if named and not company:
        return named
    if {split_of(name) for name in named} == {"train", "test"}:
        raise MezzotintError(
            f"{where} has splits, {', '.join(named)}, and {kind.noun}s beside them, in {some(company)}; expected "
            "splits alone, so move the others, or set data.path to another folder"
        )
    if {split_of(name, within=True) for name in inside} == {"train", "test"}:
        return inside
    if named:
        warn_once(f"{where}: {some(named)} is taken for a class, not for a split, beside {some(company)}")
    return []


def _holds_any(folder: Path, kind: FileKind) -> bool:
    return any(name.lower().endswith(kind.endings) for _, names in walk(folder, LeftAside()) for name in names)


def classified_files(
    root: Path, training: Path, kind: FileKind, labels: bool
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Names of the classes, and paths and labels of the files below `root`; without `labels` no names, and −1.

    Raises `MezzotintError` where there are no files or, with `labels`, no classes.
    """
    if not labels:
        return (), files_below(root, UNLABELLED, kind)
    # The classes are those of the training files, so that a label means the same in every split.
    class_names = tuple(subfolders(training))
    for name in class_names:
        inside = [split for split in subfolders(training / name) if split_of(split)]
        if {split_of(split) for split in inside} == {"train", "test"}:
            raise MezzotintError(
                f"{kind.noun} folder {training} has splits inside of {name}: {', '.join(inside)}; expected classes "
                f"inside of splits, so move them, or set data.path to {training / name}"
            )
    return class_names, _labelled(root, class_names, kind, own_classes=root == training)


def files_below(root: Path, labels: Mapping[str, int], kind: FileKind) -> list[tuple[str, int]]:
    """Paths of the files below the sub-folders that `labels` names, by sub-folder and then by path, with labels.

    What else is there is counted in one warning. Raises `MezzotintError` where there are no such files.
    """
    left = LeftAside()
    found: list[tuple[str, str, list[str]]] = []  # sub-folder, folder, names
    for folder, names in walk(root, left):
        inside = os.path.relpath(folder, root)
        label = "" if "" in labels or inside == os.curdir else inside.split(os.sep)[0]
        taken: list[str] = []
        captions = {os.path.splitext(name)[0] + CAPTION_ENDING for name in names if name.lower().endswith(kind.endings)}
        for name in names:
            if not name.lower().endswith(kind.endings):
                if not name.startswith(METADATA) and name not in captions:
                    left.add("files with other endings", os.path.normpath(os.path.join(inside, name)))
            elif label not in labels:
                left.add(f"{kind.noun}s outside of the folders of classes", name)
            else:
                taken.append(os.path.join(folder, name))
        found.append((label, folder, taken))
    left.report(f"{kind.noun} folder {root}")
    samples = [(file, labels[label]) for label, _, taken in sorted(found) for file in taken]
    if not samples:
        raise MezzotintError(
            f"{kind.noun} folder {root} holds no {kind.noun}s; expected files like {kind.likely}, so check data.path"
        )
    return samples


def files_content(files: Sequence[str], root: Path) -> list[bytes]:
    """What tells files from others: of each its path within `root` and a digest of its content."""
    names = [name_bytes(os.path.relpath(file, root)) for file in files]
    return [name + b"\0" + digest for name, digest in zip(names, content_digests(files), strict=True)]


def some(names: Collection[str]) -> str:
    """The first three names, for a sentence."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _labelled(root: Path, class_names: Sequence[str], kind: FileKind, own_classes: bool) -> list[tuple[str, int]]:
    noun = kind.noun
    if not class_names:
        files = files_below(root, UNLABELLED, kind)
        raise MezzotintError(
            f"{noun} folder {root} holds {len(files)} {noun}s but no sub-folders; expected one sub-folder per class, "
            f"so sort the {noun}s into classes or set data.labels=false"
        )
    if strange := set(subfolders(root)) - set(class_names):
        raise MezzotintError(
            f"{noun} folder {root} has classes that the training {noun}s lack: {', '.join(sorted(strange))}; "
            f"remove them or add training {noun}s"
        )
    labels = {name: label for label, name in enumerate(class_names)}
    samples = files_below(root, labels, kind)
    found = {label for _, label in samples}
    empty = [name for name, label in labels.items() if label not in found]
    if own_classes and empty:
        raise MezzotintError(
            f"{noun} folder {root} holds no {noun}s of the classes {', '.join(empty)}; add some or remove the "
            "sub-folders"
        )
    return samples
