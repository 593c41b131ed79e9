"""Bytes by key in a file, for what can be made again: several processes may use it at once, and none has to."""

from __future__ import annotations

import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

logger = logging.getLogger("mezzotint")

#: seconds to wait for another process that is writing
PATIENCE = 60.0
#: keys in one question to a database, fewer than SQLite's least limit of 999
KEYS_AT_ONCE = 500


class Store:
    """Bytes by key in one SQLite file. What cannot be read or written is missing.

    what: its content, for a warning where that happens the first time; empty: none.
    """

    def __init__(self, path: Path, what: str = "") -> None:
        self.path, self.what = path, what
        self._warned = False

    def read(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those that are there and whole."""
        found: dict[bytes, bytes] = {}
        with self._forgiving("read"), self._opened() as database:
            for start in range(0, len(keys), KEYS_AT_ONCE):
                some = keys[start : start + KEYS_AT_ONCE]
                places = ", ".join("?" * len(some))
                rows = database.execute(f"SELECT key, checksum, data FROM features WHERE key IN ({places})", some)
                found |= {key: data for key, checksum, data in rows if zlib.crc32(data) == checksum}
        return found

    def write(self, rows: Mapping[bytes, bytes]) -> None:
        """All of them or none."""
        with self._forgiving("written"), self._opened() as database:
            database.executemany(
                "INSERT OR REPLACE INTO features VALUES (?, ?, ?)",
                [(key, zlib.crc32(data), data) for key, data in rows.items()],
            )

    def remove(self, patience: float = 5.0) -> bool:
        """Remove the file, when no process reads or writes it; False where one still does after `patience` seconds.

        Another that has it open loses what it writes from then on. Raises `OSError` where the file is not ours.
        """
        try:
            with closing(sqlite3.connect(self.path, timeout=patience)) as database:
                database.execute("BEGIN EXCLUSIVE")
                self.path.unlink(missing_ok=True)
        except sqlite3.Error as error:
            if "locked" in str(error):
                return False
            self.path.unlink(missing_ok=True)  # damaged: nobody can use it
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)  # of one that was killed
        return True

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection for this call alone: none may be carried into another process or thread."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, checksum INT, data BLOB)")
            yield database

    @contextmanager
    def _forgiving(self, purpose: str) -> Iterator[None]:
        """A full disk, a damaged file or a folder that is not ours must not end a training."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if self.what and not self._warned:
                logger.warning(
                    "%s in %s cannot be %s (%s), and are computed anew; if it stays so, remove it",
                    self.what, self.path, purpose, error,
                )  # fmt: skip
            self._warned = True
