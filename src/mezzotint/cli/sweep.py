"""``mezzotint sweep``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.completion import complete_axes, complete_option
from mezzotint.cli.models import WITH_DATA, open_model, run_folder
from mezzotint.cli.options import BatchSize, Compiled, Device, Json, ModelArgument, Precision, Seed, Weights
from mezzotint.cli.tables import Table, print_json, print_table
from mezzotint.progress import results


def sweep(
    context: typer.Context,
    model: ModelArgument,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="AXIS=VALUE,VALUE",
            help="sampler, steps, guidance, or a key of sampling or guidance, with the values to go through.",
            autocompletion=complete_axes,
        ),
    ],
    features: Annotated[
        str | None, typer.Option(help="As for 'mezzotint evaluate'.", autocompletion=complete_option("--features"))
    ] = None,
    feature_weights: Annotated[str | None, typer.Option(help="As for 'mezzotint evaluate'.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images, as for 'mezzotint evaluate'; default: those of the model's data.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Samples to score for each combination.")] = 1000,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the pictures (needs matplotlib).")] = True,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    precision: Precision = "fp32",
    compiled: Compiled = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: the run folder, else sweep.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Sample and score every combination of samplers, steps, guidance and their settings, each once.

    The same command goes on after a kill, and one with more values costs what is new.
    """
    from mezzotint.evaluation.sweep import parse_axes, sweep_pictures
    from mezzotint.evaluation.sweep import sweep as run_sweep
    from mezzotint.training.parallel import world

    axes, overrides = parse_axes(arguments)
    out = out or run_folder(model) or Path("sweep")
    with world(device) as here:
        pipeline = open_model(model, overrides, weights=weights, device=str(here.device), may_change=WITH_DATA)
        pipeline.prepare(precision, compiled=compiled)
        try:
            rows = run_sweep(
                pipeline,
                out,
                axes,
                count=count,
                features=features,
                weights=feature_weights,
                reference=reference,
                seed=seed,
                batch_size=batch_size,
                plots=plots,
                progress=here.is_main,
            )
        except KeyboardInterrupt:
            raise stopped(context) from None
        if not here.is_main:
            return
    written = [str(path) for path in (out / "sweep.csv", *(sweep_pictures(out) if plots else []))]
    if as_json:
        return print_json({"rows": rows, "files": written})
    print_table(sweep_table(rows))
    for path in written:
        results.print(path, soft_wrap=True)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The chief figures of the rows of a sweep, and the notes below by number."""
    from mezzotint.evaluation.sweep import SHORT, frechet_name, value_text

    names = list(dict.fromkeys(name for row in rows for name in row))
    axes = [name for name in names if name in SHORT or name.startswith(("sampling.", "guidance."))]
    chief = ("sFID", "precision", "recall", "class agreement")
    kept = [frechet_name(names), *(name for name in names if name in chief or name.startswith("Inception score"))]
    shown = [*axes, "evaluations", "network passes", *(name for name in kept if name and ", std" not in name)]
    shown.append("seconds per image")
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    numbers = {note: str(number) for number, note in enumerate(notes, 1)}
    headings = [*shown, "note"] if notes else shown
    cells = [
        {name: value_text(row.get(name)) for name in shown} | {"note": numbers.get(row["note"], "")} for row in rows
    ]
    return Table(
        headings,
        [[row[name] for name in headings] for row in cells],
        keys=len(axes),
        notes=[f"{number}: {note}" for note, number in numbers.items()],
    )
