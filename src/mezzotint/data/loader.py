"""The order of the examples and the loop over batches: without state, so that any step can be the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mezzotint.data.base import (
    BatchedDataset,
    Captioned,
    CaptionedDataset,
    Example,
    ImageDataset,
    ImageStream,
    InMemoryImages,
)
from mezzotint.data.transforms import to_float
from mezzotint.errors import MezzotintError
from mezzotint.randomness import check_seed

STREAM_PREFETCH = 2  # batches that a stream reads ahead; `DataLoader`'s own number, too


class Batch(NamedTuple):
    """One process's share of a global batch."""

    images: Tensor  # float32 (B, C, H, W), clips (B, F, C, H, W), in [−1, 1]; of `CachedLatents` the moments
    labels: Tensor | None  # int64 (B,); None when the data set is unlabelled
    indices: Tensor  # int64 (B,): places in the data set, or, of a stream, running numbers
    captions: tuple[str, ...] | None = None  # one per image; None unless asked for


@dataclass(frozen=True)
class BatchOrder:
    """Which examples make up a global batch: seeded permutations of the data set, one per epoch, end to end for ever.

    A batch may span epochs, so every example is used. `num_examples` is None for a stream, which has an order of its
    own: its examples are numbered as they come. Raises `MezzotintError` unless the numbers are positive.
    """

    num_examples: int | None
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise MezzotintError(f"the batch size is {self.batch_size}; expected at least 1")
        if self.num_examples == 0:
            raise MezzotintError("the data set holds no examples; expected at least 1, so check data.path")
        check_seed(self.seed)

    @classmethod
    def over(cls, dataset: ImageDataset | ImageStream, batch_size: int, seed: int = 0) -> BatchOrder:
        """The order in which `dataset` is gone through."""
        return cls(None if isinstance(dataset, ImageStream) else len(dataset), batch_size, seed)

    def indices(self, step: int) -> Tensor:
        """The examples int64 (batch_size,) of global batch `step`, counted from 0."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        if self.num_examples is None:
            return torch.arange(first, last)
        epochs = range(first // self.num_examples, (last - 1) // self.num_examples + 1)
        starts = [(epoch, epoch * self.num_examples) for epoch in epochs]
        return torch.cat(
            [_permutation(self.num_examples, self.seed, e)[max(first - start, 0) : last - start] for e, start in starts]
        )


@lru_cache(maxsize=2)  # the epochs on both sides of a batch
def _permutation(num_examples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(_mixed(seed, epoch)))


def _mixed(*numbers: int) -> int:
    """64 bits that look random, the same ones for the same numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def iterate_batches(
    dataset: ImageDataset | ImageStream,
    order: BatchOrder,
    *,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    captions: bool = False,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to ``stop_step − 1``, of each the slice that belongs to process `rank`.

    The global batches depend on `order` alone, not on the number of processes or `workers` nor on where iteration
    began. `workers` are processes that decode images, or threads for a stream or a `BatchedDataset` on disk; a data set
    in memory needs none. With `captions` every image comes with one of its captions, which `choose_captions` picks.
    Raises `MezzotintError` when the processes cannot share a batch equally, when captions are asked of a data set that
    has neither captions nor class names, or from decoding.
    """
    if order.batch_size % world_size:
        raise MezzotintError(
            f"a batch of {order.batch_size} cannot be shared equally by {world_size} processes; "
            f"make the batch size a multiple of {world_size}"
        )
    size = order.batch_size // world_size
    share = slice(rank * size, (rank + 1) * size)
    steps = range(start_step, stop_step)
    if captions:
        check_captions(dataset)
    if isinstance(dataset, ImageStream):
        return _stream_batches(dataset, order, steps, share, workers, captions)
    batches = dataset_batches(dataset, order, steps, share, workers)
    return _captioned(batches, dataset, order, steps, share) if captions else batches


# ------------------------------------------------------------------------------------------- captions


def has_captions(dataset: ImageDataset | ImageStream) -> bool:
    """Whether the data set has captions of its own, other than the names of its classes."""
    return isinstance(dataset, Captioned) and dataset.has_captions


def check_captions(dataset: ImageDataset | ImageStream) -> None:
    """Raises `MezzotintError` for a data set that has neither captions nor class names."""
    if not has_captions(dataset) and not dataset.class_names:
        raise MezzotintError(
            "the data set has neither captions nor classes, whose names could be captions; choose one that has, "
            "e.g. data=captions:PATH, or set data.labels=true or data.caption_column"
        )


def captions_of(dataset: ImageDataset, indices: Sequence[int], labels: Tensor | None) -> list[tuple[str, ...]]:
    """All captions of each of the images `indices`; without captions of its own, the names of the classes `labels`.

    Raises `MezzotintError` as `check_captions` does.
    """
    check_captions(dataset)
    if isinstance(dataset, CaptionedDataset) and dataset.has_captions:
        return dataset.captions(indices)
    assert labels is not None  # there are class names, so there are labels
    return [(dataset.class_names[label],) for label in labels.tolist()]


def choose_captions(captions: Sequence[Sequence[str]], seed: int, first: int) -> tuple[str, ...]:
    """One caption per image. Which of several depends on `seed` and on the image's running number, from `first` on.

    The running number counts all images since training began, so an image that comes again shows other captions.
    """
    return tuple(
        several[0] if len(several) == 1 else several[_mixed(seed, number, 1) % len(several)]
        for number, several in enumerate(captions, first)
    )


def _captioned(
    batches: Iterator[Batch], dataset: ImageDataset, order: BatchOrder, steps: range, share: slice
) -> Iterator[Batch]:
    """`batches` of the process that has this share, with captions."""
    for step, batch in zip(steps, batches, strict=True):
        captions = captions_of(dataset, batch.indices.tolist(), batch.labels)
        first = step * order.batch_size + share.start
        yield batch._replace(captions=choose_captions(captions, order.seed, first))


# ------------------------------------------------------------------------------------------- data sets


class Order(Protocol):
    """Which examples make up a batch."""

    def indices(self, step: int) -> Tensor:
        """The examples int64 (B,) of batch `step`, counted from 0."""


@dataclass(frozen=True)
class _Batches(Dataset[Batch | MezzotintError]):
    """A data set whose item number k is the whole share of batch k, which makes loading it a plain loop over steps."""

    dataset: ImageDataset
    order: Order
    share: slice

    def __getitem__(self, step: int) -> Batch | MezzotintError:
        indices = self.order.indices(step)[self.share]
        if isinstance(self.dataset, BatchedDataset):
            images, labels = self.dataset.get_batch(indices)
            images = images if images.is_floating_point() else to_float(images)
            return Batch(images, labels if self.dataset.class_names else None, indices)
        try:
            return _collate([self.dataset[i] for i in indices.tolist()], self.dataset, indices)
        except MezzotintError as error:
            return error  # raised here, its sentence would reach the user inside a worker's traceback


def dataset_batches(dataset: ImageDataset, order: Order, steps: range, share: slice, workers: int) -> Iterator[Batch]:
    """`iterate_batches` over a finite data set, in any order."""
    batches = _Batches(dataset, order, share)
    loaded: Iterable[Batch | MezzotintError]
    if workers == 0 or isinstance(dataset, InMemoryImages):
        loaded = map(batches.__getitem__, steps)
    elif isinstance(dataset, BatchedDataset):
        loaded = _read_ahead(batches, steps, workers)
    else:
        loaded = DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or the loader would advance the global one
        )
    for batch in loaded:
        if isinstance(batch, MezzotintError):
            raise batch
        yield batch


def _read_ahead(batches: _Batches, steps: range, workers: int) -> Iterator[Batch | MezzotintError]:
    """The batches in order, read by threads, which wait for the disk without Python's lock."""
    with ThreadPoolExecutor(workers) as readers:
        pending: deque[Future[Batch | MezzotintError]] = deque()
        for step in steps:
            pending.append(readers.submit(batches.__getitem__, step))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _collate(
    examples: Sequence[tuple[Tensor, int] | Example], dataset: ImageDataset | ImageStream, indices: Tensor
) -> Batch:
    images = to_float(torch.stack([example[0] for example in examples]))
    labels = torch.tensor([example[1] for example in examples]) if dataset.class_names else None
    return Batch(images, labels, indices)


# --------------------------------------------------------------------------------------------- streams


def _stream_batches(
    stream: ImageStream, order: BatchOrder, steps: range, share: slice, workers: int, captions: bool
) -> Iterator[Batch]:
    """Every process reads the whole stream, and decodes its share: so its batches are those of a single process."""
    examples = stream.read(steps.start * order.batch_size, order.seed)

    def load(step: int, decoders: ThreadPoolExecutor | None) -> Batch:
        window = list(islice(examples, order.batch_size))
        positions = range(order.batch_size)[share]
        decode = partial(stream.decode, window)
        decoded = list(decoders.map(decode, positions) if decoders else map(decode, positions))
        batch = _collate(decoded, stream, order.indices(step)[share])
        if not captions:
            return batch
        own, names = has_captions(stream), stream.class_names
        texts = [example.captions if own else (names[example.label],) for example in decoded]
        return batch._replace(captions=choose_captions(texts, order.seed, step * order.batch_size + share.start))

    if workers == 0:
        yield from (load(step, None) for step in steps)
        return
    # One thread reads, so the order stays; PIL decodes without Python's lock, so more threads do help with that.
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(1) as reader:
        pending: deque[Future[Batch]] = deque()
        for step in steps:
            pending.append(reader.submit(load, step, decoders))
            if len(pending) > STREAM_PREFETCH:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
