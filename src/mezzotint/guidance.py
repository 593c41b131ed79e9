"""Guidance: rules that combine conditional and unconditional predictions of one model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mezzotint.denoiser import Denoiser, Prediction
from mezzotint.errors import MezzotintError
from mezzotint.interpolants import Interpolant
from mezzotint.settings import Settings
from mezzotint.targets import Target

#: conditions (a time with a class) that are computed and kept at once; 64 of DiT-XL's take 50 MB in float32
CONDITIONS_AHEAD = 64


class Guidance(Settings):
    """Classifier-free guidance: unconditional + scale·(conditional − unconditional) (Ho and Salimans 2022).

    Because every target is affine in every other with factors that depend on t alone, guiding any of them is the same.
    """

    scale: float = Field(1.0, ge=0)
    """1 is the conditional model, 0 the unconditional one."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times (0 is data, 1 is noise) at which guidance acts; outside it the conditional model runs alone."""
    channels: int | None = Field(None, ge=1)
    """Guide only the first so many channels, the rest staying conditional (DiT's evaluation: 3 of 4). None: all."""

    @field_validator("interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance.interval must be two times with 0 <= low <= high <= 1 (0 is data), got [{low}, {high}]"
            )
        return interval


class ConditionalModel:
    """A denoiser with labels and guidance bound to it: the `Model` that samplers see."""

    def __init__(self, denoiser: Denoiser, y: Tensor | None = None, guidance: Guidance | None = None) -> None:
        """y (B,) int64 in [0, num_classes]; None for an unconditional denoiser, or for the null class."""
        guidance = guidance or Guidance()
        if guidance.scale != 1 and not denoiser.num_classes:
            raise MezzotintError(
                f"guidance.scale {guidance.scale} needs a conditional model; this one has no classes (use scale 1)"
            )
        if y is not None and denoiser.num_classes and ((y < 0) | (y > denoiser.num_classes)).any():
            raise MezzotintError(
                f"class labels must lie in 0..{denoiser.num_classes - 1}, or {denoiser.num_classes} for the null class"
            )
        channels = denoiser.in_shape[0]
        if guidance.channels is not None and guidance.channels > channels:
            raise MezzotintError(f"guidance.channels is {guidance.channels}, but the model has {channels} channel(s)")
        self.denoiser = denoiser
        self.guidance = guidance
        self.y = y if denoiser.num_classes else None
        self.both = None if self.y is None else torch.cat([self.y, torch.full_like(self.y, denoiser.num_classes)])
        self._times: list[float] = []  # those that `expect` announced, and what is known of some of them
        self._conditions: dict[float, list[Tensor]] = {}

    @property
    def interpolant(self) -> Interpolant:
        return self.denoiser.interpolant

    @property
    def learned_variance(self) -> bool:
        return self.denoiser.learned_variance

    def time_range(self, *to: Target, eps: float = 1e-3) -> tuple[float, float]:
        return self.denoiser.time_range(*to, eps=eps)

    def expect(self, times: Sequence[float]) -> None:
        """Announce the times of the calls to come, so that what depends on time and class alone is made ahead.

        The layers that make it, a third of DiT's weights, are then read once for a block of times instead of at every
        one, and work once for a class instead of once for an example.
        """
        if self.both is not None and self.denoiser.has_conditions:
            self._classes, self._rows = torch.unique(self.both, return_inverse=True)
            self._times = list(times)

    def _condition(self, t: float | Tensor, rows: slice) -> list[Tensor] | None:
        """The backbone's condition at t for these rows of `both`; None where t was not announced."""
        if isinstance(t, Tensor) or t not in self._times:
            return None
        if t not in self._conditions:
            count = max(1, CONDITIONS_AHEAD // len(self._classes))
            ahead = self._times[self._times.index(t) :][:count]
            layers = self.denoiser.conditions(ahead, self._classes)
            self._conditions = {time: [layer[i] for layer in layers] for i, time in enumerate(ahead)}
        return [layer[self._rows[rows]] for layer in self._conditions[t]]

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The guided prediction at x (B, C, H, W) and one t for the whole batch."""
        scale, (low, high) = self.guidance.scale, self.guidance.interval
        # A tensor t is one time repeated; adaptive solvers alone pass one, and only a strict interval reads its value.
        everywhere = (low, high) == (0.0, 1.0)
        inside = everywhere or low <= (t.flatten()[0].item() if isinstance(t, Tensor) else t) <= high
        batch = len(x)
        if scale == 1 or self.both is None or not inside:
            return self.denoiser(x, t, self.y, condition=self._condition(t, slice(batch)))
        if scale == 0 and self.guidance.channels is None:
            return self.denoiser(x, t, None, condition=self._condition(t, slice(batch, None)))
        twice = t.repeat(2) if isinstance(t, Tensor) and t.ndim else t
        pair = self.denoiser(torch.cat([x, x]), twice, self.both, condition=self._condition(t, slice(None)))
        conditional, unconditional = pair.output.chunk(2)
        output = torch.lerp(unconditional, conditional, scale)
        if self.guidance.channels is not None:
            k = self.guidance.channels
            output = torch.cat([output[:, :k], conditional[:, k:]], dim=1)
        variance = None if pair.variance is None else pair.variance.chunk(2)[0]
        return Prediction(x, output, pair.target, self.interpolant.coefficients(t, x), variance)
