"""Thresholding: keep what a model takes for the data within the range of images, whatever the sampler."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mezzotint.denoiser import Model, Prediction
from mezzotint.interpolants import Interpolant, Pyramid
from mezzotint.targets import Target, time_range

Threshold = Literal["none", "static", "dynamic"]


class Thresholded:
    """A model whose prediction of the data is clipped: to [-1, 1], or dynamically (Saharia et al. 2022, section 2.3).

    Dynamic: to ±s, then divided by s, where s is the `quantile` of |data| over an image, of a pyramid over each of its
    levels, but at least 1.
    """

    def __init__(self, model: Model, kind: Threshold, quantile: float = 0.995) -> None:
        self.model, self.kind, self.quantile = model, kind, quantile

    @property
    def interpolant(self) -> Interpolant:
        return self.model.interpolant

    @property
    def learned_variance(self) -> bool:
        return self.model.learned_variance

    def time_range(self, *to: Target, eps: float = 1e-3) -> tuple[float, float]:
        """Where the model tells the data, and the data all of `to`."""
        low, high = self.model.time_range("data", eps=eps)
        t_min, t_max = time_range(self.interpolant, "data", to or ("data",), eps)
        return max(low, t_min), min(high, t_max)

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        prediction = self.model(x, t)
        data = self._clipped(prediction.data)
        return Prediction(x, data, "data", prediction.coefficients, prediction.variance)

    def _clipped(self, data: Tensor) -> Tensor:
        if self.kind == "static":
            return data.clamp(-1, 1)
        levels = self.interpolant.split(data) if isinstance(self.interpolant, Pyramid) else [data.flatten(1)]
        clipped = []
        for level in levels:
            limit = quantile(level.abs(), self.quantile).clamp(min=1).unsqueeze(1)
            clipped.append(level.clamp(-limit, limit) / limit)
        return torch.cat(clipped, dim=1).reshape(data.shape)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of each row (B, n), linear between neighbours. (torch.quantile refuses 16 million numbers.)"""
    position = q * (values.shape[1] - 1)
    below = math.floor(position)
    ordered = values.sort(dim=1).values
    return torch.lerp(ordered[:, below], ordered[:, min(below + 1, values.shape[1] - 1)], position - below)
