"""Many samples into one .npz in ADM's layout: by any number of processes, resumable, never all of them in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.data.transforms import to_float
from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path, tensors_digest, write_text
from mezzotint.images import adm_pixels
from mezzotint.pipeline import Pipeline, choose_labels, listed, sample_batches
from mezzotint.progress import console

POLL_SECONDS = 1.0


def sample_to_npz(
    pipeline: Pipeline,
    path: str | Path,
    classes: Sequence[int | str] | None = None,
    count: int = 50_000,
    *,
    prompts: Sequence[str] | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    batch_size: int = 256,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Path:
    """Draw exactly `count` images, those of `sample`, into `path`: arr_0 uint8 (N, H, W, 3), arr_1 int64 labels (N,).

    Process `rank` of `world_size` draws every world_size-th part of about `batch_size` images into the folder
    PATH.parts, which all processes see; the first one waits for the rest and joins them. What is there already is not
    drawn again, so a killed run is continued by the same command, on any number of processes. PATH.json says what the
    file holds; where it says the same, nothing is done. Raises `MezzotintError` as `sample` does, and where PATH.parts
    is of other settings.
    """
    path = Path(path)
    if count < 1:
        raise MezzotintError(f"count must be at least 1, got {count}")
    if len(pipeline.denoiser.level_shapes[-1]) == 4:
        raise MezzotintError("ADM's .npz holds images, and this model draws clips; use sample and save_video")
    labels = choose_labels(pipeline, classes, count, prompts)
    plan = _plan(pipeline, listed(labels), negative_prompt, count, seed)
    note, parts = path.with_name(path.name + ".json"), path.with_name(path.name + ".parts")

    def finished() -> bool:
        return path.is_file() and _read(note) == plan

    if finished():
        return path
    size = _agree(parts, plan, batch_size)
    starts = range(0, count, size)
    for number, start in enumerate(starts[rank::world_size], 1):
        indices = range(start, min(start + size, count))
        part = parts / f"{start:09d}.npy"
        if part.is_file() or finished():
            continue
        drawn = list(
            sample_batches(
                pipeline,
                labels,
                indices,
                negative_prompt=negative_prompt,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
        )
        with atomic_path(part) as temporary, open(temporary, "wb") as file:
            np.save(file, adm_pixels(torch.cat(drawn)))
        if progress:
            console.print(f"part {number} of {len(starts[rank::world_size])} of this process is drawn")
    if rank == 0:
        files = [parts / f"{start:09d}.npy" for start in starts]
        while not all(file.is_file() for file in files):  # other processes are still at it
            time.sleep(POLL_SECONDS)
        _join(files, labels.numpy() if isinstance(labels, torch.Tensor) else None, count, path)
        write_text(note, json.dumps(plan, indent=2) + "\n")
        shutil.rmtree(parts, ignore_errors=True)
    return path


def _plan(
    pipeline: Pipeline, labels: list[int] | list[str] | None, negative_prompt: str, count: int, seed: int
) -> dict[str, Any]:
    """What the images are a function of, as JSON holds it."""
    recipe = pipeline.recipe.model_dump(mode="json", exclude={"training", "data", "objective", "description"})
    return {
        "count": count,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "labels": None if labels is None else hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16],
        "weights": tensors_digest(pipeline.denoiser.backbone.state_dict()),
        "recipe": json.loads(json.dumps(recipe)),
    }


def _agree(parts: Path, plan: dict[str, Any], batch_size: int) -> int:
    """The number of images in a part: that of the run that began it, if it is the same run."""
    file = parts / "plan.json"
    if not file.is_file():
        write_text(file, json.dumps({"part_size": batch_size, "plan": plan}, indent=2) + "\n")
    begun = _read(file) or {}
    if begun.get("plan") != plan:
        there = begun.get("plan", {})
        changed = ", ".join(key for key in plan if there.get(key) != plan[key])
        raise MezzotintError(
            f"{parts} holds part of a run with other settings ({changed}); go on with those, remove the folder, or "
            "choose another --npz"
        )
    return int(begun["part_size"])


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _join(files: Sequence[Path], labels: np.ndarray | None, count: int, path: Path) -> None:
    """Write the parts one after the other as arr_0, without holding more than one."""
    shape = (count, *np.load(files[0], mmap_mode="r").shape[1:])
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.load(file).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)


def read_npz_images(path: str | Path, indices: Sequence[int]) -> Tensor:
    """Images number `indices` of such a file, float32 (n, 3, H, W) in [-1, 1]; the others are not kept in memory."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        first, size = member.tell(), int(np.prod(shape[1:])) * dtype.itemsize
        images = []
        for index in indices:
            member.seek(first + index * size)
            images.append(np.frombuffer(member.read(size), dtype).reshape(shape[1:]))
    return to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
