"""``mezzotint encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.completion import complete_dataset, complete_option
from mezzotint.cli.options import Device, Overrides
from mezzotint.progress import results


def encode(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="folder:PATH, huggingface:NAME or idx:PATH, encoded as for the published models (256 × 256); or "
            "a recipe, whose data and autoencoder are taken.",
            autocompletion=complete_dataset,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder of latents to write, for data=latents:OUT.")] = Path("latents"),
    split: Annotated[
        list[str] | None,
        typer.Option(help="train, test. Default: what there is.", autocompletion=complete_option("--split")),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, float16 or bfloat16: how the latents are stored.", autocompletion=complete_option("--dtype")
        ),
    ] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Device = "auto",
) -> None:
    """Encode a data set by a KL autoencoder, once, so that training reads latents instead of images.

    The same command goes on after a kill. On eight GPUs: torchrun --nproc-per-node 8 $(which mezzotint) encode ….
    """
    from mezzotint.data import SOURCES
    from mezzotint.encoding import encode as write_latents
    from mezzotint.recipe import load_recipe

    if dataset.partition(":")[0] in SOURCES and ":" in dataset:
        recipe = load_recipe("dit-xl-2-256", [f"data={dataset}", *(overrides or [])])
    else:
        recipe = load_recipe(dataset, overrides or [])
    try:
        folder = write_latents(recipe, out, splits=split, dtype=dtype, batch_size=batch_size, device=device)
    except KeyboardInterrupt:
        raise stopped(context) from None
    results.print(str(folder), soft_wrap=True)
