"""``mezzotint train-mae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.completion import complete_overrides
from mezzotint.cli.models import own_section
from mezzotint.cli.options import Device, Json, RecipeArgument
from mezzotint.cli.tables import print_json
from mezzotint.progress import console, results


def train_mae(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of the recipe, and mae.KEY, e.g. training.steps=500 mae.depth=4.",
            autocompletion=complete_overrides((), "mae"),
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write, for --features mae:OUT.")] = Path("mae"),
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Train a masked autoencoder on a recipe's images, with its patches, width, steps and batch size: a baseline.

    The folder, transformers' ViTMAE, appears when all is done.
    """
    from mezzotint.evaluation.mae import MAESettings
    from mezzotint.evaluation.mae import train_mae as run_training
    from mezzotint.recipe import load_recipe

    changes, values = own_section("mae", overrides or [])
    settings = MAESettings.parse(values)
    try:
        metrics = run_training(load_recipe(recipe, changes), out, settings, device=device, progress=True)
    except KeyboardInterrupt:
        console.print(f"stopped; {out} was not written")
        raise typer.Exit(130) from None
    if as_json:
        return print_json({**metrics, "folder": str(out)})
    results.print(f"loss {metrics['first_loss']:.3f} at first, {metrics['last_loss']:.3f} at last", soft_wrap=True)
    results.print(str(out), soft_wrap=True)
