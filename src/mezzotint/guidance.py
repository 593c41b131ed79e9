"""Guidance: rules that combine conditional and unconditional predictions of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mezzotint.conditions import Condition, Text
from mezzotint.conditions.text import join
from mezzotint.denoiser import Denoiser, Prediction
from mezzotint.errors import MezzotintError, expect
from mezzotint.interpolants import Interpolant
from mezzotint.settings import Settings
from mezzotint.targets import Target

#: conditions (a time with a class) that are computed and kept at once; 64 of DiT-XL's take 50 MB in float32
CONDITIONS_AHEAD = 64
LABELS = "labels, a tensor (B,) of int64"


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

    def __init__(
        self,
        denoiser: Denoiser,
        y: Condition | None = None,
        guidance: float | Guidance | None = None,
        null: Text | None = None,
    ) -> None:
        """y: labels (B,) int64 in [0, num_classes], None for the null class; or B captions; None if unconditional.

        guidance: a scale, or a `Guidance`; None: none.

        null: where y is captions, what the unconditional branch is given: one caption, the empty one as a rule.
        """
        expect(denoiser, Denoiser, "a Denoiser, such as pipeline.denoiser")
        if not isinstance(guidance, Guidance):
            guidance = Guidance() if guidance is None else Guidance(scale=guidance)
        if not (y is None or isinstance(y, Text)) and expect(y, Tensor, LABELS).dtype != torch.int64:
            raise MezzotintError(f"expected {LABELS}, not one of {y.dtype}")
        num_classes = denoiser.num_classes
        if guidance.scale != 1 and not (num_classes or denoiser.text):
            raise MezzotintError(
                f"guidance.scale {guidance.scale} needs a conditional model; this one has no classes (use scale 1)"
            )
        if isinstance(y, Tensor) and num_classes and ((y < 0) | (y > num_classes)).any():
            raise MezzotintError(f"class labels must lie in 0..{num_classes - 1}, or {num_classes} for the null class")
        if guidance.channels is not None:
            if len(denoiser.in_shape) != 3:
                raise MezzotintError("guidance.channels means nothing for a pyramid or a clip; leave it out")
            if guidance.channels > denoiser.in_shape[0]:
                raise MezzotintError(
                    f"guidance.channels is {guidance.channels}, but the model has {denoiser.in_shape[0]} channel(s)"
                )
        self.denoiser = denoiser
        self.guidance = guidance
        #: the conditions that there are, and for each example of both branches, (2·B,), which one is its own
        self._known: Condition | None = None
        self._rows = torch.empty(0, dtype=torch.int64)
        if isinstance(y, Text):
            assert null is not None, "captions need the null caption"
            self._known = join(y, null)
            order = torch.arange(len(y), device=y.mask.device)
            self._rows = torch.cat([order, torch.full_like(order, len(y))])
        elif y is not None and num_classes:
            self._known, self._rows = torch.unique(torch.cat([y, torch.full_like(y, num_classes)]), return_inverse=True)
        self._embedded: Any = None
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
        if self._known is not None and self.denoiser.has_conditions:
            self._times = list(times)

    def _condition(self, t: float | Tensor, rows: slice) -> list[Tensor] | None:
        """The backbone's condition at t for these rows of both branches; None where t was not announced."""
        if self._known is None or isinstance(t, Tensor) or t not in self._times:
            return None
        if t not in self._conditions:
            count = max(1, CONDITIONS_AHEAD // len(self._known))
            ahead = self._times[self._times.index(t) :][:count]
            layers = self.denoiser.conditions(ahead, self._known)
            self._conditions = {time: [layer[i] for layer in layers] for i, time in enumerate(ahead)}
        return [layer[self._rows[rows]] for layer in self._conditions[t]]

    def _given(self, rows: slice) -> Any:
        """Labels or captions of these rows of both branches; what the backbone makes of them, if it does so once."""
        if self._known is None:
            return None
        embed = getattr(self.denoiser.backbone, "embed_condition", None)
        if embed is None:
            return self._known[self._rows[rows]]
        if self._embedded is None:
            with torch.no_grad():
                self._embedded = embed(self._known)
        values = (None if value is None else value[self._rows[rows]] for value in self._embedded)
        return type(self._embedded)(*values)

    def _ask(self, x: Tensor, t: float | Tensor, rows: slice) -> Prediction:
        condition = self._condition(t, rows)
        return self.denoiser(x, t, None if condition is not None else self._given(rows), condition=condition)

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The guided prediction at x (B, C, H, W) and one t for the whole batch."""
        if self._known is not None and 2 * len(x) != len(self._rows):
            raise MezzotintError(
                f"x has {len(x)} examples, and the model was given conditions of {len(self._rows) // 2}"
            )
        scale, (low, high) = self.guidance.scale, self.guidance.interval
        # A tensor t is one time repeated; adaptive solvers alone pass one, and only a strict interval reads its value.
        everywhere = (low, high) == (0.0, 1.0)
        inside = everywhere or low <= (t.flatten()[0].item() if isinstance(t, Tensor) else t) <= high
        batch = len(x)
        if scale == 1 or self._known is None or not inside:
            return self._ask(x, t, slice(batch))
        if scale == 0 and self.guidance.channels is None:
            return self._ask(x, t, slice(batch, None))
        twice = t.repeat(2) if isinstance(t, Tensor) and t.ndim else t
        pair = self._ask(torch.cat([x, x]), twice, slice(None))
        conditional, unconditional = pair.output.chunk(2)
        output = torch.lerp(unconditional, conditional, scale)
        if self.guidance.channels is not None:
            k = self.guidance.channels
            output = torch.cat([output[:, :k], conditional[:, k:]], dim=1)
        variance = None if pair.variance is None else pair.variance.chunk(2)[0]
        return Prediction(x, output, pair.target, self.interpolant.coefficients(t, x), variance)
