"""What the command line says of itself: help, versions, the environment, the cache."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Command

from mezzotint import cache
from mezzotint.cli import COMMANDS, env
from mezzotint.evaluation.classifier import ClassifierNetwork, ConvNet, trained_classifier
from mezzotint.evaluation.features import feature_network
from mezzotint.evaluation.probing import probe
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.files import cache_folder, content_digests
from mezzotint.pipeline import Pipeline
from mezzotint.store import Store

NAMES = [command.__name__.replace("_", "-") for commands in COMMANDS.values() for command in commands]


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)])
def test_h_is_help_everywhere(command: Command, words: list[str]) -> None:
    short, long = command(*words, "-h"), command(*words, "--help")
    assert (short.code, short.out) == (0, long.out)
    assert f"Usage: {' '.join(['mezzotint', *words])} " in short.out


def test_help_is_grouped_and_fits_80_columns(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = command("--help").out
    assert max(map(len, shown.splitlines())) <= 80
    titles = [shown.index(f" {title} ") for title in COMMANDS]
    assert titles == sorted(titles)
    assert all(f"│ {name} " in shown for name in NAMES), "every command has a panel"


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"mezzotint {version('mezzotint')}\n", "")
    words = [sys.executable, "-m", "mezzotint", "--version"]
    assert subprocess.run(words, capture_output=True, text=True).stdout == f"mezzotint {version('mezzotint')}\n"


# ---- The environment -------------------------------------------------------------------------------------------------


def test_env_says_what_a_bug_report_needs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Tesla X", total_memory=3 * 2**30, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(
        env, "requires", lambda name: ["torch>=2", 'no-such>=3; extra == "hub"', "pytest; extra == 'dev'"]
    )
    monkeypatch.setattr(env, "processor", lambda: {"model name": "Ceon", "flags": "avx512f amx_bf16"})
    shown = " ".join(command("env").out.split())
    for words in (
        f"mezzotint {version('mezzotint')}",
        f"torch {version('torch')}",
        "no-such not installed (pip install 'mezzotint[hub]')",
        f"processor Ceon, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "bf16 on it by AMX",
        "cuda:0 Tesla X, 3.0 GiB, no bf16",
        f"cache {cache_folder()}",
    ):
        assert words in shown
    assert "mypy" not in shown, "of dev"
    found = json.loads(command("env", "--json").out)
    assert found["packages"] == {
        "torch": {"version": version("torch"), "extra": None},
        "no-such": {"version": None, "extra": "hub"},
    }
    assert found["devices"][0]["memory_bytes"] == 3 * 2**30
    assert found["processor"]["bf16"] == "AMX"


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert env.commit(tmp_path) is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert head.startswith(str(env.commit(tmp_path)))
    (tmp_path / "new").touch()
    assert str(env.commit(tmp_path)).endswith(", with changes")


# ---- The cache -------------------------------------------------------------------------------------------------------

OURS = {
    "classifiers/digits-1-seed-0-0123abcd.safetensors": "classifiers",
    "references/x-0123456789abcdef.npz": "references",
    "features/x-0123456789abcdef.safetensors": "features",
}
NOT_OURS = [
    "features/mine.safetensors",
    "features/deep/x-0123456789abcdef.safetensors",
    "photos/x-0123456789abcdef.npz",
    "x-0123456789abcdef.npz",
    "references/.x-0123456789abcdef.npz.other.txt",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, of somebody who keeps other things there, too."""
    place = tmp_path / "cache"
    for name in [*OURS, *NOT_OURS]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"12345")
    for name in ("captions/t5-0123abcd-fp32.sqlite3", "digests-1.sqlite3"):
        Store(place / name).write({b"key": b"value"})
    monkeypatch.setenv("MEZZOTINT_CACHE", str(place))
    return place


def others(folder: Path) -> list[str]:
    return [name for name in NOT_OURS if (folder / name).read_bytes() == b"12345"]


def test_all_that_is_kept_is_counted(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library itself writes, under whatever names it does now."""
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    fresh = ClassifierNetwork(ConvNet(1, 10, 1).eval(), tuple("0123456789"))
    monkeypatch.setattr(ClassifierNetwork, "fit", lambda *_, **__: fresh)
    monkeypatch.setattr("mezzotint.evaluation.classifier.MAX_EXAMPLES", 20)
    trained_classifier("digits")
    reference_statistics("digits", feature_network("pixels"))
    probe(pipeline, layers=["1"], probes=["knn"], count=20)
    content_digests([Path(cache.__file__)])
    found = cache.kept()
    assert {kind for kind in found if found[kind].files} == {"classifiers", "references", "features", "digests"}
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(one.files for one in found.values()) == len(kept)
    assert sum(one.bytes for one in found.values()) == sum(path.stat().st_size for path in kept)


def test_cache_shows_and_clears(command: Command, folder: Path) -> None:
    sizes = {kind: one["bytes"] for kind, one in json.loads(command("cache", "--json").out)["kept"].items()}
    assert [sizes[kind] for kind in OURS.values()] == [5, 5, 5]
    assert min(sizes["captions"], sizes["digests"]) > 1000
    one = json.loads(command("cache", "clear", "references", "--json").out)
    assert one == {"folder": str(folder), "removed": {"references": {"files": 1, "bytes": 5}}}
    assert cache.kept()["features"].files == 1, "another kind"
    shown = command("cache", "clear")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"removed from {folder}\n")
    assert sum(found.files for found in cache.kept().values()) == 0
    assert others(folder) == NOT_OURS


def test_nothing_outside_of_the_folder_is_removed(command: Command, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "elsewhere" / "x-0123456789abcdef.npz"
    mine.parent.mkdir()
    mine.write_bytes(b"12345")
    link = folder / "references" / "y-0123456789abcdef.npz"
    link.symlink_to(mine)
    (folder / "classifiers" / "digits-1-seed-0-0123abcd.safetensors").unlink()
    (folder / "classifiers").rmdir()
    (folder / "classifiers").symlink_to(mine.parent)
    cleared = command("cache", "clear")
    assert f"{folder / 'classifiers'} is a link to {mine.parent}, where nothing was removed" in cleared.err
    assert mine.read_bytes() == link.read_bytes() == b"12345"
    assert others(folder) == NOT_OURS


def test_a_cache_folder_that_is_a_link_itself_is_ours(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "link"))
    assert command("cache", "clear").out.startswith(f"removed from {tmp_path / 'link'} → {folder}\n")
    assert sum(found.files for found in cache.kept().values()) == 0
    assert others(folder) == NOT_OURS
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_no_cache_is_an_empty_one(
    place: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / place / "cache"))
    for words in (["cache"], ["cache", "clear"]):
        assert command(*words).code == 0
    assert not (tmp_path / "nowhere").exists()


def test_what_another_process_uses_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is being written stays; what is being written under a temporary name, too."""
    file = folder / "captions" / "t5-0123abcd-fp32.sqlite3"
    writing = folder / "references" / f".z-0123456789abcdef.npz.{os.getppid()}.tmp"
    writing.touch()
    monkeypatch.setattr(Store.remove, "__defaults__", (0.05,))
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO features VALUES (x'00', 1, x'00')")
        removed, left = cache.clear("captions")
        assert removed["captions"].files == 0
        assert left == [f"{file} is in use by another process; clear it when that has ended"]
    assert Store(file).read([b"key"]) == {b"key": b"value"}
    assert cache.clear()[1] == []
    assert not file.exists()
    assert writing.exists()
    store = Store(file)
    store.write({b"a": b"b"})
    assert store.read([b"a"]) == {b"a": b"b"}, "and it is begun again"


def test_clearing_waits_for_who_is_quick(folder: Path) -> None:
    file = folder / "digests-1.sqlite3"
    size = file.stat().st_size
    database = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: database.execute("COMMIT"))
    timer.start()
    assert cache.clear("digests") == ({"digests": cache.Kept(1, size)}, [])
    timer.join()
    database.close()


def test_a_damaged_database_is_removed(folder: Path) -> None:
    (folder / "digests-1.sqlite3").write_bytes(b"no database" * 1000)
    assert cache.clear("digests")[0]["digests"] == (1, 11_000)
    assert not (folder / "digests-1.sqlite3").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["clean"], "'clean' is nothing to do with the cache"),
        (["clear", "weights"], "nothing of the kind 'weights' is kept; closest: digests, features"),
        (["clear", "../photos"], "nothing of the kind '../photos' is kept"),
    ],
)
def test_a_mistake_clears_nothing(words: list[str], sentence: str, command: Command, folder: Path) -> None:
    before = cache.kept()
    result = command("cache", *words)
    assert result.code == 2
    assert sentence in result.err
    assert cache.kept() == before
