"""CLIP score: do images show what their captions say (Hessel et al. 2021, arXiv 2104.08718)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation.statistics import as_features


def clip_score(image_embeddings: Tensor | np.ndarray, text_embeddings: Tensor | np.ndarray) -> float:
    """Mean of 100·max(cos, 0) over images (N, D) and their captions (N, D), row by row, in float64; in [0, 100].

    This is torchmetrics' scale; the score of Hessel et al., 2.5·max(cos, 0), is a 40th of it. Raises `MezzotintError`
    where shapes differ, on NaN or infinite values and on rows of length 0.
    """
    images = as_features(image_embeddings, "image embeddings").double()
    texts = as_features(text_embeddings, "text embeddings").double().to(images.device)
    if images.shape != texts.shape:
        raise MezzotintError(
            f"image embeddings are {tuple(images.shape)} and text embeddings {tuple(texts.shape)}; give each image one "
            "caption, and embed both with one model"
        )
    lengths = images.norm(dim=1) * texts.norm(dim=1)
    if not lengths.all():
        raise MezzotintError(
            f"{int((lengths == 0).sum())} of {len(lengths)} pairs hold an embedding of length 0, without direction; "
            "look at the images and captions they came from"
        )
    cosines = (images * texts).sum(1) / lengths
    return 100 * cosines.clamp(min=0).mean().item()
