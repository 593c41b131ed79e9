"""How much of its training images a model knows from their captions: python benchmarks/caption_error.py RUN.

Mean squared error of the predicted images, in [-1, 1], of each level at each time: told the image's own caption, and
told none. At t near 1 there is nothing else to go by: an error of 0 is an image known by heart.
"""

from __future__ import annotations

import argparse
import math

import torch
from measure import table

from mezzotint import load
from mezzotint.data import CaptionedDataset
from mezzotint.data.transforms import to_float
from mezzotint.training.loop import encoder_of

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--levels", type=int, help="Only the first so many levels.")
    parser.add_argument("--count", type=int, default=128, help="Images, spread over the training set.")
    arguments = parser.parse_args()
    pipeline = load(arguments.run)
    denoiser, dataset = pipeline.denoiser, pipeline.recipe.data.load("train")
    if not denoiser.text or not isinstance(dataset, CaptionedDataset):
        raise SystemExit("this model is not asked by captions; give a run of one that is")
    numbers = torch.linspace(0, len(dataset) - 1, arguments.count, dtype=torch.float64).round().long().tolist()
    images = to_float(torch.stack([dataset[number][0] for number in numbers]))
    captions = [found[0] for found in dataset.captions(numbers)]
    sizes = [math.prod(shape) for shape in denoiser.level_shapes][: arguments.levels]
    x = encoder_of(dataset, pipeline).encode(images)[:, : sum(sizes)]
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    asked = [pipeline.captioner.encode(some) for some in (captions, [""] * len(captions))]
    rows = []
    for time in TIMES:
        t = torch.full((len(x),), time)
        c = denoiser.interpolant.coefficients(t, x)
        found = [(denoiser(c.alpha * x + c.sigma * eps, t, y).data - x).square().split(sizes, dim=1) for y in asked]
        rows.append([f"{time:g}", *(f"{part.mean():.4f}" for parts in zip(*found, strict=True) for part in parts)])
    sides = [shape[-1] for shape in denoiser.level_shapes[: len(sizes)]]
    print(table(["t", *(f"{side} px, {told}" for side in sides for told in ("captions", "none"))], rows))


if __name__ == "__main__":
    main()
