"""Principal components of more vectors than memory holds."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError

#: rows that are taken at once, and columns of the scatter matrix: few enough that copies are small
ROWS, COLUMNS = 8192, 192


class Moments:
    """Mean and covariance of vectors that come a block at a time, in the memory of the covariance alone.

    A block's products are made in the vectors' precision and added up in float64: of float32 vectors, variances come
    out to about 10⁻⁷ of the largest, in half of float64's time.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        options = {"dtype": torch.float64, "device": device}
        self._origin: Tensor | None = None
        self._sum = torch.zeros(dimension, **options)  # type: ignore[call-overload]
        self._scatter = torch.zeros(dimension, dimension, **options)  # type: ignore[call-overload]  # lower blocks only

    def update(self, vectors: Tensor) -> None:
        """Take the vectors (n, D) in."""
        if self._origin is None:  # near the mean, so that no digits are lost when it is subtracted in the end
            self._origin = vectors[:ROWS].mean(0).to(self._sum)
        origin = self._origin.to(vectors.dtype)
        for block in vectors.split(ROWS):
            rows = block - origin
            self._sum += rows.sum(0, dtype=self._sum.dtype)
            for first in range(0, rows.shape[1], COLUMNS):  # the rest follows from symmetry
                here = slice(first, first + COLUMNS)
                self._scatter[first:, here] += rows[:, first:].T @ rows[:, here]
        self.count += len(vectors)

    @property
    def mean(self) -> Tensor:
        """(D,) float64. Raises `MezzotintError` unless two vectors were seen."""
        shift = self._shift
        assert self._origin is not None
        return self._origin + shift

    @property
    def _shift(self) -> Tensor:
        if self.count < 2:
            raise MezzotintError(f"a variance cannot be measured on {self.count} patch(es); give more images")
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, the unbiased one (divided by n − 1). Raises `MezzotintError` as `mean` does."""
        shift = self._shift
        lower = self._scatter.tril() - self.count * torch.outer(shift, shift).tril()
        return (lower + lower.tril(-1).T) / (self.count - 1)


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """All of them: rows V (D, D) float64 with V Vᵀ = I, and their variances (D,), the largest first.

    Of either sign of a row it is the one whose entry of largest magnitude is positive.
    """
    variances, columns = torch.linalg.eigh(covariance)
    basis = columns.T.flip(0)
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0), variances.flip(0).clamp(min=0)
