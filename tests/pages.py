"""What the pages for users say: their commands, blocks of code and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from mezzotint.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: what a command that leaves something for others writes, where no --out says it; {} stands for its arguments
WRITTEN = {
    "convert": "{2}", "fit-tokenizer": "tokenizer", "encode": "latents", "train-mae": "mae", "finetune": "classifier",
}  # fmt: skip
#: what stands in a mention for the reader's own words
WORDS_FOR_ANY = {"…", "COMMAND", "FILE", "module:function"}


@cache
def run_folder(words: tuple[str, ...]) -> str | None:
    """Where `mezzotint train WORDS` writes, if the first is a recipe that is shipped."""
    recipe, *more = words
    if recipe not in recipe_names():
        return None
    return f"runs/{load_recipe(recipe, [word for word in more if '=' in word]).name}"


class Command(NamedTuple):
    """A command `mezzotint WORDS` of a page."""

    page: str
    line: int
    words: tuple[str, ...]
    folder: str = "."
    """In which folder of the checkout it is typed."""
    is_mention: bool = False
    """Whether it is no whole command but a word in a sentence, such as `mezzotint sweep …` or `mezzotint encode`."""

    def __str__(self) -> str:
        return shlex.join(["mezzotint", *self.words])

    @property
    def writes(self) -> str | None:
        """The folder or file that it leaves for others."""
        option = "--npz" if self.words[0] == "sample" else "--out"
        if option in self.words:
            return self.words[self.words.index(option) + 1]
        if self.words[0] == "train":
            return run_folder(self.words[1:])
        return WRITTEN[self.words[0]].format(*self.words) if self.words[0] in WRITTEN else None

    @property
    def reads(self) -> list[str]:
        """What else its words name, folders and files among them; a run that it goes on with, too."""
        own = None if "--resume" in self.words else self.writes
        return [re.split("[=:]", word)[-1].removeprefix("../") for word in self.words if word != own]


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks, also those inside of lists."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        indent, language, body = found.groups()
        lines = (line.removeprefix(indent) for line in body.splitlines())
        yield Block(page.name, text.count("\n", 0, found.start()) + 1, language, "\n".join(lines) + "\n")


def shell_lines(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of indented blocks and of fenced ones without a language, continued ones joined."""
    fence, joined, first = None, "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = line.strip().removeprefix("```") if fence is None else None
            continue
        if not (fence == "" or (fence is None and line.startswith("    "))):
            joined = ""
            continue
        first = first if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        yield first, joined
        joined = ""


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """What stands between backticks in the text, which may go on in the next line."""
    text = re.sub(r"^( *)```.*?^\1```$", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    for found in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, found.start()) + 1, " ".join(found[1].split())


def commands(page: Path) -> Iterator[Command]:
    """Every `mezzotint …` of a page; of a line of torchrun, what each of its processes does."""
    for lines, in_text in ((shell_lines(page), False), (spans(page), True)):
        for number, line in lines:
            folder = "."
            for part in re.split(r" && | \|\| ", line.replace("$(which mezzotint)", "mezzotint")):
                words = shlex.split(part, comments=True) if re.match(r"(cd|torchrun|mezzotint) ", part) else []
                if words[:1] == ["cd"]:
                    folder = words[1]
                elif "mezzotint" in words:
                    words = [*takewhile(lambda word: word not in (">", "|"), words[words.index("mezzotint") + 1 :])]
                    partial = WORDS_FOR_ANY & {*words} or all(word.startswith("-") for word in words[1:])
                    yield Command(page.name, number, tuple(words), folder, in_text and bool(partial))
