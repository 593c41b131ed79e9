"""Scores of images, from wherever they come, against real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.data import SOURCES, ImageDataset
from mezzotint.data.splits import NoSuchSplit
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.captions import score_captions
from mezzotint.evaluation.confidence import bootstrap
from mezzotint.evaluation.features import Extracted, FeatureNetwork, extract, feature_network, is_inception
from mezzotint.evaluation.frechet import frechet_distance, frechet_distance_infinity
from mezzotint.evaluation.inception_score import inception_score
from mezzotint.evaluation.kernel import kernel_distance
from mezzotint.evaluation.manifold import density_coverage, precision_recall
from mezzotint.evaluation.reference import Reference, reference_statistics
from mezzotint.evaluation.sources import ImageSource, check_spec, image_source, random_order
from mezzotint.finite import check_finite
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.pipeline import Pipeline
from mezzotint.recipe import DataSettings, has_recipe, load_recipe, recipe_names
from mezzotint.samplers import example_generators
from mezzotint.samplers.likelihood import bits_per_dim, log_likelihood

#: images on either side of the metrics that look at single images, at most: their time grows with the square
MAX_ROWS = 10_000
#: sides in pixels up to which a labelled data set's own classifier sees enough to be the default
SMALL = 64
#: what makes pictures into images
OF_PICTURES = ("size", "channels", "background")
#: images in each of the 100 subsets of the kernel distance
SUBSET = 1000


def evaluate(
    model: Pipeline | ImageSource | str | Path,
    reference: DataSettings | ImageSource | str | Path | None = None,
    *,
    features: str | FeatureNetwork | None = None,
    weights: str | Path | None = None,
    count: int | None = None,
    guidance: float | None = None,
    captions: int = 0,
    likelihood: int = 0,
    infinity: bool = False,
    intervals: int = 0,
    rows: int = MAX_ROWS,
    html: str | Path | None = None,
    run: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score `count` images of `model` against `reference`.

    model: a pipeline, of which class-balanced samples are drawn (1,000 unless `count` says), with `guidance` a second,
    guided set too; or images (see `image_source`). reference: real images, an .npz of statistics, a recipe's name for
    the held-out images of its data set, or None for those of the pipeline's own. features: see `feature_network`; None
    is the classifier of a labelled data set of up to 64 pixels a side, and inception for all others; weights: its file
    or folder.

    Against a data set's held-out images, as many of its training images are scored as well (``real``): what a perfect
    model would get. Where the features are those of its classifier, that also tells the share of samples that are of
    the class asked for. captions: of so many captions of the training and of the held-out images, the share whose
    sample is nearer to its own image than to 9 others (`score_captions`). infinity: extrapolate the Fréchet distance to
    infinitely many samples. intervals: 95 % bootstrap intervals from so many resamplings. likelihood: bits per
    dimension of so many held-out images. rows: images on either side that precision, recall and kernel distances look
    at. html: also write a page of it all (see `write_report`), with the pictures of a sweep in the folder `run`.
    data: where images are scored, options of the reference (those of `image_source`, such as size), which a folder of
    pictures that is scored is read with, too. options: those of `Sampler`.

    Returns {"features", "reference", "reference_images", "sets": {"samples" | "guided" | "real": figures}, …}, where a
    figure's name tells its features: FID of inception alone, FD-classifier, FD-dinov2. Raises `MezzotintError` where
    there is nothing to compare with, and as the sources, the network and the metrics do.
    """
    if guidance is not None:
        Guidance.parse({"scale": guidance})  # rather than after the samples without it
    if not isinstance(model, Pipeline):
        check_spec(model)
    if reference is None:
        if not isinstance(model, Pipeline):
            raise MezzotintError(
                "images are scored against others; give a reference: a data set such as folder:PATH, a folder, an .npz"
            )
        reference = model.recipe.data
    given = dict(data or {})
    if given and isinstance(model, Pipeline):
        raise MezzotintError("the data of a model are its recipe's; override them there, and leave data out")
    settings = data_settings(reference, given)
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    read_as = given if settings is None else {}
    if settings is None and isinstance(model, Pipeline):
        read_as = decoded_alike(reference, model.recipe.data, ("size", "background"))
    try:
        network = choose_network(features, weights, settings, model)
        real = reference_statistics(settings or reference, network, rows=rows, **shared, **read_as)
    except NoSuchSplit as error:
        if not isinstance(model, Pipeline) or settings is not model.recipe.data:
            raise
        raise MezzotintError(
            f"nothing was held out of what {model.recipe.name} was trained on, so there is nothing to score it against "
            f"({str(error).partition(';')[0]}); give other pictures as the reference, or train it with "
            "data.test_fraction=0.2"
        ) from None
    scores: dict[str, Any] = {"features": network.name, "reference": real.source, "reference_images": real.count}
    sets: dict[str, dict[str, Any]] = {}
    seen_sets: dict[str, tuple[ImageSource, Extracted]] = {}

    def add(name: str, source: ImageSource) -> None:
        seen = extract(source, network, keep_rows=None if infinity else rows, **shared)
        sets[name] = figures(seen, real, infinity=infinity, intervals=intervals, rows=rows)
        seen_sets[name] = source, seen

    if network.accuracy is not None:
        scores["classifier_accuracy"] = network.accuracy
    if isinstance(model, Pipeline):
        scores["recipe"] = model.recipe.name
        scales = {"samples": 1.0} | ({} if guidance is None else {"guided": guidance})
        for name, scale in scales.items():
            add(name, image_source(model, count=count, guidance=scale, seed=seed, **options))
        if guidance is not None:
            scores["guidance"] = guidance
    else:
        if settings is not None and isinstance(model, str | Path) and Path(model).exists():
            options |= {"channels": settings.channels}  # ADM's .npz is in colour even where nothing is
            options |= decoded_alike(model, settings)
        if isinstance(model, str | Path) and Path(model).expanduser().is_dir():
            options |= {key: given[key] for key in OF_PICTURES if key in given}
        add("samples", image_source(model, count=count, **options))
    if settings is not None and (train := _training_images(settings, real, sets["samples"]["images"])) is not None:
        add("real", train)
    scores["sets"] = sets
    if captions:
        if not isinstance(model, Pipeline):
            raise MezzotintError("captions are asked of a model, not of images; leave captions out")
        asked = {"count": captions, "guidance": guidance, "seed": seed, **shared, **options}
        for split in ("train", "test"):
            try:
                dataset = model.recipe.data.load(split)
            except NoSuchSplit:  # nothing is held out
                continue
            scores[f"captions, {split}"] = score_captions(model, dataset, network, **asked)
    if likelihood:
        if not isinstance(model, Pipeline):
            raise MezzotintError("bits per dimension are a model's, not those of images; leave likelihood out")
        some, labels = _first_images(image_source(settings or reference, count=likelihood))
        scores |= mean_bits_per_dim(model, some, labels, seed=seed, batch_size=batch_size)
    if html is not None:
        from mezzotint.evaluation.report import write_report  # which knows the names of the figures made here

        write_report(html, scores, seen_sets, network, data=settings, run=run, **shared)
    return scores


def figures(
    seen: Extracted, real: Reference, *, infinity: bool = False, intervals: int = 0, rows: int = MAX_ROWS
) -> dict[str, Any]:
    """The figures of images that a network saw, against those of a reference that the same network saw.

    Raises `MezzotintError` where the networks differ, and as the metrics do.
    """
    if seen.network != real.network:
        raise MezzotintError(
            f"the images were seen by {seen.network}, the reference by {real.network}; their features do not compare"
        )
    kind = _kind(seen.network)
    frechet, kernel = ("FID", "KID") if kind == "inception" else (f"FD-{kind}", f"KD-{kind}")
    made: dict[str, Any] = {"images": seen.count, "source": seen.source}
    made[frechet] = frechet_distance(real.statistics["features"], seen.statistics["features"])
    if "spatial" in seen.statistics and "spatial" in real.statistics:
        made["sFID"] = frechet_distance(real.statistics["spatial"], seen.statistics["spatial"])
    if seen.logits is not None:
        name = "Inception score" if kind == "inception" else f"Inception score ({kind})"
        # Samples come sorted by class, and a split must hold all of them; the usual ten need enough for each.
        shuffled = seen.logits[random_order(len(seen.logits), len(seen.logits))]
        splits = 10 if seen.count >= 5000 else 1
        made[name], deviation = inception_score(shuffled, splits, logits=True)
        if splits > 1:
            made[f"{name}, std over {splits} splits"] = deviation
    fakes, reals = seen.rows[:rows], real.rows[:rows]
    if len(reals) > 5 and len(fakes) > 5:
        # The usual 100 subsets of 1,000 share most of their images where there are not many more.
        subsets = 100 if min(len(reals), len(fakes)) >= 5 * SUBSET else None
        distance = kernel_distance(reals, fakes, subsets=subsets, subset_size=SUBSET)
        made[kernel], made[f"{kernel}, standard error"] = distance
        made["precision"], made["recall"] = precision_recall(reals, fakes)
        made["density"], made["coverage"] = density_coverage(reals, fakes)
    if infinity:
        smallest = max(2, min(5000, len(seen.rows) // 2))
        line = frechet_distance_infinity(real.statistics["features"], seen.rows, smallest=smallest)
        made[f"{frechet} at N = ∞"], made[f"{frechet} at N = ∞, standard error"] = line.value, line.standard_error
    if intervals:
        held = bootstrap(lambda some: frechet_distance(real.statistics["features"], some), seen.rows, samples=intervals)
        made[f"{frechet}, 95 % interval"] = [held.low, held.high]
    if kind == "classifier" and seen.logits is not None and seen.labels is not None:
        made["class agreement"] = (seen.logits.argmax(1) == seen.labels).double().mean().item()
    for name, value in made.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise MezzotintError(f"{name} of {seen.source} came out as {value}; look at the images and the reference")
    return made


def mean_bits_per_dim(
    pipeline: Pipeline, images: Tensor, labels: Tensor | None, *, seed: int = 0, batch_size: int = 256
) -> dict[str, float]:
    """Mean bits per dimension, and its standard error, of images uint8 (N, C, H, W) given their labels (N,).

    Images are uniformly dequantised and their density found through the probability-flow ODE with one Hutchinson probe
    each (`log_likelihood`). Raises `MezzotintError` for a latent model: a density of latents is not one of images.
    """
    if pipeline.denoiser.text or len(pipeline.denoiser.level_shapes) > 1:
        raise MezzotintError("bits per dimension are those of images by class, not of pyramids or by caption")
    if pipeline.recipe.representation.name != "pixels":
        raise MezzotintError("bits per dimension are those of pixels; this model's data are latents of an autoencoder")
    bits = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        generators = example_generators(seed, range(start, start + len(images[rows])))
        noise = torch.stack([torch.rand(images.shape[1:], generator=g) for g in generators]) - 0.5
        x = ((images[rows] + noise) / 127.5 - 1).to(pipeline.device)
        y = None if labels is None else labels[rows].to(pipeline.device)
        log_p = log_likelihood(ConditionalModel(pipeline.denoiser, y), x, generator=generators)
        bits.append(bits_per_dim(log_p, x[0].numel()).cpu())
    values = torch.cat(bits)
    check_finite({"bits per dimension": values}, "these images under the model")
    return {"bits_per_dim": values.mean().item(), "bits_per_dim_error": (values.std() / len(values) ** 0.5).item()}


def decoded_alike(
    images: object, settings: DataSettings | None, of_a_folder: Sequence[str] = ("background",)
) -> dict[str, Any]:
    """Options for pictures by path, or another data set by name, compared with a data set: both are decoded alike.

    of_a_folder: which of them a folder of pictures has.
    """
    if settings is None or not isinstance(images, str | Path):
        return {}
    if Path(images).expanduser().is_dir():
        return {key: getattr(settings, key) for key in of_a_folder}
    source = SOURCES.get(str(images).partition(":")[0])
    takes = () if source is None else signature(source).parameters
    return {key: getattr(settings, key) for key in OF_PICTURES if key in takes}


def data_settings(reference: object, changes: Mapping[str, Any] | None = None) -> DataSettings | None:
    """The data set that `reference` is, or that the recipe or run trains on; None for images of another kind.

    changes: of its settings. Raises `MezzotintError` where it is nothing at all.
    """
    if isinstance(reference, str | Path) and (str(reference) in recipe_names() or has_recipe(reference)):
        reference = load_recipe(reference).data
    check_spec(reference, recipe_names())
    if not isinstance(reference, DataSettings):
        return None
    return DataSettings.parse(reference.model_dump() | dict(changes)) if changes else reference


def choose_network(
    features: str | FeatureNetwork | None,
    weights: str | Path | None,
    settings: DataSettings | None,
    model: object,
) -> FeatureNetwork:
    """The feature network that is asked for, or the default for these data, where the model is."""
    if isinstance(features, FeatureNetwork):
        return features
    device = model.device if isinstance(model, Pipeline) else "cpu"
    if features is None:
        small = settings is not None and settings.labels and settings.size <= SMALL
        features = "classifier" if small else "inception"
    if features == "classifier":
        if settings is None:
            raise MezzotintError(
                "the classifier is one of a labelled data set, which the reference is not; choose other features"
            )
        return feature_network(features, device=device, data=settings)
    return feature_network(features, weights=weights, device=device)


def _kind(network: str) -> str:
    """The short name of a feature network, for the names of its figures."""
    return "inception" if is_inception(network) else network.split(" ")[0]


def _training_images(settings: DataSettings, held_out: Reference, count: int) -> ImageSource | None:
    """Up to `count` training images; None where the held-out ones are no others (or the set is a stream)."""
    dataset = settings.load("train")
    if not isinstance(dataset, ImageDataset) or held_out.source == dataset.identity:
        return None
    return image_source(dataset, count=min(count, len(dataset)), workers=settings.workers)


def _first_images(source: ImageSource) -> tuple[Tensor, Tensor | None]:
    images, labels = zip(*source.batches(256), strict=True)
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)
