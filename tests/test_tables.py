"""Figures on a terminal, in a pipe and as JSON: none is ever cut, rounded or lost where a program reads it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Command
from rich.console import Console

from mezzotint.cli.sweep import sweep_table
from mezzotint.cli.tables import Table, json_text, print_table

ROWS = [
    {"sampler": sampler, "steps": steps, "guidance": 1.5, "note": note, **figures}
    for sampler, steps in (("sde-heun-increasing", 1000), ("ddim", 25))
    for note, figures in [
        ("sampling.steps must be at least 2", {}),
        (
            "",
            {
                "evaluations": 31999,
                "network passes": 63998,
                "FD-classifier": 123456.5,
                "Inception score (classifier)": 3.517,
                "Inception score (classifier), std": 0.25,
                "precision": 0.1235,
                "recall": 0.9876,
                "class agreement": 0.0625,
                "seconds per image": 0.0009442,
            },
        ),
    ]
]
FIGURES = ["31999", "63998", "123456", "3.517", "0.1235", "0.9876", "0.0625", "0.0009442"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is printed of a table, into a pipe or on a terminal of so many columns."""

    def show(table: Table, width: int | None = None) -> str:
        written = io.StringIO()
        # A pipe is taken for 80 columns, of whatever is printed there.
        terminal: dict[str, Any] = {"width": 80} if width is None else {"width": width, "force_terminal": True}
        console = Console(file=written, markup=False, emoji=False, highlight=False, color_system=None, **terminal)
        monkeypatch.setattr("mezzotint.cli.tables.results", console)
        print_table(table)
        return written.getvalue()

    return show


def test_a_pipe_gets_a_line_a_row(shown: Callable[..., str]) -> None:
    lines = shown(sweep_table(ROWS)).splitlines()
    assert len(lines) == 1 + 4 + 1
    cells = [re.split("  +", line.strip()) for line in lines[:5]]
    assert cells[0] == [
        "sampler", "steps", "guidance", "evaluations", "network passes", "FD-classifier",
        "Inception score (classifier)", "precision", "recall", "class agreement", "seconds per image", "note",
    ]  # fmt: skip
    assert cells[1] == ["sde-heun-increasing", "1000", "1.5", *8 * "-", "1"]
    assert cells[2] == ["sde-heun-increasing", "1000", "1.5", *FIGURES, "-"]
    assert cells[4] == ["ddim", "25", "1.5", *FIGURES, "-"]
    assert lines[5] == "1: sampling.steps must be at least 2"


@pytest.mark.parametrize("width", [80, 60, 40, 20, 10])
def test_a_narrow_terminal_gets_every_figure(shown: Callable[..., str], width: int) -> None:
    """What does not fit goes on below with the keys again."""
    text = shown(sweep_table(ROWS), width)
    assert "…" not in text
    words = text.split()
    assert all(words.count(figure) == 2 for figure in FIGURES)
    assert words.count("Inception") == 1
    parts = words.count("sampler")
    assert words.count("sde-heun-increasing") == 2 * parts
    assert parts == {80: 3, 10: 9}.get(width, parts), "as few as there can be, a figure each at worst"
    widest = max(map(len, text.splitlines()[:-1]))
    assert widest <= max(width, len("sde-heun-increasing  steps  guidance  FD-classifier"))


def test_a_wide_terminal_gets_one_table_with_headings_in_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, color_system="standard")
    monkeypatch.setattr("mezzotint.cli.tables.results", console)
    print_table(sweep_table(ROWS))
    first, *rows, _ = written.getvalue().splitlines()
    assert first.startswith("\x1b[1msampler")
    assert len(rows) == 4
    assert "\x1b" not in "".join(rows)


def test_columns_are_as_wide_as_their_letters_and_only_prose_is_broken(shown: Callable[..., str]) -> None:
    table = Table(["what", "n", "说明"], [["日本", "1", "one two three four five"], ["a[b]", "-20", ""]], prose=True)
    assert shown(table) == "what    n  说明\n日本    1  one two three four five\na[b]  -20  -\n"
    assert shown(table, 31) == "what    n  说明\n日本    1  one two three four\n           five\na[b]  -20  -\n"
    assert shown(Table(["a", "b"], [])) == "a  b\n"


def test_json_has_no_word_for_nan() -> None:
    values = {"a": float("nan"), "b": [float("inf"), 0.1 + 0.2], "c": {"d": (-float("inf"),)}, "e": "é"}
    assert json.loads(json_text(values), parse_constant=pytest.fail) == {
        "a": None, "b": [None, 0.30000000000000004], "c": {"d": [None]}, "e": "é",
    }  # fmt: skip
    assert json_text("é\udcff", ascii_only=True) == '"\\u00e9\\udcff"\n'


# ---- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mezzotint import load_recipe, train

    folder = tmp_path_factory.mktemp("tables") / "run"
    train(load_recipe("digits", TINY), folder, quiet=True)
    return folder


def document(command: Command, *words: object) -> Any:
    """The one JSON document on a command's standard output."""
    result = command(*words, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out, parse_constant=pytest.fail)


def test_evaluate(command: Command, run: Path, tmp_path: Path) -> None:
    words = ["evaluate", run, "--count", 30, "--features", "pixels", "--intervals", 5, "--out", tmp_path / "s.json"]
    found = document(command, *words)
    assert found == json.loads((tmp_path / "s.json").read_text())
    figures = found["sets"]["samples"]
    assert len(str(figures["FD-pixels"])) > 8, "not rounded"
    table = command(*words).out
    cells = {row[0]: row[1:] for row in (re.split("  +", line) for line in table.splitlines())}
    assert cells["figure"] == ["samples", "real data"]
    assert cells["FD-pixels"][0] == f"{figures['FD-pixels']:.3f}"
    assert all(len(row) == 2 for name, row in cells.items() if ":" not in name)


def test_sweep(command: Command, run: Path, tmp_path: Path) -> None:
    words = ["sweep", run, "sampler=ddim,ode-heun", "steps=1,2", "--count", 30, "--features", "pixels", "--no-plots"]
    found = document(command, *words, "--out", tmp_path)
    assert found["files"] == [str(tmp_path / "sweep.csv")]
    assert [(row["sampler"], row["steps"]) for row in found["rows"]] == [
        ("ddim", 1), ("ddim", 2), ("ode-heun", 1), ("ode-heun", 2),
    ]  # fmt: skip
    table = command(*words, "--out", tmp_path).out
    for row in found["rows"]:
        assert f"{row['FD-pixels']:.4g}" in table
    assert "…" not in table


def test_probe(command: Command, run: Path, tmp_path: Path) -> None:
    words = ["probe", run, "--probe", "knn", "--t", 0.1, "--t", 0.25, "--count", 100, "--out", tmp_path / "p.json"]
    found = document(command, *words)
    assert found == json.loads((tmp_path / "p.json").read_text())
    title, headings, *rows = command(*words).out.splitlines()[1:]
    assert title.startswith("knn, top-1")
    assert re.split("  +", headings) == ["layer", "t = 0.1", "t = 0.25"]
    assert len(rows) == len({row["layer"] for row in found["rows"]})
    assert all(f"{row['top1']:.1%}" in "".join(rows) for row in found["rows"])


def test_finetune(command: Command, run: Path, tmp_path: Path) -> None:
    words = ["finetune", run, "--epochs", 1, "--count", 40, "--batch-size", 20, "--out", tmp_path / "c"]
    found = document(command, *words)
    assert found["folder"] == str(tmp_path / "c")
    assert 0 <= found["top1"] <= 1


def test_train_mae(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = ["backbone.depth=2", "backbone.patch_size=2"]
    found = document(command, "train-mae", "digits", *TINY, *sizes, "--out", tmp_path / "mae")
    assert found["folder"] == str(tmp_path / "mae")
    assert found["last_loss"] > 0


def test_fit_tokenizer(command: Command, tmp_path: Path) -> None:
    words = ["representation=patch-pca", "representation.stride=4", "representation.channels=8"]
    found = document(command, "fit-tokenizer", "digits", *words, "--out", tmp_path / "pca")
    assert found["folder"] == str(tmp_path / "pca")
    assert found["mse"] > 0


def test_cost(command: Command) -> None:
    assert document(command, "cost", "dit-xl-2-256")["params"] == 675_129_632
    assert {"parameters", "675,129,632"} <= set(command("cost", "dit-xl-2-256", "--samplers").out.split())


def test_recipes(command: Command) -> None:
    listed = document(command, "recipes")
    assert {"digits", "dit-xl-2-256"} <= {recipe["recipe"] for recipe in listed}
    assert document(command, "recipes", "digits", "seed=5")["seed"] == 5
    assert {recipe["recipe"] for recipe in listed} <= set(command("recipes").out.split())


def test_study(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["study", "ldae", "--data", "digits", "--out", tmp_path]
    parts = {"tokenizer": 0.0, "training": 12.345678, "probes": 0.5}
    monkeypatch.setattr("mezzotint.studies.ldae.estimate", lambda jobs, device: {"a-seed0": parts})
    assert document(command, *words, "--plan") == {"cells": {"a-seed0": parts}, "seconds": 12.845678}
    shown = command(*words, "--plan").out.splitlines()
    assert re.split("  +", shown[2]) == ["a-seed0", "0.0", "12.3", "0.5"]
    monkeypatch.setattr("mezzotint.studies.ldae.study", lambda *_, **__: [{"cell": "a", "seconds": float("nan")}])
    monkeypatch.setattr("mezzotint.studies.report.write_report", lambda *_: [tmp_path / "study.md"])
    found = document(command, *words)
    assert found == {"cells": [{"cell": "a", "seconds": None}], "files": [str(tmp_path / "study.md")]}
