"""Figures for people, as tables of which no figure is ever cut, and for programs, as JSON."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.cells import cell_len
from rich.text import Text

from mezzotint.progress import results

#: between columns: two, so that `awk -F '  +'` tells them from the spaces within a cell
GAP = "  "
#: what stands where there is no figure, so that every line has all its columns
NOTHING = "-"
#: columns of a terminal that prose is given at least
PROSE = 20


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; a cell of None, or an empty one, is a figure that there is not."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    keys: int = 1
    """How many of the first columns say what a row is."""
    title: str = ""
    notes: Sequence[str] = ()
    """Lines below."""
    prose: bool = False
    """Whether the last column is text, which may be broken at its spaces."""

    def lines(self, width: int | None = None) -> Iterator[tuple[str, bool]]:
        """Each line of the table proper, and whether it is one of headings.

        Within `width` characters headings are broken at their spaces, and what does not fit beside the keys goes on
        below, with the keys again. Cells stay whole, even where one alone with its keys is wider. None: a line a row.
        """
        columns = [
            [heading, *(" ".join(str(row[place] or NOTHING).split()) for row in self.rows)]
            for place, heading in enumerate(self.headings)
        ]
        widths = [max(map(cell_len, column)) for column in columns]
        if width is not None and _total(widths) > width:
            widths = [max(map(cell_len, [*heading.split(" "), *cells])) for heading, *cells in columns]
            if self.prose:
                widths[-1] = min(widths[-1], max(PROSE, width - _total([*widths[:-1], 0])))
        keys, part = [*range(self.keys)], [*range(self.keys)]
        for place in range(self.keys, len(columns)):
            if width is not None and part != keys and _total([widths[other] for other in [*part, place]]) > width:
                yield from self._part([columns[other] for other in part], [widths[other] for other in part])
                yield "", False
                part = [*keys]
            part.append(place)
        yield from self._part([columns[other] for other in part], [widths[other] for other in part])

    def _part(self, columns: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[tuple[str, bool]]:
        right = [all(cell == NOTHING or re.match(r"[-+]?[\d.]", cell) for cell in column[1:]) for column in columns]
        for number, row in enumerate(zip(*columns, strict=True)):
            if not any(row):  # no headings
                continue
            # Only headings and prose are wider than their columns.
            broken = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
            for place in range(max(map(len, broken))):
                cells = [cell[place] if place < len(cell) else "" for cell in broken]
                padded = (_padded(*cell) for cell in zip(cells, widths, right, strict=True))
                yield GAP.join(padded).rstrip(), number == 0


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _broken(cell: str, width: int) -> list[str]:
    return [cell] if cell_len(cell) <= width else textwrap.wrap(cell, width, break_on_hyphens=False)


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def print_table(table: Table) -> None:
    """Print a table as wide as it is, and on a terminal no wider than that."""
    if table.title:
        results.print(table.title, soft_wrap=True)
    for line, heading in table.lines(results.width if results.is_terminal else None):
        results.print(Text(line, "bold" if heading else ""), soft_wrap=True)
    for line in table.notes:
        results.print(line, soft_wrap=True)


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """`value` as JSON that any program reads: what is not finite, which JSON has no word for, is null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n"


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII, which every console has."""
    typer.echo(json_text(value, ascii_only=True), nl=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_scores(scores: dict[str, Any]) -> None:
    """The figures of every set side by side, and what they were taken in."""
    sets: dict[str, dict[str, Any]] = scores["sets"]
    titles = {"guided": f"guided, {scores.get('guidance', 1):g}", "real": "real data"}
    names = dict.fromkeys(row for figures in sets.values() for row in figures if row != "source")
    notes = [
        f"features: {scores['features']}",
        f"reference: {scores['reference']}, {scores['reference_images']} images"
        + ("; real data: its training images" if "real" in sets else ""),
    ]
    for split, what in (("train", "training"), ("test", "held-out")):
        if (found := scores.get(f"captions, {split}")) is not None:
            score = f"; CLIP score {found['CLIP score']:.2f}" if "CLIP score" in found else ""
            notes.append(
                f"caption agreement, {found['captions']} {what} captions: {found['caption agreement']:.1%} "
                f"(nearer to its own image than to 9 random others; chance 10.0%){score}"
            )
    if "bits_per_dim" in scores:
        bits = f"{scores['bits_per_dim']:.3f} ± {scores['bits_per_dim_error']:.3f}"
        notes.append(f"bits per dimension of held-out images: {bits}")
    rows = [[name, *(_figure(figures.get(name)) for figures in sets.values())] for name in names]
    print_table(Table(["figure", *(titles.get(name, name) for name in sets)], rows, notes=notes))


def _figure(value: float | int | list[float] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(map(_figure, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2e}"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"
