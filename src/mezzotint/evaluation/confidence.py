"""Confidence intervals by the bootstrap (Efron 1979): how far a figure would move with other samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.randomness import check_seed


@dataclass(frozen=True)
class Interval:
    """A figure, and the bounds between which it falls for resampled data."""

    value: float
    low: float
    high: float


def bootstrap(
    function: Callable[..., float],
    *arrays: Tensor | np.ndarray,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    paired: bool = False,
) -> Interval:
    """function(*arrays), and the percentile interval that holds `level` of its values on `samples` resampled arrays.

    Arrays are (N, …), resampled by whole rows with replacement: each by itself, or with `paired` all by the same rows
    (images and their captions). Resampling repeats rows, so what grows with fewer distinct samples (a Fréchet distance)
    or looks at neighbours (precision, recall) is shifted: there the width tells, not the place. Raises `MezzotintError`
    where arrays are missing or empty, or unequally long with `paired`, and for fewer than 2 samples, a level outside
    (0, 1) or a function value that is NaN.
    """
    if not arrays or any(array.ndim < 1 or not len(array) for array in arrays):
        raise MezzotintError("the bootstrap needs at least one array, and at least one row in each")
    if samples < 2 or not 0 < level < 1:
        raise MezzotintError(
            f"the bootstrap needs at least 2 samples and a level between 0 and 1, got {samples} and {level}"
        )
    lengths = [len(array) for array in arrays]
    if paired and len(set(lengths)) > 1:
        raise MezzotintError(f"paired arrays must be equally long, got {', '.join(map(str, lengths))} rows")
    generator = torch.Generator().manual_seed(check_seed(seed))

    def draw(length: int) -> Tensor:
        return torch.randint(length, (length,), generator=generator)

    def resampled() -> float:
        indices = [draw(lengths[0])] * len(arrays) if paired else [draw(length) for length in lengths]
        return float(function(*(_rows(array, index) for array, index in zip(arrays, indices, strict=True))))

    value = float(function(*arrays))
    values = np.array([resampled() for _ in range(samples)])
    if np.isnan(values).any() or np.isnan(value):
        raise MezzotintError("the function is NaN on some resampled arrays; give it more rows")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _rows(array: Tensor | np.ndarray, index: Tensor) -> Tensor | np.ndarray:
    return array[index.to(array.device)] if isinstance(array, Tensor) else array[index.numpy()]
