"""The one exception type for a user's mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MezzotintError(Exception):
    """One sentence: what was wrong, what was expected, what to do. The command line prints it and exits with 2."""


def closest(word: str, known: Iterable[str]) -> str:
    """``"closest: a, b"`` for an unknown `word` among `known`, or all of them when nothing is near."""
    known = list(known)
    near = [name for name in known if name.startswith(word)] if word else []
    near = [*near, *(name for name in difflib.get_close_matches(word, known, n=3, cutoff=0.4) if name not in near)][:3]
    return f"closest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
