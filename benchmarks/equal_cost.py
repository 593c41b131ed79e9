"""Train networks for equal multiply-adds, score each, and write the table: python benchmarks/equal_cost.py STUDY.

A study is a data set, a budget in training multiply-adds, and cells, each a recipe with overrides. A cell gets as many
steps as the budget pays for, and its runs and scores are kept below --out, so that the same command goes on where it
was stopped. Scores are `mezzotint evaluate`'s, of 1,000 samples against held-out images in the features of the data
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
from mezzotint.recipe import Recipe, load_recipe
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


PATCHED = ("backbone.patch_size=2", "backbone.hourglass=1")
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cells", nargs="+", help="Only these, by label.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--sampler", help="Instead of the recipe's.")
    parser.add_argument("--steps", type=int, help="Of the sampler, instead of the recipe's.")
    parser.add_argument("--out", type=Path, default=Path("runs/equal-cost"))
    parser.add_argument("--write", action="store_true", help="Write the table of all that is there into the docs.")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    base = load_recipe(study.budget)
    gmacs = study.share * training_gmacs(base) * base.training.steps
    sampling = {key: getattr(arguments, key) for key in ("sampler", "steps") if getattr(arguments, key) is not None}
    done: dict[str, list[dict[str, Any]]] = {}
    for label, (name, *overrides) in study.cells.items():
        for seed in arguments.seeds:
            recipe = load_recipe(name, [*overrides, f"seed={seed}"])
            steps = math.floor(gmacs / training_gmacs(recipe))
            shorter = steps / recipe.training.steps
            recipe = load_recipe(
                name,
                [
                    *(*overrides, f"seed={seed}", f"training.steps={steps}"),
                    f"training.warmup_steps={round(min(1.0, shorter) * recipe.training.warmup_steps)}",
                    *("training.sample_every=0", "training.validate_every=0", "training.checkpoint_every=500"),
                ],
            )
            folder = arguments.out / arguments.study / f"{label.replace(' ', '-').replace(',', '')}-{seed}"
            scores = folder / "scores.json"
            chosen = arguments.cells is None or label in arguments.cells
            if not scores.is_file() and chosen and not (arguments.write and not folder.exists()):
                train(recipe, folder, resume=(folder / "recipe.yaml").is_file())
                figures = evaluate(
                    load(folder), count=arguments.count, guidance=arguments.guidance, seed=seed, **sampling
                )
                write_text(scores, json.dumps(figures, indent=2) + "\n")
            if scores.is_file():
                kept = {"recipe": load_recipe(folder), "scores": json.loads(scores.read_text())}
                done.setdefault(label, []).append(kept)
    text = report(done, gmacs)
    print(text)
    if arguments.write:
        page = Path(__file__).parents[1] / "docs" / study.page
        write_section(page, arguments.study, "equal_cost.py", text)


def training_gmacs(recipe: Recipe) -> float:
    """10⁹ multiply-adds of one training step: forward, and twice that backward."""
    return 3 * recipe_cost(recipe).gmacs * recipe.training.batch_size


def report(done: dict[str, list[dict[str, Any]]], gmacs: float) -> str:
    """The table; means over seeds, ± their standard deviation."""
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
        recipe, cost = cells[0]["recipe"], recipe_cost(cells[0]["recipe"])
        images = recipe.training.steps * recipe.training.batch_size
        row = [label, f"{cost.params / 1e6:.2f}M", f"{1e3 * cost.gmacs:.1f}", f"{images / 1e3:,.0f}k"]
        for _, branch, key, factor, form in columns:
            values = [factor * cell["scores"]["sets"][branch][key] for cell in cells]
            row.append(form.format(mean(values)) + (f" ± {stdev(values):.2g}" if len(values) > 1 else ""))
        rows.append(row)
    title = ["", "parameters", "MMACs an image", "images"]
    title += [column[0] for column in columns]
    seeds = max(map(len, done.values()), default=0)
    head = f"{gmacs:,.0f}·10⁹ multiply-adds of training each, {seeds} seed(s)"
    return f"{head}.\n\n{table(title, rows)}"


if __name__ == "__main__":
    main()
