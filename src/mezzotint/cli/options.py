"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from mezzotint.cli.completion import (
    complete_device,
    complete_model,
    complete_option,
    complete_overrides,
    complete_recipe,
    complete_weights,
)
from mezzotint.cli.models import SAMPLED, WITH_DATA


def seed_option(context: typer.Context, seed: int) -> int:
    if context.resilient_parsing:  # completion, which does not wait for torch
        return seed
    from mezzotint.randomness import check_seed

    return check_seed(seed)


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe's name, a YAML file, or a run folder.", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, e.g. training.steps=500 interpolant=gvp data=folder:photos.",
        autocompletion=complete_overrides(),
    ),
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of the data and the representation, e.g. data=folder:photos.",
        autocompletion=complete_overrides(WITH_DATA),
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder, an official file of DiT, SiT or MDM, a diffusers folder; or a recipe, with its --weights.",
        autocompletion=complete_model,
    ),
]
ModelOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of sampling, guidance, representation and condition, e.g. sampling.eta=0.5; of a recipe, "
        "anything.",
        autocompletion=complete_overrides(SAMPLED),
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.", autocompletion=complete_device),
]
Seed = Annotated[
    int,
    typer.Option(callback=seed_option, help="Seed of the noise; image i depends on it, on i and on its class alone."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")]
Weights = Annotated[
    str,
    typer.Option(
        help="Which weights of a run: model, or model-ema-<decay>. With a recipe: the checkpoint.",
        autocompletion=complete_weights,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="fp32, or bf16: the network's weights and activations in bfloat16.",
        autocompletion=complete_option("--precision"),
    ),
]
DataChanged = Annotated[bool, typer.Option("--data-changed", help="Go on although the data set has changed.")]
Override = Annotated[
    bool,
    typer.Option(
        "--override",
        help="Go on with another lr, grad_clip, precision, compile or ema of training, or another end of a decay.",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Import the module:function that a recipe names, and resume what another user wrote; see SECURITY.md.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the figures as one JSON document, not rounded, and nothing else."),
]
Compiled = Annotated[bool, typer.Option("--compile", help="torch.compile the network: a slower start, then faster.")]
