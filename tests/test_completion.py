"""What TAB completes, asked as shells ask it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from conftest import Command

from mezzotint.cli import app, completion
from mezzotint.recipe import load_recipe, recipe_names

HELD = ("model.safetensors", "recipe.yaml")  # by runs/one
Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """The words that fish is given behind ``mezzotint LINE``, in a folder with two runs, photos and a recipe."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
        (tmp_path / "runs" / name / "model.safetensors").touch()
    (tmp_path / "runs" / "two" / "model-ema-0.5.safetensors").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "mine.yaml").touch()
    monkeypatch.setenv("_MEZZOTINT_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")

    def run(line: str) -> list[str]:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"mezzotint {line}")
        result = command()
        assert (result.code, result.err) == (0, "")
        return [word.partition("\t")[0] for word in result.out.splitlines() if word]

    return run


def test_the_words_are_those_of_the_settings() -> None:
    """They are written by: python -c "from mezzotint.cli.completion import write; write()"."""
    assert completion.WORDS.read_text(encoding="utf-8") == completion.text(completion.vocabulary())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("exp", ["export-vit"]),
        ("train digi", ["digits"]),
        ("train mi", ["mine.yaml"]),
        ("train ru", ["runs/one", "runs/two"]),
        ("sample runs/t", ["runs/two"]),
        ("resume ", ["runs/one", "runs/two"]),
        ("convert ru", ["runs/one", "runs/two"]),
        ("convert runs/one out --to d", ["diffusers"]),
        ("sample runs/two --weights ", ["model", "model-ema-0.5"]),
        ("sample digits --weights ", []),
        ("train digits training.lr", ["training.lr=", "training.lr_schedule="]),
        ("train digits training.lora.r", ["training.lora.rank=", "training.lora.rank=0"]),
        ("train digits see", ["seed=", "seed=0"]),
        ("train digits interp", ["interpolant.", "interpolant="]),
        ("train digits interpolant=v", ["interpolant=vp", "interpolant=variance-exploding"]),
        ("train digits interpolant=vp target=v", ["target=velocity", "target=v"]),
        ("train digits backbone=dit-xl-", ["backbone=dit-xl-8", "backbone=dit-xl-4", "backbone=dit-xl-2"]),
        ("train digits training.compile=", ["training.compile=true", "training.compile=false"]),
        ("train digits sampling.sampler=dd", ["sampling.sampler=ddpm", "sampling.sampler=ddim"]),
        ("train digits sampling=sde-heun-s", [f"sampling=sde-heun-{form}" for form in ("sigma", "sbdm", "sin2")]),
        ("train digits data=fo", ["data=folder:", "data=folder:mine.yaml", "data=folder:photos/", "data=folder:runs/"]),
        ("train digits data=folder:ph", ["data=folder:photos/", "data=folder:photos/cat/"]),
        ("train digits data.path=mi", ["data.path=mine.yaml"]),
        ("train digits init=runs/o", ["init=runs/one/", *(f"init=runs/one/{name}" for name in HELD)]),
        ("train digits mae.", []),
        ("train digits nonsense.", []),
        ("train-mae digits mae.dep", ["mae.depth=", "mae.depth=null"]),
        ("finetune runs/one finetune.mix", ["finetune.mixup=", "finetune.mixup=0.8"]),
        ("finetune runs/one training.", []),
        ("sample runs/one tr", []),
        ("sample runs/one data.", []),
        ("probe runs/one data.si", ["data.size=", "data.size=8"]),
        ("sample digits training.gr", ["training.grad_clip=", "training.grad_clip=null"]),
        ("sample runs/one --sampler dp", ["dpm-solver++"]),
        ("evaluate runs/one --features cl", ["clip", "classifier"]),
        ("evaluate fol", ["folder:"]),
        ("evaluate folder:ph", ["folder:photos/", "folder:photos/cat/"]),
        ("evaluate runs/one folder:ph", ["folder:photos/", "folder:photos/cat/"]),
        ("evaluate runs/one guid", ["guidance.scale=", "guidance.interval=", "guidance.channels="]),
        ("probe runs/one --features mae", ["mae:"]),
        ("probe runs/one --probe linear,k", ["linear,knn"]),
        ("sweep runs/one s", ["sampler=", "steps=", "sampling.", "sampling="]),
        ("sweep runs/one sampler=ddim,ode-h", ["sampler=ddim,ode-heun"]),
        ("encode webd", ["webdataset:"]),
        ("encode digits --dtype b", ["bfloat16"]),
        ("study ldae --data f", ["fashion-mnist"]),
        ("train digits --device c", ["cpu", "cuda"]),
        ("cache c", ["clear"]),
        ("cache clear c", ["classifiers", "captions"]),
        ("train digits --out ph", []),  # which leaves files and folders to the shell
    ],
)  # fmt: skip
def test_words(line: str, words: list[str], complete: Complete, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion.glob, "glob", _no_gpus(completion.glob.glob))
    assert complete(line) == words


def _no_gpus(found: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    return lambda pattern: [] if pattern.startswith("/dev") else found(pattern)


def test_every_recipe_and_every_key_is_offered(complete: Complete) -> None:
    assert complete("cost ") == [*recipe_names(), "runs/one", "runs/two", "mine.yaml"]
    sections = [word for word in complete("cost digits ") if word.endswith(".")]
    offered = {word.rstrip("=") for section in sections for word in complete(f"cost digits {section}")}

    def keys(values: object, path: str) -> set[str]:
        if not isinstance(values, dict):
            return {path}
        return {found for key, value in values.items() for found in keys(value, f"{path}.{key}" if path else key)}

    assert offered == {key for key in keys(load_recipe("digits").model_dump(), "") if "." in key}


@pytest.mark.parametrize(
    ("words", "at", "found"),
    [
        (["interpolant", "=", "gv"], 2, ["gvp"]),
        (["interpolant", "="], 1, ["linear", "gvp", "vp", "ddpm", "cosine", "linear-variance", "variance-exploding"]),
        (["interpolant=gv"], 0, ["interpolant=gvp"]),
        (["data", "=", "folder", ":", "ph"], 4, ["photos/", "photos/cat/"]),
        (["training.lora.r"], 0, ["training.lora.rank=", "training.lora.rank=0"]),
    ],
)
def test_bash_breaks_words_at_signs(
    words: list[str], at: int, found: list[str], complete: Complete, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["mezzotint", "train", "digits", *words]
    monkeypatch.setenv("_MEZZOTINT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(line))
    monkeypatch.setenv("COMP_CWORD", str(3 + at))
    assert command().out.split() == found


def test_nothing_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = typer.Context(typer.main.get_command(app))
    completers = [found for name, found in vars(completion).items() if name.startswith("complete_")]
    completers = [one() if one is completion.complete_overrides else one for one in completers]
    completers = [one("--sampler") if one is completion.complete_option else one for one in completers]
    words = ("", "=", "a=", "=:", "[", "data=[:", "\udcff", "data=folder:~nobody/", "x" * 5000, "-", "init=\0", "mine")
    for model in ("", "\0", "digits", "a" * 5000):
        context.params = {"model": model}
        assert all(isinstance(one(context, word), list) for one in completers for word in words)
    monkeypatch.setattr(completion, "WORDS", tmp_path / "missing")
    completion.words.cache_clear()
    assert completion.complete_overrides()(context, "tr") == []
    completion.words.cache_clear()


def test_what_is_called_when_an_option_is_parsed_is_left_out(complete: Complete) -> None:
    assert complete("--version trai") == ["train", "train-mae"]
    assert complete("sample runs/one --seed -1 --sampler ode-e") == ["ode-euler"]


@pytest.mark.parametrize(
    ("line", "first"),
    [("train digits training.lora.r", "training.lora.rank="), ("sample x --sampler ode-e", "ode-euler")],
)
def test_completion_is_quick(line: str, first: str) -> None:
    """It imports nothing that takes long."""
    code = "import sys, atexit; atexit.register(lambda: print(*sys.modules)); from mezzotint.cli import main; main()"
    fish = {"_MEZZOTINT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asked = {**os.environ, **fish, "_TYPER_COMPLETE_ARGS": f"mezzotint {line}"}
    words = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True).stdout.split()
    assert words[0] == first
    assert {"torch", "numpy", "yaml", "sklearn"} & {*words} == set()
