"""What a shell's TAB completes: keys and their values, recipes, run folders, samplers and the like.

Importing the settings themselves takes seconds, as they import torch, so what there is stands in words.json beside this
file: `write` writes it anew, and a test compares the two. No completer raises anything.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import typer

from mezzotint.cli.models import SAMPLED, WITH_DATA
from mezzotint.recipes import recipe_names

WORDS = Path(__file__).with_name("words.json")
#: keys whose values are files or folders, or may be
PATHS = ("init", "data.path", "representation.path", "condition.encoder")
#: as the axes of a sweep are called for short
SHORT = {"sampler": "sampling.sampler", "steps": "sampling.steps", "guidance": "guidance.scale"}
#: of other settings than a recipe's
OWN = ("finetune", "mae")

Completer = Callable[[typer.Context, str], list[str]]


@cache
def words() -> dict[str, list[str]]:
    """Values by key, such as training.lr, by a word that stands for a section, such as data, and by option."""
    known: dict[str, list[str]] = json.loads(WORDS.read_text(encoding="utf-8"))
    return known


def completer(find: Callable[[typer.Context, str], Iterable[str]]) -> Completer:
    """What typer asks for, of a function of the context and of what is typed so far, that gives whole words."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            word, elsewhere = _whole_word(incomplete)
            return [found[len(elsewhere) :] for found in dict.fromkeys(find(ctx, word)) if found.startswith(word)]
        except Exception:
            return []

    return complete


def _whole_word(incomplete: str) -> tuple[str, str]:
    """The word at the cursor, and what of it bash, to which = and : are words, holds for other ones."""
    if os.environ.get("_MEZZOTINT_COMPLETE") != "complete_bash":
        return incomplete, ""
    parts = os.environ["COMP_WORDS"].split("\n")
    start = end = int(os.environ["COMP_CWORD"])

    def breaks(part: str) -> bool:
        return part != "" and set(part) <= set("=:")

    while start > 1 and (breaks(parts[start]) or breaks(parts[start - 1])):
        start -= 1
    word = "".join(parts[start : end + 1])
    return word, word if breaks(parts[end]) else word.removesuffix(parts[end])


# ---- What there is ---------------------------------------------------------------------------------------------------


def run_folders(word: str) -> list[str]:
    """Run folders of runs/, and those that `word` leads to."""
    found = [*glob.glob("runs/*/recipe.yaml"), *glob.glob(f"{glob.escape(word)}*/recipe.yaml")]
    return sorted({os.path.dirname(path) for path in found})


def paths(word: str) -> list[str]:
    """Files and folders that `word` leads to; of one folder alone also what is in it, as bash then adds no space."""
    found = sorted(path + "/" if os.path.isdir(path) else path for path in glob.glob(f"{glob.escape(word)}*"))
    return found + paths(found[0]) if len(found) == 1 and found[0].endswith("/") and found[0] != word else found


def _recipes(word: str) -> list[str]:
    return [*recipe_names(), *run_folders(word), *glob.glob(f"{glob.escape(word)}*.y*ml")]


def _datasets(word: str) -> list[str]:
    """Recipes, for their data, and data sets that are at a path."""
    name, colon, path = word.partition(":")
    if colon:
        return [f"{name}:{one}" for one in paths(path)]
    return [*recipe_names(), *(name for name in words()["data"] if name.endswith(":"))]


def _override(word: str, sections: Sequence[str], own: str | None = None) -> list[str]:
    """KEY=VALUE, of keys of these sections (none: of all), and of settings `own` of the command."""
    key, equals, value = word.partition("=")
    if equals:
        return [f"{key}={one}" for one in _values(key, value)]
    firsts = (*sections, own) if sections else ()
    known = [one for one in words() if not one.startswith("-")]
    known = [one for one in known if (first := one.partition(".")[0]) == own or first not in OWN]
    known = [one for one in known if not firsts or one.partition(".")[0] in firsts]
    if "." not in word:
        tops = {one.partition(".")[0] + "." if "." in one else f"{one}=" for one in known}
        matching = sorted(top for top in tops if top.startswith(word))
        if len(matching) != 1 or matching[0].endswith("="):
            return _with_values(matching)
        word = matching[0]
    return _with_values([f"{one}=" for one in known if one.startswith(word)])


def _with_values(keys: list[str]) -> list[str]:
    """Of one key alone also its values: a shell then goes as far as the =, and adds no space."""
    return [*keys, *(keys[0] + one for one in _values(keys[0][:-1], ""))] if len(keys) == 1 else keys


def _values(key: str, value: str) -> list[str]:
    if key in PATHS:
        return paths(value)
    name, colon, path = value.partition(":")
    if key == "data" and colon:
        return [f"{name}:{one}" for one in paths(path)]
    known = [one for one in words().get(key, []) if one.startswith(value)]
    return [*known, *(known[0] + one for one in paths(""))] if len(known) == 1 and known[0].endswith(":") else known


# ---- Completers ------------------------------------------------------------------------------------------------------


def complete_option(name: str, *more: str) -> Completer:
    """The values of an option, several with commas between."""

    def find(_: typer.Context, word: str) -> list[str]:
        before = word[: word.rfind(",") + 1]
        return [before + one for one in (*words()[name], *more)]

    return completer(find)


def complete_overrides(sections: Sequence[str] = (), own: str | None = None) -> Completer:
    """KEY=VALUE; of a model that is a recipe any key."""

    def find(ctx: typer.Context, word: str) -> list[str]:
        model = str(ctx.params.get("model", ""))
        return _override(word, () if model in recipe_names() or model.endswith((".yaml", ".yml")) else sections, own)

    return completer(find)


def _axes(_: typer.Context, word: str) -> list[str]:
    axis, equals, values = word.partition("=")
    if not equals:
        return [*(f"{short}=" for short in SHORT), *_override(word, SAMPLED[:2])]
    before = values[: values.rfind(",") + 1]
    return [f"{axis}={before}{one}" for one in _values(SHORT.get(axis, axis), "")]


def _weights(ctx: typer.Context, word: str) -> list[str]:
    # Where --weights is the last that was typed, click has given up before it gave the arguments their names.
    for run in map(Path, [*filter(None, map(ctx.params.get, ("model", "source"))), *ctx.args]):
        if (run / "recipe.yaml").is_file():
            return sorted(file.stem for file in run.glob("model*.safetensors"))
    return []


def _devices(_: typer.Context, word: str) -> list[str]:
    return ["auto", "cpu", "cuda", *(f"cuda:{number}" for number in range(len(glob.glob("/dev/nvidia[0-9]*"))))]


def _cache(ctx: typer.Context, word: str) -> list[str]:
    return words()["--kind"] if ctx.params.get("action") else ["clear"]


complete_recipe = completer(lambda _, word: _recipes(word))
complete_model = completer(lambda _, word: [*run_folders(word), *recipe_names()])
complete_run = completer(lambda _, word: run_folders(word))
complete_scored = completer(lambda _, word: [*run_folders(word), *_datasets(word)])
complete_dataset = completer(lambda _, word: _datasets(word))
complete_reference = completer(lambda _, word: [*_datasets(word), *_override(word, WITH_DATA)])
complete_axes = completer(_axes)
complete_weights = completer(_weights)
complete_device = completer(_devices)
complete_cache = completer(_cache)


# ---- Writing words.json ----------------------------------------------------------------------------------------------


def vocabulary() -> dict[str, list[str]]:
    """What `words` should give, by the settings and tables themselves."""
    from inspect import signature

    from mezzotint.cache import KINDS
    from mezzotint.data import SOURCES
    from mezzotint.data.latents import DTYPES
    from mezzotint.evaluation.end_to_end import FinetuneSettings
    from mezzotint.evaluation.features import NETWORKS
    from mezzotint.evaluation.mae import MAESettings
    from mezzotint.evaluation.probe import OPTIMIZERS
    from mezzotint.evaluation.probing import PROBES
    from mezzotint.interop import Format
    from mezzotint.pipeline import PRECISIONS
    from mezzotint.recipe import CONFIGURATIONS, Recipe
    from mezzotint.samplers import SAMPLERS
    from mezzotint.samplers.sde import DIFFUSIONS
    from mezzotint.studies.ldae import SCALES

    samplers = [name for name in SAMPLERS if not name.startswith("sde")]
    samplers += [f"{name}-{form}" for name in SAMPLERS if name.startswith("sde") for form in DIFFUSIONS]
    known = {
        "data.name": [*SOURCES],
        "backbone.name": [*CONFIGURATIONS],
        "sampling.sampler": samplers,
        "sampling.diffusion": [*DIFFUSIONS],
    }
    found: dict[str, list[str]] = {}
    _add(found, Recipe, "", known)
    _add(found, FinetuneSettings, "finetune.", known)
    _add(found, MAESettings, "mae.", known)
    found["data"] = [f"{name}:" if "path" in signature(source).parameters else name for name, source in SOURCES.items()]
    found |= {
        "--features": [*NETWORKS],
        "--sampler": samplers,
        "--precision": [*PRECISIONS],
        "--to": [*get_args(Format)],
        "--kind": [*KINDS],
        "--probe": [*PROBES],
        "--optimizer": [*OPTIMIZERS],
        "--split": ["train", "test"],
        "--dtype": [*DTYPES],
        "--study-data": [*SCALES],
    }
    return found


def _add(found: dict[str, list[str]], settings: Any, prefix: str, known: dict[str, list[str]]) -> None:
    """Every key of a settings class, and a word for each section that has a name."""
    from mezzotint.settings import Settings

    for key, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            _add(found, field.annotation, f"{prefix}{key}.", known)
            by = "sampler" if key == "sampling" else "name"
            if f"{prefix}{key}.{by}" in found:
                found[f"{prefix}{key}"] = found[f"{prefix}{key}.{by}"]
        else:
            found[prefix + key] = known.get(prefix + key) or _choices(field)


def _choices(field: Any) -> list[str]:
    """What a field may be, or, where that is anything, what it is by default."""
    parts = (field.annotation, *get_args(field.annotation))
    if bool in parts:
        return ["true", "false"]
    if choices := [str(word) for part in parts for word in get_args(part) if isinstance(word, str | int)]:
        return choices
    if field.is_required() or field.default == "":
        return []
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return [default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))]


def text(found: dict[str, list[str]]) -> str:
    """words.json, a line for each key."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(values)}" for key, values in found.items()) + "\n}\n"


def write() -> None:
    """Write words.json: python -c "from mezzotint.cli.completion import write; write()"."""
    WORDS.write_text(text(vocabulary()), encoding="utf-8")
