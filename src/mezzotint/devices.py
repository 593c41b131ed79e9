"""Whether a device that was named is there."""

from __future__ import annotations

import torch

from mezzotint.errors import MezzotintError


def check_device(device: torch.device | str = "auto", local_rank: int | None = None) -> torch.device:
    """The device of this name; auto is a GPU where there is one, else the CPU; cuda alone is GPU `local_rank`.

    local_rank: None is torch's current GPU, the first unless `torch.cuda.set_device` was given another. Raises
    `MezzotintError` where the device is not there.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        named = torch.device(name if name != "cuda" or local_rank is None else f"cuda:{local_rank}")
        return torch.empty(0, device=named).device
    except (RuntimeError, AssertionError):
        raise MezzotintError(
            f"device {name!r} is not available here; use cpu, or auto to take a GPU if there is one"
        ) from None
