"""What the words of a command line name: a model, a recipe, a section's own settings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mezzotint.errors import MezzotintError

#: sections of a trained model's recipe that overrides may change: how it is sampled, and what it is scored against
SAMPLED = ("sampling", "guidance", "representation", "condition")
WITH_DATA = (*SAMPLED, "data")


def run_folder(model: str) -> Path | None:
    """The run folder that `model` is; None for anything else, beside which nothing is written."""
    return Path(model) if (Path(model) / "recipe.yaml").is_file() else None


def is_recipe(model: str) -> bool:
    from mezzotint.recipe import recipe_names

    return model in recipe_names() or model.endswith((".yaml", ".yml"))


def recipe_of(model: str, overrides: list[str], weights: str) -> Any:
    """The recipe of a run folder, a checkpoint or a recipe, whose own weights are not wanted."""
    from mezzotint.recipe import load_recipe

    if run_folder(model) or is_recipe(model):
        return load_recipe(model, overrides)
    return open_model(model, overrides, weights=weights, device="cpu", may_change=WITH_DATA).recipe


def open_model(
    model: str,
    overrides: list[str],
    *,
    weights: str,
    device: str,
    may_change: tuple[str, ...] = SAMPLED,
    **options: Any,
) -> Any:
    """The pipeline of a run folder, of a checkpoint, or of a recipe with the checkpoint `weights`.

    `may_change` are the sections that overrides may change of a trained model. `options` are the sampler, steps and
    guidance that were asked for; None is what the recipe says.
    """
    from mezzotint.interop import load
    from mezzotint.recipe import Recipe, load_recipe, override_recipe
    from mezzotint.settings import unknown_key
    from mezzotint.training.parallel import choose_device

    keys = {"sampler": "sampling.sampler", "steps": "sampling.steps", "guidance": "guidance.scale"}
    given = [f"{keys[key]}={json.dumps(value)}" for key, value in options.items() if value is not None]
    here = choose_device(device)
    if not is_recipe(model):
        for override in overrides:
            path = override.partition("=")[0].split(".")
            if path[0] not in Recipe.model_fields:
                raise MezzotintError(unknown_key(Recipe, path))
            if not override.startswith(tuple(section + mark for section in may_change for mark in ".=")):
                raise MezzotintError(
                    f"override {override!r} would change the trained model; only {', '.join(may_change)} can be"
                )
        pipeline = load(model, weights=weights, device=here)
        changed = override_recipe(pipeline.recipe, [*overrides, *given])
        warn_of_held_out(pipeline.recipe.data, changed.data)
        pipeline.recipe = changed
        return pipeline
    recipe = load_recipe(model, [*overrides, *given])
    if weights == "model":
        run = f", such as runs/{model}" if run_folder(f"runs/{model}") else ""
        raise MezzotintError(
            f"{model} is a recipe, which has no weights; give a checkpoint by --weights, or a run folder{run}"
        )
    return load(weights, recipe=recipe, device=here)


def warn_of_held_out(trained: Any, asked: Any) -> None:
    """Say so where another part of what a model was trained on is called held out."""
    same = (trained.name, trained.path) == (asked.name, asked.path)
    if same and trained.test_fraction != asked.test_fraction:
        logging.getLogger("mezzotint").warning(
            "the model was trained with data.test_fraction=%g, so it has seen some of what %g holds out: figures of "
            "these images are not of unseen ones",
            trained.test_fraction,
            asked.test_fraction,
        )


def own_section(section: str, overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides of a recipe, and the values of those that begin with "section."."""
    from mezzotint.recipe import read_override

    values: dict[str, Any] = {}
    for override in overrides:
        if override.startswith(f"{section}."):
            values |= read_override(override)[section]
    return [override for override in overrides if not override.startswith(f"{section}.")], values


def typed_code(recipe: Any, overrides: list[str] | None) -> bool:
    """Whether the module:function that `recipe` names stands in the command itself, and so is the user's own word."""
    named = f"representation.fit.perceptual_network={recipe.representation.fit.perceptual_network}"
    return named in (overrides or [])
