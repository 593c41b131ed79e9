"""``mezzotint denoise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.models import WITH_DATA, open_model, run_folder
from mezzotint.cli.options import DataOverrides, Device, ModelArgument, Seed, Weights
from mezzotint.cli.sample import MAX_GRID
from mezzotint.progress import results


def denoise(
    model: ModelArgument,
    overrides: DataOverrides = None,
    t: Annotated[
        list[float] | None, typer.Option(help="A time in [0, 1]; again for more. Default: 0.1, 0.3 and 0.6.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=MAX_GRID, help="Held-out images, a column each.")] = 8,
    noise: Annotated[
        Path | None, typer.Option(help="Also a PNG of noise in pixels and, below it, as much in latents (tokenizers).")
    ] = None,
    seed: Seed = 0,
    weights: Weights = "model",
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; default: denoised.png in the run folder, else here.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show held-out images clean and, for each t, noisy and as the network denoises them in one step."""
    from mezzotint.evaluation.denoising import TIMES, save_denoised, save_noise

    pipeline = open_model(model, overrides or [], weights=weights, device=device, may_change=WITH_DATA)
    written = [out or (run_folder(model) or Path()) / "denoised.png"]
    save_denoised(pipeline, written[0], times=t or TIMES, count=count, seed=seed)
    if noise is not None:
        save_noise(pipeline, noise, times=t or TIMES, count=count, seed=seed)
        written.append(noise)
    for path in written:
        results.print(str(path), soft_wrap=True)
