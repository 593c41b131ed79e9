"""What was typed that the command line does not take, in one sentence as every other mistake."""

from __future__ import annotations

import sys
from typing import Any

import typer

from mezzotint.cli.models import SAMPLED
from mezzotint.errors import closest, shortened

#: what the parser raises, of Click or of the copy of it that Typer has
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def sentence(error: Any) -> str:
    """The sentence on a `UsageError`: what was wrong, what was expected, or where help is."""
    context, kind = error.ctx, type(error).__name__
    if context is None:
        return _begun(error.format_message())
    command = context.command_path
    see = f"(see '{command} --help')"
    if kind == "NoSuchOption":
        options = [name for one in context.command.get_params(context) for name in (*one.opts, *one.secondary_opts)]
        hint = _as_override(context, error.option_name) or closest(
            error.option_name, [name for name in options if name.startswith("--")]
        )
        return f"option {shortened(error.option_name)} of '{command}' is unknown; {hint} {see}"
    if kind == "MissingParameter" and error.param is not None:
        return f"{_called(error.param)} is missing {see}"
    if isinstance(error, typer.BadParameter) and error.param is not None:
        value = next(filter(None, map(_value_of, error.param.opts)), "")
        return f"{_called(error.param)} {value and f'= {shortened(value)} '}is not valid: {_begun(error.message)} {see}"
    return f"{_begun(error.format_message())} {see}"


def _called(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name) if parameter.param_type_name == "argument" else parameter.opts[0]


def _begun(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def _as_override(context: Any, option: str) -> str:
    """Where an option is called as a key of a recipe is: how that is set, with the value that was typed."""
    from mezzotint.recipe import Recipe
    from mezzotint.settings import keys_called

    taken = {parameter.name for parameter in context.command.params}
    keys = keys_called(Recipe, option.lstrip("-").replace("-", "_"))
    if "model" in taken:
        keys = [key for key in keys if key.startswith(tuple(f"{section}." for section in SAMPLED))]
    elif training := [key for key in keys if key.startswith("training.")]:
        keys = training
    if not keys or "overrides" not in taken:
        return ""
    value = _value_of(option) or "…"
    return f"a recipe's keys are set without dashes: {' or '.join(f'{key}={value}' for key in keys)}"


def _value_of(option: str) -> str:
    """What was typed for an option, behind its = or as the next word."""
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and not following.startswith("--"):
            return following
    return ""
