"""``mezzotint sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.models import WITH_DATA, open_model, run_folder
from mezzotint.cli.options import BatchSize, Compiled, Device, ModelArgument, Precision, Seed, Weights
from mezzotint.progress import results


def sweep(
    context: typer.Context,
    model: ModelArgument,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="AXIS=VALUE,VALUE...",
            help="sampler, steps, guidance, or a key of sampling or guidance, with the values to go through.",
        ),
    ],
    features: Annotated[str | None, typer.Option(help="As for 'mezzotint evaluate'.")] = None,
    feature_weights: Annotated[str | None, typer.Option(help="As for 'mezzotint evaluate'.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images, as for 'mezzotint evaluate'; default: those of the model's data.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Samples to score for each combination.")] = 1000,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the pictures (needs matplotlib).")] = True,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    precision: Precision = "fp32",
    compiled: Compiled = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: the run folder, else sweep.")] = None,
    device: Device = "auto",
) -> None:
    """Sample and score every combination of samplers, steps, guidance and their settings, each once.

    The same command goes on after a kill, and one with more values costs what is new.
    """
    from mezzotint.evaluation.sweep import parse_axes, sweep_pictures, sweep_table
    from mezzotint.evaluation.sweep import sweep as run_sweep
    from mezzotint.training.parallel import world

    axes, overrides = parse_axes(arguments)
    out = out or run_folder(model) or Path("sweep")
    with world(device) as here:
        pipeline = open_model(model, overrides, weights=weights, device=str(here.device), may_change=WITH_DATA)
        pipeline.prepare(precision, compiled=compiled)
        try:
            rows = run_sweep(
                pipeline,
                out,
                axes,
                count=count,
                features=features,
                weights=feature_weights,
                reference=reference,
                seed=seed,
                batch_size=batch_size,
                plots=plots,
                progress=here.is_main,
            )
        except KeyboardInterrupt:
            raise stopped(context) from None
        if not here.is_main:
            return
    results.print(sweep_table(rows))
    for path in [out / "sweep.csv", *(sweep_pictures(out) if plots else [])]:
        results.print(str(path), soft_wrap=True)
