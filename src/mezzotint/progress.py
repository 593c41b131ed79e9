"""Progress on the terminal, through rich; silent where there is nobody to watch."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

#: progress and messages go to standard error, results to standard output; what is printed has anybody's paths and names
#: in it, so brackets and colons are neither markup nor emoji
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
results = Console(highlight=False, markup=False, emoji=False)


def print_anything() -> None:
    """Let a console that has no letter for a character show its number, ``\\xd7``, in place of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def progress_bar(*columns: str) -> Progress:
    """A live line: description, bar, count, the named task fields, time left. Removed when done."""
    fields = (TextColumn("{task.fields[" + name + "]}", markup=False) for name in columns)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def track(items: Iterable[T], description: str, *, total: int, enabled: bool = True) -> Iterator[T]:
    """Iterate with a progress bar on an interactive terminal."""
    if not (enabled and console.is_terminal):
        yield from items
        return
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=description)
