"""A recipe for its reader: which family it is of, which of its keys mean something beside its words, and what.

Nothing here is a list of its own. A key's meaning is the docstring of its field; whether it has one beside the recipe's
words is told by what takes it (a network's options, a data set's signature), or by the words with which its docstring
begins: "vp: β at t = 0."
"""

from __future__ import annotations

import re
import textwrap
from inspect import signature
from typing import Any, get_args

import yaml

from mezzotint.data import SOURCES
from mezzotint.recipe import NETWORK_OPTIONS, Recipe
from mezzotint.representations import TOKENIZERS
from mezzotint.representations.tokenizer import OWN_SETTINGS
from mezzotint.samplers import SAMPLERS
from mezzotint.settings import Settings

#: columns of a line, and where its comment begins
WIDTH, COMMENT = 120, 40

FAMILIES = ("Small, to start with", "Your own pictures", "DiT", "SiT", "DiffuSSM", "Matryoshka networks", "l-DAE")


def family(recipe: Recipe) -> str:
    """The one of `FAMILIES` that a recipe is of, by its words."""
    start, own, dit, sit, diffussm, matryoshka, ldae = FAMILIES
    if recipe.objective.times == "single":  # a classical denoising autoencoder, its baseline
        return ldae
    if recipe.data.path is None:  # where the user's own are, or nothing that has to be fetched
        return own if recipe.data.name == "folder" else start
    if recipe.representation.name in TOKENIZERS:
        return ldae
    if recipe.backbone.name == "diffussm":
        return diffussm
    if recipe.backbone.name == "unet" or recipe.backbone.outer:
        return matryoshka
    return dit if recipe.interpolant.name == "ddpm" else sit


def described(recipe: Recipe, *, ascii_only: bool = False) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one, each key beside what it means.

    Keys that mean nothing beside the recipe's words, and have their default, are left out. No line is longer than
    `WIDTH`, unless a value is.
    """
    text = "\n".join(_lines(recipe, recipe.model_dump(mode="json"), recipe, "", ascii_only)) + "\n"
    return text.encode("ascii", "backslashreplace").decode() if ascii_only else text  # values are in ASCII already


def has_meaning(recipe: Recipe, path: str) -> bool:
    """Whether the key `path`, e.g. "interpolant.beta_min", means something beside the recipe's words."""
    *sections, key = path.split(".")
    settings: Any = recipe
    for section in sections:
        settings = getattr(settings, section)
    if sections == ["data"]:
        taken = (*signature(SOURCES[recipe.data.name]).parameters, "name", "flip", "workers")
        if key not in taken:
            return False
    own = NETWORK_OPTIONS[recipe.backbone.name]
    if sections == ["backbone"] and key not in own and any(key in options for options in NETWORK_OPTIONS.values()):
        return False
    if sections == ["representation", "fit"]:
        return recipe.representation.name in OWN_SETTINGS.get(key, TOKENIZERS)
    beginning, colon, _ = (type(settings).model_fields[key].description or "").partition(":")
    if not colon:
        return True
    words = _words(recipe, settings, key)
    if beginning.startswith("All but "):
        return not words[beginning.removeprefix("All but ")]
    known = [words[part] for part in re.split("[,;] ", beginning) if part in words]
    return any(known) if known else True


def _words(recipe: Recipe, settings: Settings, but: str) -> dict[str, bool]:
    """The words with which the docstring of a field `but` of `settings` may begin, and whether the recipe has them."""
    words: dict[str, bool] = {}
    for key, field in type(settings).model_fields.items():
        choices = get_args(field.annotation) if key != but else ()
        words |= {word: getattr(settings, key) == word for word in choices if isinstance(word, str)}
    words |= {network: network == recipe.backbone.name for network in NETWORK_OPTIONS}
    words |= {
        "clips": recipe.data.frames > 0,
        "Captions": recipe.condition.name == "text",
        "Tokenizers": recipe.representation.name in TOKENIZERS,
        "Matryoshka networks": bool(recipe.backbone.outer),
        "Networks that give images": recipe.backbone.output == "image",
        "learned variance": recipe.variance == "learned",
    }
    if settings is recipe.backbone:  # which networks a key is for is said above
        words = {word: has for word, has in words.items() if word not in NETWORK_OPTIONS}
    if settings is recipe.sampling:
        words |= {name: recipe.sampling.sampler.removesuffix("-heun") == name for name in SAMPLERS}
        words["dynamic threshold"] = recipe.sampling.threshold == "dynamic"
    return words


def _lines(settings: Settings, values: dict[str, Any], recipe: Recipe, path: str, ascii_only: bool) -> list[str]:
    lines: list[str] = []
    indent, after_section = "  " * path.count("."), False
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        if value == field.default and not has_meaning(recipe, path + key):
            continue
        section = isinstance(value, Settings)
        if not path and (section or after_section):
            lines.append("")
        after_section = section
        if section:
            lines += _commented([f"{indent}{key}:"], field.description or type(value).__doc__)
            lines += _lines(value, values[key], recipe, f"{path}{key}.", ascii_only)
            continue
        dumped = yaml.safe_dump(
            {key: values[key]},
            sort_keys=False,
            allow_unicode=not ascii_only,
            default_flow_style=None if isinstance(values[key], list) else False,  # numbers of a list on one line
            width=WIDTH - len(indent) - 20,  # which a word may overstep
        )
        lines += _commented([indent + line for line in dumped.splitlines()], field.description)
    return lines


def _commented(lines: list[str], docstring: str | None) -> list[str]:
    """A key's lines of YAML, and beside or above them the first sentence of its docstring."""
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join((docstring or "").split()))[0]
    beside = len(lines) == 1 and len(lines[0]) < COMMENT
    indent = " " * (COMMENT if beside else len(lines[0]) - len(lines[0].lstrip()))
    comment = textwrap.wrap(sentence, WIDTH - len(indent) - 2, break_on_hyphens=False)
    if not beside:
        return [*(f"{indent}# {line}" for line in comment), *lines]
    first = f"{lines[0]:{COMMENT}}# {comment[0]}" if comment else lines[0]
    return [first, *(f"{indent}# {line}" for line in comment[1:])]
