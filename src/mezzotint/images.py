"""Images out: grids, single PNGs, animations and ADM's .npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mezzotint.data.transforms import to_uint8
from mezzotint.files import atomic_path


def grid_image(images: Tensor, columns: int, *, min_side: int = 48) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] as one picture; tiny ones are enlarged, unsmoothed, to min_side pixels or more."""
    from torchvision.utils import make_grid  # seconds to import

    scale = max(1, -(-min_side // images.shape[-1]))
    pixels = to_uint8(images.cpu()).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(pixels, nrow=columns, padding=2, pad_value=128)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_grid(images: Tensor, path: str | Path, columns: int = 10) -> None:
    """Write `grid_image` as a PNG."""
    with atomic_path(path) as temporary:
        grid_image(images, columns).save(temporary, format="PNG")


def save_pngs(images: Tensor, folder: str | Path, *, first: int = 0) -> None:
    """Write each image (N, C, H, W) in [-1, 1] as folder/000000.png, folder/000001.png, ..., counting from `first`."""
    for i, pixels in enumerate(to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy(), first):
        with atomic_path(Path(folder) / f"{i:06d}.png") as temporary:
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, format="PNG")


def adm_pixels(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as ADM's arr_0: uint8 (N, H, W, 3), grey ones repeated."""
    return to_uint8(images.cpu()).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()


def save_npz(images: Tensor, labels: Tensor | None, path: str | Path) -> None:
    """Write ADM's .npz: arr_0 uint8 (N, H, W, 3), and arr_1 int64 labels (N,) where there are any."""
    arrays = [adm_pixels(images)]
    if labels is not None:
        arrays.append(labels.cpu().numpy())
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *arrays)


def save_animation(trajectory: Tensor, path: str | Path, columns: int = 10, *, milliseconds: int = 80) -> None:
    """Write states (S, N, C, H, W) in [-1, 1] as a GIF of S grids, holding the last one for a second."""
    frames = [grid_image(state, columns) for state in trajectory]
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    with atomic_path(path) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
