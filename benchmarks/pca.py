"""What patch PCA costs: time and peak memory of 1M patches of 768 numbers, by the library's streaming moments.

    python benchmarks/pca.py [--patches 1000000] [--dimension 768] [--write docs/tokenizers.md]

Patches are made up, block by block, as training reads images: correlated normal numbers of 1,000 decaying scales, whose
generation is timed apart. The spectrum that is found is compared with the one that they were made from.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measure import machine, peak_mebibytes, table, write_section
from torch import Tensor

from mezzotint.representations.pca import Moments, principal_components

BLOCK = 64 * 256  # patches: 64 images of 256 × 256 pixels, in patches of 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--write", type=Path, help="the Markdown page to put the table into")
    arguments = parser.parse_args()
    count, dimension = arguments.patches, arguments.dimension
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, dimension)
    found: dict[str, float] = {}

    def work() -> None:
        moments, fitting, busy = Moments(dimension), 0.0, 0.0
        variances: Tensor
        for first in range(0, count, BLOCK):
            rows = torch.randn(min(BLOCK, count - first), dimension, generator=generator) * scales + 0.5
            begun, busy_before = time.perf_counter(), time.process_time()
            moments.update(rows)
            fitting += time.perf_counter() - begun
            busy += time.process_time() - busy_before
        begun = time.perf_counter()
        _, variances = principal_components(moments.covariance)
        found["eigen"] = time.perf_counter() - begun
        found["moments"], found["busy"] = fitting, busy
        found["error"] = (variances / scales.double().square() - 1).abs().max().item()

    peak = peak_mebibytes(work, torch.device("cpu"))
    figures = [
        ["moments: float32 products, float64 sums", f"{found['moments']:.1f} s"],
        ["the processor time of that, over all cores", f"{found['busy']:.1f} s"],
        ["eigendecomposition", f"{found['eigen']:.1f} s"],
        ["both", f"{found['moments'] + found['eigen']:.1f} s"],
        ["peak memory, above what torch takes by itself", f"{peak:,.0f} MiB"],
        ["largest relative difference from the true variances", f"{found['error']:.1%}"],
    ]
    text = f"Measured on {machine(torch.device('cpu'))}.\n\n" + table(
        [f"{count:,} patches of {dimension}", ""], figures
    )
    print(text)
    if arguments.write:
        write_section(arguments.write, "pca", "pca.py", text)


if __name__ == "__main__":
    main()
