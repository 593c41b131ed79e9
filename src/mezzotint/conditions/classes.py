"""Class labels, by number or by name."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest, shortened

NUMBER = re.compile("-?[0-9]+")


class _Names:
    """The classes that a name may mean, in any case: those of that name, else those of which it is one of the names.

    ImageNet's are of the form "tench, Tinca tinca". How letters are composed (é as one or two) makes no difference.
    """

    def __init__(self, class_names: Sequence[str], null: Sequence[int] = ()) -> None:
        self.names: dict[str, list[int]] = {"null": list(null)} if null else {}
        self.parts: dict[str, list[int]] = {}
        for number, name in enumerate(map(_spelt, class_names)):
            self.names.setdefault(name, []).append(number)
            for part in dict.fromkeys(name.split(", ")):
                self.parts.setdefault(part, []).append(number)

    def find(self, text: str) -> list[int]:
        return self.names.get(_spelt(text)) or self.parts.get(_spelt(text)) or []


def _spelt(name: str) -> str:
    return ", ".join(part.strip() for part in unicodedata.normalize("NFC", name.casefold()).split(","))


def split_classes(text: str, class_names: Sequence[str] = ()) -> list[str]:
    """The names and numbers in `text`, with commas between; of names that have commas themselves, the longest first."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    names, longest = _Names(class_names), 1 + max((name.count(",") for name in class_names), default=0)
    found = []
    while parts:
        whole = [length for length in range(2, longest + 1) if names.find(", ".join(parts[:length]))]
        length = max(whole, default=1)
        found.append(", ".join(parts[:length]))
        del parts[:length]
    return found


#: one class, or several: numbers (Python's, NumPy's, a tensor or a range of them) and names; "3, otter" is two of them
Classes = SupportsIndex | str | Iterable[SupportsIndex | str]


def parse_classes(classes: Classes, num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """Class numbers for numbers or names (any case); the name "null" is the null class, which is `num_classes`.

    Of a class called "tench, Tinca tinca" each part is a name, too. Where all classes are named by numbers that are not
    their own, as folders 1 to 10 are, numbers are names. Raises `MezzotintError` for a name or number that the model
    does not know, or a name that several classes have.
    """
    if not num_classes:
        raise MezzotintError("classes were given, but this model is unconditional; leave them out")
    names = _Names(class_names, [num_classes])
    numbered = all(map(NUMBER.fullmatch, class_names)) and list(class_names) != [
        str(i) for i in range(len(class_names))
    ]
    parsed = []
    for text in _listed(classes, class_names):
        if named := names.find(text):  # a data set's names come first: a class may be named by a digit
            if len(named) > 1:
                raise MezzotintError(
                    f"{len(named)} classes are called {text!r}: {', '.join(map(str, named))}; give one's number"
                )
            parsed += named
        elif NUMBER.fullmatch(text) and numbered:
            raise MezzotintError(
                f"class {shortened(text)} is unknown: the classes are named by numbers, and none by this one; "
                f'{closest(text, class_names)}; "null" is no class'
            )
        elif NUMBER.fullmatch(text) and len(text) < 10 and 0 <= int(text) < num_classes:
            parsed.append(int(text))
        elif NUMBER.fullmatch(text):
            raise MezzotintError(
                f'class {text[:20]} is out of range; this model has classes 0 to {num_classes - 1}, and "null" is none '
                "of them"
            )
        else:
            hint = closest(text, class_names) if class_names else f"this model has classes 0 to {num_classes - 1}"
            raise MezzotintError(f"class {shortened(text)} is unknown; {hint}")
    return parsed


def _listed(classes: Classes, class_names: Sequence[str]) -> list[str]:
    """Each of `classes` as text."""
    if isinstance(classes, str):
        classes = split_classes(classes, class_names)
    if isinstance(classes, Tensor | np.ndarray):
        classes = classes.tolist()  # one number of one without dimensions
    items = classes if isinstance(classes, Iterable) else [classes]
    found = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | SupportsIndex):
            raise MezzotintError(f"{shortened(item)} is no class; expected a number or a name")
        found.append(item.strip() if isinstance(item, str) else str(operator.index(item)))
    if not found:
        raise MezzotintError("no classes were given; name one, or leave them out for all of the model's")
    return found


def class_labels(classes: Sequence[int], count: int) -> Tensor:
    """`count` labels int64 (count,) that cover `classes` evenly and in order, a class's examples side by side."""
    table = torch.tensor(list(classes), dtype=torch.int64)
    return table[torch.arange(count) * len(table) // count]
