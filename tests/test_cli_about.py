"""What the command line says of itself: help, versions."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import Command

from mezzotint.cli import COMMANDS

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
