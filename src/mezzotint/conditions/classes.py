"""Class labels, by number or by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest


def parse_classes(classes: Sequence[int | str], num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """Class numbers for numbers or names (any case); `num_classes` itself, or the name "null", is the null class.

    Raises `MezzotintError` for a name or number that the model does not know, or a name that several classes have.
    """
    if not num_classes:
        raise MezzotintError("classes were given, but this model is unconditional; leave them out")
    numbers: dict[str, list[int]] = {"null": [num_classes]}
    for i, name in enumerate(class_names):
        numbers.setdefault(name.lower(), []).append(i)
    parsed = []
    for item in classes:
        text = str(item).strip()
        if named := numbers.get(text.lower()):  # a data set's names come first: a class may be named by a digit
            if len(named) > 1:
                raise MezzotintError(
                    f"{len(named)} classes are called {text!r}: {', '.join(map(str, named))}; give one's number"
                )
            parsed += named
        elif text.isdigit() and int(text) <= num_classes:
            parsed.append(int(text))
        elif text.lstrip("-").isdigit():
            raise MezzotintError(f"class {text} is out of range; this model has classes 0 to {num_classes - 1}")
        else:
            hint = closest(text, class_names) if class_names else f"this model has classes 0 to {num_classes - 1}"
            raise MezzotintError(f"class {text!r} is unknown; {hint}")
    return parsed


def class_labels(classes: Sequence[int], count: int) -> Tensor:
    """`count` labels int64 (count,) that cover `classes` evenly and in order, a class's examples side by side."""
    table = torch.tensor(list(classes), dtype=torch.int64)
    return table[torch.arange(count) * len(table) // count]
