"""``mezzotint study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.completion import complete_option, complete_overrides
from mezzotint.cli.options import Device, Json
from mezzotint.cli.tables import Table, duration, print_json, print_table
from mezzotint.errors import MezzotintError
from mezzotint.progress import console


def study(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="STUDY", help="ldae: the trajectory from DiT to l-DAE.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of all its recipes, e.g. training.steps=2000.",
            autocompletion=complete_overrides(),
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="digits or fashion-mnist.", autocompletion=complete_option("--study-data"))
    ] = "fashion-mnist",
    seeds: Annotated[str, typer.Option(help="Seeds with commas between; every cell is trained with each.")] = "0,1",
    cells: Annotated[
        str, typer.Option(help="Cells by name or group (trajectory, dimension, noise), with commas. Default: all.")
    ] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Only measure what each cell would take, and print it.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds to work on at a time, each in a process.")] = 2,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: runs/study-<study>-<data>.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Train and probe all that a paper compares, at a scale for two CPU cores, and print its table beside the paper's.

    The same command goes on after a kill.
    """
    from mezzotint.evaluation.sweep import figure_class
    from mezzotint.studies.ldae import estimate, finished, jobs_of
    from mezzotint.studies.ldae import study as run_study
    from mezzotint.studies.report import write_report

    if name != "ldae":
        raise MezzotintError(f"study {name!r} is unknown; known: ldae")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise MezzotintError(f"--seeds {seeds!r} is not whole numbers with commas between, such as 0,1") from None
    out = out or Path("runs") / f"study-{name}-{data}"
    chosen = [cell.strip() for cell in cells.split(",") if cell.strip()]
    options: dict[str, Any] = {"seeds": numbers, "cells": chosen, "overrides": overrides or []}
    if plan:
        found = estimate([job for job in jobs_of(data, out, **options) if finished(job) is None], device=device)
        seconds = sum(sum(parts.values()) for parts in found.values())
        if as_json:
            return print_json({"cells": found, "seconds": seconds})
        rows = [[cell, *(f"{part:.1f}" for part in parts.values())] for cell, parts in found.items()]
        title, notes = "seconds, estimated from a few steps", [f"in all {duration(seconds)}, in one process"]
        print_table(Table(["cell", "tokenizer", "training", "probes"], rows, title=title, notes=notes))
        return
    figure_class("the pictures of a study")
    try:
        cells_done = run_study(data, out, device=device, processes=processes, progress=True, **options)
    except KeyboardInterrupt:
        raise stopped(context) from None
    written = write_report(cells_done, out, data)
    if as_json:
        print_json({"cells": cells_done, "files": [str(path) for path in written]})
    else:
        typer.echo(written[0].read_text(encoding="utf-8"))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
