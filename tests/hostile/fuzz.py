"""Every file, setting and command, damaged: ``make fuzz N=20000 SEED=0``, and some of it in the suite.

A case is a function of (seed, number): its kind, a valid input and what is done to it. Refused with one sentence or
read rightly are the two good ends; these are faults:

- any exception but `MezzotintError`, or one whose words are no sentence; of a command, any exit code but 0 and 2;
- more than `SECONDS` of this process's time, or `WAIT` by the clock;
- more than `MEMORY` beyond what the process had;
- a file written outside of the case's folder, a program started, a class of a stranger's looked up, anything run;
- other values out of a damaged file than out of the whole one, where the format has a checksum (`kinds.py`).

One case again, with all that it says: ``python tests/hostile/fuzz.py --seed 0 --case 123``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import kinds
from kinds import KINDS, Case, Wrong, make_seeds

from mezzotint.errors import MezzotintError

SECONDS, WAIT, MEMORY = 5.0, 20.0, 2**30
#: of this address space, beyond what is mapped before a case, nothing more is given to it
ADDRESSES = 4 * 2**30
SENTENCE = 2500
"""Characters of the longest message: long paths and long words of the user are repeated in them."""


class Hang(BaseException):
    """A case took too long; no `except Exception` keeps it."""


class Fault(NamedTuple):
    """What went wrong in a case."""

    number: int
    kind: str
    what: str
    """The fault by itself, the same for all its cases."""
    detail: str

    def __str__(self) -> str:
        return f"case {self.number} ({self.kind}): {self.what}\n{self.detail}"


@dataclass
class Watch:
    """An audit hook, which cannot be taken away again, told where a case may write; outside of cases it is blind."""

    root: str | None = None
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.writes(path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            self.writes(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.writes(arguments[1])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
            self.seen.append(f"{event} was called")
        elif event == "pickle.find_class" and str(arguments[0]).split(".")[0] in kinds.STRANGERS:
            self.seen.append(f"the class {arguments[0]}.{arguments[1]} of a pickle was looked up")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError("no network here")

    def writes(self, path: object) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return  # a descriptor
        place = os.path.abspath(path)
        if not place.startswith((f"{self.root}/", "/dev/", "/proc/")) and ".pyc" not in place:
            self.seen.append(f"wrote {place}, outside of its folder")


WATCH = Watch()


def _stop(number: int, frame: object) -> None:
    raise Hang(f"more than {SECONDS:g} s" if number == signal.SIGPROF else f"waited for more than {WAIT:g} s")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Time and address space of a case."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * mmap.PAGESIZE
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, before[1]))
    handlers = [(number, signal.signal(number, _stop)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers:
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak(reset: bool = False) -> int:
    """Bytes of this process's memory at its peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def check_sentence(text: str) -> None:
    """Raises `Wrong` for words of an error that are no sentence for a person."""
    if not text.strip():
        raise Wrong("an error without words")
    if "\n" in text.strip():
        raise Wrong(f"an error of several lines: {text[:300]!r}")
    if len(text) > SENTENCE:
        raise Wrong(f"an error of {len(text)} characters: {text[:300]!r}…")
    if sign := re.search(r"Traceback|<class '|object at 0x|\bNoneType\b|errors\.pydantic", text):
        raise Wrong(f"an error in Python's words ({sign[0]}): {text[:300]!r}")


def run_case(seed: int, number: int, folder: Path, seeds: Path, only: Sequence[str] = ()) -> tuple[str, str]:
    """One case in the empty `folder`: what it was, and "read" or "refused". Raises what is a fault."""
    rng = random.Random(f"{seed}/{number}")
    names = [name for name in KINDS if not only or name in only]
    name = rng.choices(names, [KINDS[name].weight for name in names])[0]
    here = folder / "here"
    here.mkdir()
    case = Case(rng, here, seeds)
    cwd, environment = os.getcwd(), dict(os.environ)
    os.environ.update(HOME=str(folder / "home"), MEZZOTINT_CACHE=str(folder / "home" / "cache"), HF_HUB_OFFLINE="1")
    temporary, tempfile.tempdir = tempfile.tempdir, str(here)
    os.chdir(here)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(kinds.Quiet()),
            contextlib.redirect_stderr(kinds.Quiet()),
        ):
            warnings.simplefilter("ignore")
            try:
                WATCH.root, WATCH.seen = str(folder), []
                before = _peak(reset=True)
                with limits():
                    KINDS[name].run(case)
                end = "read"
            except MezzotintError as error:
                check_sentence(str(error))
                case.did.append(f"refused: {error}")
                end = "refused"
            finally:
                WATCH.root = None
        if (grown := _peak() - before) > MEMORY:
            raise Wrong(f"{grown / 2**30:.1f} GiB of memory were taken")
        if WATCH.seen:
            raise Wrong(WATCH.seen[0])
        if found := next(iter(folder.rglob("executed*")), None):
            raise Wrong(f"code in a file was run: {found.name}")
        return name, end
    except BaseException as error:
        error.hostile = (name, case.did)  # type: ignore[attr-defined]
        raise
    finally:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = temporary


def fault_of(number: int, error: BaseException) -> Fault:
    """What an exception of a case says, without what differs between cases of one fault."""
    kind, did = getattr(error, "hostile", ("?", []))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/mezzotint/" in frame.filename]
    where = f"{ours[-1].filename.split('/mezzotint/')[-1]}:{ours[-1].name}" if ours else ""
    words = " ".join(str(error).split())[:300]
    what = f"{words[:60]}" if isinstance(error, Wrong) else f"{type(error).__name__} in {where}"
    shown = "".join(traceback.format_exception(error)[-12:])[-2500:]
    return Fault(number, kind, what, "\n".join([*did, words, shown]))


def run(numbers: Iterable[int], seed: int, seeds: Path, only: Sequence[str] = ()) -> tuple[Counter[str], list[Fault]]:
    """The cases `numbers` in this process: how each kind ended, and the faults."""
    ends: Counter[str] = Counter()
    faults = []
    TIMES.clear()
    if WATCH not in _HOOKED:
        _HOOKED.append(WATCH)
        sys.addaudithook(WATCH)
    with tempfile.TemporaryDirectory(prefix="hostile-") as arena, quiet_logs():
        for number in numbers:
            CURRENT[:8] = struct.pack("q", number)
            folder = Path(arena).resolve() / str(number)
            folder.mkdir()
            begun = time.process_time()
            try:
                name, end = run_case(seed, number, folder, seeds, only)
                ends[f"{name}: {end}"] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # torch's CheckpointException is no Exception
                fault = fault_of(number, error)
                name = fault.kind
                ends[f"{name}: fault"] += 1
                faults.append(fault)
            TIMES[name] += time.process_time() - begun
            _remove(folder)
    return ends, faults


_HOOKED: list[Watch] = []
CURRENT = mmap.mmap(-1, 8)
"""The number of the case that runs, seen by the parent of a child that dies."""
TIMES: Counter[str] = Counter()
"""Seconds of this process, by kind of case."""


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=[*KINDS], help="kinds of cases")
    parser.add_argument("--case", type=int, help="this case alone, in words")
    parser.add_argument("--times", action="store_true", help="print what the kinds take")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-seeds-") as folder:
        seeds = Path(folder).resolve()
        with quiet_logs():
            if died := _in_child(lambda: make_seeds(seeds)):
                raise SystemExit(f"the valid inputs could not be made: {died}")
        numbers = range(options.first, options.first + options.cases)
        if options.case is not None:
            numbers = range(options.case, options.case + 1)
        ends: Counter[str] = Counter()
        faults: dict[str, list[Fault]] = {}
        times: Counter[str] = Counter()
        begun = time.perf_counter()
        while numbers:
            part, numbers = numbers[:1000], numbers[1000:]
            result = _in_child(lambda part=part: (*run(part, options.seed, seeds, options.only), TIMES))
            if not isinstance(result, tuple):  # the process died; what it had found before is found again
                number = struct.unpack("q", CURRENT[:8])[0]
                faults.setdefault(f"the process died: {result}", []).append(Fault(number, "?", str(result), ""))
                numbers = range(number + 1, options.first + options.cases)
                part = range(part.start, number)
                result = _in_child(lambda part=part: (*run(part, options.seed, seeds, options.only), TIMES))
            if isinstance(result, tuple):
                ends += result[0]
                times.update(result[2])
                for fault in result[1]:
                    if fault.what not in faults:
                        print(f"--- {fault}\n", flush=True)
                    faults.setdefault(fault.what, []).append(fault)
    table: dict[str, dict[str, int]] = {}
    for key, count in ends.items():
        name, end = key.split(": ")
        table.setdefault(name, {})[end] = count
    print(f"{'kind':14}{'read':>8}{'refused':>9}{'faults':>8}" + ("   s" if options.times else ""))
    for name in [*KINDS, "?"]:
        if name in table:
            row = [table[name].get(end, 0) for end in ("read", "refused", "fault")]
            print(f"{name:14}{row[0]:8,}{row[1]:9,}{row[2]:8,}" + (f"{times[name]:7.1f}" if options.times else ""))
    total = sum(ends.values())
    count = sum(map(len, faults.values()))
    took = time.perf_counter() - begun
    print(f"{total:,} cases of seed {options.seed} in {took:.0f} s: {count} faults, {len(faults)} kinds")
    for what, found in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"  {len(found):5} × {what}   [{found[0].kind}; cases {', '.join(str(f.number) for f in found[:4])}]")
    return int(count > 0)


def _in_child(work: Any) -> Any:
    """What `work` gives in a fork of this process; else how the fork died."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            content = pickle.dumps(work())
            with os.fdopen(write, "wb") as file:
                file.write(content)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        content = file.read()
    _, status = os.waitpid(pid, 0)
    if not content:
        return f"exit {os.waitstatus_to_exitcode(status)}"
    return pickle.loads(content)


if __name__ == "__main__":
    sys.exit(main())
