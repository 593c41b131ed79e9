"""Matryoshka networks in the loop: stages one after the other, and nothing lost when one of them stops."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file
from test_training import ALONE, assert_same_weights, interrupt, metrics, weights
from torch import Tensor

import mezzotint
from mezzotint.backbones.nested import unpack
from mezzotint.data import BatchOrder, digits, iterate_batches
from mezzotint.errors import MezzotintError
from mezzotint.objectives import Draw, Objective
from mezzotint.randomness import generator_for, mix
from mezzotint.recipe import Recipe, load_recipe, override_recipe
from mezzotint.training import loop
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.ema import EMA

INNER = "name: unet, channels: [8, 8], resblocks: [1, 1], attention: [0, 1], middle: false, heads: 2, groups: 4"
OUTER = "{channels: [8, 8], resblocks: [1, 1], groups: 4}"
STAGES = "training.stages=[{levels: 1, steps: 3, batch_size: 6, lr: 2e-3}]"
SHORT = (
    "training.steps=6",
    "training.batch_size=4",
    "training.warmup_steps=0",
    "training.lr=1e-3",
    "training.lr_schedule=constant",
    "training.weight_decay=0.1",
    "training.checkpoint_every=100",  # one costs more than all six steps
    "training.log_every=1",
    "objective.times=auto",
    "interpolant={name: cosine, num_steps: 20}",
    "target=v",
    "time_input=[20, -1]",
    "sampling=ddim",
    "sampling.steps=2",
)
NESTED = ("data.size=16", f"backbone={{{INNER}, outer: [{OUTER}]}}", *SHORT)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Digits at 8 and 16 pixels: three steps at 8 alone, then three of both."""
    return load_recipe("digits", [*NESTED, STAGES])


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("stages") / "whole"
    mezzotint.train(recipe, folder, quiet=True)
    return folder


def outer_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("inner.")}


# ------------------------------------------------------------------------------------------------- what it computes


def test_stages_follow_each_other(whole: Path, recipe: Recipe) -> None:
    assert list(metrics(whole)) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(whole, "lr").values()) == [2e-3] * 3 + [1e-3] * 3
    assert mezzotint.load_recipe(whole).training.stages == recipe.training.stages
    pipeline = mezzotint.load(whole)
    assert mezzotint.sample(pipeline, count=3).shape == (3, 1, 16, 16)
    small, large = mezzotint.pipeline.sample_levels(pipeline, count=3)
    assert (small.shape, large.shape) == ((3, 1, 8, 8), (3, 1, 16, 16))
    assert torch.equal(large, mezzotint.sample(pipeline, count=3))
    with pytest.raises(MezzotintError, match="this model has one resolution, 8"):
        mezzotint.pipeline.sample_levels(mezzotint.build(load_recipe("digits", ["backbone.num_classes=10"])))


def test_a_stage_of_low_resolution_leaves_the_outer_network_alone(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it has moved by its end, weight decay or not, and the inner network has; then all of it moves."""
    seen: dict[int, dict[str, Tensor]] = {}
    update = EMA.update

    def remember(ema: EMA[Any], module: Any, step: int) -> None:
        update(ema, module, step)
        seen[step] = {name: value.clone() for name, value in module.backbone.state_dict().items()}

    monkeypatch.setattr(EMA, "update", remember)
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    fresh = mezzotint.build(mezzotint.load_recipe(whole)).denoiser.backbone.state_dict()
    for name, value in outer_part(fresh).items():
        assert torch.equal(seen[3][name], value), name
    assert not torch.equal(seen[3]["inner.conv_in.weight"], fresh["inner.conv_in.weight"])
    moved = [not torch.equal(seen[6][name], seen[3][name]) for name in outer_part(fresh)]
    assert all(moved)


def test_the_low_resolution_is_trained_as_a_plain_unet_is(recipe: Recipe, tmp_path: Path) -> None:
    """The losses of stage 1, written out for a UNet of the same first weights on averaged digits and the same draws."""
    fresh = mezzotint.build(override_recipe(recipe, ["backbone.num_classes=10"]))
    plain = mezzotint.build(load_recipe("digits", [*SHORT, f"backbone={{{INNER}, num_classes: 10}}", "data.size=8"]))
    plain.denoiser.backbone.load_state_dict(fresh.denoiser.backbone.inner.state_dict())  # type: ignore[union-attr]
    backbone, path = plain.denoiser.backbone.train(), plain.denoiser.interpolant
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=2e-3, weight_decay=0.1)
    order = BatchOrder(len(digits("train")), 6, recipe.seed)
    losses = []
    for step, batch in enumerate(iterate_batches(digits("train", 16), order, start_step=0, stop_step=3)):
        generator = generator_for(recipe.seed, loop.TRAINING, step)
        torch.rand(6, generator=generator)  # flips
        t = ((torch.rand(6, generator=generator) * 20).floor() + 1) / 20
        eps = torch.randn(6, 64 + 256, generator=generator)[:, :64].reshape(6, 1, 8, 8)
        dropped = torch.rand(6, generator=generator) < 0.1
        assert batch.labels is not None
        y = torch.where(dropped, 10, batch.labels)
        x = batch.images.reshape(6, 1, 8, 2, 8, 2).mean((3, 5))
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in path.at(t)[:2])
        output = backbone(alpha * x + sigma * eps, 20 * t - 1, y)
        loss = (output - (alpha * eps - sigma * x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    stop_early = override_recipe(recipe, ["training.steps=4", "training.ema=[]"])
    trained = mezzotint.train(stop_early, tmp_path / "run", quiet=True)
    assert list(metrics(tmp_path / "run").values())[:3] == pytest.approx(losses, rel=1e-4)
    assert trained.denoiser.level_shapes == ((1, 8, 8), (1, 16, 16))


def test_growing_keeps_what_the_low_resolution_says(whole: Path, recipe: Recipe, tmp_path: Path) -> None:
    """At the end of stage 1 the low level of the whole network is the inner network by itself, to the bit."""
    first = override_recipe(recipe, ["training.steps=4", "training.ema=[]"])
    update = EMA.update
    outputs: list[tuple[Tensor, Tensor]] = []

    def look(ema: EMA[Any], module: Any, step: int) -> None:
        update(ema, module, step)
        if step == 3:
            x = torch.randn(2, 64 + 256, generator=torch.Generator().manual_seed(0))
            y, t = torch.tensor([3, 10]), torch.tensor([4.0, 17.0])
            with torch.no_grad():
                together = unpack(module.backbone(x, t, y), module.level_shapes)[0]
                alone = module.backbone.inner(x[:, :64].reshape(2, 1, 8, 8), t, y)
            outputs.append((together, alone))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMA, "update", look)
        mezzotint.train(first, tmp_path / "run", quiet=True)
    ((together, alone),) = outputs
    assert torch.equal(together, alone)
    assert alone.abs().max() > 0, "it has learned something"


def test_every_stage_has_its_own_batches_and_schedule(recipe: Recipe, tmp_path: Path) -> None:
    """Three stages, three levels; cosine and linear decays and warm-up run over a stage's own steps."""
    stages = (
        "training.stages=[{levels: 1, steps: 4, batch_size: 6, lr: 4e-3, lr_schedule: linear},"
        "{levels: 2, steps: 2, warmup_steps: 2, lr_schedule: constant}]"
    )
    three = override_recipe(
        recipe,
        [
            "data.size=32",
            f"backbone.outer=[{OUTER}, {OUTER}]",
            stages,
            "training.steps=10",
            "training.lr_schedule=cosine",
        ],
    )
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        to_device = loop.to_device

        def count(batch: Any, *rest: Any) -> Any:
            seen.append(len(batch.images))
            return to_device(batch, *rest)

        patch.setattr(loop, "to_device", count)
        mezzotint.train(three, tmp_path / "run", quiet=True)
    assert seen == [6] * 4 + [4] * 6
    expected = [4e-3 * (1 - k / 4) for k in range(4)] + [0.5e-3, 1e-3]
    expected += [0.5e-3 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert list(metrics(tmp_path / "run", "lr").values()) == pytest.approx(expected)


def test_a_stage_has_its_own_times(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near t = 1 in the first stage, of logit t = 6; on the schedule's twenty steps after it."""
    seen: list[Tensor] = []
    forward = Objective.forward

    def note(objective: Objective, x: Tensor, y: Any, draw: Draw) -> Any:
        seen.append(draw.t)
        return forward(objective, x, y, draw)

    monkeypatch.setattr(Objective, "forward", note)
    stages = "training.stages=[{levels: 1, steps: 3, times: logit-normal, time_mean: 6, time_std: 0.01}]"
    mezzotint.train(override_recipe(recipe, [stages]), tmp_path / "run", quiet=True)
    first, then = torch.cat(seen[:3]), torch.cat(seen[3:])
    torch.testing.assert_close(first.logit(), torch.full_like(first, 6), rtol=0, atol=0.1)
    assert len(first) == len(then) == 12
    torch.testing.assert_close(20 * then, (20 * then).round())
    assert then.min() < 0.7


def test_a_later_stage_has_an_order_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    """Stage k goes through the data by the seed mixed with k; the first one as a run without stages does."""
    seen: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        to_device = loop.to_device

        def note(batch: Any, *rest: Any) -> Any:
            seen.append(batch.indices.tolist())
            return to_device(batch, *rest)

        patch.setattr(loop, "to_device", note)
        mezzotint.train(recipe, tmp_path / "run", quiet=True)
    first, second = BatchOrder(898, 6, recipe.seed), BatchOrder(898, 4, mix(recipe.seed, 1))
    expected = [first.indices(k).tolist() for k in range(3)] + [second.indices(k).tolist() for k in range(3)]
    assert seen == expected


def noting(step: Any, rates: list[list[float]]) -> Any:
    """AdamW's step, which notes the learning rates of its groups."""

    def noted(optimizer: torch.optim.AdamW) -> None:
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    return noted


def test_state_space_parameters_follow_the_stages_rate(recipe: Recipe, tmp_path: Path) -> None:
    """Without a rate of their own they have that of all others, a stage's, too; with one, that in every stage."""
    inside = "name: diffussm, width: 16, depth: 1, hourglass: 1, state: 4, patch_size: 1, conditioning: adaln-zero"
    options = [f"backbone={{{inside}, outer: [{OUTER}]}}", "data.size=16"]
    base = load_recipe("digits", [*options, *SHORT, STAGES, "training.steps=4"])
    for number, (override, expected) in enumerate(
        (
            ("training.ssm_lr=null", [[2e-3, 2e-3]] * 3 + [[1e-3, 1e-3]]),
            ("training.ssm_lr=5e-4", [[2e-3, 5e-4]] * 3 + [[1e-3, 5e-4]]),
        )
    ):
        rates: list[list[float]] = []
        with pytest.MonkeyPatch.context() as patch:
            step = torch.optim.AdamW.step
            patch.setattr(torch.optim.AdamW, "step", noting(step, rates))
            mezzotint.train(override_recipe(base, [override]), tmp_path / str(number), quiet=True)
        assert rates == [pytest.approx(pair) for pair in expected]


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.level_weights=[4, 1]", "objective.level_shares=[1, 0.5]", "training.accumulate=2"],
        ["objective.weighting=noise", "interpolant.snr_power=2", "training.validate_every=2"],
        ["training.precision=bf16", "training.stages=[{levels: 1, steps: 1}, {levels: 2, steps: 1}]"],
        ["interpolant=linear", "target=velocity", "time_input=[1000, 0]", "training.sample_every=3", "data.flip=true"],
        ["backbone={name: dit, width: 16, depth: 1, heads: 2, patch_size: 2}"],
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)
def test_every_word_trains_and_samples(recipe: Recipe, tmp_path: Path, overrides: list[str]) -> None:
    run = tmp_path / "run"
    mezzotint.train(override_recipe(recipe, overrides), run, quiet=True)
    assert mezzotint.sample(mezzotint.load(run), count=2).isfinite().all()
    assert all(loss > 0 for loss in metrics(run).values())
    if "training.validate_every=2" in overrides:
        losses = metrics(run, "loss/validation")
        assert list(losses) == [2, 4, 6]
        assert losses[4] > losses[2], "the second stage's is the sum of two levels"
    if "training.sample_every=3" in overrides:
        assert len(list((run / "samples").iterdir())) == 2


def test_a_pyramid_of_latents_and_of_cached_ones(recipe: Recipe, tmp_path: Path) -> None:
    """Latents of 2 and 4 positions a side: from the autoencoder, and from the cache that it filled."""
    pytest.importorskip("diffusers")
    from PIL import Image
    from test_latents import save_autoencoder

    from mezzotint.encoding import encode

    vae, photos = save_autoencoder(tmp_path / "vae"), tmp_path / "photos"
    photos.mkdir()
    for i in range(6):
        Image.effect_noise((32, 32), 40 + 20 * i).convert("RGB").save(photos / f"{i}.png")
    inner = "name: unet, channels: [8], resblocks: [1], attention: [1], middle: false, heads: 2, groups: 4"
    direct = override_recipe(
        recipe,
        [
            f"data={{name: folder, path: {photos}, size: 32, channels: 3, labels: false}}",
            f"representation={{name: kl, path: {vae}}}",
            f"backbone={{{inner}, outer: [{OUTER}]}}",
            "training.steps=4",
        ],
    )
    latents = encode(direct, tmp_path / "latents", progress=False)
    cached = override_recipe(direct, [f"data=latents:{latents}"])
    for name, each in (("direct", direct), ("cached", cached)):
        mezzotint.train(each, tmp_path / name, quiet=True)
    assert metrics(tmp_path / "cached") == pytest.approx(metrics(tmp_path / "direct"), rel=1e-3)
    small, large = mezzotint.pipeline.sample_levels(mezzotint.load(tmp_path / "direct"), count=2)
    assert (small.shape, large.shape) == ((2, 3, 16, 16), (2, 3, 32, 32))


# ------------------------------------------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_stopped_in_any_stage_ends_with_the_same_weights(
    recipe: Recipe, whole: Path, tmp_path: Path, stop: int
) -> None:
    run = tmp_path / "stopped"
    interrupt(recipe, run, stop)
    assert Checkpoints(run / "state", ALONE, 9).latest() == stop
    mezzotint.train(recipe, run, resume=True, quiet=True)
    assert_same_weights(whole, run)
    assert metrics(run) == metrics(whole)


def test_other_stages_are_another_recipe(recipe: Recipe, whole: Path) -> None:
    other = override_recipe(recipe, ["training.stages=[{levels: 1, steps: 2}]"])
    with pytest.raises(MezzotintError, match=r"another recipe: training\.stages"):
        mezzotint.train(other, whole, resume=True, quiet=True)


def test_the_optimizer_starts_where_adamw_does() -> None:
    """States made ahead change no bit of a step, also of parameters that had no gradient at first."""
    layers = [torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(2)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    made = []
    for ahead, pair in enumerate(layers):
        optimizer = torch.optim.AdamW(pair.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        if ahead:
            loop.start_states(optimizer)
        for step in range(4):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            sum(layer(x).square().sum() for layer in (pair if step > 1 else pair[:1])).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        made.append([parameter.detach() for parameter in pair.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_non_finite_loss_in_a_later_stage_names_its_step_and_examples(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = EMA.update

    def poison(ema: EMA[Any], module: torch.nn.Module, step: int) -> None:
        update(ema, module, step)
        if step == 4:
            next(module.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(EMA, "update", poison)
    examples = ", ".join(map(str, BatchOrder(898, 4, mix(recipe.seed, 1)).indices(1).tolist()))
    with pytest.raises(MezzotintError, match=rf"loss became nan at step 5 \(examples {examples}\); .*step-00000003"):
        mezzotint.train(override_recipe(recipe, ["training.checkpoint_every=3"]), tmp_path / "run", quiet=True)


def test_two_processes_give_the_stages_of_one(whole: Path, tmp_path: Path) -> None:
    """torchrun with gloo, the same global batch; in the first stage most of the network has no gradient anywhere."""
    run = tmp_path / "two"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m",
            "mezzotint", "train", "digits", *NESTED, STAGES, "--out", str(run), "--device", "cpu",
        ],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert metrics(run) == pytest.approx(metrics(whole), rel=1e-4)
    expected = weights(whole)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stages=[{levels: 1, steps: 6}]"], r"training\.stages take 6 steps, and training\.steps are 6"),
        (["training.stages=[{levels: 3, steps: 1}]"], "a stage of training trains 3 levels, but the network has 2"),
        (["training.stages=[{levels: 0, steps: 1}]"], "levels"),
        (["training.stages=[{levels: 1, steps: 3, batch_size: 5}]", "training.accumulate=2"], "size 5 is not divis"),
        (["data.size=15"], "make the network 2 times as large as inside, which does not divide 15"),
        (["data.size=18"], "cannot be halved 1 times"),
        (["objective.level_weights=[1, 2, 3]"], r"objective\.level_weights has 3 numbers for 2 level\(s\)"),
        (["objective.level_shares=[1]"], r"objective\.level_shares has 1 numbers for 2 level\(s\)"),
        (["objective.level_shares=[0.5, 1]"], "must begin with 1 and not rise"),
        (["objective.level_shares=[1, 0]"], "must begin with 1 and not rise, above 0"),
        (["variance=learned"], "a Matryoshka network has no learned variance"),
        (["interpolant=variance-exploding"], "a pyramid needs an interpolant that ends in noise of variance 1"),
        (["backbone.outer=[{channels: [8, 8], resblocks: [1]}]"], "resblocks"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(recipe: Recipe, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(MezzotintError, match=message) as raised:
        mezzotint.train(override_recipe(recipe, overrides), tmp_path / "run", quiet=True)
    assert "\n" not in str(raised.value)
    assert not str(raised.value).endswith(".")
    assert list(tmp_path.iterdir()) == [], "no folder is left behind"


def test_levels_on_the_command_line(command: Command, whole: Path, tmp_path: Path) -> None:
    from PIL import Image

    levels, way, npz = tmp_path / "levels.png", tmp_path / "way.gif", tmp_path / "s.npz"
    code, out, err = command("sample", whole, "--classes", "3, 8", "--count", 4, "--levels", levels, "--no-labels")
    assert (code, out.split()) == (0, [str(whole / "samples.png"), str(levels)]), err
    with Image.open(levels) as picture, Image.open(whole / "samples.png") as grid:
        assert picture.width == 2 * (grid.width - 2) + 2, "each image twice, at both resolutions"
        assert picture.height == grid.height
    assert command("sample", whole, "--count", 2, "--trajectory", way)[0] == 0
    assert command("sample", whole, "--count", 3, "--npz", npz)[0] == 0
    code, _, err = command("sample", whole, "--npz", npz, "--levels", levels)
    assert code == 2
    assert "--npz, --trajectory and --levels do not go together" in err
    code, _, err = command("evaluate", whole, "--features", "pixels", "--count", 8, "--out", tmp_path / "s.json")
    assert code == 0, err
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["sets"]["samples"]["images"] == 8
    code, _, err = command("evaluate", whole, "--features", "pixels", "--count", 8, "--likelihood", 2)
    assert code == 2
    assert "bits per dimension are those of images by class, not of pyramids" in err


def test_weights_of_the_inner_network_are_those_of_the_file(whole: Path) -> None:
    """model.safetensors names the inner network's weights `inner.…`, as the module does."""
    names = load_file(whole / "model.safetensors").keys()
    assert any(name.startswith("inner.") for name in names)
    assert any(name.startswith("in_adapter.") for name in names)
