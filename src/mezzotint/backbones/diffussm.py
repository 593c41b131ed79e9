"""DiffuSSM, a diffusion network of state-space layers without attention (arXiv 2311.18257)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.dit import NORM_EPS, FinalLayer
from mezzotint.backbones.layers import LabelEmbedding, TimestepEmbedding, modulate, position_table
from mezzotint.backbones.s4d import S4D, Discretisation, Initialisation
from mezzotint.errors import MezzotintError, closest

Scan = Literal["row", "row-snake", "column", "column-snake"]


class DiffuSSM(nn.Module):
    """Gated bidirectional state-space blocks over the positions of an image or latent, linear in their number.

    The L = H·W / patch_size² positions (patches, where `patch_size` is above 1) are read row by row. Dense layers work
    on groups of M = `hourglass` neighbours, J = L / M vectors of `width`; state-space layers on all L positions, in the
    order `scan` (block k takes the k-th of its words, from the first again after the last). What enters and leaves is
    DiT's: a projection of each position to `width` (one for each of the M places in a group, added up), the position
    table (averaged over a group), adaptive normalisation, and a final layer that reads all p·p·M·out_channels numbers
    of a group.

    `num_classes` = 0 builds an unconditional network. Otherwise the label table has one row more than there are
    classes: row `num_classes` is the null class, which the training objective (not this module) puts in at random.
    `state`, `initialisation`, `discretisation` and `bidirectional` are S4D's.

    Raises MezzotintError when a side of `input_size` is not a multiple of `patch_size`, `hourglass` does not divide the
    number of positions and 2·width, `width` is not a multiple of 4, `scan` is empty or has an unknown word, or as S4D.
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
        width: int,
        depth: int,
        hourglass: int = 2,
        num_classes: int = 0,
        scan: Sequence[Scan] = ("row",),
        state: int = 64,
        initialisation: Initialisation = "lin",
        discretisation: Discretisation = "zoh",
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        if rows % patch_size or columns % patch_size:
            raise MezzotintError(
                f"input size {rows}×{columns} cannot be cut into patches of {patch_size}; use multiples of {patch_size}"
            )
        grid = rows // patch_size, columns // patch_size
        if (grid[0] * grid[1]) % hourglass or 2 * width % hourglass:
            raise MezzotintError(
                f"an hourglass of {hourglass} does not divide {grid[0] * grid[1]} positions and 2·width = {2 * width}; "
                "use a common divisor of both"
            )
        if not scan or (unknown := [word for word in scan if word not in get_args(Scan)]):
            hint = closest(unknown[0], get_args(Scan)) if scan else f"known: {', '.join(get_args(Scan))}"
            raise MezzotintError(f"scan {unknown[0]!r} is unknown; {hint}" if scan else f"scan is empty; {hint}")
        self.input_size = (rows, columns)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.hourglass = hourglass
        self.num_classes = num_classes

        self.x_embedder = GroupEmbedding(patch_size, hourglass * in_channels, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width) if num_classes else None
        table = position_table(width, *grid).unflatten(0, (-1, hourglass)).mean(dim=1)
        self.register_buffer("pos_embed", table.unsqueeze(0))
        self.blocks = nn.ModuleList(
            Block(
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
        self.final_layer = FinalLayer(width, hourglass * patch_size**2 * self.out_channels, adaptive=True)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's initialisation; the state-space layers have their own."""
        zero = ("bias", "final_layer.linear", "adaLN_modulation")
        own = {id(parameter) for parameter in self.ssm_parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in own:
                continue
            if any(part in name for part in zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter)

    def ssm_parameters(self) -> Iterator[nn.Parameter]:
        """Δ, A, C and D of all state-space layers: they have a learning rate of their own, and never decay."""
        return (parameter for module in self.modules() if isinstance(module, S4D) for parameter in module.parameters())

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, condition: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W).

        Computed in the parameters' dtype (state-space layers: float32 or better), whatever that of `x`; the output has
        it, too. `t` (B,) is time as the sinusoids see it (DiT: 0 to 999), best in float32. `y` (B,) int64 in
        [0, num_classes]; None for an unconditional network, which does not look at it. `condition` is what
        `self.condition(t, y)` gave, where it is known already. Raises MezzotintError for an `x` of another shape and
        for a missing `y`.
        """
        if x.shape[1:] != (self.in_channels, *self.input_size):
            rows, columns = self.input_size
            raise MezzotintError(
                f"input has shape {tuple(x.shape)}, expected (B, {self.in_channels}, {rows}, {columns}); "
                "resize it or build the network with that input_size and in_channels"
            )
        *conditions, final = self.condition(t, y) if condition is None else condition
        groups = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        for block, c in zip(self.blocks, conditions, strict=True):
            groups = block(groups, c)
        return self._unpatchify(self.final_layer(groups, final))

    def condition(self, t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """What each block, and last the final layer, is given of `t` and `y` (N,): shifts, scales, gates (N, 1, …).

        They depend on nothing else, so that a sampler can have them computed once for all examples of a class, and for
        many steps. Raises MezzotintError for a missing `y`.
        """
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            if y is None:
                raise MezzotintError(
                    f"class labels are missing; pass y (B,), with {self.num_classes} where there is no class"
                )
            c = c + self.y_embedder(y)
        c = F.silu(c.unsqueeze(1))
        return [layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)]

    def _unpatchify(self, groups: Tensor) -> Tensor:
        """(B, J, M·p·p·C) → (B, C, H, W)."""
        p = self.patch_size
        rows, columns = self.input_size
        patches = groups.reshape(-1, rows // p, columns // p, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows, columns)


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

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """c (B, 1, 3·width) is what `adaLN_modulation` made of time and class."""
        shift, scale, gate = c.chunk(3, dim=-1)
        i = modulate(self.norm(x), shift, scale)
        u = _activated(self.up(_activated(self.w0(i)))).unflatten(-1, (-1, self.width)).flatten(1, 2)
        y = self.ssm_out(_activated(self.order.undo(self.ssm(self.order(u)))))
        y = y.unflatten(1, (x.shape[1], -1))
        hidden = torch.cat([down(y[:, :, k]) for k, down in enumerate(self.down)], dim=-1)
        o = self.w3(_activated(self.w2(_activated(hidden))) * _activated(self.w1(i)))
        return torch.addcmul(x, gate, o)


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
