"""DiffuSSM, a diffusion network of state-space layers without attention (arXiv 2311.18257)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.dit import FinalLayer
from mezzotint.backbones.layers import (
    NORM_EPS,
    CrossAttention,
    Layer,
    TimestepEmbedding,
    add_features,
    as_features,
    check_input,
    modulate,
    out_shape,
    patch_grid,
    position_table,
    unpatchify,
)
from mezzotint.backbones.s4d import S4D, Discretisation, Initialisation
from mezzotint.backbones.text import condition_embedding, embedded, head_count
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError, closest

Scan = Literal["row", "row-snake", "column", "column-snake"]
Conditioning = Literal["adaln-zero", "cross-attention", "in-context"]


class DiffuSSM(nn.Module):
    """Gated bidirectional state-space blocks over the positions of an image or latent, linear in their number.

    The L = H·W / patch_size² positions (patches, where `patch_size` is above 1) are read row by row. Dense layers work
    on groups of M = `hourglass` neighbours, J = L / M vectors of `width`; state-space layers on all L positions, in the
    order `scan` (block k takes the k-th of its words, from the first again after the last). What enters and leaves is
    DiT's: a projection of each position to `width` (one for each of the M places in a group, added up), the position
    table (averaged over a group), adaptive normalisation, and a final layer that reads all p·p·M·out_channels numbers
    of a group, p being `out_patch_size`, or `patch_size` where not given.

    `num_classes` = 0 builds an unconditional network. Otherwise the label table has one row more than there are
    classes: row `num_classes` is the null class, which the training objective (not this module) puts in at random.
    `state`, `initialisation`, `discretisation` and `bidirectional` are S4D's.

    `text_features`, in the place of classes, builds a network of captions: above 0, of a frozen encoder's features of
    that width; 0, of bytes, with an encoder that is trained along. `conditioning` says how captions enter (time always
    enters by adaptive normalisation): adaln-zero, the mean of the tokens is added to the embedding of time;
    cross-attention, each block's groups first attend to the tokens; in-context, each token is a group of its own, and
    these stand before the image's in every sequence, whatever the scan. Padding is masked, and changes nothing.

    Inside another network it has `feature_channels` features at every `feature_stride` pixels (`forward_features`).

    Raises MezzotintError when a side of `input_size` is not a multiple of `patch_size`, `hourglass` does not divide the
    number of positions and 2·width, `width` is not a multiple of 4, `scan` is empty or has an unknown word, there are
    both classes and captions, `conditioning` is unknown or not adaln-zero without captions, or as S4D.
    """

    pos_embed: Tensor
    adaptive = True

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch_size: int = 1,
        in_channels: int,
        out_channels: int | None = None,
        out_patch_size: int | None = None,
        width: int,
        depth: int,
        hourglass: int = 2,
        num_classes: int = 0,
        text_features: int | None = None,
        conditioning: Conditioning = "adaln-zero",
        scan: Sequence[Scan] = ("row",),
        state: int = 64,
        initialisation: Initialisation = "lin",
        discretisation: Discretisation = "zoh",
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        grid = patch_grid(self.input_size, patch_size)
        if (grid[0] * grid[1]) % hourglass or 2 * width % hourglass:
            raise MezzotintError(
                f"an hourglass of {hourglass} does not divide {grid[0] * grid[1]} positions and 2·width = {2 * width}; "
                "use a common divisor of both"
            )
        if not scan or (unknown := [word for word in scan if word not in get_args(Scan)]):
            hint = closest(unknown[0], get_args(Scan)) if scan else f"known: {', '.join(get_args(Scan))}"
            raise MezzotintError(f"scan {unknown[0]!r} is unknown; {hint}" if scan else f"scan is empty; {hint}")
        if conditioning not in get_args(Conditioning):
            raise MezzotintError(
                f"conditioning {conditioning!r} is unknown; {closest(conditioning, get_args(Conditioning))}"
            )
        if text_features is None and conditioning != "adaln-zero":
            raise MezzotintError(
                f"conditioning {conditioning} needs captions; set text_features, or take conditioning adaln-zero"
            )
        self.patch_size = patch_size
        self.feature_channels = width
        self.feature_stride = (patch_size, patch_size * hourglass)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.out_patch_size = out_patch_size or patch_size
        self.out_shape = out_shape(self.out_channels, grid, self.out_patch_size)
        self.hourglass = hourglass
        self.num_classes = num_classes
        self.text_features = text_features
        self.conditioning = conditioning

        self.x_embedder = GroupEmbedding(patch_size, hourglass * in_channels, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = condition_embedding(num_classes, text_features, width)
        table = position_table(width, *grid).unflatten(0, (-1, hourglass)).mean(dim=1)
        self.register_buffer("pos_embed", table.unsqueeze(0))
        block = CrossAttentionBlock if conditioning == "cross-attention" else Block
        self.blocks = nn.ModuleList(
            block(
                width,
                hourglass,
                ScanOrder(scan[k % len(scan)], *grid),
                S4D(
                    width,
                    state=state,
                    initialisation=initialisation,
                    discretisation=discretisation,
                    bidirectional=bidirectional,
                ),
            )
            for k in range(depth)
        )
        self.final_layer = FinalLayer(width, hourglass * self.out_patch_size**2 * self.out_channels, adaptive=True)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's initialisation; state-space layers and text have their own, and captions are not attended to yet."""
        zero = ("bias", "final_layer.linear", "adaLN_modulation", "cross_attn.proj")
        own = {id(parameter) for parameter in self.ssm_parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in own or name.startswith("y_embedder.encoder"):
                continue
            if any(part in name for part in zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def ssm_parameters(self) -> Iterator[nn.Parameter]:
        """Δ, A, C and D of all state-space layers: they have a learning rate of their own, and never decay."""
        return (parameter for module in self.modules() if isinstance(module, S4D) for parameter in module.parameters())

    @property
    def layers(self) -> dict[str, Layer]:
        """The blocks, "1" to their number, in order of execution; captions stand before the image's groups."""
        return {str(k): Layer(block, slice(-self.pos_embed.shape[1], None)) for k, block in enumerate(self.blocks, 1)}

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | Text | None = None, *, condition: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W).

        Computed in the parameters' dtype (state-space layers: float32 or better), whatever that of `x`; the output has
        it, too. `t` (B,) is time as the sinusoids see it (DiT: 0 to 999), best in float32. `y`: labels (B,) int64 in
        [0, num_classes], or a Text of B captions; None for an unconditional network, which does not look at it.
        `condition` is what `self.condition(t, y)` gave, where it is known already. Raises MezzotintError for an `x` of
        another shape and for a `y` that is missing or of the other kind.
        """
        conditions = self.condition(t, y) if condition is None else condition
        return self._decoded(self._through(self._encoded(x), conditions), conditions)

    def forward_features(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | None,
        features: Tensor | None,
        *,
        condition: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, for a network inside another: its output, and its groups before the final layer.

        `features` (B, feature_channels, H / p, W / pM) are added to the groups that enter the blocks; the groups that
        leave them have that shape, too. Raises MezzotintError as `forward`, for features of another shape, and where
        groups of M neighbours go beyond the end of a row.
        """
        columns, (down, across) = self.input_size[1], self.feature_stride
        if columns % across:
            raise MezzotintError(
                f"rows of {columns // self.patch_size} positions cannot be cut into groups of {self.hourglass}, so "
                "that there is no grid of features; use an hourglass that divides them"
            )
        grid = self.input_size[0] // down, columns // across
        conditions = self.condition(t, y) if condition is None else condition
        groups = self._through(add_features(self._encoded(x), features, grid), conditions)
        return self._decoded(groups, conditions), as_features(groups, grid)

    def condition(self, t: Tensor, y: Tensor | Text | None = None) -> list[Tensor]:
        """What the network is given of `t` (N,) and of `y`, N labels or captions: tensors (N, …).

        Shifts, scales and gates (N, 1, …) for each block and then for the final layer; after them, but for adaln-zero,
        the tokens of captions (N, n, width) and their mask bool (N, n). They depend on nothing else, so that a sampler
        can have them computed once for all examples of a class, and for many steps. Raises MezzotintError for a `y`
        that is missing or of the other kind.
        """
        c, text = self.t_embedder(t).unsqueeze(1), []
        if self.y_embedder is not None:
            embeddings, mask = embedded(self.y_embedder, y, pool=self.conditioning == "adaln-zero")
            if mask is None:
                c = c + embeddings
            else:
                text = [embeddings, mask]
        c = F.silu(c)
        return [layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)] + text

    def _encoded(self, x: Tensor) -> Tensor:
        check_input(x, (self.in_channels, *self.input_size))
        return self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed

    def _through(self, groups: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """The groups (B, J, width) after all blocks."""
        count, depth = groups.shape[1], len(self.blocks)
        text: Sequence[Tensor] = conditions[depth + 1 :]
        if self.conditioning == "in-context":
            tokens, mask = _flush_right(*text)
            groups = torch.cat([tokens, groups], dim=1)
            text = [mask.repeat_interleave(self.hourglass, dim=1)]
        for block, c in zip(self.blocks, conditions[:depth], strict=True):
            groups = block(groups, c, *text)
        return groups[:, groups.shape[1] - count :]

    def _decoded(self, groups: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """(B, J, width) → (B, *out_shape)."""
        numbers = self.final_layer(groups, conditions[len(self.blocks)])
        return unpatchify(numbers, self.out_patch_size, self.out_shape)


def _flush_right(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, n, width) with the padding first: a caption ends where the image begins, whatever else is there."""
    mask, order = mask.sort(dim=1, stable=True)
    return tokens.gather(1, order.unsqueeze(-1).expand_as(tokens)), mask


class GroupEmbedding(nn.Module):
    """(B, C, H, W) → (B, J, width): p×p patches read row by row, M neighbours (`channels` = M·C) projected at once."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, rows, columns = x.shape
        p = self.patch_size
        patches = x.reshape(batch, channels, rows // p, p, columns // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.proj(patches.reshape(batch, -1, self.proj.in_features))


class ScanOrder:
    """The order in which a sequence visits a rows × columns grid; calling it reads (B, L, D) in that order.

    A snake turns around at every other row (column) instead of jumping back.
    """

    def __init__(self, scan: Scan, rows: int, columns: int) -> None:
        self.by_column, self.snake = scan.startswith("column"), scan.endswith("snake")
        self.rows, self.columns = rows, columns

    def __call__(self, x: Tensor) -> Tensor:
        """From row by row to this order."""
        if self.by_column:
            x = x.unflatten(1, (self.rows, self.columns)).transpose(1, 2).flatten(1, 2)
        return self._turned(x)

    def undo(self, x: Tensor) -> Tensor:
        """From this order to row by row."""
        x = self._turned(x)
        if self.by_column:
            x = x.unflatten(1, (self.columns, self.rows)).transpose(1, 2).flatten(1, 2)
        return x

    def _turned(self, x: Tensor) -> Tensor:
        """Every other line backwards, which is its own inverse."""
        if not self.snake:
            return x
        lines = x.unflatten(1, (-1, self.rows if self.by_column else self.columns)).clone()
        lines[:, 1::2] = lines[:, 1::2].flip(2)
        return lines.flatten(1, 2)


class Block(nn.Module):
    """A gated state-space layer between dense layers, I (B, J, width) → (B, J, width), inside a residual (section 3.2).

        U_l  = σ(W↑_k σ(W⁰ I_j))           l = jM + k, 0 ≤ k < M        (B, L, width)
        Y    = W^Y σ(SSM(U))                                            (B, L, width)
        I′_j = concat_k σ(W↓_k Y_{jM+k})                                (B, J, 2·width)
        O_j  = W³ (σ(W² I′_j) ⊙ σ(W¹ I_j))                              (B, J, width)

    I is the block's input after a LayerNorm with shift and scale, and O passes a gate of zero at first: DiT's
    adaptive normalisation, its three vectors regressed from c. σ is the GELU. All dense layers have a
    bias. With D = width they have, without biases, (11 + M)·D² weights but for W^Y's D², and take (11 + M)·J·D² + L·D²
    multiply-adds: the paper's 9D² + 2MD² and 13·(L/M)·D² + L·D² at its M of 2.
    """

    def __init__(self, width: int, hourglass: int, order: ScanOrder, ssm: S4D) -> None:
        super().__init__()
        self.width = width
        self.order = order
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Linear(width, 3 * width)
        self.w0 = nn.Linear(width, width)
        self.up = nn.Linear(width, hourglass * width)
        self.ssm = ssm
        self.ssm_out = nn.Linear(width, width)
        self.down = nn.ModuleList(nn.Linear(width, 2 * width // hourglass) for _ in range(hourglass))
        self.w1 = nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, 2 * width)
        self.w3 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, c: Tensor, text: Tensor | None = None) -> Tensor:
        """c (B, 1, 3·width) is what `adaLN_modulation` made of time and class.

        `text` bool (B, n): the first n of the L positions are not the image's but a caption's; where one is.
        """
        shift, scale, gate = c.chunk(3, dim=-1)
        i = modulate(self.norm(x), shift, scale)
        u = _activated(self.up(_activated(self.w0(i)))).unflatten(-1, (-1, self.width)).flatten(1, 2)
        y = self.ssm_out(_activated(self._scanned(u, text)))
        y = y.unflatten(1, (x.shape[1], -1))
        hidden = torch.cat([down(y[:, :, k]) for k, down in enumerate(self.down)], dim=-1)
        o = self.w3(_activated(self.w2(_activated(hidden))) * _activated(self.w1(i)))
        return torch.addcmul(x, gate, o)

    def _scanned(self, u: Tensor, text: Tensor | None) -> Tensor:
        """SSM(U): captions in reading order, padding silent, and then the image in this block's order."""
        if text is None:
            return self.order.undo(self.ssm(self.order(u)))
        n = text.shape[1]
        caption = u[:, :n] * text.unsqueeze(-1)
        y = self.ssm(torch.cat([caption, self.order(u[:, n:])], dim=1))
        return torch.cat([y[:, :n], self.order.undo(y[:, n:])], dim=1)


class CrossAttentionBlock(Block):
    """A block whose groups first attend to a caption's tokens, inside a residual of their own."""

    def __init__(self, width: int, hourglass: int, order: ScanOrder, ssm: S4D) -> None:
        super().__init__(width, hourglass, order, ssm)
        self.norm_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, head_count(width))

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """tokens (B, n, width), mask bool (B, n)."""
        return super().forward(x + self.cross_attn(self.norm_cross(x), tokens, mask), c)


def _activated(x: Tensor) -> Tensor:
    return F.gelu(x)


class DiffuSSMConfig(TypedDict):
    """What the sizes differ in, as keyword arguments of DiffuSSM."""

    depth: int
    width: int
    patch_size: int


#: The paper gives XL's depth alone, one more than DiT-XL's; S and L follow it: one more than DiT's of that letter.
DIFFUSSM_CONFIGS: dict[str, DiffuSSMConfig] = {
    "diffussm-s": {"depth": 13, "width": 384, "patch_size": 1},
    "diffussm-l": {"depth": 25, "width": 768, "patch_size": 1},
    "diffussm-xl": {"depth": 29, "width": 1152, "patch_size": 1},
}
