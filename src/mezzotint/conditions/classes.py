"""Class labels, by number or by name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest, shortened

NUMBER = re.compile("-?[0-9]+")


class _Names:
    """The classes that a name may mean: those of that name, else in any case, else of which it is one of the names.

    ImageNet's are of the form "tench, Tinca tinca". How letters are composed (é as one or two) makes no difference.
    """

    def __init__(self, class_names: Sequence[str], null: Sequence[int] = ()) -> None:
        self.tables: tuple[dict[str, list[int]], ...] = ({}, {}, {})
        for number, name in [*((number, "null") for number in null), *enumerate(class_names)]:
            spelt = _spelt(name)
            keys = [spelt], [spelt.casefold()], dict.fromkeys(spelt.casefold().split(", "))
            for table, words in zip(self.tables, keys, strict=True):
                for word in words:
                    table.setdefault(word, []).append(number)

    def find(self, text: str) -> list[int]:
        spelt = _spelt(text)
        words = spelt, spelt.casefold(), spelt.casefold()
        return next((table[word] for table, word in zip(self.tables, words, strict=True) if word in table), [])


def _spelt(name: str) -> str:
    return ", ".join(part.strip() for part in unicodedata.normalize("NFC", name).split(","))


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


def parse_classes(classes: Sequence[int | str], num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """Class numbers for numbers or names (any case); `num_classes` itself, or the name "null", is the null class.

    Of a class called "tench, Tinca tinca" each part is a name, too. Where all classes are named by numbers, numbers are
    names. Raises `MezzotintError` for a name or number that the model does not know, or a name that several classes
    have.
    """
    if not num_classes:
        raise MezzotintError("classes were given, but this model is unconditional; leave them out")
    names = _Names(class_names, [num_classes])
    numbered = bool(class_names) and all(NUMBER.fullmatch(name) for name in class_names)
    parsed = []
    for item in classes:
        text = str(item).strip()
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
        elif NUMBER.fullmatch(text) and len(text) < 10 and 0 <= int(text) <= num_classes:
            parsed.append(int(text))
        elif NUMBER.fullmatch(text):
            raise MezzotintError(f"class {text[:20]} is out of range; this model has classes 0 to {num_classes - 1}")
        else:
            hint = closest(text, class_names) if class_names else f"this model has classes 0 to {num_classes - 1}"
            raise MezzotintError(f"class {shortened(text)} is unknown; {hint}")
    return parsed


def class_labels(classes: Sequence[int], count: int) -> Tensor:
    """`count` labels int64 (count,) that cover `classes` evenly and in order, a class's examples side by side."""
    table = torch.tensor(list(classes), dtype=torch.int64)
    return table[torch.arange(count) * len(table) // count]
