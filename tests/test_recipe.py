"""Recipes: what is in them, how they are overridden, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.backbones import DIT_CONFIGS
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.pipeline import build_denoiser
from mezzotint.recipe import Recipe, load_recipe, override_recipe, recipe_names

PUBLISHED = [f"{name}-256" for name in DIT_CONFIGS] + ["dit-xl-2-512"]
PUBLISHED += ["sit-s-2-256", "sit-b-2-256", "sit-l-2-256", "sit-xl-2-256", "sit-xl-2-512"]


def test_every_published_configuration_has_a_recipe() -> None:
    diffussm = [f"diffussm-{size}-{side}" for size in ("s", "l", "xl") for side in (256, 512)]
    diffussm += ["diffussm-xl-256-p2", "diffussm-xl-256-uni", "diffussm-digits", "diffussm-fashion-mnist"]
    mdm = ["mdm-64", "mdm-256", "mdm-1024", "mdm-video-256", "mdm-emoji-32", "mdm-moving-digits"]
    small = ["digits", "fashion-mnist", "dae-digits", "dae-fashion-mnist"]
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
