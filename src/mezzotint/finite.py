"""NaN and infinity, noticed where numbers come in or go out: weights, training states, images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError


def nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of `tensors` that holds NaN or an infinity; None where all are finite.

    Each is read once, where it is, and each device is waited for once. Integers and meta tensors are finite.
    """
    finite: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if values.is_floating_point() and values.numel() and not values.is_meta:
            values = values.detach().float() if values.dtype.itemsize == 1 else values.detach()
            low, high = values.aminmax()  # either is NaN where anything is
            finite.setdefault(values.device, {})[name] = low.isfinite() & high.isfinite()
    bad = {
        name
        for flags in finite.values()
        for name, fine in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True)
        if not fine
    }
    return next((name for name in tensors if name in bad), None)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises `MezzotintError` with the name of the first tensor of `source` that holds NaN or an infinity."""
    if (name := nonfinite(tensors)) is not None:
        raise MezzotintError(
            f"{name} of {source} holds NaN or infinite numbers; take an earlier checkpoint, or make it anew"
        )
