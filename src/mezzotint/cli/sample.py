"""``mezzotint sample``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.app import stopped
from mezzotint.cli.completion import complete_option
from mezzotint.cli.models import open_model, run_folder
from mezzotint.cli.options import BatchSize, Compiled, Device, ModelArgument, ModelOverrides, Precision, Seed, Weights
from mezzotint.errors import MezzotintError
from mezzotint.progress import results

#: images that a command keeps in memory at once, and that a grid shows of many
MAX_IN_MEMORY, MAX_GRID = 10_000, 100


def sample(
    context: typer.Context,
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
        typer.Option(
            help="ddpm, ddim, ode-euler, ode-heun, ode-rk4, ode-dopri5, sde-<w>, sde-heun-<w>, dpm-solver++.",
            autocompletion=complete_option("--sampler"),
        ),
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
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Write class names or captions into the pictures.")
    ] = True,
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
    from mezzotint.pipeline import choose_labels, label_names, sample_levels
    from mezzotint.pipeline import sample as draw
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
    out = out or (run_folder(model) or Path()) / ("samples.gif" if clips else "samples.png")
    if clips:
        output.check_video(out, fps)
    for path in (out, levels, trajectory):
        if path is not None and path.is_dir():
            raise MezzotintError(f"{path} is a folder; name the file to write")
    if png is not None and rank == 0 and (others := output.others_in(png, count)):
        logging.getLogger("mezzotint").warning(
            "%s holds %d other files, such as %s, which stay beside the %d images", png, len(others), others[-1], count
        )
    pyramid, shown = [], range(count)
    if npz is not None:
        options |= {"rank": rank, "world_size": world_size, "progress": rank == 0}
        try:
            sample_to_npz(pipeline, npz, names, count, **options)
        except KeyboardInterrupt:
            raise stopped(context) from None
        if rank > 0:
            return
        shown = range(0, count, max(1, count // MAX_GRID))[:MAX_GRID]
        final = read_npz_images(npz, shown)
    elif levels is not None:
        pyramid = sample_levels(pipeline, names, count, progress=True, **options)
        final = pyramid[-1]
    else:
        drawn = draw(pipeline, names, count, progress=True, trajectory=trajectory is not None, **options)
        final = drawn[-1] if trajectory else drawn
    texts = label_names(pipeline, choose_labels(pipeline, names, count, captions)) if labels else []
    texts = [texts[i] for i in shown] if texts else []
    columns = len(final) // len(asked) if 1 < len(asked) < len(final) and len(final) % len(asked) == 0 else 10
    columns = min(columns, 20)
    if clips:
        output.save_video(final, out, fps, columns=columns, labels=texts)
    else:
        output.save_grid(final, out, columns=columns, labels=texts)
    written = [out]
    if levels is not None:
        output.save_pyramid_grid(pyramid, levels, columns=min(columns, 4), labels=texts)
        written.append(levels)
    if png is not None:
        for start in range(0, count, MAX_IN_MEMORY):
            rows = range(start, min(start + MAX_IN_MEMORY, count))
            output.save_pngs(final if npz is None else read_npz_images(npz, rows), png, first=start)
        written.append(png)
    if npz is not None:
        written.append(npz)
    if trajectory is not None:
        output.save_animation(drawn, trajectory, columns=columns, labels=texts)
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
