"""What nesting costs: a training step of a Matryoshka network at 128 pixels against its inner UNet at 128 pixels.

The inner UNet works at 64 pixels, with one outer level around it; alone, it works at 128 pixels itself. Both are timed
in turn in one process, a forward and a backward pass on the same captions. `--write FILE` puts the table into a
Markdown file.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import machine, median, once, table, write_section
from torch import Tensor, nn

from mezzotint.backbones import NestedUNet, UNet
from mezzotint.backbones.nested import MDM_CONFIGS
from mezzotint.conditions.text import Text, byte_tokens
from mezzotint.denoiser import in_shape
from mezzotint.evaluation.cost import cost
from mezzotint.training.parallel import choose_device

INNER: dict[str, Any] = {
    "channels": (64, 128, 192),
    "resblocks": (2, 2, 2),
    "attention": (0, 1, 2),
    "feed_forward": True,
    "heads": 4,
}
OUTER: dict[str, Any] = {"channels": (16, 32), "resblocks": (2, 1)}
SIDE = 64


def networks(published: bool) -> tuple[nn.Module, nn.Module]:
    """The nested network at twice SIDE, and the inner one at that size."""
    inner, outer = dict(INNER), dict(OUTER)
    if published:  # its outer network is four times as large as the inside; one halving of it is twice
        inner = {**MDM_CONFIGS["mdm-64"][0]}
        outer = {"channels": (64, 128), "resblocks": (2, 2)}
    for name in ("input_size", "text_features"):
        inner.pop(name, None)
    nested = NestedUNet(UNet(**inner, input_size=SIDE, text_features=0), **outer)
    return nested, UNet(**inner, input_size=2 * SIDE, text_features=0)


def step(network: nn.Module, x: Tensor, t: Tensor, y: Text) -> None:
    """A forward and a backward pass."""
    network(x, t, y).square().mean().backward()
    network.zero_grad(set_to_none=True)


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose section for this kind of device is replaced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--published", action="store_true", help="the published 64-pixel network inside, for a GPU")
    options = parser.parse_args()
    device = choose_device(options.device)
    torch.manual_seed(0)
    y = byte_tokens(["a red heart", "grinning face"] * options.batch, 32)[: options.batch].to(device)
    t = torch.randint(0, 1000, (options.batch,), device=device).float()
    works, costs = {}, {}
    for name, network in zip(("nested", "plain"), networks(options.published), strict=True):
        network.to(device)
        x = torch.randn(options.batch, *in_shape(network), device=device)
        works[name] = partial(step, network, x, t, y)
        costs[name] = cost(network, (x[:1], t[:1], y[:1]))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.repeats + 1):
        for name, work in works.items():
            times[name].append(once(work, device))
    seconds = {name: median(values[1:]) for name, values in times.items()}
    rows = [
        [title, f"{costs[name].params / 1e6:.1f}M", f"{costs[name].gmacs:.2f}", f"{1e3 * seconds[name]:,.0f} ms",
         f"{seconds[name] / seconds['plain']:.2f}×"]
        for name, title in (("nested", f"nested, {SIDE} → {2 * SIDE}"), ("plain", f"the inner UNet at {2 * SIDE}"))
    ]  # fmt: skip
    text = f"Measured on {machine(device)}, fp32, a batch of {options.batch}.\n\n" + table(
        ["", "parameters", "GMACs an image", "training step", "time over the plain one's"], rows
    )
    print(text)
    if options.write is not None:
        section = "nesting on a GPU" if device.type == "cuda" else "nesting on a CPU"
        write_section(options.write, section, Path(__file__).name, text)


if __name__ == "__main__":
    main()
