"""Applies the faults of faults.py to a copy of the tree, one at a time, and counts those that no test notices.

First every test is run once on the copy as it is, and the functions that it calls are remembered. A fault is then shown
to the tests that call the function in which it is, the likeliest and quickest first, until one fails. A
fault that survives may also be tried on the whole suite (--whole). The exit code is 1 where more than 5 % of those that
are not equivalent survive. Tests that fail without a fault, such as those that mind what is imported already, are left
out and told.

    make faults                                            the same as python tests/faults/run.py
    python tests/faults/run.py --only sampl --jobs 2       those whose file or name has "sampl"
    python tests/faults/run.py --map .faults               keeps in .faults what each test calls

Each test run is a process that is forked from this one, which has imported the libraries that take seconds.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before anything that reads them is imported

import pytest
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SOURCE = Path("src/mezzotint")
COPIED = ("src", "tests", "docs", "examples", "benchmarks", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
#: libraries that take seconds to import
AHEAD = ("torch", "torch.distributed.checkpoint", "torch.utils.tensorboard", "torchdiffeq", "torchvision.transforms.v2")
AHEAD += ("sklearn.datasets", "sklearn.model_selection", "scipy.linalg", "PIL.Image", "safetensors.torch", "pydantic")
AHEAD += ("typer", "rich", "jinja2", "matplotlib.figure", "transformers", "diffusers", "datasets", "pyarrow.parquet")
AHEAD += ("peft", "torch_fidelity", "av", "fontTools.ttLib")
LIMIT = 0.05
#: of a test run, after which a fault hangs: so many times what the tests took before, and so many seconds
PATIENCE = 5, 120
PASSED, FAILED, UNKNOWN_TESTS, NO_TESTS = 0, 1, 4, 5


# ---- A process for a test run ----------------------------------------------------------------------------------------


class Slot:
    """A copy of the tree, and one test run at a time in it."""

    def __init__(self, place: Path) -> None:
        self.place, self.tree, self.log = place, place / "tree", place / "log"
        self.pid, self.end, self.code = 0, 0.0, PASSED
        self.tree.mkdir(parents=True)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, self.tree / name)
        compileall.compile_dir(self.tree / "src", quiet=1)

    def start(self, arguments: Sequence[str], seconds: float, plugins: Sequence[object] = ()) -> None:
        """Run pytest with these arguments, for so many seconds at most."""
        sys.stdout.flush()
        self.pid, self.end = os.fork(), time.monotonic() + seconds
        if self.pid == 0:
            try:
                self._run(arguments, plugins)
            finally:
                os._exit(3)

    def _run(self, arguments: Sequence[str], plugins: Sequence[object]) -> None:
        os.setsid()
        out = os.open(self.log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(self.tree)
        sys.path[0] = str(self.tree / "src")
        os.environ |= {"PYTHONPATH": sys.path[0], "TMPDIR": str(self.place)}
        tempfile.tempdir = None
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.place / 'tmp'}", "--rootdir=."]
        code = pytest.main([*options, *arguments], plugins=plugins)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))

    def result(self) -> int | None:
        """pytest's exit code, `FAILED` for a run that took too long; None while it goes on."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        late = time.monotonic() > self.end
        if not pid and not late:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and what the tests have left running
        if not pid:
            os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status) if pid else FAILED

    @contextlib.contextmanager
    def changed(self, fault: Fault) -> Iterator[None]:
        """The fault is in the copy; its file is as it was, and compiled as it was, afterwards."""
        file = self.tree / SOURCE / fault.file
        compiled = Path(importlib.util.cache_from_source(str(file)))
        kept = {path: path.with_name(path.name + ".kept") for path in (file, compiled) if path.exists()}
        for path, other in kept.items():
            path.rename(other)
        file.write_text(fault.applied(kept[file].read_text(encoding="utf-8")), encoding="utf-8")
        try:
            yield
        finally:
            compiled.unlink(missing_ok=True)
            for path, other in kept.items():
                other.replace(path)


def spread(slots: Sequence[Slot], tasks: Sequence[Any], work: Callable[[Slot, Any], Iterator[None]]) -> None:
    """Do `work`, which yields while it waits for its slot, for every task, one a slot at a time."""
    waiting = list(tasks)
    working: dict[Slot, Iterator[None]] = {}
    try:
        while waiting or working:
            for slot in slots:
                if slot not in working and waiting:
                    working[slot] = work(slot, waiting.pop(0))
                if slot in working and next(working[slot], slot) is slot:
                    del working[slot]
            time.sleep(0.02)
    finally:  # of an interruption
        for slot in working:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(slot.pid, signal.SIGKILL)


def finished(slot: Slot, arguments: Sequence[str], seconds: float, plugins: Sequence[object] = ()) -> Iterator[None]:
    """Run pytest in the slot, and wait for it; `slot.code` is then its exit code."""
    slot.start(arguments, seconds, plugins)
    while (code := slot.result()) is None:
        yield
    slot.code = code


# ---- What each test calls --------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: of every test its seconds, whether it passed and the library's functions that it calls.

    What a fixture calls counts for every test that uses it, as it may be made once for many.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.seen = file, dict[int, CodeType]()
        self.fixtures: dict[int, set[str]] = {}
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        self.seen[id(frame.f_code)] = frame.f_code

    def names(self) -> set[str]:
        """Of the functions that were called: the file's, and Python's qualified one."""
        mark = f"/{SOURCE}/"
        # A list first: what looks at it is seen, too.
        codes = [(code.co_filename.rpartition(mark), code.co_qualname) for code in [*self.seen.values()]]
        return {f"{file}:{name}" for (_, there, file), name in codes if there}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.seen, begun = {}, time.perf_counter()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            used = cast(Any, item)._fixtureinfo.name2fixturedefs.values()
            calls = self.names().union(*(self.fixtures.get(id(one), ()) for several in used for one in several))
            self.tests[item.nodeid] = {"seconds": time.perf_counter() - begun, "calls": sorted(calls)}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.seen = self.seen, {}
        try:
            return (yield)
        finally:
            self.fixtures[id(fixturedef)] = self.fixtures.get(id(fixturedef), set()) | self.names()
            self.seen = before | self.seen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        tests = {name: test | {"passed": name not in self.failed} for name, test in self.tests.items()}
        self.file.write_text(json.dumps(tests))


@dataclass(frozen=True)
class Known:
    """What is known of the tests of the unchanged tree."""

    seconds: dict[str, float]
    callers: dict[str, set[str]]
    """By function, the tests that call it."""
    failing: list[str]
    """Those that fail without a fault, and so tell nothing."""

    @classmethod
    def read(cls, folder: Path) -> Known:
        seconds, callers, failing = {}, defaultdict[str, set[str]](set), []
        for file in sorted(folder.glob("*.json")):
            for name, test in json.loads(file.read_text()).items():
                if not test["passed"]:
                    failing.append(name)
                    continue
                seconds[name] = test["seconds"]
                for function in test["calls"]:
                    callers[function].add(name)
        return cls(seconds, callers, failing)

    def tests_for(self, fault: Fault, text: str, budget: float) -> list[str]:
        """The tests to show a fault to: those asked in any case, then of the callers what fits into so many seconds."""
        places = [f"tests/{test}" for test in fault.tests]
        chosen = {name: None for place in places if "::" in place for name in self.seconds if name.startswith(place)}
        functions = enclosing(text, text.index(fault.old), fault.file)
        callers = set().union(*(self.callers.get(function, ()) for function in functions))
        words = set(re.findall(r"[a-z]{4,}", f"{fault.name} {fault.old}".lower())) - {"self", "settings", "dropped"}

        def likeliest(name: str) -> tuple[bool, int, float]:
            file, _, test = name.partition("::")
            return file not in places, -sum(word in test for word in words), self.seconds[name]

        order = sorted(callers, key=likeliest)
        for name in order:
            budget -= self.seconds[name]
            if budget > 0 or not chosen:
                chosen[name] = None
        files = dict.fromkeys(name.split("::")[0] for name in chosen)  # a file at a time, whose fixtures are made once
        return sorted(chosen, key=lambda name: [*files].index(name.split("::")[0]))


def enclosing(text: str, position: int, file: str) -> list[str]:
    """The innermost function around this place of a module; of what is in none, all functions of the module."""
    line, found, every = text.count("\n", 0, position) + 1, "", list[str]()
    if text[position] == "\n" or not text[position:].split("\n", 1)[0].strip():
        line += 1

    def look(node: ast.AST, prefix: str) -> None:
        nonlocal found
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{prefix}{child.name}"
                if isinstance(child, ast.FunctionDef):
                    every.append(inside)
                    if child.lineno <= line <= (child.end_lineno or 0):
                        found = inside
                    inside += ".<locals>"
                inside += "."
            look(child, inside)

    look(ast.parse(text), "")
    return [f"{file}:{name}" for name in ([found] if found else every)]


# ---- The run ---------------------------------------------------------------------------------------------------------


def record(slots: Sequence[Slot], folder: Path, files: Sequence[str]) -> None:
    """What each test calls, into the folder, a file for each file of tests that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)

    def work(slot: Slot, name: str) -> Iterator[None]:
        begun, place = time.monotonic(), (folder / Path(name).with_suffix(".json").name).resolve()
        yield from finished(slot, [f"tests/{name}"], 3600, [Recorder(place)])
        print(f"{time.monotonic() - begun:6.1f} s  {name} without a fault: exit code {slot.code}", flush=True)
        if not place.exists():
            raise SystemExit(f"{name} cannot be run:\n{slot.log.read_text(errors='replace')[-2000:]}")

    spread(slots, [name for name in files if not (folder / Path(name).with_suffix(".json").name).exists()], work)


def try_faults(slots: Sequence[Slot], faults: Sequence[Fault], known: Known, budget: float, whole: bool) -> list[Fault]:
    """The faults that survive, in their order."""
    survivors: list[Fault] = []

    def work(slot: Slot, fault: Fault) -> Iterator[None]:
        begun = time.monotonic()
        text = (slot.tree / SOURCE / fault.file).read_text(encoding="utf-8")
        tests = known.tests_for(fault, text, budget)
        runs = [tests] if tests else []
        runs += [["tests", "--ignore=tests/faults"]] if whole else []
        noticed = False
        with slot.changed(fault):
            for run in runs:
                seconds = sum(known.seconds.get(test, 0) for test in run) or sum(known.seconds.values())
                yield from finished(slot, ["-x", *run], PATIENCE[0] * seconds + PATIENCE[1])
                if slot.code in (UNKNOWN_TESTS, NO_TESTS):
                    raise SystemExit(f"{fault.title}: some tests are not there any more; begin with another --map")
                noticed = slot.code != PASSED
                if noticed:
                    break
        by = re.search(r"^(?:FAILED|ERROR) (\S+)", slot.log.read_text(errors="replace"), re.MULTILINE) if runs else None
        seen = f"by {by[1] if by else 'a hang or a crash'}" if noticed else f"by none of {len(tests)} tests"
        word = "noticed " if noticed else "equivalent" if fault.equivalent else "SURVIVED"
        print(f"{time.monotonic() - begun:6.1f} s  {word}  {fault.title}, {seen}", flush=True)
        if not noticed:
            survivors.append(fault)

    spread(slots, faults, work)
    return sorted(survivors, key=faults.index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression of files and names")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of so many, evenly over the list")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="test runs at a time")
    parser.add_argument("--whole", action="store_true", help="try survivors on the whole suite, too")
    parser.add_argument("--budget", type=float, default=60, metavar="S", help="seconds of tests for a fault")
    parser.add_argument("--map", type=Path, metavar="FOLDER", help="where what each test calls is kept")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if re.search(options.only, fault.title)][:: options.every]
    for name in AHEAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mezzotint-faults-") as place:
        slots = [Slot(Path(place) / str(number)) for number in range(options.jobs)]
        folder = (options.map or Path(place) / "map").resolve()
        record(slots, folder, sorted(path.name for path in (ROOT / "tests").glob("test_*.py")))
        known = Known.read(folder)
        survivors = try_faults(slots, faults, known, options.budget, options.whole)
    for name in known.failing:
        print(f"fails without a fault, and was left out: {name}")
    equivalent = [fault for fault in faults if fault.equivalent]
    counted = [fault for fault in survivors if not fault.equivalent]
    for fault in equivalent:
        print(f"equivalent: {fault.title}: {fault.equivalent}")
    for fault in counted:
        print(f"survived: {fault.title}")
    total = len(faults) - len(equivalent)
    share = len(counted) / max(1, total)
    print(
        f"{total} faults, {len(counted)} survived ({share:.1%}); {len(equivalent)} equivalent ones beside them; "
        f"{(time.monotonic() - begun) / 60:.0f} minutes"
    )
    return int(share > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
