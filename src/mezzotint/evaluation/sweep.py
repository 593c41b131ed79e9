"""Sweeps: one model scored over a grid of samplers, steps and guidance, each cell once.

>>> rows = sweep(pipeline, "runs/digits", {"sampler": ["ddpm", "ode-heun"], "steps": [10, 50], "guidance": [1, 1.5]})

    OUT/sweep/KEY.json              a finished cell; KEY: 16 digits over all that its figures depend on
    OUT/sweep.csv                   the grid asked for last, a row a cell
    OUT/sweep-FIGURE.png            the Fréchet distance against network evaluations
    OUT/sweep-FIGURE-guidance.png   figures against the guidance scale, where the grid has two or more
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from mezzotint.errors import MezzotintError, closest, expect
from mezzotint.evaluation.features import FeatureNetwork, extract
from mezzotint.evaluation.reference import Reference, reference_statistics
from mezzotint.evaluation.scores import MAX_ROWS, choose_network, data_settings, decoded_alike, figures
from mezzotint.evaluation.sources import Images, ImageSource, PipelineSource, gathered, of_first, place
from mezzotint.files import atomic_path, parse_json, write_text
from mezzotint.guidance import Guidance
from mezzotint.locks import locked
from mezzotint.pipeline import A_PIPELINE, Pipeline, choose_labels, conditional_model
from mezzotint.progress import console
from mezzotint.recipe import DataSettings, Recipe, override_recipe
from mezzotint.samplers import Sampler
from mezzotint.written import as_written, read_field

#: raise whenever a cell's figures change for the same settings
VERSION = 1
#: axes with a name of their own; all others are called by their key in a recipe, such as sampling.eta
SHORT = {"sampler": "sampling.sampler", "steps": "sampling.steps", "guidance": "guidance.scale"}
#: fields of `Sampler` besides the name that samples depend on; an adaptive solver takes what steps it needs
_SDE = ("steps", "spacing", "eps", "diffusion", "diffusion_scale", "last_step", "last_step_size")
USED = {
    "ddpm": ("steps", "spacing", "eps", "variance"),
    "ddim": ("steps", "spacing", "eps", "eta"),
    "ode-dopri5": ("eps", "rtol", "atol"),
    "sde": _SDE,
    "sde-heun": _SDE,
}
PLAIN = ("steps", "spacing", "eps")
#: and those of a threshold, of any of them
THRESHOLD = {"none": (), "static": ("threshold",), "dynamic": ("threshold", "threshold_quantile")}


def parse_axes(words: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """The axes among `words`, ``steps=10,25 guidance.interval=[0,1],[0.2,0.8]``, and the words that override a recipe.

    Values have commas between, outside of brackets, and are read as YAML. Raises `MezzotintError` for a word that is no
    ``name=value``, an empty value or an axis given twice.
    """
    axes: dict[str, list[Any]] = {}
    overrides = []
    for word in words:
        name, equals, written = word.partition("=")
        if equals and name.partition(".")[0] in set(Recipe.model_fields) - {"sampling", "guidance"}:
            overrides.append(word)
            continue
        values = re.split(r",(?![^\[]*\])", written)
        if not (name and equals and all(value.strip() for value in values)):
            raise MezzotintError(f"axis {word!r} is not of the form name=value,value, e.g. steps=10,25,50")
        if name in axes:
            raise MezzotintError(f"axis {name!r} is given twice; put all its values behind one, with commas between")
        try:
            axes[name] = [read_field(Any, as_written(value.strip())) for value in values]
        except ValueError as error:
            raise MezzotintError(f"the values of axis {word!r} are not valid YAML: {error}") from None
    return axes, overrides


def sweep(
    pipeline: Pipeline,
    out: str | Path,
    axes: Mapping[str, Sequence[Any]],
    *,
    count: int = 1000,
    features: str | FeatureNetwork | None = None,
    weights: str | Path | None = None,
    reference: DataSettings | ImageSource | str | Path | None = None,
    seed: int = 0,
    batch_size: int = 256,
    plots: bool = True,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Score `count` samples of `pipeline` for every combination of the axes' values; everything else is the recipe's.

    axes: sampler, steps, guidance, and further fields of `Sampler` and `Guidance` by their keys (sampling.eta,
    guidance.interval). features, weights, reference: as for `evaluate`; the reference is looked at once. A cell that
    is finished in the folder `out` is not scored again, so the same call goes on after a kill, and a larger grid costs
    what is new. Processes joined by torch.distributed share each cell's batches. plots: draw the pictures, too.

    Returns the rows of sweep.csv: sampler, steps, guidance and the other axes; evaluations (of the model, mean per
    image) and network passes (a guided evaluation takes two); seconds per image, of one process; `figures`, and class
    agreement where the features are the classifier's; and a note. A combination that means nothing has the note alone,
    and one that draws the very images of another that other's figures.

    Raises `MezzotintError`, before anything is drawn, for an unknown axis or value, a grid of which nothing has a
    meaning, or without matplotlib for plots; and as `evaluate` does.
    """
    expect(pipeline, Pipeline, A_PIPELINE)
    with ExitStack() as stack:
        of_first(lambda: stack.enter_context(locked(Path(out) / "sweep", what=Path(out))))
        return _sweep_into(
            Path(out), pipeline, axes, count, features, weights, reference, seed, batch_size, plots, progress
        )


def _sweep_into(
    out: Path,
    pipeline: Pipeline,
    axes: Mapping[str, Sequence[Any]],
    count: int,
    features: str | FeatureNetwork | None,
    weights: str | Path | None,
    reference: DataSettings | ImageSource | str | Path | None,
    seed: int,
    batch_size: int,
    plots: bool,
    progress: bool,
) -> list[dict[str, Any]]:
    rank = place()[0]
    cells = _cells(pipeline.recipe, axes)
    notes = [_meaningless(pipeline, cell) for cell in cells]
    if all(notes):
        raise MezzotintError(f"no combination of these values has a meaning for this model: {notes[0]}")
    if count < 2:
        raise MezzotintError(f"a Fréchet distance needs at least 2 samples, got a count of {count}")
    if plots:
        figure_class()
    reference = pipeline.recipe.data if reference is None else reference
    settings = data_settings(reference)
    network = choose_network(features, weights, settings, pipeline)
    real = reference_statistics(
        settings or reference,
        network,
        rows=MAX_ROWS,
        batch_size=batch_size,
        progress=progress,
        **decoded_alike(reference, None if settings else pipeline.recipe.data),
    )
    shared = _plan(pipeline, network, real, count, seed)
    rows: list[dict[str, Any]] = []
    scored: dict[str, dict[str, Any]] = {}
    for number, (cell, note) in enumerate(zip(cells, notes, strict=True), 1):
        row: dict[str, Any] = {**cell.values, "note": note}
        rows.append(row)
        if note:
            continue
        plan = json.loads(json.dumps(shared | cell.plan))  # as a file gives it back
        key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
        file = out / "sweep" / f"{key}.json"
        if key in scored:
            other = scored[key]
            same = ", ".join(
                f"{axis}={value}" for axis, value in other.items() if cell.values.get(axis, value) != value
            )
            row |= {**other, **cell.values, "note": f"the same images as with {same}"}
            continue
        if (found := of_first(partial(_read, file, plan))) is None:
            begun = time.perf_counter()
            pipeline.representation  # noqa: B018  an autoencoder that is missing ends the sweep, not the cell
            try:
                found = _score(pipeline, cell, network, real, count, seed, batch_size, progress)
            except MezzotintError as error:  # such as a variance that the model has not, or samples that are NaN
                row["note"] = str(error)
                continue
            text = json.dumps({"settings": plan, "figures": found}, indent=2) + "\n"
            of_first(partial(write_text, file, text))
            if progress and rank == 0:
                where = ", ".join(f"{axis} {value}" for axis, value in cell.values.items())
                took = f"{time.perf_counter() - begun:.0f} s"
                console.print(f"cell {number} of {len(cells)}: {where}: {took}", soft_wrap=True)
        row |= found
        scored[key] = row
    if not scored:
        raise MezzotintError(f"no cell could be scored: {rows[0]['note']}")
    title = f"{pipeline.recipe.name}: {count:,} samples against {real.source}\n{network.name}"
    of_first(partial(_write, rows, out, plots, title))
    return rows


# ---- The grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One combination: its values of the axes as shown, and what they make of the recipe."""

    values: dict[str, Any]
    sampler: Sampler
    guidance: Guidance

    @property
    def plan(self) -> dict[str, Any]:
        """What the samples depend on."""
        fields = (*USED.get(self.sampler.sampler, PLAIN), *THRESHOLD[self.sampler.threshold])
        guided = self.guidance.scale != 1
        return {
            "sampler": {"sampler": self.sampler.sampler, **self.sampler.model_dump(mode="json", include=set(fields))},
            "guidance": self.guidance.model_dump(mode="json") if guided else {"scale": 1.0},
        }


def _cells(recipe: Recipe, axes: Mapping[str, Sequence[Any]]) -> list[_Cell]:
    """Every combination, the last axis running fastest; raises `MezzotintError` where an axis or a value is unknown."""
    if not axes:
        raise MezzotintError("a sweep needs at least one axis, e.g. sampler=ddpm,ode-heun or steps=10,25,50")
    keys = [SHORT.get(name, name) for name in axes]
    for name, key in zip(axes, keys, strict=True):
        section, _, field = key.partition(".")
        if section not in ("sampling", "guidance") or not field:
            hint = "" if section in Recipe.model_fields else f"{closest(name, SHORT)}; "
            raise MezzotintError(
                f"axis {name!r} is unknown; {hint}expected {', '.join(SHORT)}, or a key of sampling or guidance such "
                "as sampling.eta"
            )
        if keys.count(key) > 1:
            raise MezzotintError(f"axis {key!r} is given twice; put all its values behind one")
        if isinstance(axes[name], str) or not axes[name]:
            raise MezzotintError(f"axis {name!r} has no values; expected a list of one or more")
    cells: list[_Cell] = []
    for values in product(*axes.values()):
        pairs = zip(keys, values, strict=True)
        made = override_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in pairs])
        sampler, guidance = made.sampling, made.guidance
        shown = {"sampler": _name(sampler), "steps": sampler.steps, "guidance": guidance.scale}
        for key in keys:
            if key not in SHORT.values():
                section, _, field = key.partition(".")
                shown[key] = getattr(getattr(made, section), field)
        cell = _Cell(shown, sampler, guidance)
        if cell not in cells:
            cells.append(cell)
    return cells


def _name(sampler: Sampler) -> str:
    """As the command line takes it: an SDE with its diffusion."""
    return f"{sampler.sampler}-{sampler.diffusion}" if sampler.sampler.startswith("sde") else sampler.sampler


def _meaningless(pipeline: Pipeline, cell: _Cell) -> str:
    """Why this sampler or this guidance means nothing for the model; empty where they do."""
    labels = choose_labels(pipeline, None, 1)
    try:
        cell.sampler.times(conditional_model(pipeline, labels, [0], cell.guidance))
    except MezzotintError as error:
        return str(error)
    return ""


# ---- A cell ----------------------------------------------------------------------------------------------------------


def _plan(pipeline: Pipeline, network: FeatureNetwork, real: Reference, count: int, seed: int) -> dict[str, Any]:
    """What all cells' figures are a function of, besides the sampler and the guidance."""
    words = {"interpolant", "target", "variance", "time_input", "representation", "backbone"}
    asked = {}
    if pipeline.denoiser.text:
        words.add("condition")
        asked = {"prompts": pipeline.prompts}
    return {
        "version": VERSION,
        **pipeline.digests,
        "recipe": pipeline.recipe.model_dump(mode="json", include=words),
        **asked,
        "count": count,
        "seed": seed,
        "features": network.name,
        "reference": real.source,
        "reference_images": real.count,
    }


def _read(file: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a finished cell; None where there is none, or the file was damaged."""
    try:
        held = parse_json(file.read_text(encoding="utf-8"))
        return dict(held["figures"]) if held["settings"] == plan else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _score(
    pipeline: Pipeline,
    cell: _Cell,
    network: FeatureNetwork,
    real: Reference,
    count: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Draw the cell's samples, and the rest of its row."""
    options = cell.sampler.model_dump()
    source = _Watched(PipelineSource(pipeline, count, guidance=cell.guidance, seed=seed, **options))
    seen = extract(source, network, batch_size=batch_size, keep_rows=MAX_ROWS, progress=progress)
    spent = gathered(lambda: (source.evaluations, source.passes, source.seconds))
    evaluations, passes, seconds = (sum(values) / count for values in zip(*spent, strict=True))
    made = figures(seen, real)
    made.pop("source", None)  # its digest is of fields, too, that this sampler does not use
    return {"evaluations": evaluations, "network passes": passes, "seconds per image": seconds, **made}


class _Watched(ImageSource):
    """A pipeline's samples, and what they took on this process: sums over its images."""

    def __init__(self, source: PipelineSource) -> None:
        self.source, self.identity, self.count = source, source.identity, source.count
        self.evaluations, self.passes, self.seconds = 0, 0, 0.0

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Images]:
        sizes: list[int] = []  # of the batches that the network was given: both branches of a guided one are two
        # The hook is the denoiser's, which is never compiled: a compiled network may pass over a later one.
        hook = self.source.pipeline.denoiser.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        try:
            begun = time.perf_counter()
            for images, labels in self.source.batches(batch_size, rank=rank, world_size=world_size):
                self.seconds += time.perf_counter() - begun
                self.evaluations += len(sizes) * len(images)
                self.passes += sum(sizes)
                sizes.clear()
                yield images, labels
                begun = time.perf_counter()
        finally:
            hook.remove()


# ---- What comes out --------------------------------------------------------------------------------------------------


def frechet_name(names: Iterable[str]) -> str | None:
    """Which of these is a Fréchet distance: FID, or FD- and the kind of features."""
    return next((name for name in names if name == "FID" or re.fullmatch(r"FD-[^ ,]+", name)), None)


def _write(rows: Sequence[Mapping[str, Any]], out: Path, plots: bool, title: str) -> None:
    for path in sweep_pictures(out):  # of an earlier grid
        path.unlink()
    write_text(out / "sweep.csv", _csv(rows))
    if plots:
        plot_sweep(rows, out, title)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "note"]
    writer = csv.DictWriter(text, [*columns, "note"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: list(value) if isinstance(value, tuple) else value for name, value in row.items()})
    return text.getvalue()


def value_text(value: object) -> str:
    """A figure, or a value of an axis, to be read."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(list(value) if isinstance(value, tuple) else value)


def sweep_pictures(out: str | Path) -> list[Path]:
    """The pictures that belong to the folder's sweep.csv, as far as they are there."""
    try:
        with open(Path(out) / "sweep.csv", encoding="utf-8", newline="") as file:
            figure = frechet_name(next(csv.reader(file), []))
    except (OSError, ValueError):
        return []
    return [] if figure is None else [path for path in _picture_paths(Path(out), figure) if path.is_file()]


def _picture_paths(out: Path, figure: str) -> tuple[Path, Path]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", figure)
    return out / f"sweep-{name}.png", out / f"sweep-{name}-guidance.png"


def figure_class(what: str = "the pictures of a sweep") -> Any:
    """matplotlib's Figure; raises `MezzotintError` without matplotlib, naming what needs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MezzotintError(
            f"{what} need the package matplotlib; install it with: pip install 'mezzotint[eval]'"
        ) from None
    return Figure


#: panels side by side, at most
COLUMNS = 4
MARKERS = "os^Dv<>Pp*hX"


def plot_sweep(rows: Sequence[Mapping[str, Any]], out: str | Path, title: str = "") -> list[Path]:
    """Draw the rows of `sweep` into the folder `out`; the pictures written, and none where no row has figures.

    The Fréchet distance against network evaluations, a line for each sampler (and for each value of the further axes),
    a panel for each guidance scale: the picture of SiT's paper. With two scales or more, also Fréchet distance,
    precision and recall against the scale, each line at its largest number of steps. Raises `MezzotintError` without
    matplotlib.
    """
    figure_class()
    figure = frechet_name(name for row in rows for name in row)
    rows = [row for row in rows if figure in row]
    if figure is None or not rows:
        return []
    lines = _lines(rows)
    scales = sorted({row["guidance"] for row in rows})
    by_evaluations, by_guidance = _picture_paths(Path(out), figure)
    panels = []
    for scale in scales:
        at_scale = {label: [row for row in own if row["guidance"] == scale] for label, own in lines.items()}
        panels.append(_Panel(f"guidance {scale:g}", figure, at_scale))
    _draw(panels, "evaluations", by_evaluations, title)
    if len(scales) < 2:
        return [by_evaluations]
    longest = {}
    for label, own in lines.items():
        most = max(row["steps"] for row in own)
        steps = f", {most} steps" if "steps" in USED.get(own[0]["sampler"], PLAIN) else ""
        longest[label + steps] = [row for row in own if row["steps"] == most]
    names = [name for name in (figure, "precision", "recall") if any(name in row for row in rows)]
    _draw([_Panel(name, name, longest) for name in names], "guidance", by_guidance, title)
    return [by_evaluations, by_guidance]


Lines = dict[str, list[Mapping[str, Any]]]
"""Rows by what they are called in a legend."""


@dataclass(frozen=True)
class _Panel:
    """One diagram: its title, the figure that it shows, and the rows of each line."""

    title: str
    figure: str
    lines: Lines


def _lines(rows: Sequence[Mapping[str, Any]]) -> Lines:
    """Rows by what is neither steps nor guidance scale: the sampler, and the further axes that vary."""
    further = [name for name in rows[0] if name.startswith(("sampling.", "guidance."))]
    further = [name for name in further if len({str(row[name]) for row in rows}) > 1]
    lines: Lines = {}
    for row in rows:
        label = ", ".join([row["sampler"], *(f"{name.partition('.')[2]} {value_text(row[name])}" for name in further)])
        lines.setdefault(label, []).append(row)
    return lines


def _draw(panels: Sequence[_Panel], x: str, path: Path, title: str) -> None:
    """x: evaluations, of one figure in all panels, or guidance."""
    columns = min(len(panels), COLUMNS)
    height = -(-len(panels) // columns)
    picture = figure_class()(figsize=(max(5.6, 3.4 * columns), 3.2 * height + 1.2), layout="constrained", dpi=120)
    shared = x == "evaluations"
    every = picture.subplots(height, columns, sharey=shared, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for panel, axes in zip(panels, every, strict=False):
        for index, (label, rows) in enumerate(panel.lines.items()):
            points = sorted({(row[x], row[panel.figure]) for row in rows if panel.figure in row})
            if points:
                style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
                handles[label] = axes.plot(*zip(*points, strict=True), linewidth=1.2, **style)[0]
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel("network evaluations per image" if shared else "guidance scale")
        axes.grid(alpha=0.3, linewidth=0.6)
    if shared:
        every[0].set_ylabel(panels[0].figure)
        values = [row[panels[0].figure] for panel in panels for rows in panel.lines.values() for row in rows]
        if 0 < 10 * min(values) < max(values):
            every[0].set_yscale("log")
            _written_out(every[0].yaxis)
        across = [row[x] for panel in panels for rows in panel.lines.values() for row in rows]
        for axes in every[: len(panels)]:  # not sharex, which leaves panels above an empty place without numbers
            axes.set(xscale="log", xlim=(min(across) / 1.2, max(across) * 1.2))
            _written_out(axes.xaxis)
    for axes in every[len(panels) :]:
        axes.remove()
    columns = min(4, len(handles))
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")
    picture.suptitle(title, fontsize="small", parse_math=False)
    with atomic_path(path) as temporary:
        picture.savefig(temporary, format="png")


def _written_out(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
