"""Caches of latents: an autoencoder's posteriors, encoded once, for training that never sees the autoencoder.

    DIR/
      latents.json                      `CacheInfo`: what was encoded, and by what
      train/00000-of-00012.safetensors  moments, moments_flipped (n, 2C, h, w); labels int64 (n,), −1 when unlabelled
      test/…

Moments are the mean and, in the second half of the channels, the log-variance of a latent, unscaled; the flipped ones
are of the mirror image. Training draws a fresh latent from them every time. A tokenizer without a posterior, such as
PCA, has C channels of moments: the latents themselves. checksums int64 (n, 2) are the CRC-32s of an example's moments
and moments_flipped, verified when it is read; those of before have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mezzotint.data.base import ImageDataset, ImageStream
from mezzotint.data.loader import dataset_batches
from mezzotint.data.splits import NoSuchSplit, check_split
from mezzotint.errors import MezzotintError
from mezzotint.files import (
    CHECKSUM,
    atomic_path,
    content_digests,
    parse_json,
    read_tensors,
    save_tensors,
    write_text,
)
from mezzotint.progress import OWN, console, progress_bar
from mezzotint.representations import KLAutoencoder, Tokenizer, scaled_latents
from mezzotint.settings import Settings

logger = logging.getLogger("mezzotint")

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
SPLITS = ("train", "test")
MOMENTS = ("moments", "moments_flipped")
MAX_HEADER = 2**20  # bytes of a shard's header, which names three tensors
SHARD_SIZE = 1024  # examples: all that a kill can lose, and 64 MiB of float32 at 256 × 256 pixels


class SplitInfo(Settings):
    """One encoded split."""

    identity: str
    """The data set's."""
    examples: int = Field(ge=1)
    """How many."""


class CacheInfo(Settings):
    """latents.json: everything that a shard's content depends on."""

    format: int = FORMAT
    """Version of the layout."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of the images, in pixels."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a latent."""
    class_names: tuple[str, ...]
    """One name per class; empty when unlabelled."""
    stochastic: bool = True
    """Whether moments are those of a posterior, of 2C channels, rather than latents of C."""
    autoencoder: str
    """`digest` of the `KLAutoencoder` or `Tokenizer`."""
    precision: str
    """That the autoencoder computed in."""
    tiling: bool
    """Whether it encoded large images in tiles."""
    scale: float
    """Training's x is scale · (latent − shift) / std."""
    shift: float | tuple[float, ...]
    """See scale; one number, or one for each channel."""
    std: tuple[float, ...] | None = None
    """See scale; one number for each channel, or None for 1."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Of the moments."""
    shard_size: int = Field(ge=1)
    """Examples in a file; the last may have fewer."""
    splits: dict[str, SplitInfo]
    """By name, train and test."""

    @model_validator(mode="after")
    def _of_each_channel(self) -> CacheInfo:
        for key in ("shift", "std"):
            if isinstance(values := getattr(self, key), tuple) and len(values) != self.latent_shape[0]:
                raise ValueError(f"its {key} has {len(values)} numbers for {self.latent_shape[0]} channels")
        return self

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C or C, h, w) of an example's moments."""
        channels, height, width = self.latent_shape
        return (2 * channels if self.stochastic else channels), height, width

    def num_shards(self, split: str) -> int:
        return -(-self.splits[split].examples // self.shard_size)

    def rows(self, split: str, shard: int) -> range:
        """The examples in shard number `shard`."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.splits[split].examples))

    def file(self, split: str, shard: int) -> str:
        """The shard's path within the folder."""
        return f"{split}/{shard:05}-of-{self.num_shards(split):05}.safetensors"

    def fingerprint(self, split: str) -> str:
        """16 hexadecimal digits over all that a shard of `split` depends on; written into it."""
        left_out = {"splits"}  # and what caches from before it have no key for
        left_out |= {key for key, usual in (("stochastic", True), ("std", None)) if getattr(self, key) == usual}
        values = self.model_dump(mode="json", exclude=left_out) | {split: self.splits[split].model_dump()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------- encoding


def encode_dataset(
    dataset: ImageDataset | ImageStream,
    representation: KLAutoencoder | Tokenizer,
    out: str | Path,
    split: str = "train",
    *,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> Path:
    """Encode every image of `dataset`, and its mirror image, into the folder `out` as `split`; returns the folder.

    Only shards that are missing or damaged are made, each written whole or not at all, so a killed run loses one shard
    and a finished folder is left alone. Shard k is made by process k mod `world_size`; the processes need not meet.
    `workers` decode images meanwhile. Raises `MezzotintError` for a stream, a folder that holds something else or was
    encoded from or by something else (it says what), moments that `dtype` cannot hold, a full disk.
    """
    out = Path(out)
    if isinstance(dataset, ImageStream):
        raise MezzotintError("a stream has no end and cannot be encoded; set data.streaming=false")
    if isinstance(dataset, CachedLatents):
        raise MezzotintError("the data are latents already; set data to the images, e.g. data=folder:photos")
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise MezzotintError(f"{name} must be at least 1, got {value}")
    check_split(split, SPLITS)
    if len(dataset.image_shape) != 3:
        raise MezzotintError(
            f"the data are clips, {dataset.image_shape}, and a cache holds latents of single images; "
            "encode a data set of images, or train on the clips themselves"
        )
    _, height, width = dataset.image_shape
    if height % representation.stride or width % representation.stride:
        raise MezzotintError(
            f"images of {height} × {width} pixels are not divisible by the autoencoder's stride "
            f"{representation.stride}; change data.size"
        )
    info = CacheInfo.parse(
        {
            "image_shape": dataset.image_shape,
            "latent_shape": (
                representation.channels,
                height // representation.stride,
                width // representation.stride,
            ),
            "class_names": dataset.class_names,
            "stochastic": representation.stochastic,
            "autoencoder": representation.digest,
            "precision": representation.precision,
            "tiling": representation.tiling,
            "scale": representation.scale,
            "shift": representation.shift,
            "std": representation.std,
            "dtype": dtype,
            "shard_size": shard_size,
            "splits": {split: {"identity": dataset.identity, "examples": len(dataset)}},
        }
    )
    info = _joined(out, info, split, write=rank == 0)
    pending = [k for k in range(info.num_shards(split))[rank::world_size] if not _is_whole(out, info, split, k)]
    title = f"encoding {split}" + (f", process {rank + 1} of {world_size}" if world_size > 1 else "")
    _encode_shards(dataset, representation, out, info, split, pending, batch_size, workers, title if progress else "")
    return out


def _joined(out: Path, info: CacheInfo, split: str, write: bool) -> CacheInfo:
    """`info` together with the other splits that `out` has, and, with `write`, written there if it is news.

    Raises `MezzotintError` where `out` is not a cache, or one of another kind.
    """
    file = out / "latents.json"
    if not file.exists():
        ours = {"latents.json", *SPLITS}  # other processes may have begun already
        if out.exists() and not (out.is_dir() and all(p.name in ours or p.name[0] == "." for p in out.iterdir())):
            raise MezzotintError(f"{out} is not empty and not a folder of latents; choose another")
    else:
        there = read_info(out)
        before, after = there.model_dump(), info.model_dump()
        old, new = before.pop("splits"), after.pop("splits")
        if split in old:
            before, after = old[split] | before, new[split] | after  # what was encoded, before how
        changed = [key for key in before if before[key] != after[key]]
        if changed:
            shown = ", ".join(f"{key} ({_short(before[key])} there, {_short(after[key])} here)" for key in changed[:3])
            raise MezzotintError(
                f"{out} holds other latents: {shown}; encode with the same settings, or into another folder"
            )
        if split in old:
            return there
        info = info.model_copy(update={"splits": there.splits | info.splits})
    if write:
        write_text(file, json.dumps(info.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    return info


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _is_whole(out: Path, info: CacheInfo, split: str, shard: int) -> bool:
    """Whether the shard need not be made. Raises `MezzotintError` for one of another cache."""
    path = out / info.file(split, shard)
    if not path.exists():
        return False
    try:
        Shard.read(path, info, split, shard)
        try:
            read_tensors(path)
        except MezzotintError:
            raise DamagedShard(f"{path} is damaged: it has another content than was written") from None
    except DamagedShard as error:
        logger.warning("%s; it is made anew", error, extra=OWN)
        return False
    return True


def _encode_shards(
    dataset: ImageDataset,
    representation: KLAutoencoder | Tokenizer,
    out: Path,
    info: CacheInfo,
    split: str,
    shards: Sequence[int],
    batch_size: int,
    workers: int,
    title: str,
) -> None:
    """Make `shards`, with a progress bar under `title` where it is not empty."""
    starts = [(shard, start) for shard in shards for start in info.rows(split, shard)[::batch_size]]
    chunks = _Chunks([range(start, min(start + batch_size, info.rows(split, k).stop)) for k, start in starts])
    batches = dataset_batches(dataset, chunks, range(len(starts)), slice(None), workers)
    total, done, begun = sum(len(info.rows(split, k)) for k in shards), 0, time.perf_counter()
    bar = progress_bar("speed")
    bar.disable = bar.disable or not title
    with bar:
        task = bar.add_task(title, total=total, speed="")
        for shard in shards:
            rows = info.rows(split, shard)
            shape = (len(rows), *info.moments_shape)
            tensors = {name: torch.empty(shape, dtype=DTYPES[info.dtype]) for name in MOMENTS}
            tensors["labels"] = torch.full((len(rows),), -1)
            filled = 0
            while filled < len(rows):
                batch = next(batches)
                images = batch.images.to(representation.device, non_blocking=True)
                some = slice(filled, filled + len(images))
                for name, side in (("moments", images), ("moments_flipped", images.flip(-1))):
                    parts = [part for part in representation.posterior(side) if part is not None]
                    moments = torch.cat(parts, dim=1).to(DTYPES[info.dtype])
                    if not moments.isfinite().all():
                        raise MezzotintError(
                            f"the moments of the {split} images {rows[some][0]} to {rows[some][-1]} are not finite "
                            f"numbers of {info.dtype}; encode with dtype float32 and representation.precision=fp32"
                        )
                    tensors[name][some] = moments.cpu()
                if batch.labels is not None:
                    tensors["labels"][some] = batch.labels
                filled, done = some.stop, done + len(images)
                speed = f"{done / (time.perf_counter() - begun):,.1f} images/s"
                bar.update(task, completed=done, speed=speed)
            write_shard(out / info.file(split, shard), tensors, info.fingerprint(split))
            if title and not console.is_terminal:
                console.print(f"{title}: {done:,}/{total:,}  {speed}")


@dataclass(frozen=True)
class _Chunks:
    """The examples one after another: an `Order`."""

    ranges: Sequence[range]

    def indices(self, step: int) -> Tensor:
        return torch.tensor(self.ranges[step])


def write_shard(path: Path, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Write a shard, whole or not at all."""
    rows = [tensors[name].flatten(1).contiguous().view(torch.uint8).numpy() for name in MOMENTS]
    sums = torch.tensor([[zlib.crc32(image), zlib.crc32(mirrored)] for image, mirrored in zip(*rows, strict=True)])
    about = {"cache": fingerprint, "index": _index(path, tensors["labels"], sums)}
    with atomic_path(path) as temporary:
        save_tensors(tensors | {"checksums": sums}, temporary, about)


def _index(path: Path, labels: Tensor, checksums: Tensor) -> str:
    """CRC-32 of what is read of a shard when it is opened, and of its name: in another's place it is damage."""
    found = zlib.crc32(labels.numpy().data, zlib.crc32(path.name.encode()))
    return f"{zlib.crc32(checksums.numpy().data, found):08x}"


# --------------------------------------------------------------------------------------------------- reading


class DamagedShard(MezzotintError):
    """A shard that was cut off or is no shard."""


@dataclass(frozen=True)
class Shard:
    """Where in a file the moments begin, and its labels int64 (n,).

    checksum: of all of it; row_checksums: CRC-32s (n, 2) of each example's moments. Earlier versions have neither.
    """

    path: Path
    offsets: dict[str, int]  # of moments and moments_flipped, in bytes
    labels: Tensor
    checksum: str
    row_checksums: np.ndarray | None

    @classmethod
    def read(cls, path: Path, info: CacheInfo, split: str, shard: int) -> Shard:
        """The shard at `path`. Raises `DamagedShard`, or `MezzotintError` where it belongs to another cache."""
        count = len(info.rows(split, shard))
        moments = (SAFETENSORS_DTYPES[info.dtype], [count, *info.moments_shape])
        expected = {"moments": moments, "moments_flipped": moments, "labels": ("I64", [count])}
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if length > min(size, MAX_HEADER):
                    raise ValueError("its header is cut off")
                header = parse_json(file.read(length))
                about = header.pop("__metadata__", {})
                fingerprint, checksum = about.get("cache"), about.get(CHECKSUM, "")
                if "checksums" in header:
                    expected["checksums"] = ("I64", [count, 2])
                found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
                begin = 8 + length
                places = {name: tuple(map(index, entry["data_offsets"])) for name, entry in header.items()}
                end = begin + max(stop for _, stop in places.values())
                if size != end:
                    raise ValueError(f"it has {size} bytes, but its header says {end}")
                if fingerprint != info.fingerprint(split) or found != expected:
                    raise MezzotintError(
                        f"{path} is not one of the files that {path.parent.parent / 'latents.json'} describes; "
                        "remove the folder and encode again"
                    )
                for name, (dtype, shape) in expected.items():
                    start, stop = places[name]
                    if start < 0 or stop - start != ITEM_SIZES[dtype] * math.prod(shape):
                        raise ValueError(f"its header puts {name} at {start} to {stop}")
                file.seek(begin + places["labels"][0])
                labels = torch.frombuffer(bytearray(file.read(8 * count)), dtype=torch.int64)
                sums = None
                if "checksums" in places:
                    file.seek(begin + places["checksums"][0])
                    sums = torch.frombuffer(bytearray(file.read(16 * count)), dtype=torch.int64).view(-1, 2)
            if not -1 <= int(labels.min()) <= int(labels.max()) < max(1, len(info.class_names)):
                raise ValueError(
                    f"it has labels from {labels.min()} to {labels.max()} of {len(info.class_names)} classes"
                )
            if sums is not None and _index(path, labels, sums) != about.get("index"):
                raise ValueError("it has other labels or checksums than were written, or is another file of the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedShard(f"{path} is damaged: {error}") from None
        offsets = {name: begin + places[name][0] for name in MOMENTS}
        return cls(path, offsets, labels, checksum, None if sums is None else sums.numpy())


class CachedLatents:
    """An encoded split, read row by row from its files; and the encoder of what it reads, in the autoencoder's place.

    A row is read where it lies by one positioned read. For random rows that is as fast as a memory map of files that
    are in memory, and faster than one of files that are not (benchmarks/loading.py); and nothing is held open.
    """

    def __init__(self, folder: Path, info: CacheInfo, split: str, shards: Sequence[Shard], labels: bool, flip: bool):
        self.folder, self.info, self.split, self.shards, self.flip = folder, info, split, tuple(shards), flip
        self.stochastic = info.stochastic  # as a `Representation`: whether `encode` draws from a posterior
        self.class_names = info.class_names if labels else ()
        self.labels = torch.cat([shard.labels for shard in shards])
        if not labels:
            self.labels.fill_(-1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that were encoded, in pixels."""
        return self.info.image_shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of x."""
        return self.info.latent_shape

    @cached_property
    def identity(self) -> str:
        labels = "" if self.class_names or not self.info.class_names else "-unlabelled"
        digest = hashlib.sha256(self.info.fingerprint(self.split).encode())
        digest.update(repr([shard.checksum for shard in self.shards]).encode())
        for content in content_digests([shard.path for shard in self.shards if not shard.checksum]):
            digest.update(content)
        return f"{self.info.splits[self.split].identity}-latents-{digest.hexdigest()[:16]}{labels}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises `MezzotintError`: there are no images here."""
        raise MezzotintError(
            f"{self.folder} holds latents, and images are needed; set data to the images themselves, "
            "e.g. data=folder:photos"
        )

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (B, 2C, h, w), with flip (B, 2, 2C, h, w): of image and mirror image, and labels int64 (B,).

        In the cache's dtype. Raises `MezzotintError` where a file cannot be read any more.
        """
        names = MOMENTS if self.flip else MOMENTS[:1]
        shape = (len(indices), len(names), *self.info.moments_shape)
        moments = torch.empty(shape, dtype=DTYPES[self.info.dtype])
        rows = moments.view(torch.uint8).view(len(indices), len(names), -1).numpy()
        size, wanted = rows.shape[-1], indices.tolist()
        by_place = sorted(range(len(wanted)), key=wanted.__getitem__)
        place = 0
        while place < len(by_place):  # a file at a time, each opened once
            number = wanted[by_place[place]] // self.info.shard_size
            shard, first = self.shards[number], number * self.info.shard_size
            try:
                with open(shard.path, "rb", buffering=0) as file:
                    while place < len(by_place) and wanted[by_place[place]] // self.info.shard_size == number:
                        row = by_place[place]
                        for side, name in enumerate(names):
                            file.seek(shard.offsets[name] + (wanted[row] - first) * size)
                            if file.readinto(rows[row, side]) != size:
                                raise OSError("it has become shorter")
                            sums = shard.row_checksums
                            if sums is not None and zlib.crc32(rows[row, side]) != sums[wanted[row] - first, side]:
                                raise OSError(f"example {wanted[row]} has another content than was written")
                        place += 1
            except OSError as error:
                raise MezzotintError(
                    f"{shard.path} cannot be read: {error.strerror or error}; run 'mezzotint encode' again"
                ) from None
        return (moments if self.flip else moments.squeeze(1)), self.labels[indices]

    @staticmethod
    def mirror(moments: Tensor, which: Tensor) -> Tensor:
        """Of moments (B, 2, 2C, h, w) the mirror image's where `which` (B,), else the image's: (B, 2C, h, w)."""
        return torch.where(which.view(-1, 1, 1, 1), moments[:, 1], moments[:, 0])

    def encode(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """Moments (B, 2C, h, w) of any dtype to x float32 (B, C, h, w), as `KLAutoencoder.encode` does from images."""
        if not self.stochastic:
            return moments.float()
        mean, log_variance = moments.float().chunk(2, dim=1)
        info = self.info
        return scaled_latents(mean, log_variance, eps, scale=info.scale, shift=info.shift, std=info.std)


def cached_latents(
    path: str | Path,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    labels: bool = True,
    flip: bool = False,
) -> CachedLatents:
    """A folder that `encode_dataset` wrote. `flip`: training reads the mirror images, too.

    size, channels: what the images must have been. Raises `MezzotintError` for a folder that is missing, not finished,
    damaged or of images of another shape, and for a split that was not encoded.
    """
    check_split(split, SPLITS)
    folder = Path(path).expanduser()
    info = read_info(folder)
    expected = (channels or info.image_shape[0], size or info.image_shape[1], size or info.image_shape[2])
    if info.image_shape != expected:
        raise MezzotintError(
            f"the latents in {folder} are of images of {info.image_shape}, expected {expected} (channels, height, "
            "width); set data.size and data.channels"
        )
    if split not in info.splits:
        raise NoSuchSplit(f"{folder} has no {split} split, only {', '.join(info.splits)}; encode it, too")
    count = info.num_shards(split)
    found = {path.name for path in (folder / split).glob("*.safetensors")}
    # No more of the files that there should be are looked at than there are, whatever their number may be.
    there = len(found) if len(found) < count else sum(Path(info.file(split, k)).name in found for k in range(count))
    if there < count:
        raise MezzotintError(
            f"{folder / split} has {there} of {count} files; run the same 'mezzotint encode' again, which makes only "
            "what is missing"
        )
    try:
        shards = [Shard.read(folder / info.file(split, k), info, split, k) for k in range(count)]
    except DamagedShard as error:
        raise MezzotintError(f"{error}; run the same 'mezzotint encode' again, which makes it anew") from None
    return CachedLatents(folder, info, split, shards, labels, flip and split == "train")


def read_info(folder: Path) -> CacheInfo:
    """latents.json of a folder. Raises `MezzotintError` where there is none, or not one of ours."""
    file = folder / "latents.json"
    try:
        values: Any = parse_json(file.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise MezzotintError(
            f"{folder} is not a folder of latents: it has no latents.json; make one with 'mezzotint encode'"
        ) from None
    except (OSError, ValueError) as error:
        raise MezzotintError(f"{file} cannot be read ({error}); encode into another folder") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise MezzotintError(
            f"{file} is not of format {FORMAT}, which this version reads; encode again into another folder"
        )
    try:
        return CacheInfo.parse(values)
    except MezzotintError as error:
        raise MezzotintError(f"{file} is damaged: {error}; encode again into another folder") from None
