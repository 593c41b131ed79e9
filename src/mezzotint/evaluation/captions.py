"""Captions kept: is a sample more like the image of its caption than like others?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mezzotint.data import CaptionedDataset, ImageDataset, ImageStream
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.clip_score import clip_score
from mezzotint.evaluation.features import FeatureNetwork
from mezzotint.guidance import Guidance
from mezzotint.pipeline import Pipeline, sample_batches
from mezzotint.randomness import generator_for

OTHERS = 9


def caption_agreement(samples: Tensor, images: Tensor, generator: torch.Generator, others: int = OTHERS) -> Tensor:
    """Whether sample i is nearer to image i than to each of `others` other images, of features (N, D) each: bool (N,).

    Which others is random; by chance a share of 1 / (others + 1) is. Raises `MezzotintError` for too few images.
    """
    count = len(images)
    if samples.shape != images.shape:
        raise MezzotintError(f"features are {tuple(samples.shape)} and {tuple(images.shape)}; give one pair a caption")
    if count <= others:
        raise MezzotintError(
            f"{others} other images are needed beside each caption's own, and there are {count} in all"
        )
    distances = torch.cdist(samples.double(), images.double())
    own = distances.diagonal()
    # Columns in random order, its own moved out of reach: the first ones are the others.
    order = torch.rand(count, count, generator=generator).fill_diagonal_(2.0).argsort(dim=1)[:, :others]
    return (own.unsqueeze(1) < distances.gather(1, order.to(distances.device))).all(dim=1)


def score_captions(
    pipeline: Pipeline,
    dataset: ImageDataset | ImageStream,
    network: FeatureNetwork,
    *,
    count: int = 200,
    guidance: float | Guidance | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Draw a sample for each of up to `count` captions of the data set, and compare it with that caption's image.

    Returns {"captions": their number, "caption agreement": see `caption_agreement`, "CLIP score": of clip's features}.
    guidance, seed and options are those of `sample`. Raises `MezzotintError` for a model or data without captions.
    """
    if not pipeline.denoiser.text:
        raise MezzotintError("this model is not asked by captions; leave the score of captions out")
    if not isinstance(dataset, CaptionedDataset) or not dataset.has_captions:
        raise MezzotintError("captions are scored against their images, and this data set has none to look up")
    numbers = torch.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=torch.float64).round().long().tolist()
    # Images first: only then is it known which were unreadable, and whose captions are those of others in their place.
    images = torch.cat([network(dataset[number][0].unsqueeze(0))["features"] for number in numbers])
    captions = [found[0] for found in dataset.captions(numbers)]
    drawn = sample_batches(
        pipeline,
        captions,
        range(len(captions)),
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        **options,
    )
    samples = torch.cat([network(to_uint8(images))["features"] for images in drawn])
    right = caption_agreement(samples, images, generator_for(seed, 0))
    scores: dict[str, Any] = {"captions": len(captions), "caption agreement": right.double().mean().item()}
    if network.knows_text:
        scores["CLIP score"] = clip_score(samples, network.embed_text(captions))
    return scores
