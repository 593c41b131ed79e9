"""``mezzotint cost``."""

from __future__ import annotations

from typing import Annotated

import typer

from mezzotint.cli.options import Device, Json, Overrides, RecipeArgument
from mezzotint.cli.tables import Table, duration, print_json, print_table


def cost(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    samplers: Annotated[bool, typer.Option("--samplers", help="Also what an image costs by each sampler.")] = False,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Count a recipe's parameters, multiply-adds (the papers' "Gflops") and memory, and the least time it takes here.

    The least, as it is what the matrix products alone take at this machine's measured rate; the rest comes on top. It
    is not measured for --json.
    """
    from dataclasses import asdict

    from mezzotint.evaluation import cost as counting
    from mezzotint.files import readable_size
    from mezzotint.pipeline import PRECISIONS
    from mezzotint.recipe import load_recipe
    from mezzotint.training.parallel import choose_device

    loaded = load_recipe(recipe, overrides or [])
    settings = loaded.training
    counted = counting.recipe_cost(loaded)
    paper = counting.published(loaded)
    evaluations = counting.sampling_evaluations(loaded) if samplers else {}
    micro = settings.batch_size // settings.accumulate
    memory = counting.activation_bytes(loaded, 1, settings.precision)
    if as_json:
        values = {"recipe": loaded.name, **asdict(counted), "training_gmacs": counted.training_gmacs}
        values |= {"activation_bytes_per_image": memory, "published": asdict(paper) if paper else None}
        return print_json(values | ({"evaluations": evaluations} if samplers else {}))
    here = choose_device(device)
    rate = counting.matmul_rate(here, PRECISIONS[settings.precision])
    seconds = counted.training_gmacs * settings.batch_size * settings.steps / rate
    rows: list[list[str]] = []

    def compared(name: str, ours: float, text: str, theirs: float | None = None, unit: str = "") -> None:
        extra = ["", ""]
        if theirs is not None:
            extra = [f"{theirs:,g}{unit}", f"{ours / theirs - 1:+.2%}"]
        rows.append([name, text, *(extra if paper else [])])

    millions = counted.trainable_params / 1e6
    compared("parameters", 0, f"{counted.params:,}")
    trained = f"{counted.trainable_params:,}"
    compared("of these trained", millions, trained, paper.params_millions if paper else None, " million")
    forward = f"{counted.gmacs:,.4g} GMACs"
    compared("forward pass of one example", counted.gmacs, forward, paper.gmacs if paper else None)
    compared("training on one example", 0, f"{counted.training_gmacs:,.4g} GMACs")
    activations = f"{readable_size(memory)} an example, {readable_size(micro * memory)} at {micro}"
    compared(f"activations, {settings.precision}", 0, activations)
    compared(f"matrix products here, {settings.precision}", 0, f"{rate:,.0f} GMAC/s ({here})")
    compared(f"{settings.steps:,} steps of {settings.batch_size} at that rate", 0, f"at least {duration(seconds)}")
    print_table(Table(["recipe", loaded.name, *([] if paper is None else [paper.source, "difference"])], rows))
    if samplers:
        rows = [
            [name, "the solver decides", "", ""]
            if number is None
            else [name, str(number), f"{number * counted.gmacs:,.0f}", f"{2 * number * counted.gmacs:,.0f}"]
            for name, number in evaluations.items()
        ]
        print_table(Table([f"{loaded.sampling.steps} steps by", "network evaluations", "GMACs", "guided"], rows))
