"""The application that every command joins, and how one that was interrupted says so."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mezzotint import __version__
from mezzotint.errors import MezzotintError, closest, shortened
from mezzotint.progress import console


class Commands(TyperGroup):
    """Says that Ctrl-C was heard, where a command has no more to say, and which command may have been meant."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise MezzotintError(
                f"command {shortened(args[0])} is unknown; {closest(args[0], self.commands)} (see 'mezzotint --help')"
            )
        return super().resolve_command(ctx, args)

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


def _version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(f"mezzotint {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version ('mezzotint env': more)."),
    ] = False,
) -> None:
    """What stands before a command."""


def stopped(context: typer.Context, command: str | None = None) -> typer.Exit:
    """Say by which command the one that was interrupted goes on: `command`, or the very same."""
    from mezzotint.training.parallel import is_main_process

    if is_main_process():
        console.print(f"stopped; continue with: {command or command_of(context)}", soft_wrap=True)
    return typer.Exit(130)


def program(processes: int = 1) -> list[str]:
    """The words that start this program again, by torchrun where it is several processes."""
    if processes > 1:
        torchrun = ["torchrun"] if _on_path("torchrun") else [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, "--nproc-per-node", str(processes), "-m", "mezzotint"]
    if _on_path("mezzotint"):
        return ["mezzotint"]
    module = Path(sys.argv[0]).name == "__main__.py"  # python -m mezzotint
    return [sys.orig_argv[0], "-m", "mezzotint"] if module else [sys.argv[0]]


def _on_path(name: str) -> bool:
    """Whether the shell finds this environment's program of that name, and not another's or none."""
    found = shutil.which(name)
    return found is not None and Path(found) in (Path(sys.executable).with_name(name), Path(sys.argv[0]))


def command_of(context: typer.Context, *instead: str) -> str:
    """The running command as it can be typed again; or, with the same program, the words `instead`."""
    words = program(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if instead:
        return shlex.join([*words, *instead])
    words.append(str(context.info_name))
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
    return shlex.join(words)
