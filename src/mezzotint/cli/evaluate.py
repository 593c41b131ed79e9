"""``mezzotint evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.completion import complete_option, complete_reference, complete_scored
from mezzotint.cli.models import WITH_DATA, is_recipe, open_model, run_folder
from mezzotint.cli.options import BatchSize, Compiled, Device, Json, Precision, Seed, Weights
from mezzotint.cli.tables import json_text, print_json, print_scores
from mezzotint.errors import MezzotintError
from mezzotint.progress import console


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run folder, a checkpoint, a recipe with its --weights; or images: a folder, an .npz, "
            "module:function.",
            autocompletion=complete_scored,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REFERENCE|KEY=VALUE",
            help="Real images: a data set such as folder:PATH, a recipe for its data, a folder, an .npz of images or "
            "statistics; default: held-out images of the model's data. Overrides of sampling, guidance, representation "
            "and data; where images are scored, of data alone: how the reference is read, e.g. data.size=64.",
            autocompletion=complete_reference,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="inception, dinov2, clip, classifier, pixels or module:function. Default: the classifier of a "
            "labelled data set of up to 64 pixels a side, else inception.",
            autocompletion=complete_option("--features"),
        ),
    ] = None,
    feature_weights: Annotated[
        str | None, typer.Option(help="The feature network's file (inception), or folder or hub name.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Images to score. Default: 1,000 samples, or all images.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="As for 'mezzotint sample'.", autocompletion=complete_option("--sampler"))
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Score a second set, guided by this scale.")] = None,
    infinity: Annotated[
        bool, typer.Option("--infinity", help="Also the Fréchet distance extrapolated to infinitely many samples.")
    ] = False,
    intervals: Annotated[
        int, typer.Option(min=0, help="Also its 95 % bootstrap interval, from so many resamplings.")
    ] = 0,
    captions: Annotated[
        int,
        typer.Option(
            min=0, help="Also: of so many captions, how many samples are nearer to their own image than to 9 others."
        ),
    ] = 0,
    likelihood: Annotated[
        int, typer.Option(min=0, help="Also the exact bits per dimension of so many held-out images (slow).")
    ] = 0,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    precision: Precision = "fp32",
    compiled: Compiled = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page: samples, their nearest training images, classes, a sweep's pictures."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The JSON file to write; default: scores.json in the run folder, else here.")
    ] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Score a model, or images, against real ones: Fréchet and kernel distances, precision and recall, and more.

    Two sets of images: mezzotint evaluate A B. Eight GPUs: torchrun --nproc-per-node 8 $(which mezzotint) evaluate ….
    """
    from mezzotint.evaluation.scores import evaluate as score
    from mezzotint.files import write_text
    from mezzotint.interop import is_checkpoint
    from mezzotint.training.parallel import world

    overrides = [argument for argument in arguments or [] if "=" in argument]
    references = [argument for argument in arguments or [] if "=" not in argument]
    if len(references) > 1:
        raise MezzotintError(f"images are compared with one reference, not with {' and '.join(references)}")
    with world(device) as here:
        scored: Any = model
        read_as: dict[str, Any] = {}
        if is_checkpoint(model) or weights != "model" or is_recipe(model):
            scored = open_model(
                model,
                overrides,
                weights=weights,
                device=str(here.device),
                may_change=WITH_DATA,
                sampler=sampler,
                steps=steps,
            )
            scored.prepare(precision, compiled=compiled)
        elif sampler or steps or guidance:
            raise MezzotintError(f"{model} is images, which no sampler draws; leave sampling out")
        else:
            read_as = _data_options(model, overrides)
        scores = score(
            scored,
            references[0] if references else None,
            features=features,
            weights=feature_weights,
            count=count,
            guidance=guidance,
            captions=captions,
            likelihood=likelihood,
            infinity=infinity,
            intervals=intervals,
            html=html,
            run=run_folder(model),
            data=read_as,
            seed=seed,
            batch_size=batch_size,
            progress=here.is_main,
        )
        if not here.is_main:
            return
    (print_json if as_json else print_scores)(scores)
    out = out or (run_folder(model) or Path()) / "scores.json"
    write_text(out, json_text(scores))
    for path in filter(None, (out, html)):
        console.print(f"wrote {path}", soft_wrap=True)


def _data_options(images: str, overrides: list[str]) -> dict[str, Any]:
    """The options of the reference in the words data.KEY=VALUE, which alone can be given where images are scored."""
    from mezzotint.recipe import DataSettings, read_override

    values: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith("data.") or override.startswith(("data.name=", "data.path=")):
            raise MezzotintError(
                f"override {override!r} is of no use to {images}, which is images; only how the reference is read can "
                "be set, such as data.size=64, and the reference itself stands after the images"
            )
        values |= read_override(override)["data"]
    return DataSettings.parse(values).model_dump(include=set(values))
