"""Data sets by name, and the order in which training meets them.

>>> dataset = load("digits", "train")
>>> order = BatchOrder.over(dataset, batch_size=64, seed=0)
>>> batch = next(iterate_batches(dataset, order, start_step=0, stop_step=1000))
"""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from mezzotint.data.base import CaptionedDataset, Example, ImageDataset, ImageStream, InMemoryImages
from mezzotint.data.captions import captioned_folder
from mezzotint.data.digit_clips import MovingDigits, moving_digits
from mezzotint.data.emoji_font import emoji
from mezzotint.data.folder import image_folder
from mezzotint.data.huggingface import hugging_face
from mezzotint.data.idx_files import idx
from mezzotint.data.latents import CachedLatents, cached_latents, encode_dataset
from mezzotint.data.loader import (
    Batch,
    BatchOrder,
    captions_of,
    check_captions,
    choose_captions,
    has_captions,
    iterate_batches,
)
from mezzotint.data.sklearn_digits import digits
from mezzotint.data.tar_shards import web_dataset
from mezzotint.data.video import video_folder
from mezzotint.errors import MezzotintError, closest, shortened

__all__ = [
    "SOURCES",
    "Batch",
    "BatchOrder",
    "CachedLatents",
    "CaptionedDataset",
    "Example",
    "ImageDataset",
    "ImageStream",
    "InMemoryImages",
    "MovingDigits",
    "cached_latents",
    "captioned_folder",
    "captions_of",
    "check_captions",
    "choose_captions",
    "digits",
    "emoji",
    "encode_dataset",
    "has_captions",
    "hugging_face",
    "idx",
    "image_folder",
    "iterate_batches",
    "load",
    "moving_digits",
    "video_folder",
    "web_dataset",
]

#: those of SOURCES whose path is a folder on this machine
OF_FOLDERS = ("folder", "captions", "video", "latents")
SOURCES: dict[str, Callable[..., ImageDataset | ImageStream]] = {
    "digits": digits,
    "idx": idx,
    "folder": image_folder,
    "captions": captioned_folder,
    "webdataset": web_dataset,
    "huggingface": hugging_face,
    "emoji": emoji,
    "moving-digits": moving_digits,
    "video": video_folder,
    "latents": cached_latents,
}
"""Every data set that `load` knows: a function of `split` and of the options in its signature."""


def unknown(name: str) -> str:
    """The sentence on a data set that there is not: one of this name is close, or a folder lies there."""
    hint = f"a folder of pictures is data=folder:{name}" if os.path.isdir(name) else closest(name, SOURCES)
    return f"data set {shortened(name)} is unknown; {hint}"


def load(name: str = "digits", split: str = "train", **options: Any) -> ImageDataset | ImageStream:
    """The data set `name` of `SOURCES`, one split of it.

    An option of ``None`` counts as not given. Raises `MezzotintError` for an unknown name, an option that the data set
    does not take, or a missing one.
    """
    if name not in SOURCES:
        raise MezzotintError(unknown(name))
    options = {option: value for option, value in options.items() if value is not None}
    parameters = {p.name: p for p in signature(SOURCES[name]).parameters.values() if p.name != "split"}
    for option in options:
        if option not in parameters:
            raise MezzotintError(f"data set {name!r} takes no option {option!r}; {closest(option, parameters)}")
    for option, parameter in parameters.items():
        if parameter.default is Parameter.empty and option not in options:
            hint = f"give one with data={name}:PATH" if option == "path" else f"set data.{option}"
            raise MezzotintError(f"data set {name!r} needs the option {option!r}; {hint}")
    return SOURCES[name](split=split, **options)
