"""One process at a time in a folder.

The lock is the operating system's, on a file of the folder: it ends with its process, however that ends, so nothing is
ever left to clear away. Where that does not reach (another machine on some network file systems, or no such locks at
all), a holder is known by its heartbeat in the same file.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mezzotint.errors import MezzotintError
from mezzotint.files import check_free, parse_json, sweep_anew
from mezzotint.progress import console

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
#: seconds between signs of life, and how long they are waited for
HEARTBEAT, PATIENCE = 5.0, 15.0

_held: set[int] = set()  # file descriptors


def _leave_to_parent() -> None:
    """A forked child, such as a worker that loads images, must not hold on to its parent's locks."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def locked(folder: Path, name: str = LOCK, *, what: Path | None = None) -> Iterator[None]:
    """Hold `folder`, which is made where it is missing, and removed again if it stays empty.

    name: of the file that stands for what is held, which is called `what` in errors. Raises `MezzotintError` where
    another process holds it, or nothing can be written there.
    """
    what = what or folder
    if folder.is_file():
        raise MezzotintError(f"{folder} is a file, and a folder is to be written there; choose another place")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            descriptor = _opened(folder, name, what)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MezzotintError(f"cannot write {what}: {reason}; free some space or choose another place") from error
        _held.add(descriptor)
        done = threading.Event()
        beat = threading.Thread(target=_keep_alive, args=(descriptor, done), daemon=True)
        beat.start()
        sweep_anew()
        try:
            yield
        finally:
            done.set()
            beat.join()
            with suppress(OSError):
                (folder / name).unlink()
            _held.discard(descriptor)
            os.close(descriptor)
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the place of a folder that is yet to be made. Raises `MezzotintError` as `check_free` and `locked` do."""
    place = out.resolve()
    with locked(place.parent, f".{place.name[:100]}.lock", what=out):
        check_free(out)
        yield


def _opened(folder: Path, name: str, what: Path) -> int:
    """The file, ours alone. Raises `MezzotintError` where it is another's, and `OSError`."""
    file = folder / name
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its last holder has removed the folder
            continue
        try:
            holder = _read(descriptor)
            certain = _system_lock(descriptor)
            if certain is False:
                raise _in_use(what, holder)
            if not certain or holder.get("host", socket.gethostname()) != socket.gethostname():
                _wait_for_life(descriptor, file, what)
            if _is_still(descriptor, file):
                _write(descriptor, 0)
                if not certain:  # two may have come this far at once: the later one stays
                    time.sleep(1.0)
                    if _read(descriptor).get("pid") != os.getpid():
                        raise _in_use(what, _read(descriptor))
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed the file; whoever has the new one is the holder


def _system_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now, rather than another's; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _wait_for_life(descriptor: int, file: Path, what: Path) -> None:
    """Raises `MezzotintError` where the holder in the file, who may be on another machine, shows that it is alive."""
    before = _content(descriptor)
    if not before:
        return
    console.print(f"{file} is from {_read(descriptor).get('host', 'elsewhere')}; is it alive?", soft_wrap=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _content(descriptor) != before:
            raise _in_use(what, _read(descriptor))


def _in_use(what: Path, holder: dict[str, Any]) -> MezzotintError:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
    return MezzotintError(
        f"{what} is in use by {who} (since {holder.get('since', 'just now')}); wait for it, stop it, or choose another "
        "place"
    )


def _keep_alive(descriptor: int, done: threading.Event) -> None:
    beats = 0
    while not done.wait(HEARTBEAT):
        beats += 1
        with suppress(OSError):
            _write(descriptor, beats)


_since = time.strftime("%Y-%m-%d %H:%M:%S")


def _write(descriptor: int, beats: int) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": _since, "beats": beats}
    text = (json.dumps(about) + "\n").encode()
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text)
    os.ftruncate(descriptor, len(text))


def _content(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 4096)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        values = parse_json(_content(descriptor))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
