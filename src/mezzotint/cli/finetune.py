"""``mezzotint finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.completion import complete_overrides
from mezzotint.cli.models import WITH_DATA, open_model, own_section, recipe_of
from mezzotint.cli.options import Device, Json, ModelArgument, Weights
from mezzotint.cli.tables import print_json
from mezzotint.progress import console, results


def finetune(
    model: ModelArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of data and representation, and finetune.KEY, e.g. data=folder:photos finetune.mixup=0.",
            autocompletion=complete_overrides(WITH_DATA, "finetune"),
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="How many of the first layers. Default: half of them.")] = None,
    t: Annotated[float, typer.Option("--t", help="The time that the network is told; step 10 of 1000 is 0.01.")] = 0.01,
    epochs: Annotated[int | None, typer.Option(help="finetune.epochs; default: 100.")] = None,
    lr: Annotated[float | None, typer.Option(help="finetune.lr; default: 1e-3 for each 256 images of a batch.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="finetune.batch_size; default: 1,024.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="From scratch: the same network with fresh weights.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=2, help="Training images. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="finetune.seed; default: 0.")] = None,
    weights: Weights = "model",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("classifier"),
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Fine-tune the first layers of a network, end to end, as a classifier of images, by MAE's recipe.

    Accuracy on the test split is printed after each epoch. The folder appears when all is done.
    """
    from mezzotint.evaluation.end_to_end import FinetuneSettings, finetune_classifier
    from mezzotint.pipeline import build
    from mezzotint.training.parallel import choose_device

    changes, values = own_section("finetune", overrides or [])
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}
    settings = FinetuneSettings.parse(values | {key: value for key, value in given.items() if value is not None})
    if random:
        pipeline = build(recipe_of(model, changes, weights), device=choose_device(device))
    else:
        pipeline = open_model(model, changes, weights=weights, device=device, may_change=WITH_DATA)
    try:
        metrics = finetune_classifier(pipeline, out, settings, layers=layers, t=t, count=count)
    except KeyboardInterrupt:
        console.print(f"stopped; {out} was not written")
        raise typer.Exit(130) from None
    if as_json:
        return print_json({**metrics, "folder": str(out)})
    start = "fresh weights" if random else "fine-tuned"
    results.print(
        f"{metrics['model']}, first {metrics['layers']} layers, {start}: top-1 {metrics['top1']:.2%} of "
        f"{metrics['test_images']:,} images",
        soft_wrap=True,
    )
    results.print(str(out), soft_wrap=True)
