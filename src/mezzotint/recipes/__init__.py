"""The recipes that the library ships, one YAML file each."""

from importlib import resources


def recipe_names() -> list[str]:
    """Names of the recipes that the library ships."""
    return sorted(
        file.name.removesuffix(".yaml")
        for file in resources.files("mezzotint.recipes").iterdir()
        if file.name.endswith(".yaml")
    )
