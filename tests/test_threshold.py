"""Thresholding against the formula, and against models that need none."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import Mixture, exact_denoiser
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel
from mezzotint.interpolants import Pyramid, interpolant
from mezzotint.samplers import Sampler
from mezzotint.samplers.threshold import Thresholded, quantile


class Wild:
    """Predicts data far outside of the range: whatever noise is there, thrice."""

    learned_variance = False

    def __init__(self, path: object) -> None:
        self.interpolant = path


def wild(data: Tensor, path: object = None) -> Thresholded:
    thresholded = Thresholded(Wild(path or interpolant("cosine")), "dynamic", 0.9)  # type: ignore[arg-type]
    return thresholded


@pytest.mark.parametrize("q", [0.0, 0.25, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 12, 49])
def test_quantile(q: float, n: int) -> None:
    values = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    np.testing.assert_allclose(quantile(values, q), np.quantile(values.numpy(), q, axis=1), rtol=1e-12)


def test_dynamic_threshold_is_the_formula() -> None:
    """Each image by its own quantile; one within the range stays what it is."""
    data = 3 * torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data[1] = data[1].clamp(-0.9, 0.9)
    clipped = wild(data)._clipped(data)
    for image, got in zip(data.numpy(), clipped.numpy(), strict=True):
        s = max(1.0, np.quantile(np.abs(image), 0.9))
        np.testing.assert_allclose(got, np.clip(image, -s, s) / s, rtol=1e-12)
    assert torch.equal(clipped[1], data[1])


def test_dynamic_threshold_of_a_pyramid_is_that_of_each_level() -> None:
    path = Pyramid(interpolant("cosine"), [12, 48], [2, 4])
    data = 3 * torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    alone = [wild(data)._clipped(part) for part in (data[:, :12], data[:, 12:])]
    assert torch.equal(wild(data, path)._clipped(data), torch.cat(alone, dim=1))
    assert torch.equal(wild(data, path)._clipped(data[:, :12]), alone[0])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++", "ode-heun", "sde-sigma"])
@pytest.mark.parametrize("threshold", ["static", "dynamic"])
def test_within_the_range_nothing_changes(sampler: str, threshold: str) -> None:
    """Posterior means of data in ±0.6 are there, too: the same images, by whatever sampler."""
    data = Mixture([[[[0.6, -0.6]]], [[[-0.6, 0.2]]]], 1e-3, (0.5, 0.5))
    model = ConditionalModel(exact_denoiser(data, interpolant("cosine"), "v"))
    x = torch.randn(64, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = []
    for kind in ("none", threshold):
        settings = Sampler.parse({"sampler": sampler, "steps": 20, "threshold": kind})
        *_, end = settings.path(model, x, torch.Generator().manual_seed(2))
        ends.append(end)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_static_threshold_by_hand() -> None:
    """Three DDIM steps of a Gaussian wider than the range: the data are clipped, and the noise follows from them."""
    path = interpolant("cosine")
    model = ConditionalModel(exact_denoiser(Mixture([[[[0.5]]]], 2.0), path, "v"))
    x = torch.tensor([[[[2.5]]], [[[-1.5]]], [[[0.1]]]], dtype=torch.float64)
    sampler = Sampler.parse({"sampler": "ddim", "steps": 3, "threshold": "static"})
    times = sampler.times(model)
    expected = x
    for t, s in pairwise(times):
        (a, b), (c, d) = ((at.alpha.item(), at.sigma.item()) for at in map(path.at, torch.tensor([t, s]).double()))
        mean = 0.5 + a * 4 / (a**2 * 4 + b**2) * (expected - a * 0.5)  # E[x | x_t] of N(0.5, 2²)
        mean = mean.clamp(-1, 1)
        expected = c * mean + d * (expected - a * mean) / b
    *_, end = sampler.path(model, x, torch.Generator())
    torch.testing.assert_close(end, expected, rtol=1e-6, atol=1e-6)
    assert end.abs().max() <= 1


def test_bad_settings() -> None:
    with pytest.raises(MezzotintError, match=r"threshold = 'hard' is not valid"):
        Sampler.parse({"threshold": "hard"})
    with pytest.raises(MezzotintError, match=r"threshold_quantile = 0"):
        Sampler.parse({"threshold_quantile": 0})
