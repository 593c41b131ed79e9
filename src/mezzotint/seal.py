"""What makes a run's recipe.yaml complete: a first line that promises a last one, and that one's digests of its parts.

A file that was cut has the first line without the last. One that was edited differs in a part, and the part is named:
what the weights mean, and how they were trained, is not to be changed behind their back. What may be edited in place
(`EDITABLE`) is in no digest. A recipe that somebody wrote by hand has neither line.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from mezzotint.errors import MezzotintError
from mezzotint.written import read_yaml

FIRST_LINE = "# A run's recipe, every field of it; the last line seals it (docs/checkpoints.md, 'Damage').\n"
LAST_LINE = re.compile(r"^# CRC-32 of its parts: ((?:\w+ [0-9a-f]{8}, )+)end$", re.MULTILINE)
#: what may be edited in place, by section; None: the whole of it
EDITABLE: dict[str, set[str] | None] = {
    "name": None,
    "description": None,
    "sampling": None,
    "guidance": None,
    "data": {"path", "workers", "max_unreadable"},
    "representation": {"path"},
    "condition": {"encoder"},
    "training": {"log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints"},
}


def sealed(text: str) -> str:
    """A recipe's YAML with the two lines."""
    parts = "".join(f"{section} {digest}, " for section, digest in _digests(read_yaml(text)).items())
    return f"{FIRST_LINE}{text}# CRC-32 of its parts: {parts}end\n"


def check_uncut(path: Path, text: str) -> None:
    """Raise `MezzotintError` where the recipe `text` of `path` has the first line and not the last."""
    if text.startswith(FIRST_LINE) and LAST_LINE.search(text) is None:
        raise MezzotintError(f"{path} is cut short: its last line is missing; copy it again from where it is whole")


def check_unchanged(path: Path, text: str, values: dict[str, Any], last: tuple[str, list[str]]) -> None:
    """Raise `MezzotintError` where the recipe.yaml beside a run's weights was edited, or cut before it had the lines.

    values: what `read_yaml` reads in `text`; last: the last section of a recipe and its keys, which a whole file has.
    """
    if not (path.parent / "state").is_dir() and not any(path.parent.glob("*.safetensors")):
        return
    seal = LAST_LINE.search(text)
    if seal is None:
        section, keys = last
        there = values.get(section)
        if not text.endswith("\n") or not isinstance(there, dict) or not all(key in there for key in keys):
            raise MezzotintError(
                f"{path} is cut short, or written by hand: a run's recipe has every field up to {section}.{keys[-1]}; "
                "copy it again from where it is whole, or give your own as RECIPE with --weights"
            )
        return
    written = dict(part.split() for part in seal[1].rstrip(", ").split(", "))
    found = _digests(values)
    if changed := [section for section in {**written, **found} if written.get(section) != found.get(section)]:
        raise MezzotintError(
            f"{path} is not what the run wrote: {', '.join(changed)} changed; undo that, since the weights go by what "
            "was written (sampling, guidance, description and paths may be edited there; for anything else give "
            "KEY=VALUE, or train a copy of the file into another folder)"
        )


def _digests(values: dict[str, Any]) -> dict[str, str]:
    """CRC-32 of every section as it is written, without what may be edited and in any order of its keys."""
    found = {}
    for section, value in values.items():
        editable = EDITABLE.get(section, set())
        if editable is None:
            continue
        if isinstance(value, dict):
            value = {key: part for key, part in value.items() if key not in editable}
        found[section] = f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
    return found
