"""Progress on the terminal, through rich; silent where there is nobody to watch. And what is said meanwhile."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

#: progress and messages go to standard error, results to standard output; what is printed has anybody's paths and names
#: in it, so brackets and colons are neither markup nor emoji
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
results = Console(highlight=False, markup=False, emoji=False)


#: of a log record (``extra=OWN``): what this process alone has seen, which is shown though it is not torchrun's first
OWN = {"own": True}


class _Messages(logging.Handler):
    """Shows a log record on `console`, in one line that begins with its level: each text once, and of all of torchrun's
    processes by the first."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().splitlines())
        first = os.environ.get("RANK", "0") in ("", "0")
        if text in self._shown or not (first or getattr(record, "own", False)):
            return
        self._shown.add(text)
        console.print(Text.assemble((record.levelname.lower(), "yellow"), ": ", text), soft_wrap=True)


@contextmanager
def messages() -> Iterator[None]:
    """Show what is logged as a warning or worse on `console`, and so what Python warns of, without the line of code."""

    def warned(message: Warning | str, *_: object, **__: object) -> None:
        logging.getLogger("py.warnings").warning("%s", message)

    root, handler, before = logging.getLogger(), _Messages(), warnings.showwarning
    root.addHandler(handler)
    warnings.showwarning = warned
    try:
        yield
    finally:
        root.removeHandler(handler)
        warnings.showwarning = before


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
