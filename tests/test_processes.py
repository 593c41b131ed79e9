"""What ends a process, or keeps it from its place: a sentence and an exit code. And caches that cannot be written."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Command
from PIL import Image

import mezzotint as library
from mezzotint import files
from mezzotint.data.base import DecodedImages
from mezzotint.devices import check_device
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.classifier import trained_classifier
from mezzotint.evaluation.features import feature_network
from mezzotint.evaluation.probing import probe
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.files import cache_folder
from mezzotint.training.parallel import choose_device, rank_and_size, world

# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0"}, "the environment says RANK=0 and WORLD_SIZE="),
        ({"RANK": "3"}, "the environment says RANK=3 and WORLD_SIZE="),
        ({"WORLD_SIZE": "2"}, "the environment says RANK= and WORLD_SIZE=2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "the environment says RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "the environment says RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "the environment says RANK=first; expected a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "the environment says RANK=-1; expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "the 2 processes cannot meet .*MASTER_ADDR.*; start them by torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
            "the 2 processes cannot meet .*MASTER_PORT.*; start them by torchrun",
        ),
    ],
)
def test_a_place_among_processes_that_is_none(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RANK alone once made a process that trains and writes nothing; WORLD_SIZE alone one that waits for ever."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MezzotintError, match=sentence), world("cpu"):
        pass


def test_the_place_of_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_and_size() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank_and_size() == (0, 1)
    monkeypatch.setenv("RANK", "0")
    with world("cpu") as here:
        assert (here.rank, here.size) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert rank_and_size() == (3, 4)
    monkeypatch.setenv("LOCAL_RANK", "a")
    with pytest.raises(MezzotintError, match="LOCAL_RANK=a; expected a number"):
        choose_device("cuda")


@pytest.mark.parametrize(("local_rank", "asked"), [(None, "cuda"), (2, "cuda:2")])
def test_cuda_alone_is_the_current_gpu_or_the_process_s_own(
    local_rank: int | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch has it, for `mezzotint.load(run, device="cuda")` after torch.cuda.set_device(1)."""

    def empty(size: int, device: torch.device) -> SimpleNamespace:
        assert str(device) == asked
        return SimpleNamespace(device=torch.device("cuda", 1) if device.index is None else device)

    monkeypatch.setattr(torch, "empty", empty)
    assert check_device("cuda", local_rank) == torch.device("cuda", 1 if local_rank is None else local_rank)


def test_a_decoding_process_that_is_killed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        path = tmp_path / "photos" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
    here, load = os.getpid(), DecodedImages.__getitem__

    def dying(self: Any, index: int) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index)

    monkeypatch.setattr(DecodedImages, "__getitem__", dying)
    data = [f"data=folder:{tmp_path / 'photos'}", "data.workers=1", "training.batch_size=4"]
    result = command("train", "digits", *TINY, *data, "--out", tmp_path / "run", "--device", "cpu")
    assert result.code == 2
    assert "error: a process that decodes images ended (DataLoader worker" in result.err, result.err
    assert result.err.endswith("lower data.workers, and go on from the last checkpoint by 'mezzotint resume'.")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "the CPU is out of memory; lower training.batch_size"),
        (None, "the CPU is out of memory; lower training.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU is out of memory"),
        (RuntimeError("CUDA error: out of memory\nmore"), "the GPU is out of memory"),
        (RuntimeError("Could not determine home directory."), "a path begins with ~"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception | None, sentence: str
) -> None:
    def full(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("mezzotint.training.train", full)
    result = command("train", "digits")
    assert result.code == 2
    assert result.err.startswith(f"error: {sentence}"), result.err


def test_ctrl_c_anywhere_is_one_word(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mezzotint.interop.load", interrupted)
    result = command("sample", tmp_path)
    assert (result.code, result.err) == (130, "stopped")


@pytest.mark.parametrize(
    "package",
    ["signal.raise_signal(signal.SIGINT)", "try: signal.raise_signal(signal.SIGINT)\nexcept BaseException: 1 / 0"],
)
def test_ctrl_c_while_importing(tmp_path: Path, package: str) -> None:
    """A package that is imported before all others; one that turns the interruption into an error of its own."""
    (tmp_path / "typer.py").write_text(f"import signal\n{package}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job inherits none
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n"), done.stderr


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(params=["a file", "nobody's"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in a place where no folder can be made; a user without a home."""
    monkeypatch.setattr(files, "_warned_of", set())
    if request.param == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "file" / "cache"))
        return
    for name in ("MEZZOTINT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)


@pytest.mark.usefixtures("unwritable")
def test_what_cannot_be_kept_is_made_all_the_same(
    pipeline: library.Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.evaluation.classifier.MAX_EXAMPLES", 60)
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8))
    with caplog.at_level(logging.WARNING):
        assert reference_statistics(tmp_path / "a.npz", feature_network("pixels"), rows=2).count == 9
        assert trained_classifier("digits").fitted_on
        found = probe(pipeline, layers=["1"], times=[0.1], probes=["knn"], count=40)
    assert len(found["rows"]) == 1
    assert len([record for record in caplog.records if "is not kept: set MEZZOTINT_CACHE" in record.message]) == 1


@pytest.mark.usefixtures("unwritable")
def test_the_command_shows_what_it_found(command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8))
    out = tmp_path / "s.json"
    result = command("evaluate", tmp_path / "a.npz", tmp_path / "b.npz", "--features", "pixels", "--out", out)
    assert result.code == 0, result.err
    assert caplog.text.count("cannot write") == 1
    assert json.loads(out.read_text())["sets"]["samples"]["FD-pixels"] < 1e-6


def test_where_things_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", "/here")
    assert cache_folder() == Path("/here")
    monkeypatch.setenv("MEZZOTINT_CACHE", "~nobody-of-that-name/here")
    assert cache_folder() == Path(os.devnull) / "mezzotint"
    monkeypatch.delenv("MEZZOTINT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_folder() == Path("/there/mezzotint")
