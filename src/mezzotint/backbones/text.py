"""How classes and captions enter a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.layers import NORM_EPS, LabelEmbedding, TransformerBlock, sinusoids
from mezzotint.conditions.text import BYTE_TOKENS, Text
from mezzotint.errors import MezzotintError

HEAD_WIDTH = 32
#: lengths of the runs of bytes that have embeddings, and rows in the table of each
NGRAMS = (3, 4, 5, 6)
NGRAM_ROWS = 4096
#: of a polynomial hash; the base is above all tokens, and no sum of NGRAMS[-1] of its powers leaves int64
HASH_BASE, HASH_PRIME = 263, 2_147_483_647


def condition_embedding(
    num_classes: int, text_features: int | None, width: int
) -> LabelEmbedding | TextEmbedding | None:
    """What a network of `num_classes` (0: none) or of captions (`text_features` None: none) reads `y` with.

    Raises MezzotintError for both.
    """
    if text_features is None:
        return LabelEmbedding(num_classes, width) if num_classes else None
    if num_classes:
        raise MezzotintError(
            f"a network reads either class labels or captions, but has {num_classes} classes and text_features "
            f"{text_features}; set num_classes to 0 or text_features to None"
        )
    return TextEmbedding(text_features, width)


def embedded(
    embedder: LabelEmbedding | TextEmbedding, y: Tensor | Text | None, *, pool: bool
) -> tuple[Tensor, Tensor | None]:
    """`y`, labels (B,) or B captions, as embeddings (B, n, width) and the mask bool (B, n) of those that are there.

    Labels, and captions where they are to be pooled, have n = 1 and no mask. Raises MezzotintError for a `y` that is
    missing or of the other kind.
    """
    if isinstance(embedder, TextEmbedding):
        tokens, mask = embedder(y)
        return (pooled(tokens, mask).unsqueeze(1), None) if pool else (tokens, mask)
    if y is None:
        raise MezzotintError(
            f"class labels are missing; pass y (B,), with {embedder.num_classes} where there is no class"
        )
    if isinstance(y, Text):
        raise MezzotintError("y is captions, but the network was built for class labels; pass y (B,) of int64")
    return embedder(y).unsqueeze(1), None


class TextEmbedding(nn.Module):
    """Captions → tokens (B, T, width) and their mask bool (B, T).

    `features` above 0: those of a frozen encoder, of that width, through one linear layer. 0: bytes, through a
    transformer of `depth` blocks that is trained along.
    """

    def __init__(self, features: int, width: int, depth: int = 2) -> None:
        super().__init__()
        self.features = features
        self.encoder = nn.Linear(features, width) if features else ByteEncoder(width, depth)
        for layer in self.encoder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, y: Text | Tensor | None) -> tuple[Tensor, Tensor]:
        """Raises MezzotintError for captions that are missing, of another kind or of another width."""
        if y is None:
            raise MezzotintError("captions are missing; pass y, a Text, with the empty caption where there is none")
        if not isinstance(y, Text):
            raise MezzotintError("y is no Text, but the network was built for captions; pass a Text in place of labels")
        width = y.tokens.shape[-1] if y.tokens.is_floating_point() else 0
        if width != self.features:
            kinds = [f"features of width {n}" if n else "bytes" for n in (width, self.features)]
            raise MezzotintError(
                f"the captions are {kinds[0]}, but the network was built for {kinds[1]}; encode them for it, or build "
                f"it with text_features {width}"
            )
        if isinstance(self.encoder, ByteEncoder):
            return self.encoder(y.tokens, y.mask), y.mask
        return self.encoder(y.tokens.to(self.encoder.weight.dtype)), y.mask


class ByteEncoder(nn.Module):
    """A transformer over the bytes of a caption, int64 (B, T) and mask bool (B, T) → (B, T, width), width even.

    A byte's embedding is the sum of its own and of those of the 3 to 6 bytes that end with it, which are rows of hashed
    tables (Byte Latent Transformer, arXiv 2412.09871, section 3.2.1): words are told apart before attention has learned
    to spell.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(BYTE_TOKENS, width)
        self.ngrams = nn.ModuleList(nn.Embedding(NGRAM_ROWS, width) for _ in NGRAMS)
        self.blocks = nn.ModuleList(TransformerBlock(width, head_count(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        x = self.embedding(tokens) + sinusoids(position, self.width).to(self.embedding.weight.dtype)
        for length, table in zip(NGRAMS, self.ngrams, strict=True):
            x = x + table(ngram_rows(tokens, length))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def ngram_rows(tokens: Tensor, length: int) -> Tensor:
    """The row of a hashed table for the `length` tokens that end at each place of int64 (B, T); 0 stands before."""
    ends = F.pad(tokens, (length - 1, 0)).unfold(1, length, 1)
    powers = HASH_BASE ** torch.arange(length, device=tokens.device)
    return (ends * powers).sum(-1) % HASH_PRIME % NGRAM_ROWS


def head_count(width: int) -> int:
    """The most attention heads of equal width, HEAD_WIDTH or more, that `width` can be split into."""
    return max((n for n in range(1, width // HEAD_WIDTH + 1) if width % n == 0), default=1)


def pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens that are there, one at least: (B, T, width) → (B, width)."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return torch.sum(tokens * weights, dim=1) / weights.sum(dim=1)
