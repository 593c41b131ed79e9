"""Every argument and option of every command does something: what the library is called with, or what is printed.

An option that is added to the command line and not to `OPTIONS` fails `test_the_table_has_every_option`. That the
library does what it is called with is the subject of the rooms' own tests.
"""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest
import torch
import typer
from conftest import TINY
from typer.testing import CliRunner

import mezzotint
from mezzotint import cli
from mezzotint.errors import MezzotintError
from mezzotint.recipe import load_recipe


class Call(NamedTuple):
    """What a command line makes of a function of the library: that it is called, with some of these values."""

    typed: str
    """The whole command, or from its first option on, what is added to the command in `PLAIN`."""
    function: str
    values: dict[str, Any]
    """By parameter, and from there on by attribute or key, with __ between."""


class Text(NamedTuple):
    """What a command line makes of the standard output."""

    typed: str
    has: Callable[[str], bool]


def calls(typed: str, function: str, **values: Any) -> Call:
    return Call(typed, f"mezzotint.{function}", values)


def is_json(out: str) -> bool:
    try:
        return isinstance(json.loads(out), dict | list)
    except ValueError:
        return False


JSON = Text("--json", is_json)

#: each command with what it has to have
PLAIN = {
    "": "recipes mdm",
    "train": "train digits",
    "resume": "resume run",
    "fit-tokenizer": "fit-tokenizer digits representation=patch-pca representation.stride=2",
    "finetune": "finetune run",
    "train-mae": "train-mae digits",
    "sample": "sample run",
    "evaluate": "evaluate run",
    "sweep": "sweep run steps=1,2 --no-plots",
    "study": "study ldae",
    "probe": "probe run",
    "denoise": "denoise run",
    "cost": "cost digits",
    "encode": "encode folder:photos",
    "convert": "convert run made",
    "export-vit": "export-vit run",
    "recipes": "recipes digits",
    "env": "env",
    "cache": "cache",
}

TRAIN, RESUMED = "training:train", "training.loop:train"
FIT, TUNE, MAE = (
    "training.tokenizers:fit_tokenizer",
    "evaluation.end_to_end:finetune_classifier",
    "evaluation.mae:train_mae",
)
DRAW, SCORE, SWEEP = "pipeline:sample", "evaluation.scores:evaluate", "evaluation.sweep:sweep"
STUDY, PROBE, COST = "studies.ldae:study", "evaluation.probing:probe", "evaluation.cost:recipe_cost"
DENOISE, NOISE = "evaluation.denoising:save_denoised", "evaluation.denoising:save_noise"
ENCODE, CONVERT, VIT = "encoding:encode", "interop:convert", "interop.vit:export_vit"
OPEN, PREPARE, DEVICE = "interop:load", "pipeline:Pipeline.prepare", "training.parallel:choose_device"
WRITE = "files:write_text"

#: what stands for a function that would work for long; the one that is looked at is not called either
STANDINS: dict[str, Any] = {
    TRAIN: None,
    FIT: {"split": "test", "images": 2, "mse": 0.5, "psnr": 1.0, "explained_variance": 0.5},
    TUNE: {"model": "run", "layers": 1, "top1": 0.5, "test_images": 2},
    MAE: {"first_loss": 1.0, "last_loss": 0.5},
    SCORE: {"features": "pixels", "reference": "digits", "reference_images": 2, "sets": {"samples": {"FID": 1.0}}},
    SWEEP: [{"steps": 1, "Fréchet distance": 1.0, "note": ""}],
    STUDY: [{"cell": "ldae-06", "rows": []}],
    "studies.ldae:estimate": {"ldae-06": {"tokenizer": 1.0, "training": 1.0, "probes": 1.0}},
    "studies.report:write_report": [Path("study.md")],
    PROBE: {
        "model": "run", "input": "clean", "data": "digits", "train_images": 2, "test_images": 2,
        "rows": [{"probe": "linear", "layer": "1", "t": 0.01, "top1": 0.5}],
    },
    DENOISE: None,
    NOISE: None,
    "evaluation.cost:matmul_rate": 1.0,
    "pipeline:sample_levels": [torch.zeros(100, 1, 4, 4), torch.zeros(100, 1, 8, 8)],
    ENCODE: Path("latents"),
    CONVERT: Path("made"),
    VIT: Path("vit"),
}  # fmt: skip

#: by command and parameter: what it changes, or why nothing can be seen here
OPTIONS: dict[str, dict[str, Call | Text | str | tuple[Call | Text, ...]]] = {
    "": {
        "--version": Text("--version", lambda out: out.startswith("mezzotint ")),
        "--install-completion": "typer's own, and it would change this user's shell",
        "--show-completion": "typer's own, and it asks which shell this is",
    },
    "train": {
        "recipe": calls("train fashion-mnist", TRAIN, recipe__data__name="idx"),
        "overrides": calls("train digits seed=3", TRAIN, recipe__seed=3),
        "--out": calls("--out there", TRAIN, run=Path("there")),
        "--resume": calls("--resume", TRAIN, resume=True),
        "--trust-code": calls("--trust-code", TRAIN, trust_code=True),
        "--override": calls("--override", TRAIN, override=True),
        "--data-changed": calls("--data-changed", TRAIN, data_changed=True),
        "--device": calls("--device cpu", TRAIN, device="cpu"),
    },
    "resume": {
        "run": calls("resume other", RESUMED, run=Path("other"), resume=True),
        "overrides": calls("resume run training.log_every=3", RESUMED, recipe__training__log_every=3),
        "--steps": calls("--steps 8", RESUMED, recipe__training__steps=8),
        "--override": calls("--override", RESUMED, override=True),
        "--data-changed": calls("--data-changed", RESUMED, data_changed=True),
        "--trust-code": calls("--trust-code", RESUMED, trust_code=True),
        "--device": calls("--device cpu", RESUMED, device="cpu"),
    },
    "fit-tokenizer": {
        "recipe": calls("fit-tokenizer fashion-mnist representation=patch-pca", FIT, recipe__data__name="idx"),
        "overrides": calls("seed=3", FIT, recipe__seed=3),
        "--out": calls("--out there", FIT, out=Path("there")),
        "--trust-code": calls("--trust-code", FIT, trust_code=True),
        "--json": JSON,
        "--device": calls("--device cpu", FIT, device="cpu"),
    },
    "finetune": {
        "model": calls("finetune other", OPEN, source="other"),
        "overrides": (
            calls("data.flip=true", TUNE, pipeline__recipe__data__flip=True),
            calls("finetune.mixup=0.3", TUNE, settings__mixup=0.3),
        ),
        "--layers": calls("--layers 1", TUNE, layers=1),
        "--t": calls("--t 0.25", TUNE, t=0.25),
        "--epochs": calls("--epochs 3", TUNE, settings__epochs=3),
        "--lr": calls("--lr 0.5", TUNE, settings__lr=0.5),
        "--batch-size": calls("--batch-size 3", TUNE, settings__batch_size=3),
        "--random": calls("--random", TUNE, pipeline__class_names=()),  # a checkpoint has their names
        "--count": calls("--count 3", TUNE, count=3),
        "--seed": calls("--seed 3", TUNE, settings__seed=3),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
        "--out": calls("--out there", TUNE, out=Path("there")),
        "--json": JSON,
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "train-mae": {
        "recipe": calls("train-mae fashion-mnist", MAE, recipe__data__name="idx"),
        "overrides": (
            calls("training.steps=3", MAE, recipe__training__steps=3),
            calls("mae.depth=3", MAE, settings__depth=3),
        ),
        "--out": calls("--out there", MAE, out=Path("there")),
        "--json": JSON,
        "--device": calls("--device cpu", MAE, device="cpu"),
    },
    "sample": {
        "model": calls("sample other", OPEN, source="other"),
        "overrides": calls("sampling.eta=0.5", DRAW, pipeline__recipe__sampling__eta=0.5),
        "--classes": calls('--classes "3, 8"', DRAW, classes=["3", "8"]),
        "--prompt": calls('--prompt "a cat" --prompt dogs', DRAW, prompts=["a cat", "dogs"]),
        "--prompts": calls("--prompts captions.txt", DRAW, prompts=["a cat", "dogs"]),
        "--negative-prompt": calls("--negative-prompt dogs", DRAW, negative_prompt="dogs"),
        "--count": calls("--count 3", DRAW, count=3),
        "--sampler": calls("--sampler ode-rk4", DRAW, pipeline__recipe__sampling__sampler="ode-rk4"),
        "--steps": calls("--steps 7", DRAW, pipeline__recipe__sampling__steps=7),
        "--guidance": calls("--guidance 2.5", DRAW, pipeline__recipe__guidance__scale=2.5),
        "--seed": (calls("--seed 3", DRAW, seed=3), calls("--npz x.npz --seed 3", "archive:sample_to_npz", seed=3)),
        "--batch-size": calls("--batch-size 3", DRAW, batch_size=3),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
        "--precision": calls("--precision bf16", PREPARE, precision="bf16"),
        "--compile": calls("--compile", PREPARE, compiled=True),
        "--out": calls("--out x.png", "images:save_grid", path=Path("x.png")),
        "--levels": calls("--levels x.png", "images:save_pyramid_grid", path=Path("x.png")),
        "--labels": calls("--no-labels", "images:save_grid", labels=[]),
        "--fps": calls("sample clips --fps 4", "images:save_video", fps=4.0),
        "--png": calls("--png pictures", "images:save_pngs", folder=Path("pictures")),
        "--npz": calls("--npz x.npz", "archive:sample_to_npz", path=Path("x.npz")),
        "--trajectory": (
            calls("--trajectory x.gif", DRAW, trajectory=True),
            calls("--trajectory x.gif", "images:save_animation", path=Path("x.gif")),
        ),
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "evaluate": {
        "model": (calls("evaluate other", OPEN, source="other"), calls("evaluate photos", SCORE, model="photos")),
        "arguments": (
            calls("evaluate run folder:photos", SCORE, reference="folder:photos"),
            calls("evaluate run sampling.eta=0.5", SCORE, model__recipe__sampling__eta=0.5),
            calls("evaluate run data.flip=true", SCORE, model__recipe__data__flip=True),
        ),
        "--features": calls("--features pixels", SCORE, features="pixels"),
        "--feature-weights": calls("--feature-weights x.pt", SCORE, weights="x.pt"),
        "--count": calls("--count 3", SCORE, count=3),
        "--sampler": calls("--sampler ode-rk4", SCORE, model__recipe__sampling__sampler="ode-rk4"),
        "--steps": calls("--steps 7", SCORE, model__recipe__sampling__steps=7),
        "--guidance": calls("--guidance 2.5", SCORE, guidance=2.5),
        "--infinity": calls("--infinity", SCORE, infinity=True),
        "--intervals": calls("--intervals 3", SCORE, intervals=3),
        "--captions": calls("--captions 3", SCORE, captions=3),
        "--likelihood": calls("--likelihood 3", SCORE, likelihood=3),
        "--seed": calls("--seed 3", SCORE, seed=3),
        "--batch-size": calls("--batch-size 3", SCORE, batch_size=3),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
        "--precision": calls("--precision bf16", PREPARE, precision="bf16"),
        "--compile": calls("--compile", PREPARE, compiled=True),
        "--html": calls("--html x.html", SCORE, html=Path("x.html")),
        "--out": calls("--out x.json", WRITE, path=Path("x.json")),
        "--json": JSON,
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "sweep": {
        "model": calls("sweep other steps=1,2", OPEN, source="other"),
        "arguments": (
            calls("sweep run guidance=1,3", SWEEP, axes={"guidance": [1.0, 3.0]}),
            calls("sweep run steps=1,2 data.flip=true", SWEEP, pipeline__recipe__data__flip=True),
        ),
        "--features": calls("--features pixels", SWEEP, features="pixels"),
        "--feature-weights": calls("--feature-weights x.pt", SWEEP, weights="x.pt"),
        "--reference": calls("--reference folder:photos", SWEEP, reference="folder:photos"),
        "--count": calls("--count 3", SWEEP, count=3),
        "--plots": calls("--plots", SWEEP, plots=True),
        "--seed": calls("--seed 3", SWEEP, seed=3),
        "--batch-size": calls("--batch-size 3", SWEEP, batch_size=3),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
        "--precision": calls("--precision bf16", PREPARE, precision="bf16"),
        "--compile": calls("--compile", PREPARE, compiled=True),
        "--out": calls("--out there", SWEEP, out=Path("there")),
        "--json": JSON,
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "study": {
        "name": "there is one; another is refused (test_study.py)",
        "overrides": calls("study ldae seed=3", STUDY, overrides=["seed=3"]),
        "--data": calls("--data digits", STUDY, data="digits"),
        "--seeds": calls("--seeds 4,5", STUDY, seeds=[4, 5]),
        "--cells": calls("--cells dimension,noise", STUDY, cells=["dimension", "noise"]),
        "--plan": calls("--plan --device cpu", "studies.ldae:estimate", device="cpu"),
        "--processes": calls("--processes 3", STUDY, processes=3),
        "--out": calls("--out there", STUDY, out=Path("there")),
        "--json": (JSON, Text("--plan --json", is_json)),
        "--device": calls("--device cpu", STUDY, device="cpu"),
    },
    "probe": {
        "model": calls("probe other", OPEN, source="other"),
        "overrides": calls("data.flip=true", PROBE, model__recipe__data__flip=True),
        "--layer": calls("--layer 1 --layer final", PROBE, layers=["1", "final"]),
        "--t": calls("--t 0.25 --t 0.5", PROBE, times=[0.25, 0.5]),
        "--noise": calls("--noise", PROBE, noise=True),
        "--probe": calls("--probe knn,ridge", PROBE, probes=["knn", "ridge"]),
        "--features": calls("--features pixels", "evaluation.features:feature_network", name="pixels"),
        "--random": calls("--random", PROBE, model__class_names=()),
        "--count": calls("--count 3", PROBE, count=3),
        "--k": calls("--k 3", PROBE, k=3),
        "--epochs": calls("--epochs 3", PROBE, epochs=3),
        "--optimizer": calls("--optimizer lars", PROBE, optimizer="lars"),
        "--augment": calls("--augment", PROBE, augment=True),
        "--seed": calls("--seed 3", PROBE, seed=3),
        "--batch-size": calls("--batch-size 3", PROBE, batch_size=3),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
        "--precision": (
            calls("--precision bf16", PREPARE, precision="bf16"),
            calls("--random --precision bf16", PREPARE, precision="bf16"),
            calls("--features pixels --precision bf16", "evaluation.features:feature_network", precision="bf16"),
            calls("--features mae:there --precision bf16", "evaluation.mae:open_mae", precision="bf16"),
        ),
        "--out": calls("--out x.json", WRITE, path=Path("x.json")),
        "--figure": calls("--figure x.png", "evaluation.probing:plot_probe", path=Path("x.png")),
        "--json": JSON,
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "denoise": {
        "model": calls("denoise other", OPEN, source="other"),
        "overrides": calls("data.flip=true", DENOISE, pipeline__recipe__data__flip=True),
        "--t": (
            calls("--t 0.25 --t 0.5", DENOISE, times=[0.25, 0.5]),
            calls("--noise x.png --t 0.25", NOISE, times=[0.25]),
        ),
        "--count": (calls("--count 3", DENOISE, count=3), calls("--noise x.png --count 3", NOISE, count=3)),
        "--noise": calls("--noise x.png", NOISE, path=Path("x.png")),
        "--seed": (calls("--seed 3", DENOISE, seed=3), calls("--noise x.png --seed 3", NOISE, seed=3)),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
        "--out": calls("--out x.png", DENOISE, path=Path("x.png")),
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "cost": {
        "recipe": calls("cost fashion-mnist", COST, recipe__data__name="idx"),
        "overrides": calls("backbone.depth=1", COST, recipe__backbone__depth=1),
        "--samplers": Text("--samplers", lambda out: "network evaluations" in out),
        "--json": JSON,
        "--device": calls("--device cpu", DEVICE, name="cpu"),
    },
    "encode": {
        "dataset": calls("encode folder:other", ENCODE, recipe__data__path="other"),
        "overrides": calls("data.labels=false", ENCODE, recipe__data__labels=False),
        "--out": calls("--out there", ENCODE, out=Path("there")),
        "--split": calls("--split test", ENCODE, splits=["test"]),
        "--dtype": calls("--dtype float16", ENCODE, dtype="float16"),
        "--batch-size": calls("--batch-size 3", ENCODE, batch_size=3),
        "--device": calls("--device cpu", ENCODE, device="cpu"),
    },
    "convert": {
        "source": calls("convert other made", CONVERT, source="other"),
        "out": calls("convert run there", CONVERT, out=Path("there")),
        "overrides": calls("convert run made seed=3 --recipe digits", CONVERT, recipe__seed=3),
        "--to": calls("--to diffusers", CONVERT, to="diffusers"),
        "--recipe": calls("--recipe digits", CONVERT, recipe__name="digits"),
        "--weights": calls("--weights model-ema-0.5", CONVERT, weights="model-ema-0.5"),
        "--vae": calls("--vae there", CONVERT, vae="there"),
    },
    "export-vit": {
        "model": calls("export-vit other", OPEN, source="other"),
        "--t": calls("--t 0.25", VIT, t=0.25),
        "--layers": calls("--layers 1", VIT, layers=1),
        "--out": calls("--out there", VIT, out=Path("there")),
        "--weights": calls("--weights model-ema-0.5", OPEN, weights="model-ema-0.5"),
    },
    "recipes": {
        "name": Text("recipes fashion-mnist", lambda out: "name: fashion-mnist" in out),
        "overrides": Text("seed=3", lambda out: "seed: 3" in out),
        "--json": JSON,
    },
    "env": {"--json": JSON},
    "cache": {
        "action": calls("cache clear", "cache:clear", kind=None),
        "kind": calls("cache clear classifiers", "cache:clear", kind="classifiers"),
        "--json": JSON,
    },
}


def parameters() -> dict[str, list[str]]:
    """The names of the parameters of every command, and of the program itself."""
    group = typer.main.get_command(cli.app)
    commands = {"": group} | dict(group.commands)  # type: ignore[attr-defined]
    return {
        name: [each.opts[0] if each.param_type_name == "option" else str(each.name) for each in command.params]
        for name, command in commands.items()
    }


def test_the_table_has_every_option() -> None:
    found = parameters()
    assert {command: sorted(rows) for command, rows in OPTIONS.items()} == {
        command: sorted(names) for command, names in found.items()
    }
    assert list(PLAIN) == list(OPTIONS)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with two averages, another, one of clips, a folder and a file of captions."""
    folder = tmp_path_factory.mktemp("options")
    short = (*TINY, "training.steps=1", "training.ema=[0.9,0.5]", "sampling=ode-euler", "sampling.steps=1")
    mezzotint.train(load_recipe("digits", short), folder / "run", quiet=True)
    shutil.copytree(folder / "run", folder / "other")
    clips = ("data={name: moving-digits, size: 16, frames: 2, examples: 4}", "training.batch_size=2")
    mezzotint.train(load_recipe("digits", [*short, *clips]), folder / "clips", quiet=True)
    (folder / "photos").mkdir()
    (folder / "captions.txt").write_text("a cat\n\ndogs\n")
    (folder / "study.md").write_text("| cell |\n")
    return folder


class _Called(Exception):
    """The function that is looked at was called."""


MISSING = object()


def looked_up(found: Mapping[str, Any], path: str) -> Any:
    value: Any = found
    for name in path.split("__"):
        value = value.get(name, MISSING) if isinstance(value, Mapping) else getattr(value, name, MISSING)
    return value


def words_of(command: str, typed: str) -> list[str]:
    words = shlex.split(typed)
    whole = not command or words[:1] == [command]
    return words if whole else [*shlex.split(PLAIN[command]), *words]


def said(words: Sequence[str], patch: pytest.MonkeyPatch) -> str:
    """The standard output of a command."""
    stand_in(patch)
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def given(words: Sequence[str], function: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments with which a command calls the function at first; none where it does not."""
    seen: list[dict[str, Any]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        bound = SIGNATURES[function].bind(*arguments, **options)
        bound.apply_defaults()
        seen.append(bound.arguments)
        raise _Called

    stand_in(patch)
    replace(function, spy, patch)
    result = CliRunner().invoke(cli.app, words)
    assert seen or result.exit_code == 0, (result.output, result.exception)
    return seen[0] if seen else {}


def stand_in(patch: pytest.MonkeyPatch) -> None:
    for place, value in STANDINS.items():
        replace(f"mezzotint.{place}", lambda *_, value=value, **__: value, patch)


def replace(function: str, by: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    owner, _, name = function.replace(":", ".").rpartition(".")
    patch.setattr(resolve_name(owner), name, by)


CASES = [
    pytest.param(command, effect, id=f"{command} {effect.typed}".strip())
    for command, rows in OPTIONS.items()
    for name, effects in rows.items()
    if not isinstance(effects, str)
    for effect in (effects if type(effects) is tuple else (effects,))
]


#: taken before any function is replaced
SIGNATURES = {
    effect.function: inspect.signature(resolve_name(effect.function))
    for _, effect in (case.values for case in CASES)
    if isinstance(effect, Call)
}


#: by command and function: what the plain command calls it with
plainly: dict[tuple[str, str], dict[str, Any]] = {}


@pytest.mark.parametrize(("command", "effect"), CASES)
def test_an_option_is_seen_and_without_it_is_not(
    command: str, effect: Call | Text, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    words, plain = words_of(command, effect.typed), shlex.split(PLAIN[command])
    if isinstance(effect, Text):
        assert effect.has(said(words, monkeypatch))
        assert not effect.has(said(plain, monkeypatch)), "the same without it"
        return
    found = given(words, effect.function, monkeypatch)
    assert {path: looked_up(found, path) for path in effect.values} == effect.values
    if (command, effect.function) not in plainly:
        plainly[command, effect.function] = given(plain, effect.function, monkeypatch)
    without = plainly[command, effect.function]
    assert {path: looked_up(without, path) for path in effect.values} != effect.values, "the same without it"


def test_a_study_that_is_unknown_is_refused() -> None:
    result = CliRunner().invoke(cli.app, ["study", "other"])
    assert isinstance(result.exception, MezzotintError)
