"""References: statistics and features of real images, computed once and kept, or read from a file.

    $MEZZOTINT_CACHE/                          else ~/.cache/mezzotint/
      classifiers/IDENTITY-seed-S-KEY.safetensors
      references/IDENTITY-KEY.npz              KEY: 16 digits over the source's identity and the network's name

A reference's .npz holds mu, sigma, n of the features; mu_s, sigma_s, n_s of spatial features; rows and indices of the
features that were kept; and the names network and source. Other tools read mu and sigma; ADM's names are these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint import data
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import FeatureNetwork, extract, is_inception
from mezzotint.evaluation.sources import ImageSource, image_source, of_first
from mezzotint.evaluation.statistics import FeatureStatistics
from mezzotint.files import atomic_path, cache_folder, keep, tensors_digest
from mezzotint.finite import check_finite
from mezzotint.recipe import DataSettings

#: raise whenever the content of a reference changes for the same images and network
VERSION = 1
#: suffixes of the statistics' names in a file, ADM's
SUFFIXES = {"features": "", "spatial": "_s"}


@dataclass(frozen=True)
class Reference:
    """Real images as a feature network sees them."""

    network: str
    """The network's name."""
    source: str
    """The identity of the images; of a file of statistics, its name and a digest of them."""
    statistics: dict[str, FeatureStatistics]
    """Of "features", and of "spatial" where the network has them."""
    rows: Tensor
    """Features float32 (n, D) of the images `indices`, on the CPU."""
    indices: Tensor
    """int64 (n,), in random order: the first ones are a fair sample, and always the same."""

    @property
    def count(self) -> int | None:
        """How many images the statistics are of; None where a file does not say."""
        return self.statistics["features"].n

    def save(self, path: str | Path) -> None:
        """Write an .npz, whole or not at all."""
        arrays = {"network": np.array(self.network), "source": np.array(self.source)}
        arrays |= {"rows": self.rows.numpy(), "indices": self.indices.numpy()}
        for key, statistics in self.statistics.items():
            arrays |= statistics.to_arrays(SUFFIXES[key])
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """What `save` wrote. Raises `MezzotintError` where it is damaged or something else."""
        with _reading(path) as arrays:
            if "network" not in arrays or "rows" not in arrays:
                raise MezzotintError(f"{path} does not say by which network it was made; expected a saved reference")
            rows, indices = torch.from_numpy(arrays["rows"]), torch.from_numpy(arrays["indices"])
            statistics = _statistics(arrays, path)
            if rows.ndim != 2 or rows.shape[1] != statistics["features"].width or indices.shape != rows.shape[:1]:
                raise MezzotintError(f"{path} keeps features of another shape than its statistics; make it anew")
            check_finite({"rows": rows}, str(path))
            return cls(str(arrays["network"]), str(arrays["source"]), statistics, rows, indices)


def reference_statistics(
    source: ImageSource | DataSettings | data.ImageDataset | str | Path,
    network: FeatureNetwork,
    *,
    rows: int = 0,
    batch_size: int = 64,
    cache: bool = True,
    progress: bool = False,
    **options: Any,
) -> Reference:
    """The statistics of `source`, and the features of up to `rows` of its images, as `network` sees them.

    source and options (count, split, …) are those of `image_source`. What was computed is kept under `cache_folder` by
    the identity of the images and the network's name, unless either is a function, which may change behind its name. An
    .npz may also hold statistics instead of, or beside, the images:

    - Our own (`Reference.save`), which must be of the same network.
    - ADM's reference batches: mu, sigma and, for sFID, mu_s, sigma_s, of all images of the data set, whereas arr_0
      holds 10,000 for precision and recall. They do not say so, but are of inception, so only inception takes them;
      rows are of arr_0. Other networks see arr_0 alone.

    Raises `MezzotintError` for statistics of another network or without the images that are needed, and as
    `image_source` and `extract` do.
    """
    if rows < 0:
        raise MezzotintError(f"rows must be at least 0, got {rows}")
    known: dict[str, FeatureStatistics] = {}
    named = ""
    if isinstance(source, str | Path) and Path(source).suffix == ".npz" and Path(source).expanduser().is_file():
        path = Path(source).expanduser()
        with _reading(path) as arrays:
            names = set(arrays)
            if "network" in names:
                return _saved(path, str(arrays["network"]), network, rows)
            if "mu" in names and is_inception(network.name):
                known = _statistics(arrays, path)
        named = f"{path.name} ({_digest(known)})"
        if known and not rows:
            return Reference(network.name, named, known, torch.empty(0, network.dim or 0), torch.empty(0).long())
        if "mu" in names and "arr_0" not in names:
            needed = f"{rows} rows of features" if known else f"the network {network.name!r}"
            raise MezzotintError(
                f"{path} holds statistics of inception alone, and no images, which {needed} would need; give an .npz "
                "with arr_0, or the images"
            )
    images = image_source(source, **options)
    reference = _cached(images, network, rows, batch_size, cache, progress)
    return replace(reference, statistics=known, source=named) if known else reference


def _cached(
    source: ImageSource, network: FeatureNetwork, rows: int, batch_size: int, cache: bool, progress: bool
) -> Reference:
    """From the cache where it is there with enough rows, else computed and kept."""
    cache = cache and source.cacheable and network.cacheable
    key = hashlib.sha256(json.dumps([source.identity, network.name, VERSION]).encode()).hexdigest()[:16]
    file = cache_folder() / "references" / f"{source.identity}-{key}.npz"
    enough = rows if source.count is None else min(rows, source.count)

    def kept() -> Reference | None:
        try:
            reference = Reference.load(file) if cache else None
        except MezzotintError:
            return None  # not there, or cut off; it is made anew
        return reference if reference is not None and len(reference.rows) >= enough else None

    reference = of_first(kept)  # one process looks, so that all of them agree on what to do
    if reference is None:
        found = extract(source, network, batch_size=batch_size, keep_rows=rows, progress=progress)
        reference = Reference(network.name, source.identity, found.statistics, found.rows, found.indices)
        if cache:
            made = reference
            of_first(lambda: keep(file, made.save))
    return replace(reference, rows=reference.rows[:rows], indices=reference.indices[:rows])


def _digest(known: Mapping[str, FeatureStatistics]) -> str:
    """8 hexadecimal digits over statistics that were read from a file."""
    arrays = {f"{key} {what}": getattr(known[key], what) for key in known for what in ("mean", "covariance")}
    return tensors_digest(arrays)


def _saved(path: Path, name: str, network: FeatureNetwork, rows: int) -> Reference:
    """Our own file."""
    if name != network.name:
        raise MezzotintError(
            f"{path} holds statistics of the network {name!r}, not of {network.name!r}; choose that network, or give "
            "the images themselves"
        )
    reference = Reference.load(path)
    if len(reference.rows) < min(rows, reference.count or rows):
        raise MezzotintError(
            f"{path} keeps the features of {len(reference.rows)} images, fewer than the {rows} needed; give the "
            "images, or lower the number"
        )
    return replace(reference, rows=reference.rows[:rows], indices=reference.indices[:rows])


@contextmanager
def _reading(path: str | Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz, each read when asked for, nothing unpickled; damage raises `MezzotintError`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise MezzotintError(f"{path} is one array, not an .npz of several; expected what np.savez writes")
            yield arrays
    except OSError as error:
        raise MezzotintError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except MezzotintError:
        raise
    except Exception as error:  # zipfile's and numpy's readers fail with a dozen unrelated types
        raise MezzotintError(f"{path} is no whole .npz of plain arrays ({error}); copy it again") from None


def _statistics(arrays: Mapping[str, np.ndarray], path: str | Path) -> dict[str, FeatureStatistics]:
    try:
        return {
            key: FeatureStatistics.from_arrays(arrays, suffix)
            for key, suffix in SUFFIXES.items()
            if f"mu{suffix}" in arrays or key == "features"
        }
    except MezzotintError as error:
        raise MezzotintError(f"{path}: {error}") from None
