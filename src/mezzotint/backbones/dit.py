"""DiT, the diffusion transformer, in its four conditioning designs (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.layers import (
    NORM_EPS,
    Block,
    CrossAttention,
    Layer,
    TimestepEmbedding,
    TransformerBlock,
    add_features,
    as_features,
    check_input,
    check_tubelet,
    fold_frames,
    modulate,
    out_shape,
    patch_grid,
    position_table,
    sinusoids,
    unfold_frames,
    unpatchify,
)
from mezzotint.backbones.text import condition_embedding, embedded
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError, closest


class DiT(nn.Module):
    """Transformer over the patches of an image or latent. Parameter names are those of the official checkpoints.

    `num_classes` = 0 builds an unconditional network. Otherwise the label table has one row more than there are
    classes: row `num_classes` is the null class, which the training objective (not this module) puts in at random.

    `text_features`, in the place of classes, builds a network of captions: above 0, of a frozen encoder's features of
    that width; 0, of bytes, with an encoder that is trained along. In the designs adaln-zero and adaln the mean of a
    caption's tokens is added to the embedding of time, and nothing else is known of it. With cross-attention the
    image's tokens attend to time and the caption's tokens; in-context, these travel in the sequence. Padding is masked.

    Inside another network it has `feature_channels` features at every `feature_stride` pixels (`forward_features`).

    frames: F above 0 for clips, (B, F, C, H, W). The patches of all frames are one sequence, each attended to by all,
    and sine-cosine positions in time are added to those in space. A token is a patch of `tubelet_size` successive
    frames (arXiv 2103.15691, section 3.2); its channels are shared out among them where features of each are asked for.

    With `adaln_ratio` each conditioning layer has a hidden one of so many times the width (l-DAE: 1/4), which makes
    adaptive LayerNorm cheap. `out_patch_size` is the side of an output patch, `patch_size` where not given.

    Raises MezzotintError when `conditioning` is unknown, a side of `input_size` is not a multiple of `patch_size`,
    `width` is not a multiple of 4 and of `heads`, `adaln_ratio` leaves no hidden channel or has nothing to act on,
    there are both classes and captions, or `tubelet_size` does not divide `frames` and `width`.
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
        text_features: int | None = None,
        conditioning: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero",
        freq_shift: int = 0,
        adaln_ratio: float | None = None,
        out_patch_size: int | None = None,
        frames: int = 0,
        tubelet_size: int = 1,
    ) -> None:
        super().__init__()
        if conditioning not in BLOCKS:
            raise MezzotintError(f"conditioning {conditioning!r} is unknown; {closest(conditioning, BLOCKS)}")
        self.adaptive = conditioning in ("adaln-zero", "adaln")
        hidden = 0 if adaln_ratio is None else int(width * adaln_ratio)
        if adaln_ratio is not None and (hidden < 1 or not self.adaptive):
            raise MezzotintError(
                f"adaln_ratio {adaln_ratio:g} means nothing for a width of {width} and conditioning {conditioning}; it "
                "is for adaln-zero and adaln, and must leave at least one channel"
            )
        check_tubelet(tubelet_size, frames, width)
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.patch_size = patch_size
        self.grid = patch_grid(self.input_size, patch_size)
        self.feature_channels = width // tubelet_size
        self.feature_stride = (patch_size, patch_size)
        self.frames = frames
        self.tubelet_size = tubelet_size
        self.in_channels = in_channels
        self.in_shape = (*((frames,) if frames else ()), in_channels, *self.input_size)
        self.out_channels = in_channels if out_channels is None else out_channels
        self.num_classes = num_classes
        self.text_features = text_features
        self.conditioning = conditioning
        self.out_patch_size = out_patch_size or patch_size
        self.out_shape = out_shape(self.out_channels, self.grid, self.out_patch_size)

        self.x_embedder = PatchEmbedding(patch_size, tubelet_size * in_channels, width)
        self.t_embedder = TimestepEmbedding(width, freq_shift)
        self.y_embedder = condition_embedding(num_classes, text_features, width)
        positions = position_table(width, *self.grid)
        if frames:
            moments = sinusoids(torch.arange(frames // tubelet_size, dtype=torch.float64), width).to(positions.dtype)
            positions = (moments.unsqueeze(1) + positions).flatten(0, 1)
        self.register_buffer("pos_embed", positions.unsqueeze(0))
        own = {"adaln_hidden": hidden} if self.adaptive else {}
        self.blocks = nn.ModuleList(BLOCKS[conditioning](width, heads, mlp_ratio, **own) for _ in range(depth))
        self.final_layer = FinalLayer(
            width, self.out_patch_size**2 * tubelet_size * self.out_channels, self.adaptive, hidden
        )
        self._initialise("adaLN_modulation.3" if hidden else "adaLN_modulation")

    def _initialise(self, regression: str) -> None:
        """The published initialisation (§4 of the paper, and the official code for embeddings); text has its own.

        regression: the layer that regresses what adaln-zero starts at zero.
        """
        zero = ["bias", "final_layer.linear"]
        if self.conditioning == "adaln-zero":
            zero.append(regression)
        for name, parameter in self.named_parameters():
            if name.startswith("y_embedder.encoder"):
                continue
            if any(part in name for part in zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:  # all but the LayerNorms, which start as torch leaves them
                nn.init.xavier_uniform_(parameter.flatten(1))  # the patch projection counts as the linear layer it is

    @property
    def layers(self) -> dict[str, Layer]:
        """The blocks, "1" to their number, in order of execution."""
        return {str(k): Layer(block, slice(self.pos_embed.shape[1])) for k, block in enumerate(self.blocks, 1)}

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | Text | None = None, *, condition: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(B, [F,] in_channels, H, W) → (B, [F,] *out_shape), (out_channels, H, W) but for an own `out_patch_size`.

        Computed in the parameters' dtype, whatever that of `x`; the output has it, too. `t` (B,) is time as the
        sinusoids see it (DiT: 0 to 999), best in float32. `y`: labels (B,) int64 in [0, num_classes], or a Text of B
        captions; None for an unconditional network, which does not look at it. `condition` is what
        `self.condition(t, y)` gave, where it is known already. Raises MezzotintError for an `x` of another shape and
        for a `y` that is missing or of the other kind.
        """
        return self.forward_features(x, t, y, None, condition=condition)[0]

    def forward_features(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | None,
        features: Tensor | None,
        *,
        condition: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, for a network inside another: its output, and its tokens before the final layer.

        `features` (B, [F,] feature_channels, H / p, W / p) are added to the tokens that enter the blocks; the tokens
        that leave them are of that shape, too. Raises MezzotintError as `forward`, and for features of another shape.
        """
        check_input(x, self.in_shape)
        conditions = self.condition(t, y) if condition is None else condition
        if self.frames:
            q = self.tubelet_size
            x, features = fold_frames(x, q), None if features is None else fold_frames(features, q)
        tokens = add_features(self.x_embedder(x.to(self.pos_embed.dtype)), features, self.grid)
        tokens = tokens.reshape(-1, *self.pos_embed.shape[1:]) + self.pos_embed
        length, final = tokens.shape[1], None
        given: list[tuple[Tensor, ...]]
        if self.adaptive:
            *each, final = conditions
            given = [(c,) for c in each]
        elif self.conditioning == "cross-attention":
            given = [tuple(conditions)] * len(self.blocks)
        else:
            c, *mask = conditions
            tokens = torch.cat([tokens, c], dim=1)
            given = [tuple(F.pad(m, (length, 0), value=True) for m in mask)] * len(self.blocks)
        for block, c_and_mask in zip(self.blocks, given, strict=True):
            tokens = block(tokens, *c_and_mask)
        tokens = tokens[:, :length]
        channels, rows, columns = self.out_shape
        shape = (self.tubelet_size * channels, rows, columns)
        output = unpatchify(self.final_layer(tokens, final), self.out_patch_size, shape)
        if not self.frames:
            return output, as_features(tokens, self.grid)
        features = as_features(tokens.reshape(-1, prod(self.grid), tokens.shape[2]), self.grid)
        return unfold_frames(output, self.frames, q), unfold_frames(features, self.frames, q)

    def condition(self, t: Tensor, y: Tensor | Text | None = None) -> list[Tensor]:
        """What the blocks and the final layer are given of `t` (N,) and of `y`, N labels or captions: tensors (N, …).

        Where LayerNorm is adaptive, shifts, scales and gates for each block and, last, for the final layer. Elsewhere
        the embeddings (N, n, width), the same for all blocks, and for captions their mask bool (N, n). They depend on
        nothing else, so that a sampler can have them computed once for all examples of a class, and for many steps.
        Raises MezzotintError for a `y` that is missing or of the other kind.
        """
        c, mask = self.t_embedder(t).unsqueeze(1), None
        if self.y_embedder is not None:
            embeddings, mask = embedded(self.y_embedder, y, pool=self.adaptive)
            c = torch.cat([c, embeddings], dim=1)
        if not self.adaptive:
            return [c] if mask is None else [c, F.pad(mask, (1, 0), value=True)]
        c = F.silu(c.sum(dim=1, keepdim=True))  # every regression layer starts with this SiLU: taken once for all
        return [layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)]


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


class AdaLNZeroBlock(Block):
    """Shift, scale and gate of both branches regressed from c; gates of zero make the block the identity at first.

    c (B, 1, 6·width) is what `adaLN_modulation` makes of the activated sum of the embeddings of time and class or text.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, adaln_hidden: int = 0) -> None:
        super().__init__(width, heads, mlp_ratio, affine=False)
        self.adaLN_modulation = _regression(width, 6, adaln_hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = c.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class AdaLNBlock(Block):
    """Shift and scale of both LayerNorms regressed from c (B, 1, 4·width)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, adaln_hidden: int = 0) -> None:
        super().__init__(width, heads, mlp_ratio, affine=False)
        self.adaLN_modulation = _regression(width, 4, adaln_hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = c.chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class CrossAttentionBlock(Block):
    """A transformer block with cross-attention to the embeddings c (B, n, width) between self-attention and MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.norm_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c, mask)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Tokens (B, T, width) → (B, T, out_features) by a LayerNorm (`adaptive`: modulated by c) and a linear layer."""

    def __init__(self, width: int, out_features: int, adaptive: bool, adaln_hidden: int = 0) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=not adaptive)
        self.linear = nn.Linear(width, out_features)
        if adaptive:
            self.adaLN_modulation = _regression(width, 2, adaln_hidden)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        x = self.norm_final(x)
        if c is not None:
            x = modulate(x, *c.chunk(2, dim=-1))
        return self.linear(x)


def _regression(width: int, vectors: int, hidden: int) -> nn.Sequential:
    """(…, width) → (…, vectors·width) by a linear layer, or by an MLP with a hidden width above 0."""
    # Official checkpoints number this linear layer 1, after the SiLU that DiT.forward takes once for all layers.
    if not hidden:
        return nn.Sequential(nn.Identity(), nn.Linear(width, vectors * width))
    return nn.Sequential(nn.Identity(), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, vectors * width))


BLOCKS: dict[str, Callable[..., Block]] = {
    "adaln-zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": TransformerBlock,
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
