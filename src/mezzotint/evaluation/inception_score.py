"""Inception score of a classifier's predictions (Salimans et al. 2016, arXiv 1606.03498)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation.statistics import as_features


def inception_score(predictions: Tensor | np.ndarray, splits: int = 10, *, logits: bool = False) -> tuple[float, float]:
    """exp of the mean over samples of KL(p(y|x) ‖ p(y)), in float64: mean and deviation over `splits`.

    `predictions` are probabilities (N, K), or `logits`. The splits are consecutive, in the order given, as in the
    paper's code and ADM's; p(y) is a split's mean, so shuffle samples that are sorted by class. The score is in [1, K],
    and papers give that of 50,000 samples. Raises `MezzotintError` on rows that are no probabilities, NaN or infinite
    values, and with fewer samples than splits.
    """
    if splits < 1:
        raise MezzotintError(f"splits must be at least 1, got {splits}")
    values = as_features(predictions, "predictions", at_least=splits)
    if not logits:
        wrong = int(((values.min(1).values < 0) | ((values.double().sum(1) - 1).abs() > 1e-3)).sum())
        if wrong:
            raise MezzotintError(
                f"{wrong} of {len(values)} predictions are no probabilities, which are at least 0 and sum to 1; pass "
                "logits=True for values before the softmax"
            )
    n, scores = len(values), []
    for i in range(splits):
        p = values[i * n // splits : (i + 1) * n // splits].double()
        p = p.softmax(1) if logits else p
        # KL(p ‖ q) averaged is the entropy of the mean less the mean entropy: no log of the quotient, so 0·log 0 is 0.
        mean = p.mean(0)
        scores.append((torch.xlogy(p, p).sum(1).mean() - torch.xlogy(mean, mean).sum()).exp().item())
    return float(np.mean(scores)), float(np.std(scores))
