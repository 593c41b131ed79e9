"""Captions as networks see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BYTE_TOKENS = 258  # nothing, the beginning, and 256 bytes


@dataclass(frozen=True, eq=False)
class Text:
    """A batch of B captions of up to T tokens each; every caption, the empty one too, has at least one."""

    tokens: Tensor
    """float (B, T, D): features of a frozen encoder; or int64 (B, T): `byte_tokens`, for a network that reads them."""
    mask: Tensor
    """bool (B, T): where there is a token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Text:
        return Text(self.tokens[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> Text:
        """On another device, without waiting for the copy."""
        return Text(self.tokens.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))

    def padded(self, length: int) -> Text:
        """With at least `length` tokens."""
        more = max(0, length - self.mask.shape[1])
        sides = (0, 0, 0, more) if self.tokens.ndim == 3 else (0, more)
        return Text(F.pad(self.tokens, sides), F.pad(self.mask, (0, more)))


class Captioner(Protocol):
    """Captions to what a network is given of them."""

    #: of a token's features; 0 for bytes
    width: int

    def encode(self, captions: Sequence[str], *, cached: bool = True) -> Text:
        """B captions; `cached` ones are remembered, where that is worth while."""


def join(*batches: Text) -> Text:
    """Batches one after another, padded to the longest."""
    length = max(batch.mask.shape[1] for batch in batches)
    batches = tuple(batch.padded(length) for batch in batches)
    return Text(torch.cat([b.tokens for b in batches]), torch.cat([b.mask for b in batches]))


def replaced(y: Text, which: Tensor, null: Text) -> Text:
    """`y` with the caption `null`, of one row, in the rows `which` (B,) bool."""
    length = max(y.mask.shape[1], null.mask.shape[1])
    y, null = y.padded(length), null.padded(length)
    tokens = which.reshape(-1, *[1] * (y.tokens.ndim - 1))
    return Text(torch.where(tokens, null.tokens.to(y.tokens), y.tokens), torch.where(which[:, None], null.mask, y.mask))


def byte_tokens(captions: Sequence[str], length: int) -> Text:
    """Captions as UTF-8: 1 begins each, a byte b is 2 + b, 0 follows the last. int64 (B, `length`), longer ones cut.

    Needs no vocabulary: `backbones.text.ByteEncoder` learns what they mean along with the network.
    """
    encoded = [caption.encode(errors="replace")[: length - 1] for caption in captions]
    ends = torch.tensor([len(data) for data in encoded], dtype=torch.int64).unsqueeze(1)
    position = torch.arange(length)
    tokens = (position == 0).to(torch.int64).repeat(len(encoded), 1)
    if data := b"".join(encoded):
        tokens[(position > 0) & (position <= ends)] = 2 + torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return Text(tokens, tokens > 0)


#: captions are padded to multiples of this: few shapes to compile for, and little padding
LENGTH_STEP = 16


class Bytes:
    """`byte_tokens` as long as the longest of the captions needs, as a `Captioner`."""

    width = 0

    def __init__(self, max_tokens: int, device: torch.device | str = "cpu") -> None:
        self.max_tokens, self.device = max_tokens, device

    def encode(self, captions: Sequence[str], *, cached: bool = True) -> Text:
        """int64 (B, T) on the device, T a multiple of LENGTH_STEP or max_tokens, the most."""
        y = byte_tokens(captions, self.max_tokens)
        longest = max(1, int(y.mask.any(0).sum()))
        length = math.ceil(longest / LENGTH_STEP) * LENGTH_STEP
        return Text(y.tokens[:, :length], y.mask[:, :length]).to(self.device)
