"""The command line: parse, call the library, print. Results go to standard output, the rest to standard error."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.table import Table
from typer.core import TyperGroup

from mezzotint.errors import MezzotintError, shortened
from mezzotint.progress import console, print_anything, results


class Commands(TyperGroup):
    """Says that Ctrl-C was heard, where a command has no more to say."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print("stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    help="Train, sample and score diffusion models, in any combination of interpolant, target, backbone and sampler.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _complete_recipe(incomplete: str) -> list[str]:
    from mezzotint.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _seed(seed: int) -> int:
    from mezzotint.randomness import check_seed

    return check_seed(seed)


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
DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides of the data and the representation, e.g. data=folder:photos."
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder, an official file of DiT, SiT or MDM, a diffusers folder; or a recipe, with its --weights.",
        autocompletion=_complete_recipe,
    ),
]
ModelOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides of sampling, guidance, representation and condition, e.g. sampling.eta=0.5; of a recipe, "
        "anything.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")]
Seed = Annotated[
    int, typer.Option(callback=_seed, help="Seed of the noise; image i depends on it, on i and on its class alone.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")]
Weights = Annotated[
    str, typer.Option(help="Which weights of a run: model, or model-ema-<decay>. With a recipe: the checkpoint.")
]
Precision = Annotated[str, typer.Option(help="fp32, or bf16: the network's weights and activations in bfloat16.")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Import the module:function that a recipe names, and resume what another user wrote; see SECURITY.md.",
    ),
]
Compiled = Annotated[bool, typer.Option("--compile", help="torch.compile the network: a slower start, then faster.")]

#: sections of a trained model's recipe that overrides may change: how it is sampled, and what it is scored against
SAMPLED = ("sampling", "guidance", "representation", "condition")
WITH_DATA = (*SAMPLED, "data")
#: images that a command keeps in memory at once, and that a grid shows of many
MAX_IN_MEMORY, MAX_GRID = 10_000, 100


@app.command()
def train(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write; default: runs/<recipe>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest whole checkpoint.")
    ] = False,
    trust_code: TrustCode = False,
    override: Annotated[
        bool,
        typer.Option(
            "--override", help="With --resume: lr, grad_clip, precision, compile and ema of training may be other ones."
        ),
    ] = False,
    data_changed: Annotated[
        bool, typer.Option("--data-changed", help="With --resume: go on although the data set has changed.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a recipe into a run folder.

    Ctrl-C saves a checkpoint and stops; --resume then continues bit for bit. To share the batch among processes:
    torchrun --nproc-per-node 2 $(which mezzotint) train RECIPE.
    """
    from mezzotint.pipeline import check_sampling
    from mezzotint.recipe import load_recipe
    from mezzotint.training import train as run_training
    from mezzotint.training.parallel import is_main_process

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    try:
        pipeline = run_training(
            loaded,
            folder,
            resume=resume,
            device=device,
            # A state to resume is nothing that was typed.
            trust_code=trust_code or (not resume and _typed_code(loaded, overrides)),
            override=override,
            data_changed=data_changed,
        )
    except KeyboardInterrupt:
        raise _stopped(context, "--resume") from None
    if is_main_process():
        try:
            check_sampling(pipeline)
            step = "sample"
        except MezzotintError:  # a denoising autoencoder is trained for its features
            step = "probe"
        console.print(f"trained {folder}; next: mezzotint {step} {shlex.quote(str(folder))}", soft_wrap=True)


def _typed_code(recipe: Any, overrides: list[str] | None) -> bool:
    """Whether the module:function that `recipe` names stands in the command itself, and so is the user's own word."""
    named = f"representation.fit.perceptual_network={recipe.representation.fit.perceptual_network}"
    return named in (overrides or [])


@app.command("fit-tokenizer")
def fit_tokenizer(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder to write, for representation.path=OUT.")] = Path("tokenizer"),
    trust_code: TrustCode = False,
    device: Device = "auto",
) -> None:
    """Fit a recipe's tokenizer (representation=patch-pca, patch-ae, patch-vae or conv-vae) to its training images.

    The folder appears when all is done. 'mezzotint train' does the same by itself where representation.path is not set.
    """
    from mezzotint.recipe import load_recipe
    from mezzotint.training.tokenizers import fit_tokenizer as run_fitting

    loaded = load_recipe(recipe, overrides or [])
    try:
        metrics = run_fitting(loaded, out, device=device, trust_code=trust_code or _typed_code(loaded, overrides))
    except KeyboardInterrupt:
        console.print(f"stopped; {out} was not written")
        raise typer.Exit(130) from None
    which = "held-out" if metrics["split"] == "test" else "training (there is no test split)"
    results.print(
        f"{metrics['images']:,} {which} images: reconstruction MSE {metrics['mse']:.3g}, "
        f"PSNR {metrics['psnr']:.2f} dB, explained variance {metrics['explained_variance']:.2%}",
        soft_wrap=True,
    )
    results.print(str(out), soft_wrap=True)


@app.command()
def sample(
    model: ModelArgument,
    overrides: ModelOverrides = None,
    classes: Annotated[
        str | None,
        typer.Option(help='Class names or numbers, e.g. "3, tench"; "null" is no class. Default: all in turn.'),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A caption, again for more. Default: some that the model was trained with.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a caption on each line.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="A caption that guidance leads away from.")] = "",
    count: Annotated[
        int | None, typer.Option(min=1, help="Images in all. Default: 10 a class or caption, at most 100.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddpm, ddim, ode-euler, ode-heun, ode-rk4, ode-dopri5, sde-<w>, sde-heun-<w>, dpm-solver++."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    precision: Precision = "fp32",
    compiled: Compiled = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The grid to write; default: samples.png, or .gif of clips, in the run folder, else here."),
    ] = None,
    levels: Annotated[
        Path | None, typer.Option(help="Also a PNG of all resolutions of a Matryoshka network side by side.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Clips: frames per second, in a .gif or an .mp4.")] = 8.0,
    png: Annotated[Path | None, typer.Option(help="Also write every image as a PNG into this folder.")] = None,
    npz: Annotated[
        Path | None,
        typer.Option(help="Also write ADM's .npz: arr_0 uint8 (N, H, W, 3), arr_1 labels. A killed command goes on."),
    ] = None,
    trajectory: Annotated[Path | None, typer.Option(help="Also write the way from noise to data as a GIF.")] = None,
    device: Device = "auto",
) -> None:
    """Draw images into one grid, a class's images side by side.

    Fifty thousand for ADM's evaluator, shared among eight GPUs; the grid then shows some:
    torchrun --nproc-per-node 8 $(which mezzotint) sample MODEL --count 50000 --npz samples.npz.
    """
    from mezzotint import images as output
    from mezzotint.archive import read_npz_images, sample_to_npz
    from mezzotint.conditions import split_classes
    from mezzotint.pipeline import sample as draw
    from mezzotint.pipeline import sample_levels
    from mezzotint.training.parallel import rank_and_size

    rank, world_size = rank_and_size()
    if classes is not None and not classes.strip(", "):
        raise MezzotintError("--classes names no class; give names or numbers with commas between, or leave it out")
    captions = _captions(prompt or [], prompts)
    if npz is None and world_size > 1:
        raise MezzotintError("several processes can draw into one .npz only; give --npz, or start one process")
    if npz is None and (count or 0) > MAX_IN_MEMORY:
        raise MezzotintError(f"{count} images are too many to keep in memory; give --npz, which is written in parts")
    if sum(option is not None for option in (npz, trajectory, levels)) > 1:
        raise MezzotintError("--npz, --trajectory and --levels do not go together; give one of them in each command")
    pipeline = open_model(
        model, overrides or [], weights=weights, device=device, sampler=sampler, steps=steps, guidance=guidance
    )
    pipeline.prepare(precision, compiled=compiled)
    clips = pipeline.recipe.data.frames > 0
    if clips and (npz, png, trajectory, levels) != (None, None, None, None):
        raise MezzotintError("clips are written by --out alone, as a .gif or an .mp4; leave the other outputs out")
    names = None if classes is None else split_classes(classes, pipeline.class_names)
    asked = names or captions or pipeline.prompts or range(pipeline.denoiser.num_classes)
    each = 1 if asked is pipeline.prompts else 10
    count = count or min(100, each * (len(asked) or 10))
    options: dict[str, Any] = {
        "prompts": captions, "negative_prompt": negative_prompt, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    out = out or (_run_folder(model) or Path()) / ("samples.gif" if clips else "samples.png")
    if clips:
        output.check_video(out, fps)
    for path in (out, levels, trajectory):
        if path is not None and path.is_dir():
            raise MezzotintError(f"{path} is a folder; name the file to write")
    if png is not None and rank == 0 and (others := output.others_in(png, count)):
        logging.getLogger("mezzotint").warning(
            "%s holds %d other files, such as %s, which stay beside the %d images", png, len(others), others[-1], count
        )
    pyramid = []
    if npz is not None:
        options |= {"rank": rank, "world_size": world_size, "progress": rank == 0}
        sample_to_npz(pipeline, npz, names, count, **options)
        if rank > 0:
            return
        every = max(1, count // MAX_GRID)
        final = read_npz_images(npz, range(0, count, every)[:MAX_GRID])
    elif levels is not None:
        pyramid = sample_levels(pipeline, names, count, progress=True, **options)
        final = pyramid[-1]
    else:
        drawn = draw(pipeline, names, count, progress=True, trajectory=trajectory is not None, **options)
        final = drawn[-1] if trajectory else drawn
    columns = len(final) // len(asked) if 1 < len(asked) < len(final) and len(final) % len(asked) == 0 else 10
    columns = min(columns, 20)
    if clips:
        output.save_video(final, out, fps, columns=columns)
    else:
        output.save_grid(final, out, columns=columns)
    written = [out]
    if levels is not None:
        output.save_pyramid_grid(pyramid, levels, columns=min(columns, 4))
        written.append(levels)
    if png is not None:
        for start in range(0, count, MAX_IN_MEMORY):
            rows = range(start, min(start + MAX_IN_MEMORY, count))
            output.save_pngs(final if npz is None else read_npz_images(npz, rows), png, first=start)
        written.append(png)
    if npz is not None:
        written.append(npz)
    if trajectory is not None:
        output.save_animation(drawn, trajectory, columns=min(columns, 20))
        written.append(trajectory)
    for path in written:
        results.print(str(path), soft_wrap=True)


def _captions(given: list[str], file: Path | None) -> list[str] | None:
    """The captions of the command line and of a file."""
    from mezzotint.files import read_text

    if file is not None:
        given = given + [line.strip() for line in read_text(file).splitlines() if line.strip()]
        if not given:
            raise MezzotintError(f"{file} holds no captions; expected one on each line")
    return given or None


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run folder, a checkpoint, a recipe with its --weights; or images: a folder, an .npz, "
            "module:function.",
            autocompletion=_complete_recipe,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REFERENCE] [KEY=VALUE]...",
            help="Real images: a data set such as folder:PATH, a recipe for its data, a folder, an .npz of images or "
            "statistics; default: held-out images of the model's data. Overrides of sampling, guidance, representation "
            "and data.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="inception, dinov2, clip, classifier, pixels or module:function. Default: the classifier of a "
            "labelled data set of up to 64 pixels a side, else inception."
        ),
    ] = None,
    feature_weights: Annotated[
        str | None, typer.Option(help="The feature network's file (inception), or folder or hub name.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Images to score. Default: 1,000 samples, or all images.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="As for 'mezzotint sample'.")] = None,
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
        if is_checkpoint(model) or weights != "model" or _is_recipe(model):
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
        elif overrides or sampler or steps or guidance:
            raise MezzotintError(f"{model} is images, which no sampler draws; leave sampling and overrides out")
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
            run=_run_folder(model),
            seed=seed,
            batch_size=batch_size,
            progress=here.is_main,
        )
        if not here.is_main:
            return
    print_scores(scores)
    out = out or (_run_folder(model) or Path()) / "scores.json"
    write_text(out, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    console.print(f"wrote {out}", soft_wrap=True)


@app.command()
def sweep(
    context: typer.Context,
    model: ModelArgument,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="AXIS=VALUE,VALUE...",
            help="sampler, steps, guidance, or a key of sampling or guidance, with the values to go through.",
        ),
    ],
    features: Annotated[str | None, typer.Option(help="As for 'mezzotint evaluate'.")] = None,
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
    device: Device = "auto",
) -> None:
    """Sample and score every combination of samplers, steps, guidance and their settings, each once.

    The same command goes on after a kill, and one with more values costs what is new.
    """
    from mezzotint.evaluation.sweep import parse_axes, sweep_pictures, sweep_table
    from mezzotint.evaluation.sweep import sweep as run_sweep
    from mezzotint.training.parallel import world

    axes, overrides = parse_axes(arguments)
    out = out or _run_folder(model) or Path("sweep")
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
            raise _stopped(context) from None
        if not here.is_main:
            return
    results.print(sweep_table(rows))
    for path in [out / "sweep.csv", *(sweep_pictures(out) if plots else [])]:
        results.print(str(path), soft_wrap=True)


@app.command()
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
    probe: Annotated[str, typer.Option(help="linear, knn, ridge; several with commas between.")] = "linear",
    features: Annotated[
        str | None,
        typer.Option(
            help="Features of another kind on the same data: pixels, pca:COMPONENTS, mae:FOLDER, dinov2, "
            "module:function, …"
        ),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="The same network with fresh weights.")] = False,
    count: Annotated[int | None, typer.Option(min=2, help="Training images to fit on. Default: all.")] = None,
    k: Annotated[int, typer.Option(help="knn: neighbours.")] = 20,
    epochs: Annotated[int, typer.Option(help="linear: epochs; at least 300 updates are made.")] = 90,
    optimizer: Annotated[str, typer.Option(help="linear: sgd, or lars for large sets.")] = "sgd",
    augment: Annotated[
        bool, typer.Option("--augment", help="linear: crop and flip at random; a forward pass an epoch, nothing kept.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            callback=_seed, help="Seed of the images' noise, of the probes' weights and of the order of images."
        ),
    ] = 0,
    batch_size: BatchSize = 256,
    weights: Weights = "model",
    precision: Precision = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="The JSON to write; default: probe.json in the run folder, else here.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also a PNG of accuracy over layer and t (matplotlib).")] = None,
    device: Device = "auto",
) -> None:
    """How well classes can be read off a network's features: of which layer, at which t, from clean or noised images.

    Features are kept, so that another probe of them takes no forward pass.
    """
    from mezzotint.evaluation.features import feature_network
    from mezzotint.evaluation.mae import open_mae
    from mezzotint.evaluation.probing import plot_probe, probe_tables
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
        recipe = _recipe_of(model, changes, weights)
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
    fitted = f"{result['train_images']:,} images of {result['data']} to fit, {result['test_images']:,} to score"
    results.print(f"{result['model']}, {result['input']} images; {fitted}", soft_wrap=True)
    for table in probe_tables(result):
        results.print(table)
    out = out or (_run_folder(model) or Path()) / "probe.json"
    write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    written = [out]
    if figure is not None:
        plot_probe(result, figure)
        written.append(figure)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


@app.command()
def denoise(
    model: ModelArgument,
    overrides: DataOverrides = None,
    t: Annotated[
        list[float] | None, typer.Option(help="A time in [0, 1]; again for more. Default: 0.1, 0.3 and 0.6.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=MAX_GRID, help="Held-out images, a column each.")] = 8,
    noise: Annotated[
        Path | None, typer.Option(help="Also a PNG of noise in pixels and, below it, as much in latents (tokenizers).")
    ] = None,
    seed: Seed = 0,
    weights: Weights = "model",
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; default: denoised.png in the run folder, else here.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show held-out images clean and, for each t, noisy and as the network denoises them in one step."""
    from mezzotint.evaluation.denoising import TIMES, save_denoised, save_noise

    pipeline = open_model(model, overrides or [], weights=weights, device=device, may_change=WITH_DATA)
    written = [out or (_run_folder(model) or Path()) / "denoised.png"]
    save_denoised(pipeline, written[0], times=t or TIMES, count=count, seed=seed)
    if noise is not None:
        save_noise(pipeline, noise, times=t or TIMES, count=count, seed=seed)
        written.append(noise)
    for path in written:
        results.print(str(path), soft_wrap=True)


@app.command()
def study(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="STUDY", help="ldae: the trajectory from DiT to l-DAE.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of all its recipes, e.g. training.steps=2000."),
    ] = None,
    data: Annotated[str, typer.Option(help="digits or fashion-mnist.")] = "fashion-mnist",
    seeds: Annotated[str, typer.Option(help="Seeds with commas between; every cell is trained with each.")] = "0,1",
    cells: Annotated[
        str, typer.Option(help="Cells by name or group (trajectory, dimension, noise), with commas. Default: all.")
    ] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Only measure what each cell would take, and print it.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds to work on at a time, each in a process.")] = 2,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: runs/study-<study>-<data>.")] = None,
    device: Device = "auto",
) -> None:
    """Train and probe all that a paper compares, at a scale for two CPU cores, and print its table beside the paper's.

    The same command goes on after a kill.
    """
    from mezzotint.evaluation.sweep import figure_class
    from mezzotint.studies.ldae import estimate, finished, jobs_of
    from mezzotint.studies.ldae import study as run_study
    from mezzotint.studies.report import write_report

    if name != "ldae":
        raise MezzotintError(f"study {name!r} is unknown; known: ldae")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise MezzotintError(f"--seeds {seeds!r} is not whole numbers with commas between, such as 0,1") from None
    out = out or Path("runs") / f"study-{name}-{data}"
    chosen = [cell.strip() for cell in cells.split(",") if cell.strip()]
    options: dict[str, Any] = {"seeds": numbers, "cells": chosen, "overrides": overrides or []}
    if plan:
        found = estimate([job for job in jobs_of(data, out, **options) if finished(job) is None], device=device)
        table = Table("cell", "tokenizer", "training", "probes", title="seconds, estimated from a few steps")
        for cell, parts in found.items():
            table.add_row(cell, *(f"{seconds:.1f}" for seconds in parts.values()))
        results.print(table)
        results.print(f"in all {_duration(sum(sum(parts.values()) for parts in found.values()))}, in one process")
        return
    figure_class("the pictures of a study")
    try:
        rows = run_study(data, out, device=device, processes=processes, progress=True, **options)
    except KeyboardInterrupt:
        raise _stopped(context) from None
    written = write_report(rows, out, data)
    typer.echo(written[0].read_text(encoding="utf-8"))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


@app.command()
def finetune(
    model: ModelArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Overrides of data and representation, and finetune.KEY, e.g. data=folder:photos finetune.mixup=0.",
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
    device: Device = "auto",
) -> None:
    """Fine-tune the first layers of a network, end to end, as a classifier of images, by MAE's recipe.

    Accuracy on the test split is printed after each epoch. The folder appears when all is done.
    """
    from mezzotint.evaluation.end_to_end import FinetuneSettings, finetune_classifier
    from mezzotint.pipeline import build
    from mezzotint.training.parallel import choose_device

    changes, values = _own_section("finetune", overrides or [])
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}
    settings = FinetuneSettings.parse(values | {key: value for key, value in given.items() if value is not None})
    if random:
        pipeline = build(_recipe_of(model, changes, weights), device=choose_device(device))
    else:
        pipeline = open_model(model, changes, weights=weights, device=device, may_change=WITH_DATA)
    try:
        metrics = finetune_classifier(pipeline, out, settings, layers=layers, t=t, count=count)
    except KeyboardInterrupt:
        console.print(f"stopped; {out} was not written")
        raise typer.Exit(130) from None
    start = "fresh weights" if random else "fine-tuned"
    results.print(
        f"{metrics['model']}, first {metrics['layers']} layers, {start}: top-1 {metrics['top1']:.2%} of "
        f"{metrics['test_images']:,} images",
        soft_wrap=True,
    )
    results.print(str(out), soft_wrap=True)


@app.command("train-mae")
def train_mae(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Overrides of the recipe, and mae.KEY, e.g. training.steps=500 mae.depth=4."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write, for --features mae:OUT.")] = Path("mae"),
    device: Device = "auto",
) -> None:
    """Train a masked autoencoder on a recipe's images, with its patches, width, steps and batch size: a baseline.

    The folder, transformers' ViTMAE, appears when all is done.
    """
    from mezzotint.evaluation.mae import MAESettings
    from mezzotint.evaluation.mae import train_mae as run_training
    from mezzotint.recipe import load_recipe

    changes, values = _own_section("mae", overrides or [])
    settings = MAESettings.parse(values)
    try:
        metrics = run_training(load_recipe(recipe, changes), out, settings, device=device, progress=True)
    except KeyboardInterrupt:
        console.print(f"stopped; {out} was not written")
        raise typer.Exit(130) from None
    results.print(f"loss {metrics['first_loss']:.3f} at first, {metrics['last_loss']:.3f} at last", soft_wrap=True)
    results.print(str(out), soft_wrap=True)


def _own_section(section: str, overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides of a recipe, and the values of those that begin with "section."."""
    from mezzotint.recipe import read_override

    values: dict[str, Any] = {}
    for override in overrides:
        if override.startswith(f"{section}."):
            values |= read_override(override)[section]
    return [override for override in overrides if not override.startswith(f"{section}.")], values


def _recipe_of(model: str, overrides: list[str], weights: str) -> Any:
    """The recipe of a run folder, a checkpoint or a recipe, whose own weights are not wanted."""
    from mezzotint.recipe import load_recipe

    if _run_folder(model) or _is_recipe(model):
        return load_recipe(model, overrides)
    return open_model(model, overrides, weights=weights, device="cpu", may_change=WITH_DATA).recipe


@app.command()
def encode(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="folder:PATH, huggingface:NAME or idx:PATH, encoded as for the published models (256 × 256); or "
            "a recipe, whose data and autoencoder are taken.",
            autocompletion=_complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder of latents to write, for data=latents:OUT.")] = Path("latents"),
    split: Annotated[list[str] | None, typer.Option(help="train, test. Default: what there is.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16: how the latents are stored.")] = "float32",
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
        raise _stopped(context) from None
    results.print(str(folder), soft_wrap=True)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="An official .pt, a diffusers folder, a run folder, or a hub name."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (official: the .pt) to write.")],
    overrides: Overrides = None,
    to: Annotated[
        str,
        typer.Option(
            help="run: a run folder; diffusers: a folder for DiTPipeline; official: a .pt for the official code."
        ),
    ] = "run",
    recipe: Annotated[
        str | None,
        typer.Option(help="What the weights mean, where the file does not tell.", autocompletion=_complete_recipe),
    ] = None,
    weights: Weights = "model",
    vae: Annotated[
        str | None, typer.Option(help="diffusers: the autoencoder to put in; default: the recipe's own.")
    ] = None,
) -> None:
    """Rewrite a checkpoint for this library, for diffusers or for the official code; nothing is lost on the way."""
    from mezzotint.interop import convert as rewrite
    from mezzotint.recipe import load_recipe

    if overrides and recipe is None:
        raise MezzotintError(f"override {overrides[0]!r} is of no recipe; name one by --recipe")
    loaded = None if recipe is None else load_recipe(recipe, overrides or [])
    results.print(str(rewrite(source, out, to=to, recipe=loaded, weights=weights, vae=vae)), soft_wrap=True)  # type: ignore[arg-type]


@app.command("export-vit")
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


@app.command()
def cost(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    samplers: Annotated[bool, typer.Option("--samplers", help="Also what an image costs by each sampler.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, without what is measured here.")] = False,
    device: Device = "auto",
) -> None:
    """Count a recipe's parameters, multiply-adds (the papers' "Gflops") and memory, and estimate its time here.

    The estimate is what the matrix products alone would take at this machine's measured rate: a bound from below.
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
        typer.echo(json.dumps(values | ({"evaluations": evaluations} if samplers else {})))
        return
    here = choose_device(device)
    rate = counting.matmul_rate(here, PRECISIONS[settings.precision])
    seconds = counted.training_gmacs * settings.batch_size * settings.steps / rate
    table = Table("", loaded.name, *([] if paper is None else [paper.source, "difference"]))

    def compared(name: str, ours: float, text: str, theirs: float | None = None, unit: str = "") -> None:
        extra = ["", ""]
        if theirs is not None:
            extra = [f"{theirs:,g}{unit}", f"{ours / theirs - 1:+.2%}"]
        table.add_row(name, text, *(extra if paper else []))

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
    compared(f"{settings.steps:,} steps of {settings.batch_size} at that rate", 0, _duration(seconds))
    results.print(table)
    if samplers:
        table = Table(f"{loaded.sampling.steps} steps by", "network evaluations", "GMACs", "guided")
        for name, number in evaluations.items():
            costs = ["the solver decides", "", ""]
            if number is not None:
                costs = [str(number), f"{number * counted.gmacs:,.0f}", f"{2 * number * counted.gmacs:,.0f}"]
            table.add_row(name, *costs)
        results.print(table)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


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
        loaded = load_recipe(name, overrides or [])
        # A console of another encoding gets YAML's own escapes, so that what is sent to a file is still the recipe.
        typer.echo(loaded.to_yaml(ascii_only=not results.encoding.startswith("utf")), nl=False)
        return
    table = Table("recipe", "what it is")
    for known in recipe_names():
        table.add_row(known, load_recipe(known).description)
    results.print(table)


def _stopped(context: typer.Context, *more: str) -> typer.Exit:
    """Say by which command the one that was interrupted goes on: itself, with the words `more`."""
    from mezzotint.training.parallel import is_main_process

    if is_main_process():
        console.print(f"stopped; continue with: {_command_of(context, *more)}", soft_wrap=True)
    return typer.Exit(130)


def _command_of(context: typer.Context, *more: str) -> str:
    """The running command as it can be typed again, with the words `more` where it lacks them."""
    words = ["mezzotint", str(context.info_name)]
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", "mezzotint.cli", *words[1:]]
    for parameter in context.command.params:
        name = parameter.name or ""
        value, source = context.params.get(name), context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        given = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
        if parameter.param_type_name == "option":
            option = parameter.opts[0]
            if isinstance(value, bool):
                given = [option if value else parameter.secondary_opts[0]]
            else:
                given = [word for one in given for word in (option, one)]
        words += given
    return shlex.join([*words, *(word for word in more if word not in words)])


def print_scores(scores: dict[str, Any]) -> None:
    """The figures of every set side by side, and what they were taken in."""
    sets: dict[str, dict[str, Any]] = scores["sets"]
    titles = {"guided": f"guided, {scores.get('guidance', 1):g}", "real": "real data"}
    table = Table(
        "",
        *(titles.get(name, name) for name in sets),
        caption=f"features: {scores['features']}; reference: {scores['reference']}, {scores['reference_images']} images"
        + ("; real data: its training images" if "real" in sets else ""),
    )
    rows = [row for figures in sets.values() for row in figures if row != "source"]
    for row in dict.fromkeys(rows):
        table.add_row(row, *(_figure(figures.get(row)) for figures in sets.values()))
    results.print(table)
    for split, what in (("train", "training"), ("test", "held-out")):
        if (found := scores.get(f"captions, {split}")) is not None:
            score = f"; CLIP score {found['CLIP score']:.2f}" if "CLIP score" in found else ""
            results.print(
                f"caption agreement, {found['captions']} {what} captions: {found['caption agreement']:.1%} "
                f"(nearer to its own image than to 9 random others; chance 10.0%){score}"
            )
    if "bits_per_dim" in scores:
        bits = f"{scores['bits_per_dim']:.3f} ± {scores['bits_per_dim_error']:.3f}"
        results.print(f"bits per dimension of held-out images: {bits}")


def _figure(value: float | int | list[float] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(map(_figure, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2e}"


def _run_folder(model: str) -> Path | None:
    """The run folder that `model` is; None for anything else, beside which nothing is written."""
    return Path(model) if (Path(model) / "recipe.yaml").is_file() else None


def _is_recipe(model: str) -> bool:
    from mezzotint.recipe import recipe_names

    return model in recipe_names() or model.endswith((".yaml", ".yml"))


def open_model(
    model: str,
    overrides: list[str],
    *,
    weights: str,
    device: str,
    may_change: tuple[str, ...] = SAMPLED,
    **options: Any,
) -> Any:
    """The pipeline of a run folder, of a checkpoint, or of a recipe with the checkpoint `weights`.

    `may_change` are the sections that overrides may change of a trained model. `options` are the sampler, steps and
    guidance that were asked for; None is what the recipe says.
    """
    from mezzotint.interop import load
    from mezzotint.recipe import load_recipe, override_recipe
    from mezzotint.training.parallel import choose_device

    keys = {"sampler": "sampling.sampler", "steps": "sampling.steps", "guidance": "guidance.scale"}
    given = [f"{keys[key]}={json.dumps(value)}" for key, value in options.items() if value is not None]
    here = choose_device(device)
    if not _is_recipe(model):
        for override in overrides:
            if not override.startswith(tuple(section + mark for section in may_change for mark in ".=")):
                raise MezzotintError(
                    f"override {override!r} would change the trained model; only {', '.join(may_change)} can be"
                )
        pipeline = load(model, weights=weights, device=here)
        pipeline.recipe = override_recipe(pipeline.recipe, [*overrides, *given])
        return pipeline
    recipe = load_recipe(model, [*overrides, *given])
    if weights == "model":
        raise MezzotintError(
            f"{model} is a recipe, which has no weights; give a checkpoint by --weights, or a run folder"
        )
    return load(weights, recipe=recipe, device=here)


def main() -> None:
    """Run the command line; a user's mistake is one sentence on standard error and exit code 2."""
    print_anything()
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        app(prog_name="mezzotint")
    except MezzotintError as error:
        _fail(str(error))
    except UnicodeEncodeError as error:
        _fail(f"{shortened(error.object)} is not in UTF-8, as a library that is used here needs it; rename it.")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'file'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if "determine home directory" in str(error):  # pathlib's word for a ~ that means nothing
            _fail("a path begins with ~, and whose home that is is not known here; write it out.")
        if "DataLoader worker" in str(error):  # torch raises it wherever this process is when one dies
            _fail(
                f"a process that decodes images ended ({str(error).splitlines()[0]}), as the system ends one where "
                "memory is short; lower data.workers, and go on from the last checkpoint by --resume."
            )
        if (device := _full(error)) is None:
            raise
        _fail(f"{device} is out of memory; lower training.batch_size or --batch-size, or raise training.accumulate.")


def _full(error: BaseException) -> str | None:
    """What has no memory left, where that is what the error says; importing torch to ask would slow down --help."""
    if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error):
        return "the GPU"
    return "the CPU" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else None


def _fail(sentence: str) -> None:
    console.print(f"error: {MezzotintError(sentence)}", soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
