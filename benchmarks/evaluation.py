"""The metrics at the papers' sizes: 2,048 features, 10,000 samples a side. Against scipy's root, and matrix products.

A ratio is of times in one process, each beside a time of what it is compared with. Features are random, but as
Inception's are: at least 0, correlated, variances over several powers of ten. `--write FILE` puts the tables into a
Markdown file. It takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg  # type: ignore[import-untyped]
import torch
from measure import Yardstick, machine, once, peak_mebibytes, table, write_section
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.evaluation.classifier import ConvNet
from mezzotint.evaluation.frechet import frechet_distance
from mezzotint.evaluation.kernel import kernel_distance
from mezzotint.evaluation.manifold import precision_recall
from mezzotint.evaluation.statistics import FeatureStatistics
from mezzotint.training.parallel import choose_device

D = 2048


def features(n: int, seed: int, device: torch.device) -> Tensor:
    """Random features float32 (n, D)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator) * torch.arange(1, D + 1).unsqueeze(1) ** -0.75
    generator.manual_seed(seed)
    noise = torch.randn(n, D, generator=generator)
    return ((noise + 0.1 * seed) @ mixing - 0.5).relu().to(device)


def frechet_table(real: FeatureStatistics, fake: FeatureStatistics, device: torch.device) -> str:
    """The distance from statistics, by this library and by the routes of other tools, which run on the CPU."""
    (mean1, cov1), (mean2, cov2) = ((s.mean.cpu().numpy(), s.covariance.cpu().numpy()) for s in (real, fake))
    rest = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2)
    roots: dict[str, Callable[[], float]] = {
        "scipy.linalg.sqrtm of the product (pytorch-fid, clean-fid)": lambda: (
            rest - 2 * np.trace(scipy.linalg.sqrtm(cov1 @ cov2)).real
        ),
        "numpy.linalg.eigvals of the product (torch-fidelity)": lambda: (
            rest - 2 * np.sqrt(np.linalg.eigvals(cov1 @ cov2).astype(complex)).real.sum()
        ),
        "frechet_distance": lambda: frechet_distance(real, fake),
        "frechet_distance of equal sets": lambda: frechet_distance(real, real),
    }
    seconds, values = {}, {}
    for name, root in roots.items():
        seconds[name] = once(lambda n=name, r=root: values.update({n: r()}), device)  # type: ignore[misc]
        print(name, seconds[name], values[name], flush=True)
    base = seconds[next(iter(roots))]
    rows = [[n, f"{s:.1f} s", f"{base / s:.1f}×", f"{values[n]:.9g}"] for n, s in seconds.items()]
    return table([f"Fréchet distance of two Gaussians, D = {D:,}", "time", "scipy's time over it", "distance"], rows)


def metrics_table(real: Tensor, fake: Tensor) -> str:
    """Metrics that look at pairs of samples, in time and in products of the sets in their precision."""
    n, device = len(real), real.device
    metrics: dict[str, tuple[Callable[[], object], torch.dtype]] = {
        "precision_recall": (partial(precision_recall, real, fake), torch.float32),
        "kernel_distance, 100 subsets of 1,000": (partial(kernel_distance, real, fake), torch.float64),
        "kernel_distance, all": (partial(kernel_distance, real, fake, subsets=None), torch.float64),
    }
    rows = []
    for name, (metric, dtype) in metrics.items():
        a, b = real[: n // 4].to(dtype), fake.to(dtype)
        before = once(lambda a=a, b=b: a @ b.T, device)  # type: ignore[misc]
        seconds: list[float] = []
        memory = peak_mebibytes(lambda m=metric, s=seconds: s.append(once(m, device)), device)  # type: ignore[misc]
        product = 2 * (before + once(lambda a=a, b=b: a @ b.T, device))  # type: ignore[misc]
        kind = "fp32" if dtype == torch.float32 else "fp64"
        rows.append([name, f"{seconds[0]:.1f} s", f"{seconds[0] / product:.1f} {kind} products", f"{memory:.0f} MiB"])
        print(rows[-1], flush=True)
    return table([f"{n:,} against {n:,} samples, D = {D:,}", "time", f"in {n:,}×{D:,}×{n:,}", "peak memory"], rows)


def statistics_table(real: Tensor) -> str:
    """How many features a second the statistics take in."""
    rows = []
    for batch in (32, 256, 1024):
        some = real[: 8 * batch].double()
        statistics = FeatureStatistics.of(some)  # warms up, too
        product = once(lambda some=some: some.T @ some, real.device)  # type: ignore[misc]

        def gather(statistics: FeatureStatistics = statistics, batch: int = batch) -> None:
            for part in real[: 8 * batch].split(batch):
                statistics.update(part)

        seconds = once(gather, real.device)
        rows.append([str(batch), f"{8 * batch / seconds:,.0f}", f"{seconds / product:.1f}"])
        print(rows[-1], flush=True)
    return table(["statistics, batch", "features a second", "time over one fp64 product of all features"], rows)


def networks_table(device: torch.device) -> str:
    """Feature networks with random weights: images/s, and multiply-adds per second over those of a matrix product."""
    yardstick = Yardstick(device)
    networks: dict[str, tuple[nn.Module, Tensor]] = {
        "classifier, 28 × 28": (ConvNet(1, 10, 2).eval(), torch.randint(256, (256, 1, 28, 28), dtype=torch.uint8)),
        "inception, from 256 × 256": (_random_inception(), torch.randint(256, (8, 3, 256, 256), dtype=torch.uint8)),
    }
    rows = []
    for name, (network, images) in networks.items():
        network, images = network.to(device), images.to(device)
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                network(images)
            gmacs = counter.get_total_flops() / 2e9
            seconds, speed = yardstick.time(lambda n=network, i=images: n(i), gmacs, repeats=5)  # type: ignore[misc]
        share = f"{speed / yardstick.speeds['fp32']:.0%}"
        rows.append([name, f"{gmacs / len(images):.3g}", f"{len(images) / seconds:,.1f}", share])
        print(rows[-1], flush=True)
    return table(["feature network, fp32", "GMACs an image", "images/s", "of matmul rate"], rows)


def _random_inception() -> nn.Module:
    """torch-fidelity's Inception without its weights' file."""
    port: Any = import_module("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(port.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> None: ...

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network: nn.Module = Unloaded("inception", ["2048", "logits_unbiased"], empty)
    return network.eval()


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose section for this kind of device is replaced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=10_000, help="a side")
    options = parser.parse_args()
    device = choose_device(options.device)
    real, fake = (features(options.samples, seed, device) for seed in (1, 2))
    statistics = FeatureStatistics.of(real), FeatureStatistics.of(fake)
    tables = [
        networks_table(device),
        statistics_table(real),
        frechet_table(*statistics, device),
        metrics_table(real, fake),
    ]
    text = f"Measured on {machine(device)}.\n\n" + "\n".join(tables)
    print(text)
    if options.write is not None:
        kind = "GPU" if device.type == "cuda" else "CPU"
        write_section(options.write, f"evaluation on a {kind}", Path(__file__).name, text)


if __name__ == "__main__":
    main()
