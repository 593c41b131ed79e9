"""``mezzotint train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.models import typed_code
from mezzotint.cli.options import Device, Overrides, RecipeArgument, TrustCode
from mezzotint.errors import MezzotintError
from mezzotint.progress import console


def train(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write; default: runs/<recipe>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest whole checkpoint.")
    ] = False,
    trust_code: TrustCode = False,
    override: Annotated[
        bool,
        typer.Option(
            "--override", help="With --resume: lr, grad_clip, precision, compile and ema of training may be other ones."
        ),
    ] = False,
    data_changed: Annotated[
        bool, typer.Option("--data-changed", help="With --resume: go on although the data set has changed.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a recipe into a run folder.

    Ctrl-C saves a checkpoint and stops; --resume then continues bit for bit. To share the batch among processes:
    torchrun --nproc-per-node 2 $(which mezzotint) train RECIPE.
    """
    from mezzotint.pipeline import check_sampling
    from mezzotint.recipe import load_recipe
    from mezzotint.training import train as run_training
    from mezzotint.training.parallel import is_main_process

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
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
        raise stopped(context, "--resume") from None
    if is_main_process():
        try:
            check_sampling(pipeline)
            step = "sample"
        except MezzotintError:  # a denoising autoencoder is trained for its features
            step = "probe"
        console.print(f"trained {folder}; next: mezzotint {step} {shlex.quote(str(folder))}", soft_wrap=True)
