"""Exponential moving averages of a module's weights, several decays at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    """Copies of a module whose parameters follow it, one copy per decay.

    Each starts as the module itself (as in DiT, not at zero). With `warmup` a decay is capped at
    (1 + step) / (10 + step), so that a short run forgets its initial weights.
    """

    def __init__(self, module: Module, decays: Sequence[float], *, warmup: bool = False) -> None:
        self.decays = tuple(decays)
        self.warmup = warmup
        self.modules: list[Module] = [copy.deepcopy(module).requires_grad_(False).eval() for _ in decays]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move every copy towards `module` after `step` optimizer steps (1, 2, ...)."""
        source = [parameter.detach() for parameter in module.parameters()]
        for decay, average in zip(self.decays, self.modules, strict=True):
            if self.warmup:
                decay = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), source, 1 - decay)
