"""`mezzotint.__all__`: that it is shown, what its objects look like, and what a plain mistake is answered."""

from __future__ import annotations

import pydoc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mezzotint
from mezzotint import MezzotintError, Pipeline
from mezzotint.randomness import mix


def test_everything_public_is_shown_and_exists() -> None:
    assert set(mezzotint.__all__) <= set(dir(mezzotint))
    assert not [name for name in dir(mezzotint) if name.startswith("_") and not name.endswith("__")]
    assert not [name for name in mezzotint.__all__ if getattr(mezzotint, name, None) is None]
    text = pydoc.plain(pydoc.render_doc(mezzotint))
    missing = [name for name in mezzotint.__all__ if not name.startswith("_") and f"{name}(" not in text]
    assert not missing
    undocumented = [name for name in mezzotint.__all__ if name[0] != "_" and not getattr(mezzotint, name).__doc__]
    assert not undocumented


def test_the_version_is_the_packages() -> None:
    """Written in one place, which the build reads without importing torch."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", mezzotint.__version__)
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "mezzotint.__version__" }' in project


def test_representations_are_a_few_lines(pipeline: Pipeline) -> None:
    shown = repr(pipeline)
    assert len(shown.splitlines()) <= 6
    count = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    for part in ("'digits'", "DiT", f"{count:,} parameters", "10 classes", "linear", "velocity", "pixels, 1 × 8 × 8"):
        assert part in shown
    assert "float32 on cpu" in shown
    assert "bfloat16" in repr(pipeline.prepare("bf16"))
    assert repr(pipeline.denoiser).count("\n") == 0
    assert f"{count:,} parameters" in repr(pipeline.denoiser)


def test_a_recipe_shows_what_differs_from_the_defaults() -> None:
    recipe = mezzotint.load_recipe("digits", {"target": "noise", "training.steps": 5, "training.lora.rank": 0})
    shown = repr(recipe)
    assert len(shown) < 700
    assert "target='noise'" in shown
    assert "steps=5" in shown
    assert "lora" not in shown
    assert repr(mezzotint.Sampler()) == "Sampler()"
    assert repr(mezzotint.Guidance(scale=2)) == "Guidance(scale=2.0)"


@pytest.mark.parametrize(
    "classes",
    [
        3,
        "3",
        " Three ",
        np.int64(3),
        np.uint8(3),
        torch.tensor(3),
        [3],
        ["three"],
        (np.int32(3),),
        [torch.tensor(3)],
        torch.tensor([3]),
        np.array([3]),
        np.array(["three"]),
        range(3, 4),
        {3},
        (i for i in (3,)),
    ],
)
def test_a_class_however_it_is_given(pipeline: Pipeline, classes: Any) -> None:
    pipeline.class_names = ("zero", "one", "two", "three", *"456789")
    got = mezzotint.sample(pipeline, classes, 2, steps=1, sampler="ode-euler")
    assert got.equal(mezzotint.sample(pipeline, [3], 2, steps=1, sampler="ode-euler"))


def test_several_classes_in_one_text(pipeline: Pipeline) -> None:
    pipeline.class_names = ("tench, Tinca tinca", *"123456789")
    euler = {"steps": 1, "sampler": "ode-euler"}
    got = mezzotint.sample(pipeline, "tench, Tinca tinca, 4", 4, **euler)
    assert got.equal(mezzotint.sample(pipeline, [0, 4], 4, **euler))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.zeros(2, 1, 8, 8)


Ask = Callable[[Pipeline, Tensor], object]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda p, x: mezzotint.sample(p, 1.5), "1.5 is no class; expected a number or a name"),
        (lambda p, x: mezzotint.sample(p, [True]), "True is no class"),
        (lambda p, x: mezzotint.sample(p, []), "no classes were given"),
        (lambda p, x: mezzotint.sample(p, " , "), "no classes were given"),
        (lambda p, x: mezzotint.sample(p, 11), "class 11 is out of range"),
        (lambda p, x: mezzotint.sample(p, count="8"), "count must be a whole number, got '8'"),
        (lambda p, x: mezzotint.sample(p, count=0), "count must be at least 1, got 0"),
        (lambda p, x: mezzotint.sample(p, batch_size="2"), "batch_size must be a whole number"),
        (lambda p, x: mezzotint.sample(p, seed="1"), "the seed is '1'; expected a whole number"),
        (lambda p, x: mezzotint.sample(p, levels=3), "levels is 3; this model has 1"),
        (lambda p, x: mezzotint.sample("runs/x"), "expected a pipeline, as mezzotint.load .* not 'runs/x'"),
        (lambda p, x: mezzotint.sample(p.denoiser), "not a Denoiser"),
        (lambda p, x: mezzotint.probe("runs/x"), "expected a pipeline"),
        (lambda p, x: mezzotint.probe(p, probes="linaer"), "probe 'linaer' is unknown; closest: linear"),
        (lambda p, x: mezzotint.probe(p, times=2), "t = 2 is outside of"),
        (lambda p, x: mezzotint.finetune_classifier("digits", "out"), "expected a pipeline"),
        (lambda p, x: mezzotint.pooled_features(p, x, 0.1), "expected a Denoiser, such as pipeline.denoiser"),
        (lambda p, x: mezzotint.pooled_features(p.denoiser, x, "0.1"), "t = '0.1' is outside of"),
        (lambda p, x: mezzotint.log_likelihood(p, x), "give its denoiser"),
        (lambda p, x: mezzotint.ConditionalModel(p), "expected a Denoiser"),
        (lambda p, x: mezzotint.ConditionalModel(p.denoiser, [1, 2]), r"expected labels, a tensor \(B,\) of int64"),
        (lambda p, x: mezzotint.ConditionalModel(p.denoiser, x[:, 0, 0, 0]), "not one of torch.float32"),
        (
            lambda p, x: mezzotint.ConditionalModel(p.denoiser, torch.tensor([1]))(x, 0.5),
            "x has 2 examples, and the model was given conditions of 1",
        ),
        (lambda p, x: mezzotint.save_grid(x[0], "x.png"), r"expected images, a tensor \(N, C, H, W\).*\(1, 8, 8\)"),
        (lambda p, x: mezzotint.save_grid(x.numpy(), "x.png"), "expected images.* not a ndarray"),
        (lambda p, x: mezzotint.save_grid(x[:0], "x.png"), r"expected images.*\(0, 1, 8, 8\)"),
        (lambda p, x: mezzotint.save_grid(x, "x.png", columns=0), "columns must be at least 1"),
        (lambda p, x: mezzotint.load(3), "a file, a folder or a name on the hub was expected, not 3"),
        (lambda p, x: mezzotint.build({"name": "x"}), "a recipe's name, file or run folder was expected"),
        (lambda p, x: mezzotint.build("digits", device="gpu"), "device 'gpu' is not available here"),
        (lambda p, x: mezzotint.train("digit", "run"), "recipe 'digit' is unknown; closest: digits"),
        (lambda p, x: mezzotint.encode("digits", "out"), "the representation 'pixels' has no latents"),
        (lambda p, x: mezzotint.Guidance(3), "Guidance takes its values by name: scale, interval, channels"),
        (lambda p, x: mezzotint.Guidance(scale=-1), "scale = -1 is not valid"),
        (lambda p, x: mezzotint.Sampler(sampler="dddim"), "sampler 'dddim' is unknown; closest: ddim"),
        (lambda p, x: mezzotint.Sampler(step=3), "key 'step' is unknown; closest: steps"),
        (lambda p, x: mezzotint.Recipe(), "key 'name' is missing"),
    ],
)
def test_a_plain_mistake_is_one_sentence(pipeline: Pipeline, images: Tensor, ask: Ask, sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence) as said:
        ask(pipeline, images)
    assert "\n" not in str(said.value)


def test_one_where_several_may_be_given(pipeline: Pipeline, images: Tensor) -> None:
    """A layer, a time, a probe; and NumPy's numbers for Python's."""
    one = mezzotint.pooled_features(pipeline.denoiser, images, np.float32(0.5), 1)
    assert one["1"].equal(mezzotint.pooled_features(pipeline.denoiser, images, 0.5, ["1"])["1"])
    assert mix(np.int64(2), 3) == mix(2, 3)
    euler: dict[str, Any] = {"steps": np.int64(1), "sampler": "ode-euler"}
    got = mezzotint.sample(pipeline, 3, np.int64(2), seed=np.int64(1), guidance=np.float32(2), **euler)
    assert got.equal(mezzotint.sample(pipeline, 3, 2, seed=1, guidance=2.0, **euler))
    y = torch.tensor([1, 2])
    bare, record = (mezzotint.ConditionalModel(pipeline.denoiser, y, s) for s in (2.0, mezzotint.Guidance(scale=2)))
    assert bare(images, 0.5).output.equal(record(images, 0.5).output)


def test_paths_are_texts_or_paths(pipeline: Pipeline, images: Tensor, tmp_path: Path) -> None:
    pipeline.recipe.write(tmp_path)
    for name in (str(tmp_path), tmp_path, tmp_path / "recipe.yaml"):
        assert mezzotint.load_recipe(name) == pipeline.recipe
        assert mezzotint.build(name).recipe == pipeline.recipe
    for place in (tmp_path / "a.png", str(tmp_path / "a.png")):
        mezzotint.save_grid(images, place)
    assert (tmp_path / "a.png").is_file()
