"""The application that every command joins, and how one that was interrupted says so."""

from __future__ import annotations

import os
import shlex
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mezzotint.progress import console


class Commands(TyperGroup):
    """Says that Ctrl-C was heard, where a command has no more to say."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print("stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, sample and score diffusion models, in any combination of interpolant, target, backbone and sampler.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mezzotint {version('mezzotint')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version ('mezzotint env': more)."),
    ] = False,
) -> None:
    """What stands before a command."""


def stopped(context: typer.Context, *more: str) -> typer.Exit:
    """Say by which command the one that was interrupted goes on: itself, with the words `more`."""
    from mezzotint.training.parallel import is_main_process

    if is_main_process():
        console.print(f"stopped; continue with: {command_of(context, *more)}", soft_wrap=True)
    return typer.Exit(130)


def command_of(context: typer.Context, *more: str) -> str:
    """The running command as it can be typed again, with the words `more` where it lacks them."""
    words = ["mezzotint", str(context.info_name)]
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", "mezzotint", *words[1:]]
    for parameter in context.command.params:
        name = parameter.name or ""
        value, source = context.params.get(name), context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        given = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
        if parameter.param_type_name == "option":
            option = parameter.opts[0]
            if isinstance(value, bool):
                given = [option if value else parameter.secondary_opts[0]]
            else:
                given = [word for one in given for word in (option, one)]
        words += given
    return shlex.join([*words, *(word for word in more if word not in words)])
