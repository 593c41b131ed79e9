"""What the data say where a recipe leaves it open: classes, colours, a part to hold out, and captions left unused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mezzotint.data.base import DecodedImages, ImageDataset, ImageStream
from mezzotint.data.captions import find_metadata
from mezzotint.data.folder import CAPTION_ENDING, IMAGES, UNLABELLED, FileKind, files_below, split_folder
from mezzotint.data.pictures import flatten, is_grey

LOOKED_AT = 64
"""Pictures that are looked at for colours, from all over the data set."""
NEARLY_GREY = 8
"""Levels by which the colours of a pixel may differ that is grey but for what JPEG made of it."""
ENOUGH = 100
"""Images of a data set without a test split from which on `HELD_OUT` of them are held out."""
HELD_OUT = 0.1


def in_classes(path: str | Path, kind: FileKind = IMAGES) -> bool:
    """Whether most files of a folder, or of its training split, lie in two sub-folders of it or more: in classes.

    Raises `MezzotintError` for a folder that is missing or empty.
    """
    _, _, training = split_folder(path, "train", 0, kind)
    places = [Path(file).relative_to(training).parts for file, _ in files_below(training, UNLABELLED, kind)]
    inside = [folder for folder, *names in places if names]
    return len(set(inside)) > 1 and 2 * len(inside) > len(places)


def all_grey(dataset: ImageDataset | ImageStream) -> bool:
    """Whether up to `LOOKED_AT` of the pictures are grey, whatever their files could hold. A stream is not looked at.

    Of clips the first frames; unreadable pictures say nothing. Data sets in memory have to be loaded in colour.
    """
    if isinstance(dataset, ImageStream):
        return False
    numbers = torch.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset)), dtype=torch.float64).long().tolist()
    if not isinstance(dataset, DecodedImages):
        return all((image == image[..., :1, :, :]).all() for image, _ in map(dataset.__getitem__, numbers))
    return all(_grey(dataset, number) for number in numbers)


def _grey(dataset: DecodedImages, number: int) -> bool:
    try:
        found, _ = dataset.pictures.read(number)
    except Exception:  # whoever wants its pixels reports it
        return True
    picture = found if isinstance(found, Image.Image) else found[0]
    if is_grey(picture):
        return True
    picture.thumbnail((64, 64))
    levels = np.asarray(flatten(picture, "RGB", dataset.background)).astype(np.int16)
    return bool((levels.max(-1) - levels.min(-1)).max() <= NEARLY_GREY)


def share_to_hold_out(train: ImageDataset | ImageStream) -> float:
    """The share of a data set without a test split of its own that is held out where nothing is said."""
    return HELD_OUT if isinstance(train, ImageDataset) and len(train) >= ENOUGH else 0.0


def captions_beside(path: str | Path) -> str:
    """The captions in or beside the image folder `path`, for a sentence; nothing where there are none."""
    folder, root, _ = split_folder(path, "train", 0, IMAGES)
    if metadata := find_metadata(folder, root):
        return str(metadata)
    first, _ = files_below(root, UNLABELLED, IMAGES)[0]
    text = Path(first).with_suffix(CAPTION_ENDING)
    return str(text) if text.is_file() else ""
