"""A recipe's images encoded once into a folder of latents, for training with `data=latents:FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mezzotint.data import ImageDataset, ImageStream
from mezzotint.data.latents import SHARD_SIZE, SPLITS, encode_dataset
from mezzotint.data.splits import NoSuchSplit
from mezzotint.errors import MezzotintError
from mezzotint.locks import LOCK, locked
from mezzotint.recipe import Recipe, as_recipe
from mezzotint.representations import KLAutoencoder, Tokenizer, representation
from mezzotint.training.parallel import choose_device, rank_and_size


def encode(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
    batch_size: int = 32,
    device: str = "auto",
    progress: bool = True,
) -> Path:
    """Encode `recipe.data` by `recipe.representation` into the folder `out`; see `encode_dataset`. Returns the folder.

    splits: "train", "test"; None is train, and test where the data set has one. data.workers processes decode images.
    Started by torchrun, the processes share the files. Raises `MezzotintError` for a representation without an
    autoencoder, and as loading the data and `encode_dataset` do.
    """
    recipe = as_recipe(recipe)
    if recipe.representation.name == "pixels":
        raise MezzotintError(
            f"the representation {recipe.representation.name!r} has no latents to encode; set representation=kl and "
            "representation.path to an autoencoder, or use a tokenizer"
        )
    if splits is not None and not splits:
        raise MezzotintError("splits names no split; expected train, test or both")
    datasets: dict[str, ImageDataset | ImageStream] = {}
    for split in SPLITS if splits is None else splits:
        try:
            datasets[split] = recipe.data.load(split)
        except NoSuchSplit:
            if splits is not None or split == "train":
                raise
    # The processes never meet, so they are only counted, not joined: one may finish hours before another.
    rank, world_size = rank_and_size()
    settings = recipe.representation.model_dump(exclude={"fit"})
    autoencoder = representation(**settings, device=choose_device(device))
    assert isinstance(autoencoder, KLAutoencoder | Tokenizer)
    with locked(Path(out), f"{LOCK}-{rank}" if rank else LOCK):  # each of the processes may be the last one
        for split, dataset in datasets.items():
            encode_dataset(
                dataset,
                autoencoder,
                out,
                split,
                dtype=dtype,
                shard_size=shard_size,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                workers=recipe.data.workers,
                progress=progress and rank == 0,
            )
    return Path(out)
