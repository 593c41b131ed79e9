"""One DiffuSSM block against one DiT block of equal width, by the number of positions; one convolution against two.

Every row has the same number of positions in all (`--positions`), in sequences of L. Works are timed in turn in one
process, so that ratios compare like with like; absolute times are this machine's. Forward passes are those of
sampling, where the state spaces' kernels are known from the step before; with backward passes they are made anew.
`--write FILE` puts the tables into a Markdown file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from measure import machine, median, once, peak_mebibytes, table, write_section
from torch import Tensor, nn

from mezzotint.backbones.diffussm import Block, ScanOrder
from mezzotint.backbones.dit import AdaLNZeroBlock
from mezzotint.backbones.s4d import S4D, two_sided
from mezzotint.training.parallel import choose_device

LENGTHS = (256, 1024, 4096, 16_384)
LONGEST_MATRIX = 1024
HOURGLASS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
Work = Callable[[], object]


class TwoCausal(nn.Module):
    """What a bidirectional layer computes, as a convolution from either end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.there, self.back = S4D(width, bidirectional=False), S4D(width, bidirectional=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.there(u) + self.back(u.flip(1)).flip(1)


def forward(module: nn.Module, *inputs: Tensor) -> None:
    """A pass of sampling."""
    with torch.no_grad():
        module(*inputs)


def both(module: nn.Module, *inputs: Tensor) -> None:
    """A forward and a backward pass of training."""
    u, *rest = inputs
    module(u.detach().requires_grad_(), *rest).sum().backward()
    module.zero_grad(set_to_none=True)


TITLES = {forward: "forward", both: "forward and backward"}


def in_turn(works: dict[str, Work], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each work, called once a round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            times[name].append(once(work, device))
    return {name: median(values[1:]) for name, values in times.items()}


def block_works(
    run: Callable[..., None], length: int, positions: int, width: int, device: torch.device
) -> dict[str, Work]:
    """`run` on a block of either kind, over sequences of `length`."""
    batch, side = positions // length, round(length**0.5)
    torch.manual_seed(0)
    with device:
        ssm = Block(width, HOURGLASS, ScanOrder("row", side, side), S4D(width)).train(run is both)
        dit = AdaLNZeroBlock(width, width // 64, 4.0).train(run is both)
        groups, tokens = (torch.randn(batch, n, width) for n in (length // HOURGLASS, length))
        c, c_dit = (torch.randn(batch, 1, n * width) for n in (3, 6))
    return {"ssm": partial(run, ssm, groups, c), "dit": partial(run, dit, tokens, c_dit)}


def memory_table(lengths: Sequence[int], positions: int, width: int, device: torch.device) -> str:
    """Peak memory of both blocks. To come before what is timed: on a CPU, what is freed meanwhile goes back at once."""
    if device.type == "cpu":
        malloc_option(M_MMAP_THRESHOLD, 2**16)
    rows = []
    for run in (forward, both):
        for length in lengths:
            works = block_works(run, length, positions, width, device)
            for work in works.values():
                work()
            ssm, dit = (peak_mebibytes(works[name], device) for name in ("ssm", "dit"))
            title = f"{TITLES[run]}, {length:,} × {positions // length}"
            rows.append([title, f"{ssm:.0f} MiB", f"{dit:.0f} MiB", f"{ssm / dit:.2f}×"])
            print(rows[-1], flush=True)
    if device.type == "cpu":  # where glibc would have arrived by itself
        malloc_option(M_MMAP_THRESHOLD, 2**25)
        malloc_option(M_TRIM_THRESHOLD, 2**26)
    return table(["peak memory of a block, L × batch", "DiffuSSM", "DiT", "ratio"], rows)


def malloc_option(option: int, value: int) -> None:
    """glibc's mallopt, where there is a glibc."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").mallopt(option, value)


def block_tables(lengths: Sequence[int], positions: int, width: int, device: torch.device, repeats: int) -> str:
    """Time per position of both blocks, of a forward pass and of one with its backward pass."""
    texts = []
    for run, title in TITLES.items():
        rows = []
        shortest = 0.0
        for length in lengths:
            times = in_turn(block_works(run, length, positions, width, device), device, repeats)
            shortest = shortest or times["ssm"]
            rows.append(
                [
                    f"{length:,} × {positions // length}",
                    *(f"{t / positions * 1e6:.2f} µs" for t in times.values()),
                    f"{times['dit'] / times['ssm']:.2f}×",
                    f"{times['ssm'] / shortest:.2f}×",
                ]
            )
            print(rows[-1], flush=True)
        columns = ["DiffuSSM, per position", "DiT", "DiT's time over it", f"its own over that at {lengths[0]}"]
        texts.append(table([f"a block, {title}, L × batch", *columns], rows))
    return "\n".join(texts)


def direction_table(lengths: Sequence[int], positions: int, width: int, device: torch.device, repeats: int) -> str:
    """A bidirectional layer as one convolution, and as two."""
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        with device:
            fused, two = S4D(width), TwoCausal(width)
            u = torch.randn(positions // length, length, width)
        row = [f"{length:,} × {positions // length}"]
        for run in (forward, both):
            works: dict[str, Work] = {
                "one": partial(run, fused.train(run is both), u),
                "two": partial(run, two.train(run is both), u),
            }
            times = in_turn(works, device, repeats)
            row += [f"{t * 1e3:.1f} ms" for t in times.values()] + [f"{times['two'] / times['one']:.2f}×"]
        rows.append(row)
        print(row, flush=True)
    title = ["S4D alone, L × batch", "forward, one", "two", "ratio", "forward and backward, one", "two", "ratio"]
    return table(title, rows)


def form_table(lengths: Sequence[int], positions: int, width: int, device: torch.device, repeats: int) -> str:
    """The convolution of sampling by FFT, as the library does it, and by one L × L matrix product for each channel."""
    rows = []
    for length in lengths:
        torch.manual_seed(0)
        with device, torch.no_grad():
            layer, u = S4D(width).eval(), torch.randn(positions // length, length, width)
            circular = two_sided(layer.kernel(length), layer.D)
            lag = torch.arange(length)[:, None] - torch.arange(length)
            matrix = circular[:, lag % circular.shape[1]]

            def product(matrix: Tensor = matrix, u: Tensor = u) -> Tensor:
                return (matrix @ u.permute(2, 1, 0).contiguous()).permute(2, 1, 0).contiguous()

            torch.testing.assert_close(product(), layer(u), rtol=1e-3, atol=1e-3)
            times = in_turn({"fft": partial(forward, layer, u), "product": product}, device, repeats)
        size = matrix.numel() * 4 / 2**20
        row = [
            f"{length:,} × {positions // length}",
            *(f"{t * 1e3:.1f} ms" for t in times.values()),
            f"{size:,.0f} MiB",
        ]
        rows.append(row)
        print(row, flush=True)
    return table(["S4D alone in sampling, L × batch", "FFT", "matrix products", "the matrices"], rows)


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose section for this kind of device is replaced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64, which is a head")
    parser.add_argument("--positions", type=int, default=LENGTHS[-1], help="in a batch; a multiple of the lengths")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="squares")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = choose_device(options.device)
    settings = (options.lengths, options.positions, options.width, device, options.repeats)
    title = f"Measured on {machine(device)}, fp32, width {options.width}, hourglass {HOURGLASS}, state 64.\n"
    memory = memory_table(*settings[:4])
    short = ([64, *(length for length in options.lengths if length <= LONGEST_MATRIX)], *settings[1:])
    text = "\n".join([title, block_tables(*settings), direction_table(*settings), form_table(*short), memory])
    print(text)
    if options.write is not None:
        section = "DiffuSSM on a GPU" if device.type == "cuda" else "DiffuSSM on a CPU"
        write_section(options.write, section, Path(__file__).name, text)


if __name__ == "__main__":
    main()
