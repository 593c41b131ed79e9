"""Grids of sampling times, from noise to data."""

from __future__ import annotations

import math
from itertools import accumulate, repeat
from typing import Literal

import torch

from mezzotint.errors import MezzotintError
from mezzotint.interpolants import Interpolant, time_of_log_snr

Spacing = Literal["uniform", "quadratic", "log-snr", "ddim"]
SPACINGS: tuple[Spacing, ...] = ("uniform", "quadratic", "log-snr", "ddim")


def time_grid(interpolant: Interpolant, steps: int, t_min: float, t_max: float, spacing: Spacing) -> list[float]:
    """`steps` + 1 decreasing times from t_max to t_min: equally spaced in t, in √t (quadratic) or in log SNR."""
    if steps < 1:
        raise MezzotintError(f"sampling.steps must be at least 1, got {steps}")
    fraction = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    match spacing:
        case "uniform":
            times = t_max + (t_min - t_max) * fraction
        case "quadratic":
            times = (math.sqrt(t_max) + (math.sqrt(t_min) - math.sqrt(t_max)) * fraction) ** 2
        case "log-snr":
            # An end with an infinite log SNR is approached to 1e-3 and then stepped to.
            low, high = (max(t_min, 1e-3), min(t_max, 1 - 1e-3)) if steps > 1 else (t_min, t_max)
            ends = interpolant.log_snr(torch.tensor([high, low], dtype=torch.float64))
            times = time_of_log_snr(interpolant, torch.lerp(ends[0], ends[1], fraction), low, high)
        case "ddim":
            raise MezzotintError("sampling.spacing 'ddim' is for ddpm and ddim on an interpolant with steps")
    times[0], times[-1] = t_max, t_min
    return times.tolist()


def respaced_times(num_steps: int, steps: int, spacing: Spacing = "uniform") -> list[float]:
    """`steps` of the times (i + 1) / num_steps of a discrete schedule, decreasing, then 0: `steps` + 1 numbers.

    uniform: both ends kept and the rest rounded to even spacing (improved DDPM's "250"); ddim: every n-th step from the
    first one, n the stride that gives this count (improved DDPM's "ddim50").
    """
    if not 1 <= steps <= num_steps:
        raise MezzotintError(f"sampling.steps must be 1 to {num_steps} (the schedule's own number), got {steps}")
    match spacing:
        case "uniform":
            stride = (num_steps - 1) / (steps - 1) if steps > 1 else 1.0
            # The stride is summed and rounded half to even, as in the official code: k·stride rounds differently at
            # some counts. One step alone must start from pure noise (the official "1" keeps step 0).
            kept = [round(k) for k in accumulate(repeat(stride, steps - 1), initial=0.0)]
            kept = kept if steps > 1 else [num_steps - 1]
        case "ddim":
            strides = [n for n in range(1, num_steps) if len(range(0, num_steps, n)) == steps]
            if not strides:
                raise MezzotintError(
                    f"sampling.spacing 'ddim' cannot make exactly {steps} steps of {num_steps} with a whole stride; "
                    "use spacing 'uniform' or another number of steps"
                )
            kept = list(range(0, num_steps, strides[0]))
        case _:
            raise MezzotintError(
                f"sampling.spacing {spacing!r} is not for a discrete schedule; use 'uniform' or 'ddim'"
            )
    return [(i + 1) / num_steps for i in reversed(kept)] + [0.0]
