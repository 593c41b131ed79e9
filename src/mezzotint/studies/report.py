"""What a study of l-DAE shows: a page of tables and pictures, the paper's figures beside its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.evaluation.denoising import save_denoised, save_noise
from mezzotint.evaluation.sweep import figure_class
from mezzotint.files import atomic_path, write_text
from mezzotint.pipeline import load
from mezzotint.studies.ldae import FINAL, MORE_TIMES, PROBES, SINGLE, TIME, TOKENIZER_RECIPES, TRAJECTORY, accuracy_of

Rows = Sequence[Mapping[str, Any]]

#: linear probe on ImageNet, %, arXiv 2401.14404: the trajectory,
PAPER = {
    "ldae-00-dit": 57.5,
    "ldae-01-no-classes": 62.5,
    "ldae-02-no-perceptual": 58.4,
    "ldae-03-no-adversarial": 59.0,
    "ldae-04-linear-variance": 63.4,
    "ldae-05a-patch-vae": 64.9,
    "ldae-05b-patch-ae": 64.7,
    "ldae-05c-patch-pca": 65.1,
    "ldae-06-clean-data": 62.4,
    "ldae-07-no-input-scaling": 63.6,
    "ldae-08-image-input": 63.6,
    "ldae-09-image-output": 63.9,
    "ldae-10-original-image": 64.5,
    "ldae-single-level": 61.5,
}
#: latent numbers a token (table 2, where the patch-wise VAE and AE have no value at 8),
PAPER_DIMENSIONS = {
    "conv-vae": {8: 54.5, 16: 63.4, 32: 62.8, 64: 57.0, 128: 48.1},
    "patch-vae": {16: 58.3, 32: 64.9, 64: 64.8, 128: 56.8},
    "patch-ae": {16: 59.9, 32: 64.7, 64: 64.6, 128: 59.9},
    "patch-pca": {8: 56.0, 16: 63.4, 32: 65.1, 64: 60.0, 128: 53.9},
}
#: blocks of 24,
PAPER_DEPTHS = {9: 58.5, 10: 62.0, 11: 64.1, 12: 64.5, 13: 63.6, 14: 61.9, 15: 59.7}
PAPER_DEPTH = 24
#: and the time that the probed network is told
PAPER_TIMES = {0.0: 64.1, 0.01: 64.5, 0.02: 64.1, 0.04: 63.3, 0.08: 62.2}

#: points of accuracy that a diagram shows at least, so that noise does not look like a finding
LEAST_SPAN = 4.0

PERCEPTUAL = (
    "Perceptual loss: steps 0 and 1 train their tokenizer with the features of a classifier of this data set's own "
    "training images and labels, in place of the paper's VGG16, which was trained on ImageNet's; VGG16 is not made for "
    "images this small. Labels are used there, by the network of step 0, and by the probes, and nowhere else."
)


def write_report(rows: Rows, out: str | Path, data: str) -> list[Path]:
    """Write study.md and figures/*.png into the study's folder `out`, of finished cells as `study` gives them.

    Returns what was written. Raises `MezzotintError` without matplotlib.
    """
    out, figures = Path(out), Path(out) / "figures"
    written = [out / "study.md"]
    write_text(written[0], markdown(rows, data))
    for name, draw in {"trajectory": plot_trajectory, "ablations": plot_ablations}.items():
        if draw(rows, figures / f"{name}.png", data):
            written.append(figures / f"{name}.png")
    if shown := [row for row in rows if row["cell"] == FINAL]:
        pipeline = load(out / "runs" / f"{FINAL}-seed{shown[0]['seed']}")
        save_denoised(pipeline, figures / "denoised.png")
        save_noise(pipeline, figures / "noise.png")
        written += [figures / "denoised.png", figures / "noise.png"]
    return written


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def accuracies(
    rows: Rows, cell: str, probe: str = "linear", *, layer: int | None = None, t: float = TIME
) -> list[float]:
    """Of each seed of a cell, in percent."""
    return [100 * accuracy_of(dict(row), probe, layer=layer, t=t) for row in rows if row["cell"] == cell]


def _cell(values: Sequence[float]) -> str:
    """The mean, and the least and greatest where there are several."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def dimensions(rows: Rows) -> dict[str, dict[int, str]]:
    """By tokenizer and numbers a token, the cell that was trained."""
    found: dict[str, dict[int, str]] = {}
    for tokenizer, recipe in TOKENIZER_RECIPES.items():
        own = {row["tokenizer"]["dimension"]: row["cell"] for row in rows if row["recipe"] == recipe}
        if own:
            found[tokenizer] = dict(sorted(own.items()))
    return found


def _depth(rows: Rows) -> int:
    return next((int(row["depth"]) for row in rows if row["cell"] == FINAL), 0)


# ---- The page --------------------------------------------------------------------------------------------------------


def markdown(rows: Rows, data: str) -> str:
    """study.md: a table for each question, as far as its cells are finished."""
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows})
    minutes = sum(row["seconds"]["all"] for row in rows) / 60
    parts = [
        f"# l-DAE on {data}",
        f"Top-1 accuracy in % of probes after {first['layer']} of {first['depth']} blocks, told t = {TIME:g}, on "
        f"{first['test_images']:,} clean held-out images, fitted on {first['train_images']:,} training images. "
        f"Seeds {', '.join(map(str, seeds))}: the mean, and in brackets the least and the greatest. Training took "
        f"{first['steps']} steps a cell, {minutes:.0f} minutes of one process with tokenizers and probes. The paper's "
        "figures are of ImageNet, 400 epochs, DiT-L.",
        PERCEPTUAL,
    ]
    steps = [name for name in TRAJECTORY if accuracies(rows, name)]
    if steps:
        table = [[name, f"{PAPER[name]}", *_both(rows, name)] for name in steps]
        parts += ["## Trajectory", _table(["recipe", "linear, the paper's", "linear", "k-NN"], table)]
    if found := dimensions(rows):
        table = [
            [tokenizer, str(d), *_both(rows, cell)] for tokenizer, cells in found.items() for d, cell in cells.items()
        ]
        parts += [
            "## Latent dimension",
            _table(["tokenizer", "numbers a token", "linear", "k-NN"], table),
            "The paper's, linear:",
            _table(
                ["tokenizer", *map(str, PAPER_DIMENSIONS["patch-pca"])],
                [
                    [name, *(str(own.get(d, "")) for d in PAPER_DIMENSIONS["patch-pca"])]
                    for name, own in PAPER_DIMENSIONS.items()
                ],
            ),
        ]
    if depth := _depth(rows):
        table = [
            [f"{k} of {depth}", *_both(rows, FINAL, layer=k), _paper_at(PAPER_DEPTHS, k * PAPER_DEPTH / depth)]
            for k in range(1, depth + 1)
        ]
        parts += [
            "## Encoder depth",
            _table(["blocks", "linear", "k-NN", "the paper's at this share of 24, linear"], table),
            "The paper's, linear, of 24: " + ", ".join(f"{k}: {value}" for k, value in PAPER_DEPTHS.items()) + ".",
            "## Fixed t",
            _table(
                ["t", "linear", "k-NN", "linear, the paper's"],
                [[f"{t:g}", *_both(rows, FINAL, t=t), str(PAPER_TIMES[t])] for t in sorted((TIME, *MORE_TIMES))],
            ),
        ]
    levels = {SINGLE: "√(1/3)"} | {
        row["cell"]: row["cell"].partition("-sigma")[2] for row in rows if row["group"] == "noise"
    }
    table = [[f"σ = {level}", *_both(rows, cell), str(PAPER.get(cell, ""))] for cell, level in levels.items()]
    table.append(["σ from 0 to √2", *_both(rows, FINAL), str(PAPER[FINAL])])
    if table := [row for row in table if row[1]]:
        parts += ["## Single-level noise", _table(["trained with", "linear", "k-NN", "linear, the paper's"], table)]
    parts += ["## Commands", "Each cell, of its first seed, alone:", _commands(rows)]
    return "\n\n".join(parts) + "\n"


def _both(rows: Rows, cell: str, **where: Any) -> list[str]:
    return [_cell(accuracies(rows, cell, probe, **where)) for probe in PROBES]


def _paper_at(values: Mapping[int, float], key: float) -> str:
    return str(values[int(key)]) if key == int(key) and int(key) in values else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _commands(rows: Rows) -> str:
    commands = {row["cell"]: row["command"] for row in reversed(rows)}
    return "\n".join(f"    {commands[cell]}" for cell in dict.fromkeys(row["cell"] for row in rows))


# ---- Pictures --------------------------------------------------------------------------------------------------------


def plot_trajectory(rows: Rows, path: str | Path, data: str) -> bool:
    """Draw linear-probe accuracy along the trajectory, and the paper's (figure 6); whether there was anything to draw.

    Bars are means, dots seeds. Raises `MezzotintError` without matplotlib.
    """
    figure = figure_class("the pictures of a study")
    steps = [name for name in TRAJECTORY if accuracies(rows, name)]
    if not steps:
        return False
    picture = figure(figsize=(9.6, 1.2 + 0.32 * len(steps)), layout="constrained", dpi=120)
    ours, paper = picture.subplots(1, 2, sharey=True)
    own = [accuracies(rows, name) for name in steps]
    places = range(len(steps))
    means = [sum(values) / len(values) for values in own]
    _room(ours, [value for values in own for value in values])
    _room(paper, [PAPER[name] for name in steps])
    _bars(ours, places, means, "C0")
    for place, values in zip(places, own, strict=True):
        ours.plot(values, [place] * len(values), "o", color="black", markersize=3)
    _bars(paper, places, [PAPER[name] for name in steps], "C7")
    ours.set_yticks(places, [name.removeprefix("ldae-") for name in steps])
    ours.invert_yaxis()
    ours.set_title(f"{data}, here", fontsize="medium")
    paper.set_title("ImageNet, the paper's", fontsize="medium")
    for axes in (ours, paper):
        axes.set_xlabel("linear probe, top-1 (%)")
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    _save(picture, path)
    return True


def _bars(axes: Any, places: Sequence[int], values: Sequence[float], colour: str) -> None:
    axes.barh(places, values, height=0.7, color=colour, alpha=0.6)
    for place, value in zip(places, values, strict=True):
        axes.text(axes.get_xlim()[0], place, f" {value:.1f}", va="center", fontsize="x-small")


def _room(axes: Any, values: Sequence[float]) -> None:
    """Show the range of the values, with room for labels before them: differences are what matters."""
    spread = max(max(values) - min(values), 1.0)
    axes.set_xlim(max(0.0, min(values) - 0.35 * spread), max(values) + 0.1 * spread)


def plot_ablations(rows: Rows, path: str | Path, data: str) -> bool:
    """Draw accuracy against latent dimension, encoder depth and t, here above and the paper's below.

    Returns whether there was anything to draw. Raises `MezzotintError` without matplotlib.
    """
    figure = figure_class("the pictures of a study")
    depth = _depth(rows)
    panels: list[tuple[str, bool, dict[str, dict[float, list[float]]], dict[str, dict[float, float]]]] = []
    if found := dimensions(rows):
        own = {name: {float(d): accuracies(rows, cell) for d, cell in cells.items()} for name, cells in found.items()}
        theirs = {name: {float(d): value for d, value in PAPER_DIMENSIONS[name].items()} for name in found}
        panels.append(("latent numbers a token", True, own, theirs))
    if depth:
        layers = {k / depth: accuracies(rows, FINAL, layer=k) for k in range(1, depth + 1)}
        theirs_layers = {k / PAPER_DEPTH: value for k, value in PAPER_DEPTHS.items()}
        panels.append(("encoder's share of the blocks", False, {"l-DAE": layers}, {"l-DAE": theirs_layers}))
        times = {t: accuracies(rows, FINAL, t=t) for t in sorted((TIME, *MORE_TIMES))}
        panels.append(("t", False, {"l-DAE": times}, {"l-DAE": PAPER_TIMES}))
    if not panels:
        return False
    picture = figure(figsize=(max(4.8, 3.6 * len(panels)), 5.6), layout="constrained", dpi=120)
    grid = picture.subplots(2, len(panels), squeeze=False)
    for column, (label, logarithmic, own, theirs) in enumerate(panels):
        for index, (name, points) in enumerate(own.items()):
            means = [sum(values) / len(values) for values in points.values()]
            grid[0][column].plot(list(points), means, "o-", color=f"C{index}", markersize=4, label=name)
            for x, values in points.items():
                grid[0][column].plot([x] * len(values), values, ".", color=f"C{index}", markersize=3, alpha=0.6)
            line = theirs[name]
            grid[1][column].plot(list(line), list(line.values()), "o-", color=f"C{index}", markersize=4, label=name)
        for axes in grid[:, column]:
            low, high = axes.get_ylim()
            margin = max(0.0, LEAST_SPAN - (high - low)) / 2
            axes.set_ylim(low - margin, high + margin)
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.set_xlabel(label)
            if logarithmic:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
            if len(own) > 1:
                axes.legend(fontsize="x-small")
    for axes, title in ((grid[0][0], f"{data}, here"), (grid[1][0], "ImageNet, the paper's")):
        axes.set_ylabel(f"{title}\nlinear probe, top-1 (%)")
    _save(picture, path)
    return True


def _save(picture: Any, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        picture.savefig(temporary, format="png")
