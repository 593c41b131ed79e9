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

    Each starts as the module itself (as in DiT, not at zero), and shares the parameters that are frozen in it. With
    `warmup` a decay is capped at (1 + step) / (10 + step), so that a short run forgets its initial weights.
    """

    def __init__(self, module: Module, decays: Sequence[float], *, warmup: bool = False) -> None:
        self.decays = tuple(decays)
        self.warmup = warmup
        frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
        self.modules: list[Module] = [copy.deepcopy(module, {**frozen}).requires_grad_(False).eval() for _ in decays]
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        #: per decay, the averages by their parameters' names
        self.averages = [{name: copied.get_parameter(name).detach() for name in trained} for copied in self.modules]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move every copy towards `module` after `step` optimizer steps (1, 2, ...)."""
        source = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
        for decay, average in zip(self.decays, self.averages, strict=True):
            if self.warmup:
                decay = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), source, 1 - decay)
