"""Where samplers get their random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.randomness import generator_for

#: One generator for the batch, or one for each example (then an example does not depend on its batch).
Generators = torch.Generator | Sequence[torch.Generator]


def randn(
    shape: Sequence[int],
    generators: Generators,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers of this shape, drawn on each generator's own device and moved to `device`."""
    if isinstance(generators, torch.Generator):
        return torch.randn(tuple(shape), generator=generators, dtype=dtype, device=generators.device).to(device)
    rows = [torch.randn(tuple(shape[1:]), generator=g, dtype=dtype, device=g.device) for g in generators]
    return torch.stack(rows).to(device)


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Standard normal numbers shaped like x, on its device and in its dtype."""
    return randn(x.shape, generators, dtype=x.dtype, device=x.device)


def example_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per example, seeded by (seed, index): example i is the same in whatever batch it is drawn."""
    return [generator_for(seed, index) for index in indices]
