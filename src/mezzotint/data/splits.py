"""Which part of a data set is for training and which for testing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from mezzotint.errors import MezzotintError

T = TypeVar("T")

SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""What data sets call the two splits, the preferred name first."""


class NoSuchSplit(MezzotintError):
    """The data set can be read, and has no such split."""


def check_split(split: str, known: Sequence[str] = ("train", "test")) -> None:
    """Raises `MezzotintError` unless `split` is one of `known`."""
    if split not in known:
        raise MezzotintError(f"split {split!r} is unknown; expected {' or '.join(known)}")


def pick_split(parts: Mapping[str, T], split: str, test_fraction: float, where: str) -> T:
    """The part of a data set to take `split` from: its own, or the training part when a test split is to be held out.

    `parts` maps the data set's own split names to whatever stands for them; `where` names it in errors.
    Raises `NoSuchSplit` when there is no such part, `MezzotintError` when both ways to a test split are open.
    """
    check_split(split)
    own = {wanted: next((name for name in names if name in parts), None) for wanted, names in SPLIT_NAMES.items()}
    if own["test"] and test_fraction:
        raise MezzotintError(f"{where} has a test split of its own, {own['test']!r}; leave data.test_fraction at 0")
    name = own[split] or (own["train"] if test_fraction else None)
    if name is None:
        hint = "; set data.test_fraction, for example to 0.1, to hold one out" if split == "test" else ""
        raise NoSuchSplit(f"{where} has no {split} split, only {', '.join(parts)}{hint}")
    return parts[name]


def held_out(num_examples: int, split: str, test_fraction: float, stratify: np.ndarray | None = None) -> np.ndarray:
    """The indices int64 (n,), ascending, of `split` when `test_fraction` of all examples is held out for testing.

    Always the same ones: scikit-learn's `train_test_split` with ``random_state=0``. With a fraction of 0 every example
    is in either split. Raises `MezzotintError` for a fraction outside [0, 1) or a split that would be empty.
    """
    if not 0 <= test_fraction < 1:
        raise MezzotintError(f"data.test_fraction is {test_fraction}; expected at least 0 and less than 1")
    everything = np.arange(num_examples)
    if test_fraction == 0:
        return everything
    from sklearn.model_selection import train_test_split  # seconds to import

    try:
        train, test = train_test_split(everything, test_size=test_fraction, random_state=0, stratify=stratify)
    except ValueError:
        raise MezzotintError(
            f"{num_examples} images cannot be split by data.test_fraction={test_fraction}, as one part would be empty; "
            "add images or set another fraction"
        ) from None
    return np.sort(train if split == "train" else test)
