"""Denoiser = backbone + interpolant + target: what objectives, guidance and samplers talk to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mezzotint.conditions import Condition
from mezzotint.errors import MezzotintError, shortened
from mezzotint.interpolants import Coefficients, Interpolant, Transition
from mezzotint.interpolants import interpolant as named_interpolant
from mezzotint.representations.image_space import ImageSpace
from mezzotint.targets import TARGETS, Target, convert, time_range


@dataclass(frozen=True)
class Prediction:
    """A network's output at x_t, which can be read as data, noise, velocity, score or v (all shaped like x_t).

    `variance` is the learned variance's interpolation value in [-1, 1] (DiT, section 3), or None; `left_out` what an
    image that the network gave has beside x's components, (B, D − d, h, w), or None (see `ImageSpace`).
    """

    x_t: Tensor
    output: Tensor
    target: Target
    coefficients: Coefficients
    variance: Tensor | None = None
    left_out: Tensor | None = None

    def to(self, target: Target) -> Tensor:
        """This prediction as `target`; not finite at a t outside `Model.time_range(target)`."""
        return convert(self.output, self.x_t, self.coefficients, self.target, target)

    @cached_property
    def data(self) -> Tensor:
        return self.to("data")

    @cached_property
    def noise(self) -> Tensor:
        return self.to("noise")

    @cached_property
    def velocity(self) -> Tensor:
        return self.to("velocity")

    @cached_property
    def score(self) -> Tensor:
        return self.to("score")

    @cached_property
    def v(self) -> Tensor:
        return self.to("v")

    def log_variance(self, step: Transition, floor: Tensor | None = None) -> Tensor:
        """The learned log variance of a step: log lower at `variance` −1, log upper at 1 (Nichol and Dhariwal, eq. 15).

        `floor` replaces a lower bound of zero, which has no logarithm (the step that ends at t = 0).
        """
        if self.variance is None:
            raise ValueError("this model has no learned variance")
        lower = step.lower if floor is None else torch.where(step.lower > 0, step.lower, floor)
        low, high = lower.log(), step.upper.log()
        return low + (high - low) * (self.variance + 1) / 2


class Model(Protocol):
    """What a sampler asks of a model: a prediction at (x, t), its interpolant, and where its conversions are finite."""

    @property
    def interpolant(self) -> Interpolant: ...

    @property
    def learned_variance(self) -> bool: ...

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction: ...

    def time_range(self, *to: Target, eps: float = 1e-3) -> tuple[float, float]: ...


class Denoiser(nn.Module):
    """A backbone, and what its input time and its output mean.

    The backbone is any module that is called as backbone(x, network_time, y): x (B, C, H, W), network_time (B,), y as
    given, None without a condition; it gives a tensor like x. Its output may have twice the input's channels for images
    and clips: the second half is the learned variance if `learned_variance`, and dropped otherwise (as SiT does with
    DiT's doubled output).

    in_shape, of one example, and num_classes are the backbone's own attributes where not given here; with classes the
    backbone has to know label `num_classes`, the null class. What else the library's backbones have (layers with names,
    conditions made ahead of x) is not needed to train and sample.

    network_time = scale·t + offset, with (scale, offset) = `time_input`: (1000, −1) is DiT's step index for a
    1,000-step schedule, (−1, 1) is SiT's reversed time.

    With a `space` the network is given images, gives images, or both, while x stays what it is.
    """

    def __init__(
        self,
        backbone: nn.Module,
        interpolant: Interpolant | str,
        target: Target = "velocity",
        *,
        learned_variance: bool = False,
        time_input: tuple[float, float] = (1000.0, 0.0),
        space: ImageSpace | None = None,
        in_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        """interpolant: one, or the name of one of `mezzotint.interpolants.INTERPOLANTS`.

        Raises `MezzotintError` for an unknown interpolant or target, and for what is no module.
        """
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise MezzotintError(f"a Denoiser's backbone is a torch.nn.Module, not a {type(backbone).__name__}")
        if isinstance(interpolant, str):
            interpolant = named_interpolant(interpolant)
        if not isinstance(interpolant, Interpolant):
            raise MezzotintError(
                f"a Denoiser's interpolant is a mezzotint.Interpolant or the name of one, not {shortened(interpolant)}"
            )
        if target not in TARGETS:
            raise MezzotintError(f"target {target!r} is unknown; known: {', '.join(TARGETS)}")
        if learned_variance and interpolant.num_steps is None:
            raise MezzotintError(
                "a learned variance needs an interpolant with steps (ddpm, cosine): its bounds are those of one step"
            )
        self.backbone = backbone
        self.interpolant = interpolant
        self.target: Target = target
        self.learned_variance = learned_variance
        self.time_input = time_input
        self.space = space
        self._in_shape = None if in_shape is None else tuple(in_shape)
        self._num_classes = num_classes

    def __repr__(self) -> str:
        return (
            f"Denoiser({self.backbone._get_name()} of {parameter_count(self.backbone):,} parameters, "
            f"{type(self.interpolant).__name__} interpolant, target {self.target})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes; label `num_classes` is the null class. 0: unconditional, or none of whom that is known."""
        own = getattr(self.backbone, "num_classes", None) if self._num_classes is None else self._num_classes
        return int(own or 0)

    @property
    def text(self) -> bool:
        """Whether the condition is captions."""
        return getattr(self.backbone, "text_features", None) is not None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Of one example: (C, H, W), (F, C, H, W) of a clip, or (N,) of a packed pyramid.

        Raises `MezzotintError` where neither the backbone nor the caller has said it.
        """
        if self._in_shape is not None:
            return self._in_shape
        return in_shape(self.backbone) if self.space is None else self.space.shape

    @property
    def level_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one example's levels, smallest first; of what is no pyramid: `in_shape` alone."""
        own = getattr(self.backbone, "level_shapes", None)
        return (self.in_shape,) if own is None else cast("tuple[tuple[int, ...], ...]", own)

    def time_range(self, *to: Target, eps: float = 1e-3) -> tuple[float, float]:
        """The range of t on which the prediction converts to all of `to`; eps is the margin at a singular end."""
        return time_range(self.interpolant, self.target, to or (self.target,), eps)

    @property
    def has_conditions(self) -> bool:
        """Whether what the backbone makes of t and y can be computed apart from x (see `DiT.condition`)."""
        return callable(getattr(type(self.backbone), "condition", None))  # a sub-module of that name is no such method

    def conditions(self, times: Sequence[float], y: Condition) -> list[Tensor]:
        """What the backbone makes of each time with each of K labels or captions.

        A list of tensors (len(times), K, …); the row of a time, spread over the examples, is `forward`'s condition.
        Raises `MezzotintError` where `has_conditions` is false.
        """
        if not self.has_conditions:
            raise MezzotintError(
                f"the network {self.backbone._get_name()} has no method condition(t, y), so nothing can be made of "
                "times and labels before x is known; call the denoiser without a condition"
            )
        scale, offset = self.time_input
        backbone = cast(Any, self.backbone)
        device = next(backbone.parameters()).device
        t = torch.tensor([scale * t + offset for t in times], dtype=torch.float32, device=device)
        each = torch.arange(len(y), device=device).repeat(len(times))
        layers = backbone.condition(t.repeat_interleave(len(y)), y[each])
        return [layer.unflatten(0, (len(times), len(y))) for layer in layers]

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        y: Condition | None = None,
        *,
        condition: Sequence[Tensor] | None = None,
    ) -> Prediction:
        """x (B, *in_shape), of a pyramid its first levels or all; t in [0, 1], one number for the batch or (B,).

        y: labels (B,) int64, None for the null class; or captions, or what the backbone's `embed_condition` made of
        them.

        `condition` is what `conditions` gave for t and y, one row an example; these are then not looked at again.
        """
        batch = x.shape[0]
        scale, offset = self.time_input
        if isinstance(t, Tensor):
            if t.ndim and len(t) != batch:
                raise MezzotintError(f"x has {batch} examples and t {len(t)} times; give one for each, or a number")
            network_time = (scale * t + offset).expand(batch)
        else:
            network_time = torch.full((batch,), scale * t + offset, dtype=x.dtype, device=x.device)
        if self.num_classes and y is None:
            y = torch.full((batch,), self.num_classes, device=x.device)
        shared = {} if condition is None else {"condition": condition}
        seen = x if self.space is None else self.space.to_network(x)
        output = self.backbone(seen, network_time, y, **shared)
        if not isinstance(output, Tensor):
            raise MezzotintError(
                f"the network {self.backbone._get_name()} gave a {type(output).__name__}, expected a tensor like x; "
                "wrap it in a module whose forward(x, t, y) returns one"
            )
        output = output.to(x.dtype)
        variance = left_out = None
        if self.space is not None:
            output, left_out = self.space.from_network(output)
        if x.ndim > 3 and output.shape[-3] == 2 * x.shape[-3]:
            output, second_half = output.chunk(2, dim=-3)
            variance = second_half if self.learned_variance else None
        if output.shape != x.shape:  # it would be broadcast, and mean nothing
            raise MezzotintError(
                f"the network {self.backbone._get_name()} gave a tensor of shape {tuple(output.shape)} for x of shape "
                f"{tuple(x.shape)}; expected x's shape, or that with twice the channels"
            )
        return Prediction(x, output, self.target, self.interpolant.coefficients(t, x), variance, left_out)


def in_shape(backbone: nn.Module) -> tuple[int, ...]:
    """The shape of one example of a backbone's input: (C, H, W), (F, C, H, W) of a clip, (N,) of a packed pyramid."""
    shape = getattr(backbone, "in_shape", None)
    if shape is None:
        if not hasattr(backbone, "in_channels") or not hasattr(backbone, "input_size"):
            raise MezzotintError(
                f"the network {backbone._get_name()} does not tell the shape of one example; give it to Denoiser as "
                "in_shape=(channels, height, width), or the network an attribute of that name"
            )
        shape = (backbone.in_channels, *cast("tuple[int, int]", backbone.input_size))
    return cast("tuple[int, ...]", shape)


def parameter_count(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
