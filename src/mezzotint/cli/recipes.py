"""``mezzotint recipes``."""

from __future__ import annotations

from typing import Annotated

import typer

from mezzotint.cli.options import Json, Overrides, complete_recipe
from mezzotint.cli.tables import Table, print_json, print_table
from mezzotint.progress import results


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Print this recipe in full, as YAML.", autocompletion=complete_recipe),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one with every key resolved."""
    from mezzotint.recipe import load_recipe, recipe_names

    if name is not None:
        loaded = load_recipe(name, overrides or [])
        if as_json:
            return print_json(loaded.model_dump(mode="json"))
        # A console of another encoding gets YAML's own escapes, so that what is sent to a file is still the recipe.
        typer.echo(loaded.to_yaml(ascii_only=not results.encoding.startswith("utf")), nl=False)
        return
    known = {recipe: load_recipe(recipe).description for recipe in recipe_names()}
    if as_json:
        return print_json([{"recipe": recipe, "description": description} for recipe, description in known.items()])
    print_table(Table(["recipe", "what it is"], [*known.items()], prose=True))
