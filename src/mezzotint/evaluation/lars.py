"""LARS, gradient descent whose steps are proportional to the weights' own size (You et al. 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum on gradients that are first scaled, for each tensor of two or more dimensions, by trust·‖w‖ / ‖g‖.

        g ← ∇ + weight_decay·w,   m ← momentum·m + (trust·‖w‖ / ‖g‖)·g,   w ← w − lr·m

    Biases have neither the factor nor the decay. Where a norm is zero the factor is 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; `closure` computes the loss and gradients anew, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    weight, gradient = w.norm(), g.norm()
                    factor = group["trust"] * weight / gradient
                    g = g * torch.where((weight > 0) & (gradient > 0), factor, torch.ones_like(factor))
                state = self.state[w]
                if "momentum" in state:
                    state["momentum"].mul_(group["momentum"]).add_(g)
                else:
                    state["momentum"] = g.clone()
                w.sub_(group["lr"] * state["momentum"])
        return loss
