"""``mezzotint recipes``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from mezzotint.cli.options import Overrides, complete_recipe
from mezzotint.progress import results


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Print this recipe in full, as YAML.", autocompletion=complete_recipe),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes, or print one with every key resolved."""
    from mezzotint.recipe import load_recipe, recipe_names

    if name is not None:
        loaded = load_recipe(name, overrides or [])
        # A console of another encoding gets YAML's own escapes, so that what is sent to a file is still the recipe.
        typer.echo(loaded.to_yaml(ascii_only=not results.encoding.startswith("utf")), nl=False)
        return
    table = Table("recipe", "what it is")
    for known in recipe_names():
        table.add_row(known, load_recipe(known).description)
    results.print(table)
