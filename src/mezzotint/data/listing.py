"""What is in a folder: the files that were put there, without what systems and programs leave beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mezzotint.errors import MezzotintError

logger = logging.getLogger("mezzotint")

LITTER = frozenset(
    {
        "__macosx",  # macOS, in archives
        "@eadir",  # Synology: thumbnails
        "#recycle",
        "$recycle.bin",  # Windows
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",  # macOS: of a folder
        "lost+found",  # ext4
        "__pycache__",
    }
)
"""Names, in lower case, of files and folders that other systems leave. Hidden ones are such by their dot."""

LITTER_REASON = "hidden or left by other systems"


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or known to be left by some system beside one's own files."""
    return name.startswith(".") or name.lower() in LITTER


@dataclass
class LeftAside:
    """What is not read, counted by reason, with an example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, name)

    def report(self, where: str) -> None:
        """Warns in one line, once for the same line; says nothing where nothing was left aside."""
        if self.counts:
            parts = (f"{reason}: {count:,} (such as {self.examples[reason]})" for reason, count in self.counts.items())
            warn_once(f"{where}, left aside: {'; '.join(parts)}")


@cache
def warn_once(line: str) -> None:
    """Logs a warning, unless the same one was logged before: one command may look at a folder several times."""
    logger.warning("%s", line)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without litter, and without links back to what they are in.

    Raises `MezzotintError` for a folder that cannot be opened.
    """
    above = _identities(folder)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not is_litter(entry.name) and _is_folder(entry)]
    except OSError as error:
        raise MezzotintError(f"folder {folder} cannot be opened ({error.strerror}); check whose it is") from None
    return sorted(name for name in names if _identity(folder / name) not in above)


def walk(root: str | Path, left: LeftAside) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `root`, itself first, with the sorted names of the files in it; litter goes to `left`.

    Links are followed, but not back to a folder that they are in. Files are regular ones, and links to nothing, which
    are found out when they are read.
    """
    stack = [(str(root), _identities(Path(root).resolve().parent))]
    while stack:
        folder, above = stack.pop()
        try:
            here = _identity(folder)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            left.add("folders that cannot be opened", os.path.relpath(folder, root))
            continue
        if here in above:
            left.add("links to a folder that they are in", os.path.relpath(folder, root))
            continue
        names, inside = [], []
        for entry in entries:
            if is_litter(entry.name):
                left.add(LITTER_REASON, os.path.relpath(entry.path, root))
            elif _is_folder(entry):
                inside.append((entry.path, above | {here}))
            elif entry.is_file() if not entry.is_symlink() else _is_file_or_broken(entry.path):
                names.append(entry.name)
            else:
                left.add("neither files nor folders", os.path.relpath(entry.path, root))
        stack += reversed(inside)
        yield folder, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # the former knows links in a circle


def _is_file_or_broken(path: str) -> bool:
    return os.path.isfile(path) or not os.path.exists(path)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _identities(folder: Path) -> frozenset[tuple[int, int]]:
    """Of `folder` and of all that it is in."""
    place = folder.resolve()
    return frozenset(_identity(path) for path in (place, *place.parents))
