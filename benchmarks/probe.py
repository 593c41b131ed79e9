"""Feature extraction for probes against the forward pass of the same network.

Features of all layers and of those up to the middle, from one pass each, and what 'mezzotint probe' does besides:
reading images and gathering features. All are timed in turn in one process. `--write FILE` puts the table into a
Markdown file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import machine, median, once, table, write_section
from torch import Tensor

import mezzotint
from mezzotint.data import InMemoryImages
from mezzotint.denoiser import Denoiser
from mezzotint.evaluation.probing import features_of, model_view
from mezzotint.evaluation.sources import DatasetSource
from mezzotint.features import layers_of, pooled_features
from mezzotint.training.parallel import choose_device

PIXELS = ("representation=pixels", "data=digits", "data.size=32", "data.channels=3", "variance=none")
NETWORKS = {
    "DiT-S/2": ("dit-s-2-256", PIXELS),
    "DiffuSSM, width 256, depth 8": (
        "diffussm-s-256",
        (*PIXELS, "backbone.width=256", "backbone.depth=8"),
    ),
    "UNet, 64 to 192": (
        "dit-s-2-256",
        (
            *PIXELS,
            "backbone=unet",
            "backbone.channels=[64,128,192]",
            "backbone.resblocks=[2,2,2]",
            "backbone.attention=[0,1,2]",
        ),
    ),
    "the same, nested": (
        "mdm-emoji-32",
        ("condition=class", "data=digits", "data.size=32", "data.channels=3", "data.test_fraction=0",
         "backbone.channels=[64,128,192]", "backbone.resblocks=[2,2,2]", "backbone.attention=[0,1,2]"),
    ),
}  # fmt: skip
TIME = 0.01


@torch.no_grad()
def forward(denoiser: Denoiser, x: Tensor) -> None:
    """A whole pass, without class."""
    denoiser(x, TIME)


def measured(recipe: str, words: tuple[str, ...], device: torch.device, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of a forward pass, and the rates of the other ways over its own."""
    pipeline = mezzotint.build(mezzotint.load_recipe(recipe, words), device=device)
    denoiser = pipeline.denoiser
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    source = DatasetSource(InMemoryImages(images, torch.zeros(batch).long(), ("one",), "random"))
    x = pipeline.representation.encode(images.to(device) / 127.5 - 1)
    half = list(layers_of(denoiser))[: len(layers_of(denoiser)) // 2]
    view = model_view(pipeline, [], TIME)
    works: dict[str, Callable[[], object]] = {
        "forward": partial(forward, denoiser, x),
        "all": partial(pooled_features, denoiser, x, TIME),
        "half": partial(pooled_features, denoiser, x, TIME, half),
        "probe": partial(features_of, view, source, 0, batch_size=batch, cache=False),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            times[name].append(once(work, device))
    # Within a round the machine is the same for all: the ratio is the median of the rounds' ratios.
    ratios = {
        name: median([f / own for f, own in zip(times["forward"][1:], values[1:], strict=True)])
        for name, values in times.items()
    }
    return ratios | {"seconds": median(times["forward"][1:])}


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose section for this kind of device is replaced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="images at a time; default 8 on a CPU, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    device = choose_device(options.device)
    batch = options.batch or (128 if device.type == "cuda" else 8)
    rows = []
    for title, (recipe, words) in NETWORKS.items():
        found = measured(recipe, words, device, batch, options.repeats)
        forward_time = f"{1e3 * found['seconds'] / batch:.1f} ms"
        rows.append([title, forward_time, *(f"{found[name]:.0%}" for name in ("all", "probe", "half"))])
        print(rows[-1], flush=True)
    columns = [
        "32×32×3",
        "forward, per image",
        "features of all layers",
        "with images read, features kept",
        "half the layers",
    ]
    text = f"Measured on {machine(device)}, fp32 eager, a batch of {batch}; rates over that of the forward pass.\n\n"
    text += table(columns, rows)
    print(text)
    if options.write is not None:
        section = "probing on a GPU" if device.type == "cuda" else "probing on a CPU"
        write_section(options.write, section, Path(__file__).name, text)


if __name__ == "__main__":
    main()
