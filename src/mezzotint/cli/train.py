"""``mezzotint train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.app import command_of, program, stopped
from mezzotint.cli.models import run_folder, typed_code
from mezzotint.cli.options import DataChanged, Device, Override, Overrides, RecipeArgument, TrustCode
from mezzotint.errors import MezzotintError
from mezzotint.progress import console


def train(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder to write; default: runs/<recipe>, and with --resume the run folder RECIPE."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest whole checkpoint.")
    ] = False,
    trust_code: TrustCode = False,
    override: Override = False,
    data_changed: DataChanged = False,
    device: Device = "auto",
) -> None:
    """Train a recipe into a run folder.

    Ctrl-C saves a checkpoint and stops; 'mezzotint resume RUN' then continues bit for bit. To share the batch among
    processes: torchrun --nproc-per-node 2 $(which mezzotint) train RECIPE.
    """
    from mezzotint.recipe import load_recipe
    from mezzotint.training import train as run_training
    from mezzotint.training.parallel import is_main_process
    from mezzotint.training.run_folder import is_run

    loaded = load_recipe(recipe, overrides or [])
    folder = out or (Path(recipe) if resume and is_run(recipe) else Path("runs") / loaded.name)
    begun_before = is_run(folder)
    if run_folder(recipe) and not (resume or begun_before) and is_main_process():
        console.print(f"a new run by the recipe of {recipe}, written to {folder}", soft_wrap=True)
    try:
        pipeline = run_training(
            loaded,
            folder,
            resume=resume,
            device=device,
            # A state to resume is nothing that was typed.
            trust_code=trust_code or (not resume and typed_code(loaded, overrides)),
            override=override,
            data_changed=data_changed,
        )
    except KeyboardInterrupt:
        if begun_before or not is_run(folder):  # it begins, or has begun before: the same again
            raise stopped(context) from None
        raise stopped(context, command_of(context, "resume", str(folder), *_given(context))) from None
    say_what_next(pipeline, folder)


def _given(context: typer.Context) -> list[str]:
    """The options of `mezzotint resume` among those that were typed."""
    words = ["--trust-code"] if context.params["trust_code"] else []
    device = context.params["device"]
    return [*words, *([] if device == "auto" else ["--device", device])]


def say_what_next(pipeline: Any, run: Path) -> None:
    """Name a run that is trained, and a command that uses it."""
    from mezzotint.pipeline import check_sampling
    from mezzotint.training.parallel import is_main_process

    if not is_main_process():
        return
    try:
        check_sampling(pipeline)
        step = "sample"
    except MezzotintError:  # a denoising autoencoder is trained for its features
        step = "probe"
    console.print(f"trained {run}; next: {shlex.join([*program(), step, str(run)])}", soft_wrap=True)
