"""Many samples into one .npz: exactly those of `sample`, whatever was killed and however many processes there were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mezzotint
from mezzotint import archive
from mezzotint.archive import read_npz_images, sample_to_npz
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.files import write_text
from mezzotint.recipe import Recipe, override_recipe


def expected(pipeline: mezzotint.Pipeline, count: int, seed: int = 0) -> np.ndarray:
    return to_uint8(mezzotint.sample(pipeline, [3, 8], count, seed=seed)).permute(0, 2, 3, 1).numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for pixels that lay on the edge between two levels: other batches round otherwise."""
    apart = np.abs(a.astype(int) - b.astype(int))
    return bool(apart.max() <= 1 and (apart > 0).mean() < 0.01)


def test_layout(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    """ADM's: arr_0 uint8 (N, H, W, 3) and arr_1 labels, exactly N of them, readable without pickle."""
    path = sample_to_npz(pipeline, tmp_path / "s.npz", [3, 8], 23, batch_size=5)
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (23, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [3] * 12 + [8] * 11
    assert close(images, expected(pipeline, 23).repeat(3, -1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.npz.json"]
    some = read_npz_images(path, [0, 7, 22])
    assert np.array_equal(to_uint8(some).permute(0, 2, 3, 1).numpy(), images[[0, 7, 22]])
    note = json.loads((tmp_path / "s.npz.json").read_text())
    assert (note["count"], note["seed"], note["recipe"]["sampling"]["steps"]) == (23, 0, 3)


def test_unconditional_has_no_labels(tiny: Recipe, tmp_path: Path) -> None:
    plain = mezzotint.build(override_recipe(tiny, ["backbone.num_classes=0"]))
    with np.load(sample_to_npz(plain, tmp_path / "s.npz", None, 3)) as file:
        assert file.files == ["arr_0"]


def test_finished_is_left_alone(pipeline: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample_to_npz(pipeline, tmp_path / "s.npz", [3], 6)
    before = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(archive, "sample_batches", None)
    sample_to_npz(pipeline, path, [3], 6)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_share_the_parts(
    pipeline: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    """Whichever process is first; the first one waits for the others' parts."""

    def others(_: float) -> None:
        for rank in order:
            if rank:
                sample_to_npz(pipeline, path, [3, 8], 23, batch_size=4, rank=rank, world_size=3)

    path = tmp_path / "s.npz"
    monkeypatch.setattr(archive.time, "sleep", others)
    for rank in order:
        sample_to_npz(pipeline, path, [3, 8], 23, batch_size=4, rank=rank, world_size=3)
    assert close(np.load(path)["arr_0"], expected(pipeline, 23).repeat(3, -1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.npz.json"]


def test_a_killed_run_goes_on(pipeline: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another batch size and number of processes; what was drawn is kept."""
    drawn: list[int] = []
    original = archive.sample_batches

    def dying(pipeline, labels, indices, **options):  # type: ignore[no-untyped-def]
        if len(drawn) == 12 and not survives:
            raise KeyboardInterrupt
        drawn.extend(indices)
        return original(pipeline, labels, indices, **options)

    survives = False
    monkeypatch.setattr(archive, "sample_batches", dying)
    with pytest.raises(KeyboardInterrupt):
        sample_to_npz(pipeline, tmp_path / "s.npz", [3, 8], 30, batch_size=6)
    assert not (tmp_path / "s.npz").exists()
    survives = True
    for rank in (1, 0):
        sample_to_npz(pipeline, tmp_path / "s.npz", [3, 8], 30, batch_size=100, rank=rank, world_size=2)
    assert sorted(drawn) == list(range(30)), "each image once"
    assert close(np.load(tmp_path / "s.npz")["arr_0"], expected(pipeline, 30).repeat(3, -1))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"classes": [4]}, "labels"),
        ({"count": 31}, "count, labels"),
        ({"weights": 1}, "weights"),
    ],
)
def test_a_begun_run_is_not_mixed_with_another(
    pipeline: mezzotint.Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, int],
    word: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(archive.np, "savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sample_to_npz(pipeline, tmp_path / "s.npz", [3, 8], 30)
    if change.pop("weights", 0):
        with torch.no_grad():
            next(pipeline.denoiser.parameters()).add_(1)
    arguments = {"classes": [3, 8], "count": 30} | change
    with pytest.raises(MezzotintError, match=rf"s.npz.parts holds part of a run with other settings \({word}\)"):
        sample_to_npz(pipeline, tmp_path / "s.npz", **arguments)  # type: ignore[arg-type]


def test_torchrun_and_a_kill(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    """As a user does it: two processes by torchrun, killed as soon as one part is there, and the same command again."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(pipeline.recipe.to_yaml())
    mezzotint.pipeline.save_weights(pipeline.denoiser.backbone, run / "model.safetensors", {})
    npz = tmp_path / "s.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["mezzotint", "sample", str(run), "--classes", "3, 8", "--count", "60", "--batch-size", "4"]
    command += ["--npz", str(npz), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not list(tmp_path.glob("s.npz.parts/0*.npz")):
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert close(np.load(npz)["arr_0"], expected(pipeline, 60).repeat(3, -1))
    assert (run / "samples.png").is_file()
    assert not (tmp_path / "s.npz.parts").exists()


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_what_is_refused_leaves_nothing(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    """An SDE of one step means nothing here; the corrected command is not in its way."""
    path = tmp_path / "s.npz"
    wrong = override_recipe(pipeline.recipe, ["sampling=sde-sigma", "sampling.steps=1"])
    pipeline.recipe, right = wrong, pipeline.recipe
    with pytest.raises(MezzotintError, match="must be at least 2"):
        sample_to_npz(pipeline, path, [3], 4)
    assert list(tmp_path.iterdir()) == []
    pipeline.recipe = right
    sample_to_npz(pipeline, path, [3], 4)
    with pytest.raises(MezzotintError, match="is a folder; choose another place"):
        sample_to_npz(pipeline, tmp_path, [3], 4)


@pytest.mark.parametrize("killed_at", ["the file", "the note", "the parts"])
def test_a_kill_between_two_files(
    pipeline: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """Seed 0 is there, seed 1 is killed at some file: neither command ever takes the other's images for its own."""
    path = tmp_path / "s.npz"
    images = {}
    for seed in (1, 0):
        sample_to_npz(pipeline, path, [3, 8], 6, seed=seed)
        images[seed] = np.load(path)["arr_0"]

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def write(file: Path, text: str) -> None:
        if file.name == "s.npz.json":
            die()
        write_text(file, text)

    with monkeypatch.context() as patch:
        match killed_at:
            case "the file":
                patch.setattr(archive, "_join", die)
            case "the note":
                patch.setattr(archive, "write_text", write)
            case _:
                patch.setattr(archive.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            sample_to_npz(pipeline, path, [3, 8], 6, seed=1)
    if killed_at == "the file":  # the older run's images, which no note claims any more
        assert np.array_equal(np.load(path)["arr_0"], images[0])
    sample_to_npz(pipeline, path, [3, 8], 6, seed=1)
    assert np.array_equal(np.load(path)["arr_0"], images[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.npz.json"]
    sample_to_npz(pipeline, path, [3, 8], 6, seed=0)
    assert np.array_equal(np.load(path)["arr_0"], images[0])


def test_a_note_is_of_one_file(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    """Another .npz under the noted name, or a cut one, is drawn anew rather than handed over."""
    path = sample_to_npz(pipeline, tmp_path / "s.npz", [3], 4)
    whole = path.read_bytes()
    other = sample_to_npz(pipeline, tmp_path / "other.npz", [3], 4, seed=1)
    for content in (other.read_bytes(), whole[:-50], b""):
        path.write_bytes(content)
        sample_to_npz(pipeline, path, [3], 4)
        assert np.array_equal(np.load(path)["arr_0"], np.load(tmp_path / "s.npz")["arr_0"])
        assert len(path.read_bytes()) == len(whole)
        assert not np.array_equal(np.load(path)["arr_0"], np.load(other)["arr_0"])


def begun(pipeline: mezzotint.Pipeline, path: Path) -> Path:
    """The parts of a run that was killed before it joined them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sample_to_npz(pipeline, path, [3, 8], 6, batch_size=2)
    return path.with_name(path.name + ".parts")


def test_damaged_parts_are_drawn_again(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    parts = begun(pipeline, path)
    first, second, third = sorted(parts.glob("*.npz"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    np.save(third, np.array([{}, {}]), allow_pickle=True)
    sample_to_npz(pipeline, path, [3, 8], 6)
    assert close(np.load(path)["arr_0"], expected(pipeline, 6).repeat(3, -1))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_flipped_part_is_drawn_again(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    flip(sorted(begun(pipeline, path).glob("*.npz"))[1])
    sample_to_npz(pipeline, path, [3, 8], 6)
    assert close(np.load(path)["arr_0"], expected(pipeline, 6).repeat(3, -1))


def test_a_part_in_the_place_of_another_is_drawn_again(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    """It is whole, of the same run and of the same length, and its images are others."""
    path = tmp_path / "s.npz"
    first, second, _ = sorted(begun(pipeline, path).glob("*.npz"))
    first.write_bytes(second.read_bytes())
    sample_to_npz(pipeline, path, [3, 8], 6)
    assert close(np.load(path)["arr_0"], expected(pipeline, 6).repeat(3, -1))


def test_a_large_flipped_part_is_found_where_it_is_joined(tmp_path: Path) -> None:
    part, images = tmp_path / "000000000.npz", np.zeros((8, 64, 64, 3), np.uint8)
    np.savez(part, **{part.stem: images})
    archive._join([part], None, 8, tmp_path / "whole.npz")
    assert np.array_equal(np.load(tmp_path / "whole.npz")["arr_0"], images)
    flip(part)
    with pytest.raises(MezzotintError, match=r"000000000.npz was damaged .*CRC.* run the same command again"):
        archive._join([part], None, 8, tmp_path / "none.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["whole.npz"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"plan": 3}', '{"plan": {}, "part_size": "2"}', '{"plan": {}, "part_size": 0}']
)
def test_damaged_plans_are_one_sentence(pipeline: mezzotint.Pipeline, tmp_path: Path, text: str) -> None:
    parts = begun(pipeline, tmp_path / "s.npz")
    (parts / "plan.json").write_text(text)
    with pytest.raises(MezzotintError, match=r"plan.json is damaged; remove the folder .*s.npz.parts"):
        sample_to_npz(pipeline, tmp_path / "s.npz", [3, 8], 6)
