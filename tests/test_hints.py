"""A mistake is answered by what was meant: a key's section, a list's brackets, a folder, a run, an option."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, Command

from mezzotint.errors import closest, nearest
from mezzotint.recipe import Recipe
from mezzotint.settings import dotted_keys, unknown_key


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in runs/, and with one of pictures."""
    from mezzotint import load_recipe, train

    folder = tmp_path_factory.mktemp("hints")
    train(load_recipe("digits", TINY), folder / "runs" / "digits", quiet=True)
    (folder / "photos").mkdir()
    return folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        # keys
        ("train digits lr=1e-3", "key 'lr' is unknown; perhaps training.lr or representation.fit.lr"),
        ("train digits ema=[0.9]", "key 'ema' is unknown; perhaps training.ema"),
        ("train digits sampling.lora=2", "key 'sampling.lora' is unknown; perhaps training.lora"),
        ("train digits warmup_step=2", "key 'warmup_step' is unknown; closest: training.warmup_steps"),
        ("sample runs/digits eta=0.5", "key 'eta' is unknown; perhaps sampling.eta"),
        ("probe runs/digits size=8", "key 'size' is unknown; perhaps data.size"),
        ("train digits training.stages=[{levels: 1, steps: 1, lrs: 1}]", "stages.0.lrs' is unknown; closest: "),
        ("train digits guidance=2", "expected keys with values, in braces or a line each, or one alone, such as guid"),
        # lists
        ("train digits training.ema=0.999", "expected a list, such as training.ema=[0.999]"),
        ("train digits training.ema=0.999,0.9999", "expected a list, such as training.ema=[0.999,0.9999]"),
        ("train digits training.betas=0.9", "training.betas = 0.9 is not valid: expected a list of 2, such as "),
        ("train digits training.betas=[0.9]", "expected a list of 2, such as training.betas=[0.9,0.999]"),
        ("train digits training.betas=[0,0,0]", "expected a list of 2, such as training.betas=[0.9,0.999]"),
        ("train digits backbone.scan=column", "expected a list of at least 1, such as backbone.scan=[column]"),
        ("train digits backbone.scan=[]", "expected a list of at least 1, such as backbone.scan=[row]"),
        ("train digits training.lora.targets=attn.qkv", "such as training.lora.targets=[attn.qkv]"),
        ("train digits training.stages=low", "training.stages = 'low' is not valid: expected a list"),
        ("sample runs/digits guidance.interval=0.2,0.8", "such as guidance.interval=[0.2,0.8]"),
        # options that are keys, or close to others
        ("train digits --steps 100", "option '--steps' of 'mezzotint train' is unknown; a recipe's keys are set with"),
        ("train digits --steps 100", "without dashes: training.steps=100 (see 'mezzotint train --help')"),
        ("train digits --lr=1e-3", "without dashes: training.lr=1e-3 ("),
        ("train digits --batch-size 8", "without dashes: training.batch_size=8 ("),
        ("train digits --seed", "without dashes: seed=… ("),
        ("sample runs/digits --eta 0.5", "without dashes: sampling.eta=0.5 ("),
        ("sample runs/digits --lr 1", "option '--lr' of 'mezzotint sample' is unknown; "),
        ("train digits --ouy x", "option '--ouy' of 'mezzotint train' is unknown; closest: --out"),
        # other usage
        ("train digits --out", "option '--out' requires an argument"),
        ("train", "RECIPE is missing (see 'mezzotint train --help')"),
        ("trian digits", "command 'trian' is unknown; closest: train"),
        ("sample runs/digits --count y", "--count = 'y' is not valid: "),
        ("sample runs/digits --count=0", "--count = '0' is not valid: "),
        ("export-vit runs/digits a", "(a) (see 'mezzotint export-vit --help')"),
        # folders of pictures
        ("train digits data=photos", "data set 'photos' is unknown; a folder of pictures is data=folder:photos"),
        ("train digits data=fotos", "data set 'fotos' is unknown; "),
        ("train photos", "a folder of pictures is the data of a recipe, data=folder:photos"),
        # names
        ("train ", "recipe '' is unknown; none of the 55 known ones is close (see 'mezzotint recipes')"),
        ("train zzz", "recipe 'zzz' is unknown; none of the "),
        ("train digits sampling=ode-hien", "sampler 'ode-hien' is unknown; closest: ode-heun"),
        ("train digits guidance.scal=2", "key 'guidance.scal' is unknown; closest: scale"),
        ("evaluate runs/digits digts", "(closest: digits"),
        ("evaluate runs/digits fashion-mnits", "(closest: fashion-mnist"),
        ("evaluate runs/digits NOSUCH", "(known: digits, idx, folder, captions, "),
        ("evaluate runs/digts", "there are no images at 'runs/digts'; expected a folder of pictures"),
        ("evaluate runs/digts", "(closest: runs/digits)"),
        ("sweep runs/digits steps=1 --reference digts", "(closest: digits"),
        ("evaluate runs/digits --features inceptoin", "feature network 'inceptoin' is unknown; closest: inception"),
        ("sample digitz", "digitz is not a run folder, nor another checkpoint: there is no such file or folder here; "),
        ("sample runs/digts", "; closest: runs/digits"),
        ("sample digits", "give a checkpoint by --weights, or a run folder, such as runs/digits"),
    ],
)  # fmt: skip
def test_hints(command: Command, place: Path, monkeypatch: pytest.MonkeyPatch, words: str, sentence: str) -> None:
    monkeypatch.chdir(place)
    # What is to be fetched or fitted comes after the words are understood.
    monkeypatch.setattr("mezzotint.evaluation.scores.feature_network", lambda name, **_: pytest.fail(name))
    if "inceptoin" in words:
        monkeypatch.undo()
        monkeypatch.chdir(place)
    result = command(*(words.split(" ") if "{" not in words else words.split(" ", 2)))
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert result.out == ""
    assert sorted(path.name for path in place.iterdir()) == ["photos", "runs"]


def test_keys_are_found_in_every_section() -> None:
    keys = list(dotted_keys(Recipe))
    assert {"seed", "training", "training.lora.rank", "representation.fit.lr", "guidance.scale"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert unknown_key(Recipe, ["data", "rank"]) == "key 'data.rank' is unknown; perhaps training.lora.rank"


def test_no_command_is_help_and_a_mistake(command: Command) -> None:
    result = command()
    assert result.code == 2
    assert "Usage: mezzotint" in result.out + result.err


def test_names_that_are_near() -> None:
    names = ["mdm-64", "mdm-emoji-32", "digits"]
    assert nearest("emoji", names)[0] == "mdm-emoji-32", "one that contains the word"
    assert nearest("", names) == []
    assert closest("zzz", names) == "known: mdm-64, mdm-emoji-32, digits"
    assert closest("zzz", map(str, range(1000))) == "none of the 1,000 known ones is close"
