"""Every command of the pages runs as it is written, every block of Python too, and what they link to and name is there.

What would be downloaded, or trained for hours, has a stand-in (`small_world`), and options that only say how much are
lowered. A command that reads what another one writes has that one run first.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command as Runner
from conftest import Result
from pages import PAGES, ROOT, WORDS_FOR_ANY, Block, Command, blocks, commands, shell_lines, spans
from small_world import ON_THE_HUB, TRAINING, furnish, shrink
from typer.main import get_command

import mezzotint
from mezzotint.cli.app import app
from mezzotint.recipe import load_recipe

for package in ("diffusers", "transformers", "datasets", "peft", "matplotlib", "fontTools"):
    pytest.importorskip(package)

#: options that say how much, and how much the tests ask for
LESS = {
    "--count": "12", "--epochs": "1", "--steps": "3", "--batch-size": "8", "--captions": "10", "--seeds": "0",
    "--cells": "ldae-10-original-image",
}  # fmt: skip
#: what is asked of a command that does not say how much
MORE = {
    "evaluate": ("--count", "12"), "probe": ("--epochs", "1"), "sweep": ("--count", "12"), "sample": ("--count", "2"),
    "study": ("--cells", "ldae-10-original-image", "--seeds", "0", "--processes", "1", "training.steps=2"),
}  # fmt: skip
#: words for what the reader has
PLACEHOLDERS = {"RECIPE": "digits", "RUN": "runs/digits", "D": "4"}
#: what no page's command writes
OTHERS = {
    "runs/demo": ("train", "digits"),
    "runs/mine": ("train", "dit-s-2-256"),
    "runs/latents": ("train", "dit-s-2-256", "data=latents:latents", "backbone.num_classes=null"),
}


def lowered(documented: Command) -> Command:
    """The same command, of less."""
    words: list[str] = []
    for word in documented.words:
        key, equals, value = word.rpartition("=")
        value = PLACEHOLDERS.get(value, value)
        if words and words[-1] in LESS:
            value = LESS[words[-1]]
        elif key.removeprefix("training.") in TRAINING:
            value = str(TRAINING[key.removeprefix("training.")])
        elif key == "steps":
            value = "2,3"
        elif key == "data.workers":
            value = "0"
        for name, place in ON_THE_HUB.items():
            value = value.replace(name, place)
        words.append(f"{key}{equals}{value}")
    more = iter(MORE.get(words[0], ()))
    for option in more:
        added = [option, next(more)] if option.startswith("--") else [option]
        words += [] if option in words else added
    return documented._replace(words=tuple(words))


DOCUMENTED = [command for page in PAGES if page.name != "CHANGELOG.md" for command in commands(page)]
ONCE: dict[tuple[object, ...], Command] = {}
for command in (lowered(command) for command in DOCUMENTED if not command.is_mention):
    ONCE.setdefault((command.words, command.folder), command)
COMMANDS = list(ONCE.values())
BLOCKS = [block for page in PAGES for block in blocks(page)]


class World:
    """A folder for each command, in which lies what the pages take for granted, and what the command reads."""

    def __init__(self, furnished: Path, own: Path) -> None:
        self.furnished, self.own = furnished, own
        self.folders: dict[Command, Path] = {}
        self.results: dict[Command, Result] = {}

    def folder(self, places: Iterable[str], page: str, run: Runner) -> Path:
        """A new folder for something of `page`, with what commands write of the `places` that it reads."""
        folder = self.own / str(len(list(self.own.iterdir())))
        folder.mkdir()
        for thing in self.furnished.iterdir():
            (folder / thing.name).symlink_to(thing)
        for place in dict.fromkeys(places):
            if (writer := self.writer(place, page)) is not None and not (folder / place).exists():
                (folder / place).parent.mkdir(exist_ok=True)
                assert self.result(writer, run).code == 0, f"{writer}, which writes {place}: {self.results[writer].err}"
                source = self.folders[writer] / place
                (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / place)
        return folder

    def writer(self, place: str, page: str) -> Command | None:
        """The command that writes `place`, of this page where there is one."""
        writers = [command for command in COMMANDS if command.writes == place and place not in command.reads]
        writers.sort(key=lambda command: command.page != page)
        if not writers and place in OTHERS:
            writers = [lowered(Command("", 0, (*OTHERS[place], "--out", place)))]
        return writers[0] if writers else None

    def result(self, command: Command, run: Runner) -> Result:
        """What came of the command, which is run where it was not yet."""
        if command not in self.results:
            folder = self.folders[command] = self.folder(command.reads, command.page, run)
            if command.writes and command.writes not in command.reads:
                (folder / command.writes).unlink(missing_ok=True)
            if command.folder != ".":  # of the checkout
                (folder / command.folder).mkdir()
                for file in (ROOT / command.folder).glob("*.py"):
                    (folder / command.folder / file.name).symlink_to(file)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder / command.folder)
                self.results[command] = run(*command.words)
        return self.results[command]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where --install-completion writes
        patch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
        patch.chdir(folder)
        shrink(tmp_path_factory.mktemp("recipes"), patch)
        furnish(folder)
        yield World(folder, tmp_path_factory.mktemp("commands"))


@pytest.mark.parametrize("documented", COMMANDS, ids=lambda command: f"{command.page}:{command.line}")
def test_a_command_runs(documented: Command, world: World, command: Runner) -> None:
    result = world.result(documented, command)
    assert result.code == 0, f"{documented}: {result.err}"


@pytest.mark.parametrize("mention", [c for c in DOCUMENTED if c.is_mention], ids=lambda c: f"{c.page}:{c.line}")
def test_what_a_sentence_calls_a_command_is_one(mention: Command) -> None:
    group = get_command(app)
    context = group.make_context("mezzotint", [], resilient_parsing=True)
    name = mention.words[0]
    of_all = name.startswith("-") or name in WORDS_FOR_ANY
    known = group if of_all else group.get_command(context, name)  # type: ignore[attr-defined]
    assert known is not None
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert options | {*known.get_help_option_names(context)} >= {word for word in mention.words if word.startswith("-")}


# ---- Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in BLOCKS if block.language == "python"))
def test_the_python_of_a_page_runs(page: str, world: World, command: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks one after the other, in one namespace."""
    found = [block for block in BLOCKS if (block.page, block.language) == (page, "python")]
    monkeypatch.chdir(world.folder(re.findall(r'"([\w./-]+)"', "".join(block.text for block in found)), page, command))
    names: dict[str, Any] = {"__name__": page}
    for block in found:
        text = re.sub(r"steps=\d+", f"steps={LESS['--steps']}", block.text)
        exec(compile(text, f"{page}, line {block.line}", "exec"), names)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: f"{b.page}:{b.line}")
def test_yaml_is_a_recipe(block: Block, tmp_path: Path) -> None:
    (tmp_path / "block.yaml").write_text(block.text)
    assert mezzotint.build(load_recipe(tmp_path / "block.yaml", ["backbone.num_classes=0"]))


def test_blocks_are_of_languages_that_are_tested() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "yaml", ""}


# ---- What other tools are told, paths and links ----------------------------------------------------------------------


def test_targets_of_make_and_extras_of_pip_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    sections = (ROOT / "pyproject.toml").read_text().split("\n[")
    section = next(section for section in sections if section.startswith("project.optional-dependencies]"))
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = [line for page in PAGES for _, line in [*shell_lines(page), *spans(page)]]
    asked = {found[1] for line in lines if (found := re.match(r"make ([\w-]+)", line))}
    assert asked
    assert asked <= targets
    installed = {extra for names in re.findall(r"(?:mezzotint|\.)\[([a-z,]+)\]", text) for extra in names.split(",")}
    assert installed
    assert installed <= extras


def test_scripts_exist_and_take_their_options() -> None:
    for page in PAGES:
        for number, line in [*shell_lines(page), *spans(page)]:
            words = shlex.split(line, comments=True) if re.match(r"(\S*/)?python \S+\.py", line) else []
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in (ROOT / words[1]).read_text(), f"{page.name}:{number}: {line}"
            assert not words or (ROOT / words[1]).is_file(), f"{page.name}:{number}: {line}"


def test_files_that_are_named_exist() -> None:
    """Paths between backticks, from the top of the checkout or from the package's."""
    for page in PAGES:
        for number, span in spans(page):
            if re.fullmatch(r"(docs|tests|benchmarks|examples)/[\w/.-]+|\w+/[\w/]+\.py", span):
                assert any((top / span).exists() for top in (ROOT, ROOT / "src/mezzotint")), (
                    f"{page.name}:{number}: {span}"
                )


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("https://", "http://")):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"
