"""Exponential moving averages of a module's weights, several decays at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

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

    def saved_under(self, decays: Sequence[float]) -> dict[str, dict[str, Tensor]]:
        """The averages that go on from saved ones, by the numbers that these have among the `decays` of then.

        An average goes on under its own decay; one whose decay is new goes on from the one whose place it takes.
        """
        saved = {}
        for number, (decay, average) in enumerate(zip(self.decays, self.averages, strict=True)):
            if decay in decays:
                saved[str(decays.index(decay))] = average
            elif number < len(decays) and decays[number] not in self.decays:
                saved[str(number)] = average
        return saved

    @torch.no_grad()
    def start_others(self, module: nn.Module, saved: Mapping[str, dict[str, Tensor]]) -> None:
        """Have the averages that are not among `saved`, and take no other's place, start as `module` is now."""
        weights = dict(module.named_parameters())
        going_on = {id(average) for average in saved.values()}
        for average in self.averages:
            if id(average) not in going_on:
                for name, tensor in average.items():
                    tensor.copy_(weights[name])

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move every copy towards `module` after `step` optimizer steps (1, 2, ...)."""
        source = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
        for decay, average in zip(self.decays, self.averages, strict=True):
            if self.warmup:
                decay = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), source, 1 - decay)
