"""Recipes for their reader: `mezzotint recipes` lists them by family, and prints one with what its keys mean."""

from __future__ import annotations

import json
import re
from inspect import signature
from pathlib import Path

import pytest
import yaml
from conftest import Command

from mezzotint.data import SOURCES
from mezzotint.described import FAMILIES, WIDTH, described, family
from mezzotint.recipe import (
    NETWORK_OPTIONS,
    BackboneSettings,
    DataSettings,
    Recipe,
    load_recipe,
    recipe_names,
)

#: overrides that give each part of a recipe other words
CHANGES = (
    ("backbone=unet", "backbone.channels=[8,16]", "backbone.resblocks=[1,1]", "backbone.groups=8"),
    ("interpolant=vp", "interpolant.beta_max=9", "sampling=sde-linear"),
    ("objective.noise_level=0.25", "sampling.rtol=0.5", "data.size=8"),  # that mean nothing, but were changed
    ("name='no'", 'description="1: # x"', "init=a #b", "data.path=null", "training.freeze=[a.*, '!b']"),
    ("description=" + "a very long one " * 20,),
)


def keys(text: str, section: str) -> set[str]:
    return set(yaml.safe_load(text)[section])


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_printed_is_the_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "mine.yaml").write_text(described(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == recipe
    assert max(map(len, described(recipe).splitlines())) <= WIDTH


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: changes[0][:20])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_so_it_is_after_any_change(changes: tuple[str, ...], ascii_only: bool, tmp_path: Path) -> None:
    recipe = load_recipe("digits", changes)
    (tmp_path / "mine.yaml").write_text(described(recipe, ascii_only=ascii_only), encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == recipe
    assert described(recipe, ascii_only=ascii_only).isascii() is ascii_only


@pytest.mark.parametrize(("network", "name"), [("dit", "digits"), ("diffussm", "diffussm-digits"), ("unet", "mdm-64")])
def test_a_network_has_its_own_keys_alone(network: str, name: str) -> None:
    shown = keys(described(load_recipe(name)), "backbone")
    others = {key for options in NETWORK_OPTIONS.values() for key in options} - {*NETWORK_OPTIONS[network]}
    assert not shown & others
    assert {*NETWORK_OPTIONS[network]} - shown <= {"tubelet_size", "temporal_attention"}, "which are of clips"
    clips = keys(described(load_recipe("mdm-moving-digits")), "backbone")
    assert {"tubelet_size", "temporal_attention"} <= clips


def test_a_data_set_has_its_own_keys_alone() -> None:
    for name, source in SOURCES.items():
        changes = [f"data={name}", "data.path=x", "data.size=32", "data.flip=false"]
        shown = keys(described(load_recipe("dit-s-2-256", [*changes, "data.workers=0"])), "data")
        extra = {"path"} if "path" not in signature(source).parameters else set()  # it was given all the same
        assert shown - extra == {"name", "flip", "workers"} | (
            {*signature(source).parameters} & {*DataSettings.model_fields}
        )


@pytest.mark.parametrize(
    ("changes", "there", "missing"),
    [
        ((), "interpolant: snr_divisor", "interpolant: beta_min beta_max num_steps sigma_max snr_power"),
        (("interpolant=vp",), "interpolant: beta_min beta_max", "interpolant: num_steps"),
        (("interpolant=cosine",), "interpolant: num_steps", "interpolant: beta_min"),
        (("sampling=sde-heun-sbdm",), "sampling: diffusion diffusion_scale last_step", "sampling: eta rtol variance"),
        (("sampling=ddim",), "sampling: eta spacing", "sampling: diffusion atol"),
        (("sampling.threshold=dynamic",), "sampling: threshold_quantile", "sampling: eta"),
        (("objective.times=uniform",), "objective: times", "objective: time_mean noise_level min_snr_gamma"),
        (("objective.weighting=min-snr",), "objective: min_snr_gamma", "objective: vlb_weight level_weights"),
        ((), "training: precision lr", "training: ssm_lr stages"),
        ((), "representation: name", "representation: fit path stride slicing"),
        (
            ("representation=kl", "representation.stride=2"),
            "representation: path stride slicing precision",
            "representation: fit",
        ),
        (
            ("representation=patch-pca", "representation.stride=2"),
            "representation: path fit",
            "representation: scale tiling",
        ),
        (("condition=text",), "condition: encoder max_tokens", "guidance: fit"),
        ((), "condition: name", "condition: encoder precision"),
    ],
)
def test_other_keys_go_with_the_recipes_words(changes: tuple[str, ...], there: str, missing: str) -> None:
    text = described(load_recipe("digits", changes))
    for words, present in ((there, True), (missing, False)):
        section, wanted = words.split(": ")
        assert all((key in keys(text, section)) is present for key in wanted.split())


def test_docstrings_name_the_networks_and_data_sets_that_take_a_key() -> None:
    """The words at their beginning, which the reader is shown, are those of the code."""
    for settings, takers in (
        (BackboneSettings, NETWORK_OPTIONS),
        (DataSettings, {name: tuple(signature(source).parameters) for name, source in SOURCES.items()}),
    ):
        for key, field in settings.model_fields.items():
            beginning, colon, _ = (field.description or "").partition(":")
            parts = re.split(r"[,;] | \(\w+\),? ?", beginning)
            named = {part for part in parts if part in takers}
            if colon and parts[0] in takers and key != "name":
                taking = {name for name, options in takers.items() if key in options}
                assert named <= taking, key
                assert all(re.search(rf"\b{name}\b", str(field.description)) for name in taking), key


def test_every_key_has_its_meaning_beside_it() -> None:
    text = described(load_recipe("digits"))
    assert re.search(r"^  lr: 0\.004 +# Peak learning rate\.$", text, re.MULTILINE)
    assert re.search(r"^interpolant: +# alpha\(t\) and sigma\(t\)\.$", text, re.MULTILINE)
    assert len(re.findall(r"^ *\w+:(?!.*#)", text, re.MULTILINE)) == 1, "only the description's is above it"


# ---- The list --------------------------------------------------------------------------------------------------------


def test_a_family_is_told_by_the_words() -> None:
    families = {name: family(load_recipe(name)) for name in recipe_names()}
    assert set(families.values()) <= {*FAMILIES}
    for beginning, title in (("dit-", "DiT"), ("sit-", "SiT"), ("ldae-", "l-DAE"), ("diffussm-xl", "DiffuSSM")):
        assert {families[name] for name in families if name.startswith(beginning)} == {title}
    assert families["digits"] == families["mdm-emoji-32"] == FAMILIES[0]
    assert families["mdm-64"] == "Matryoshka networks"
    assert families["dae-digits"] == "l-DAE", "its baseline"
    assert family(load_recipe("digits", ["data=folder", "data.path=null"])) == "Your own pictures"


def test_recipes_are_listed_by_family(command: Command) -> None:
    shown = command("recipes").out
    titles = [line.strip() for line in shown.splitlines() if line.strip() in FAMILIES]
    assert titles == [title for title in FAMILIES if title in titles]
    listed = [line.split("  ")[0] for line in shown.splitlines() if line and line.strip() not in FAMILIES]
    assert sorted(listed) == recipe_names()
    assert listed[0] == "digits"
    listing = json.loads(command("recipes", "--json").out)
    assert [entry["recipe"] for entry in listing] == listed
    assert listing[0] == {
        "recipe": "digits",
        "family": FAMILIES[0],
        "description": load_recipe("digits").description,
    }


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("ldae-05", ["ldae-05a-patch-vae", "ldae-05b-patch-ae", "ldae-05c-patch-pca"]),
        ("sit-*-512", ["sit-xl-2-512"]),
        ("*digits", ["digits", "diffussm-digits", "mdm-moving-digits", "dae-digits"]),
    ],
)
def test_a_part_of_names_lists_those(command: Command, name: str, listed: list[str]) -> None:
    assert [entry["recipe"] for entry in json.loads(command("recipes", name, "--json").out)] == listed
    refused = command("recipes", name, "seed=1")
    assert refused.code == 2
    assert f"seed=1 changes one recipe; name one of {', '.join(sorted(listed))}" in refused.err


def test_a_whole_name_prints_that_recipe(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "copy.yaml"
    mine.write_text(command("recipes", "digits", "seed=5").out, encoding="utf-8")
    assert load_recipe(mine) == load_recipe("digits", ["seed=5"])
    assert command("recipes", mine).out == mine.read_text(encoding="utf-8")
    assert Recipe.parse(json.loads(command("recipes", mine, "--json").out)) == load_recipe(mine)
    monkeypatch.chdir(tmp_path)
    mine.rename("sit")
    assert command("recipes", "sit").out == Path("sit").read_text(encoding="utf-8"), "a file, and no part of names"
    assert "recipe 'digitz' is unknown" in command("recipes", "digitz").err
