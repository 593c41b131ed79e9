"""``mezzotint resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.completion import complete_overrides, complete_run
from mezzotint.cli.options import DataChanged, Device, Override, TrustCode
from mezzotint.cli.train import say_what_next


def resume(
    context: typer.Context,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that 'mezzotint train' wrote.", autocompletion=complete_run)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="What a resumed run may change, e.g. training.log_every=10 data.path=FOLDER.",
            autocompletion=complete_overrides(),
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all, training.steps; more than before train the run longer.")
    ] = None,
    override: Override = False,
    data_changed: DataChanged = False,
    trust_code: TrustCode = False,
    device: Device = "auto",
) -> None:
    """Go on with a run from its newest whole checkpoint, by its own recipe, bit for bit; or train it longer.

    Ctrl-C saves a checkpoint and stops, as in 'mezzotint train'.
    """
    from mezzotint.training import resume as run_resumed

    try:
        pipeline = run_resumed(
            run,
            overrides or [],
            steps=steps,
            override=override,
            data_changed=data_changed,
            trust_code=trust_code,
            device=device,
        )
    except KeyboardInterrupt:
        raise stopped(context) from None
    say_what_next(pipeline, run)
