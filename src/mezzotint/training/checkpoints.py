"""Training state on disk: written whole or not at all, verified when read, pruned only once a newer one is whole."""

from __future__ import annotations

import io
import json
import logging
import os
import pathlib
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mezzotint.errors import MezzotintError
from mezzotint.files import file_checksum, parse_json, readable_size, sweep, temporary_name, write_text
from mezzotint.training.parallel import World

logger = logging.getLogger("mezzotint")

MANIFEST = "manifest.json"


class Checkpoints:
    """The folder of a run's training states, one torch.distributed.checkpoint folder each, ``step-00001000``.

    A state is written beside its place and renamed into it with a manifest of its files' sizes and CRC-32s, so a folder
    that has its name is whole unless someone damaged it; one that was damaged is passed over for the one before.
    Nothing in a state can run code (`SafeReader`). One that another user wrote is refused unless `trust_code`.
    """

    def __init__(self, folder: Path, world: World, keep: int, *, trust_code: bool = False) -> None:
        self.folder, self.world, self.keep, self.trust_code = folder, world, keep, trust_code

    def steps(self) -> list[int]:
        """Steps that have a state, oldest first, whole or not."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{8,}", name))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int | None:
        """The newest step whose state is whole, or None. Every process calls it, and reads its share of the files.

        Raises `MezzotintError` where that state is another user's.
        """
        for step in reversed(self.steps()):
            if not self.trust_code:
                refuse_others(self.path(step))
            damage = self.damage(step)
            if not self.world.any(bool(damage)):
                return step
            self._pass_over(step, damage or "another process cannot read its share of it")
        return None

    def _pass_over(self, step: int, damage: str) -> None:
        if self.world.is_main:
            logger.warning("checkpoint %s is damaged: %s; trying the one before it", self.path(step), damage)

    def damage(self, step: int) -> str:
        """What is wrong with this process's share of the state's files, or nothing."""
        path = self.path(step)
        try:
            manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
            for name, written in sorted(manifest.items())[self.world.rank :: self.world.size]:
                size, checksum = (written, None) if isinstance(written, int) else (written["bytes"], written["crc32"])
                if (path / name).stat().st_size != size:
                    return f"{name} has not the {size} bytes that were written"
                if checksum is not None and file_checksum(path / name) != checksum:
                    return f"{name} has another content than was written"
        except OSError as error:
            return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} is no manifest"
        return ""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `state` as this step's, then drop all but the newest `keep`. Every process calls it."""
        place = self.path(step)
        unfinished = self.world.of_main(lambda: temporary_name(place))
        failure, cause = "", None
        if self.world.is_main:
            sweep(self.folder)
        try:
            with _alone():
                save(state, checkpoint_id=unfinished, no_dist=self.world.size == 1)
            if self.world.is_main:
                self._finish(unfinished, place)
        except (OSError, MezzotintError, CheckpointException) as error:
            cause = _cause(error)
            failure = self._why_not_written(cause, state, unfinished)
        if self.world.any(bool(failure)):
            if self.world.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(cause, KeyboardInterrupt):
                raise cause
            raise MezzotintError(
                f"cannot write checkpoint {place}: {failure or 'another process failed'}; "
                "the checkpoints before it are as they were. Free some space and go on with 'mezzotint resume'"
            )
        if self.world.is_main:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        self.world.barrier()

    def _why_not_written(self, cause: BaseException, state: dict[str, Any], unfinished: Path) -> str:
        needed, free = _size(state), shutil.disk_usage(self.folder).free + sum(map(_length, unfinished.glob("*")))
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else " ".join(str(cause).split())[:300]
        if free < needed and not isinstance(cause, OSError):  # torch's file writer says it in words of its own
            reason = "No space left on device"
        return f"{reason} ({readable_size(needed)} are needed, {readable_size(free)} free)"

    def _finish(self, unfinished: Path, place: Path) -> None:
        files = [path for path in unfinished.iterdir() if path.is_file()]
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        manifest = {path.name: {"bytes": path.stat().st_size, "crc32": file_checksum(path)} for path in files}
        write_text(unfinished / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if place.exists():  # a damaged one of the same step
            shutil.rmtree(place)
        os.rename(unfinished, place)

    def load(self, step: int, state: dict[str, Any]) -> int:
        """Fill the tensors of `state` in place from this step's files, or where these fail from those of one before.

        Returns the step. Raises `MezzotintError` where none can be read; `state` is then neither old nor new.
        """
        problem = ""
        for number in reversed([one for one in self.steps() if one <= step]):
            if number < step:
                if not self.trust_code:
                    refuse_others(self.path(number))
                if self.world.any(bool(problem := self.damage(number))):
                    self._pass_over(number, problem)
                    continue
            problem = self._fill(number, state)
            if not problem:
                return number
            self._pass_over(number, problem)
        raise MezzotintError(
            f"no checkpoint in {self.folder} can be read ({problem}); remove that folder to begin anew"
        )

    def _fill(self, step: int, state: dict[str, Any]) -> str:
        """Why `state` could not be filled from this step's files; nothing where it was."""
        problem = ""
        try:
            reader = SafeReader(self.path(step))
        except Exception as error:  # what a pickle of other bytes may raise is anything
            problem = f".metadata cannot be read ({' '.join(str(error).split())[:300]})"
        if self.world.any(bool(problem)):
            return problem or "another process cannot read it"
        try:
            with _alone():
                load(state, storage_reader=reader, planner=SafePlanner(), no_dist=self.world.size == 1)
        except CheckpointException as error:
            cause = _cause(error)
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            problem = " ".join(str(cause).split())[:300]
        return problem


def refuse_others(path: Path) -> None:
    """Raise `MezzotintError` where a state, or a file in it, belongs to another user than this one or root."""
    if not hasattr(os, "getuid"):  # Windows has no such owners
        return
    for file in (path, *path.iterdir()):
        owner = file.stat().st_uid
        if owner not in (os.getuid(), 0):
            raise MezzotintError(
                f"{file} was written by another user ({_user(owner)}); resume runs of your own, or say --trust-code "
                "(trust_code=True) where you trust who wrote it"
            )


def _user(number: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"number {number}"


# ---------------------------------------------------------------------------------------- reading without running code


class SafeReader(FileSystemReader):
    """torch's reader, whose pickle of metadata may name torch's own metadata classes and nothing else."""

    def __init__(self, path: Path) -> None:
        """Raises `pickle.UnpicklingError` where the metadata name anything else."""
        super().__init__(path)
        with open(path / ".metadata", "rb") as file:
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("it holds no metadata of a checkpoint")
        for place in found.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"it names a file outside of the checkpoint, {place.relative_path}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        self.metadata = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which is given what is no tensor only after it was unpickled with ``weights_only``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises `pickle.UnpicklingError` for anything but tensors and plain values."""
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise pickle.UnpicklingError("it holds more than tensors and numbers, and code is never run") from None
        again = io.BytesIO()  # of our own making: torch's planner unpickles in full what it is given
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata, all of which are inert records, and no function but one table."""

    KNOWN = frozenset(
        {
            *((metadata.__name__, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")),
            (filesystem.__name__, "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),  # a name to a torch.layout
            *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
            *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint's metadata")
        return getattr(pathlib, name) if module == "pathlib._local" else super().find_class(module, name)


# -------------------------------------------------------------------------------------------------------------- errors


def _cause(error: BaseException) -> BaseException:
    """What a torch.distributed.checkpoint failed of: an `OSError` or an interruption where there is one behind it."""
    causes = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    behind = [*causes, *(cause.__context__ for cause in causes if cause.__context__ is not None)]
    telling = [cause for cause in behind if isinstance(cause, (OSError, KeyboardInterrupt))]
    return next(iter(telling), causes[0])


def _length(file: Path) -> int:
    """Bytes of a file that may be gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _size(state: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts: Iterable[object] = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(_size, parts))


@contextmanager
def _alone() -> Iterator[None]:
    # torch warns that a single process is a single process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
