"""What is kept under `files.cache_folder`, how large it is, and clearing it; all of it is made again when needed.

Of each kind only files as this library writes them count, straight in the kind's own place; links are not followed, and
whatever else is there, as in a cache folder that is somebody's home, is left alone.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mezzotint.errors import MezzotintError, closest
from mezzotint.files import cache_folder, sweep
from mezzotint.store import Store

#: what is kept, by kind: a folder of that name, or databases that are called by it
KINDS = {
    "classifiers": "networks that judge images, fitted to data sets",
    "references": "statistics of real images",
    "features": "a network's features of images, for probes",
    "captions": "captions, as text encoders read them",
    "digests": "what files are told apart by",
}
#: how files of all kinds are called: by a key in hexadecimal digits, or by a version
NAME = re.compile(r".+-(?:[0-9a-f]{8}|[0-9a-f]{16})(?:-\w+)?\.(?:safetensors|npz|sqlite3)|digests-\d+\.sqlite3")


class Kept(NamedTuple):
    """Files of one kind."""

    files: int
    bytes: int


def kept() -> dict[str, Kept]:
    """What there is of each of `KINDS`."""
    return {kind: _summed(size for _, size in _files(kind)) for kind in KINDS}


def clear(kind: str | None = None) -> tuple[dict[str, Kept], list[str]]:
    """Remove what is kept, or one kind of it: what was removed of each, and a sentence on each thing that was left.

    Safe while other processes run: what they are writing is not touched, and what they have lost they make again.
    Raises `MezzotintError` for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise MezzotintError(f"nothing of the kind {kind!r} is kept; {closest(kind, KINDS)}")
    removed, left = {}, []
    for one in KINDS if kind is None else [kind]:
        sizes = []
        if (place := cache_folder() / one).is_symlink():
            left.append(f"{place} is a link to {place.resolve()}, where nothing was removed; clear that yourself")
        for file, size in _files(one):
            try:
                if file.suffix != ".sqlite3":
                    file.unlink(missing_ok=True)
                elif not Store(file).remove():
                    left.append(f"{file} is in use by another process; clear it when that has ended")
                    continue
                sizes.append(size)
            except OSError as error:
                left.append(f"{file} cannot be removed: {error.strerror or error}")
        if place.is_dir() and not place.is_symlink():
            sweep(place)  # what killed processes have left
        removed[one] = _summed(iter(sizes))
    return removed, left


def _files(kind: str) -> Iterator[tuple[Path, int]]:
    """Our files of a kind, and their sizes."""
    folder = cache_folder()
    place = folder / kind
    with suppress(OSError):
        found = folder.glob(f"{kind}-*.sqlite3") if not place.is_dir() or place.is_symlink() else place.iterdir()
        for file in sorted(found):
            with suppress(OSError):
                about = file.lstat()
                if stat.S_ISREG(about.st_mode) and NAME.fullmatch(file.name):
                    yield file, about.st_size


def _summed(sizes: Iterator[int]) -> Kept:
    every = [*sizes]
    return Kept(len(every), sum(every))
