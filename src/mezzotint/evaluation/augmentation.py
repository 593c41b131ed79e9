"""Images changed at random by torchvision's transforms, each by a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.data.loader import BatchOrder, dataset_batches
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.sources import DatasetSource
from mezzotint.randomness import mix

Change = Callable[[Tensor], Tensor]
"""One image (C, H, W) to another; what it draws, it draws from torch's global generator."""


def transformed(images: Tensor, change: Change, seeds: Sequence[int]) -> Tensor:
    """`change` of each of the images (B, C, H, W). What becomes of an image depends on it and on its seed alone."""
    changed = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator alone
        for image, seed in zip(images, seeds, strict=True):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than the crop
            changed.append(change(image))
    return torch.stack(changed)


def cropping(size: tuple[int, int], smallest: float = 0.08, flip: bool = True) -> list[Change]:
    """torchvision's random resized crop (bicubic) of at least this share of the area, 1: none; and horizontal flip."""
    from torchvision.transforms import v2

    changes: list[Change] = []
    if smallest < 1:
        mode = v2.InterpolationMode.BICUBIC
        changes.append(v2.RandomResizedCrop(size, scale=(smallest, 1), interpolation=mode, antialias=True))
    if flip:
        changes.append(v2.RandomHorizontalFlip())
    return changes


def crop_and_flip(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """`cropping` of images uint8 (B, C, H, W), with torchvision's own scales and ratios."""
    from torchvision.transforms import v2

    height, width = images.shape[-2:]
    return transformed(images, v2.Compose(cropping((height, width))), seeds)


@dataclass(frozen=True)
class _Chosen:
    """The batches of `order` over the examples `chosen`."""

    order: BatchOrder
    chosen: Tensor

    def indices(self, step: int) -> Tensor:
        return self.chosen[self.order.indices(step)]


def augmented_batches(
    source: DatasetSource, batch_size: int, steps: int, change: Change, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`steps` batches of changed images, and labels int64 (B,) where there are any, in a shuffled order without end.

    An image is changed anew each time it is met. Raises `MezzotintError` for an image without a label in labelled data.
    """
    order = BatchOrder(len(source.indices), batch_size, seed)
    batches = dataset_batches(source.dataset, _Chosen(order, source.indices), range(steps), slice(None), source.workers)
    for step, batch in enumerate(batches):
        if batch.labels is not None and (batch.labels < 0).any():
            raise MezzotintError(f"some images of {source.identity} have no label; choose data that have")
        seeds = [mix(seed, step, index) for index in batch.indices.tolist()]
        yield transformed(to_uint8(batch.images), change, seeds), batch.labels
