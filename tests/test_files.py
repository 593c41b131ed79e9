"""Writing whole files, telling files apart, and one process at a time in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint import files, locks
from mezzotint.data import load
from mezzotint.data.base import same_content
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.sources import picture_folder
from mezzotint.files import atomic_path, content_digest, content_digests, new_folder, write_text
from mezzotint.locks import claimed, locked

DEAD = 2**22 + 1  # no process has such a number: Linux's highest is 2^22


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------ temporary names


def test_temporary_names_are_not_to_be_foreseen_and_never_taken_twice(tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    assert len({files.temporary_name(place).name for _ in range(100)}) == 100
    with atomic_path(place) as one, atomic_path(place) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_name_that_is_there_already_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that somebody put at the temporary name would have been followed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / ".x.tmp").symlink_to(elsewhere)
    monkeypatch.setattr(files, "temporary_name", lambda path: tmp_path / ".x.tmp")
    with pytest.raises(MezzotintError, match="File exists"):
        write_text(tmp_path / "x", "theirs")
    assert elsewhere.read_text() == "mine"


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    host = files._HOST
    left = [f".a.npz.{host}-{DEAD}-0123abcd.tmp", f".a.{DEAD}.tmp"]  # the latter as earlier versions wrote it
    kept = [f".a.npz.{host}-1-0123abcd.tmp", f".a.npz.0badf00d-{DEAD}-0123abcd.tmp", ".a.tmp", "a.1.tmp", ".a.b.tmp"]
    for name in left + kept:
        (tmp_path / name).write_text("half")
    (tmp_path / f".run.{host}-{DEAD}-0123abcd.tmp").mkdir()
    (tmp_path / f".run.{host}-{DEAD}-0123abcd.tmp" / "part").write_text("half")
    with atomic_path(tmp_path / "other") as mine:
        files.sweep_anew()
        write_text(tmp_path / "a.npz", "whole")
        assert mine.exists()
        mine.write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a.npz", "other"])


def test_a_kill_inside_of_safetensors_leaves_nothing_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes under a name of its own, beside that which it was given."""
    place = tmp_path / "x.safetensors"

    def killed(tensors: object, path: Path, metadata: object) -> None:
        path.with_name(".tmpW2wB12").touch()
        os._exit(9)

    if (pid := os.fork()) == 0:
        monkeypatch.setattr(files, "save_file", killed)
        with atomic_path(place) as temporary:
            files.save_tensors({"x": torch.zeros(2)}, temporary, {})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [path.name for path in tmp_path.rglob(".tmpW2wB12")] == [".tmpW2wB12"]
    files.sweep_anew()
    with atomic_path(place) as temporary:
        files.save_tensors({"x": torch.ones(2)}, temporary, {})
    assert list(tmp_path.rglob("*")) == [place]
    assert files.read_tensors(place)[0]["x"].tolist() == [1, 1]


def test_another_machine_s_is_swept_after_a_day(tmp_path: Path) -> None:
    name = tmp_path / f".a.0badf00d-{DEAD}-0123abcd.tmp"
    name.write_text("half")
    os.utime(name, (time.time() - 25 * 3600,) * 2)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_long_names_have_room_for_a_temporary_one(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 250), "whole")
    assert (tmp_path / ("n" * 250)).read_text() == "whole"


# -------------------------------------------------------------------------------------------------------- digests


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two")
    a, b, c, gone = content_digests([tmp_path / name for name in "abcd"])
    assert a == b == content_digest(tmp_path / "a")
    assert a != c
    assert (len(a), gone) == (16, b"")


def test_up_to_its_limit_a_digest_is_over_every_byte(tmp_path: Path) -> None:
    data = bytearray(files.DIGEST_WHOLE)
    (tmp_path / "file").write_bytes(data)
    before = content_digest(tmp_path / "file")
    for place in (0, 100_000, files.DIGEST_WHOLE - 1):
        data[place] ^= 1
        (tmp_path / "file").write_bytes(data)
        assert content_digest(tmp_path / "file") != before
        data[place] ^= 1


def test_of_a_larger_file_size_and_pieces_are_seen_and_nothing_between(tmp_path: Path) -> None:
    data = bytearray(10 * files.DIGEST_WHOLE)
    (tmp_path / "file").write_bytes(data)
    before = content_digest(tmp_path / "file")
    step = (len(data) - files.DIGEST_PIECE) / (files.DIGEST_PIECES - 1)
    for place, seen in ((0, True), (len(data) - 1, True), (int(3 * step), True), (int(3.5 * step), False)):
        data[place] ^= 1
        (tmp_path / "file").write_bytes(data)
        assert (content_digest(tmp_path / "file") != before) == seen, place
        data[place] ^= 1
    (tmp_path / "file").write_bytes(data + b"\0")
    assert content_digest(tmp_path / "file") != before


def test_named_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert content_digests([tmp_path / "pipe", tmp_path]) == [b"", b""]
    assert content_digest(tmp_path / "pipe") == content_digest(tmp_path) == b""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that `content_digests` reads."""
    seen: list[str] = []
    read = content_digest

    def watched(path: str | Path) -> bytes:
        seen.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(files, "content_digest", watched)
    return seen


def test_a_second_look_reads_what_has_changed(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "DIGEST_SETTLED", -1.0)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"0")
    first = content_digests(paths)
    assert sorted(reads) == ["a", "b", "c"]
    about = paths[1].stat()
    paths[1].write_bytes(b"1")
    os.utime(paths[1], ns=(about.st_atime_ns, about.st_mtime_ns))  # as cp -p and rsync -t do
    reads.clear()
    second = content_digests(paths)
    assert reads == ["b"]
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False, True]


def test_a_file_of_this_very_moment_is_not_kept(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"0")
    content_digests([tmp_path / "a"])
    content_digests([tmp_path / "a"])
    assert reads == ["a", "a"]


def test_the_cache_is_not_needed(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"0")
    right = content_digest(tmp_path / "a")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "file" / "cache"))
    assert content_digests([tmp_path / "a"]) == [right]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "digests-1.sqlite3").write_bytes(b"no database")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    assert content_digests([tmp_path / "a"]) == [right]


def pictures(folder: Path, first: int) -> Path:
    """Two classes of pictures, whose files have the same names and sizes whatever they show."""
    for label, kind in enumerate(("apple", "pear")):
        (folder / kind).mkdir(parents=True)
        for n in range(20):
            pixels = np.full((8, 8), first + 20 * label + n, np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{n}.bmp")
    return folder


@pytest.mark.parametrize("name", ["folder", "video-like"])
def test_folders_of_equal_names_and_sizes_are_told_apart(tmp_path: Path, name: str) -> None:
    """They shared caches: a Fréchet distance of 1.92 instead of 60.27."""
    one, other = (pictures(tmp_path / place / "photos", first) for place, first in (("a", 0), ("b", 100)))
    if name == "folder":
        identities = [load("folder", path=folder, size=8).identity for folder in (one, other)]
    else:
        identities = [picture_folder(folder).identity for folder in (one, other)]
    assert identities[0] != identities[1]
    pixels = np.full((8, 8), 255, np.uint8)
    before = [load("folder", path=one, size=8).identity, picture_folder(one).identity]
    Image.fromarray(pixels).save(one / "apple" / "7.bmp")  # a single one of forty
    after = [load("folder", path=one, size=8).identity, picture_folder(one).identity]
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_the_same_content_under_another_name(tmp_path: Path) -> None:
    one, other = pictures(tmp_path / "old-3x8x8-train-0123456789ab", 0), pictures(tmp_path / "new", 0)
    identities = [load("folder", path=folder, size=8).identity for folder in (one, other)]
    assert identities[0] != identities[1]
    assert same_content(*identities)
    assert not same_content(identities[0], load("folder", path=pictures(tmp_path / "third", 1), size=8).identity)
    assert same_content("a-3x8x8-train-0123456789ab-latents-1", "b-3x8x8-train-0123456789ab-latents-1")
    assert not same_content("a-3x8x8-train-0123456789ab-latents-1", "a-3x8x8-train-0123456789ab-latents-2")


# ---------------------------------------------------------------------------------------------------------- locks


def hold(folder: Path, rest: str = "time.sleep(600)") -> subprocess.Popen[bytes]:
    """A process that holds the folder, and does the rest."""
    program = (
        "import sys, time, os, pathlib; from mezzotint.locks import locked\n"
        f"with locked(pathlib.Path({str(folder)!r})):\n    print('held', flush=True)\n    {rest}"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_held_folder_is_refused_and_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    """The holder's children, such as workers that load images, do not hold it after its death, either."""
    process = hold(tmp_path / "run", "os.fork() or (time.sleep(20), os._exit(0)); time.sleep(600)")
    try:
        with pytest.raises(MezzotintError, match=rf"run is in use by process {process.pid} on .* choose another place"):
            locked(tmp_path / "run").__enter__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    with locked(tmp_path / "runs" / "new"):
        assert (tmp_path / "runs" / "new" / ".lock").exists()
    assert not (tmp_path / "runs").exists(), "what a lock has made is gone where nothing was written"


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[" * 4096, b"null", b'{"pid": "x", "host": []}'])
def test_a_lock_with_any_content_is_nobody_s(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(MezzotintError, match=f"in use by process {os.getpid()}"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("system", [True, False])
def test_another_machine_s_lock_counts_as_long_as_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: bool
) -> None:
    """As on file systems whose locks do not reach other machines, and those that have none."""
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    if not system:
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setattr(locks.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    file = tmp_path / ".lock"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "beats": 1}))
    with locked(tmp_path):
        pass
    beats = iter(range(1000))
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "beats": 1}))
    read = locks._content
    monkeypatch.setattr(locks, "_content", lambda descriptor: read(descriptor) + b" " * next(beats))
    with pytest.raises(MezzotintError, match="in use by process 7 on elsewhere"):
        locked(tmp_path).__enter__()


def test_a_holder_s_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    with locked(tmp_path):
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / ".lock").read_text() or "{}").get("beats", 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_place_of_a_new_folder_is_held_without_making_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"):
        assert not (tmp_path / "out").exists()
        with pytest.raises(MezzotintError, match="out is in use by process"), claimed(tmp_path / "out"):
            pass
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(MezzotintError, match="out exists already"), claimed(tmp_path / "out"):
        pass


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(MezzotintError, match=r"run is a file, and a folder .*; choose another place"):
        locked(tmp_path / "run").__enter__()
