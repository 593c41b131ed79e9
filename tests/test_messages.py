"""What is said while a command works: each warning once, in one line, by one process, without a terminal's codes."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Command
from rich.console import Console

from mezzotint import progress
from mezzotint.errors import MezzotintError

LONG = "a warning of many words, " * 8 + "the end"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], None]], list[str]]:
    """The lines on standard error of what is said meanwhile."""

    def run(say: Callable[[], None]) -> list[str]:
        capsys.readouterr()
        with progress.messages():
            say()
        return capsys.readouterr().err.splitlines()

    return run


def test_a_warning_is_one_line_and_said_once(said: Callable[..., list[str]]) -> None:
    def say() -> None:
        for _ in range(2):
            logging.getLogger("mezzotint").warning("%s: %d", LONG, 3)
        logging.getLogger("mezzotint").error("name\nwith a line's end [bold]")
        logging.getLogger("mezzotint").info("nothing to see")

    assert said(say) == [f"warning: {LONG}: 3", "error: name with a line's end [bold]"]
    assert said(say), "by the next command again"


def test_another_librarys_warning_is_said_alike_without_its_code(said: Callable[..., list[str]]) -> None:
    before = warnings.showwarning

    def say() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for _ in range(2):
                warnings.warn(f"{LONG}\nand more", UserWarning, stacklevel=1)
            import torch

            torch.add(torch.ones(3), 1, out=torch.ones(1))  # of C++: resizing an output

    first, second = said(say)
    assert first == f"warning: {LONG} and more"
    assert second.startswith("warning: An output with one or more elements was resized")
    assert warnings.showwarning is before


def test_of_torchruns_processes_the_first_says_what_all_see(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mezzotint.data.base import report_unreadable

    def say() -> None:
        logging.getLogger("mezzotint").warning("all see this")
        warnings.warn("and this", UserWarning, stacklevel=1)
        report_unreadable("a.png", OSError("truncated"), ["a.png"], 5)

    own = "warning: unreadable image skipped: a.png (truncated)"
    assert said(say) == ["warning: all see this", "warning: and this", own]
    monkeypatch.setenv("RANK", "1")
    assert said(say) == [own]


def test_a_terminal_gets_the_level_in_colour_unless_it_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, expected in (({}, "\x1b[33mwarning\x1b[0m: x\n"), ({"NO_COLOR": "1"}, "warning: x\n")):
        written = io.StringIO()
        shown = Console(file=written, force_terminal=True, color_system="standard", _environ=settings)
        monkeypatch.setattr(progress, "console", shown)
        with progress.messages():
            logging.getLogger("mezzotint").warning("x")
        assert written.getvalue() == expected


def test_a_pipe_gets_no_codes_and_no_progress_bars(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = command("train", "digits", *TINY, "--out", run)
    drawn = command("sample", run, "--count", 40, "--batch-size", 4)
    swept = command("sweep", run, "steps=1", "--count", 20, "--features", "pixels", "--no-plots")
    for result in (trained, drawn, swept, command("train", "--help"), command("train", "digitz")):
        assert "\x1b" not in result.out + result.err
        assert "━" not in result.out + result.err
        assert "\r" not in result.out + result.err
    assert drawn.err == "", "nothing but the path of what was written"
    assert swept.err.startswith("warning: 20 real samples") or "warning: 20 fake samples" in swept.err
    assert swept.err.count("fake samples leave the covariance") == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [(None, 0), (MezzotintError("no"), 2), (KeyboardInterrupt(), 130), (OSError(2, "No such file", "x"), 2)],
    ids=["fine", "mistake", "Ctrl-C", "file"],
)
def test_exit_codes(command: Command, monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, code: int) -> None:
    def names() -> list[str]:
        if raised is not None:
            raise raised
        return ["digits"]

    monkeypatch.setattr("mezzotint.recipe.recipe_names", names)
    assert command("recipes").code == code


def test_a_mistake_before_any_command_is_a_mistake_too(command: Command) -> None:
    assert command("--nothing").code == 2
    assert command("nothing").code == 2
    assert command("train").code == 2
    assert command("--version").code == 0
    assert sys.argv[1] == "--version"
