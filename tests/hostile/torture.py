"""Work that is killed, stopped, damaged and out of space, and goes on: ``make torture N=500 SEED=0``.

A life is one piece of work (a training, a fit of a tokenizer, an encoding, a sampling) in a folder of its own. Again
and again a process begins it or goes on with it, as a user would, and is disturbed: killed or sent a signal at a random
moment, or left without space; between two processes, what lies in the folder is cut, flipped, removed or swapped. In
the end one is left alone, and what it made is compared with the undisturbed work, bit for bit.

Counted, and each must be 0 (`MUST_BE_ZERO`):

- wrong: another result than the undisturbed one, and nothing said;
- lost: after kills alone, a training that begins before its newest checkpoint;
- refused wrongly: work that does not go on though nothing but kills happened to it;
- tracebacks: any exception but `MezzotintError`;
- hangs: a process that takes more than a minute;
- left behind: temporary files that are there when all is done.

The moments of the kills are random times, so a second run with the same seed does the same to other steps.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from damage import damaged_bytes
from kinds import TINY, Wrong, expect_same

import mezzotint
from mezzotint import data
from mezzotint.archive import sample_to_npz
from mezzotint.encoding import encode
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.sources import image_source
from mezzotint.recipe import load_recipe
from mezzotint.representations.tokenizer import open_tokenizer
from mezzotint.training import loop
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.tokenizers import fit_tokenizer

MUST_BE_ZERO = ("wrong", "lost", "refused wrongly", "tracebacks", "hangs", "left behind")
LONGEST = 60.0
STEPS = 12
TOKENIZER = ("representation=patch-ae", "representation.stride=2", "representation.channels=3")
FIT = ("representation.fit.steps=30", "representation.fit.batch_size=32")


class Job(NamedTuple):
    """A kind of work: `start` begins it in a folder or goes on, `result` is what it made."""

    start: Callable[[Path, Path], object]
    result: Callable[[Path], dict[str, torch.Tensor]]
    weight: float


def _train(place: Path, seeds: Path) -> None:
    run = place / "run"
    changes = [f"training.steps={STEPS}", "training.keep_checkpoints=3"]
    loop.train(load_recipe("digits", [*TINY, *changes]), run, resume=(run / "recipe.yaml").exists(), quiet=True)


def _fit(place: Path, seeds: Path) -> None:
    if not (place / "tokenizer").exists():  # a finished one is not fitted again
        fit_tokenizer(
            load_recipe("digits", [*TINY, *TOKENIZER, *FIT, "backbone.patch_size=1"]), place / "tokenizer", quiet=True
        )


def _encode(place: Path, seeds: Path) -> None:
    words = [*TINY, *TOKENIZER, "backbone.patch_size=1", f"representation.path={seeds / 'fit/tokenizer'}"]
    encode(
        load_recipe("digits", words), place / "latents", splits=["train"], shard_size=60, progress=False, device="cpu"
    )


def _sample(place: Path, seeds: Path) -> None:
    sample_to_npz(mezzotint.load(seeds / "train/run"), place / "samples.npz", count=200, batch_size=10)


def _weights(place: Path) -> dict[str, torch.Tensor]:
    return mezzotint.load(place / "run").denoiser.backbone.state_dict()


def _tokenizer(place: Path) -> dict[str, torch.Tensor]:
    return open_tokenizer(place / "tokenizer").state_dict()


def _moments(place: Path) -> dict[str, torch.Tensor]:
    latents = data.load("latents", "train", path=str(place / "latents"), size=8)
    assert isinstance(latents, data.CachedLatents)
    return dict(zip(("moments", "labels"), latents.get_batch(torch.arange(len(latents))), strict=True))


def _pixels(place: Path) -> dict[str, torch.Tensor]:
    images, labels = next(image_source(str(place / "samples.npz")).batches(1000))
    assert labels is not None
    return {"images": images, "labels": labels}


#: each read by the library's own reader, which may refuse what was damaged
JOBS = {
    "train": Job(_train, _weights, 5),
    "fit": Job(_fit, _tokenizer, 1),
    "encode": Job(_encode, _moments, 1),
    "sample": Job(_sample, _pixels, 1),
}


# ---- One process -----------------------------------------------------------------------------------------------------


class End(NamedTuple):
    """How a process ended."""

    how: str
    """done, refused, stopped (a signal that it saw), killed (by one that it did not), traceback or hang."""
    words: str = ""
    began: int = 0
    """Training: the step that it went on from."""
    warnings: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """All that it had imported."""
    seconds: float = 0.0


def process(
    job: Job, place: Path, seeds: Path, *, signal_after: tuple[int, float] | None = None, file_size: int = 0
) -> End:
    """The job in a fork of this process, which is sent a signal after so many seconds where it is not done before."""
    read, write = os.pipe()
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _work(job, place, seeds, write, file_size)
    os.close(write)
    killed = 0
    wait = signal_after[1] if signal_after else LONGEST
    content = b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, wait - (time.perf_counter() - begun)))
        if ready:
            part = os.read(read, 2**16)
            if not part:
                break
            content += part
        elif signal_after and not killed:
            killed, wait = signal_after[0], LONGEST
            os.kill(pid, killed)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read)
            return End("hang", f"more than {LONGEST:g} s")
    os.close(read)
    os.waitpid(pid, 0)
    seconds = time.perf_counter() - begun
    if not content:
        return End("killed" if killed else "traceback", "the process died without a word", seconds=seconds)
    return pickle.loads(content)._replace(seconds=seconds)


def _work(job: Job, place: Path, seeds: Path, pipe: int, file_size: int) -> None:
    warnings: list[str] = []
    began = [0]
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mezzotint").addHandler(handler)
    logging.getLogger("mezzotint").propagate = False
    load = Checkpoints.load

    def loading(self: Checkpoints, *arguments: Any) -> int:
        began[0] = load(self, *arguments)
        return began[0]

    Checkpoints.load = loading  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        if file_size:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        job.start(place, seeds)
        end = End("done")
    except MezzotintError as error:
        end = End("refused", str(error))
    except KeyboardInterrupt:
        end = End("stopped")
    except BaseException:
        end = End("traceback", traceback.format_exc()[-3000:])
    content = pickle.dumps(end._replace(began=began[0], warnings=tuple(warnings), modules=tuple(sys.modules)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(pipe, content)
    os._exit(0)


# ---- What happens to the folder --------------------------------------------------------------------------------------


def harm(rng: random.Random, place: Path) -> tuple[str, Callable[[], None]] | None:
    """Damage a file below `place`: what was done, and how it is undone."""
    files = sorted(file for file in place.rglob("*") if file.is_file())
    if not files:
        return None
    file, other = rng.choice(files), rng.choice(files)
    before = {path: path.read_bytes() for path in (file, other)}

    def undo() -> None:
        for path, content in before.items():
            if ".tmp" in str(path.relative_to(place)):  # nobody has a copy of what was half-written
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    content = before[file]
    how = rng.choice(("cut", "flipped", "flipped", "removed", "swapped", "overwritten"))
    if how == "removed":
        file.unlink()
    elif how == "swapped":
        file.write_bytes(before[other])
        other.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif how == "flipped" and content:
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    else:
        file.write_bytes(damaged_bytes(rng, content))
    both = f" with {other.relative_to(place)}" if how == "swapped" else ""
    return f"{how} {file.relative_to(place)}{both}", undo


class Disk:
    """A folder for a life; as root a file system of its own, whose size can be changed."""

    def __init__(self, place: Path, mounted: bool) -> None:
        self.place, self.mounted = place, mounted
        place.mkdir()
        if mounted:
            self._mount("size=256m")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.place], check=True, capture_output=True)

    def used(self) -> int:
        return sum(file.stat().st_size for file in self.place.rglob("*") if file.is_file())

    @contextlib.contextmanager
    def nearly_full(self, spare: int) -> Iterator[None]:
        """While it lasts, about so many more bytes can be written."""
        size = os.statvfs(self.place)
        kept = (size.f_blocks - size.f_bfree) * size.f_frsize + spare
        self._mount(f"remount,size={kept // 4096 * 4096 + 4096}")
        try:
            yield
        finally:
            self._mount("remount,size=256m")

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", self.place], check=True, capture_output=True)
        shutil.rmtree(self.place, ignore_errors=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            disk = Disk(Path(folder) / "x", True)
        except (OSError, subprocess.CalledProcessError):
            return False
        disk.remove()
        return True


# ---- Lives -----------------------------------------------------------------------------------------------------------


class Torture:
    """Lives, until there were enough kills; counts what happened."""

    def __init__(self, folder: Path, seed: int, jobs: tuple[str, ...] = tuple(JOBS), show: bool = False) -> None:
        self.folder, self.rng, self.jobs, self.show = folder, random.Random(f"torture {seed}"), jobs, show
        self.seeds = folder / "seeds"
        self.mounting = can_mount()
        self.counts: Counter[str] = Counter()
        self.by_job: dict[str, Counter[str]] = {name: Counter() for name in jobs}
        self.faults: list[str] = []
        self.length: dict[str, float] = {}
        self.wanted: dict[str, dict[str, torch.Tensor]] = {}
        needed = {"encode": ("fit",), "sample": ("train",)}
        for name in dict.fromkeys(j for job in jobs for j in (*needed.get(job, ()), job)):
            place = self.seeds / name
            place.mkdir(parents=True)
            end = process(JOBS[name], place, self.seeds)
            if end.how != "done":
                raise RuntimeError(f"the undisturbed {name} failed: {end}")
            for module in end.modules:  # so that the forks to come need not, most of whose time it would be
                with contextlib.suppress(Exception):
                    importlib.import_module(module)
            shutil.rmtree(place)
            place.mkdir()
            self.length[name] = process(JOBS[name], place, self.seeds).seconds
            self.wanted[name] = JOBS[name].result(place)

    def run(self, kills: int) -> None:
        number = 0
        while self.counts["killed"] < kills:
            name = self.rng.choices(self.jobs, [JOBS[job].weight for job in self.jobs])[0]
            self.life(name, number)
            number += 1

    def count(self, name: str, what: str) -> None:
        self.counts[what] += 1
        self.by_job[name][what] += 1

    def fault(self, name: str, what: str, story: list[str]) -> None:
        self.count(name, what)
        text = f"{what} ({name}):\n  " + "\n  ".join(story)
        self.faults.append(text)
        print(text, flush=True)

    def life(self, name: str, number: int) -> None:
        rng, job = self.rng, JOBS[name]
        disk = Disk(self.folder / f"life-{number}", self.mounting and rng.random() < 0.4)
        place = disk.place
        story: list[str] = []
        harmed: list[Callable[[], None]] = []
        self.count(name, "lives")
        try:
            for _ in range(rng.randrange(2, 9)):
                newest = self.newest(place)
                kind = rng.random()
                after = (signal.SIGKILL, rng.random() * self.length[name] * 0.8)
                if kind < 0.8:
                    end = process(job, place, self.seeds, signal_after=after)
                    what = "killed"
                elif kind < 0.9:
                    number_ = rng.choice((signal.SIGTERM, signal.SIGINT))
                    end = process(job, place, self.seeds, signal_after=(number_, after[1]))
                    what = "stopped"
                else:
                    end, what = self.full(job, disk, rng)
                story.append(f"{what}: {end.how} after {end.seconds:.2f} s from step {end.began}: {end.words[-1500:]}")
                self.count(name, "finished before" if end.how == "done" else what)
                if not self.judge(name, end, what, newest, harmed, story):
                    return
                if rng.random() < 0.3 and (done := harm(rng, place)):
                    story.append(done[0])
                    harmed.append(done[1])
                    self.count(name, done[0].split()[0])
                if end.how == "done":
                    break
            newest = self.newest(place)
            end = process(job, place, self.seeds)
            story.append(f"left alone: {end.how} from step {end.began}: {end.words[-1500:]}")
            if not self.judge(name, end, "left alone", newest, harmed, story):
                return
            if end.how == "done":
                try:
                    return self.compare(name, place, story)
                except MezzotintError as error:  # the damage is noticed where the file is read
                    if not harmed:
                        return self.fault(name, "refused wrongly", [*story, str(error)])
                    story.append(f"read: {error}")
                    self.count(name, "refused")
            while harmed:  # what was damaged is put back, the last first
                harmed.pop()()
            end = process(job, place, self.seeds)
            story.append(f"with the damaged files put back: {end.how}: {end.words[-1500:]}")
            if self.judge(name, end, "put back", None, harmed, story):
                self.compare(name, place, story)
        finally:
            disk.remove()

    def full(self, job: Job, disk: Disk, rng: random.Random) -> tuple[End, str]:
        """The job with next to no space, or no long files where nothing can be mounted."""
        spare = rng.choice((0, 2_000, 20_000, 100_000))
        if disk.mounted:
            with disk.nearly_full(spare):
                return process(job, disk.place, self.seeds), "disk full"
        return process(job, disk.place, self.seeds, file_size=spare + 1), "disk full"

    def judge(self, name: str, end: End, what: str, newest: int | None, harmed: list[Any], story: list[str]) -> bool:
        """Count what a process's end tells; whether the life goes on."""
        if end.how in ("traceback", "hang"):
            self.fault(name, f"{end.how}s", story)
            return False
        if any("damaged" in warning or "cannot be read" in warning for warning in end.warnings):
            self.count(name, "fell back or made anew")
        if end.how == "refused" and what != "disk full":
            if not harmed:
                self.fault(name, "refused wrongly", story)
                return False
            self.count(name, "refused")
        if newest and not harmed and end.began and end.began < newest:
            self.fault(name, "lost", [*story, f"the newest checkpoint was of step {newest}"])
            return False
        return True

    @staticmethod
    def newest(place: Path) -> int | None:
        steps = [path.name.removeprefix("step-") for path in place.glob("run/state/step-*")]
        return max((int(step) for step in steps if step.isdigit()), default=None)

    def compare(self, name: str, place: Path, story: list[str]) -> None:
        """Raises `MezzotintError` where what was made cannot be read."""
        try:
            expect_same(JOBS[name].result(place), self.wanted[name], "what was made")
        except Wrong as error:
            return self.fault(name, "wrong", [*story, str(error)])
        self.count(name, "the very result")
        left = [path.name for path in place.rglob(".*") if "tmp" in path.name]
        if left:
            self.fault(name, "left behind", [*story, ", ".join(left)])

    def table(self) -> str:
        """Counts by kind of work, as Markdown."""
        rows = ["lives", "killed", "stopped", "disk full", "finished before", "cut", "flipped", "removed", "swapped",
                "overwritten", "fell back or made anew", "refused", "the very result", *MUST_BE_ZERO]  # fmt: skip
        lines = [f"| | {' | '.join(self.by_job)} | all |", "|---|" + "---:|" * (len(self.by_job) + 1)]
        for row in rows:
            cells = [str(counts[row]) for counts in self.by_job.values()]
            lines.append(f"| {row} | {' | '.join(cells)} | {self.counts[row]} |")
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="*", choices=[*JOBS], default=[*JOBS])
    options = parser.parse_args()
    begun = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.environ["MEZZOTINT_CACHE"] = f"{folder}/cache"
        torture = Torture(Path(folder).resolve(), options.seed, tuple(options.jobs))
        torture.run(options.kills)
    print(torture.table())
    disk = "a tmpfs" if torture.mounting else "limited file sizes (nothing can be mounted here)"
    print(f"seed {options.seed}, {time.perf_counter() - begun:.0f} s, full disks by {disk}")
    return int(any(torture.counts[what] for what in MUST_BE_ZERO))


if __name__ == "__main__":
    sys.exit(main())
