"""Recipes: what is in them, how they are overridden, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.backbones import DIT_CONFIGS
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.guidance import Guidance
from mezzotint.pipeline import build_denoiser
from mezzotint.recipe import DataSettings, Recipe, TrainingSettings, load_recipe, override_recipe, recipe_names

PUBLISHED = [f"{name}-256" for name in DIT_CONFIGS] + ["dit-xl-2-512"]
PUBLISHED += ["sit-s-2-256", "sit-b-2-256", "sit-l-2-256", "sit-xl-2-256", "sit-xl-2-512"]


def test_every_published_configuration_has_a_recipe() -> None:
    diffussm = [f"diffussm-{size}-{side}" for size in ("s", "l", "xl") for side in (256, 512)]
    diffussm += ["diffussm-xl-256-p2", "diffussm-xl-256-uni", "diffussm-digits", "diffussm-fashion-mnist"]
    mdm = ["mdm-64", "mdm-256", "mdm-1024", "mdm-video-256", "mdm-emoji-32", "mdm-moving-digits"]
    small = ["digits", "fashion-mnist", "dae-digits", "dae-fashion-mnist"]
    small += ["photos-32", "photos-64", "photos-256-latent"]
    ldae = [name for name in recipe_names() if name.startswith("ldae-")]  # see test_ldae.py
    assert sorted([*PUBLISHED, *diffussm, *mdm, *ldae, *small]) == recipe_names()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyper_parameters(name: str) -> None:
    """The papers' training: batch 256, constant 1e-4, no decay, no warm-up, EMA 0.9999, flips, 10 % drop-out."""
    recipe = load_recipe(name)
    training = recipe.training
    assert (training.batch_size, training.lr, training.lr_schedule) == (256, 1e-4, "constant")
    assert (training.weight_decay, training.warmup_steps, training.ema, training.ema_warmup) == (0, 0, (0.9999,), False)
    assert recipe.data.flip
    assert recipe.objective.condition_dropout == 0.1
    assert recipe.backbone.num_classes == 1000
    size = int(name.rsplit("-", 1)[1])
    assert recipe.data.size == size
    assert recipe.latent_shape == (4, size // 8, size // 8)
    assert recipe.representation.scale == 0.18215
    sizes = DIT_CONFIGS[name.replace("sit", "dit").rsplit("-", 1)[0]]
    assert recipe.backbone.model_dump(include=set(sizes)) == sizes
    if name.startswith("dit"):
        assert (recipe.interpolant.name, recipe.target, recipe.variance) == ("ddpm", "noise", "learned")
        assert (recipe.sampling.sampler, recipe.sampling.steps) == ("ddpm", 250)
    else:
        assert (recipe.interpolant.name, recipe.target, recipe.variance) == ("linear", "velocity", "unused")
        assert (recipe.sampling.sampler, recipe.sampling.diffusion, recipe.sampling.steps) == ("sde", "sigma", 250)


def test_dit_sees_its_step_index_and_sit_reversed_time() -> None:
    for name, t, expected in (("dit-s-8-256", 0.001, 0.0), ("dit-s-8-256", 1.0, 999.0), ("sit-s-2-256", 0.25, 0.75)):
        scale, offset = load_recipe(name).time_input
        assert scale * t + offset == pytest.approx(expected)


def test_sit_costs_what_dit_costs() -> None:
    assert recipe_cost(load_recipe("sit-xl-2-256")).params == 675_129_632


def test_a_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe("dit-b-4-256", ["training.lr=3e-4", "guidance.interval=[0.1, 0.7]"])
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "mine.yaml") == recipe


def test_a_file_may_extend_a_recipe_and_take_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: digits\nbackbone: {depth: 7}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.name, recipe.backbone.depth, recipe.backbone.width) == (
        "mine",
        7,
        load_recipe("digits").backbone.width,
    )


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("interpolant=gvp", lambda r: r.interpolant.name, "gvp"),
        ("data=folder:/photos", lambda r: (r.data.name, r.data.path, r.data.size), ("folder", "/photos", 8)),
        ("sampling=sde-heun-linear", lambda r: (r.sampling.sampler, r.sampling.diffusion), ("sde-heun", "linear")),
        (
            "backbone=dit-b-4",
            lambda r: (r.backbone.width, r.backbone.patch_size, r.backbone.num_classes),
            (768, 4, None),
        ),
        ("training.ema=[0.9, 0.99]", lambda r: r.training.ema, (0.9, 0.99)),
        ("training.lr=2e-3", lambda r: r.training.lr, 2e-3),
        ("guidance.channels=null", lambda r: r.guidance.channels, None),
    ],
)
def test_overrides(override: str, read: object, expected: object) -> None:
    assert read(load_recipe("digits", [override])) == expected  # type: ignore[operator]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.stps=1", r"key 'training\.stps' is unknown; closest: steps"),
        ("trainin.steps=1", r"key 'trainin' is unknown; closest: training"),
        ("training.steps=0", r"training\.steps = 0 is not valid: input should be greater than or equal to 1"),
        ("training.steps=many", r"training\.steps = 'many' is not valid: input should be a valid integer"),
        ("sampling.steps=-3", r"sampling\.steps = -3 is not valid"),
        ("sampling=dpmm", r"sampler 'dpmm' is unknown; closest: ddpm"),
        ("sampling=sde-sgma", r"sde diffusion 'sgma' is unknown; closest: sigma"),
        ("guidance.interval=[-0.5, 1]", r"guidance\.interval must be two times with 0 <= low <= high <= 1"),
        ("guidance.interval=[0.8, 0.2]", r"guidance\.interval must be two times with 0 <= low <= high <= 1"),
        ("guidance.scale=-1", r"guidance\.scale = -1 is not valid"),
        ("backbone=dit-xxl-2", r"backbone 'dit-xxl-2' is unknown; closest: dit-xl-2, dit-l-2"),
        ("backbone.patch_size=3", r"the input is 8 × 8, which a patch of 3 does not divide"),
        ("interpolant=linaer", r"interpolant\.name = 'linaer' is not valid: input should be 'linear', "),
        ("target=epsilon", r"target = 'epsilon' is not valid: input should be 'data', 'noise'"),
        ("data=mnits", r"data set 'mnits' is unknown; known: digits|closest"),
        ("training", r"override 'training' is not of the form key=value"),
        ("backbone={name: unet, channels: []}", r"backbone\.channels = .* expected a list of at least 1"),
        ("training.ema=[0.9", r"not valid YAML"),
    ],
)  # fmt: skip
def test_bad_overrides_are_one_clear_sentence(override: str, sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence) as caught:
        load_recipe("digits", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_is_met_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match=r"'dit-xxl-2-256' is unknown; closest: dit-xl-2-256.*mezzotint recipes"):
        load_recipe("dit-xxl-2-256")
    with pytest.raises(MezzotintError, match="'dit-xl-2' is unknown; closest: dit-xl-2-256, dit-xl-2-512"):
        load_recipe("dit-xl-2")
    with pytest.raises(MezzotintError, match="there is no recipe file or run folder at"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(MezzotintError, match="is not a recipe: expected a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(MezzotintError, match="is not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["variance=learned"], "a learned variance needs an interpolant with steps"),
        (["objective.times=discrete"], "'discrete' needs an interpolant with steps"),
        (["variance=learned", "interpolant=ddpm", "objective.times=uniform"], "must be discrete, not uniform"),
    ],
)
def test_combinations_that_mean_nothing_fail_when_built(tiny: Recipe, overrides: list[str], sentence: str) -> None:
    from mezzotint.training.loop import make_objective

    recipe = override_recipe(tiny, overrides)
    with pytest.raises(MezzotintError, match=sentence):
        make_objective(recipe, build_denoiser(recipe))


# ---- What was typed --------------------------------------------------------------------------------------------------

PLAIN = ["2024", "20240101", "2024-01-31", "001", "1e-4", "no", "true", "0x10", "1:30", ".inf", "a[b]", "élan"]
TYPED = [*PLAIN, "a: b", "[raw] photos", "photo #1", "#1", "{x}", "*", "&a b", "!x", "- a", "%a", "@a", "'a' b"]


@pytest.mark.parametrize("typed", TYPED)
def test_a_text_is_what_was_typed(typed: str) -> None:
    """YAML 1.1 has numbers, dates, booleans, comments, lists or mistakes for all of these."""
    overrides = [f"data=folder:{typed}", f"init={typed}", f"condition.encoder={typed}", f"description={typed}"]
    recipe = load_recipe("digits", overrides)
    assert (recipe.data.name, recipe.data.path) == ("folder", typed)
    assert (recipe.init, recipe.condition.encoder, recipe.description) == (typed, typed, typed)


@pytest.mark.parametrize("typed", PLAIN)
def test_a_text_of_a_file_is_what_was_typed(tmp_path: Path, typed: str) -> None:
    (tmp_path / "r.yaml").write_text(
        f"extends: digits\nname: {typed}\ninit: {typed}\ntraining:\n  freeze:\n  - {typed}\n  - x\n", encoding="utf-8"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.name, recipe.init, recipe.training.freeze) == (typed, typed, (typed, "x"))
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("training.lr=1e-4", lambda r: r.training.lr, 1e-4),
        ("training.lr=.5", lambda r: r.training.lr, 0.5),
        ("training.steps=1_000", lambda r: r.training.steps, 1000),
        ("training.steps=010", lambda r: r.training.steps, 10),
        ("training.steps=0x10", lambda r: r.training.steps, 16),
        ("training.compile=yes", lambda r: r.training.compile, True),
        ("data.labels=no", lambda r: r.data.labels, False),
        ("seed=18446744073709551615", lambda r: r.seed, 2**64 - 1),
        ("init=null", lambda r: r.init, None),
        ("init=", lambda r: r.init, None),
        ('init="null"', lambda r: r.init, "null"),
        ("init='a b'", lambda r: r.init, "a b"),
        ("data={name: folder, path: 2024}", lambda r: (r.data.name, r.data.path), ("folder", "2024")),
        ('data="folder:2024"', lambda r: (r.data.name, r.data.path), ("folder", "2024")),
        ("training.lora={rank: 0, targets: [no, 7]}", lambda r: r.training.lora.targets, ("no", "7")),
        ('sampling.sampler="sde-sigma"', lambda r: (r.sampling.sampler, r.sampling.diffusion), ("sde", "sigma")),
        ("backbone.scan=[row, column]", lambda r: r.backbone.scan, ("row", "column")),
    ],
)
def test_a_value_is_what_its_field_has(override: str, read: object, expected: object) -> None:
    start = "diffussm-digits" if "scan" in override else "digits"
    assert read(load_recipe(start, [override])) == expected  # type: ignore[operator]


def _bomb(item: str) -> str:
    """A mapping that with aliases written out has 9^9 values."""
    lines = [f"{name}: &{name} {item.format(','.join([f'*{below}'] * 9))}\n" for below, name in pairwise("abcdefghi")]
    return "a: &a {k: 1}\n" + "".join(lines)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a recipe: expected a mapping"),
        ("hello", "is not a recipe: expected a mapping"),
        ("data: null", "data = None is not valid: expected keys with values"),
        ("data: [1]", r"data = \[1\] is not valid: expected keys with values"),
        ("backbone: [1]", r"backbone = \[1\] is not valid: expected keys with values"),
        ("backbone: {name: [1]}", r"backbone \['1'\] is unknown"),
        ("sampling: [1]", r"sampling = \[1\] is not valid: expected keys with values"),
        ("training: 5", "training = 5 is not valid: expected keys with values"),
        ("guidance: 4", "guidance = 4 is not valid: expected keys with values"),
        ("training: {lora: 4}", r"training\.lora = 4 is not valid: expected keys with values"),
        ("training: {stages: [5]}", r"training\.stages\.0 = 5 is not valid: expected keys with values"),
        ("backbone: {name: unet, channels: [], tubelet_size: 2}", r"backbone\.channels = \[\] is not valid"),
        ("seed: {a: 1}", r"seed = \{'a': '1'\} is not valid"),
        ("name: null", "name = None is not valid"),
        ("extends: [digits]", r"extends \['digits'\]; expected a recipe's name"),
        ("seed: 2024-99-99", "seed = '2024-99-99' is not valid"),
        ("seed: " + "9" * 5000, "is not valid: it is too large for a number"),
        ("seed: " + "9" * 4000, "is not valid: it is too large for a number"),
        ("seed: '" + "9" * 4000 + "'", "is not valid: it is too large for a number"),
        ("seed: 0x" + "f" * 5000, "is not valid: it is too large for a number"),
        ("seed: 18446744073709551616", "the seed is a number of 65 bits"),
        ("training: {lr: 1e999}", r"training\.lr = '1e999' is not valid: it is too large for a number"),
        ("training: {ema: [" + "9" * 5000 + "]}", r"training\.ema = .* is not valid: it is too large for a number"),
        ("seed: 1\nseed: 2", "line 2 gives the key 'seed' a second time"),
        ("data: {path: a, path: b}", "gives the key 'path' a second time"),
        ("a: !!python/object/apply:os.system [ls]", "line 1 has the tag 'python/object/apply:os.system'"),
        ("description: !!binary aGk=", "line 1 has the tag 'binary'"),
        ("[a]: 1", "line 1 has a key that is no word"),
        ("a: *b", "is not valid YAML: line 1: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "is not valid YAML: line 2: expected a single document"),
        ("a: \x01", "is not valid YAML: unacceptable character"),
        ("data: &a {path: *a}", "it is nested too deeply"),
        ("a: " + "[" * 60_000, "it is nested too deeply"),
        ("a: " + "{a: " * 15_000, "it is nested too deeply"),
        ("- " * 30_000, "it is nested too deeply"),
        (_bomb("[{}]"), "it means more than 10,000 values, aliases written out"),
        (_bomb("{{<<: [{}]}}"), "it means more than 10,000 values, aliases written out"),
        ("#" * 70_000, "is not a recipe: it has more than 65,536 bytes"),
        ("x" * 1000 + ": 1", r"key 'xxx+\.\.\.xxx+' is unknown"),
        *((f'name: "{name}"', "expected the name of a folder") for name in ("../x", "a/b", r"a\\b", "..", "", r"a\nb")),
        (f"name: {'x' * 300}", "expected the name of a folder, of at most 200 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(MezzotintError, match=sentence) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_merge_keys_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    text = "extends: digits\nbackbone: &a {depth: 2, heads: 3}\nrepresentation: {name: pixels}\n"
    (tmp_path / "r.yaml").write_text(text + "data: {<<: {size: 16, channels: 1}, size: 8}\n", encoding="utf-8-sig")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.data.size, recipe.data.channels, recipe.backbone.depth) == (8, 1, 2)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "r.yaml").write_text("description: é", encoding=encoding)
    with pytest.raises(MezzotintError, match=r"r\.yaml is not a text in UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_a_loop_of_extends_ends(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"extends: {b}\n")
    b.write_text(f"extends: {tmp_path}/../{tmp_path.name}/a.yaml\n")
    for path in (a, b):
        with pytest.raises(MezzotintError, match="extends itself"):
            load_recipe(path)


def test_a_name_that_no_file_can_have_is_an_unknown_recipe() -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(MezzotintError, match="is unknown"):
            load_recipe(name)


def test_numbers_given_in_python_may_be_too_large_too() -> None:
    with pytest.raises(MezzotintError, match=r"training\.steps = a whole number of 16,610 bits is not valid"):
        Recipe.parse({"name": "x", "training": {"steps": 10**5000}})
    with pytest.raises(MezzotintError, match=r"Recipe = \[1\] is not valid"):
        Recipe.parse([1])  # type: ignore[arg-type]


def test_every_field_is_documented() -> None:
    from pydantic import BaseModel

    def undocumented(settings: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in settings.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += undocumented(inner, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undocumented(Recipe) == []


SAME = [
    (["training.steps=5"], {"training.steps": 5}),
    (["training.steps=5"], {"training": {"steps": 5}}),
    (["training.lora.rank=0", "training.lr=1e-4"], {"training": {"lora.rank": 0, "lr": 1e-4}}),
    (["training.betas=[0.5, 0.6]"], {"training.betas": (0.5, 0.6)}),
    (["training.lr=0.25", "training.steps=7"], {"training": {"lr": np.float32(0.25), "steps": np.int64(7)}}),
    (["training.ema=[0.5]"], {"training.ema": torch.tensor([0.5])}),
    (["guidance.interval=[0.25, 0.5]"], {"guidance.interval": np.array([0.25, 0.5])}),
    (["training.grad_clip=null", "data.path=null"], {"training.grad_clip": None, "data": {"path": None}}),
    (["data=folder:photos"], {"data": "folder:photos"}),
    (["data.path=a/b"], {"data.path": Path("a") / "b"}),
    (['data.path="null"'], {"data.path": "null"}),
    (["interpolant=gvp", "backbone=dit-s-4"], {"interpolant": "gvp", "backbone": {"name": "dit-s-4"}}),
    (["guidance.scale=2", "guidance.channels=null"], {"guidance": Guidance(scale=2)}),
    (["training.steps=5", "training.steps=6"], {"training": {"steps": 5}, "training.steps": 6}),
    (["training.steps=5"], "training.steps=5"),
    (["training.steps=5"], (text for text in ["training.steps=5"])),
]


@pytest.mark.parametrize(("texts", "values"), SAME)
def test_values_of_python_mean_what_texts_mean(texts: list[str], values: Any) -> None:
    assert load_recipe("dit-b-4-256", values) == load_recipe("dit-b-4-256", texts)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["training.stepz=5"], {"training": {"stepz": 5}}),
        (["training=5"], {"training": 5}),
        (["training.steps=0"], {"training.steps": 0}),
        (["backbone.width=[1, 2]"], {"backbone": {"width": (1, 2)}}),
        (["interpolant=lineal"], {"interpolant": "lineal"}),
        (["sampling.sampler=ddmi"], {"sampling": {"sampler": "ddmi"}}),
    ],
)
def test_a_mistake_among_them_is_the_same_sentence(texts: list[str], values: dict[str, Any]) -> None:
    said = []
    for overrides in (texts, values):
        with pytest.raises(MezzotintError) as error:
            override_recipe(load_recipe("digits"), overrides)  # type: ignore[arg-type]
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({3: 4}, "key 3 is no name of a setting"),
        ({"training..steps": 4}, "key 'training..steps' is no name of a setting"),
        ([("training.steps", 5)], r"override \('training.steps', 5\) is not of the form key=value"),
        (5, "overrides are key=value texts, or a mapping from keys to values, not 5"),
    ],
)
def test_what_is_no_override(overrides: Any, sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        load_recipe("digits", overrides)


def test_every_option_of_a_data_set_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("mezzotint.recipe.data.load", lambda name, split, **options: told.update(options))
    given = {"path": "pictures", "size": 24, "channels": 3, "labels": False, "background": "red"}
    given |= {"test_fraction": 0.25, "max_unreadable": 3}
    DataSettings.parse({"name": "folder", **given}).load("train")
    assert told == given


def test_a_decay_begins_after_the_warm_up() -> None:
    """Half way from the last step of the warm-up to the end: (1 + cos(π / 2)) / 2, and a half."""
    settings = TrainingSettings(steps=30, warmup_steps=10, lr_schedule="cosine", lr=1)
    assert settings.lr_scale(10) == 1
    assert settings.lr_scale(20) == pytest.approx(0.5)
    assert settings.model_copy(update={"lr_schedule": "linear"}).lr_scale(25) == pytest.approx(0.25)
