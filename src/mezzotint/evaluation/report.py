"""A page of one evaluation: a single HTML file with its pictures inside, without scripts, that needs no network.

>>> evaluate(pipeline, guidance=1.5, html="page.html", run="runs/digits")
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from PIL import Image
from torch import Tensor

from mezzotint import data as data_sets
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import Extracted, FeatureNetwork
from mezzotint.evaluation.frechet import frechet_distance
from mezzotint.evaluation.manifold import precision_recall
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.scores import MAX_ROWS
from mezzotint.evaluation.sources import DatasetSource, ImageSource, PipelineSource, of_first
from mezzotint.evaluation.sweep import frechet_name, sweep_pictures
from mezzotint.files import write_text
from mezzotint.guidance import Guidance
from mezzotint.pipeline import sample_batches
from mezzotint.recipe import DataSettings
from mezzotint.samplers import Sampler

#: images in a grid, and classes in it; samples shown with their nearest training images, and how many of these
GRID, GRID_CLASSES, EXAMPLES, NEIGHBOURS = 100, 10, 16, 5
#: training images that are looked among, at most: their features are kept in memory
MAX_TRAINING = 100_000
#: images of a class on either side from which on its precision and recall are told
MIN_CLASS = 20
#: sides in pixels that pictures are enlarged to, and shrunk to
SMALLEST, LARGEST = 48, 128
#: bars of the distances' histogram
BARS = 40
#: neighbours looked at beyond the k-th, which float32's rounding may have put before it
SPARE = 5


def write_report(
    path: str | Path,
    scores: Mapping[str, Any],
    seen: Mapping[str, tuple[ImageSource, Extracted]],
    network: FeatureNetwork,
    *,
    data: DataSettings | None = None,
    run: str | Path | None = None,
    title: str = "",
    batch_size: int = 256,
    progress: bool = False,
) -> None:
    """Write the page of what `evaluate` returned: settings, figures, samples, their nearest training images, classes.

    seen: each set of images scored (``real`` is not shown), and what `network` saw in it. data: the data set that they
    were compared with; its training images (up to `MAX_TRAINING`) are what is looked among, and without it that is left
    out. run: a folder whose sweep.csv and its pictures are shown too. Of a pipeline's samples those that are shown are
    drawn again. The same scores write the same page.

    Samples that lie nearer to training images than held-out real images do are a sign of copying (Meehan et al. 2020,
    arXiv 2004.05675): see `copying`. Under torch.distributed all processes call this, and the first one writes. Raises
    `MezzotintError` where the page cannot be written, and as the sources do.
    """
    real = _held_out(data, network, batch_size, progress)
    training = _training(data, network, batch_size, progress)
    shown = {name: value for name, value in seen.items() if name != "real"}

    def page() -> None:
        first = next(iter(shown.values()))[0] if shown else None
        source = resources.files("mezzotint.evaluation") / "report.html"
        # Autoescaping: names of classes, folders and recipes are anybody's text.
        template = Environment(autoescape=True).from_string(source.read_text(encoding="utf-8"))
        text = template.render(
            title=title or f"{scores.get('recipe') or (first.identity if first else 'Images')}: evaluation",
            settings=_settings(scores),
            figures=_figures(scores),
            sets=[
                _set(name, source, extracted, scores, real, training, batch_size)
                for name, (source, extracted) in shown.items()
            ],
            no_training=training if isinstance(training, str) else "",
            plots=[
                (file.stem, base64.b64encode(file.read_bytes()).decode())
                for file in ([] if run is None else sweep_pictures(run))
            ],
        )
        write_text(path, text + "\n")

    of_first(page)


# ---- What was scored -------------------------------------------------------------------------------------------------


def _settings(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What all sets have in common."""
    images = scores.get("reference_images")
    rows = [
        ("recipe", scores.get("recipe")),
        ("features", scores.get("features")),
        ("reference", f"{scores.get('reference')}" + (f", {images:,} images" if images else "")),
    ]
    if scores.get("classifier_accuracy") is not None:
        rows.append(("the classifier's own accuracy", _percent(scores["classifier_accuracy"])))
    if "bits_per_dim" in scores:
        bits = f"{scores['bits_per_dim']:.3f} ± {scores['bits_per_dim_error']:.3f}"
        rows.append(("bits per dimension of held-out images", bits))
    return [(name, str(value)) for name, value in rows if value]


def _set_settings(source: ImageSource, extracted: Extracted) -> list[tuple[str, str]]:
    rows = [("images", f"{extracted.count:,}"), ("identity", extracted.source)]
    if isinstance(source, PipelineSource):
        recipe = source.pipeline.recipe
        sampler = Sampler.parse(recipe.sampling.model_dump() | source.options)
        fixed = Sampler(sampler=sampler.sampler).model_dump()
        changed = {k: v for k, v in sampler.model_dump(exclude={"sampler", "steps"}).items() if v != fixed[k]}
        guidance = source.guidance if source.guidance is not None else recipe.guidance
        if not isinstance(guidance, Guidance):
            guidance = Guidance.parse(recipe.guidance.model_dump() | {"scale": guidance})
        limits = {k: v for k, v in guidance.model_dump(exclude={"scale"}).items() if v != getattr(Guidance(), k)}
        rows += [
            ("sampler", ", ".join([sampler.sampler, f"{sampler.steps} steps", *_pairs(changed)])),
            ("guidance", ", ".join([f"{guidance.scale:g}", *_pairs(limits if guidance.scale != 1 else {})])),
            ("seed", str(source.seed)),
        ]
    return rows


def _pairs(values: Mapping[str, object]) -> list[str]:
    return [f"{key} {value}" for key, value in values.items()]


@dataclass(frozen=True)
class _Table:
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    real: bool = False
    sentence: str = ""


def _figures(scores: Mapping[str, Any]) -> _Table:
    sets: Mapping[str, Mapping[str, Any]] = scores["sets"]
    names = [name for name in dict.fromkeys(name for made in sets.values() for name in made) if name != "source"]
    rows = [(name, [_text(made.get(name)) for made in sets.values()]) for name in names]
    return _Table([_title(name, scores).lower() for name in sets], rows, real="real" in sets)


def _title(name: str, scores: Mapping[str, Any]) -> str:
    scale = f" by {scores['guidance']:g}" if name == "guided" and "guidance" in scores else ""
    return name.capitalize() + scale


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(_text(one) for one in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- Real images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Real:
    """Real images: where from, and their features (n, D) by the numbers of the images in `source` (n,)."""

    source: DatasetSource
    rows: Tensor
    indices: Tensor


def _held_out(data: DataSettings | None, network: FeatureNetwork, batch_size: int, progress: bool) -> _Real | None:
    """Up to `MAX_ROWS` held-out images; None where there are none."""
    if data is None:
        return None
    try:
        if data.load("test").identity == data.load("train").identity:
            return None
        source = DatasetSource(data.load("test"), workers=data.workers)
        found = reference_statistics(source, network, rows=MAX_ROWS, batch_size=batch_size, progress=progress)
    except MezzotintError:
        return None  # no such split; or a stream or latents, of which `_training` tells
    return _Real(source, found.rows, found.indices)


def _training(data: DataSettings | None, network: FeatureNetwork, batch_size: int, progress: bool) -> _Real | str:
    """The training images, or why there are none."""
    if data is None:
        return "these images were not compared with a data set, whose training images could be looked among"
    try:
        dataset = data.load("train")
        some = min(len(dataset), MAX_TRAINING) if isinstance(dataset, data_sets.ImageDataset) else None
        source = DatasetSource(dataset, some, workers=data.workers)
        found = reference_statistics(source, network, rows=MAX_TRAINING, batch_size=batch_size, progress=progress)
    except MezzotintError as error:
        return str(error)
    return _Real(source, found.rows, found.indices)


# ---- A set of images -------------------------------------------------------------------------------------------------


def _set(
    name: str,
    source: ImageSource,
    extracted: Extracted,
    scores: Mapping[str, Any],
    real: _Real | None,
    training: _Real | str,
    batch_size: int,
) -> dict[str, Any]:
    """What the template shows of one set."""
    chosen = _grid(extracted.labels, extracted.count)
    nearest = None if isinstance(training, str) else _Nearest.of(extracted, training, real)
    wanted = [index for _, indices in chosen for index in indices]
    pictures = _pictures(source, [*wanted, *(nearest.examples if nearest else [])], batch_size)
    names = source.class_names
    grid = [
        ("" if label is None else _class(label, names), [_png(pictures[index]) for index in indices])
        for label, indices in chosen
    ]
    return {
        "title": _title(name, scores),
        "settings": _set_settings(source, extracted),
        "shown": f"{len(wanted):,} of them{', a class a row' if grid and grid[0][0] else ''}:",
        "grid": grid,
        "nearest": nearest.shown(name, extracted, training, pictures, names) if nearest else None,
        "classes": _classes(extracted, names, real, scores["sets"].get(name, {})),
    }


def _class(label: int, names: Sequence[str]) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def _grid(labels: Tensor | None, count: int) -> list[tuple[int | None, list[int]]]:
    """The images to show: of each class, or of ten of many, the first ones; or the first of all."""
    if labels is None:
        return [(None, list(range(min(count, GRID))))]
    known = labels.unique().tolist()
    if len(known) > GRID_CLASSES:
        known = [known[i * len(known) // GRID_CLASSES] for i in range(GRID_CLASSES)]
    return [(label, (labels == label).nonzero().flatten()[: GRID // len(known)].tolist()) for label in known]


def _pictures(source: ImageSource, indices: Sequence[int], batch_size: int) -> dict[int, Tensor]:
    """The images of a source by number, uint8 (C, H, W)."""
    wanted = sorted(set(indices))
    if isinstance(source, DatasetSource):
        return {index: source.dataset[int(source.indices[index])][0] for index in wanted}
    if isinstance(source, PipelineSource):
        settings = {"guidance": source.guidance, "seed": source.seed, "batch_size": batch_size, **source.options}
        drawn = sample_batches(source.pipeline, source.labels, wanted, **settings)
        return dict(zip(wanted, to_uint8(torch.cat(list(drawn))), strict=True))
    found: dict[int, Tensor] = {}
    first = 0
    for images, _ in source.batches(batch_size):
        found |= {index: images[index - first] for index in wanted if first <= index < first + len(images)}
        first += len(images)
    return found


@dataclass(frozen=True)
class _Picture:
    """A PNG in base 64, and the size that it is shown at."""

    data: str
    width: int
    height: int
    pixelated: bool


def _png(image: Tensor) -> _Picture:
    """uint8 (C, H, W); large ones are shrunk here, small ones enlarged by the browser."""
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((LARGEST, LARGEST))
    written = io.BytesIO()
    picture.save(written, format="PNG")
    scale = math.ceil(SMALLEST / max(picture.size))
    coded = base64.b64encode(written.getvalue()).decode()
    return _Picture(coded, scale * picture.width, scale * picture.height, scale > 1)


# ---- Nearest training images -----------------------------------------------------------------------------------------


def nearest(rows: Tensor, others: Tensor, k: int, *, block: int = 256) -> tuple[Tensor, Tensor]:
    """The k rows of `others` (M, D) nearest to each of `rows` (N, D): distances float64 (N, k), ascending, and indices.

    Float32 matrix products find candidates, whose distances are then computed exactly: that of a copy is 0. With fewer
    than k others, all of them.
    """
    centre = others.mean(0)  # near the origin, products lose least
    centred = others - centre
    squares = centred.square().sum(1)
    k, looked = min(k, len(others)), min(k + SPARE, len(others))
    distances, indices = [], []
    for part in rows.split(block):
        approximate = torch.addmm(squares[None], part - centre, centred.T, alpha=-2)
        near = approximate.topk(looked, largest=False).indices.sort().values
        exact = (part[:, None].double() - others[near].double()).square().sum(2).sqrt()
        order = exact.argsort(dim=1, stable=True)[:, :k]
        distances.append(exact.gather(1, order))
        indices.append(near.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def copying(samples: Tensor, held_out: Tensor) -> tuple[float, float]:
    """How often a sample is nearer to its nearest training image than a held-out real image is to its own.

    samples (N,), held_out (M,): those distances. Returns the share of all N·M pairs in which the sample's is smaller,
    equal ones counting half, and its standard error if both were drawn alike: the Mann-Whitney statistic of Meehan et
    al. (2020, arXiv 2004.05675), over N·M. A model of the data's own distribution gets 1/2, one that copies more, one
    whose samples are unlike the data less.
    """
    ordered = held_out.sort().values
    below, up_to = (torch.searchsorted(ordered, samples.contiguous(), right=right) for right in (False, True))
    n, m = len(samples), len(ordered)
    return 1 - (below + up_to).double().mean().item() / (2 * m), math.sqrt((n + m + 1) / (12 * n * m))


@dataclass(frozen=True)
class _Nearest:
    """The training images nearest to a set's images (n, k), by rows of their features; and what held-out ones have."""

    distances: Tensor
    indices: Tensor
    held_out: Tensor | None
    examples: dict[int, int]
    """Images to show, by their number in the source: their rows."""

    @classmethod
    def of(cls, extracted: Extracted, training: _Real, real: _Real | None) -> _Nearest:
        distances, indices = nearest(extracted.rows, training.rows, NEIGHBOURS)
        held_out = None if real is None else nearest(real.rows, training.rows, 1)[0][:, 0]
        order = distances[:, 0].argsort(stable=True).tolist()
        close = order[: EXAMPLES // 2]
        others = [row for row in range(len(order)) if row not in set(close)][: EXAMPLES - len(close)]  # in random order
        chosen = [*close, *sorted(others, key=order.index)]
        return cls(distances, indices, held_out, {int(extracted.indices[row]): row for row in chosen})

    def shown(
        self,
        name: str,
        extracted: Extracted,
        training: _Real | str,
        pictures: Mapping[int, Tensor],
        class_names: Sequence[str],
    ) -> dict[str, Any]:
        assert isinstance(training, _Real)
        mine = self.distances[:, 0]
        many = f"{len(training.rows):,} training images ({training.source.identity})"
        sentence = f"The nearest of {many} to each of {len(mine):,} images, by distance between their features."
        table = [("median distance to the nearest training image", f"{mine.median():.4g}")]
        sets = [(name, mine)]
        if self.held_out is None:
            sentence += " There are no held-out images to compare the distances with."
        else:
            share, error = copying(mine, self.held_out)
            sentence += (
                " Held-out real images tell how near images are that were never seen: a perfect model would be nearer "
                "in 50 % of the pairs, and nearer than the nearest 1 % of them for 1 % of its samples. Shares well "
                "above are a sign of copies. Guidance, which makes samples more typical, raises them a little by "
                "itself; the pictures tell the two apart."
            )
            if extracted.network.startswith("classifier "):
                sentence += " The classifier was fitted on the held-out images, which look a little nearer for it."
            low = self.held_out.quantile(0.01)
            table += [
                ("the same of held-out images", f"{self.held_out.median():.4g}"),
                (
                    "pairs in which the sample is nearer than the held-out image",
                    f"{_percent(share)} ± {_percent(error)}",
                ),
                (
                    "samples nearer than the nearest 1 % of held-out images",
                    _percent((mine < low).double().mean().item()),
                ),
            ]
            sets.append(("held-out images", self.held_out))
        table.append(("samples with the very features of a training image", f"{int((mine == 0).sum()):,}"))
        at = training.indices[self.indices]
        real = _pictures(training.source, at[list(self.examples.values())].flatten().tolist(), 256)
        labels = extracted.labels
        examples = [
            (
                _png(pictures[index]),
                "" if labels is None else _class(int(labels[index]), class_names),
                [
                    (_png(real[number]), f"{distance:.3g}", f"training image {number}")
                    for distance, number in zip(self.distances[row].tolist(), at[row].tolist(), strict=True)
                ],
            )
            for index, row in self.examples.items()
        ]
        close = min(EXAMPLES // 2, len(mine))
        others = f", and {len(examples) - close} others at random" if len(examples) > close else ""
        which = f"The {close} nearest of all{others}, in the order of their distances; beside each its training images:"
        return {
            "sentence": sentence,
            "table": table,
            "histogram": _histogram(sets),
            "which": which,
            "examples": examples,
        }


def _histogram(sets: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Shares of each set in `BARS` bars from 0 on, the highest of all being 1; the last bar also holds what is beyond.

    Beyond is 1 % of each set at most, which would squeeze the rest.
    """
    end = max(1e-9, *(values.quantile(0.99).item() for _, values in sets))
    shares = []
    for _, values in sets:
        counts = torch.bincount((values / end * BARS).long().clamp(max=BARS - 1), minlength=BARS)
        shares.append(counts / len(values))
    top = max(share.max().item() for share in shares)
    return {
        "sets": [(name, (share / top).tolist()) for (name, _), share in zip(sets, shares, strict=True)],
        "width": 640 / BARS,
        "end": f"{end:.3g}",
    }


# ---- Classes ---------------------------------------------------------------------------------------------------------


def _classes(extracted: Extracted, names: Sequence[str], real: _Real | None, made: Mapping[str, Any]) -> _Table | None:
    """Each class by itself: agreement where the features judge classes, and against the held-out images of the class.

    A Fréchet distance needs 2·D images on either side; with fewer it would tell their number more than their quality.
    """
    labels = extracted.labels
    if labels is None or len(present := labels.unique().tolist()) < 2:
        return None
    mine, theirs = labels[extracted.indices], None
    if real is not None and real.source.class_names:
        theirs = torch.tensor([real.source.dataset[int(real.source.indices[i])][1] for i in real.indices.tolist()])
    frechet = frechet_name(made) or "Fréchet distance"
    agreed = None
    if "class agreement" in made and extracted.logits is not None:
        agreed = extracted.logits.argmax(1) == labels
    width = extracted.rows.shape[1]
    rows = []
    for label in present:
        values: dict[str, Any] = {"images": int((labels == label).sum())}
        if agreed is not None:
            values["class agreement"] = agreed[labels == label].double().mean().item()
        if theirs is not None and real is not None:
            fakes, reals = extracted.rows[mine == label], real.rows[theirs == label]
            values["held-out images"] = len(reals)
            fewest = min(len(fakes), len(reals))
            if fewest >= MIN_CLASS:
                values["precision"], values["recall"] = precision_recall(reals, fakes)
            if fewest >= 2 * width:
                values[frechet] = frechet_distance(reals, fakes)
        rows.append((_class(label, names), values))
    columns = list(dict.fromkeys(name for _, values in rows for name in values))
    sentence = "Each class's images"
    if theirs is None:
        sentence += "; there are no held-out images by class to compare them with."
    else:
        sentence += " against the held-out images of that class."
        if frechet not in columns:
            sentence += (
                f" Its {frechet} is left out: {width} features need {2 * width} images of a class on either side."
            )
    return _Table(
        columns, [(name, [_text(values.get(c)) for c in columns]) for name, values in rows], sentence=sentence
    )
