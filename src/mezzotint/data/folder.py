"""Folders of image files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mezzotint.data.base import DecodedImages, content_identity
from mezzotint.data.splits import SPLIT_NAMES, held_out, pick_split
from mezzotint.data.transforms import check_channels, check_size
from mezzotint.errors import MezzotintError

UNLABELLED = {"": -1}  # as sub-folder and its label: the folder itself, −1


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
        with Image.open(path) as picture:
            picture.load()
            return picture, label


def image_folder(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    labels: bool = True,
    test_fraction: float = 0.0,
    max_unreadable: int = 10,
) -> DecodedImages:
    """Images in one sub-folder per class, sorted by name, at any depth; with ``labels=False`` in any arrangement.

    When all sub-folders are called train, test, validation, valid or val, they are the splits; otherwise
    `test_fraction` of the images is held out (see `held_out`). Images become squares of `size` pixels by
    `adm_center_crop`. Raises `MezzotintError` for a folder that is missing, empty, without classes or without the
    split, and, when indexed, for more than `max_unreadable` unreadable images.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MezzotintError(f"image folder {folder} does not exist; set data.path to a folder of images")
    check_channels(channels)
    check_size(size)
    inside, split_names = _subfolders(folder), {name for names in SPLIT_NAMES.values() for name in names}
    has_splits = "train" in inside and split_names.issuperset(inside)
    parts = {name: folder / name for name in inside} if has_splits else {"train": folder}
    root = pick_split(parts, split, test_fraction, f"image folder {folder}")

    # The classes are those of the training images, so that a label means the same in every split.
    class_names = tuple(_subfolders(parts["train"])) if labels else ()
    samples = _labelled(root, class_names, own_classes=root == parts["train"]) if labels else _images(root, UNLABELLED)
    samples = [samples[i] for i in held_out(len(samples), split, test_fraction)]

    shape = (channels, size, size)
    sizes = (os.path.getsize(file) if os.path.exists(file) else 0 for file, _ in samples)  # 0: a broken link
    content = (f"{os.path.relpath(file, root)}\0{n}".encode() for (file, _), n in zip(samples, sizes, strict=True))
    return DecodedImages(
        PictureFiles(samples),
        image_shape=shape,
        class_names=class_names,
        identity=content_identity(folder.resolve().name, split, shape, class_names, content),
        max_unreadable=max_unreadable,
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path, labels: Mapping[str, int]) -> list[tuple[str, int]]:
    """Paths of the images below the sub-folders that `labels` names, by sub-folder and then by path, with labels."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # seconds to import

    samples: list[tuple[str, int]] = make_dataset(root, labels, IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise MezzotintError(
            f"image folder {root} holds no images; expected files like {', '.join(IMG_EXTENSIONS)}, so check data.path"
        )
    return samples


def _labelled(root: Path, class_names: Sequence[str], own_classes: bool) -> list[tuple[str, int]]:
    if not class_names:
        images = _images(root, UNLABELLED)
        raise MezzotintError(
            f"image folder {root} holds {len(images)} images but no sub-folders; expected one sub-folder per class, "
            "so sort the images into classes or set data.labels=false"
        )
    if strange := set(_subfolders(root)) - set(class_names):
        raise MezzotintError(
            f"image folder {root} has classes that the training images lack: {', '.join(sorted(strange))}; "
            "remove them or add training images"
        )
    labels = {name: label for label, name in enumerate(class_names)}
    samples = _images(root, labels)
    found = {label for _, label in samples}
    empty = [name for name, label in labels.items() if label not in found]
    if own_classes and empty:
        raise MezzotintError(
            f"image folder {root} holds no images of the classes {', '.join(empty)}; add some or remove the sub-folders"
        )
    return samples
