"""Writing files so that a crash, a full disk or a kill leaves the old one or the new one, never half of either.

And what files are told apart by, and where those are kept that can be made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.finite import check_finite

logger = logging.getLogger("mezzotint")

CHECKSUM = "crc32"  # the key of a safetensors header under which `save_tensors` keeps `tensors_checksum`
READ_SIZE = 2**18  # bytes; stays in a processor's cache between reading and summing


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed over `path` on success, removed on failure.

    Raises `MezzotintError` where the disk is full, read-only or not ours to write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that nobody else can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MezzotintError(f"cannot write {path}: {reason}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_free(out: Path) -> None:
    """Raises `MezzotintError` unless a folder can be made at `out`: nothing is there, or an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise MezzotintError(f"{out} exists already; choose another place, or remove it first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill; becomes `out` on success, and is removed on failure.

    Raises `MezzotintError` where the disk is full, read-only or not ours to write.
    """
    place = out.resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(temporary.stat().st_mode & 0o666)  # safetensors makes files that nobody else can read
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if place.is_dir():  # empty, or it would have been refused
            place.rmdir()
        os.replace(temporary, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MezzotintError(f"cannot write {out}: {reason}; free some space or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file at `path`, which `atomic_path` or a folder of its own makes whole or nothing.

    Its header gets `tensors_checksum`, which `read_tensors` verifies. Raises `OSError` for a full disk, and
    `MezzotintError` for numbers that are not finite.
    """
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()  # no two tensors in the file may share memory, as parts of a mapped one do
        storages.add(storage)
        kept[name] = tensor
    check_finite(kept, "what was to be written")
    try:
        save_file(kept, path, metadata | {CHECKSUM: tensors_checksum(kept, metadata)})
        _sort_metadata(path)
    except SafetensorError as error:  # a full disk, in safetensors' words
        needed = readable_size(sum(tensor.nbytes for tensor in kept.values()))
        raise OSError(f"{error}, {needed} are needed") from None


def _sort_metadata(path: Path) -> None:
    """The same content shall be the same bytes: safetensors writes its metadata in an order that changes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # else some letter is written in another way
            file.seek(8)
            file.write(text.ljust(length))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, verified where `save_tensors` wrote it.

    Raises `MezzotintError` where it is cut off, changed since, or none.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise MezzotintError(
            f"{path} is not a whole safetensors file ({error}); take another checkpoint or copy it again"
        ) from None
    written = metadata.pop(CHECKSUM, None)
    if written not in (None, tensors_checksum(tensors, metadata)):
        raise MezzotintError(
            f"{path} is damaged: its content is not what its header's {CHECKSUM} was computed from; take another "
            f"checkpoint or copy it again (who changed it on purpose leaves {CHECKSUM} out of the header)"
        )
    return tensors, metadata


def write_text(path: str | Path, text: str) -> None:
    """`atomic_path`, for text. What UTF-8 cannot say, bytes of a file's name, is written as JSON does: ``\\udcff``."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark. Raises `MezzotintError` where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MezzotintError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError as error:
        raise MezzotintError(f"{path} is not a text in UTF-8 ({error}); write it again as UTF-8") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises `ValueError`, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def name_bytes(name: str) -> bytes:
    """A name in UTF-8; one of a file that is in no encoding is the bytes that it has on the disk."""
    return name.encode("utf-8", "surrogateescape")


def is_utf8(path: str | Path) -> bool:
    """Whether a path has no bytes of another encoding, which Python keeps as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def tensors_digest(tensors: Mapping[str, Tensor], *extra: object) -> str:
    """8 hexadecimal digits over names, shapes and values of `tensors`, and over the representations of `extra`."""
    digest = hashlib.sha256(repr(extra).encode())
    for part in _content(tensors):
        digest.update(part)
    return digest.hexdigest()[:8]


def tensors_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 over `metadata`, and names, shapes, dtypes and values of `tensors`, as `file_checksum` writes it."""
    found = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for part in _content(tensors):
        found = zlib.crc32(part, found)
    return f"{found:08x}"


def _content(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def file_checksum(path: Path) -> str:
    """CRC-32 of a file's content, 8 hexadecimal digits. It finds damage, and is no proof against ill will.

    Every change of up to 32 bits in a row is found, any other with a probability of 1 − 2⁻³²; no digest of the standard
    library is as fast. Raises `OSError`.
    """
    found, chunk = 0, memoryview(bytearray(READ_SIZE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            found = zlib.crc32(chunk[:count], found)
    return f"{found:08x}"


def readable_size(number: float) -> str:
    """Bytes as text: 1.5 GiB, 20.0 MiB, 3 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 2**10:,.0f} KiB"


def cache_folder() -> Path:
    """Where what is costly to make is kept: $MEZZOTINT_CACHE, else mezzotint in the user's cache folder."""
    chosen, caches = os.environ.get("MEZZOTINT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(chosen).expanduser() if chosen else Path(caches or Path.home() / ".cache") / "mezzotint"
    except RuntimeError:  # no home, as in a container under a number that is nobody's
        return Path(os.devnull) / "mezzotint"  # where nothing can be kept


def keep(file: Path, write: Callable[[Path], None]) -> None:
    """`write(file)`, a file of `cache_folder`; one that cannot be written is a warning, the first time.

    What was computed is there all the same, and is computed again when it is next needed.
    """
    try:
        write(file)
    except (MezzotintError, OSError) as error:
        if cache_folder() not in _warned_of:
            logger.warning("%s; what is costly to make is not kept: set MEZZOTINT_CACHE to a folder of yours", error)
        _warned_of.add(cache_folder())


_warned_of: set[Path] = set()
