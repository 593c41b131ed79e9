"""Writing files so that a crash, a full disk or a kill leaves the old one or the new one, never half of either.

And what files are told apart by, and where those are kept that can be made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.finite import check_finite
from mezzotint.store import Store

logger = logging.getLogger("mezzotint")

CHECKSUM = "crc32"  # the key of a safetensors header under which `save_tensors` keeps `tensors_checksum`
READ_SIZE = 2**18  # bytes; stays in a processor's cache between reading and summing
#: bytes of a file up to which `content_digest` is over all of it; beyond, the number and the length of its pieces
DIGEST_WHOLE, DIGEST_PIECES, DIGEST_PIECE = 2**18, 8, 2**15
#: files read at a time; more gain nothing from a local disk, and a few hide most of a network's latency
DIGEST_THREADS = 8
#: seconds for which a file may change again without its time telling so
DIGEST_SETTLED = 2.0
#: seconds after which a temporary file of another machine counts as left behind
ABANDONED = 24 * 3600.0

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\..*\.(?:([0-9a-f]{8})-)?([0-9]+)(?:-[0-9a-f]{8})?\.tmp")
_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a named pipe must not wait
_unfinished: set[str] = set()  # names of this process's own temporary files and folders
_swept: set[Path] = set()  # folders in which this process has looked for those of dead ones


# ---- Writing ---------------------------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """A name beside `path` to write under before it becomes `path`: unpredictable, and telling whose it is."""
    return path.with_name(f".{path.name[:40]}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether this is a name that `temporary_name` gives."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what processes that are dead have left half-written in `folder`; the first time that it is asked."""
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if is_temporary(Path(entry.name))]:
            if _is_abandoned(path):
                remove(path)


def sweep_anew() -> None:
    """Have `sweep` look everywhere again, as whatever is begun now may find what was left since."""
    _swept.clear()


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or nothing, whatever may be wrong with it."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_abandoned(path: Path) -> bool:
    found = _TEMPORARY.fullmatch(path.name)
    assert found is not None
    host, pid = found[1] or _HOST, int(found[2])
    if host == _HOST and os.name == "posix":
        return path.name not in _unfinished if pid == os.getpid() else not _is_alive(pid)
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """`temporary_name`, where nothing is yet and `sweep` leaves alone what will be; in the end it is removed."""
    temporary = temporary_name(path)
    _unfinished.add(temporary.name)
    try:
        yield temporary
    finally:
        remove(temporary)
        _unfinished.discard(temporary.name)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed over `path` on success, removed on failure.

    Raises `MezzotintError` where the disk is full, read-only or not ours to write.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with _temporary(path) as temporary:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that nobody else can read
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MezzotintError(f"cannot write {path}: {reason}; free some space or choose another place") from error


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
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        with _temporary(place) as temporary:
            temporary.mkdir()
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
        with _temporary(path) as folder:  # a kill leaves what safetensors writes before it renames
            folder.mkdir()
            save_file(kept, folder / path.name, metadata | {CHECKSUM: tensors_checksum(kept, metadata)})
            _sort_metadata(folder / path.name)
            os.replace(folder / path.name, path)
    except SafetensorError as error:  # a full disk, in safetensors' words
        needed = readable_size(sum(tensor.nbytes for tensor in kept.values()))
        raise OSError(f"{error}, {needed} are needed") from None


def _sort_metadata(path: Path) -> None:
    """The same content shall be the same bytes: safetensors writes its metadata in an order that changes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
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


# ---- Telling apart ---------------------------------------------------------------------------------------------------


def content_digest(path: str | Path) -> bytes:
    """16 bytes over a file's content, wherever it lies and whatever it is called; none for what cannot be read.

    Up to `DIGEST_WHOLE` bytes they are over all of it. Of a larger file they are over its size and `DIGEST_PIECES`
    evenly spaced pieces of `DIGEST_PIECE` bytes, both ends among them: a change between those that keeps the size is
    not seen, which compressed images and videos do not suffer, but files of raw numbers may.
    """
    try:
        descriptor = os.open(path, _READ_ONLY)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                return b""
            digest = hashlib.sha256(b"%d\0" % about.st_size)
            if about.st_size <= DIGEST_WHOLE:
                while data := os.read(descriptor, DIGEST_WHOLE):
                    digest.update(data)
            else:
                for piece in range(DIGEST_PIECES):
                    os.lseek(descriptor, piece * (about.st_size - DIGEST_PIECE) // (DIGEST_PIECES - 1), os.SEEK_SET)
                    digest.update(os.read(descriptor, DIGEST_PIECE))
        finally:
            os.close(descriptor)
    except OSError:
        return b""
    return digest.digest()[:16]


def content_digests(paths: Sequence[str | Path]) -> list[bytes]:
    """`content_digest` of each file, by a few threads.

    What was read is kept under `cache_folder` by the file's path, size, times and number (inode), so that a second look
    reads nothing. A cache that cannot be used is done without. A file that was written just now is not kept: it might
    be written again without its time telling so.
    """
    now, here = time.time(), os.getcwd()
    keys = [_state_of(path, here) for path in paths]
    kept: dict[bytes, bytes] = {}
    store: Store | None = None
    with suppress(OSError, RuntimeError, MezzotintError):  # no home
        store = Store(cache_folder() / "digests-1.sqlite3")  # raise with `content_digest`
        kept = store.read([key for key, _ in keys if key])
    missing = [number for number, (key, _) in enumerate(keys) if key and key not in kept]
    parts = [missing[start : start + 64] for start in range(0, len(missing), 64)]
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        read = pool.map(lambda part: [content_digest(paths[number]) for number in part], parts)
        found = {
            number: digest
            for part, some in zip(parts, read, strict=True)
            for number, digest in zip(part, some, strict=True)
        }
    if store is not None:
        settled = [number for number in missing if found[number] and now - keys[number][1] > DIGEST_SETTLED]
        store.write({keys[number][0]: found[number] for number in settled})
    return [found[number] if number in found else kept.get(key, b"") for number, (key, _) in enumerate(keys)]


def _state_of(path: str | Path, folder: str) -> tuple[bytes, float]:
    """A key of all that changes whenever a file's content does, empty of what is no file; and when it last changed.

    folder: that relative paths are from.
    """
    try:
        about = os.stat(path)
    except OSError:
        return b"", 0.0
    if not stat.S_ISREG(about.st_mode):
        return b"", 0.0
    # The time of the last change (ctime) cannot be set back, as that of the content can (cp -p, rsync -t).
    state = b"%d %d %d %d" % (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
    key = hashlib.sha256(os.fsencode(os.path.join(folder, path)) + b"\0" + state).digest()[:16]
    return key, max(about.st_mtime, about.st_ctime)


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
