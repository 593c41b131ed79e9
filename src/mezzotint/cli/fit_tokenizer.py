"""``mezzotint fit-tokenizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.models import typed_code
from mezzotint.cli.options import Device, Json, Overrides, RecipeArgument, TrustCode
from mezzotint.cli.tables import print_json
from mezzotint.progress import console, results


def fit_tokenizer(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder to write, for representation.path=OUT.")] = Path("tokenizer"),
    trust_code: TrustCode = False,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Fit a recipe's tokenizer (representation=patch-pca, patch-ae, patch-vae or conv-vae) to its training images.

    The folder appears when all is done. 'mezzotint train' does the same by itself where representation.path is not set.
    """
    from mezzotint.recipe import load_recipe
    from mezzotint.training.tokenizers import fit_tokenizer as run_fitting

    loaded = load_recipe(recipe, overrides or [])
    try:
        metrics = run_fitting(loaded, out, device=device, trust_code=trust_code or typed_code(loaded, overrides))
    except KeyboardInterrupt:
        console.print(f"stopped; {out} was not written")
        raise typer.Exit(130) from None
    if as_json:
        return print_json({**metrics, "folder": str(out)})
    which = "held-out" if metrics["split"] == "test" else "training (there is no test split)"
    results.print(
        f"{metrics['images']:,} {which} images: reconstruction MSE {metrics['mse']:.3g}, "
        f"PSNR {metrics['psnr']:.2f} dB, explained variance {metrics['explained_variance']:.2%}",
        soft_wrap=True,
    )
    results.print(str(out), soft_wrap=True)
