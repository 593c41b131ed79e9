"""How fast training gets its data: photographs decoded anew every epoch, against latents encoded once.

Photographs and latents are made up, in a temporary folder: what they cost does not depend on what they show. All is
measured in one process, in turn, so ratios compare like with like; absolute rates are this machine's. `--write FILE`
puts the tables into a Markdown file.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, median, table, write_section
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from mezzotint.data import BatchOrder, CachedLatents, ImageDataset, encode_dataset, image_folder, iterate_batches
from mezzotint.data.latents import cached_latents

SIZE, BATCH = 256, 256
COLD_SHARE = 4  # of the latents, one in so many is read when the files are not in memory, which takes longer


def make_photographs(folder: Path, count: int) -> float:
    """JPEGs of 500 × 375 pixels at quality 95, noise at every scale as in a photograph; returns their mean KiB."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        pixels = np.zeros((375, 500, 3), np.float32)
        for octave in range(9):
            side = 2 ** (octave + 1)
            noise = rng.normal(size=(side, side, 3)).astype(np.float32) / 1.25**octave
            levels = Image.fromarray(((noise + 4) * 32).clip(0, 255).astype(np.uint8))
            pixels += np.asarray(levels.resize((500, 375), Image.Resampling.BICUBIC), np.float32) - 128
        Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=95)
    return sum(file.stat().st_size for file in folder.iterdir()) / count / 1024


class Blank:
    """So many images of nothing."""

    image_shape, class_names, identity = (3, SIZE, SIZE), (), "blank"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.empty(self.image_shape, dtype=torch.uint8), -1


class Random:
    """In an autoencoder's place: moments that have the shape of Stable Diffusion's, and cost nothing."""

    channels, stride, precision, tiling, scale, shift, digest = 4, 8, "fp32", False, 0.18215, 0.0, "random"
    device = torch.device("cpu")

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = torch.randn(2, len(images), 4, SIZE // 8, SIZE // 8)
        return mean, log_variance


def prepare(folder: Path, state: str) -> None:
    """Have the folder's files in the page cache ("warm"), or out of it as far as the system lets us ("cold")."""
    for path in folder.rglob("*.*"):
        if state == "warm":
            path.read_bytes()
            continue
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def rate(dataset: ImageDataset, steps: int, workers: int, seed: int, use: Callable[[Tensor], object]) -> float:
    """Images a second, from the first request to the last batch."""
    order = BatchOrder.over(dataset, BATCH, seed)
    begun = time.perf_counter()
    for batch in iterate_batches(dataset, order, start_step=0, stop_step=steps, workers=workers):
        use(batch.images)
    return steps * BATCH / (time.perf_counter() - begun)


def draw(dataset: CachedLatents) -> Callable[[Tensor], Tensor]:
    """What training does with a batch of moments: choose image or mirror image, draw from the posterior, scale."""
    which, eps = torch.rand(BATCH) < 0.5, torch.randn(BATCH, *dataset.latent_shape)
    return lambda moments: dataset.encode(dataset.mirror(moments, which), eps)


def encoder_rate(batch: int = 4) -> float:
    """Images a second through an encoder of Stable Diffusion's size (its weights do not matter); NaN without it."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        return float("nan")
    network: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    )
    network.eval()
    images = torch.randn(batch, 3, SIZE, SIZE)
    times = []
    with torch.inference_mode():
        for _ in range(4):  # the first warms up
            begun = time.perf_counter()
            network.encode(images)
            times.append(time.perf_counter() - begun)
    return batch / median(times[1:])


def by_map(dataset: CachedLatents) -> Callable[[Tensor], Tensor]:
    """Rows of float32 moments through memory maps of numpy's."""
    size, shape = dataset.info.shard_size, (8, SIZE // 8, SIZE // 8)
    maps = [
        [np.memmap(s.path, np.float32, "r", offset, (len(s.labels), *shape)) for offset in s.offsets.values()]
        for s in dataset.shards
    ]

    def read(indices: Tensor) -> Tensor:
        moments = torch.empty(len(indices), 2, *shape)
        for row, i in zip(moments.numpy(), indices.tolist(), strict=True):
            for side in (0, 1):
                row[side] = maps[i // size][side][i % size]
        return moments

    return read


def by_slice(dataset: CachedLatents) -> Callable[[Tensor], Tensor]:
    """Rows of float32 moments through safetensors' slices."""
    size, shape = dataset.info.shard_size, (8, SIZE // 8, SIZE // 8)
    slices = []
    for shard in dataset.shards:
        with safe_open(str(shard.path), "pt") as file:
            slices.append([file.get_slice(name) for name in shard.offsets])

    def read(indices: Tensor) -> Tensor:
        moments = torch.empty(len(indices), 2, *shape)
        for row, i in zip(moments, indices.tolist(), strict=True):
            for side in (0, 1):
                row[side] = slices[i // size][side][i % size]
        return moments

    return read


def by_read(dataset: CachedLatents) -> Callable[[Tensor], Tensor]:
    """What the library does."""
    return lambda indices: dataset.get_batch(indices)[0]


def reading_rate(folder: Path, way: Callable[[CachedLatents], Callable[[Tensor], Tensor]], state: str) -> float:
    """Rows a second, files and maps opened anew: what is mapped cannot be dropped from memory."""
    gc.collect()
    prepare(folder, state)
    dataset = cached_latents(folder, flip=True)
    order, read = BatchOrder.over(dataset, BATCH), way(dataset)
    steps = len(dataset) // BATCH // (COLD_SHARE if state == "cold" else 1)
    begun = time.perf_counter()
    for step in range(steps):
        read(order.indices(step))
    return steps * BATCH / (time.perf_counter() - begun)


def reading_table(folder: Path, rounds: int) -> str:
    """Random rows of a float32 cache, with mirror images, by each way of reading them."""
    ways = {"memory map (numpy.memmap)": by_map, "positioned reads (the library)": by_read, "safetensors": by_slice}
    rates: dict[tuple[str, str], list[float]] = {(name, state): [] for name in ways for state in ("cold", "warm")}
    for _ in range(rounds):
        for name, state in rates:
            rates[name, state].append(reading_rate(folder, ways[name], state))
            print(name, state, f"{rates[name, state][-1]:,.0f}", flush=True)
    base = {state: median(rates[next(iter(ways)), state]) for state in ("cold", "warm")}
    cells = {key: f"{median(values):,.0f} ({median(values) / base[key[1]]:.2f}×)" for key, values in rates.items()}
    return table(
        ["random rows, float32, with mirror images", "cold, rows/s", "warm, rows/s"],
        [[name, cells[name, "cold"], cells[name, "warm"]] for name in ways],
    )


def photograph_rate(photos: ImageDataset, workers: int, seed: int) -> float:
    """Photographs decoded a second."""
    return rate(photos, len(photos) // BATCH, workers, seed, lambda images: None)


def latent_rate(dataset: CachedLatents, workers: int, state: str, seed: int) -> float:
    """Latents read and drawn a second."""
    prepare(dataset.folder, state)
    steps = len(dataset) // BATCH // (COLD_SHARE if state == "cold" else 1)
    return rate(dataset, steps, workers, seed, draw(dataset))


def loading_table(root: Path, photographs: int, latents: int, rounds: int) -> str:
    """Images a second from photographs and from latents, with and without workers."""
    kilobytes = make_photographs(root / "photographs", photographs)
    photos = image_folder(root / "photographs", SIZE, labels=False)
    caches = {}
    for dtype in ("float32", "float16"):
        encode_dataset(Blank(latents), Random(), root / dtype, dtype=dtype)  # type: ignore[arg-type]
        caches[dtype] = cached_latents(root / dtype, flip=True)
    works: dict[str, Callable[[int], float]] = {}
    for workers in (0, 2):
        works[f"photographs, {workers} workers"] = partial(photograph_rate, photos, workers)
    for dtype, dataset in caches.items():
        for workers in (0, 2):
            for state in ("cold", "warm"):
                works[f"latents, {dtype}, {workers} workers, {state}"] = partial(latent_rate, dataset, workers, state)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name, work in works.items():
            rates[name].append(work(turn))
            print(name, f"{rates[name][-1]:,.0f}", flush=True)
    base = median(rates["photographs, 0 workers"])
    rows = [[name, f"{median(values):,.0f}", f"{median(values) / base:,.1f}×"] for name, values in rates.items()]
    encoder = encoder_rate()
    rows.append(["photographs must then pass Stable Diffusion's encoder", f"{encoder:,.2f}", f"{encoder / base:,.4f}×"])
    title = [f"{SIZE} × {SIZE}, batch {BATCH}, random order", "images/s", "against photographs, 0 workers"]
    note = (
        f"Photographs: {photographs} JPEGs of 500 × 375 pixels, quality 95, {kilobytes:.0f} KiB each, decoded, resized "
        f"and cropped. Latents: {latents:,}, with mirror images, read, chosen and drawn from the posterior.\n"
    )
    return f"{table(title, rows)}\n{note}"


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose marked section is replaced")
    parser.add_argument("--photographs", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.photographs < BATCH or options.latents < COLD_SHARE * BATCH:
        raise SystemExit(f"at least {BATCH} photographs and {COLD_SHARE * BATCH} latents are needed")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tables = [loading_table(root, options.photographs, options.latents, options.rounds)]
        tables.append(reading_table(root / "float32", options.rounds))
    text = "\n".join([f"Measured on {machine(torch.device('cpu'))}.\n", *tables])
    print(text)
    if options.write is not None:
        write_section(options.write, "loading", Path(__file__).name, text)


if __name__ == "__main__":
    main()
