"""What goes wrong with bytes, values and texts: drawn from a `random.Random`, so that every case comes again."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: what people, spreadsheets and templates leave where a text, a number or a path is meant
ODD_TEXTS = (
    # numbers, or nearly
    "nan", ".nan", "NaN", "inf", ".inf", "-inf", "-1", "0", "1", "2", "-0.0", "0.5", "1e999", "-1e300", "3e38",
    "1e-320", "1" + "0" * 30, "-1" + "0" * 30, "9" * 400, "18446744073709551615", "18446744073709551616", "0x10", "0o7",
    "1_000",
    # what YAML makes of them
    "", " ", "true", "no", "on", "null", "None", "~", "2024-01-01", "2024-13-45", "2024-01-01T99:99:99", "12:30:45",
    "=", "<<", "[]", "{}", "[1, 2", "[1,2]", "{a: 1", "{a: 1}", "[" * 50, "[" * 3000, "*a", "&a [*a, *a]", "? x",
    "!!set {x}", "!!python/object/apply:os.system [touch executed]", "!!python/name:os.system", "!!binary x", "!!int x",
    "!!float [1]", "#", "a # b", "a#b", "a: b",
    # what other parsers do, and what consoles and file systems cannot show
    "a[/b]", "[red]x[/red]", "[/]", "*", "?", "{0}", "{a,b}", "%s", "%", "\\", "'", '"', "a'b\"c", "a,b", ",", "-",
    "--", "-x", "a b", "\t", "a\nb", ".", "..", "./x", "ü", "日本語", "e\u0301", "\u202etxt", "\ufeffx", "\udcff",
    "a\udc80b", "x" * 300, "x" * 5000,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**30, -(10**30), 2**63, 2**64 - 1, 2**64, 0.5, -0.5, 1e-320, 1e300, 3e38,
    float("nan"), float("inf"), -float("inf"), [], {}, [None], [0], [1, 2], [-1], [[]], [{}], [1] * 1000, {"a": 1},
    {"name": None}, {"name": []}, "", "x", "nan", "1", "-1", "../x", "x/../../y", "ü", "a[/b]",
)  # fmt: skip


def nested(depth: int) -> Any:
    """A list of a list of a list …"""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def odd_value(rng: random.Random) -> Any:
    if rng.random() < 0.02:
        return nested(rng.choice((20, 100)))
    return copy.deepcopy(rng.choice((*ODD_VALUES, *ODD_TEXTS)))


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` cut, flipped, overwritten, shifted or replaced; different from it wherever it can be."""
    n = len(content)
    place, length = rng.randrange(n + 1), rng.choice((1, 2, 4, 8, 64, 1000))
    # Half of the places are near the beginning, where headers are.
    if rng.random() < 0.5:
        place = min(place, rng.randrange(256))
    kind = rng.randrange(9)
    if kind == 0:
        return content[:place]
    if kind in (1, 2, 3) and n:  # a flipped bit, or several
        out = bytearray(content)
        for _ in range(1 if kind < 3 else rng.randrange(2, 20)):
            out[min(place, n - 1)] ^= 1 << rng.randrange(8)
            place = rng.randrange(n)
        return bytes(out)
    if kind == 4:
        return content[:place] + bytes(length) + content[place + length :]
    if kind == 5:
        return content[:place] + rng.choice((b"\xff", b"\x7f", b"\x80")) * length + content[place + length :]
    if kind == 6:
        return content[:place] + rng.randbytes(length) + content[place:]
    if kind == 7:
        return content[:place] + content[place + length :]
    return rng.choice(
        (b"", b"\0", b"\n", b"<html>404</html>", b"[" * 100_000, rng.randbytes(200), content * 2, content + b"\0" * 100)
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every node of a tree of lists and mappings."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def damaged_tree(rng: random.Random, tree: Any, times: int | None = None) -> Any:
    """A copy of a tree of JSON or YAML with nodes replaced, removed, renamed, doubled, wrapped or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        every = places(tree)
        if not every or rng.random() < 0.02:
            return odd_value(rng)
        *way, last = rng.choice(every)
        parent = tree
        for key in way:
            parent = parent[key]
        kind = rng.randrange(10)
        if kind < 5:
            parent[last] = odd_value(rng)
        elif kind == 5:
            del parent[last]
        elif kind == 6 and isinstance(parent, dict):
            parent[rng.choice((*ODD_TEXTS, f"{last}x", str(last)[:-1]))] = parent.pop(last)
        elif kind == 7:
            parent[last] = rng.choice(([parent[last]], {"name": parent[last]}, str(parent[last])))
        elif kind == 8 and isinstance(parent[last], bool | int | float):
            parent[last] = rng.choice((-parent[last], parent[last] * 10**9, parent[last] + 1, float(parent[last]), 0))
        else:
            *other, end = rng.choice(every)
            there = tree
            try:
                for key in other:
                    there = there[key]
                parent[last] = copy.deepcopy(there[end])
            except (KeyError, IndexError, TypeError):  # what was there is gone
                parent[last] = None
    return tree


def damage_file(rng: random.Random, file: Path) -> str:
    """Damage a file, as text where it is JSON, or as bytes; says what was done."""
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        with contextlib.suppress(ValueError):  # it was damaged before
            text = json.dumps(damaged_tree(rng, json.loads(content)))
            file.write_text(text, encoding="utf-8", errors="surrogateescape")
            return f"other JSON in {file.name}"
    file.write_bytes(damaged_bytes(rng, content))
    return f"other bytes in {file.name}"


def damage_folder(rng: random.Random, folder: Path, only: Callable[[Path], bool] = lambda file: True) -> str:
    """Damage one of the files below a folder, or remove it, swap it, or put something else in its place."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and only(file))
    file, other = rng.choice(files), rng.choice(files)
    kind = rng.randrange(12)
    if kind == 0:
        file.unlink()
        return f"removed {file.relative_to(folder)}"
    if kind == 1:
        content = other.read_bytes()
        other.write_bytes(file.read_bytes())
        file.write_bytes(content)
        return f"swapped {file.relative_to(folder)} and {other.relative_to(folder)}"
    if kind == 2:
        file.unlink()
        file.mkdir()
        return f"a folder in place of {file.relative_to(folder)}"
    if kind == 3:
        file.unlink()
        file.symlink_to(rng.choice((file.name, "nothing", "..", other.name)))
        return f"a link in place of {file.relative_to(folder)}"
    if kind == 4:
        name = rng.choice((f"{file.name}~", f"{file.stem}-backup{file.suffix}", f"._{file.name}"))
        file.with_name(name).write_bytes(file.read_bytes())
        return f"a copy beside {file.relative_to(folder)}"
    return damage_file(rng, file)
