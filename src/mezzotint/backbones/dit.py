"""DiT, the diffusion transformer, in its four conditioning designs (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.layers import MLP, Attention, LabelEmbedding, TimestepEmbedding, modulate, position_table
from mezzotint.errors import MezzotintError, closest

NORM_EPS = 1e-6


class DiT(nn.Module):
    """Transformer over the patches of an image or latent. Parameter names are those of the official checkpoints.

    `num_classes` = 0 builds an unconditional network. Otherwise the label table has one row more than there are
    classes: row `num_classes` is the null class, which the training objective (not this module) puts in at random.

    Raises MezzotintError when `conditioning` is unknown, a side of `input_size` is not a multiple of `patch_size`, or
    `width` is not a multiple of 4 and of `heads`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        out_channels: int | None = None,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        conditioning: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero",
        freq_shift: int = 0,
    ) -> None:
        super().__init__()
        if conditioning not in BLOCKS:
            raise MezzotintError(f"conditioning {conditioning!r} is unknown; {closest(conditioning, BLOCKS)}")
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        if rows % patch_size or columns % patch_size:
            raise MezzotintError(
                f"input size {rows}×{columns} cannot be cut into patches of {patch_size}; use multiples of {patch_size}"
            )
        self.input_size = (rows, columns)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.conditioning = conditioning
        self.adaptive = conditioning in ("adaln-zero", "adaln")

        self.x_embedder = PatchEmbedding(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedding(width, freq_shift)
        self.y_embedder = LabelEmbedding(num_classes, width) if num_classes else None
        table = position_table(width, rows // patch_size, columns // patch_size)
        self.register_buffer("pos_embed", table.unsqueeze(0))
        self.blocks = nn.ModuleList(BLOCKS[conditioning](width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * self.out_channels, self.adaptive)
        self._initialise()

    def _initialise(self) -> None:
        """The published initialisation (§4 of the paper, and the official code for the embeddings)."""
        zero = ["bias", "final_layer.linear"]
        if self.conditioning == "adaln-zero":
            zero.append("adaLN_modulation")
        for name, parameter in self.named_parameters():
            if any(part in name for part in zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:  # all but the LayerNorms, which start as torch leaves them
                nn.init.xavier_uniform_(parameter.flatten(1))  # the patch projection counts as the linear layer it is

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, condition: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W).

        Computed in the parameters' dtype, whatever that of `x`; the output has it, too. `t` (B,) is time as the
        sinusoids see it (DiT: 0 to 999), best in float32. `y` (B,) int64 in [0, num_classes]; None for an unconditional
        network, which does not look at it. `condition` is what `self.condition(t, y)` gave, where it is known already.
        Raises MezzotintError for an `x` of another shape and for a missing `y`.
        """
        if x.shape[1:] != (self.in_channels, *self.input_size):
            rows, columns = self.input_size
            raise MezzotintError(
                f"input has shape {tuple(x.shape)}, expected (B, {self.in_channels}, {rows}, {columns}); "
                "resize it or build the network with that input_size and in_channels"
            )
        *conditions, final = self.condition(t, y) if condition is None else condition
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        length = tokens.shape[1]
        if self.conditioning == "in-context":
            tokens = torch.cat([tokens, conditions[0]], dim=1)
        for block, c in zip(self.blocks, conditions, strict=True):
            tokens = block(tokens, c)
        return self._unpatchify(self.final_layer(tokens[:, :length], final))

    def condition(self, t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """What each block, and last the final layer, is given of `t` and `y` (N,): tensors (N, 1 or 2, …).

        Where LayerNorm is adaptive these are the shifts, scales and gates; elsewhere both embeddings. They depend on
        nothing else, so that a sampler can have them computed once for all examples of a class, and for many steps.
        Raises MezzotintError for a missing `y`.
        """
        embeddings = [self.t_embedder(t)]
        if self.y_embedder is not None:
            if y is None:
                raise MezzotintError(
                    f"class labels are missing; pass y (B,), with {self.num_classes} where there is no class"
                )
            embeddings.append(self.y_embedder(y))
        c = torch.stack(embeddings, dim=1)
        layers = [*self.blocks, self.final_layer]
        if not self.adaptive:
            return [c] * len(layers)
        c = F.silu(c.sum(dim=1, keepdim=True))  # every regression layer starts with this SiLU: taken once for all
        return [layer.adaLN_modulation(c) for layer in layers]

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, p·p·C) → (B, C, H, W)."""
        p = self.patch_size
        rows, columns = self.input_size
        patches = tokens.reshape(-1, rows // p, columns // p, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows, columns)


class PatchEmbedding(nn.Module):
    """(B, C, H, W) → (B, T, width): one linear projection of each p×p patch, patches read row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # The same numbers as self.proj(x), but the tokens come out contiguous (on a CPU in two thirds of the time).
        batch, channels, rows, columns = x.shape
        p = self.proj.kernel_size[0]
        patches = x.reshape(batch, channels, rows // p, p, columns // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """What the four designs share: self-attention and MLP, each after a LayerNorm and inside a residual.

    Every design's forward maps tokens (B, T, width) and a condition c to tokens. Where LayerNorm is adaptive, c holds
    the `regressed` vectors of `width` that `adaLN_modulation` makes of the activated sum of the embeddings of time and
    class, (B, 1, regressed·width); elsewhere (`regressed` 0) it is the embeddings themselves, (B, n, width), and the
    norms have parameters of their own.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, regressed: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=not regressed)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=not regressed)
        self.mlp = MLP(width, int(width * mlp_ratio))
        if regressed:
            self.adaLN_modulation = _regression(width, regressed)


class AdaLNZeroBlock(Block):
    """Shift, scale and gate of both branches regressed from c; gates of zero make the block the identity at first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio, regressed=6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = c.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class AdaLNBlock(Block):
    """Shift and scale of both LayerNorms regressed from c."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio, regressed=4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = c.chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class InContextBlock(Block):
    """A plain transformer block: the embeddings travel among the tokens, so c is not looked at again."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(Block):
    """A plain transformer block with cross-attention to the embeddings between self-attention and MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.norm_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, width) to c (B, n, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(c).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Tokens (B, T, width) → (B, T, out_features) by a LayerNorm (`adaptive`: modulated by c) and a linear layer."""

    def __init__(self, width: int, out_features: int, adaptive: bool) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=not adaptive)
        self.linear = nn.Linear(width, out_features)
        if adaptive:
            self.adaLN_modulation = _regression(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm_final(x)
        if self.adaptive:
            x = modulate(x, *c.chunk(2, dim=-1))
        return self.linear(x)


def _regression(width: int, vectors: int) -> nn.Sequential:
    # Official checkpoints number this linear layer 1, after the SiLU that DiT.forward takes once for all layers.
    return nn.Sequential(nn.Identity(), nn.Linear(width, vectors * width))


BLOCKS: dict[str, type[Block]] = {
    "adaln-zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}


class DiTConfig(TypedDict):
    """What the published sizes differ in, as keyword arguments of DiT."""

    depth: int
    width: int
    heads: int
    patch_size: int


DIT_CONFIGS: dict[str, DiTConfig] = {
    "dit-s-8": {"depth": 12, "width": 384, "heads": 6, "patch_size": 8},
    "dit-s-4": {"depth": 12, "width": 384, "heads": 6, "patch_size": 4},
    "dit-s-2": {"depth": 12, "width": 384, "heads": 6, "patch_size": 2},
    "dit-b-8": {"depth": 12, "width": 768, "heads": 12, "patch_size": 8},
    "dit-b-4": {"depth": 12, "width": 768, "heads": 12, "patch_size": 4},
    "dit-b-2": {"depth": 12, "width": 768, "heads": 12, "patch_size": 2},
    "dit-l-8": {"depth": 24, "width": 1024, "heads": 16, "patch_size": 8},
    "dit-l-4": {"depth": 24, "width": 1024, "heads": 16, "patch_size": 4},
    "dit-l-2": {"depth": 24, "width": 1024, "heads": 16, "patch_size": 2},
    "dit-xl-8": {"depth": 28, "width": 1152, "heads": 16, "patch_size": 8},
    "dit-xl-4": {"depth": 28, "width": 1152, "heads": 16, "patch_size": 4},
    "dit-xl-2": {"depth": 28, "width": 1152, "heads": 16, "patch_size": 2},
}
