"""The list of deliberate faults is of the code as it is; ``make faults`` applies them."""

from __future__ import annotations

import ast
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from faults import EQUIVALENT, FAULTS, Fault

SOURCE = Path(__file__).parents[2] / "src" / "mezzotint"


def test_every_fault_is_of_the_code_as_it_is() -> None:
    assert len(FAULTS) >= 150
    assert {fault.title for fault in FAULTS if fault.equivalent} == set(EQUIVALENT)
    assert max(Counter(fault.title for fault in FAULTS).values()) == 1
    for file, faults in groupby(sorted(FAULTS, key=lambda fault: fault.file), key=lambda fault: fault.file):
        text = (SOURCE / file).read_text(encoding="utf-8")
        together = text
        for fault in faults:
            assert fault.applied(text) != text, fault.title
            if together.count(fault.old) != 1:  # an earlier one has changed the same line
                ast.parse(together, file)
                together = text
            together = fault.applied(together)
        ast.parse(together, file)


def test_a_fault_of_another_text_is_refused() -> None:
    fault = Fault("the seed is dropped", "randomness.py", "seed", "0", ())
    for text, times in (("generator", 0), ("seed, seed", 2)):
        with pytest.raises(ValueError, match=f"there {times} times"):
            fault.applied(text)
    assert fault.applied("mix(seed)") == "mix(0)"
