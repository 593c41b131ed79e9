"""The one exception type for a user's mistake."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from operator import index
from typing import Any, SupportsIndex

#: characters of the longest message, in which a user's words may be repeated that have no end
LONGEST = 2000
#: names that a sentence can list
FEW = 20


class MezzotintError(Exception):
    """One sentence: what was wrong, what was expected, what to do. The command line prints it and exits with 2."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())  # a name in it may have line ends
        return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 4 :]}"


def expect(value: Any, kind: Any, what: str) -> Any:
    """`value`, which is a `kind`. Raises `MezzotintError` where it is not, with `what` was expected."""
    if not isinstance(value, kind):
        shown = shortened(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise MezzotintError(f"expected {what}, not {shown}")
    return value


def check_count(name: str, value: object) -> None:
    """Raise `MezzotintError` unless `value` is a whole number, 1 or more."""
    if not isinstance(value, SupportsIndex):
        raise MezzotintError(f"{name} must be a whole number, got {shortened(value)}")
    if index(value) < 1:
        raise MezzotintError(f"{name} must be at least 1, got {shortened(value)}")


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.4) -> list[str]:
    """Up to three of `known` that an unknown `word` may stand for: they begin with it, contain it or are like it."""
    known = list(known)
    near = [name for name in known if name.startswith(word)] if word else []
    near += [name for name in known if word in name] if len(word) > 2 else []
    near += difflib.get_close_matches(word, known, n=3, cutoff=cutoff)
    return list(dict.fromkeys(near))[:3]


def closest(word: str, known: Iterable[str]) -> str:
    """``"closest: a, b"`` for an unknown `word` among `known`; where nothing is near, all of them if they are few."""
    known = list(known)
    if near := nearest(word, known):
        return f"closest: {', '.join(near)}"
    return f"known: {', '.join(known)}" if len(known) <= FEW else f"none of the {len(known):,} known ones is close"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no longer ones out.
        return f"a whole number of {x.bit_length():,} bits" if x.bit_length() > 4096 else super().repr_int(x, level)


def shortened(value: object) -> str:
    """``repr(value)``, as much of it as a sentence can hold."""
    return _Short().repr(value)
