"""Which part of a data set is for training and which for testing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from mezzotint.errors import MezzotintError

T = TypeVar("T")

SPLIT_NAMES = {
    "train": (r"train(ing)?",),
    "test": (r"test(ing)?", r"val(id(ation)?)?", r"dev(elopment)?", r"eval(uation)?"),
}
"""What data sets call the two splits, the preferred name first; in any case, and with what `_ADDITION` allows."""

_ADDITION = r"([-_ ]?(set|split|data|images?))?[-_ ]?\d*"  # training_set, test-images, val2017


class NoSuchSplit(MezzotintError):
    """The data set can be read, and has no such split."""


def check_split(split: str, known: Sequence[str] = ("train", "test")) -> None:
    """Raises `MezzotintError` unless `split` is one of `known`."""
    if split not in known:
        raise MezzotintError(f"split {split!r} is unknown; expected {' or '.join(known)}")


def split_of(name: str, *, within: bool = False) -> str | None:
    """ "train" or "test" for what data sets call them: Train, training_set, dev, val2017; else None.

    `within`: also where such a name is only part of it, as in DIV2K_train_HR.
    """
    return next((split for split in SPLIT_NAMES if any(_match(name, p, within) for p in SPLIT_NAMES[split])), None)


def split_word(name: str) -> str | None:
    """What `name` says of a split, "validation" of imagenet-validation-00; else None."""
    matches = (_match(name, pattern, True) for patterns in SPLIT_NAMES.values() for pattern in patterns)
    return next((match[1].lower() for match in matches if match), None)


def pick_split(
    parts: Mapping[str, T], split: str, test_fraction: float, where: str, labelled: Callable[[T], bool] | None = None
) -> T:
    """The part of a data set to take `split` from: its own, or the training part when a test split is to be held out.

    `parts` maps the data set's own split names to whatever stands for them; `where` names it in errors. A part that is
    not `labelled`, as the test images of a competition are not, is no split. Raises `NoSuchSplit` when there is no such
    part, `MezzotintError` when several are called so, or both ways to a test split are open.
    """
    check_split(split)
    bare: list[str] = []

    def own(wanted: str) -> str | None:
        while (name := _first(set(parts) - set(bare), wanted, where)) and labelled and not labelled(parts[name]):
            bare.append(name)
        return name

    if test_fraction and (test := own("test")):
        raise MezzotintError(f"{where} has a test split of its own, {test!r}; leave data.test_fraction at 0")
    name = own(split) or (own("train") if test_fraction else None)
    if name is None:
        hint = "; set data.test_fraction, for example to 0.1, to hold one out" if split == "test" else ""
        unlabelled = f" ({', '.join(bare)} without labels, so set data.labels=false to use it)" if bare else ""
        raise NoSuchSplit(f"{where} has no {split} split, only {', '.join(parts)}{unlabelled}{hint}")
    return parts[name]


def _match(name: str, pattern: str, within: bool) -> re.Match[str] | None:
    word = f"({pattern}){_ADDITION}"
    return (
        re.search(f"(?<![a-z]){word}(?![a-z])", name, re.IGNORECASE)
        if within
        else re.fullmatch(word, name, re.IGNORECASE)
    )


def _first(names: Iterable[str], split: str, where: str) -> str | None:
    """Which of `names` means `split` most likely; raises `MezzotintError` for two alike."""
    for within in (False, True):
        for pattern in SPLIT_NAMES[split]:
            found = sorted(name for name in names if _match(name, pattern, within))
            if len(found) > 1:
                raise MezzotintError(
                    f"{where} has several {split} splits, {', '.join(found)}; expected one, so keep it"
                )
            if found:
                return found[0]
    return None


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
