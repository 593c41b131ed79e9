"""``mezzotint recipes``."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from typing import Annotated

import typer

from mezzotint.cli.completion import complete_recipe
from mezzotint.cli.options import Json, Overrides
from mezzotint.cli.tables import Table, print_json, print_table
from mezzotint.errors import MezzotintError
from mezzotint.progress import results


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe, a YAML file or a run folder to print in full; or a part of names, or a pattern such as "
            "'*-256', to list those recipes.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one as YAML: every key that means something beside its words, and what it means.

    What is printed is itself a recipe: mezzotint recipes digits > mine.yaml, then mezzotint train mine.yaml.
    """
    from mezzotint.described import FAMILIES, described, family
    from mezzotint.recipe import load_recipe, recipe_names

    listed = recipe_names() if name is None else _named(name, recipe_names())
    if name is not None and not listed:
        recipe = load_recipe(name, overrides or [])
        if as_json:
            return print_json(recipe.model_dump(mode="json"))
        # A console of another encoding gets YAML's own escapes, so that what is sent to a file is still the recipe.
        return typer.echo(described(recipe, ascii_only=not results.encoding.startswith("utf")), nl=False)
    if overrides:
        raise MezzotintError(f"{overrides[0]} changes one recipe; name one of {', '.join(listed)}")
    found = [(one, load_recipe(one)) for one in listed]
    found.sort(key=lambda named: named[1].backbone.name != "dit")  # a plain transformer is what to start with
    groups = {title: [(one, recipe) for one, recipe in found if family(recipe) == title] for title in FAMILIES}
    if as_json:
        return print_json(
            [
                {"recipe": one, "family": title, "description": recipe.description}
                for title, group in groups.items()
                for one, recipe in group
            ]
        )
    parts = {title: [(one, recipe.description) for one, recipe in group] for title, group in groups.items() if group}
    for number, (title, rows) in enumerate(parts.items()):
        if number:
            results.print()
        print_table(Table([title, ""], rows, prose=True))


def _named(name: str, known: list[str]) -> list[str]:
    """The recipes with `name` in theirs, or that match it as a pattern; none where it names one, or a file."""
    if name in known or os.path.isfile(name) or os.path.isfile(os.path.join(name, "recipe.yaml")):
        return []
    return [one for one in known if name and (name in one or fnmatchcase(one, name))]
