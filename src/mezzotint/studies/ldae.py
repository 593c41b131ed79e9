"""l-DAE's trajectory at a scale for two CPU cores: every recipe trained, probed, and laid beside the paper's figures.

>>> finished = study("digits", "runs/study-ldae", seeds=[0, 1])

    OUT/cells/CELL-seedS.json   a finished cell: the command that trains it, and its accuracies
    OUT/runs/CELL-seedS/        its run folder, without checkpoints once it is finished
    OUT/tokenizers/             tokenizers, each fitted once for all cells that share it
    OUT/study.md, figures/      what `report.write_report` makes of the finished cells
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shlex
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError, closest
from mezzotint.evaluation.probe import LinearProbe, LinearProtocol
from mezzotint.evaluation.probing import TIMES, probe
from mezzotint.files import parse_json, write_text
from mezzotint.locks import locked
from mezzotint.pipeline import build
from mezzotint.progress import console, messages
from mezzotint.randomness import generator_for
from mezzotint.recipe import Recipe, load_recipe, recipe_names
from mezzotint.representations.image_space import FullBasisEncoder
from mezzotint.representations.tokenizer import CLASSES, INFO, ConvVAE, PatchPCA, PatchTokenizer
from mezzotint.training import train
from mezzotint.training.loop import make_objective
from mezzotint.training.parallel import choose_device
from mezzotint.training.tokenizers import TokenizerLosses, fit_tokenizer, tokenizer_info

#: raise whenever a cell's figures change for the same settings
VERSION = 1
PROBES = ("linear", "knn")
#: the time that probed networks are told, and those that the final model is also told
TIME, MORE_TIMES = TIMES[0], (0.0, 0.02, 0.04, 0.08)
TRAJECTORY = tuple(name for name in recipe_names() if name.startswith("ldae-"))
FINAL, SINGLE = "ldae-10-original-image", "ldae-single-level"
#: what other latent dimensions are tried with
TOKENIZER_RECIPES = {
    "conv-vae": "ldae-04-linear-variance",
    "patch-vae": "ldae-05a-patch-vae",
    "patch-ae": "ldae-05b-patch-ae",
    "patch-pca": "ldae-05c-patch-pca",
}
#: σ / α of single-level models besides the paper's √(1/3)
NOISE_LEVELS = (0.2, 1.0)
#: groups of cells, and what belongs to them of the trajectory
GROUPS: dict[str, tuple[str, ...]] = {
    "trajectory": TRAJECTORY,
    "dimension": tuple(TOKENIZER_RECIPES.values()),
    "noise": (SINGLE, FINAL),
}


@dataclass(frozen=True)
class Scale:
    """What makes a recipe for ImageNet one for a small data set: overrides, and nothing else that differs from it."""

    every: tuple[str, ...]
    """Of all recipes: data, size of the network, length of training."""
    conv: tuple[str, ...]
    """Of those on conv-vae, whose latent positions the network takes two by two."""
    patches: tuple[str, ...]
    """Of those on patch tokenizers."""
    image: tuple[str, ...]
    """Of networks that are given images."""
    classes: tuple[str, ...]
    """Of the one with classes."""
    dimension: int
    """Numbers a token in the trajectory."""
    dimensions: tuple[int, ...]
    """And those that are tried; multiples of 4, of which conv-vae has a quarter at each latent position."""
    probe_images: int | None
    """Training images that probes are fitted on; None: all."""


SCALES = {
    "digits": Scale(
        every=(
            "data={name: digits, path: null, size: 8, channels: 1, flip: false, workers: 0}",
            "backbone.width=48",
            "backbone.depth=4",
            "backbone.heads=4",
            "training.steps=400",
            "training.warmup_steps=100",  # a quarter, as in the paper
            "training.batch_size=32",
            "training.lr=4.0e-3",
            "training.ema=[0.99]",
            "training.ema_warmup=true",
            "training.checkpoint_every=200",
        ),
        conv=(
            "representation={stride: 2, channels: 2}",
            "representation.fit={widths: [16, 32], layers: 1, groups: 8, steps: 200, batch_size: 32}",
            "representation.fit={discriminator_width: 16, discriminator_layers: 1, adversarial_start: 100}",
            "representation.fit.perceptual_network=mezzotint.studies.perceptual:digits",
        ),
        patches=("representation={stride: 4, channels: 8}", "representation.fit.steps=600"),
        image=("backbone.patch_size=4",),
        classes=("backbone.num_classes=10",),
        dimension=8,
        dimensions=(4, 8, 16),
        probe_images=None,
    ),
    "fashion-mnist": Scale(
        every=(
            "data={name: idx, path: null, size: 32, channels: 1, flip: true, workers: 0}",
            "backbone.width=64",
            "backbone.depth=8",
            "backbone.heads=4",
            "training.steps=600",
            "training.warmup_steps=150",
            "training.batch_size=32",
            "training.lr=1.0e-3",
            "training.ema=[0.99]",
            "training.ema_warmup=true",
            "training.checkpoint_every=200",
        ),
        conv=(
            "representation={stride: 4, channels: 4}",
            "representation.fit={widths: [8, 16, 32], layers: 1, groups: 8, steps: 200, batch_size: 32}",
            "representation.fit={discriminator_width: 16, discriminator_layers: 2, adversarial_start: 100}",
            "representation.fit={perceptual_network: 'mezzotint.studies.perceptual:fashion_mnist', examples: 2000}",
        ),
        patches=("representation={stride: 8, channels: 16}", "representation.fit={steps: 600, examples: 2000}"),
        image=("backbone.patch_size=8",),
        classes=("backbone.num_classes=10",),
        dimension=16,
        dimensions=(4, 16, 48),
        probe_images=5000,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One thing to train: a recipe, and what it differs in from that recipe at the study's scale."""

    recipe: str
    group: str = "trajectory"
    suffix: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.recipe + self.suffix


@dataclass(frozen=True)
class Job:
    """A cell with a seed: the overrides and the recipe that they make, and its places."""

    cell: Cell
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe
    out: Path
    probe_images: int | None

    @property
    def name(self) -> str:
        return f"{self.cell.name}-seed{self.seed}"

    @property
    def file(self) -> Path:
        return self.out / "cells" / f"{self.name}.json"

    @property
    def run(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def settings(self) -> dict[str, Any]:
        """All that its figures depend on."""
        return {
            "version": VERSION,
            "recipe": self.recipe.model_dump(mode="json", exclude={"description", "sampling", "guidance"}),
            "probe_images": self.probe_images,
        }

    @property
    def command(self) -> str:
        """What trains it alone."""
        return shlex.join(["mezzotint", "train", self.cell.recipe, *self.overrides])


def cells_of(data: str) -> list[Cell]:
    """All cells for a data set: the trajectory, other latent dimensions, other single noise levels."""
    scale = scale_of(data)
    found = [Cell(name) for name in TRAJECTORY]
    for tokenizer, recipe in TOKENIZER_RECIPES.items():
        for d in scale.dimensions:
            if d != scale.dimension:
                channels = d // 4 if tokenizer == "conv-vae" else d
                found.append(Cell(recipe, "dimension", f"-d{d}", (f"representation.channels={channels}",)))
    found += [Cell(SINGLE, "noise", f"-sigma{s:g}", (f"objective.noise_level={s:g}",)) for s in NOISE_LEVELS]
    return found


def scale_of(data: str) -> Scale:
    """Raises `MezzotintError` for a data set that the study has no scale for."""
    if data not in SCALES:
        raise MezzotintError(f"the study has no scale for the data set {data!r}; {closest(data, SCALES)}")
    return SCALES[data]


def choose_cells(data: str, names: Sequence[str] = ()) -> list[Cell]:
    """The cells called `names`, by name or by one of `GROUPS`; none named: all.

    Raises `MezzotintError` for an unknown one.
    """
    every = cells_of(data)
    known = [*GROUPS, *(cell.name for cell in every)]
    for name in names:
        if name not in known:
            raise MezzotintError(f"cell {name!r} is unknown; {closest(name, known)}")
    chosen = {*names, *(recipe for name in names for recipe in GROUPS.get(name, ()))}
    return [cell for cell in every if not names or cell.name in chosen or cell.group in chosen]


def overrides_of(cell: Cell, scale: Scale) -> tuple[str, ...]:
    """What shrinks the cell's recipe, and then the cell's own."""
    recipe = load_recipe(cell.recipe)
    conv = recipe.representation.name == "conv-vae"
    return (
        *scale.every,
        *(scale.conv if conv else scale.patches),
        *(scale.image if recipe.backbone.input == "image" else ()),
        *(scale.classes if recipe.backbone.num_classes else ()),
        *cell.overrides,
    )


def jobs_of(
    data: str,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1),
    cells: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[Job]:
    """What `study` has to do, a seed after the other. Raises `MezzotintError` as `study` does."""
    scale, chosen = scale_of(data), choose_cells(data, cells)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise MezzotintError(f"seeds are different numbers from 0 upwards, at least one, not {list(seeds)}")
    if own := [word for word in overrides if word.partition("=")[0].partition(".")[0] in ("seed", "data")]:
        raise MezzotintError(f"override {own[0]!r} is the study's own; use --seeds and --data")
    jobs = []
    for seed in seeds:
        for cell in chosen:
            words = (*overrides_of(cell, scale), *overrides, f"seed={seed}")
            jobs.append(Job(cell, seed, words, load_recipe(cell.recipe, words), Path(out), scale.probe_images))
    return jobs


def study(
    data: str,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1),
    cells: Sequence[str] = (),
    overrides: Sequence[str] = (),
    device: str = "auto",
    processes: int = 1,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train and probe l-DAE's recipes on "digits" or "fashion-mnist" into the folder `out`; the finished cells.

    cells: names or groups, see `choose_cells`. overrides: ``key=value`` after those of `SCALES`, for all cells. A
    finished cell is kept as JSON and not trained again, and a training that was interrupted goes on from its last
    checkpoint, so the same call goes on after a kill. processes: how many seeds are worked on at a time, each with its
    share of the threads.

    Linear and k-NN probes look at half of the blocks at t = 0.01, clean images; of `FINAL` at all blocks and further
    times. Returns {"cell", "group", "recipe", "seed", "command", "tokenizer", "seconds", "rows", …}, rows those of
    `probe`. Raises `MezzotintError`, before anything is trained, for an unknown data set, cell or key, seeds that
    are none, and a folder that holds cells of other settings.
    """
    jobs = jobs_of(data, out, seeds=seeds, cells=cells, overrides=overrides)
    todo = [job for job in jobs if finished(job) is None]
    seeds = list(dict.fromkeys(job.seed for job in todo))
    processes = max(1, min(processes, len(seeds)))
    all_threads = torch.get_num_threads()
    threads = max(1, all_threads // processes)
    if progress and todo:
        torch.set_num_threads(threads)
        plan = estimate(todo, device=device)
        torch.set_num_threads(all_threads)
        minutes = max(sum(sum(plan[job.name].values()) for job in todo if job.seed == seed) for seed in seeds) / 60
        minutes *= -(-len(seeds) // processes)
        how = f"{processes} process(es) of {threads} thread(s)"
        console.print(f"{len(todo)} of {len(jobs)} cells to do: about {minutes:.0f} minutes, {how}", soft_wrap=True)
    parts = [[job for job in todo if job.seed == seed] for seed in seeds]
    with locked(Path(out)):
        if processes == 1:
            for part in parts:
                _work(part, device, progress)
        else:
            with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (threads,)) as pool:
                for future in [pool.submit(_work, part, device, progress) for part in parts]:
                    future.result()
    rows = [finished(job) for job in jobs]
    return [row for row in rows if row is not None]


def finished(job: Job) -> dict[str, Any] | None:
    """What is kept of a finished cell; None where there is none, or the file was damaged.

    Raises `MezzotintError` where it was made with other settings.
    """
    try:
        held = parse_json(job.file.read_text(encoding="utf-8"))
        settings, result = held["settings"], dict(held["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if settings != json.loads(json.dumps(job.settings)):
        raise MezzotintError(
            f"{job.file} was made with other settings; give those that it was made with, or choose another --out"
        )
    return result


def accuracy_of(row: dict[str, Any], probe: str, *, layer: int | None = None, t: float = TIME) -> float:
    """A finished cell's accuracy in [0, 1] after `layer` blocks, None being half of them."""
    wanted = str(row["layer"] if layer is None else layer)
    return next(
        float(found["top1"])
        for found in row["rows"]
        if (found["layer"], found["t"], found["probe"]) == (wanted, t, probe)
    )


# ---- A cell ----------------------------------------------------------------------------------------------------------


def _begin(threads: int) -> None:
    """What a process of a study does first: it will not outlive the one that started it, not even a killed one."""
    torch.set_num_threads(threads)
    shown = ExitStack()
    shown.enter_context(messages())
    atexit.register(shown.close)  # which keeps it: a context that nothing holds is left at once
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(jobs: Sequence[Job], device: str, progress: bool) -> None:
    """Finish the jobs of a seed, one after another."""
    for number, job in enumerate(jobs, 1):
        begun = time.perf_counter()
        row = _finish(job, device)
        if progress:
            found = accuracy_of(row, "linear")
            took = time.perf_counter() - begun
            console.print(f"{number} of {len(jobs)}: {job.name}: linear {found:.1%}, {took:.0f} s", soft_wrap=True)


def _finish(job: Job, device: str) -> dict[str, Any]:
    """Train, probe, keep."""
    begun = time.perf_counter()
    recipe, metrics = _with_tokenizer(job, device)
    pipeline = train(recipe, job.run, resume=(job.run / "recipe.yaml").is_file(), device=device, quiet=True)
    trained, depth = time.perf_counter() - begun, recipe.backbone.depth
    half = max(1, depth // 2)
    views: list[tuple[Sequence[int], Sequence[float]]] = [([half], [TIME])]
    if job.cell.name == FINAL:
        views = [(range(1, depth + 1), [TIME]), ([half], MORE_TIMES)]
    rows: list[dict[str, Any]] = []
    for layers, times in views:
        found = probe(
            pipeline, layers=layers, times=times, probes=PROBES, count=job.probe_images, seed=job.seed, cache=False
        )
        rows += found["rows"]
    result = {
        "cell": job.cell.name,
        "group": job.cell.group,
        "recipe": job.cell.recipe,
        "seed": job.seed,
        "command": job.command,
        "steps": recipe.training.steps,
        "depth": depth,
        "layer": half,
        "tokenizer": {"name": recipe.representation.name, "dimension": token_dimension(recipe)} | metrics,
        "train_images": found["train_images"],
        "test_images": found["test_images"],
        "seconds": {"training": trained, "all": time.perf_counter() - begun},
        "rows": rows,
    }
    write_text(job.file, json.dumps({"settings": job.settings, "result": result}, indent=1) + "\n")
    shutil.rmtree(job.run / "state", ignore_errors=True)  # its checkpoints are of no more use
    return result


def token_dimension(recipe: Recipe) -> int:
    """Numbers of x that a token stands for: of conv-vae those of patch_size × patch_size positions."""
    side = recipe.backbone.patch_size if recipe.representation.name == "conv-vae" else 1
    return recipe.representation.channels * side**2


def _tokenizer_folder(job: Job) -> Path:
    """Where the job's tokenizer is: one for all with its data, settings and seed."""
    words = job.recipe.model_dump(mode="json", include={"data", "representation", "seed"})
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    return job.out / "tokenizers" / f"{job.recipe.representation.name}-{key}"


def _with_tokenizer(job: Job, device: str) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the folder of its tokenizer, fitted if need be, and how well that one reconstructs."""
    folder, settings = _tokenizer_folder(job), job.recipe.representation
    if not (folder / INFO).is_file():
        fit_tokenizer(job.recipe, folder, device=device, quiet=True)
    quality = _quality(folder)
    recipe = job.recipe.model_copy(update={"representation": settings.model_copy(update={"path": str(folder)})})
    return recipe, quality


def _quality(folder: Path) -> dict[str, float]:
    """How well the tokenizer of `folder` reconstructs. Raises `MezzotintError` where its file does not say."""
    file = folder / "metrics.json"
    try:
        metrics = parse_json(file.read_bytes())
        return {key: float(metrics[key]) for key in ("psnr", "explained_variance")}
    except (OSError, ValueError, TypeError, LookupError):
        raise MezzotintError(f"{file} is damaged; remove {folder}, which the same command then fits anew") from None


# ---- What it will take -----------------------------------------------------------------------------------------------


def estimate(jobs: Sequence[Job], *, device: str = "auto") -> dict[str, dict[str, float]]:
    """Seconds that each job should take, by name: {"tokenizer", "training", "probes"}, from a few measured steps.

    A tokenizer counts with the first of the jobs that share it. A perceptual network is fitted for this, if need be.
    """
    here = choose_device(device)
    steps: dict[str, float] = {}
    fits: dict[str, float] = {}
    fitted: set[Path] = set()
    found = {}
    images = {split: len(jobs[0].recipe.data.load(split)) for split in ("train", "test")} if jobs else {}  # type: ignore[arg-type]
    for job in jobs:
        name, folder, tokenizer = job.cell.name, _tokenizer_folder(job), 0.0
        if folder not in fitted and not (folder / INFO).is_file():
            if name not in fits:
                fits[name] = _fit_seconds(job.recipe, here)
            tokenizer = fits[name]
        fitted.add(folder)
        if name not in steps:
            steps[name] = _step_seconds(job.recipe, here)
        step = steps[name]
        training, probes = step * job.recipe.training.steps, _probe_seconds(job, step, images, here)
        found[job.name] = {"tokenizer": tokenizer, "training": training, "probes": probes}
    return found


def _per_call(call: Callable[[], object], times: int = 3) -> float:
    """The median of a few calls' seconds, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _random_tokenizer(recipe: Recipe, here: torch.device) -> Any:
    info = tokenizer_info(recipe)
    with torch.random.fork_rng(devices=[]):
        return CLASSES[info.name](info).to(here)


def _random_images(recipe: Recipe, count: int, here: torch.device) -> Tensor:
    shape = (count, recipe.image_channels, recipe.data.size, recipe.data.size)
    return torch.rand(shape, generator=generator_for(0), device="cpu").to(here) * 2 - 1


def _step_seconds(recipe: Recipe, here: torch.device) -> float:
    """Of one training step on images in memory."""
    pipeline, tokenizer = build(recipe, device=here), _random_tokenizer(recipe, here).requires_grad_(False)
    if pipeline.denoiser.space is not None:
        pipeline.denoiser.space.tokenizer = tokenizer
    objective = make_objective(recipe, pipeline.denoiser.train())
    optimizer = torch.optim.AdamW(pipeline.denoiser.parameters(), lr=0.0, fused=here.type in ("cpu", "cuda"))
    encoder = FullBasisEncoder(tokenizer) if recipe.objective.residual_weight else tokenizer
    size = recipe.training.batch_size
    images, generator = _random_images(recipe, size, here), generator_for(0, device=here)
    labels = torch.zeros(size, dtype=torch.int64, device=here)

    def step() -> None:
        losses = objective(encoder.encode(images), labels, objective.draw(size, generator))
        losses["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _per_call(step)


def _fit_seconds(recipe: Recipe, here: torch.device) -> float:
    """Of fitting the tokenizer: its steps, and passes over the images that it is measured on."""
    tokenizer, fit = _random_tokenizer(recipe, here), recipe.representation.fit
    images, generator = _random_images(recipe, fit.batch_size, here), generator_for(0, device=here)

    @torch.no_grad()
    def look() -> None:
        tokenizer.decode(tokenizer.encode(images))

    seconds = 2 * _per_call(look) * fit.examples / fit.batch_size  # latents' scale on training, errors on held-out ones
    if isinstance(tokenizer, PatchPCA):
        return seconds
    assert isinstance(tokenizer, PatchTokenizer | ConvVAE)
    losses = TokenizerLosses(tokenizer.info, recipe.data.size, 0, here)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=0.0)

    def step() -> None:
        parts, made = losses.tokenizer_loss(tokenizer, images, generator, adversarial=bool(fit.adversarial_weight))
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if losses.discriminator is not None:
            (losses.discriminator(images) + losses.discriminator(made.detach())).mean().backward()

    return seconds + fit.steps * _per_call(step)


def _probe_seconds(job: Job, step: float, images: Mapping[str, int], here: torch.device) -> float:
    """Of features, a third of a training step for each batch's forward pass, and of linear probes."""
    recipe = job.recipe
    train_images = job.probe_images or images["train"]
    features = torch.randn(train_images, recipe.backbone.width, generator=generator_for(0)).to(here)
    labels = (torch.arange(train_images) % 10).to(here)
    protocol = LinearProtocol()
    linear = LinearProbe(features.shape[1], 10, train_images, protocol, here)
    size = min(train_images, protocol.order(train_images).batch_size)
    each = protocol.steps(train_images) * _per_call(lambda: linear.step(features[:size], labels[:size]))
    passes, probes = 0.5, 1
    if job.cell.name == FINAL:
        passes, probes = 1 + 0.5 * len(MORE_TIMES), recipe.backbone.depth + len(MORE_TIMES)
    batches = (train_images + images["test"]) / recipe.training.batch_size
    return passes * batches * step / 3 + probes * each
