"""``mezzotint convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.completion import complete_option, complete_recipe, complete_run
from mezzotint.cli.options import Overrides, Weights
from mezzotint.errors import MezzotintError
from mezzotint.progress import results


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An official .pt, a diffusers folder, a run folder, or a hub name.",
            autocompletion=complete_run,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (official: the .pt) to write.")],
    overrides: Overrides = None,
    to: Annotated[
        str,
        typer.Option(
            help="run: a run folder; diffusers: a folder for DiTPipeline; official: a .pt for the official code.",
            autocompletion=complete_option("--to"),
        ),
    ] = "run",
    recipe: Annotated[
        str | None,
        typer.Option(help="What the weights mean, where the file does not tell.", autocompletion=complete_recipe),
    ] = None,
    weights: Weights = "model",
    vae: Annotated[
        str | None, typer.Option(help="diffusers: the autoencoder to put in; default: the recipe's own.")
    ] = None,
) -> None:
    """Rewrite a checkpoint for this library, for diffusers or for the official code; nothing is lost on the way."""
    from mezzotint.interop import convert as rewrite
    from mezzotint.recipe import load_recipe

    if overrides and recipe is None:
        raise MezzotintError(f"override {overrides[0]!r} is of no recipe; name one by --recipe")
    loaded = None if recipe is None else load_recipe(recipe, overrides or [])
    results.print(str(rewrite(source, out, to=to, recipe=loaded, weights=weights, vae=vae)), soft_wrap=True)  # type: ignore[arg-type]
