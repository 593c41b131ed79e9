"""A run that goes on: on the same data, by the same recipe, alone in its folder, or with every change written down."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHORT, Command, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import mezzotint
from mezzotint import files
from mezzotint.cli.app import program
from mezzotint.errors import MezzotintError
from mezzotint.locks import claimed, locked
from mezzotint.recipe import DataSettings, Recipe, load_recipe, override_recipe
from mezzotint.training import loop
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.ema import EMA
from mezzotint.training.parallel import World

TINY = (*SHORT, "backbone.width=16", "backbone.depth=1", "backbone.heads=2", "data.size=8", "training.batch_size=4")
ALONE = World(0, 1, torch.device("cpu"))


def image(folder: Path, number: int, value: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(folder / f"{number}.bmp")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label, name in enumerate(("apple", "pear")):
        for number in range(4):
            image(tmp_path / "set" / name, number, 60 * label + number)
    return tmp_path / "set"


def recipe_of(photos: Path, *overrides: str) -> Recipe:
    return load_recipe("digits", [*TINY, "data.name=folder", f"data.path={photos}", "training.steps=4", *overrides])


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Path:
    """Four steps on the photos."""
    mezzotint.train(recipe_of(photos), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def go_on(run: Path, photos: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Two more steps; the record."""
    mezzotint.train(recipe_of(photos, "training.steps=6", *overrides), run, resume=True, quiet=True, **options)
    return json.loads((run / "record.json").read_text())


def class_names(run: Path) -> list[str]:
    with safe_open(run / "model.safetensors", "pt") as file:
        return json.loads(file.metadata()["class_names"])


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ data


def test_what_a_run_was_trained_on_is_written_down(run: Path, photos: Path) -> None:
    record = json.loads((run / "record.json").read_text())
    assert record["data"]["path"] == str(photos)
    assert record["data"]["class_names"] == ["apple", "pear"]
    assert record["data"]["images"] == 8
    assert record["changes"] == []


def rename(photos: Path) -> None:
    (photos / "apple").rename(photos / "zebra")  # the labels trade places


def add(photos: Path) -> None:
    for number in range(4, 10):
        image(photos / "pear", number, number)


def swap(photos: Path) -> None:
    image(photos / "apple", 2, 200)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rename, "it has no class apple any more, and its class zebra is new;"),
        (add, "it has 14 images instead of 8;"),
        (swap, "its images, labels or captions are other ones, though as many;"),
    ],
)
def test_other_data_are_refused_and_with_data_changed_recorded(run: Path, photos: Path, change: Any, told: str) -> None:
    change(photos)
    before = contents(run)
    with pytest.raises(MezzotintError, match=f"not the one that .*run was trained on: {told}.*--data-changed"):
        go_on(run, photos)
    assert contents(run) == before
    record = go_on(run, photos, data_changed=True)
    names = sorted(path.name for path in photos.iterdir())
    assert class_names(run) == record["data"]["class_names"] == names
    [changed] = record["changes"]
    assert (changed["step"], changed["data"]["class_names"]) == (4, ["apple", "pear"])
    go_on(run, photos)  # they are its data now


def test_the_same_data_at_another_place_are_accepted_and_said(
    run: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = photos.rename(photos.with_name("elsewhere"))
    record = go_on(run, moved)
    assert "goes on with the same content at another place: data.path" in caplog.text
    assert record["data"]["path"] == str(moved)
    assert record["changes"][0]["recipe"]["data.path"] == [str(photos), str(moved)]
    assert load_recipe(run).data.path == str(moved)


def test_a_run_of_an_earlier_version_goes_on_with_one_sentence(
    run: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "record.json").unlink()
    assert go_on(run, photos)["data"]["images"] == 8
    assert caplog.text.count("does not say what it was trained on") == 1
    (run / "record.json").unlink()
    moved = photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(MezzotintError, match=r"data.path .*--data-changed would allow data.path"):
        go_on(run, moved)
    go_on(run, moved, data_changed=True)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "[" * 100_000])
def test_a_damaged_record_is_said(run: Path, photos: Path, text: str) -> None:
    (run / "record.json").write_text(text)
    with pytest.raises(MezzotintError, match=r"record.json is damaged .* remove it"):
        go_on(run, photos)


def test_init_may_be_gone_elsewhere_once_a_checkpoint_has_its_weights(run: Path, photos: Path, tmp_path: Path) -> None:
    mezzotint.train(recipe_of(photos, f"init={run}"), tmp_path / "tuned", quiet=True)
    moved = run.rename(run.with_name("moved"))
    assert go_on(tmp_path / "tuned", photos, f"init={moved}")["changes"][0]["recipe"]["init"] == [str(run), str(moved)]


# ------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    "override",
    ["training.lr=1.0e-5", "training.grad_clip=0.5", "training.precision=bf16", "training.ema=[0.9]"],
)
def test_what_advice_says_may_be_changed_with_override(run: Path, photos: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(MezzotintError, match=rf"begun with other settings: {key} .*add --override"):
        go_on(run, photos, override)
    record = go_on(run, photos, override, override=True)
    before, after = (recipe_of(photos, *more).training.model_dump(mode="json") for more in ([], [override]))
    name = key.partition(".")[2]
    assert record["changes"][0]["step"] == 4
    assert record["changes"][0]["recipe"][key] == [before[name], after[name]]
    assert getattr(load_recipe(run).training, name) == getattr(recipe_of(photos, override).training, name)
    go_on(run, photos, override)  # it is the run's recipe now
    with pytest.raises(MezzotintError, match="begun with other settings"):
        go_on(run, photos)


def test_a_refusal_says_which_of_the_changes_override_would_allow(run: Path, photos: Path) -> None:
    for options in ({}, {"override": True}):
        with pytest.raises(MezzotintError, match="belongs to another recipe: seed") as refused:
            go_on(run, photos, "seed=1", "training.lr=1.0e-5", **options)
        assert ("of these, --override would allow training.lr)" in str(refused.value)) == (not options)


def test_a_lower_learning_rate_is_the_one_that_is_used(run: Path, photos: Path) -> None:
    go_on(run, photos, "training.lr=1.0e-9", "training.ema=[]", override=True)
    last = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["step"], last["lr"]) == (6, pytest.approx(1e-9))


def test_averages_go_on_under_their_decay_else_in_their_place_else_from_the_weights() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module, [0.5, 0.9, 0.99])
    saved = ema.saved_under([0.9, 0.8])
    # 0.9 is its own; 0.5 would take the place of 0.9, which goes on itself; 0.99 has no place.
    assert saved.keys() == {"0"}
    assert saved["0"] is ema.averages[1]
    assert EMA(module, [0.5, 0.9]).saved_under([0.9, 0.8]).keys() == {"0"}
    changed = EMA(module, [0.5, 0.7])
    assert [id(changed.saved_under([0.6, 0.7])[key]) for key in "01"] == [id(one) for one in changed.averages]
    module.weight.data.fill_(7.0)
    ema.start_others(module, saved)
    assert [average["weight"].item() == 7.0 for average in ema.averages] == [True, False, True]


def test_other_averages_are_what_they_should_be_whichever_checkpoint_they_come_from(
    photos: Path, tmp_path: Path
) -> None:
    """With a learning rate of nearly zero the weights stay, and an average of a long decay stays what it was."""
    run, still = tmp_path / "run", ["training.ema_warmup=false", "training.lr=1.0e-30", "training.checkpoint_every=100"]
    begun = recipe_of(photos, *still, "training.ema=[0.5,0.999999]", "training.lr=0.1", "training.checkpoint_every=4")
    mezzotint.train(begun, run, quiet=True)
    own = load_file(run / "model-ema-0.999999.safetensors")
    go_on(run, photos, "training.ema=[0.999999]", *still, override=True)
    found = load_file(run / "model.safetensors")
    assert all(torch.allclose(found[name], own[name], atol=1e-4) for name in own)
    # The newest checkpoint is of one average, and the one before it, of step 4, still of two.
    (run / "state" / "step-00000006" / "manifest.json").write_text("damaged")
    go_on(run, photos, "training.ema=[0.999999,0.5]", *still, override=True)
    found, second = load_file(run / "model.safetensors"), load_file(run / "model-ema-0.5.safetensors")
    assert all(torch.allclose(found[name], own[name], atol=1e-4) for name in own)
    assert any(not torch.allclose(second[name], own[name], atol=1e-2) for name in own)


# ---------------------------------------------------------------------------------------------------------- longer

LEVELS = (
    "data.size=16", "training.stages=[{levels: 1, steps: 2}]",
    "backbone={name: dit, patch_size: 2, width: 16, depth: 1, heads: 2, "
    "outer: [{channels: [4, 4], resblocks: [1, 1], groups: 1}]}",
)  # fmt: skip


def logged(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.ema=[0.9,0.5]", "training.ema_warmup=true", "training.accumulate=2"),
        ("training.warmup_steps=6", "training.sample_every=3", "data.test_fraction=0.3", "training.validate_every=3"),
        LEVELS,
    ],
    ids=["averages", "warm-up", "stages"],
)
def test_a_run_that_is_trained_longer_is_one_that_had_all_the_steps(
    photos: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    mezzotint.train(recipe_of(photos, "training.steps=8", *overrides), whole, quiet=True)
    mezzotint.train(recipe_of(photos, *overrides), run, quiet=True)
    mezzotint.resume(run, steps=6, quiet=True)
    assert mezzotint.load_recipe(run).training.steps == 6
    mezzotint.resume(run, ["training.steps=8"], quiet=True)
    assert_same_weights(whole, run)
    assert logged(run, "loss/train") == logged(whole, "loss/train")
    assert logged(run, "lr") == logged(whole, "lr")
    assert (run / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()
    changes = json.loads((run / "record.json").read_text())["changes"]
    assert [(one["step"], one["recipe"]) for one in changes] == [
        (4, {"training.steps": [4, 6]}),
        (6, {"training.steps": [6, 8]}),
    ]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # lr·(1 + cos(π·step / 8)) / 2 and lr·(1 − step / 8), of the steps that follow 4, 5, 6 and 7 finished ones
        ("cosine", [0.5, 0.3086583, 0.1464466, 0.0380602]),
        ("linear", [0.5, 0.375, 0.25, 0.125]),
    ],
)
def test_a_decay_that_had_ended_goes_on_as_the_one_over_all_the_steps(
    photos: Path, run: Path, command: Command, caplog: pytest.LogCaptureFixture, schedule: str, rates: list[float]
) -> None:
    words = (f"training.lr_schedule={schedule}", "training.lr=1e-4", "training.log_every=1")
    run = run.with_name("decayed")
    mezzotint.train(recipe_of(photos, *words), run, quiet=True)
    told = command("resume", run, "--steps", 8, "--device", "cpu")
    assert told.code == 0, told.err
    assert caplog.messages == [
        f"the {schedule} decay had taken the learning rate to 0 at step 4; over 8 steps it goes on at 5.0e-05"
    ]
    assert f"resuming {run} at step 4 of 8" in told.err
    assert [rate / 1e-4 for rate in logged(run, "lr").values()][4:] == pytest.approx(rates, abs=1e-6)
    assert list(logged(run, "lr")) == [*range(1, 9)]
    assert load_recipe(run).training.steps == 8


def test_an_unfinished_decay_ends_elsewhere_with_override_alone(
    photos: Path, run: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    run = run.with_name("decaying")
    recipe = recipe_of(photos, "training.lr_schedule=linear", "training.lr=1e-4", "training.log_every=1")
    mezzotint.train(recipe, run, quiet=True)
    shutil.rmtree(run / "state" / "step-00000004")  # killed after two steps
    before = contents(run)
    refused = command("resume", run, "--steps", 8)
    assert refused.code == 2
    assert (
        "has made 2 of 4 steps, and its linear decay goes by their number: over 8 the learning rate goes on at 7.5e-05 "
        "instead of 5.0e-05; add --override" in refused.err
    )
    assert contents(run) == before
    mezzotint.resume(run, steps=8, override=True, quiet=True)
    assert "the linear decay ends at step 8 instead of 4: the learning rate goes on at 7.5e-05 instead of 5.0e-05" in (
        caplog.text
    )
    assert logged(run, "lr")[3] == pytest.approx(7.5e-5)


def test_a_finished_run_says_so_and_fewer_steps_are_refused(run: Path, photos: Path, command: Command) -> None:
    before = contents(run / "state") | {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    done = command("resume", run)
    assert done.code == 0
    assert f"{run} is finished: it has made its 4 steps; to train it longer: mezzotint resume {run} --steps 8" in (
        done.err
    )
    assert "resuming" not in done.err
    for words in (["resume", run, "--steps", 3], ["resume", run, "training.steps=3"]):
        fewer = command(*words)
        assert (fewer.code, "has made 4 steps already, and training.steps=3 is fewer" in fewer.err) == (2, True)
    with pytest.raises(MezzotintError, match="has made 4 steps already"):
        mezzotint.train(recipe_of(photos, "training.steps=3"), run, resume=True, quiet=True)
    assert contents(run / "state") | {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_more_steps_are_the_last_stage_s(
    photos: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Its linear decay, over 2 steps, ended at step 4; over 4 it is at half its rate there."""
    run = tmp_path / "staged"
    words = ("training.lr_schedule=linear", "training.lr=1e-4", "training.log_every=1")
    mezzotint.train(recipe_of(photos, *LEVELS, *words), run, quiet=True)
    assert command("resume", run, "--steps", 6).code == 0
    assert "to 0 at step 4; over 6 steps it goes on at 5.0e-05" in caplog.text
    assert [rate / 1e-4 for rate in logged(run, "lr").values()] == pytest.approx([1, 0.5, 1, 0.5, 0.5, 0.25])
    assert "training.stages take 2 steps" in command("resume", run, "--steps", 2).err


def test_tensorboard_keeps_every_step_of_a_run_that_goes_on(run: Path, photos: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mezzotint.resume(run, quiet=True)  # which is finished
    mezzotint.resume(run, steps=8, quiet=True)
    events = EventAccumulator(str(run / "logs")).Reload()
    assert [point.step for point in events.Scalars("loss/train")] == [2, 4, 6, 8]
    assert [point.value for point in events.Scalars("loss/train")] == pytest.approx(
        list(logged(run, "loss/train").values())
    )


# ---------------------------------------------------------------------------------------------------- which run it is


def test_train_resume_of_a_run_folder_means_that_run(
    photos: Path, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began a run of the recipe's name anew."""
    monkeypatch.chdir(run.parent)
    again = command("train", "run", "training.steps=6", "--resume")
    assert (again.code, "resuming run at step 4 of 6" in again.err) == (0, True), again.err
    assert not Path("runs").exists()
    mezzotint.train(recipe_of(photos, "training.steps=6"), "whole", quiet=True)
    assert_same_weights(Path("whole"), run)


def test_train_of_a_run_folder_begins_another_and_says_where(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    before, other = contents(run), f"runs/{load_recipe(run).name}"
    fresh = command("train", "run", "seed=1")
    assert (fresh.code, f"a new run by the recipe of run, written to {other}" in fresh.err) == (0, True), fresh.err
    assert load_recipe(other).seed == 1
    for words, refused in (
        (["train", "run", "--out", "run"], "error: run already holds a run; go on with it by mezzotint resume run, or"),
        (["train", other], f"error: {other} already holds a run; go on with it by mezzotint resume {other}"),
    ):
        result = command(*words)
        assert (result.code, result.err.startswith(refused)) == (2, True), result.err
    assert contents(run) == before


def test_what_is_no_run_is_not_resumed(tmp_path: Path, command: Command) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "recipe.yaml").write_text("extends: digits\n")
    for place, problem in ((own, "there is no run at"), (tmp_path / "nowhere", "there is no folder at")):
        result = command("resume", place)
        assert result.code == 2
        assert result.err.startswith(f"error: {problem} {place}; expected one that 'mezzotint train' wrote"), result.err
        assert result.err.endswith("begin one with 'mezzotint train RECIPE --out FOLDER'"), result.err
    assert (own / "recipe.yaml").read_text() == "extends: digits\n"
    assert list(tmp_path.iterdir()) == [own]


def test_a_run_that_was_meant_is_named(run: Path) -> None:
    with pytest.raises(MezzotintError, match=f"there is no folder at .*; closest: {re.escape(str(run))}$"):
        mezzotint.resume(run.with_name("runn"))


def test_a_decay_that_has_not_begun_is_not_said_to_have_ended(
    photos: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run.with_name("warming")
    mezzotint.train(recipe_of(photos, "training.lr_schedule=cosine", "training.warmup_steps=5"), run, quiet=True)
    mezzotint.resume(run, steps=6, quiet=True)
    assert caplog.messages == []


# ------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_was_killed_before_its_recipe_is_begun_anew(photos: Path, tmp_path: Path, resume: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    dead = 2**22 + 1
    for name in (f".recipe.yaml.{files._HOST}-{dead}-0123abcd.tmp", f".recipe.yaml.{dead}.tmp", ".lock", "record.json"):
        (run / name).write_text("half")
    mezzotint.train(recipe_of(photos), run, resume=resume, quiet=True)
    assert not list(run.glob(".*"))
    assert load_recipe(run).training.steps == 4


def test_a_folder_like_a_checkpoint_is_none(run: Path, photos: Path) -> None:
    (run / "state" / "step-00000002-backup").mkdir()
    (run / "state" / "step-4").mkdir()
    assert Checkpoints(run / "state", ALONE, 2).steps() == [2, 4]
    go_on(run, photos)
    assert (run / "state" / "step-00000002-backup").is_dir()


def test_what_a_killed_process_left_of_a_checkpoint_is_swept(run: Path, photos: Path) -> None:
    left = run / "state" / f".step-00000006.{files._HOST}-{2**22 + 1}-0123abcd.tmp"
    left.mkdir()
    (left / "part").write_text("half")
    go_on(run, photos)
    assert sorted(path.name for path in (run / "state").iterdir()) == ["step-00000004", "step-00000006"]


def test_lines_of_metrics_that_are_not_ours_stay_and_one_cut_off_goes(run: Path, photos: Path) -> None:
    file = run / "logs" / "metrics.jsonl"
    foreign = [b"# by hand", b"[1]", b"17", b'{"note": "lr was high"}', b'{"step": "4"}', b"\xff\xfe"]
    file.write_bytes(file.read_bytes() + b"\n".join(foreign) + b'\n{"step": 9, "loss/train": 1.0}\n{"step": 4, "lo')
    go_on(run, photos)
    lines = file.read_bytes().splitlines()
    assert [line for line in lines if line in foreign] == foreign
    assert [json.loads(line)["step"] for line in lines if line not in foreign] == [2, 4, 6]


@pytest.mark.parametrize("name", ["logs", "state", "samples", "recipe.yaml", "model.safetensors"])
def test_files_in_the_place_of_folders_and_the_reverse(photos: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if "." in name:
        (run / name).mkdir()
    else:
        (run / name).write_text("")
    with pytest.raises(MezzotintError, match=rf"{name} is a (file|folder), and a run has a (file|folder) of that name"):
        mezzotint.train(recipe_of(photos), run, quiet=True)
    assert [path.name for path in run.iterdir()] == [name]


def test_two_starts_into_one_folder_never_mix(photos: Path, tmp_path: Path) -> None:
    """7 of 28 pairs mixed one run's recipe with the other's weights."""
    run, seen = tmp_path / "run", []
    advance = loop.Log.advance

    def meanwhile(log: loop.Log, step: int) -> None:
        advance(log, step)
        if step == 1:
            for resume in (False, True):
                with pytest.raises(MezzotintError, match=rf"run is in use by process {os.getpid()} on ") as refused:
                    mezzotint.train(recipe_of(photos, "seed=1"), run, resume=resume, quiet=True)
                seen.append(refused)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "advance", meanwhile)
        mezzotint.train(recipe_of(photos), run, quiet=True)
    assert len(seen) == 2
    assert load_recipe(run).seed == 0
    mezzotint.train(recipe_of(photos), tmp_path / "alone", quiet=True)
    mixed, alone = load_file(run / "model.safetensors"), load_file(tmp_path / "alone" / "model.safetensors")
    assert all(torch.equal(mixed[name], alone[name]) for name in alone)


# ---------------------------------------------------------------------------------------------------------- Ctrl-C


def test_the_hint_after_ctrl_c_is_the_command_that_goes_on(photos: Path, tmp_path: Path, command: Command) -> None:
    spaced = photos.rename(tmp_path / "my photos [1]")
    advance = loop.Log.advance

    def interrupted(log: loop.Log, step: int) -> None:
        advance(log, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    data = ["data.name=folder", f"data.path={spaced}"]
    assert command("train", "digits", *TINY, *data, "--out", tmp_path / "whole").code == 0
    run = tmp_path / "a run"
    words = ["train", "digits", *TINY, *data, "--out", str(run), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSettings, "load", stop_at_once)
        assert pasted(command(*words)) == words, "there is no run yet, and the same command begins one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "advance", interrupted)
        resumed = pasted(command(*words))
    assert resumed == ["resume", str(run), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSettings, "load", stop_at_once)
        longer = [*resumed, "--steps", "6"]
        assert sorted(pasted(command(*longer))) == sorted(longer), "what was asked for has not been written down yet"
    done = command(*resumed)
    assert done.err.endswith(f"trained {run}; next: mezzotint sample '{run}'")
    assert_same_weights(tmp_path / "whole", run)


def stop_at_once(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def pasted(stopped: Result) -> list[str]:
    """The words behind ``mezzotint`` of the command that a stopped one says."""
    assert stopped.code == 130, stopped.err
    first, *words = shlex.split(stopped.err.partition("stopped; continue with: ")[2])
    assert first == "mezzotint"
    return words


def test_the_hint_starts_the_program_as_it_was_started(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(DataSettings, "load", stop_at_once)
    words = ["train", "digits", f"data=folder:{photos}"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("torchrun", "mezzotint"):
        (tmp_path / name).touch(mode=0o755)  # another environment's
    python = shlex.quote(sys.executable)
    assert command(*words).err.endswith(
        f": {python} -m torch.distributed.run --nproc-per-node 2 -m mezzotint {shlex.join(words)}"
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert command(*words).err.endswith(f": torchrun --nproc-per-node 2 -m mezzotint {shlex.join(words)}")
    assert program() == ["mezzotint"]
    monkeypatch.setattr(sys, "executable", "/my venv/python")
    monkeypatch.setattr(sys, "orig_argv", ["/my venv/python", "-m", "mezzotint"])
    for started_as, words in (
        ("/my venv/lib/mezzotint/__main__.py", ["/my venv/python", "-m", "mezzotint"]),
        ("/my venv/bin/mezzotint", ["/my venv/bin/mezzotint"]),  # not on the PATH
        (str(tmp_path / "mezzotint"), ["mezzotint"]),
    ):
        monkeypatch.setattr(sys, "argv", [started_as])
        assert program() == words


@pytest.mark.parametrize(
    ("words", "at", "written"),
    [
        (("sample", "run", "--count", 6, "--batch-size", 2, "--npz", "x.npz"), "archive.sample_batches", "x.npz"),
        (
            ("sweep", "run", "steps=1,2", "data.test_fraction=0.5", "--count", 4, "--features", "pixels", "--no-plots",
             "--out", "out"),
            "evaluation.sweep._score",
            "out/sweep.csv",
        ),
        (
            ("encode", "digits", *TINY, "data.name=folder", "data.path=set", "representation=patch-pca",
             "representation.stride=2", "representation.path=pca", "--out", "latents", "--split", "train"),
            "encoding.encode_dataset",
            "latents",
        ),
    ],
    ids=["sample", "sweep", "encode"],
)  # fmt: skip
def test_what_goes_on_says_by_which_command(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], at: str, written: str
) -> None:
    """Stopped at the second of its parts, or where it has one at once; what was there is not made again."""
    monkeypatch.chdir(run.parent)
    if words[0] == "encode":
        pca = ("representation=patch-pca", "representation.stride=2", "data.name=folder", "data.path=set")
        assert command("fit-tokenizer", "digits", *TINY, *pca, "--out", "pca").code == 0
    module, _, name = f"mezzotint.{at}".rpartition(".")
    work, calls = getattr(import_module(module), name), []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == (1 if words[0] == "encode" else 2):
            raise KeyboardInterrupt
        return work(*arguments, **options)

    monkeypatch.setattr(f"{module}.{name}", stopping)
    again = pasted(command(*words))
    assert sorted(again) == sorted(map(str, words))
    assert not Path(written).exists()
    assert command(*again).code == 0
    assert Path(written).exists()
    assert len(calls) == {"sample": 4, "sweep": 3, "encode": 2}[words[0]]


@pytest.mark.parametrize(
    ("words", "at"),
    [
        (
            ("fit-tokenizer", "digits", *TINY, "representation=patch-pca", "representation.stride=2"),
            "training.tokenizers.measure",
        ),
        (("train-mae", "digits", *TINY, "training.steps=1", "mae.depth=1"), "evaluation.mae._check"),
        (("finetune", "run", "data.test_fraction=0.5", "--count", 2, "--epochs", 1), "evaluation.end_to_end.score"),
    ],
    ids=["fit-tokenizer", "train-mae", "finetune"],
)
def test_what_is_not_gone_on_with_says_that_nothing_was_written(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], at: str
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(f"mezzotint.{at}", stop_at_once)
    before = contents(run.parent)
    stopped = command(*words, "--out", "made")
    assert (stopped.code, stopped.err.endswith("stopped; made was not written")) == (130, True), stopped.err
    assert contents(run.parent) == before


@pytest.mark.parametrize("place", ["read", "written"])
def test_ctrl_c_while_a_checkpoint_is_read_or_written_leaves_the_state_safe(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, command: Command, place: str
) -> None:
    """A second one, as the first only asks to stop; it arrives inside torch, which makes an error of its own of it."""
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

    kind, name = (FileSystemReader, "read_data") if place == "read" else (FileSystemWriter, "write_data")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = contents(run / "state")
    words = ["train", "digits", *TINY, "data.name=folder", f"data.path={photos}", "--out", str(run), "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, interrupted)
        stopped = command(*words, "training.steps=6")
    assert sorted(pasted(stopped)) == sorted([*words, "training.steps=6"])
    assert contents(run / "state") == before
    assert command(*words, "training.steps=6").code == 0


def test_a_killed_study_s_processes_end_with_it(tmp_path: Path) -> None:
    program = (
        "import os, time; from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\nfrom mezzotint.studies.ldae import _begin\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, get_context('spawn'), _begin, (1,)) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while files._is_alive(child):
        assert time.monotonic() < deadline, "the child has outlived its parent"
        time.sleep(0.05)


def test_whatever_fills_a_folder_over_time_holds_it(tmp_path: Path, pipeline: mezzotint.Pipeline) -> None:
    from mezzotint.encoding import encode
    from mezzotint.evaluation.end_to_end import finetune_classifier
    from mezzotint.evaluation.mae import train_mae
    from mezzotint.evaluation.sweep import sweep
    from mezzotint.studies.ldae import study
    from mezzotint.training.tokenizers import fit_tokenizer

    out = tmp_path / "out"
    pca = load_recipe("digits", [*TINY, "representation=patch-pca", "representation.stride=2"])
    with claimed(out):
        for begin in (
            lambda: fit_tokenizer(pca, out, quiet=True),
            lambda: train_mae(pca, out),
            lambda: finetune_classifier(pipeline, out, quiet=True),
        ):
            with pytest.raises(MezzotintError, match="out is in use by process"):
                begin()
    fit_tokenizer(pca, out, quiet=True)
    fitted = override_recipe(pca, [f"representation.path={out}"])
    with locked(tmp_path / "latents"), pytest.raises(MezzotintError, match="latents is in use by process"):
        encode(fitted, tmp_path / "latents", progress=False)
    with locked(tmp_path / "run" / "sweep"), pytest.raises(MezzotintError, match="run is in use by process"):
        sweep(pipeline, tmp_path / "run", {"steps": [1]})
    with locked(tmp_path / "study"), pytest.raises(MezzotintError, match="study is in use by process"):
        study("digits", tmp_path / "study", seeds=[0], cells=["ldae-05c-patch-pca"], device="cpu")
