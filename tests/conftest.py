"""What the tests share: a recipe small enough to train in a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

import mezzotint
from mezzotint.cli import main
from mezzotint.recipe import Recipe, load_recipe, override_recipe

SHORT = (
    "training.steps=6",
    "training.batch_size=16",
    "training.warmup_steps=0",
    "training.lr_schedule=constant",
    "training.checkpoint_every=2",
    "training.log_every=2",
    "objective.times=auto",
    "sampling=ode-heun",
    "sampling.steps=3",
)
"""A run of a second."""
TINY = (
    "backbone.width=16",
    "backbone.depth=1",
    "backbone.heads=2",
    *SHORT,
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Before any other fixture: as many threads compute the same last bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Classifiers and references are made anew, and nothing of the user's is read or written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny() -> Recipe:
    """The digits recipe, on its real data, with a network of a few thousand weights."""
    return load_recipe("digits", TINY)


@pytest.fixture
def pipeline(tiny: Recipe) -> mezzotint.Pipeline:
    """Ten classes, weights that are not zero anywhere (a fresh DiT outputs zeros)."""
    made = mezzotint.build(override_recipe(tiny, ["backbone.num_classes=10"]), class_names=[*"0123456789"])
    generator = torch.Generator().manual_seed(0)
    for parameter in made.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


class Result(NamedTuple):
    """Of a command: its exit code, its output, and its errors on one line."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``mezzotint ARGUMENTS`` in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mezzotint", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return Result(int(stopped.value.code or 0), out, " ".join(err.split()))

    return run
