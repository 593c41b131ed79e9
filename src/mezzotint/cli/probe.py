"""``mezzotint probe``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.completion import complete_option
from mezzotint.cli.models import WITH_DATA, open_model, recipe_of, run_folder
from mezzotint.cli.options import BatchSize, DataOverrides, Device, Json, ModelArgument, Precision, Weights, seed_option
from mezzotint.cli.tables import Table, json_text, print_json, print_table
from mezzotint.errors import MezzotintError
from mezzotint.progress import console, results


def probe(
    model: ModelArgument,
    overrides: DataOverrides = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Features of this layer, by number or name; again for more. Default: all."),
    ] = None,
    t: Annotated[
        list[float] | None,
        typer.Option(help="A time in [0, 1] that the network is told; again for more. Default: 0.01."),
    ] = None,
    noise: Annotated[bool, typer.Option("--noise/--clean", help="Noised images, or clean ones.")] = False,
    probe: Annotated[
        str,
        typer.Option(
            help="linear, knn, ridge; several with commas between.", autocompletion=complete_option("--probe")
        ),
    ] = "linear",
    features: Annotated[
        str | None,
        typer.Option(
            help="Features of another kind on the same data: pixels, pca:COMPONENTS, mae:FOLDER, dinov2, "
            "module:function, …",
            autocompletion=complete_option("--features", "pca:", "mae:"),
        ),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="The same network with fresh weights.")] = False,
    count: Annotated[int | None, typer.Option(min=2, help="Training images to fit on. Default: all.")] = None,
    k: Annotated[int, typer.Option(help="knn: neighbours.")] = 20,
    epochs: Annotated[int, typer.Option(help="linear: epochs; at least 300 updates are made.")] = 90,
    optimizer: Annotated[
        str, typer.Option(help="linear: sgd, or lars for large sets.", autocompletion=complete_option("--optimizer"))
    ] = "sgd",
    augment: Annotated[
        bool, typer.Option("--augment", help="linear: crop and flip at random; a forward pass an epoch, nothing kept.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            callback=seed_option, help="Seed of the images' noise, of the probes' weights and of the order of images."
        ),
    ] = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    precision: Precision = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="The JSON to write; default: probe.json in the run folder, else here.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also a PNG of accuracy over layer and t (matplotlib).")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """How well classes can be read off a network's features: of which layer, at which t, from clean or noised images.

    Features are kept, so that another probe of them takes no forward pass.
    """
    from mezzotint.evaluation.features import feature_network
    from mezzotint.evaluation.mae import open_mae
    from mezzotint.evaluation.probing import plot_probe
    from mezzotint.evaluation.probing import probe as run_probe
    from mezzotint.evaluation.sweep import figure_class
    from mezzotint.files import write_text
    from mezzotint.pipeline import build
    from mezzotint.training.parallel import choose_device

    if figure is not None:
        figure_class("heat-maps")
    if features is not None and random:
        raise MezzotintError("--random and --features are baselines of their own; give one of them in each command")
    if features == "classifier":
        raise MezzotintError("the classifier was fitted on the held-out images; choose other features")
    data, here, changes = None, choose_device(device), overrides or []
    probed: Any
    if features is None and not random:
        probed = open_model(model, changes, weights=weights, device=device, may_change=WITH_DATA).prepare(precision)
    else:
        recipe = recipe_of(model, changes, weights)
        if random:
            probed = build(recipe, device=here).prepare(precision)
        elif str(features).startswith("mae:"):
            data, probed = recipe.data, open_mae(str(features)[4:], device=here, precision=precision)
        else:
            data = recipe.data
            fitted_on = data if str(features).startswith("pca:") else None
            probed = feature_network(str(features), device=here, precision=precision, data=fitted_on)
    result = run_probe(
        probed,
        data,
        layers=layer or [],
        times=t or [],
        noise=noise,
        probes=[name.strip() for name in probe.split(",")],
        count=count,
        k=k,
        epochs=epochs,
        optimizer=optimizer,
        augment=augment,
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    if random:
        result["model"] += ", fresh weights"
    if as_json:
        print_json(result)
    else:
        fitted = f"{result['train_images']:,} images of {result['data']} to fit, {result['test_images']:,} to score"
        results.print(f"{result['model']}, {result['input']} images; {fitted}", soft_wrap=True)
        for table in probe_tables(result):
            print_table(table)
    out = out or (run_folder(model) or Path()) / "probe.json"
    write_text(out, json_text(result))
    written = [out]
    if figure is not None:
        plot_probe(result, figure)
        written.append(figure)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def probe_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """What a probe found, a table for each probe: a row for each layer, a column for each time."""
    from mezzotint.evaluation.probing import grids

    for kind, layers, times, rows in grids(result):
        five = any("top5" in row for row in rows.values())

        def cell(row: Mapping[str, Any], five: bool = five) -> str:
            return f"{row['top1']:.1%}" + (f" ({row['top5']:.1%})" if five else "")

        yield Table(
            ["layer", *("top-1" if t is None else f"t = {t:g}" for t in times)],
            [[layer, *(cell(rows[layer, t]) for t in times)] for layer in layers],
            title=f"{kind}, top-1{' (top-5)' if five else ''}",
        )
