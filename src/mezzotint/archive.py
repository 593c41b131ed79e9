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

from mezzotint.conditions.classes import Classes
from mezzotint.data.transforms import to_float
from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path, parse_json, write_text
from mezzotint.images import adm_pixels
from mezzotint.pipeline import Pipeline, choose_labels, listed, sample_batches
from mezzotint.progress import console

POLL_SECONDS = 1.0
PLAN = "plan.json"


def sample_to_npz(
    pipeline: Pipeline,
    path: str | Path,
    classes: Classes | None = None,
    count: int = 50_000,
    *,
    prompts: str | Sequence[str] | None = None,
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
    file holds, with the file's checksums; where it says the same, nothing is done. Nothing is written before the first
    images are drawn. Raises `MezzotintError` as `sample` does, and where PATH.parts is of other settings or PATH a
    folder.
    """
    path = Path(path)
    if len(pipeline.denoiser.level_shapes[-1]) == 4:
        raise MezzotintError("ADM's .npz holds images, and this model draws clips; use sample and save_video")
    if path.is_dir():
        raise MezzotintError(f"{path} is a folder; choose another place for the .npz, or remove it first")
    labels = choose_labels(pipeline, classes, count, prompts)
    plan = _plan(pipeline, listed(labels), negative_prompt, count, seed)
    note, parts = path.with_name(path.name + ".json"), path.with_name(path.name + ".parts")

    def finished() -> bool:
        checksums = _checksums(path)
        return checksums is not None and _read(note) == plan | checksums

    def draw(start: int, stop: int) -> np.ndarray:
        drawn = sample_batches(
            pipeline,
            labels,
            range(start, stop),
            negative_prompt=negative_prompt,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        return adm_pixels(torch.cat(list(drawn)))

    if finished():
        if rank == 0 and (_read(parts / PLAN) or {}).get("plan") == plan:  # killed before they were removed
            shutil.rmtree(parts, ignore_errors=True)
        return path
    size, start = _begun(parts, plan), rank * batch_size
    ready: dict[int, np.ndarray] = {}
    if size is None:  # what is refused, or too large for the memory, is so before anything is written
        if start >= count:
            return path
        ready[start] = draw(start, min(start + batch_size, count))
        write_text(parts / PLAN, json.dumps({"part_size": batch_size, "plan": plan}, indent=2) + "\n")
        size = batch_size
    files = {start: parts / f"{start:09d}.npz" for start in range(0, count, size)}
    lengths = {start: min(size, count - start) for start in files}
    mine = list(files)[rank::world_size]
    for number, start in enumerate(mine, 1):
        if _is_whole(files[start], lengths[start]) or finished():
            continue
        pixels = ready.pop(start) if start in ready else draw(start, start + lengths[start])
        with atomic_path(files[start]) as temporary, open(temporary, "wb") as file:
            # A zip has a CRC-32 of what is in it; the name says which part it is.
            np.savez(file, **{files[start].stem: pixels})  # type: ignore[arg-type]
        if progress:
            console.print(f"part {number} of {len(mine)} of this process is drawn")
    if rank == 0:
        while not all(_is_whole(files[start], lengths[start]) for start in files):  # other processes are still at it
            time.sleep(POLL_SECONDS)
        note.unlink(missing_ok=True)  # it is of the file that is replaced now
        _join(list(files.values()), labels.numpy() if isinstance(labels, torch.Tensor) else None, count, path)
        write_text(note, json.dumps(plan | (_checksums(path) or {}), indent=2) + "\n")
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
        **pipeline.digests,
        "recipe": json.loads(json.dumps(recipe)),
    }


def _begun(parts: Path, plan: dict[str, Any]) -> int | None:
    """The number of images in a part of the run that began these, if it is the same run; None where none did."""
    file = parts / PLAN
    if not file.is_file():
        return None
    begun = _read(file) or {}
    there, size = begun.get("plan"), begun.get("part_size")
    if not isinstance(there, dict) or type(size) is not int or size < 1:
        raise MezzotintError(f"{file} is damaged; remove the folder {parts}, and the images are drawn anew")
    if there != plan:
        changed = ", ".join(key for key in plan if there.get(key) != plan[key])
        raise MezzotintError(
            f"{parts} holds part of a run with other settings ({changed}); go on with those, remove the folder, or "
            "choose another --npz"
        )
    return size


def _is_whole(part: Path, count: int) -> bool:
    """Whether the part is there, `count` images in their full length; one that is not is drawn again."""
    try:
        with zipfile.ZipFile(part) as archive, archive.open(f"{part.stem}.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile):
        return False
    return dtype == np.uint8 and len(shape) == 4 and shape[0] == count


def _pixels(part: Path) -> np.ndarray:
    """A part's images. Raises `MezzotintError` for one that is damaged, and removes it: it is then drawn again."""
    try:
        with np.load(part, allow_pickle=False) as archive:
            images: np.ndarray = archive[part.stem]
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        part.unlink(missing_ok=True)
        raise MezzotintError(
            f"{part} was damaged ({error}) and is removed; run the same command again, which draws its images anew"
        ) from None
    return images


def _checksums(path: Path) -> dict[str, Any] | None:
    """The length and checksum of each array, which the archive's directory has; None where it is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"arrays": {info.filename: [info.file_size, info.CRC] for info in archive.infolist()}}
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _join(files: Sequence[Path], labels: np.ndarray | None, count: int, path: Path) -> None:
    """Write the parts one after the other as arr_0, without holding more than one."""
    shape = (count, *_pixels(files[0]).shape[1:])
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(_pixels(file).tobytes())
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
