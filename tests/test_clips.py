"""Clips: a UNet and a DiT with frames, and Matryoshka networks of more frames outside than inside, from data to GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Command
from PIL import Image
from test_training import assert_same_weights, interrupt, metrics
from torch import Tensor

import mezzotint
from mezzotint.archive import sample_to_npz
from mezzotint.data import BatchOrder
from mezzotint.data.transforms import to_float
from mezzotint.errors import MezzotintError
from mezzotint.interop import convert
from mezzotint.objectives import Objective
from mezzotint.pipeline import sample_levels
from mezzotint.recipe import Recipe, load_recipe, override_recipe

UNET = "name: unet, channels: [8], resblocks: [1], attention: [0], temporal_attention: [1], middle: false, groups: 4"
OUTER = "outer: [{channels: [8, 8], resblocks: [1, 1], groups: 4, frame_ratio: 2, temporal_attention: [0, 1]}]"
DIT = "name: dit, patch_size: 4, width: 16, depth: 2"
NETWORKS = {
    "unet": UNET,
    "dit": DIT,
    "nested": f"{UNET}, {OUTER}",
    "nested-tubelets": f"{UNET}, tubelet_size: 2, {OUTER.replace('groups', 'tubelet_size: 4, groups')}",
    "nested-dit": f"{DIT}, tubelet_size: 2, {OUTER}",
}
SHORT = (
    "data={name: moving-digits, size: 16, frames: 4, examples: 20}",
    "training={steps: 2, batch_size: 2, ema_warmup: true, log_every: 1, checkpoint_every: 100}",
    "objective.times=auto",
    "sampling=ode-euler",
    "sampling.steps=2",
)


def recipe_of(network: str, *overrides: str) -> Recipe:
    return load_recipe(
        "digits", [*SHORT, "training.lr_schedule=constant", f"backbone={{{NETWORKS[network]}, heads: 2}}", *overrides]
    )


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two steps, with samples of it on the way."""
    folder = tmp_path_factory.mktemp(network) / "whole"
    mezzotint.train(recipe_of(network, "training.sample_every=2"), folder, quiet=True)
    return folder


def frames_of(path: Path) -> int:
    with Image.open(path) as picture:
        return getattr(picture, "n_frames", 1)


def test_trains_and_samples_clips(network: str, whole: Path) -> None:
    assert list(metrics(whole)) == [1, 2]
    assert frames_of(whole / "samples" / "step-00000002.gif") == 4
    pipeline = mezzotint.load(whole)
    clips = mezzotint.sample(pipeline, [3, 8], count=3)
    assert clips.shape == (3, 4, 1, 16, 16)
    assert clips.isfinite().all()
    torch.testing.assert_close(clips, mezzotint.sample(pipeline, [3, 8], count=3, batch_size=1), rtol=1e-4, atol=1e-4)
    if network.startswith("nested"):
        assert pipeline.denoiser.level_shapes == ((2, 1, 8, 8), (4, 1, 16, 16))
        low, high = sample_levels(pipeline, [3, 8], count=3)
        assert low.shape == (3, 2, 1, 8, 8)
        assert torch.equal(high, clips)
    else:
        assert pipeline.denoiser.in_shape == (4, 1, 16, 16)


def test_guided_clips(whole: Path) -> None:
    pipeline = mezzotint.load(whole)
    clips = mezzotint.sample(pipeline, [3], count=2, guidance=2, sampler="ddpm", steps=2)
    assert clips.shape == (2, 4, 1, 16, 16)
    with pytest.raises(MezzotintError, match=r"guidance\.channels means nothing for a pyramid or a clip"):
        mezzotint.sample(pipeline, [3], count=1, guidance=mezzotint.guidance.Guidance(channels=1))


def test_the_network_is_given_the_clips(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very clips of the data set; their low level is every second frame, averaged over 2 × 2 pixels."""
    seen: list[Tensor] = []
    forward = Objective.forward

    def note(objective: Objective, x: Tensor, y: Any, draw: Any) -> Any:
        seen.append(x)
        return forward(objective, x, y, draw)

    monkeypatch.setattr(Objective, "forward", note)
    recipe = recipe_of(network)
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    dataset = recipe.data.load("train")
    for step, x in enumerate(seen):
        clips = to_float(torch.stack([dataset[int(i)][0] for i in BatchOrder(20, 2, recipe.seed).indices(step)]))  # type: ignore[index]
        if not network.startswith("nested"):
            assert torch.equal(x, clips)
        else:
            low = torch.stack([F.avg_pool2d(clips[:, f], 2) for f in (0, 2)], dim=1)
            torch.testing.assert_close(x, torch.cat([low.flatten(1), clips.flatten(1)], dim=1))


def test_resume_ends_with_the_same_weights(network: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    recipe = recipe_of(network, "training.sample_every=2")
    interrupt(recipe, run, 1)
    mezzotint.train(recipe, run, resume=True, quiet=True)
    assert_same_weights(whole, run)


def test_stages_of_clips(tmp_path: Path) -> None:
    """Two frames at 8 pixels first, then four at 16, the data read ahead and validated."""
    recipe = recipe_of("nested", "training.stages=[{levels: 1, steps: 1}]", "training.validate_every=1")
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert list(metrics(tmp_path / "run", "loss/validation")) == [1, 2]


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_learned_variance_of_clips(network: str, tmp_path: Path) -> None:
    learned = ["variance=learned", "interpolant={name: ddpm, num_steps: 100}", "target=noise", "time_input=[1000, -1]"]
    recipe = recipe_of(network, *learned, "sampling={sampler: ddpm, steps: 2}")
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    pipeline = mezzotint.load(tmp_path / "run")
    x, t, y = torch.ones(2, *pipeline.denoiser.in_shape), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    prediction = pipeline.denoiser(x, t, y)
    both = pipeline.denoiser.backbone(x, 1000 * t - 1, y)
    assert prediction.variance is not None
    assert torch.equal(prediction.output, both[:, :, :1])
    assert torch.equal(prediction.variance, both[:, :, 1:])
    assert mezzotint.sample(pipeline, [3], count=2).isfinite().all()


def test_clips_stay_in_the_librarys_own_formats(network: str, whole: Path, tmp_path: Path) -> None:
    kind = "a Matryoshka network" if network.startswith("nested") else "a network of clips"
    for other in ("official", "diffusers"):
        with pytest.raises(MezzotintError, match=f"is {kind}, and the format '{other}' is for DiT and SiT"):
            convert(whole, tmp_path / other, to=other)
    assert not any(tmp_path.iterdir())


def test_clips_by_captions(tmp_path: Path) -> None:
    captions = ["condition={name: text, max_tokens: 6}", "guidance.scale=2"]
    recipe = override_recipe(recipe_of("nested"), captions)
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    pipeline = mezzotint.load(tmp_path / "run")
    assert pipeline.prompts == tuple("0123456789")
    assert mezzotint.sample(pipeline, prompts=["3", "8"], count=2, negative_prompt="5").shape == (2, 4, 1, 16, 16)


def test_clips_on_the_command_line(command: Command, whole: Path, tmp_path: Path) -> None:
    code, out, err = command("sample", whole, "--classes", "3, 8", "--count", 4)
    assert (code, out.split()) == (0, [str(whole / "samples.gif")]), err
    with Image.open(whole / "samples.gif") as picture:
        assert getattr(picture, "n_frames", 1) == 4
        assert picture.info["duration"] in (120, 130), "eight frames a second"
        assert picture.height == 2 * 50 + 2, "two classes, a row each"
        assert picture.width > picture.height, "two clips of each, and beside them its name"
    code, _, err = command("sample", whole, "--count", 2, "--fps", 20, "--out", tmp_path / "fast.gif")
    assert code == 0, err
    with Image.open(tmp_path / "fast.gif") as picture:
        assert picture.info["duration"] == 50
    for option in ("--npz", "--png", "--trajectory", "--levels"):
        code, _, err = command("sample", whole, option, tmp_path / "no")
        assert code == 2
        assert "clips are written by --out alone, as a .gif or an .mp4" in err
    code, _, err = command("sample", whole, "--count", 1, "--out", tmp_path / "clip.png")
    assert code == 2
    assert "videos are written as .gif or .mp4, not clip.png" in err
    assert not (tmp_path / "no").exists()
    with pytest.raises(MezzotintError, match=r"ADM's \.npz holds images, and this model draws clips"):
        sample_to_npz(mezzotint.load(whole), tmp_path / "s.npz", count=1)


@pytest.mark.parametrize(
    ("network", "overrides", "message"),
    [
        ("nested", ["data.frames=5"], r"frame_ratio makes 2 times as many frames as inside, which does not divide"),
        (
            "unet",
            ["backbone={name: diffussm, width: 16, depth: 1}"],
            "clips need a network with time, and diffussm has",
        ),
        ("nested", ["data={name: digits, size: 16, frames: 0, examples: 10000}"], "frame_ratio makes 2 times"),
        ("dit", ["backbone.tubelet_size=3"], "a tubelet of 3 must divide the network's 4 frames and its width of 16"),
        ("nested-dit", ["backbone.tubelet_size=4"], "a tubelet of 4 must divide the network's 2 frames"),
        (
            "dit",
            ["data.frames=0", "data.name=digits", "backbone.tubelet_size=2"],
            "a tubelet of 2 must divide the .* 0",
        ),
        ("unet", ["backbone.tubelet_size=3"], "a tubelet of 3 must divide the network's 4 frames and its width of 8"),
    ],
)
def test_networks_that_do_not_take_clips(network: str, overrides: list[str], message: str) -> None:
    with pytest.raises(MezzotintError, match=message) as raised:
        override_recipe(recipe_of(network), overrides)
    assert "\n" not in str(raised.value)
