"""Mean and covariance of features, gathered batch by batch, and the checks that every metric makes of its features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path

#: rows of a whole array that are made float64 at a time
BLOCK = 4096


class FeatureStatistics:
    """The number n, mean (D,) and unbiased covariance (D, D) of features, in float64, without keeping the features.

    Batches are joined by Chan's update (Chan, Golub and LeVeque 1983): whatever the batches, their order and
    an offset common to all features, the result is that of `np.cov` up to rounding. The sums live on `device`, else
    where the first batch is. n is None where it is unknown, as in files of other tools; such statistics take no more
    features.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.n: int | None = 0
        self._device = device
        self._mean = torch.empty(0, dtype=torch.float64)
        self._scatter = torch.empty(0, 0, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ; with n unknown, covariance

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Self:
        """Those of features (N, D), on their device. Raises as `update`."""
        statistics = cls()
        for rows in as_features(features).split(BLOCK):
            statistics._add(rows)
        return statistics

    @property
    def width(self) -> int | None:
        """D; None before the first features."""
        return None if self.n == 0 else len(self._mean)

    @property
    def mean(self) -> Tensor:
        """(D,); raises `MezzotintError` before the first features."""
        self._need(1)
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D), divided by n − 1 and exactly symmetric; raises `MezzotintError` with fewer than 2 samples."""
        self._need(2)
        return (self._scatter + self._scatter.T) / (2 if self.n is None else 2 * (self.n - 1))

    def update(self, batch: Tensor | np.ndarray) -> None:
        """Add features (N, D) of any real type, N ≥ 1. Raises `MezzotintError` on those that `as_features` refuses."""
        self._add(as_features(batch))

    def merge(self, other: FeatureStatistics) -> None:
        """Add the features behind `other`; raises `MezzotintError` where widths differ or an n is unknown."""
        if other.n == 0:
            return
        total = self._grow(other.n, len(other._mean), other._mean.device)
        assert self.n is not None
        assert other.n is not None
        apart = other._mean.to(self._mean) - self._mean
        self._scatter += other._scatter.to(self._scatter)
        self._scatter.addr_(apart, apart, alpha=self.n * other.n / total)
        self._mean += apart * (other.n / total)
        self.n = total

    def all_reduce(self) -> FeatureStatistics:
        """The statistics of all processes' features, on each of them; just these where torch.distributed is not in use.

        A process may have none. Raises `MezzotintError`, on every process, where widths differ or an n is unknown.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        # nccl reduces on GPUs only, gloo everywhere; a process without features must join in, and know their width.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        none = -(2**62)
        widths = [none, none] if self.n == 0 else [len(self._mean), -len(self._mean)]
        agreed = torch.tensor([*widths, int(self.n is None)], device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        widest, narrowest, unknown = (value * sign for value, sign in zip(agreed.tolist(), (1, -1, 1), strict=True))
        total = FeatureStatistics(self._device)
        if widest == none:
            return total
        if unknown or widest != narrowest:
            reason = "some of unknown sample number" if unknown else f"features {narrowest} to {widest} wide"
            raise MezzotintError(f"the processes' statistics cannot be joined: {reason}; gather all in the same way")
        n = self.n or 0
        mean = (self._mean if n else torch.zeros(widest, dtype=torch.float64)).to(device)
        sums = torch.cat([torch.tensor([float(n)], dtype=torch.float64, device=device), n * mean])
        dist.all_reduce(sums)
        total.n = int(sums[0].item())
        total._mean = sums[1:] / sums[0]
        apart = mean - total._mean
        scatter = n * torch.outer(apart, apart)
        scatter += self._scatter.to(device) if n else 0
        dist.all_reduce(scatter)
        home = self._mean.device if n else self._device or device
        total._mean, total._scatter = total._mean.to(home), scatter.to(home)
        return total

    def to_arrays(self, suffix: str = "") -> dict[str, np.ndarray]:
        """mu (D,), sigma (D, D) and, where known, n: names that pytorch-fid, clean-fid and ADM read, plus `suffix`."""
        arrays = {f"mu{suffix}": self.mean.cpu().numpy(), f"sigma{suffix}": self.covariance.cpu().numpy()}
        return arrays if self.n is None else arrays | {f"n{suffix}": np.array(self.n)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray | Tensor], suffix: str = "") -> Self:
        """The statistics that `to_arrays` or another tool wrote; n may be missing.

        ADM keeps those of its spatial features (sFID) in the same file, under the suffix "_s". Raises
        `MezzotintError` where mu or sigma is missing or their shapes do not fit together.
        """
        names = [f"mu{suffix}", f"sigma{suffix}"]
        if not all(name in arrays for name in names):
            there = ", ".join(arrays) or "none"
            raise MezzotintError(f"statistics need arrays {' and '.join(names)}, but those given are: {there}")
        statistics = cls()
        mean, covariance = (torch.as_tensor(arrays[name]).detach().to(torch.float64) for name in names)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise MezzotintError(f"{names[0]} and {names[1]} must be shaped (D,) and (D, D) with one D, got {shapes}")
        statistics.n = int(arrays[f"n{suffix}"]) if f"n{suffix}" in arrays else None
        if statistics.n is not None and statistics.n < 2:
            raise MezzotintError(f"a covariance needs at least 2 samples, but n is {statistics.n}")
        statistics._mean = mean.clone()
        statistics._scatter = covariance * (1 if statistics.n is None else statistics.n - 1)
        return statistics

    def save(self, path: str | Path) -> None:
        """Write `to_arrays` as an .npz; an old file stays whole until the new one is."""
        arrays = self.to_arrays()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path, suffix: str = "") -> Self:
        """`from_arrays` of an .npz; raises `MezzotintError` where it is missing, damaged or holds something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls.from_arrays(arrays, suffix)
        except MezzotintError as error:
            raise MezzotintError(f"{path}: {error}") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise MezzotintError(f"cannot read statistics from {path}: {reason}; give an .npz with mu, sigma") from None
        except Exception:  # zipfile's and numpy's readers fail with a dozen unrelated types
            raise MezzotintError(f"{path} is no whole .npz; give a file that holds mu and sigma") from None

    def _add(self, batch: Tensor) -> None:
        total = self._grow(len(batch), batch.shape[1], batch.device)
        assert self.n is not None
        batch = batch.to(self._mean)
        mean = batch.mean(0)
        apart = mean - self._mean
        # The shift between the means is one more row of the same product: a pass over (D, D) less.
        rows = torch.cat([batch - mean, apart[None] * (self.n * len(batch) / total) ** 0.5])
        self._scatter.addmm_(rows.T, rows)
        self._mean += apart * (len(batch) / total)
        self.n = total

    def _grow(self, n: int | None, width: int, device: torch.device) -> int:
        """The sample number after `n` more of this `width`; makes the sums at the first."""
        if self.n is None or n is None:
            raise MezzotintError("statistics of an unknown number of samples take no more; gather the features anew")
        if self.n == 0:
            self._mean = torch.zeros(width, dtype=torch.float64, device=self._device or device)
            self._scatter = torch.zeros(width, width, dtype=torch.float64, device=self._device or device)
        elif width != len(self._mean):
            raise MezzotintError(
                f"features so far are {len(self._mean)} wide and these {width}; extract all in the same way"
            )
        return self.n + n

    def _need(self, n: int) -> None:
        if self.n is not None and self.n < n:
            raise MezzotintError(f"statistics hold {self.n} samples; at least {n} are needed")


def as_features(values: Tensor | np.ndarray, name: str = "features", *, at_least: int = 1) -> Tensor:
    """Detached float32 or float64 (N, D) of the same values, on their device; `name` is what errors call them.

    Raises `MezzotintError` unless they are 2-D, D ≥ 1, finite and N `at_least` so many.
    """
    features = (
        values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.require(values, requirements=("C", "W")))
    )
    if features.ndim != 2 or features.shape[1] < 1:
        raise MezzotintError(f"{name} must be 2-D (samples, width), got shape {tuple(features.shape)}")
    if len(features) < at_least:
        raise MezzotintError(f"{name} hold {len(features)} samples; at least {at_least} are needed")
    if features.dtype not in (torch.float32, torch.float64):  # halves fit into float32; integers may not
        features = features.to(torch.float32 if features.is_floating_point() else torch.float64)
    finite = features.isfinite().all(1)
    if not finite.all():
        bad = len(features) - int(finite.sum())
        raise MezzotintError(
            f"{name} contain NaN or infinite values in {bad} of {len(features)} rows; look at the images they came from"
        )
    return features


def feature_pair(real: Tensor | np.ndarray, fake: Tensor | np.ndarray, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Both sets as `as_features` gives them, (N, D) and (M, D), on the device of `real`.

    Raises `MezzotintError` unless both are such, equally wide and hold `at_least` samples each.
    """
    real = as_features(real, "real features", at_least=at_least)
    fake = as_features(fake, "fake features", at_least=at_least).to(real.device)
    same_width(real.shape[1], fake.shape[1])
    return real, fake


def same_width(real: int, fake: int) -> None:
    """Raises `MezzotintError` where the two differ."""
    if real != fake:
        raise MezzotintError(f"real features are {real} wide and fake ones {fake}; extract both in the same way")
