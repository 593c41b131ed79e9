"""``mezzotint export-vit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.models import open_model
from mezzotint.cli.options import ModelArgument, Weights
from mezzotint.progress import results


def export_vit(
    model: ModelArgument,
    t: Annotated[float, typer.Option("--t", help="The fixed time, 0 data to 1 noise; step 10 of 1000 is 0.01.")] = 0.01,
    layers: Annotated[int | None, typer.Option(help="How many of the first blocks. Default: half of them.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to write, for transformers' AutoModel.")] = Path("vit"),
    weights: Weights = "model",
) -> None:
    """Write the first blocks of a DiT, at a fixed time, as a plain vision transformer: l-DAE's encoder.

    It is an IJepaModel of transformers, which is ViTModel without a class token, and computes what the blocks do.
    """
    from mezzotint.interop.vit import export_vit as write_vit

    pipeline = open_model(model, [], weights=weights, device="cpu")
    results.print(str(write_vit(pipeline, out, t=t, layers=layers)), soft_wrap=True)
