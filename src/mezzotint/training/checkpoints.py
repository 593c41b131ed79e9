"""Training state on disk: written whole or not at all, pruned only once a newer one is whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mezzotint.errors import MezzotintError
from mezzotint.files import write_text
from mezzotint.training.parallel import World

logger = logging.getLogger("mezzotint")

MANIFEST = "manifest.json"


class Checkpoints:
    """The folder of a run's training states, one torch.distributed.checkpoint folder each, ``step-00001000``.

    A state is written beside its place and renamed into it with a manifest of its files' sizes, so a folder that has
    its name is whole unless someone cut it; one that was cut is passed over for the one before.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep

    def steps(self) -> list[int]:
        """Steps that have a state, oldest first, whole or not."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*") if path.is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int | None:
        """The newest step whose state is whole, or None."""
        for step in reversed(self.steps()):
            if self.is_whole(step):
                return step
            logger.warning("checkpoint %s is damaged; trying the one before it", self.path(step))
        return None

    def is_whole(self, step: int) -> bool:
        """Whether every file in the manifest is there in its full size."""
        path = self.path(step)
        try:
            sizes: dict[str, int] = json.loads((path / MANIFEST).read_text())
            return all((path / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError):
            return False

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `state` as this step's, then drop all but the newest `keep`. Every process calls it."""
        place, unfinished = self.path(step), self.folder / f".step-{step:08d}.tmp"
        failure = ""
        if self.world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.world.barrier()
        try:
            with _alone():
                save(state, checkpoint_id=unfinished, no_dist=self.world.size == 1)
            if self.world.is_main:
                self._finish(unfinished, place)
        except (OSError, MezzotintError, CheckpointException) as error:
            failure = " ".join(str(error).split())[:300]
        if self.world.any(bool(failure)):
            if self.world.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise MezzotintError(
                f"cannot write checkpoint {place}: {failure or 'another process failed'}; "
                "the checkpoints before it are as they were. Free some space and continue with --resume"
            )
        if self.world.is_main:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        self.world.barrier()

    def _finish(self, unfinished: Path, place: Path) -> None:
        files = [path for path in unfinished.iterdir() if path.is_file()]
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_text(unfinished / MANIFEST, json.dumps({path.name: path.stat().st_size for path in files}))
        if place.exists():  # a damaged one of the same step
            shutil.rmtree(place)
        os.rename(unfinished, place)

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fill the tensors of `state` from this step's files, in place."""
        with _alone():
            load(state, checkpoint_id=self.path(step), no_dist=self.world.size == 1)


@contextmanager
def _alone() -> Iterator[None]:
    # torch warns that a single process is a single process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
