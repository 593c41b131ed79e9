"""What noise in latents looks like, and what a network makes of it (l-DAE, figures 7 and 8).

>>> images = some_images(pipeline, 8)
>>> noisy, denoised = denoise(pipeline, images, 0.3)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.data.transforms import to_float
from mezzotint.denoiser import Prediction
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.sources import image_source
from mezzotint.features import check_time
from mezzotint.images import save_grid
from mezzotint.pipeline import Pipeline, check_images
from mezzotint.representations import PatchPCA, Tokenizer
from mezzotint.samplers import example_generators, randn

#: shown where nothing else is asked for
TIMES = (0.1, 0.3, 0.6)


def some_images(pipeline: Pipeline, count: int) -> Tensor:
    """`count` held-out images of the pipeline's data, (count, C, H, W) in [-1, 1]: training ones where none are."""
    if pipeline.recipe.data.frames:
        raise MezzotintError("the model's data are clips, and images are what is denoised here; name another model")
    source = image_source(pipeline.recipe.data, split="test", count=count)
    return to_float(torch.cat([images for images, _ in source.batches(256)]))


@torch.no_grad()
def denoise(pipeline: Pipeline, images: Tensor, t: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in [-1, 1] to x_t decoded, and to the clean data that the network predicts from it, decoded.

    Noise is added to x and not to images (l-DAE, figure 8); that of image i depends on (seed, i) alone. The condition
    is the null class, or the empty caption. Of a network that gives images it is the image itself, with what latents
    leave out. Both are (B, C, H, W) in [-1, 1], on the CPU. Raises `MezzotintError` for a t at which the network's
    output does not tell the data.
    """
    check_time(t)
    denoiser, space = pipeline.denoiser, pipeline.representation
    low, high = denoiser.time_range("data")
    if not low <= t <= high:
        raise MezzotintError(
            f"at t = {t:g} this model's {denoiser.target} does not tell the data; choose a t from {low:g} to {high:g}"
        )
    x = space.encode(images.to(pipeline.device))
    c = denoiser.interpolant.coefficients(t, x)
    x_t = c.alpha * x + c.sigma * _noise(x, seed)
    y = None
    if denoiser.text:
        y = pipeline.no_caption[torch.zeros(len(x), dtype=torch.int64, device=x.device)]
    found = check_images(network_image(pipeline, denoiser(x_t, t, y)), range(len(x)))
    return space.decode(x_t).float().cpu().clamp(-1, 1), found.float().cpu().clamp(-1, 1)


def network_image(pipeline: Pipeline, prediction: Prediction) -> Tensor:
    """The image (B, C, H, W) that the network predicts, not clamped where it is one of all components."""
    space = pipeline.representation
    if prediction.left_out is None or not isinstance(space, PatchPCA):
        return space.decode(prediction.data)
    known = prediction.data * space.latent_scale + space.latent_mean
    return space.from_coefficients(torch.cat([known, prediction.left_out * space.latent_scale], dim=1))


@torch.no_grad()
def compare_noise(pipeline: Pipeline, images: Tensor, t: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in [-1, 1] with noise in their pixels, and with noise in their latents (l-DAE, figure 7).

    In latents it is x + (σ/α)(t)·ε, decoded; in pixels it has the same mean square. Both are (B, C, H, W), on the CPU,
    clamped to [-1, 1]. Raises `MezzotintError` for a model whose x is no tokenizer's latents, and at α(t) = 0.
    """
    check_time(t)
    space = pipeline.representation
    if not isinstance(space, Tokenizer):
        raise MezzotintError(
            f"the model's representation is {pipeline.recipe.representation.name}; noise in latents is shown of "
            "patch-pca, patch-ae, patch-vae and conv-vae"
        )
    here = images.to(pipeline.device)
    x = space.encode(here)
    c = pipeline.denoiser.interpolant.coefficients(t, x)
    if not c.alpha > 0:
        raise MezzotintError(f"at t = {t:g} nothing is left of the data; choose a smaller t")
    clean = space.decode(x, clamp=False)
    noised = space.decode(x + c.sigma / c.alpha * _noise(x, seed), clamp=False)
    std = (noised - clean).square().mean().sqrt()
    in_pixels = here + std * _noise(here, seed)
    return in_pixels.float().cpu().clamp(-1, 1), noised.float().cpu().clamp(-1, 1)


def _noise(x: Tensor, seed: int) -> Tensor:
    return randn(x.shape, example_generators(seed, range(len(x))), device=x.device)


def save_denoised(
    pipeline: Pipeline, path: str | Path, *, times: Sequence[float] = TIMES, count: int = 8, seed: int = 0
) -> None:
    """Write a PNG: a column for each of `count` images, in rows clean, and for each time noisy and denoised."""
    _save_pairs(denoise, pipeline, path, times, count, seed)


def save_noise(
    pipeline: Pipeline, path: str | Path, *, times: Sequence[float] = TIMES, count: int = 8, seed: int = 0
) -> None:
    """Write a PNG: a column for each of `count` images, in rows clean, for each time noise in pixels and in x."""
    _save_pairs(compare_noise, pipeline, path, times, count, seed)


def _save_pairs(
    pair: Callable[..., tuple[Tensor, Tensor]],
    pipeline: Pipeline,
    path: str | Path,
    times: Sequence[float],
    count: int,
    seed: int,
) -> None:
    images = some_images(pipeline, count)
    rows = [images, *(row for t in times for row in pair(pipeline, images, t, seed=seed))]
    save_grid(torch.cat(rows), path, columns=count)
