"""The UNet of Matryoshka Diffusion Models (arXiv 2310.15111): ResNet blocks, attention, captions, video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.layers import (
    TIME_FREQUENCIES,
    Attention,
    LabelEmbedding,
    Layer,
    TimestepEmbedding,
    check_input,
    check_tubelet,
    checked_heads,
    fold_frames,
    sinusoids,
    unfold_frames,
)
from mezzotint.backbones.text import condition_embedding, embedded, pooled
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError

M = TypeVar("M", bound=nn.Module)


class EmbeddedCondition(NamedTuple):
    """What `ConditionEmbedding` makes of a batch of labels or captions."""

    y: Tensor | Text | None
    """The labels or captions themselves."""
    embedding: Tensor | None
    """(B, time_width), to be added to the embedding of time."""
    tokens: Tensor | None
    """(B, T, text_width), for cross-attention."""
    mask: Tensor | None
    """bool (B, 1, 1, T): the tokens that cross-attention sees; None for all."""


class Trunk(nn.Module):
    """What a UNet has around its middle: embedding of time, input layer, way down, way up, output layer.

    Frames of a video are folded into the batch: its tensors are (B·F, …), those of images (B, …). With a `tubelet_size`
    q, every q successive frames are first laid together, as so many more channels: (B·F / q, …).
    Raises MezzotintError when the lists differ in length, a level has no ResNet block, `input_size` cannot be halved
    between the levels, a width with attention is not a multiple of `heads`, or `tubelet_size` does not divide `frames`
    and the first width.
    """

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        resblocks: Sequence[int],
        attention: Sequence[int],
        feed_forward: bool,
        heads: int,
        time_width: int,
        time_frequencies: int,
        text_width: int,
        groups: int,
        dropout: float,
        micro_scale: float | None,
        frames: int,
        temporal_attention: Sequence[int] | bool,
        tubelet_size: int,
    ) -> None:
        super().__init__()
        check_tubelet(tubelet_size, frames, channels[0])
        levels = len(channels)
        attention = list(attention) or [0] * levels
        if isinstance(temporal_attention, bool):
            temporal_attention = [int(temporal_attention)] * levels
        temporal = list(temporal_attention) if frames else [0] * levels
        _check(input_size, channels, resblocks, attention, temporal)
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.time_width = time_width
        self.time_frequencies = time_frequencies
        self.text_width = text_width
        self.micro_scale = micro_scale
        self.frames = frames
        self.tubelet_size = tubelet_size
        self.feature_channels = channels[0] // tubelet_size
        self.feature_stride = (1, 1)
        self.in_shape = (*((frames,) if frames else ()), in_channels, *input_size)
        """Of one example: (C, H, W), or (F, C, H, W) for video."""

        def level(inputs: Sequence[int], index: int, resample: nn.Module | None = None) -> Level:
            width = channels[index]
            return Level(
                [ResNet(n, width, time_width, groups, dropout) for n in inputs],
                [
                    SpatialAttention(width, heads, text_width, groups, feed_forward)
                    for _ in range(len(inputs) * attention[index])
                ],
                [TemporalAttention(width, heads, frames // tubelet_size) for _ in range(len(inputs) * temporal[index])],
                resample,
            )

        def embedding() -> TimestepEmbedding:
            return TimestepEmbedding(time_width, frequencies=time_frequencies)

        self.t_embedder = embedding()
        self.micro_embedder = None if micro_scale is None else embedding()
        if self.micro_embedder is not None:
            zero_(self.micro_embedder.mlp[-1])
        self.conv_in = nn.Conv2d(tubelet_size * in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        for i, (width, count) in enumerate(zip(channels, resblocks, strict=True)):
            last = i == levels - 1
            down = None if last else nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down_blocks.append(level([skips[-1]] + [width] * (count - 1), i, down))
            skips += [width] * (count if last else count + 1)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(levels)):
            below = [channels[min(i + 1, levels - 1)]] + [channels[i]] * resblocks[i]
            up = Upsample(channels[i], channels[i], 3, padding=1) if i else None
            self.up_blocks.append(level([n + skips.pop() for n in below], i, up))
        self.norm_out = group_norm(channels[0], groups)
        self.conv_out = zero_(nn.Conv2d(channels[0], tubelet_size * out_channels, 3, padding=1))

    def embed_time(self, t: Tensor, condition: EmbeddedCondition, scale: Tensor | None) -> Tensor:
        """The activated embedding of time and all that is added to it, (B or B·F / q, time_width)."""
        embedding = self.t_embedder(t)
        if condition.embedding is not None:
            embedding = embedding + condition.embedding
        if self.micro_embedder is not None and self.micro_scale is not None:
            full = torch.full_like(t, self.micro_scale, dtype=torch.promote_types(t.dtype, torch.float32))
            embedding = embedding + self.micro_embedder(full if scale is None else torch.minimum(scale.to(full), full))
        embedding = F.silu(embedding)
        return embedding.repeat_interleave(self.frames // self.tubelet_size, dim=0) if self.frames else embedding

    def encode(
        self, x: Tensor, features: Tensor | None, embedding: Tensor, condition: EmbeddedCondition
    ) -> list[Tensor]:
        """All features that the way up looks at, from the input layer's to the deepest."""
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        outputs = [x if features is None else x + features]
        for block in self.down_blocks:
            outputs += block(outputs[-1], embedding, condition)
        return outputs

    def decode(self, x: Tensor, skips: list[Tensor], embedding: Tensor, condition: EmbeddedCondition) -> Tensor:
        """The features before the output layer; uses up `skips`, which `encode` gave."""
        for block in self.up_blocks:
            x = block(x, embedding, condition, skips)[-1]
        return x

    @property
    def down_layers(self) -> dict[str, Layer]:
        """ "down.LEVEL.STEP" from 1, the full resolution first; a step is a ResNet block and its attention layers."""
        return _steps("down", dict(enumerate(self.down_blocks, 1)))

    @property
    def up_layers(self) -> dict[str, Layer]:
        """ "up.LEVEL.STEP", the full resolution, level 1, last."""
        return _steps("up", dict(zip(range(len(self.up_blocks), 0, -1), self.up_blocks, strict=True)))

    def output(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(x)))

    def fold(self, x: Tensor) -> Tensor:
        """(B, F, C, …) → (B·F / q, q·C, …) for video, q = `tubelet_size`."""
        return fold_frames(x, self.tubelet_size) if self.frames else x

    def unfold(self, x: Tensor) -> Tensor:
        """Undoes `fold`."""
        return unfold_frames(x, self.frames, self.tubelet_size) if self.frames else x


class UNet(Trunk):
    """UNet with FiLM from time, self-attention, and cross-attention to captions (section 3.2 and appendix A).

    channels, resblocks, attention: one number a level, the full resolution first; each level has half the sides of the
    one before. `attention` layers follow every ResNet block of the level; empty: none anywhere. `middle`: two more
    blocks at the lowest resolution, with attention between them.
    num_classes: 0, or a label table whose last row, `num_classes`, is the null class.
    text_features: None for no captions, the width of a frozen encoder's features, or 0 for bytes. Their mean is added
    to the embedding of time, their tokens, `text_width` wide (None: `time_width`), are attended to wherever there is
    attention. `masked_text` False: padding is attended to, as well, as the published networks do.
    time_width: None for four times the first width. time_frequencies: time enters by so many sines and as many cosines,
    in official networks an eighth of `time_width`. groups: of every GroupNorm; where they do not divide a width, their
    greatest common divisor is taken. micro_scale: side of an image that was not enlarged (micro conditioning, appendix
    A), None for a network that is not told.
    frames: F above 0 for video, (B, F, C, H, W). `temporal_attention` layers (True: one) follow the others of each
    ResNet block of a level. `tubelet_size`: successive frames that the network sees as one image of so many more
    channels; its channels are shared out among them where features of each are asked for.

    Raises MezzotintError as `Trunk` does, and for captions and classes at once.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: Sequence[int],
        resblocks: Sequence[int],
        attention: Sequence[int] = (),
        feed_forward: bool = False,
        heads: int = 8,
        middle: bool = True,
        time_width: int | None = None,
        time_frequencies: int = TIME_FREQUENCIES,
        groups: int = 32,
        dropout: float = 0.0,
        num_classes: int = 0,
        text_features: int | None = None,
        text_width: int | None = None,
        masked_text: bool = True,
        micro_scale: float | None = None,
        frames: int = 0,
        temporal_attention: Sequence[int] | bool = False,
        tubelet_size: int = 1,
    ) -> None:
        time_width = time_width or 4 * channels[0]
        embedder = ConditionEmbedding(time_width, num_classes, text_features, text_width or time_width, masked_text)
        super().__init__(
            input_size=(input_size, input_size) if isinstance(input_size, int) else input_size,
            in_channels=in_channels,
            out_channels=in_channels if out_channels is None else out_channels,
            channels=channels,
            resblocks=resblocks,
            attention=attention,
            feed_forward=feed_forward,
            heads=heads,
            time_width=time_width,
            time_frequencies=time_frequencies,
            text_width=embedder.text_width,
            groups=groups,
            dropout=dropout,
            micro_scale=micro_scale,
            frames=frames,
            temporal_attention=temporal_attention,
            tubelet_size=tubelet_size,
        )
        self.num_classes = num_classes
        self.text_features = text_features
        self.y_embedder = embedder
        self.mid_blocks = nn.ModuleList()
        if middle:
            width = channels[-1]
            between = [SpatialAttention(width, heads, embedder.text_width, groups, feed_forward)]
            for attn in (between, []):
                self.mid_blocks.append(Level([ResNet(width, width, time_width, groups, dropout)], attn, [], None))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | Text | None = None, *, scale: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W); (B, F, C, H, W) likewise for video.

        Computed in the parameters' dtype, whatever that of `x`; the output has it, too. `t` (B,) is time as the
        sinusoids see it (MDM: 0 to 999), best in float32. `y`: labels (B,) int64 in [0, num_classes], or captions.
        `scale` (B,): side of the image before it was resized, above `micro_scale` as that; None for `micro_scale`
        itself. What a network is not built for, it does not look at. Raises MezzotintError for an `x` of another shape
        and for a `y` that is missing or of the other kind.
        """
        return self.forward_features(x, t, y, scale=scale)[0]

    def forward_features(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | EmbeddedCondition | None = None,
        features: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, for a network around this one: the output, and the features that the output layer is given.

        `features` ([F,] feature_channels, H, W for each example) are added to what the input layer gives. `y` may be
        what `embed_condition` made of it.
        """
        check_input(x, self.in_shape)
        condition = self.embed_condition(y)
        embedding = self.embed_time(t, condition, scale)
        skips = self.encode(self.fold(x), None if features is None else self.fold(features), embedding, condition)
        h = skips[-1]
        for block in self.mid_blocks:
            h = block(h, embedding, condition)[-1]
        h = self.decode(h, skips, embedding, condition)
        return self.unfold(self.output(h)), self.unfold(h)

    def embed_condition(self, y: Tensor | Text | EmbeddedCondition | None) -> EmbeddedCondition:
        """What the network makes of `y`, whatever the input and time. Raises MezzotintError as `forward` does."""
        return y if isinstance(y, EmbeddedCondition) else self.y_embedder(y)

    @property
    def layers(self) -> dict[str, Layer]:
        """The steps of `down_layers`, "middle.1", "middle.2" where there is a middle, and `up_layers`, as they run."""
        middle = {
            f"middle.{k}": Layer(cast(Level, block).last_of_steps()[0]) for k, block in enumerate(self.mid_blocks, 1)
        }
        return self.down_layers | middle | self.up_layers


class ConditionEmbedding(nn.Module):
    """Labels or captions → a vector for the embedding of time, and captions → tokens for cross-attention.

    The vector of a caption is a bias-free linear function of the mean of its tokens. Raises MezzotintError for captions
    and classes at once.
    """

    def __init__(
        self, time_width: int, num_classes: int, text_features: int | None, text_width: int, masked: bool
    ) -> None:
        super().__init__()
        captions = text_features is not None
        self.masked = masked
        self.text_width = text_width if captions else 0
        self.embedder = condition_embedding(num_classes, text_features, text_width if captions else time_width)
        self.proj = nn.Linear(text_width, time_width, bias=False) if captions else None
        if isinstance(self.embedder, LabelEmbedding):
            nn.init.normal_(self.embedder.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor | Text | None) -> EmbeddedCondition:
        """Raises MezzotintError where labels or captions are missing, or the other of the two is given."""
        if self.embedder is None:
            return EmbeddedCondition(y, None, None, None)
        tokens, mask = embedded(self.embedder, y, pool=False)
        if self.proj is None or mask is None:
            return EmbeddedCondition(y, tokens.squeeze(1), None, None)
        return EmbeddedCondition(
            y, self.proj(pooled(tokens, mask)), tokens, mask[:, None, None] if self.masked else None
        )


class Level(nn.Module):
    """ResNet blocks of one width, each with the attention layers that follow it, and a change of resolution."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attn: Sequence[nn.Module],
        temporal: Sequence[nn.Module],
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attn = nn.ModuleList(attn)
        self.temporal = nn.ModuleList(temporal)
        self.resample = resample

    def forward(
        self, x: Tensor, embedding: Tensor, condition: EmbeddedCondition, skips: list[Tensor] | None = None
    ) -> list[Tensor]:
        """What each step gives, the last one last. Each ResNet block takes the last of `skips` along, where given."""
        outputs = []
        each, frames_each = len(self.attn) // len(self.resnets), len(self.temporal) // len(self.resnets)
        for i, resnet in enumerate(self.resnets):
            if skips is not None:
                x = torch.cat([x, skips.pop()], dim=1)
            x = resnet(x, embedding)
            for layer in self.attn[i * each : (i + 1) * each]:
                x = layer(x, condition)
            for layer in self.temporal[i * frames_each : (i + 1) * frames_each]:
                x = layer(x)
            outputs.append(x)
        if self.resample is not None:
            outputs.append(self.resample(x))
        return outputs

    def last_of_steps(self) -> list[nn.Module]:
        """The module whose output is that of a step, for each step."""
        each, frames_each = len(self.attn) // len(self.resnets), len(self.temporal) // len(self.resnets)
        layers, count = (self.temporal, frames_each) if frames_each else (self.attn, each)
        return [layers[(i + 1) * count - 1] if count else resnet for i, resnet in enumerate(self.resnets)]


class ResNet(nn.Module):
    """Two 3×3 convolutions inside a residual; scale and shift of the second GroupNorm come from time (FiLM)."""

    def __init__(self, in_channels: int, width: int, time_width: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.time_layer = nn.Linear(time_width, 2 * width)
        self.norm2 = group_norm(width, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(width, width, 3, padding=1))
        self.conv3 = nn.Identity() if in_channels == width else nn.Conv2d(in_channels, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.time_layer(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.conv3(x) + self.conv2(self.dropout(h))


class SpatialAttention(nn.Module):
    """Self-attention of the positions plus their attention to caption tokens, through one projection.

    The two are separate softmaxes with the same queries. `text_width` 0: no captions. `feed_forward`: two linear layers
    follow. Raises MezzotintError when `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, text_width: int, groups: int, feed_forward: bool) -> None:
        super().__init__()
        self.heads = checked_heads(width, heads)
        self.norm = group_norm(width, groups)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_cond = nn.LayerNorm(text_width) if text_width else None
        self.kv_cond = nn.Linear(text_width, 2 * width) if text_width else None
        self.proj = zero_(nn.Linear(width, width))
        self.norm_ffn = group_norm(width, groups) if feed_forward else None
        self.ffn = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), zero_(nn.Linear(4 * width, width)))
            if feed_forward
            else None
        )

    def forward(self, x: Tensor, condition: EmbeddedCondition) -> Tensor:
        q, k, v = self.qkv(_positions(self.norm(x))).unflatten(-1, (3, self.heads, -1)).unbind(2)
        h = _attend(q, k, v)
        if self.norm_cond is not None and self.kv_cond is not None and condition.tokens is not None:
            k, v = self.kv_cond(self.norm_cond(condition.tokens)).unflatten(-1, (2, self.heads, -1)).unbind(2)
            # All frames of a video ask the same caption: their queries are laid end to end.
            h = h + _attend(q.reshape(len(k), -1, *q.shape[2:]), k, v, condition.mask).reshape(h.shape)
        x = x + _image(self.proj(h.flatten(2)), x)
        if self.norm_ffn is not None and self.ffn is not None:
            x = x + _image(self.ffn(_positions(self.norm_ffn(x))), x)
        return x


class TemporalAttention(nn.Module):
    """Attention of each position to itself in all frames, with sine-cosine positions in time; the identity at first.

    Raises MezzotintError when `width` is not a multiple of `heads`.
    """

    positions: Tensor

    def __init__(self, width: int, heads: int, frames: int) -> None:
        super().__init__()
        table = sinusoids(torch.arange(frames, dtype=torch.float64), width)
        self.register_buffer("positions", table.to(torch.get_default_dtype()))
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        zero_(self.attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        clips = x.unflatten(0, (-1, len(self.positions))).permute(0, 3, 4, 1, 2)
        h = self.attn(self.norm(clips.flatten(0, 2)) + self.positions)
        return x + h.unflatten(0, (-1, rows, columns)).permute(0, 3, 4, 1, 2).flatten(0, 1)


class Upsample(nn.Conv2d):
    """Each pixel four times, then the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0))


def _steps(name: str, levels: Mapping[int, nn.Module]) -> dict[str, Layer]:
    """The steps of all levels, by name."""
    return {
        f"{name}.{number}.{step}": Layer(module)
        for number, level in levels.items()
        for step, module in enumerate(cast(Level, level).last_of_steps(), 1)
    }


def group_norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(width, groups), width)


def zero_(module: M) -> M:
    """`module` with all parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries (N, L, heads, d), keys and values (N, S, heads, d) → (N, L, heads, d)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _positions(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, H·W, C)."""
    return x.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, H·W, C) → the shape of `like`, (N, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def _check(
    input_size: tuple[int, int],
    channels: Sequence[int],
    resblocks: Sequence[int],
    attention: Sequence[int],
    temporal: Sequence[int],
) -> None:
    """Raise MezzotintError for lists that describe no UNet."""
    levels = len(channels)
    lists = {"resblocks": resblocks, "attention": attention, "temporal_attention": temporal}
    for name, numbers in lists.items():
        if len(numbers) != levels:
            raise MezzotintError(
                f"{name} {list(numbers)} does not have one number for each of the {levels} levels of channels "
                f"{list(channels)}; make them equally long"
            )
    if min(resblocks) < 1:
        raise MezzotintError(f"resblocks {list(resblocks)} leaves a level without a ResNet block; use 1 or more")
    divisor = 2 ** (levels - 1)
    if any(side % divisor for side in input_size):
        rows, columns = input_size
        raise MezzotintError(
            f"input size {rows}×{columns} cannot be halved {levels - 1} times for {levels} levels; use multiples of "
            f"{divisor}"
        )
