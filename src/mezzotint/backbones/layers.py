"""Layers that several backbones share. Attribute names are those of the published checkpoints."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.errors import MezzotintError

NORM_EPS = 1e-6
MAX_PERIOD = 10_000.0
TIME_FREQUENCIES = 128


class Layer(NamedTuple):
    """A named place in a network: what `module` gives are features, and it runs once in a forward pass.

    They are tokens (B, T, C), or maps (B, C, H, W), of F frames (B·F, C, H, W).
    """

    module: nn.Module
    tokens: slice = slice(None)
    """Which of the tokens are the image's; others are a condition's."""


def _angles(position: Tensor, count: int, freq_shift: int = 0) -> Tensor:
    """Positions (N,) times the `count` frequencies MAX_PERIOD^(−k / (count − freq_shift)): (N, count)."""
    index = torch.arange(count, dtype=position.dtype, device=position.device)
    return torch.outer(position, torch.exp(-math.log(MAX_PERIOD) * index / (count - freq_shift)))


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Positions (N,) in floating point → (N, width): the sines of `width` / 2 angles, then their cosines."""
    angles = _angles(position, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table(width: int, rows: int, columns: int) -> Tensor:
    """Fixed sine-cosine table (rows·columns, width) for a grid read row by row.

    A quarter of the channels each: sine of the column, cosine of the column, sine of the row, cosine of the row.
    Raises MezzotintError when `width` is not a multiple of 4.
    """
    if width % 4:
        raise MezzotintError(f"width {width} cannot hold a sine-cosine position table; use a multiple of 4")

    def along(length: int) -> Tensor:
        return sinusoids(torch.arange(length, dtype=torch.float64), width // 2)

    by_column = along(columns).expand(rows, columns, -1)
    by_row = along(rows).unsqueeze(1).expand(rows, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).to(torch.get_default_dtype())


class TimestepEmbedding(nn.Module):
    """Network time (B,), DiT's runs from 0 to 999, → (B, width): sinusoids, cosines first, then a two-layer MLP.

    The frequencies fall geometrically from 1 towards 1/10,000, which the last one reaches with a `freq_shift` of 1.
    """

    def __init__(self, width: int, freq_shift: int = 0, frequencies: int = TIME_FREQUENCIES) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # An angle of 999 radians means nothing in half precision: sinusoids are taken in float32 or better.
        angles = _angles(t.to(torch.promote_types(t.dtype, torch.float32)), self.frequencies, self.freq_shift)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """Class labels (B,) int64 in [0, num_classes] → (B, width). Row `num_classes` is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def checked_heads(width: int, heads: int) -> int:
    """`heads`. Raises MezzotintError where they do not divide `width`."""
    if width % heads:
        raise MezzotintError(f"width {width} cannot be split into {heads} heads; use a multiple of {heads}")
    return heads


def patch_grid(input_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises MezzotintError for an `input_size` that is no multiple of theirs."""
    rows, columns = input_size
    if rows % patch_size or columns % patch_size:
        raise MezzotintError(
            f"input size {rows}×{columns} cannot be cut into patches of {patch_size}; use multiples of {patch_size}"
        )
    return rows // patch_size, columns // patch_size


def check_input(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises MezzotintError unless x is (B, *shape)."""
    if x.shape[1:] != shape:
        arguments = "input_size, in_channels and frames" if len(shape) > 3 else "input_size and in_channels"
        raise MezzotintError(
            f"input has shape {tuple(x.shape)}, expected (B, {', '.join(map(str, shape))}); resize it or build the "
            f"network with that {arguments}"
        )


def check_tubelet(tubelet_size: int, frames: int, width: int) -> None:
    """Raises MezzotintError where so many frames cannot be seen as one by a network of so many frames and channels."""
    if tubelet_size < 1 or frames % tubelet_size or width % tubelet_size or (tubelet_size > 1 and not frames):
        raise MezzotintError(
            f"tubelet_size {tubelet_size} must divide the frames ({frames}) and the width ({width}); images have 1"
        )


def fold_frames(x: Tensor, tubelet_size: int) -> Tensor:
    """(B, F, C, H, W) → (B·F / q, q·C, H, W), q = `tubelet_size`: q frames are one image of so many more channels."""
    return x.reshape(-1, tubelet_size * x.shape[2], *x.shape[3:])


def unfold_frames(x: Tensor, frames: int, tubelet_size: int) -> Tensor:
    """Undoes `fold_frames`."""
    return x.reshape(-1, frames, x.shape[1] // tubelet_size, *x.shape[2:])


def unpatchify(tokens: Tensor, patch_size: int, shape: tuple[int, int, int]) -> Tensor:
    """Tokens of one or more p×p patches each, read row by row, channels last, → (B, *shape), shape = (C, H, W)."""
    p, (channels, rows, columns) = patch_size, shape
    patches = tokens.reshape(-1, rows // p, columns // p, p, p, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows, columns)


def out_shape(channels: int, grid: tuple[int, int], patch_size: int) -> tuple[int, int, int]:
    """(C, H, W) of what `unpatchify` makes of a grid of tokens."""
    return channels, grid[0] * patch_size, grid[1] * patch_size


def add_features(tokens: Tensor, features: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, T, width) of a grid read row by row, with the features (B, width, *grid) of an outer network added.

    Raises MezzotintError for features of another shape.
    """
    if features is None:
        return tokens
    if features.shape != (len(tokens), tokens.shape[2], *grid):
        raise MezzotintError(
            f"features have shape {tuple(features.shape)}, expected ({len(tokens)}, {tokens.shape[2]}, {grid[0]}, "
            f"{grid[1]}); see feature_channels and feature_stride"
        )
    return tokens + features.to(tokens.dtype).flatten(2).transpose(1, 2)


def as_features(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, T, width) of a grid read row by row as features (B, width, *grid); a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class Attention(nn.Module):
    """Multi-head self-attention (B, T, width) → (B, T, width); `mask` bool (B, T): which tokens are attended to.

    Raises MezzotintError when `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = checked_heads(width, heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(_attended(q, k, v, mask))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, width) to c (B, n, width); `mask` bool (B, n): which of c are attended to.

    Raises MezzotintError when `width` is not a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = checked_heads(width, heads)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(c).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(_attended(q, k, v, mask))


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, T or n, width / heads) → (B, T, width)."""
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, (…, width) → (…, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """The layers of a transformer block: self-attention and MLP, each after a LayerNorm (`affine`: with parameters)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, affine: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=affine)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=affine)
        self.mlp = MLP(width, int(width * mlp_ratio))


class TransformerBlock(Block):
    """Both inside a residual, (B, T, width) → (B, T, width); `mask` bool (B, T): which tokens are attended to."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift in one pass over x (B, T, width); shift and scale (B, 1, width)."""
    return torch.addcmul(shift, x, 1 + scale)
