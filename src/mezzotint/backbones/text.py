"""How captions enter a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.layers import MLP, position_table
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError

NUM_BYTE_TOKENS = 258  # nothing, the beginning, and 256 bytes: `conditions.text.byte_tokens`
HEAD_WIDTH = 32


class TextEmbedding(nn.Module):
    """Captions → tokens (B, T, width) and their mask bool (B, T).

    `features` above 0: those of a frozen encoder, of that width, through one linear layer. 0: bytes, through a
    transformer of `depth` blocks that is trained along.
    """

    def __init__(self, features: int, width: int, depth: int = 2) -> None:
        super().__init__()
        self.features = features
        self.encoder = nn.Linear(features, width) if features else ByteEncoder(width, depth)

    def forward(self, y: Text) -> tuple[Tensor, Tensor]:
        """Raises MezzotintError for captions of another kind or width."""
        width = y.tokens.shape[-1] if y.tokens.is_floating_point() else 0
        if width != self.features:
            kinds = [f"features of width {n}" if n else "bytes" for n in (width, self.features)]
            raise MezzotintError(f"the captions are {kinds[0]}, but the network was built for {kinds[1]}")
        tokens = y.tokens
        if width:
            tokens = tokens.to(next(self.parameters()).dtype)
        return self.encoder(tokens) if width else self.encoder(tokens, y.mask), y.mask


class ByteEncoder(nn.Module):
    """A transformer over the bytes of a caption, int64 (B, T) and mask bool (B, T) → (B, T, width)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(NUM_BYTE_TOKENS, width)
        self.blocks = nn.ModuleList(TextBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + position_table(self.width, 1, tokens.shape[1]).to(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class TextBlock(nn.Module):
    """Masked self-attention and an MLP, each after a LayerNorm and inside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        if width % self.heads:
            raise MezzotintError(f"a text width of {width} cannot be split into heads of {HEAD_WIDTH}; use a multiple")
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens that are there, (B, T, width) → (B, width)."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return torch.sum(tokens * weights, dim=1) / weights.sum(dim=1)
