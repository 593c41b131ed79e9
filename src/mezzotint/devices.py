"""Whether a device that was named is there."""

from __future__ import annotations

import torch

from mezzotint.errors import MezzotintError


def check_device(device: torch.device | str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this name; auto is a GPU where there is one, else the CPU; cuda alone is GPU `local_rank`.

    Raises `MezzotintError` where it is not there.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        raise MezzotintError(
            f"device {name!r} is not available here; use cpu, or auto to take a GPU if there is one"
        ) from None
    return found
