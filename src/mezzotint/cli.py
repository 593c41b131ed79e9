"""The command line: parse, call the library, print. Results go to standard output, the rest to standard error."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.table import Table

from mezzotint.errors import MezzotintError
from mezzotint.progress import console, results

app = typer.Typer(
    help="Train, sample and score diffusion models, in any combination of interpolant, target, backbone and sampler.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _complete_recipe(incomplete: str) -> list[str]:
    from mezzotint.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe's name, a YAML file, or a run folder.", autocompletion=_complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides, e.g. training.steps=500 interpolant=gvp data=folder:photos."
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as 'mezzotint train' writes it.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the noise; image i depends on it, on i and on its class alone.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")]
Weights = Annotated[str, typer.Option(help="Which weights of the run: model, or model-ema-<decay>.")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write; default: runs/<recipe>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest whole checkpoint.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a recipe into a run folder.

    Ctrl-C saves a checkpoint and stops; --resume then continues bit for bit. To share the batch among processes:
    torchrun --nproc-per-node 2 $(which mezzotint) train RECIPE.
    """
    from mezzotint.recipe import load_recipe
    from mezzotint.training import train as run_training
    from mezzotint.training.parallel import is_main_process

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    try:
        run_training(loaded, folder, resume=resume, device=device)
    except KeyboardInterrupt:
        console.print(f"stopped; continue with: mezzotint train {recipe} --out {folder} --resume")
        raise typer.Exit(130) from None
    if is_main_process():
        console.print(f"trained {folder}; next: mezzotint sample {folder}", soft_wrap=True)


@app.command()
def sample(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of sampling and guidance, e.g. sampling.eta=0.5."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help='Class names or numbers, e.g. "3, 8"; "null" is no class. Default: all in turn.')
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images in all. Default: 10 a class, at most 100.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddpm, ddim, ode-euler, ode-heun, ode-rk4, ode-dopri5, sde-<w>, sde-heun-<w>, dpm-solver++."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    out: Annotated[Path | None, typer.Option(help="The grid PNG to write; default: RUN/samples.png.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write every image as a PNG into this folder.")] = None,
    npz: Annotated[
        Path | None, typer.Option(help="Also write ADM's .npz: arr_0 uint8 (N, H, W, 3), arr_1 labels.")
    ] = None,
    trajectory: Annotated[Path | None, typer.Option(help="Also write the way from noise to data as a GIF.")] = None,
    device: Device = "auto",
) -> None:
    """Draw images from a trained run into one grid, a class's images side by side."""
    from mezzotint import images as output
    from mezzotint.pipeline import choose_labels, load
    from mezzotint.pipeline import sample as draw
    from mezzotint.training.parallel import choose_device

    pipeline = load(run, weights=weights, device=choose_device(device))
    recipe = _with_sampling(pipeline.recipe, overrides or [], sampler=sampler, steps=steps, guidance=guidance)
    pipeline.recipe = recipe
    names = None if classes is None else [name for name in (part.strip() for part in classes.split(",")) if name]
    if names == []:
        raise MezzotintError("--classes names no class; give names or numbers with commas between, or leave it out")
    count = count or min(100, 10 * (len(names) if names else pipeline.denoiser.num_classes or 10))
    drawn = draw(
        pipeline, names, count, seed=seed, batch_size=batch_size, progress=True, trajectory=trajectory is not None
    )
    final = drawn[-1] if trajectory else drawn
    shown = names or range(pipeline.denoiser.num_classes)
    columns = count // len(shown) if len(shown) > 1 and count % len(shown) == 0 else 10
    out = out or run / "samples.png"
    output.save_grid(final, out, columns=min(columns, 20))
    written = [out]
    if png is not None:
        output.save_pngs(final, png)
        written.append(png)
    if npz is not None:
        output.save_npz(final, choose_labels(pipeline, names, count), npz)
        written.append(npz)
    if trajectory is not None:
        output.save_animation(drawn, trajectory, columns=min(columns, 20))
        written.append(trajectory)
    for path in written:
        results.print(str(path), soft_wrap=True)


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of sampling, e.g. sampling=ddpm.")
    ] = None,
    count: Annotated[int, typer.Option(min=10, help="Samples to score, spread evenly over the classes.")] = 1000,
    sampler: Annotated[str | None, typer.Option(help="As for 'mezzotint sample'.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Score a second set, guided by this scale.")] = None,
    likelihood: Annotated[
        int, typer.Option(min=0, help="Also the exact bits per dimension of so many held-out images (slow).")
    ] = 0,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    out: Annotated[Path | None, typer.Option(help="The JSON file to write; default: RUN/scores.json.")] = None,
    device: Device = "auto",
) -> None:
    """Score a run against held-out real images: class agreement, Fréchet distance, precision and recall."""
    from mezzotint.evaluation.scores import evaluate as score
    from mezzotint.files import write_text
    from mezzotint.pipeline import load
    from mezzotint.training.parallel import choose_device

    pipeline = load(run, weights=weights, device=choose_device(device))
    pipeline.recipe = _with_sampling(pipeline.recipe, overrides or [], sampler=sampler, steps=steps, guidance=None)
    scores = score(
        pipeline,
        count=count,
        guidance=guidance,
        likelihood=likelihood,
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    print_scores(scores)
    out = out or run / "scores.json"
    write_text(out, json.dumps(scores, indent=2) + "\n")
    console.print(f"wrote {out}", soft_wrap=True)


@app.command()
def cost(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON with params, trainable_params and gmacs.")
    ] = False,
) -> None:
    """Count a recipe's parameters and the multiply-adds of one forward pass (the papers' "Gflops")."""
    from dataclasses import asdict

    from mezzotint.evaluation.cost import recipe_cost
    from mezzotint.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    counted = recipe_cost(loaded)
    if as_json:
        typer.echo(json.dumps({"recipe": loaded.name, **asdict(counted)}))
        return
    table = Table("", loaded.name)
    table.add_row("parameters", f"{counted.params:,}")
    table.add_row("of these trained", f"{counted.trainable_params:,}")
    table.add_row("forward pass of one example", f"{counted.gmacs:,.2f} GMACs")
    results.print(table)


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Print this recipe in full, as YAML.", autocompletion=_complete_recipe),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes, or print one with every key resolved."""
    from mezzotint.recipe import load_recipe, recipe_names

    if name is not None:
        typer.echo(load_recipe(name, overrides or []).to_yaml(), nl=False)
        return
    table = Table("recipe", "what it is")
    for known in recipe_names():
        table.add_row(known, load_recipe(known).description)
    results.print(table)


def print_scores(scores: dict[str, Any]) -> None:
    """The scores as a table, samples and real images side by side."""
    guided = "guidance" in scores
    columns = [
        ("", "samples"),
        *([("_guided", f"guided, {scores['guidance']:g}")] if guided else []),
        ("_real", "real data"),
    ]
    table = Table(
        f"{scores['samples']} samples against {scores['reference']}",
        *(title for _, title in columns),
        caption=f"features: {scores['features']}; real data: training images against the same held-out ones",
    )
    rows = {
        "class_agreement": "class agreement, % (real: the classifier's accuracy)",
        "frechet": "Fréchet distance (lower is better)",
        "precision": "precision",
        "recall": "recall",
    }
    values = scores | {"class_agreement_real": scores.get("classifier_accuracy")}
    for key, title in rows.items():
        cells = [values.get(key + suffix) for suffix, _ in columns]
        if any(cell is not None for cell in cells):
            factor, digits = (100, 1) if key == "class_agreement" else (1, 3)
            table.add_row(title, *("" if cell is None else f"{factor * cell:.{digits}f}" for cell in cells))
    if "bits_per_dim" in scores:
        title = "bits per dimension of held-out images"
        table.add_row(title, f"{scores['bits_per_dim']:.3f} ± {scores['bits_per_dim_error']:.3f}")
    results.print(table)


def _with_sampling(recipe: Any, overrides: list[str], **options: Any) -> Any:
    """The run's recipe with other sampling and guidance settings, and nothing else changed."""
    from mezzotint.recipe import override_recipe

    for override in overrides:
        if not override.startswith(("sampling.", "sampling=", "guidance.")):
            raise MezzotintError(
                f"override {override!r} would change the trained model; only sampling and guidance can"
            )
    keys = {"sampler": "sampling.sampler", "steps": "sampling.steps", "guidance": "guidance.scale"}
    given = [f"{keys[key]}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return override_recipe(recipe, [*overrides, *given])


def main() -> None:
    """Run the command line; a user's mistake is one sentence on standard error and exit code 2."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        app(prog_name="mezzotint")
    except MezzotintError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'file'}: {error.strerror}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it here would slow down --help
            raise
        _fail("the GPU is out of memory; lower training.batch_size or --batch-size, or raise training.accumulate.")


def _fail(sentence: str) -> None:
    console.print(f"error: {sentence}", soft_wrap=True, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
