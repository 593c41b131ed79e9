"""The loop: what it computes, and that nothing is lost when it stops."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import mezzotint
from mezzotint.errors import MezzotintError
from mezzotint.recipe import Recipe, TrainingSettings, override_recipe
from mezzotint.training import loop
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.ema import EMA
from mezzotint.training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def interrupt(recipe: Recipe, run: Path, stop: int) -> None:
    """Train until Ctrl-C, which comes at the end of a step."""
    update = EMA.update

    def interrupted_update(ema: EMA[Any], module: torch.nn.Module, step: int) -> None:
        update(ema, module, step)
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMA, "update", interrupted_update)
        with pytest.raises(KeyboardInterrupt):
            mezzotint.train(recipe, run, quiet=True)


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def metrics(run: Path, key: str = "loss/train") -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture
def whole(tiny: Recipe, tmp_path: Path) -> Path:
    """An uninterrupted run of six steps."""
    mezzotint.train(tiny, tmp_path / "whole", quiet=True)
    return tmp_path / "whole"


# ------------------------------------------------------------------------------------------------- what it computes


def test_run_folder_holds_everything(whole: Path, tiny: Recipe) -> None:
    saved = mezzotint.load_recipe(whole)
    assert saved.backbone.num_classes == 10, "the resolved recipe names the number of classes"
    assert saved.model_dump(exclude={"backbone"}) == tiny.model_dump(exclude={"backbone"})
    assert Checkpoints(whole / "state", ALONE, 2).steps() == [4, 6], "older checkpoints are pruned"
    assert list(metrics(whole)) == [2, 4, 6]
    pipeline = mezzotint.load(whole)
    assert pipeline.class_names == tuple("0123456789")
    assert mezzotint.sample(pipeline, count=3).shape == (3, 1, 8, 8)


def test_loss_falls(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, ["training.steps=150", "training.log_every=50", "training.lr=3e-3"])
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    losses = metrics(tmp_path / "run")
    assert losses[150] < 0.8 * losses[50]


def test_same_seed_same_weights_other_seed_other_weights(tiny: Recipe, whole: Path, tmp_path: Path) -> None:
    mezzotint.train(tiny, tmp_path / "again", quiet=True)
    mezzotint.train(override_recipe(tiny, ["seed=1"]), tmp_path / "other", quiet=True)
    assert_same_weights(whole, tmp_path / "again")
    other = weights(tmp_path / "other")
    assert not any(torch.equal(tensor, other[name]) for name, tensor in weights(whole).items() if "embedder" in name)


def test_accumulation_is_the_whole_batch(tiny: Recipe, whole: Path, tmp_path: Path) -> None:
    mezzotint.train(override_recipe(tiny, ["training.accumulate=4"]), tmp_path / "parts", quiet=True)
    for step, loss in metrics(tmp_path / "parts").items():
        assert loss == pytest.approx(metrics(whole)[step], rel=1e-4)


def test_gradients_of_micro_batches_are_averaged(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW takes no notice of a factor on the gradients, but clipping does."""
    norms: dict[int, list[float]] = {1: [], 4: []}
    step = torch.optim.AdamW.step
    for parts, found in norms.items():

        def noted(self: torch.optim.AdamW, *args: Any, found: list[float] = found, **options: Any) -> Any:
            gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            found.append(float(torch.stack(gradients).norm()))
            return step(self, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", noted)
        recipe = override_recipe(tiny, [f"training.accumulate={parts}", "training.steps=2"])
        mezzotint.train(recipe, tmp_path / str(parts), quiet=True)
    assert norms[4][-2:] == pytest.approx(norms[1][-2:], rel=1e-3)
    assert norms[1][-1] > 0


def test_ema_is_the_weighted_sum_of_the_weights() -> None:
    """After steps w1, w2 with decay d from w0: d²·w0 + d(1 − d)·w1 + (1 − d)·w2."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    values = [0.5, 2.0, -3.0]
    module.weight.data.fill_(values[0])
    ema = EMA(module, [0.9, 0.5])
    for step, value in enumerate(values[1:], start=1):
        module.weight.data.fill_(value)
        ema.update(module, step)
    for decay, average in zip(ema.decays, ema.modules, strict=True):
        expected = decay**2 * values[0] + decay * (1 - decay) * values[1] + (1 - decay) * values[2]
        assert average.weight.item() == pytest.approx(expected, rel=1e-12)


def test_ema_warmup_caps_the_decay() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    ema = EMA(module, [0.9999], warmup=True)
    module.weight.data.fill_(11.0)
    ema.update(module, 1)  # decay (1 + 1) / (10 + 1)
    assert ema.modules[0].weight.item() == pytest.approx(9.0)


def test_every_decay_has_its_file(tiny: Recipe, tmp_path: Path) -> None:
    mezzotint.train(
        override_recipe(tiny, ["training.ema=[0.5, 0.99]", "training.ema_warmup=false"]), tmp_path / "run", quiet=True
    )
    first, second = (mezzotint.load(tmp_path / "run", weights=name) for name in ("model", "model-ema-0.99"))
    assert not torch.equal(
        first.denoiser.backbone.x_embedder.proj.weight, second.denoiser.backbone.x_embedder.proj.weight
    )  # type: ignore[union-attr,operator]
    with pytest.raises(MezzotintError, match=r"no weights 'ema'.*it has: model, model-ema-0\.99"):
        mezzotint.load(tmp_path / "run", weights="ema")


def test_the_order_of_the_data_is_that_of_the_seed(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    batches = loop.iterate_batches

    def looked_at(dataset: Any, order: Any, **options: Any) -> Any:
        seen.append(order.indices(0).tolist())
        return batches(dataset, order, **options)

    monkeypatch.setattr(loop, "iterate_batches", looked_at)
    for number, seed in enumerate((0, 1, 0)):
        recipe = override_recipe(tiny, ["training.steps=1", f"seed={seed}"])
        mezzotint.train(recipe, tmp_path / str(number), quiet=True)
    assert seen[0] == seen[2] != seen[1]


def test_dropout_acts_in_training(tiny: Recipe, tmp_path: Path) -> None:
    unet = "backbone={name: unet, channels: [8], resblocks: [1], attention: [0], middle: false, groups: 4}"
    recipe, made = override_recipe(tiny, [unet, "training.lr=0.01", "training.ema=[]", "backbone.num_classes=10"]), []
    for share in (0.0, 0.5):
        run = tmp_path / str(share)
        mezzotint.train(override_recipe(recipe, [f"backbone.dropout={share}"]), run, quiet=True)
        made.append(mezzotint.load(run).denoiser.backbone.conv_in.weight)
    assert not torch.equal(*made)  # type: ignore[arg-type]


def test_a_further_average_is_that_of_its_own_decay(tiny: Recipe, tmp_path: Path) -> None:
    """After one step from w0 to w1, each is d·w0 + (1 − d)·w1."""
    recipe = override_recipe(tiny, ["training.ema=[0.5, 0.99]", "training.ema_warmup=false", "training.steps=1"])
    recipe = override_recipe(recipe, ["training.lr=0.1", "backbone.num_classes=10"])
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    half, most = (mezzotint.load(tmp_path / "run", weights=name) for name in ("model", "model-ema-0.99"))
    start = mezzotint.build(recipe).denoiser.state_dict()
    for name, tensor in most.denoiser.state_dict().items():
        end = 2 * half.denoiser.state_dict()[name] - start[name]
        torch.testing.assert_close(tensor, 0.99 * start[name] + 0.01 * end, rtol=1e-4, atol=1e-6)


def test_validation_is_of_the_average_on_all_whole_batches(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["training.ema=[0.9]", "training.ema_warmup=false", "training.lr=0.1", "training.validate_every=6"]
    mezzotint.train(override_recipe(tiny, words), run := tmp_path / "run", quiet=True)
    logged = metrics(run, "loss/validation")[6]
    average, seen, to_device = mezzotint.load(run), list[int](), loop.to_device
    monkeypatch.setattr(
        loop, "to_device", lambda batch, *more: seen.extend(batch.indices.tolist()) or to_device(batch, *more)
    )
    assert loop.validation_loss(average.recipe, average, tiny.data.load("test")) == pytest.approx(logged, rel=1e-5)
    assert len(set(seen)) == len(seen) == 768, "three batches of 256 of the 899 held-out digits"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    settings = TrainingSettings.parse({"steps": 6, "lr": 1.0, "lr_schedule": schedule, "warmup_steps": 2})
    rates = []
    for step in range(6):
        loop.set_lr(optimizer, settings, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.precision=bf16"],
        ["training.grad_clip=0.1", "training.weight_decay=0.01"],
        ["data.flip=true", "objective.stratified=true", "objective.times=logit-normal"],
        ["interpolant=ddpm", "target=noise", "variance=learned", "time_input=[1000,-1]", "sampling=ddpm"],
        ["interpolant=cosine", "target=v", "objective.weighting=min-snr"],
        ["interpolant=vp", "target=score", "objective.weighting=velocity"],
        ["interpolant={name: variance-exploding, sigma_max: 80}", "target=data"],
        ["backbone.num_classes=0", "data.labels=false"],
        ["variance=unused", "training.ema=[]"],
        ["training.validate_every=3", "training.sample_every=3"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_word_trains_and_samples(tiny: Recipe, tmp_path: Path, overrides: list[str]) -> None:
    run = tmp_path / "run"
    mezzotint.train(override_recipe(tiny, overrides), run, quiet=True)
    assert mezzotint.sample(mezzotint.load(run), count=2).isfinite().all()
    assert all(loss > 0 for loss in metrics(run).values())
    if "training.validate_every=3" in overrides:
        assert list(metrics(run, "loss/validation")) == [3, 6]
        assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000003.png", "step-00000006.png"]


def test_compiled_training_follows_eager(tiny: Recipe, whole: Path, tmp_path: Path) -> None:
    mezzotint.train(override_recipe(tiny, ["training.compile=true"]), tmp_path / "compiled", quiet=True)
    for step, loss in metrics(tmp_path / "compiled").items():
        assert loss == pytest.approx(metrics(whole)[step], rel=1e-3)
    assert mezzotint.load(tmp_path / "compiled").denoiser.num_classes == 10


# ------------------------------------------------------------------------------------------------- stop and go on


def test_ctrl_c_saves_and_resume_ends_with_the_same_weights(tiny: Recipe, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    handler = signal.getsignal(signal.SIGINT)
    interrupt(tiny, run, 3)
    assert signal.getsignal(signal.SIGINT) is handler, "the caller's handler is back"
    assert Checkpoints(run / "state", ALONE, 2).latest() == 3
    mezzotint.train(tiny, run, resume=True, quiet=True)
    assert_same_weights(whole, run)
    assert metrics(run)[6] == metrics(whole)[6]


def test_kill_9_and_resume_ends_with_the_same_weights(tmp_path: Path) -> None:
    """A real process, killed without warning while it trains, twice; then continued to the end."""
    words = [*TINY, "training.steps=150", "training.checkpoint_every=10", "data.flip=true"]
    command = [sys.executable, "-m", "mezzotint", "train", "digits", *words]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(run: Path, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--out", str(run), *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    states = Checkpoints(killed / "state", ALONE, 2)
    for after, options in ((10, ()), (60, ("--resume",))):
        process = start(killed, *options)
        deadline = time.monotonic() + 120
        while process.poll() is None and (not states.steps() or states.steps()[-1] < after):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert states.latest() is not None
        assert not (killed / "model.safetensors").exists() or mezzotint.load(killed)
    assert start(killed, "--resume").wait() == 0
    assert start(whole).wait() == 0
    assert_same_weights(whole, killed)
    assert metrics(killed)[150] == metrics(whole)[150]
    assert list(metrics(killed)) == list(metrics(whole)), "no step is logged twice"


def test_resume_goes_further(tiny: Recipe, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "longer"
    mezzotint.train(override_recipe(tiny, ["training.steps=4"]), run, quiet=True)
    mezzotint.train(tiny, run, resume=True, quiet=True)
    assert_same_weights(whole, run)


def test_resume_of_a_finished_run_changes_nothing(tiny: Recipe, whole: Path) -> None:
    before = weights(whole)
    mezzotint.train(tiny, whole, resume=True, quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(whole).items())
    assert list(metrics(whole)) == [2, 4, 6]


def test_resume_says_that_there_is_nothing_to_resume(
    tiny: Recipe, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mezzotint.train(tiny, tmp_path / "new", resume=True, quiet=True)
    assert f"{tmp_path / 'new'} has no whole checkpoint: training begins at its first step" in caplog.text
    assert_same_weights(whole, tmp_path / "new")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(
    tiny: Recipe, whole: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    newest = Checkpoints(whole / "state", ALONE, 2).path(6)
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x10
    data.write_bytes(content[:100] if damage == "cut" else content)
    before = weights(whole)
    mezzotint.train(tiny, whole, resume=True, quiet=True)
    (sentence,) = caplog.messages
    assert f"step-00000006 is damaged: {data.name} has" in sentence
    assert Checkpoints(whole / "state", ALONE, 2).latest() == 6
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, before[name])


def test_two_processes_give_the_loss_curve_of_one(tiny: Recipe, whole: Path, tmp_path: Path) -> None:
    """torchrun with gloo, the same global batch."""
    run = tmp_path / "two"
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m",
            "mezzotint", "train", "digits", *TINY, "--out", str(run), "--device", "cpu",
        ],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert metrics(run) == pytest.approx(metrics(whole), rel=1e-4)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_a_non_finite_loss_names_step_examples_and_checkpoint(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    update = EMA.update

    def poison(ema: EMA, module: torch.nn.Module, step: int) -> None:
        update(ema, module, step)
        if step == 4:
            next(module.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(EMA, "update", poison)
    with pytest.raises(MezzotintError, match=r"loss became nan at step 5 \(examples \d+(, \d+)+\); .*step-00000003"):
        mezzotint.train(override_recipe(tiny, ["training.checkpoint_every=3"]), run, quiet=True)


def test_a_non_finite_loss_is_never_saved(tiny: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(tiny, ["training.lr=1e30", "training.log_every=100", "training.checkpoint_every=3"])
    with pytest.raises(MezzotintError, match="there is no checkpoint yet"):
        mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_another_recipe_s_folder_is_left_alone(tiny: Recipe, whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(MezzotintError, match="already holds a run; go on with it by mezzotint resume "):
        mezzotint.train(tiny, whole, quiet=True)
    with pytest.raises(MezzotintError, match=r"another recipe: backbone\.width \(16 there, 32 here\)"):
        mezzotint.train(override_recipe(tiny, ["backbone.width=32"]), whole, resume=True, quiet=True)
    decaying = override_recipe(tiny, ["training.lr_schedule=cosine", "training.steps=8"])
    with pytest.raises(MezzotintError, match=r"training\.lr_schedule"):
        mezzotint.train(decaying, whole, resume=True, quiet=True)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_a_folder_of_other_things_is_left_alone(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(MezzotintError, match="not empty and not a run folder"):
        mezzotint.train(tiny, tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny: Recipe, tmp_path: Path) -> None:
    """A real failing write: the process may not write files of more than 8 KiB."""
    run = tmp_path / "run"
    mezzotint.train(override_recipe(tiny, ["training.steps=2"]), run, quiet=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(MezzotintError, match=r"cannot write .*step-00000004.*as they were.*'mezzotint resume'"):
            mezzotint.train(tiny, run, resume=True, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(run / "state", ALONE, 2).latest() == 2
    assert mezzotint.load(run)
    assert not list((run / "state").glob(".*")), "nothing half-written is left"
    mezzotint.train(tiny, run, resume=True, quiet=True)


def test_a_batch_that_cannot_be_shared(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match=r"batch_size 16 is not divisible by training\.accumulate 3"):
        override_recipe(tiny, ["training.accumulate=3"])


def test_a_combination_that_means_nothing_leaves_no_folder(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match="'discrete' needs an interpolant with steps"):
        mezzotint.train(override_recipe(tiny, ["objective.times=discrete"]), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_labels_and_classes_must_fit(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match=r"the data set is unlabelled; set backbone\.num_classes=0"):
        mezzotint.train(override_recipe(tiny, ["data.labels=false", "backbone.num_classes=10"]), tmp_path / "a")
    with pytest.raises(MezzotintError, match=r"10 classes, more than backbone\.num_classes=3"):
        mezzotint.train(override_recipe(tiny, ["backbone.num_classes=3"]), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_logs_on_a_full_disk_do_not_end_the_run(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorBoard's worker thread hands its error to whichever call comes next."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setattr(SummaryWriter, "close", full)
    mezzotint.train(tiny, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    told = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert told == [
        f"the logs in {tmp_path / 'run' / 'logs'} cannot be written (No space left on device); training goes on"
    ]
