"""Nested networks: several resolutions of one image denoised together (arXiv 2310.15111, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from mezzotint.backbones.layers import TIME_FREQUENCIES, Layer, fold_frames, unfold_frames
from mezzotint.backbones.unet import ConditionEmbedding, EmbeddedCondition, Trunk, UNet, zero_
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError


def pack(levels: Iterable[Tensor]) -> Tensor:
    """Levels of a pyramid, each (B, …), the smallest first → (B, N)."""
    return torch.cat([level.flatten(1) for level in levels], dim=1)


def unpack(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Undoes `pack`: the levels in x (B, N), views of it. `shapes`, without the batch, may go on after them.

    Raises MezzotintError where x does not end with a level.
    """
    sizes = [prod(shape) for shape in shapes]
    totals = list(accumulate(sizes))
    if x.ndim != 2 or x.shape[1] not in totals:
        expected = " or ".join(f"(B, {total})" for total in totals)
        raise MezzotintError(
            f"input has shape {tuple(x.shape)}, expected {expected}: the flattened levels of a pyramid, the smallest "
            "first"
        )
    count = totals.index(x.shape[1]) + 1
    parts = x.split(sizes[:count], dim=1)
    return [part.unflatten(1, tuple(shape)) for part, shape in zip(parts, shapes[:count], strict=True)]


class NestedUNet(Trunk):
    """One more, larger level around `inner`: a UNet whose middle is the whole inner network.

    A state is a packed pyramid (B, N): see `pack`. Given fewer levels, only their networks run.

    inner: any backbone with `feature_channels`, `feature_stride` (pixels for a feature) and
    `forward_features(x, t, y, features)`, another NestedUNet, too; features are (B, [F,] feature_channels, h, w). At
    first it gives what it gives alone: both adapters start at zero.
    input_size: of the new level, inner's times 2^(levels − 1); None for that. frames: of the new level, a multiple of
    inner's (None: as many); inner is given the mean of each group of frames, and its features are repeated.
    tubelet_size: as in UNet; above 1, an inner feature is one of as long a time.
    time_frequencies: None for the inner network's, or 128 where it is no UNet.
    normalise_input: the level's input is divided by its standard deviation, as in the middle one of the published
    1024 network.

    A UNet inside shares what it makes of labels and captions with all around it, so `time_width` must be its own. Any
    other backbone keeps that to itself; then the new level has its own embedding of the labels or captions,
    `text_width` wide and `masked_text` as in UNet. The other arguments are UNet's.

    Raises MezzotintError for sizes, frames or time widths that do not nest, for an inner network whose output has other
    channels than its input, and as UNet.
    """

    def __init__(
        self,
        inner: nn.Module,
        *,
        channels: Sequence[int],
        resblocks: Sequence[int],
        attention: Sequence[int] = (),
        feed_forward: bool = False,
        heads: int = 8,
        input_size: int | tuple[int, int] | None = None,
        time_width: int | None = None,
        time_frequencies: int | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        text_width: int | None = None,
        masked_text: bool = True,
        micro_scale: float | None = None,
        normalise_input: bool = False,
        frames: int | None = None,
        temporal_attention: Sequence[int] | bool = False,
        tubelet_size: int = 1,
    ) -> None:
        network = cast(Any, inner)
        shared = isinstance(inner, UNet | NestedUNet)
        num_classes, text_features = network.num_classes, getattr(inner, "text_features", None)
        inner_frames, inner_tubelet = getattr(inner, "frames", 0), getattr(inner, "tubelet_size", 1)
        frames = inner_frames if frames is None else frames
        if network.out_channels != network.in_channels:
            raise MezzotintError(
                f"the inner network has {network.in_channels} channels in and {network.out_channels} out, where a "
                "pyramid of as many is predicted; use as many out as in"
            )
        if frames != inner_frames and (not inner_frames or frames % inner_frames):
            raise MezzotintError(
                f"{frames} frames do not nest around {inner_frames}; use a multiple, or build both with frames"
            )
        if time_width and shared and time_width != network.time_width:
            raise MezzotintError(
                f"time_width {time_width} is not the inner network's {network.time_width}, whose embedding of labels "
                "or captions is added to it; leave it out"
            )
        if tubelet_size > 1 and frames * inner_tubelet != inner_frames * tubelet_size:
            raise MezzotintError(
                f"{frames} frames in tubelets of {tubelet_size} do not nest around {inner_frames} in tubelets of "
                f"{inner_tubelet}; make them as many tubelets, or leave the outer tubelet_size at 1"
            )
        embedder = None
        if shared:
            time_width, text_width = network.time_width, network.text_width
        else:
            time_width = time_width or 4 * channels[0]
            embedder = ConditionEmbedding(time_width, num_classes, text_features, text_width or time_width, masked_text)
            text_width = embedder.text_width
        super().__init__(
            input_size=_outer_size(network.input_size, len(channels), input_size),
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            channels=channels,
            resblocks=resblocks,
            attention=attention,
            feed_forward=feed_forward,
            heads=heads,
            time_width=time_width,
            time_frequencies=time_frequencies or int(getattr(inner, "time_frequencies", TIME_FREQUENCIES)),
            text_width=text_width,
            groups=groups,
            dropout=dropout,
            micro_scale=micro_scale,
            frames=frames,
            temporal_attention=temporal_attention,
            tubelet_size=tubelet_size,
        )
        self.num_classes = num_classes
        self.text_features = text_features
        self.normalise_input = normalise_input
        self.level_shapes = (*_level_shapes(inner), self.in_shape)
        self.in_shape = (sum(map(prod, self.level_shapes)),)
        """(N,), all levels."""
        self.inner_frames = inner_frames
        self.moments_each = frames // inner_frames if frames and tubelet_size == 1 else 1
        self.y_embedder = embedder
        self.inner_tubelet = inner_tubelet if tubelet_size > 1 else 1
        self.in_adapter, self.out_adapter = _adapters(
            channels[-1], self.inner_tubelet * network.feature_channels, network.feature_stride
        )
        self.inner = inner

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | EmbeddedCondition | None = None,
        *,
        scale: Tensor | None = None,
    ) -> Tensor:
        """(B, N) → (B, N); for a pyramid of the first k levels only, (B, N_k) → (B, N_k).

        `t`, `y`, `scale` and dtypes are UNet's. Raises MezzotintError for an `x` of another size, and as the networks.
        """
        levels = unpack(x, self.level_shapes)
        if len(levels) == len(self.level_shapes):
            return self.forward_features(x, t, y, scale=scale)[0]
        if isinstance(self.inner, NestedUNet):
            return self.inner(x, t, y, scale=scale)
        if self.y_embedder is not None and isinstance(y, EmbeddedCondition):
            y = y.y  # only UNets know the embedded one
        return self.inner(levels[0], t, y, **self._told(scale)).flatten(1)

    def forward_features(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | EmbeddedCondition | None = None,
        features: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, for a network around this one (see `UNet.forward_features`): of a whole pyramid."""
        levels = unpack(x, self.level_shapes)
        if len(levels) < len(self.level_shapes):
            raise MezzotintError(f"features need all {len(self.level_shapes)} levels, not {len(levels)}; give all")
        own = self.fold(levels[-1])
        if self.normalise_input:
            own = own / own.std((1, 2, 3), keepdim=True)
        condition = self.embed_condition(y)
        embedding = self.embed_time(t, condition, scale)
        skips = self.encode(own, None if features is None else self.fold(features), embedding, condition)
        low, inner_features = cast(Any, self.inner).forward_features(
            x[:, : -prod(self.level_shapes[-1])] if isinstance(self.inner, NestedUNet) else levels[0],
            t,
            condition if self.y_embedder is None else condition.y,
            self._to_inner(skips[-1]),
            **self._told(scale),
        )
        h = self.decode(skips[-1] + self._from_inner(inner_features), skips, embedding, condition)
        return pack([low, self.unfold(self.output(h))]), self.unfold(h)

    def embed_condition(self, y: Tensor | Text | EmbeddedCondition | None) -> EmbeddedCondition:
        """What the innermost UNet makes of `y`, or this level where that is none (see `UNet.embed_condition`)."""
        if isinstance(y, EmbeddedCondition):
            return y
        return cast(Any, self.inner).embed_condition(y) if self.y_embedder is None else self.y_embedder(y)

    @property
    def layers(self) -> dict[str, Layer]:
        """The steps of this level's way down, the inner network's layers as "inner.NAME", and those of the way up."""
        inner = {f"inner.{name}": layer for name, layer in cast(Any, self.inner).layers.items()}
        return self.down_layers | inner | self.up_layers

    def _told(self, scale: Tensor | None) -> dict[str, Tensor | None]:
        """Only UNets know of the scale of images."""
        return {"scale": scale} if self.y_embedder is None else {}

    def _to_inner(self, x: Tensor) -> Tensor:
        if self.moments_each > 1:
            x = x.unflatten(0, (-1, self.moments_each)).mean(1)
        x = self.in_adapter(x)
        return unfold_frames(x, self.inner_frames, self.inner_tubelet) if self.frames else x

    def _from_inner(self, features: Tensor) -> Tensor:
        x = self.out_adapter(fold_frames(features, self.inner_tubelet) if self.frames else features)
        return x.repeat_interleave(self.moments_each, dim=0) if self.moments_each > 1 else x


def nest(levels: Sequence[Mapping[str, Any]], **innermost: Any) -> UNet | NestedUNet:
    """A UNet and the levels around it, each by its keyword arguments; `innermost` replaces some of the first's.

    Raises MezzotintError as UNet and NestedUNet.
    """
    network: UNet | NestedUNet = UNet(**{**levels[0], **innermost})
    for level in levels[1:]:
        network = NestedUNet(network, **level)
    return network


def _level_shapes(inner: nn.Module) -> tuple[tuple[int, ...], ...]:
    if isinstance(inner, NestedUNet):
        return inner.level_shapes
    network = cast(Any, inner)
    return (getattr(inner, "in_shape", (network.in_channels, *network.input_size)),)


def _outer_size(inner: tuple[int, int], levels: int, given: int | tuple[int, int] | None) -> tuple[int, int]:
    """The size of a level around one of size `inner`. Raises MezzotintError where `given` is another."""
    factor = 2 ** (levels - 1)
    size = inner[0] * factor, inner[1] * factor
    given = (given, given) if isinstance(given, int) else given
    if given is not None and tuple(given) != size:
        raise MezzotintError(
            f"{given[0]}×{given[1]} does not nest around {inner[0]}×{inner[1]}: {levels} levels of channels make it "
            f"{factor} times as large; use {size[0]}×{size[1]} or another number of levels"
        )
    return size


def _adapters(outer: int, inner: int, stride: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """Convolutions from outer to inner features and back, zero at first.

    Where an inner feature stands for a patch of pixels, each patch is projected as a whole, as the inner network does.
    """
    if tuple(stride) == (1, 1):
        return zero_(nn.Conv2d(outer, inner, 3, padding=1)), zero_(nn.Conv2d(inner, outer, 3, padding=1))
    return (
        zero_(nn.Conv2d(outer, inner, stride, stride=stride)),
        zero_(nn.ConvTranspose2d(inner, outer, stride, stride=stride)),
    )


class LevelConfig(TypedDict, total=False):
    """One level of a published network, as keyword arguments of UNet (the innermost) or NestedUNet."""

    input_size: int
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    resblocks: tuple[int, ...]
    attention: tuple[int, ...]
    feed_forward: bool
    middle: bool
    time_width: int
    time_frequencies: int
    text_features: int
    text_width: int
    masked_text: bool
    micro_scale: float
    normalise_input: bool


_MDM_64: LevelConfig = {
    "input_size": 64,
    "channels": (256, 512, 768),
    "resblocks": (2, 2, 2),
    "attention": (0, 1, 5),
    "feed_forward": True,
    "text_features": 2048,
    "text_width": 2048,
    "masked_text": False,
    "micro_scale": 64.0,
}
_MDM_256: LevelConfig = {"channels": (64, 128, 256), "resblocks": (2, 2, 1), "micro_scale": 256.0}
_MDM_1024: LevelConfig = {"channels": (32, 32, 64), "resblocks": (2, 2, 1), "micro_scale": 1024.0}

MDM_CONFIGS: dict[str, tuple[LevelConfig, ...]] = {
    "mdm-64": (_MDM_64,),
    "mdm-256": (_MDM_64, _MDM_256),
    "mdm-1024": (_MDM_64, {**_MDM_256, "normalise_input": True}, _MDM_1024),
}
"""The published networks, for `nest`: the smallest level first."""
