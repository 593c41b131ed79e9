"""Images from anywhere, as batches of uint8: what a score is taken of, and what it is compared with.

>>> source = image_source("samples.npz", count=10_000)
>>> for images, labels in source.batches(64): ...
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mezzotint import data
from mezzotint.conditions.classes import Classes
from mezzotint.data.base import content_identity
from mezzotint.data.folder import UNLABELLED, FileKind, files_below, files_content
from mezzotint.data.loader import dataset_batches
from mezzotint.data.pictures import ENDINGS, WHITE, background_rgb, flatten, is_grey, read_picture
from mezzotint.data.transforms import (
    PIL_MODES,
    check_channels,
    check_size,
    grey_to_channels,
    picture_to_tensor,
    to_uint8,
)
from mezzotint.errors import MezzotintError, closest, nearest, shortened
from mezzotint.guidance import Guidance
from mezzotint.interop import near_runs
from mezzotint.pipeline import Pipeline, choose_labels, listed, sample_batches
from mezzotint.randomness import check_seed
from mezzotint.recipe import DataSettings
from mezzotint.samplers import Sampler

T = TypeVar("T")

Images = tuple[Tensor, Tensor | None]
"""A batch: uint8 (B, C, H, W), and labels int64 (B,) where there are any."""


class ImageSource(ABC):
    """Images in one fixed order, which can be gone through again.

    Batch k holds images k·batch_size to (k + 1)·batch_size − 1 whoever reads it, and process `rank` reads the batches
    rank, rank + world_size, …: together, and in order, the processes see exactly the batches of a single one.
    """

    identity: str
    """Tells sources apart by content, safe to print and as a file name."""
    count: int | None
    """How many images; None where only reading them tells."""
    class_names: tuple[str, ...] = ()
    """One name per class, where they are known."""
    cacheable: bool = True
    """Whether results may be kept under `identity`; not those of code, which may change behind its name."""

    @abstractmethod
    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Images]:
        """This process's batches, all of one image shape; the last of all may be smaller. Raises `MezzotintError`."""


def image_source(
    spec: str | Path | DataSettings | data.ImageDataset | Pipeline | Callable[[], object] | ImageSource,
    *,
    count: int | None = None,
    **options: Any,
) -> ImageSource:
    """The images that `spec` names: all, or `count` of them, always the same, drawn at random and kept in order.

    - A data set: `DataSettings`, "digits", "idx:PATH", "folder:PATH", "huggingface:NAME", or a loaded one. Options:
      split ("test"), workers, and, after a name, those of `mezzotint.data.load`.
    - A folder of pictures: those of `picture_folder`, and workers.
    - An .npz file: see `NpzSource`; channels.
    - A `Pipeline`: `count` samples (1,000), with the options of `PipelineSource`.
    - A function, or its name, "module:function": see `FunctionSource`; the first `count` images.

    An option of None counts as not given. Raises `MezzotintError` for a spec that is none of these, an option that it
    does not take, fewer images than `count`, or as the classes named.
    """
    if isinstance(spec, ImageSource):
        if options or count not in (None, spec.count):
            raise MezzotintError("the images are a source already; choose their number and options where it is made")
        return spec
    kind, make = _maker(spec)
    given = {name: value for name, value in options.items() if value is not None}
    parameters = signature(make).parameters
    if not any(p.kind == Parameter.VAR_KEYWORD for p in parameters.values()):
        for option in given:
            if option not in parameters:
                known = [name for name in parameters if name != "count"]
                hint = closest(option, known) if known else "leave it out"
                raise MezzotintError(f"{kind} takes no option {option!r}; {hint}")
    if count is not None and count < 1:
        raise MezzotintError(f"count must be at least 1, got {count}")
    return make(count=count, **given)


def check_spec(spec: object, others: Sequence[str] = ()) -> None:
    """Raise `MezzotintError` where a spec of `image_source` names nothing; `others` are names that mean something, too.

    Nothing is read, so that this can be asked before what is costly.
    """
    if isinstance(spec, str | Path) and str(spec) not in others:
        _maker(spec, others)


def _maker(spec: object, others: Sequence[str] = ()) -> tuple[str, Callable[..., ImageSource]]:
    """What errors call the kind of source that `spec` names, and what makes it from the options."""
    if isinstance(spec, Pipeline):
        return "a pipeline", lambda count, **options: PipelineSource(spec, 1000 if count is None else count, **options)
    if isinstance(spec, DataSettings):

        def load(count: int | None, split: str = "test") -> ImageSource:
            return DatasetSource(spec.load(split), count, workers=spec.workers)

        return f"the data set {spec.name!r}", load
    if isinstance(spec, data.ImageDataset | data.ImageStream):

        def wrap(count: int | None, workers: int = 0) -> ImageSource:
            return DatasetSource(spec, count, workers=workers)

        return "a data set", wrap
    if callable(spec):
        name = f"{getattr(spec, '__module__', 'function')}:{getattr(spec, '__qualname__', type(spec).__name__)}"
        return "a function", lambda count: FunctionSource(spec, name, count)
    text = str(spec)
    name, _, path = text.partition(":")
    if name in data.SOURCES:
        if name in data.OF_FOLDERS and path and not Path(path).expanduser().is_dir():
            raise MezzotintError(f"there is no folder at {shortened(path)}; expected one of {name} data")

        def named(count: int | None, split: str = "test", workers: int = 0, **options: Any) -> ImageSource:
            return DatasetSource(data.load(name, split, path=path or None, **options), count, workers=workers)

        return f"the data set {name!r}", named
    place = Path(text).expanduser()
    if place.is_dir():

        def pictures(
            count: int | None,
            size: int | None = None,
            channels: int | None = None,
            labels: bool | None = None,
            background: str = "white",
            workers: int = 0,
        ) -> ImageSource:
            folder = picture_folder(place, size=size, channels=channels, labels=labels, background=background)
            return DatasetSource(folder, count, workers=workers)

        return "a folder of pictures", pictures
    if place.is_file():

        def npz(count: int | None, channels: int | None = None) -> ImageSource:
            return NpzSource(place, count, channels=channels)

        return "an .npz file", npz
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        return "a function", lambda count: FunctionSource(imported(text), text, count)
    near = [] if place.suffix or "/" in text else nearest(name, [*data.SOURCES, *others])
    near += near_runs(place)
    hint = f"closest: {', '.join(near)}" if near else f"known: {', '.join(data.SOURCES)}"
    raise MezzotintError(
        f"there are no images at {shortened(text)}; expected a folder of pictures, an .npz of samples, module:function "
        f"or a data set ({hint})"
    )


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Images uint8 (B, 1 or 3, H, W) with 1 or 3 channels; raises `MezzotintError` where that would lose colours."""
    if channels == 1 and images.shape[1] == 3:
        if not (images == images[:, :1]).all():
            raise MezzotintError("the images are in colour, and grey ones are needed; choose other features, or images")
        return images[:, :1]
    return images if images.shape[1] == channels else grey_to_channels(images, channels)


def random_order(total: int, count: int) -> Tensor:
    """`count` of the numbers 0 to total − 1, int64 (count,), in an order that is always the same.

    The first n of a larger count are those of count n.
    """
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]


def _chosen(total: int, count: int | None, identity: str) -> tuple[Tensor, str]:
    """The images to take, int64 (count,) ascending, and what they are then called."""
    if count is None or count == total:
        return torch.arange(total), identity
    if count > total:
        raise MezzotintError(f"{identity} has {total} images, fewer than the {count} asked for; lower the count")
    return random_order(total, count).sort().values, f"{identity}-{count}-of-{total}"


# ---- Data sets, folders ----------------------------------------------------------------------------------------------


class DatasetSource(ImageSource):
    """A finite data set in its own order, decoded by `workers` processes besides this one."""

    def __init__(
        self, dataset: data.ImageDataset | data.ImageStream, count: int | None = None, *, workers: int = 0
    ) -> None:
        """Raises `MezzotintError` for a stream, for latents, and where the data set has fewer images than `count`."""
        if isinstance(dataset, data.ImageStream):
            raise MezzotintError("a streamed data set has no end to evaluate against; set data.streaming=false")
        if isinstance(dataset, data.CachedLatents):
            raise MezzotintError("the data are latents, not images; name the images that they were encoded from")
        self.dataset, self.workers = dataset, workers
        self.indices, self.identity = _chosen(len(dataset), count, dataset.identity)
        self.count = len(self.indices)
        self.class_names = dataset.class_names

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Images]:
        steps = _steps(len(self.indices), batch_size, rank, world_size)
        order = _Order(self.indices.split(batch_size))
        for batch in dataset_batches(self.dataset, order, steps, slice(None), self.workers):
            yield to_uint8(batch.images), batch.labels


@dataclass(frozen=True)
class _Order:
    """The batches of an evaluation: every image once."""

    parts: Sequence[Tensor]

    def indices(self, step: int) -> Tensor:
        return self.parts[step]


def _steps(count: int, batch_size: int, rank: int, world_size: int) -> range:
    """The numbers of this process's batches."""
    if batch_size < 1:
        raise MezzotintError(f"batch_size must be at least 1, got {batch_size}")
    return range(rank, -(-count // batch_size), world_size)


PICTURES = FileKind("picture", ENDINGS)


@dataclass(frozen=True, eq=False)
class PictureFolder:
    """Pictures of one size, as an `ImageDataset`. None stands in for one that cannot be read: that is an error."""

    files: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    identity: str
    crop: bool
    background: tuple[int, int, int] = WHITE

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, (channels, height, width) = self.files[index], self.image_shape
        label = -1 if self.labels is None else self.labels[index]
        picture = _read_picture(file)
        if channels == 1 and not is_grey(picture):
            raise MezzotintError(f"{file} is in colour and {self.files[0]} is grey; set data.channels=3 or =1")
        if self.crop:
            return picture_to_tensor(picture, self.image_shape, self.background), label
        if picture.size != (width, height):
            raise MezzotintError(
                f"{file} is {picture.width} × {picture.height} pixels and {self.files[0]} {width} × {height}; expected "
                "one size, or set data.size to crop and resize them all"
            )
        pixels = torch.from_numpy(np.array(flatten(picture, PIL_MODES[channels], self.background)))
        return pixels.view(height, width, channels).permute(2, 0, 1), label


def picture_folder(
    path: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    labels: bool | None = None,
    background: str = "white",
) -> PictureFolder:
    """The pictures in a folder, at any depth, by path.

    With `size` they become squares by `adm_center_crop`; without, all must be of one size. channels: 1 or 3; None takes
    grey for grey where the first picture is. labels: the first level of sub-folders, by name, are the classes; None:
    where there are two or more, and every picture is in one. background: the colour behind what is transparent. Raises
    `MezzotintError` for a colour that is none, a folder without pictures or, when indexed, for a picture that cannot be
    read or is of another size.
    """
    root = Path(path).expanduser()
    colour = background_rgb(background)
    found = sorted(os.path.relpath(file, root) for file, _ in files_below(root, UNLABELLED, PICTURES))
    files = [str(root / name) for name in found]
    classes = [name.split(os.sep)[0] if os.sep in name else None for name in found]
    class_names = tuple(sorted({name for name in classes if name is not None}))
    if labels and None in classes:
        raise MezzotintError(f"{files[classes.index(None)]} is in no sub-folder, which would be its class; move it")
    labelled = labels or (labels is None and len(class_names) > 1 and None not in classes)
    if channels is not None:
        check_channels(channels)
    first = _read_picture(files[0])
    if size is None:
        width, height = first.size
    else:
        check_size(size)
        width = height = size
    shape = (channels or (1 if is_grey(first) else 3), height, width)
    class_names = class_names if labelled else ()
    content = [*files_content(files, root), repr(colour).encode()]
    return PictureFolder(
        files,
        [class_names.index(str(name)) for name in classes] if labelled else None,
        class_names,
        shape,
        content_identity(root.resolve().name, "pictures", shape, class_names, content),
        crop=size is not None,
        background=colour,
    )


def _read_picture(file: str) -> Image.Image:
    try:
        return read_picture(file)
    except Exception as error:  # PIL's file formats fail with a dozen unrelated types
        raise MezzotintError(f"picture {file} cannot be read ({error}); mend or remove it") from None


# ---- .npz files ------------------------------------------------------------------------------------------------------


class NpzSource(ImageSource):
    """ADM's .npz: arr_0 uint8 (N, H, W, 1 or 3), and labels arr_1, integers (N,), where it has them.

    Images are read as they are asked for, never the whole array, and nothing is unpickled.
    """

    def __init__(self, path: str | Path, count: int | None = None, *, channels: int | None = None) -> None:
        """channels: 1 reads the grey images back that were written as RGB.

        Raises `MezzotintError` for a file that is no whole .npz, has no arr_0 or other content than said above.
        """
        self.path, self.channels = Path(path).expanduser(), channels
        self.labels: Tensor | None = None
        with _open_npz(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                there = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
                raise MezzotintError(
                    f"{self.path} has no arr_0, only {there}; expected images uint8 (N, H, W, 3) under that name"
                )
            with archive.open("arr_0.npy") as member:
                shape, fortran, dtype = _npy_header(member)
                self._first = member.tell()
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or not all(shape):
                order = " in Fortran order" if fortran else ""
                raise MezzotintError(
                    f"arr_0 of {self.path} is {dtype} of shape {shape}{order}; expected images uint8 (N, H, W, 3), "
                    "1 channel for grey, N at least 1"
                )
            info = archive.getinfo("arr_0.npy")
            if info.file_size != self._first + math.prod(shape):
                raise MezzotintError(f"arr_0 of {self.path} has another length than its shape {shape}; write it again")
            content = [repr((info.CRC, info.file_size)).encode()]  # the archive's own checksum of all pixels
            if "arr_1.npy" in archive.namelist():
                with archive.open("arr_1.npy") as member:
                    length, _, kind = _npy_header(member)  # before an array of whatever length it says is made
                if length != shape[:1] or not np.issubdtype(kind, np.integer):
                    raise MezzotintError(
                        f"arr_1 of {self.path} is {kind} of shape {length}; expected labels, {shape[0]} integers"
                    )
                with archive.open("arr_1.npy") as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                self.labels = torch.from_numpy(array.astype(np.int64))
                content.append(array.astype("<i8").tobytes())
        self.image_shape = shape[1:]
        if channels is not None:
            check_channels(channels)
        identity = content_identity(self.path.stem, "npz", (channels or shape[3], shape[1], shape[2]), (), content)
        self.indices, self.identity = _chosen(shape[0], count, identity)
        self.count = len(self.indices)

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Images]:
        size = int(np.prod(self.image_shape))
        parts = self.indices.split(batch_size)
        with _open_npz(self.path) as archive, archive.open("arr_0.npy") as member:
            for step in _steps(len(self.indices), batch_size, rank, world_size):
                pixels = torch.empty(len(parts[step]), *self.image_shape, dtype=torch.uint8)
                for row, index in enumerate(parts[step].tolist()):
                    member.seek(self._first + index * size)  # forwards only, so that a compressed file is read once
                    pixels[row] = torch.frombuffer(bytearray(member.read(size)), dtype=torch.uint8).view(
                        pixels[row].shape
                    )
                images = to_channels(pixels.permute(0, 3, 1, 2), self.channels or self.image_shape[2])
                yield images.contiguous(), None if self.labels is None else self.labels[parts[step]]


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever is wrong with it, here or while it is read, raises `MezzotintError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise MezzotintError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except MezzotintError:
        raise
    except Exception as error:  # zipfile's and numpy's readers fail with a dozen unrelated types
        raise MezzotintError(
            f"{path} is no whole .npz of plain arrays ({error}); expected what np.savez writes, without pickled objects"
        ) from None


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type of the array; the file then stands at its first byte."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in readers:
        raise ValueError(f"it is of version {version} of numpy's format")
    return readers[version](member)


# ---- Functions -------------------------------------------------------------------------------------------------------


class FunctionSource(ImageSource):
    """What a function without arguments returns: images, a pair of images and labels, or an iterable of either.

    Images are uint8, or floats in [−1, 1], (B, C, H, W) with 1 or 3 channels; labels are integers (B,). The function is
    called anew each time that the images are gone through, so must give the same again. `count`, which an endless
    iterable needs, takes the first so many. Every process of several calls it, and keeps its own batches.
    """

    cacheable = False

    def __init__(self, function: Callable[[], object], name: str, count: int | None = None) -> None:
        self.function, self.name, self.count = function, name, count
        self.identity = "-".join([re.sub(r"[^A-Za-z0-9._]+", "-", name), *([str(count)] if count else [])])

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Images]:
        """Raises `MezzotintError` where the function gives something else, or fewer than `count` images."""
        _steps(0, batch_size, rank, world_size)
        for step, batch in enumerate(self._whole_batches(batch_size)):
            if step % world_size == rank:
                yield batch

    def _whole_batches(self, batch_size: int) -> Iterator[Images]:
        """The function's images, cut anew into batches."""
        seen, kind = 0, ""
        images, labels = torch.empty(0), None
        for more, more_labels in self._pieces():
            described = f"images of shape {tuple(more.shape[1:])} with{'out' if more_labels is None else ''} labels"
            if kind not in ("", described):
                raise MezzotintError(f"{self.name} gave {kind}, then {described}; expected all alike")
            kind = described
            images = torch.cat([images, more]) if len(images) else more
            labels = torch.cat([labels, more_labels]) if labels is not None and more_labels is not None else more_labels
            if self.count is not None:
                images = images[: self.count - seen]
                labels = None if labels is None else labels[: self.count - seen]
            while len(images) >= batch_size or (len(images) and seen + len(images) == self.count):
                yield images[:batch_size], None if labels is None else labels[:batch_size]
                seen += len(images[:batch_size])
                images, labels = images[batch_size:], None if labels is None else labels[batch_size:]
            if seen == self.count:
                return
        if self.count is not None or not seen + len(images):
            raise MezzotintError(f"{self.name} gave {seen + len(images)} images, expected {self.count or 'at least 1'}")
        if len(images):
            yield images, labels

    def _pieces(self) -> Iterator[Images]:
        result = self.function()
        if isinstance(result, Tensor | np.ndarray) or _is_pair(result):
            result = [result]
        if not isinstance(result, Iterable):
            raise MezzotintError(f"{self.name} returned {type(result).__name__}; expected images or batches of them")
        for piece in result:
            images, labels = piece if _is_pair(piece) else (piece, None)
            images = self._pixels(images)
            if labels is not None:
                labels = torch.as_tensor(labels)
                if labels.shape != images.shape[:1] or labels.is_floating_point():
                    raise MezzotintError(
                        f"{self.name} gave labels {labels.dtype} of shape {tuple(labels.shape)}; expected "
                        f"{len(images)} integers"
                    )
                labels = labels.long().cpu()
            yield images, labels

    def _pixels(self, images: object) -> Tensor:
        if not isinstance(images, Tensor | np.ndarray):
            raise MezzotintError(f"{self.name} gave {type(images).__name__}; expected images (B, C, H, W)")
        pixels = torch.as_tensor(images).detach().cpu()
        if (
            pixels.ndim != 4
            or pixels.shape[1] not in PIL_MODES
            or not (pixels.dtype == torch.uint8 or pixels.is_floating_point())
        ):
            raise MezzotintError(
                f"{self.name} gave {pixels.dtype} of shape {tuple(pixels.shape)}; expected images (B, C, H, W) of 1 or "
                "3 channels, uint8 or floats in [-1, 1]"
            )
        if pixels.dtype == torch.uint8:
            return pixels
        # A sample may overshoot a little; levels up to 255 are another scale.
        if pixels.numel() and not pixels.abs().max() <= 2:
            raise MezzotintError(
                f"{self.name} gave floats that are NaN or far outside of [-1, 1]; scale them, or give uint8"
            )
        return to_uint8(pixels.float())


def _is_pair(value: object) -> bool:
    """Whether `value` is images with labels, rather than two batches."""
    return isinstance(value, tuple) and len(value) == 2 and np.ndim(value[1]) != 4


def imported(spec: str) -> Callable[..., Any]:
    """The callable ``module:function``, its module on Python's path or in the working directory.

    Raises `MezzotintError` where there is none. Importing runs the module: name only code that you trust.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())  # an installed command does not look there by itself
    try:
        value: Any = import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise MezzotintError(
            f"{spec} cannot be imported ({error}); expected module:function, the module here or on PYTHONPATH"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(value):
        raise MezzotintError(f"{spec} is {type(value).__name__}; expected a function")
    function: Callable[..., Any] = value
    return function


# ---- Pipelines -------------------------------------------------------------------------------------------------------


class PipelineSource(ImageSource):
    """`count` samples of a pipeline, drawn while they are asked for: the images of `mezzotint.sample`, as uint8."""

    count: int

    def __init__(
        self,
        pipeline: Pipeline,
        count: int = 1000,
        *,
        classes: Classes | None = None,
        guidance: float | Guidance | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """classes, guidance, seed and the fields of `Sampler` are those of `sample`. Raises `MezzotintError` as it."""
        if pipeline.recipe.data.frames:
            raise MezzotintError("clips are not scored: every score here is one of images")
        check_seed(seed)
        self.pipeline, self.count, self.guidance, self.seed, self.options = pipeline, count, guidance, seed, options
        self.class_names = pipeline.class_names
        self.labels = choose_labels(pipeline, classes, count)
        recipe = pipeline.recipe.model_dump(mode="json", exclude={"training", "data", "objective", "description"})
        sampler = Sampler.parse(pipeline.recipe.sampling.model_dump() | options).model_dump(mode="json")
        scale = guidance.model_dump(mode="json") if isinstance(guidance, Guidance) else guidance
        plan = json.dumps([pipeline.digests, recipe, sampler, scale, listed(self.labels)])
        name, shape = pipeline.recipe.name, (pipeline.recipe.image_channels, *2 * (pipeline.recipe.data.size,))
        self.identity = content_identity(name, f"samples-{count}-seed-{seed}", shape, (), [plan.encode()])

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Images]:
        for step in _steps(self.count, batch_size, rank, world_size):
            indices = range(self.count)[step * batch_size : (step + 1) * batch_size]
            drawn = sample_batches(
                self.pipeline,
                self.labels,
                indices,
                guidance=self.guidance,
                seed=self.seed,
                batch_size=batch_size,
                **self.options,
            )
            labels = self.labels[list(indices)] if isinstance(self.labels, Tensor) else None
            yield to_uint8(torch.cat(list(drawn))), labels


# ---- Digests, caches and processes -----------------------------------------------------------------------------------


def place() -> tuple[int, int]:
    """This process's number and how many have joined by torch.distributed; (0, 1) where none have."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gathered(make: Callable[[], T]) -> list[T]:
    """What `make` gives on every process, in the order of their numbers; a `MezzotintError` of one is raised on all."""
    everyone: list[Any] = [_outcome(make)]
    if place()[1] > 1:
        mine, everyone = everyone[0], [None] * place()[1]
        dist.all_gather_object(everyone, mine)
    for one in everyone:
        if isinstance(one, MezzotintError):
            raise one
    return everyone


def of_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first process, on every process, its `MezzotintError` too; the others wait."""
    rank, world_size = place()
    box: list[Any] = [_outcome(make) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], MezzotintError):
        raise box[0]
    result: T = box[0]
    return result


def _outcome(make: Callable[[], T]) -> T | MezzotintError:
    try:
        return make()
    except MezzotintError as error:
        return error
