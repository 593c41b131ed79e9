"""A share of what `make fuzz` and `make torture` do without end, and that their judges can find a fault."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import fuzz
import pytest
import torch
from damage import damaged_bytes, damaged_tree
from kinds import KINDS, Case, Kind, Wrong, expect_same, make_seeds
from torture import MUST_BE_ZERO, Torture

from mezzotint.errors import MezzotintError

CASES, PARTS, KILLS = 2000, 8, 8


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds").resolve()
    make_seeds(folder)
    return folder


@pytest.mark.parametrize("part", range(PARTS))
def test_no_input_ends_in_anything_but_a_result_or_a_sentence(part: int, seeds: Path) -> None:
    size = CASES // PARTS
    ends, faults = fuzz.run(range(part * size, (part + 1) * size), 0, seeds)
    assert not faults, "\n\n".join(map(str, faults))
    assert ends.total() == size
    assert sum(count for end, count in ends.items() if end.endswith("refused")) > size / 4


def test_kills_damage_and_full_disks_lose_nothing(tmp_path: Path) -> None:
    torture = Torture(tmp_path.resolve(), seed=0, jobs=("train",))
    torture.run(KILLS)
    assert not torture.faults, "\n\n".join(torture.faults)
    assert torture.counts["killed"] >= KILLS
    assert torture.counts["the very result"] > 0
    assert not any(torture.counts[what] for what in MUST_BE_ZERO)


# ---- The judges ------------------------------------------------------------------------------------------------------


def _refuse() -> None:
    raise MezzotintError("the file is damaged; copy it again")


def _write_outside() -> None:
    Path("../../outside").write_text("x")


def _swallow() -> None:
    try:
        while True:
            pass
    except Exception:
        pass


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (_refuse, None),
        (lambda: None, None),
        (lambda: {}["x"], "KeyError"),
        (lambda: (_ for _ in ()).throw(MezzotintError("<class 'int'> is not valid")), "Python's words"),
        (lambda: (_ for _ in ()).throw(MezzotintError("")), "without words"),
        (_write_outside, "outside of its folder"),
        (lambda: os.system("true"), "os.system"),
        (lambda: Path("executed").touch(), "was run"),
        (_swallow, "Hang"),
        (lambda: time.sleep(60), "Hang"),
        (lambda: torch.empty(2**34), "RuntimeError"),
        (lambda: bytearray(b"x") * (2**30 + 2**28), "GiB of memory"),
    ],
)
def test_the_fuzzer_finds_a_fault(
    act: object, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "Hang":
        monkeypatch.setattr(fuzz, "SECONDS", 0.2)
        monkeypatch.setattr(fuzz, "WAIT", 0.5)
    monkeypatch.setitem(KINDS, "act", Kind(lambda case: act(), 1))  # type: ignore[operator]
    _, faults = fuzz.run([0], 0, tmp_path, ["act"])
    assert [fault in f.what for f in faults] == ([True] if fault else []), faults


def test_a_message_is_one_line_and_has_an_end() -> None:
    """Whatever a user's words are, they are not repeated by the page."""
    text = str(MezzotintError(f"the data set {'x' * 99_999} is unknown; known: digits"))
    assert len(text) < 2100
    assert text.startswith("the data set xxx")
    assert text.endswith("xxx is unknown; known: digits")
    assert str(MezzotintError("short")) == "short"
    assert str(MezzotintError("no file a\nb\r\nc")) == "no file a b c"


def test_a_case_comes_again(seeds: Path) -> None:
    """Number and seed are all that a case depends on."""
    content = bytes(range(256))
    assert len({damaged_bytes(random.Random(f"{seed}"), content) for seed in range(50)}) > 25
    assert damaged_bytes(random.Random("a"), content) == damaged_bytes(random.Random("a"), content)
    tree = {"a": [1, {"b": None}], "c": "d"}
    assert repr(damaged_tree(random.Random("a"), tree)) == repr(damaged_tree(random.Random("a"), tree))
    assert tree == {"a": [1, {"b": None}], "c": "d"}
    told = []
    for folder in ("x", "x"):
        case = Case(random.Random("3"), Path(folder), seeds)
        told.append(case.rng.random())
    assert told[0] == told[1]


def test_one_bit_is_another_result() -> None:
    tensors = {"x": torch.zeros(3), "y": torch.ones(2, dtype=torch.int64)}
    expect_same({name: tensor.clone() for name, tensor in tensors.items()}, tensors, "it")
    for other in ({"x": torch.tensor([0.0, -0.0, 0.0])}, {"x": torch.zeros(3, 1)}, {"y": torch.ones(2)}):
        with pytest.raises(Wrong):
            expect_same(tensors | other, tensors, "it")
    with pytest.raises(Wrong):
        expect_same({}, tensors, "it")
