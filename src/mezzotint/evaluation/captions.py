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

OTHERS = 9


def caption_agreement(samples: Tensor, images: Tensor, others: int = OTHERS) -> Tensor:
    """How likely sample i is nearer to image i than to each of `others` other images, drawn without replacement.

    Of features (N, D) each; float64 (N,). Of N − 1 images, n of which are at least as near as its own, that is
    Π_k (N − 1 − n − k) / (N − 1 − k) over k < others. By chance the mean is 1 / (others + 1). Raises `MezzotintError`
    for too few images.
    """
    count = len(images)
    if samples.shape != images.shape:
        raise MezzotintError(f"features are {tuple(samples.shape)} and {tuple(images.shape)}; give one pair a caption")
    if count <= others:
        raise MezzotintError(
            f"{others} other images are needed beside each caption's own, and there are {count} in all"
        )
    distances = torch.cdist(samples.double(), images.double())
    nearer = (distances <= distances.diagonal().unsqueeze(1)).sum(1) - 1  # without the own image
    left = count - 1 - torch.arange(others, device=distances.device)
    return ((left - nearer.unsqueeze(1)).clamp(min=0).double() / left).prod(1)


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

    Returns {"captions": their number, "caption agreement": the mean of `caption_agreement`, "CLIP score": of clip's
    features}. guidance, seed and options are those of `sample`. Raises `MezzotintError` for a model or data without
    captions.
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
    scores: dict[str, Any] = {
        "captions": len(captions),
        "caption agreement": caption_agreement(samples, images).mean().item(),
    }
    if network.knows_text:
        scores["CLIP score"] = clip_score(samples, network.embed_text(captions))
    return scores
