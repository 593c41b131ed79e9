"""Train networks for equal multiply-adds, score each, and write the table: python benchmarks/equal_cost.py STUDY.

A study is a data set, a budget in training multiply-adds, and cells, each a recipe with overrides. A cell gets as many
steps as the budget pays for, and its runs and scores are kept below --out, so that the same command goes on where it
was stopped. Scores are `mezzotint evaluate`'s: of 1,000 samples against held-out images in the features of the data
set's own classifier.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from measure import table, write_section

from mezzotint import load
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.evaluation.scores import evaluate
from mezzotint.files import write_text
from mezzotint.recipe import Recipe, load_recipe, override_recipe
from mezzotint.training.loop import train


class Study(NamedTuple):
    """What is compared."""

    page: str
    """The page of docs/ that the table is written into."""
    budget: str
    """The recipe whose whole training is the budget of all cells."""
    share: float
    """Of that budget."""
    cells: dict[str, tuple[str, ...]]
    """Label: recipe, and overrides."""
    points: tuple[float, ...] = (1.0,)
    """Shares of a cell's training after which it is scored; before the last one, its learning rate must be constant."""


class Cell(NamedTuple):
    """A trained network."""

    recipe: Recipe
    scores: list[dict[str, Any]]
    """At the points of the study."""


PATCHED = ("backbone.patch_size=2", "backbone.hourglass=1")
QUIET = ("training.sample_every=0", "training.validate_every=0", "training.checkpoint_every=500")
UNET = "name: unet, heads: 4, time_width: 128"
NESTED = (
    f"backbone={{{UNET}, channels: [32, 48, 64], resblocks: [1, 1, 1], attention: [0, 1, 1], "
    "outer: [{channels: [16, 32], resblocks: [1, 1]}]}"
)
PLAIN = f"backbone={{{UNET}, channels: [24, 32, 48, 64], resblocks: [1, 1, 1, 1], attention: [0, 0, 1, 1], groups: 8}}"
# As the paper's networks: the cosine schedule, v, and a rate that does not fall, so that every point is an end.
PAPERS = (
    "interpolant=cosine",
    "target=v",
    "time_input=[1000, -1]",
    "training={batch_size: 16, lr_schedule: constant, stages: []}",
    "sampling=dpm-solver++",
)
STUDIES = {
    "diffussm-digits": Study(
        "diffussm.md",
        "digits",
        1.0,
        {
            "DiT, patches of 2": ("digits",),
            "DiffuSSM": ("diffussm-digits",),
            "unidirectional": ("diffussm-digits", "backbone.bidirectional=false"),
            "no hourglass": ("diffussm-digits", "backbone.hourglass=1"),
            "patches of 2": ("diffussm-digits", *PATCHED, "backbone.width=104"),
            "row-snake": ("diffussm-digits", "backbone.scan=[row-snake]"),
            "row, column": ("diffussm-digits", "backbone.scan=[row,column]"),
            "row-snake, column-snake": ("diffussm-digits", "backbone.scan=[row-snake,column-snake]"),
        },
    ),
    "diffussm-fashion-mnist": Study(
        "diffussm.md",
        "fashion-mnist",
        1.0,
        {
            "DiT, patches of 4": ("fashion-mnist",),
            "DiffuSSM": ("diffussm-fashion-mnist",),
            "unidirectional": ("diffussm-fashion-mnist", "backbone.bidirectional=false"),
            "patches of 2": ("diffussm-fashion-mnist", *PATCHED, "backbone.width=104"),
        },
    ),
    "mdm-fashion-mnist": Study(
        "mdm.md",
        "fashion-mnist",
        0.5,
        {
            "nested, 16 pixels first": ("fashion-mnist", *PAPERS, NESTED, "training.stages=[{levels: 1, steps: 1000}]"),
            "nested": ("fashion-mnist", *PAPERS, NESTED),
            "plain": ("fashion-mnist", *PAPERS, PLAIN),
        },
        points=(0.4, 1.0),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cells", nargs="+", help="Only these, by label.")
    parser.add_argument("--count", type=int, default=1000, help="Samples; default: 1,000.")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--sampler", help="Instead of the recipe's.")
    parser.add_argument("--steps", type=int, help="Of the sampler, instead of the recipe's.")
    parser.add_argument("--out", type=Path, default=Path("runs/equal-cost"))
    parser.add_argument("--write", action="store_true", help="Write the table of all that is there into the docs.")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    base = load_recipe(study.budget)
    gmacs = study.share * sum(
        stage.settings.steps * training_gmacs(base, stage.levels) for stage in base.training.plan()
    )
    done: dict[str, list[Cell]] = {}
    for label, (name, *overrides) in study.cells.items():
        for seed in arguments.seeds:
            folder = arguments.out / arguments.study / f"{label.replace(' ', '-').replace(',', '')}-{seed}"
            recipe = load_recipe(name, [*overrides, f"seed={seed}", *QUIET])
            last = steps_for(recipe, gmacs)
            warmup = round(min(1.0, last / recipe.training.steps) * recipe.training.warmup_steps)
            recipe = override_recipe(recipe, [f"training.steps={last}", f"training.warmup_steps={warmup}"])
            chosen = arguments.cells is None or label in arguments.cells
            scores = []
            for point in study.points:
                file = folder / ("scores.json" if point == 1 else f"scores-{point}.json")
                if not file.is_file() and chosen and not (arguments.write and not folder.exists()):
                    steps = steps_for(recipe, point * gmacs)
                    part = override_recipe(recipe, [f"training.steps={steps}"])
                    train(part, folder, resume=(folder / "recipe.yaml").is_file())
                    write_text(file, json.dumps(score(folder, seed, arguments), indent=2) + "\n")
                if file.is_file():
                    scores.append(json.loads(file.read_text()))
            if len(scores) == len(study.points):
                done.setdefault(label, []).append(Cell(recipe, scores))
    seeds = max(map(len, done.values()), default=0)
    head = f"{gmacs:,.0f}·10⁹ multiply-adds of training each, {seeds} seed(s)"
    text = f"{head}.\n\n{curve(study, done) if len(study.points) > 1 else report(done)}"
    print(text)
    if arguments.write:
        page = Path(__file__).parents[1] / "docs" / study.page
        write_section(page, arguments.study, "equal_cost.py", text)


def score(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a run, as far as it is trained."""
    options = {key: getattr(arguments, key) for key in ("sampler", "steps") if getattr(arguments, key) is not None}
    return evaluate(load(folder), count=arguments.count, guidance=arguments.guidance, seed=seed, **options)


def training_gmacs(recipe: Recipe, levels: int | None = None) -> float:
    """10⁹ multiply-adds of one training step of some levels: forward, and twice that backward."""
    return 3 * recipe_cost(recipe, levels).gmacs * recipe.training.batch_size


def steps_for(recipe: Recipe, gmacs: float) -> int:
    """How many steps a recipe takes for so many, its stages first."""
    *stages, last = recipe.training.plan()
    for stage in stages:
        gmacs -= stage.settings.steps * training_gmacs(recipe, stage.levels)
    return last.first + math.floor(gmacs / training_gmacs(recipe))


def report(done: dict[str, list[Cell]]) -> str:
    """The table of scores; means over seeds, ± their standard deviation."""
    columns = [
        ("class agreement", "samples", "class agreement", 100, "{:.1f} %"),
        ("guided", "guided", "class agreement", 100, "{:.1f} %"),
        ("Fréchet distance", "samples", "FD-classifier", 1, "{:.3f}"),
        ("guided", "guided", "FD-classifier", 1, "{:.3f}"),
        ("precision", "samples", "precision", 1, "{:.3f}"),
        ("recall", "samples", "recall", 1, "{:.3f}"),
    ]
    rows = []
    for label, cells in done.items():
        recipe = cells[0].recipe
        row = [label, *costs(recipe), f"{recipe.training.steps * recipe.training.batch_size / 1e3:,.0f}k"]
        for _, branch, key, factor, form in columns:
            row.append(spread([factor * cell.scores[-1]["sets"][branch][key] for cell in cells], form))
        rows.append(row)
    return table(["", "parameters", "MMACs an image", "images", *[column[0] for column in columns]], rows)


def curve(study: Study, done: dict[str, list[Cell]]) -> str:
    """The table of unguided scores at each point."""
    columns = [
        (f"{name}, {point:.0%}", key, factor, form, at)
        for name, key, factor, form in (
            ("class agreement", "class agreement", 100, "{:.1f} %"),
            ("Fréchet distance", "FD-classifier", 1, "{:.3f}"),
        )
        for at, point in enumerate(study.points)
    ]
    rows = []
    for label, cells in done.items():
        row = [label, *costs(cells[0].recipe), f"{cells[0].recipe.training.steps:,}"]
        for _, key, factor, form, at in columns:
            row.append(spread([factor * cell.scores[at]["sets"]["samples"][key] for cell in cells], form))
        rows.append(row)
    return table(["", "parameters", "MMACs an image", "steps", *[column[0] for column in columns]], rows)


def costs(recipe: Recipe) -> list[str]:
    cost = recipe_cost(recipe)
    return [f"{cost.params / 1e6:.2f}M", f"{1e3 * cost.gmacs:.1f}"]


def spread(values: list[float], form: str) -> str:
    return form.format(mean(values)) + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
