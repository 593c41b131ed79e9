"""Models that are asked by captions: trained, sampled, guided, scored, and on the command line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHORT, Command
from PIL import Image
from test_diffussm import stir
from test_text import written
from test_training import assert_same_weights, interrupt, metrics
from torch import Tensor

import mezzotint
from mezzotint.archive import sample_to_npz
from mezzotint.conditions.text import byte_tokens
from mezzotint.data import BatchOrder, digits
from mezzotint.data.base import InMemoryImages
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.captions import caption_agreement, score_captions
from mezzotint.evaluation.features import feature_network
from mezzotint.evaluation.scores import evaluate
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.objectives import Objective
from mezzotint.pipeline import conditional_model
from mezzotint.recipe import DataSettings, Recipe, load_recipe, override_recipe, resolve
from mezzotint.samplers import example_generators
from mezzotint.training import loop

TOKENS = 6
UNET = "channels: [8, 8], resblocks: [1, 1], attention: [0, 1], heads: 2, groups: 4, middle: false, text_width: 8"
OUTER = "outer: [{channels: [8, 8], resblocks: [1, 1], groups: 4}]"
DIT = "name: dit, width: 16, depth: 1, heads: 2, patch_size: 2"
SSM = "name: diffussm, width: 16, depth: 1, hourglass: 1, state: 4"
NETWORKS = {
    "unet": f"name: unet, {UNET}",
    "nested-unet": f"name: unet, {UNET}, {OUTER}",
    "nested-dit": f"{DIT}, {OUTER}",
    **{f"dit-{design}": f"{DIT}, conditioning: {design}" for design in ("adaln-zero", "adaln", "cross-attention")},
    "dit-in-context": f"{DIT}, conditioning: in-context",
    **{f"diffussm-{way}": f"{SSM}, conditioning: {way}" for way in ("adaln-zero", "cross-attention", "in-context")},
}
networks = pytest.mark.parametrize("network", list(NETWORKS))


def recipe_of(network: str = "unet", *overrides: str) -> Recipe:
    """The digits by their classes' names."""
    return load_recipe(
        "digits",
        [
            f"backbone={{{NETWORKS[network]}}}",
            "condition.name=text",
            f"condition.max_tokens={TOKENS}",
            *SHORT,
            "training.batch_size=4",
            "training.checkpoint_every=100",
            "sampling=ode-euler",
            *overrides,
        ],
    )


def stirred(network: str = "unet") -> mezzotint.Pipeline:
    """A pipeline without a weight of zero that remembers three prompts."""
    made = mezzotint.build(resolve(recipe_of(network), digits("train"), 0))
    stir(made.denoiser)
    made.prompts = ("one", "two", "three")
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of a UNet that reads bytes."""
    folder = tmp_path_factory.mktemp("captioned") / "whole"
    mezzotint.train(recipe_of(), folder, quiet=True)
    return folder


# ------------------------------------------------------------------------------------------------------------ training


@networks
def test_trains_and_samples_by_prompts(network: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = ["training.steps=2", "training.validate_every=2", "training.sample_every=2"]
    trained = mezzotint.train(recipe_of(network, *often, "guidance.scale=2"), run, quiet=True)
    assert list(metrics(run, "loss/validation")) == [2]
    assert (run / "samples" / "step-00000002.png").is_file()
    loaded = mezzotint.load(run)
    assert loaded.recipe.backbone.text_features == 0
    assert loaded.denoiser.text
    assert loaded.prompts == trained.prompts == tuple("0123456789")
    drawn = mezzotint.sample(loaded, prompts=["3", "8"], count=4)
    assert drawn.shape == (4, 1, 8, 8)
    torch.testing.assert_close(drawn, mezzotint.sample(trained, prompts=["3", "8"], count=4))
    assert torch.equal(mezzotint.sample(loaded, count=10), mezzotint.sample(loaded, prompts=[*"0123456789"], count=10))


def test_every_image_is_trained_with_its_own_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = Objective.forward

    def note(objective: Objective, x: Tensor, y: Any, draw: Any) -> Any:
        assert objective.null is not None
        assert torch.equal(objective.null.tokens, byte_tokens([""], TOKENS).tokens)
        seen.append(y.tokens)
        return forward(objective, x, y, draw)

    monkeypatch.setattr(Objective, "forward", note)
    recipe = recipe_of("unet", "training.steps=3")
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    order, labels = BatchOrder(898, 4, recipe.seed), digits("train").labels
    assert labels is not None
    names = [[str(int(labels[i])) for i in order.indices(step)] for step in range(3)]
    assert [tokens.tolist() for tokens in seen] == [byte_tokens(some, TOKENS).tokens.tolist() for some in names]


def test_micro_batches_have_their_own_captions(whole: Path, tmp_path: Path) -> None:
    mezzotint.train(recipe_of("unet", "training.accumulate=2"), tmp_path / "parts", quiet=True)
    assert metrics(tmp_path / "parts") == pytest.approx(metrics(whole), rel=1e-4)


def test_resume_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    interrupt(recipe_of(), run, 3)
    mezzotint.train(recipe_of(), run, resume=True, quiet=True)
    assert_same_weights(whole, run)


@pytest.mark.parametrize("network", ["unet", "dit-cross-attention"])
def test_a_frozen_encoder(network: str, tmp_path: Path) -> None:
    """A tiny T5: its width is resolved, the run names its folder, and prompts reach the network as its features."""
    pytest.importorskip("transformers")
    encoder = written("t5", tmp_path / "t5")
    overrides = (f"condition.encoder={encoder}", "condition.precision=fp32", "training.steps=2")
    mezzotint.train(recipe_of(network, *overrides), tmp_path / "run", quiet=True)
    loaded = mezzotint.load(tmp_path / "run")
    assert loaded.recipe.backbone.text_features == 16
    assert loaded.recipe.condition.encoder == str(encoder)
    stir(loaded.denoiser)
    words = ["a red heart", "bicycle"]
    drawn = mezzotint.sample(loaded, prompts=words, count=2, guidance=1.5, negative_prompt="green hill")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    t5 = transformers.T5EncoderModel.from_pretrained(encoder).eval()

    def encode(caption: str) -> Any:
        with torch.no_grad():
            tokens = tokenizer([caption], return_tensors="pt", truncation=True, max_length=TOKENS)
            states = t5(**tokens).last_hidden_state
        return mezzotint.conditions.Text(states, torch.ones(states.shape[:2], dtype=torch.bool))

    for i, caption in enumerate(words):
        expected = walked(loaded, i, encode(caption), encode("green hill"), 1.5)
        torch.testing.assert_close(drawn[i], expected, rtol=1e-3, atol=1e-4)


def test_prompts_to_remember_come_from_all_over_the_data() -> None:
    """At most 64 different captions, in the order of the data; class names where there are no captions."""
    pictures = torch.zeros(300, 1, 4, 4, dtype=torch.uint8)
    data = InMemoryImages(pictures, None, (), "many", [f"caption {i}" for i in range(300)])
    found = loop.example_captions(data)
    numbers = [int(caption.split()[1]) for caption in found]
    fewer = InMemoryImages(pictures, None, (), "fewer", [f"caption {i % 100}" for i in range(300)])
    assert int(loop.example_captions(fewer)[-1].split()[1]) > 90
    assert len(found) == len(set(found)) == 64
    assert numbers == sorted(numbers)
    assert numbers[0] < 8
    assert numbers[-1] > 280
    few = InMemoryImages(pictures, None, (), "few", [("red", "rot") if i % 2 else "blue" for i in range(300)])
    assert set(loop.example_captions(few)) == {"red", "blue"}
    assert loop.example_captions(digits("train")) == tuple("0123456789")


# ------------------------------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def walked(pipeline: mezzotint.Pipeline, i: int, caption: Any, null: Any, scale: float) -> Tensor:
    """Image i by Euler's method on the linear path, written out: dx = (null + scale (caption − null)) dt, 3 steps."""
    denoiser = pipeline.denoiser
    (generator,) = example_generators(0, [i])
    x = torch.randn(denoiser.in_shape, generator=generator).unsqueeze(0)
    times = [1.0, 2 / 3, 1 / 3, 0.0]
    for t, s in pairwise(times):
        with_it, without = (denoiser(x, t, y).output for y in (caption, null))
        x = x + (s - t) * (without + scale * (with_it - without))
    return pipeline.representation.decode(x)[0]


@networks
def test_guidance_leads_from_the_negative_prompt_to_the_prompt(network: str) -> None:
    """null + scale·(cond − null) at every step, null the negative prompt, or the empty caption where there is none."""
    pipeline = stirred(network)
    words = ["a cat", "dogs", ""]
    images = {}
    for negative in ("", "blue"):
        images[negative] = mezzotint.sample(pipeline, prompts=words, count=3, guidance=2.5, negative_prompt=negative)
        for i, word in enumerate(words):
            expected = walked(pipeline, i, byte_tokens([word], TOKENS), byte_tokens([negative], TOKENS), 2.5)
            torch.testing.assert_close(images[negative][i], expected, rtol=1e-4, atol=1e-4)
    assert (images[""] - images["blue"]).abs().amax((1, 2, 3)).min() > 1e-3
    plain = mezzotint.sample(pipeline, prompts=words, count=3)
    for i, word in enumerate(words):
        caption = byte_tokens([word], TOKENS)
        torch.testing.assert_close(plain[i], walked(pipeline, i, caption, caption, 1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images[""][2], plain[2], rtol=1e-4, atol=1e-4)
    unguided = mezzotint.sample(pipeline, prompts=words, count=3, guidance=1, negative_prompt="blue")
    assert torch.equal(plain, unguided)


@networks
def test_an_image_depends_on_seed_number_and_caption_alone(network: str) -> None:
    pipeline = stirred(network)
    options: dict[str, Any] = {"guidance": 2.0, "sampler": "sde", "steps": 3}
    all_at_once = mezzotint.sample(pipeline, prompts=["red", "green"], count=5, **options)
    in_twos = mezzotint.sample(pipeline, prompts=["red", "green"], count=5, batch_size=2, **options)
    torch.testing.assert_close(all_at_once, in_twos, rtol=1e-4, atol=1e-4)
    red = mezzotint.sample(pipeline, prompts=["red"], count=5, **options)
    torch.testing.assert_close(all_at_once[:3], red[:3], rtol=1e-4, atol=1e-4)
    assert torch.equal(red, mezzotint.sample(pipeline, prompts="red", count=5, **options)), "one prompt, not letters"
    assert (all_at_once[3:] - red[3:]).abs().max() > 1e-3
    other = mezzotint.sample(pipeline, prompts=["red"], count=5, seed=1, **options)
    assert (other - red).abs().max() > 1e-2


@networks
def test_both_branches_are_one_batch(network: str) -> None:
    pipeline = stirred(network)
    shapes: list[int] = []
    hook = pipeline.denoiser.backbone.register_forward_hook(lambda module, inputs, output: shapes.append(len(output)))
    mezzotint.sample(pipeline, prompts=["a", "b"], count=3, guidance=2)
    assert shapes == [6] * 3
    mezzotint.sample(pipeline, prompts=["a", "b"], count=3, guidance=1)
    mezzotint.sample(pipeline, prompts=["a", "b"], count=3, guidance=0)
    assert shapes[3:] == [3] * 6
    hook.remove()


@networks
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@torch.no_grad()
def test_conditions_ahead_are_those_of_the_moment(network: str, scale: float) -> None:
    pipeline = stirred(network)
    x = torch.randn(3, *pipeline.denoiser.in_shape, generator=torch.Generator().manual_seed(1))
    ahead, now = (conditional_model(pipeline, ["a", "bb", ""], range(3), Guidance(scale=scale), "no") for _ in range(2))
    ahead.expect([0.9, 0.5, 0.1])
    for t in (0.9, 0.5, 0.3, 0.1):  # one of them was not announced
        torch.testing.assert_close(ahead(x, t).output, now(x, t).output, rtol=1e-4, atol=1e-4)


def test_captions_of_any_length_share_a_batch() -> None:
    """Padding is no caption: alone and beside a longer one it gives the same, and a null of another length fits in."""
    pipeline, denoiser = stirred(), stirred().denoiser
    y, null = byte_tokens(["a"], 2), byte_tokens(["bcdef"], TOKENS)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        guided = ConditionalModel(denoiser, y, Guidance(scale=3), null)(x, 0.4).output
        with_it, without = denoiser(x, 0.4, y).output, denoiser(x, 0.4, null).output
    torch.testing.assert_close(guided, without + 3 * (with_it - without), rtol=1e-4, atol=1e-4)
    assert pipeline.no_caption.mask.sum() == 1


def test_an_archive_of_prompts(tmp_path: Path) -> None:
    """The images of `sample`, without labels; what was drawn already is not drawn again unless a prompt is another."""
    pipeline, path = stirred(), tmp_path / "s.npz"
    pipeline.recipe = override_recipe(pipeline.recipe, ["guidance.scale=2.5"])
    options: dict[str, Any] = {"prompts": ["a", "b"], "negative_prompt": "c", "batch_size": 2}
    sample_to_npz(pipeline, path, count=5, **options)
    with np.load(path) as file:
        assert list(file) == ["arr_0"]
        expected = mezzotint.sample(pipeline, count=5, **options)
        got = torch.from_numpy(file["arr_0"][..., 0]).float() / 127.5 - 1
    torch.testing.assert_close(got, expected[:, 0].clamp(-1, 1), rtol=0, atol=0.02)
    before = path.stat().st_mtime_ns
    sample_to_npz(pipeline, path, count=5, **options)
    assert path.stat().st_mtime_ns == before
    sample_to_npz(pipeline, path, count=5, **options | {"negative_prompt": "d"})
    assert path.stat().st_mtime_ns != before


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": [3]}, "this model is asked by captions, not by classes; give prompts"),
        ({"prompts": []}, "this model is asked by captions and remembers none; give prompts"),
        ({"guidance": Guidance(channels=3)}, r"guidance\.channels is 3, but the model has 1 channel"),
    ],
)
def test_what_a_captioned_model_is_not_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        mezzotint.sample(stirred(), count=2, **options)


def test_what_a_model_of_classes_is_not_asked(pipeline: mezzotint.Pipeline) -> None:
    with pytest.raises(MezzotintError, match="this model is not asked by captions; give classes instead of prompts"):
        mezzotint.sample(pipeline, prompts=["a"], count=2)
    with pytest.raises(
        MezzotintError, match="a negative prompt means nothing for a model that is not asked by captions"
    ):
        mezzotint.sample(pipeline, count=2, negative_prompt="a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.num_classes=10"], r"the condition is text, so backbone\.num_classes=10 means nothing"),
        (["backbone.text_features=7"], r"the captions' features are 0 wide, but backbone\.text_features is 7"),
        (
            ["condition=class", "backbone.text_features=0"],
            r"backbone\.text_features is for captions; set condition=text",
        ),
        (["data.labels=false"], "the data set has neither captions nor classes"),
        (["condition.encoder=/nowhere/t5"], "no text encoder could be read from"),
        (["condition.max_tokens=1"], r"max_tokens"),
    ],
)
def test_recipes_that_mean_nothing(tmp_path: Path, overrides: list[str], message: str) -> None:
    if "encoder" in overrides[0]:
        pytest.importorskip("transformers")
    with pytest.raises(MezzotintError, match=message) as raised:
        mezzotint.train(recipe_of("unet", *overrides), tmp_path / "run", quiet=True)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "recipe.yaml").exists()


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("others", [1, 5])
def test_agreement_with_all_others_is_a_loop_over_them(others: int) -> None:
    """With as many others as there are, none is left to chance."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(others + 1, 5, generator=generator)
    samples = images + 1.2 * torch.randn(others + 1, 5, generator=generator)
    expected = []
    for i, sample in enumerate(samples):
        own = (sample - images[i]).norm().item()
        expected.append(all(own < (sample - images[k]).norm().item() for k in range(others + 1) if k != i))
    assert caption_agreement(samples, images, others).tolist() == expected
    assert (caption_agreement(images, images, others) == 1).all()
    assert (caption_agreement(images.roll(1, 0), images, others) == 0).any() or others > 1


def test_agreement_with_some_others_is_the_mean_over_choices() -> None:
    generator, count, others = torch.Generator().manual_seed(0), 60, 20
    images = torch.randn(count, 3, generator=generator)
    samples = images + 1.0 * torch.randn(count, 3, generator=generator)
    got = caption_agreement(samples, images, others)
    choices = np.random.default_rng(0)
    for i, sample in enumerate(samples):
        away = (images - sample).norm(dim=1).numpy()
        rest = np.delete(away, i)
        right = [bool((away[i] < choices.choice(rest, others, replace=False)).all()) for _ in range(400)]
        rate = float(got[i])
        assert np.mean(right) == pytest.approx(rate, abs=4 * max(rate * (1 - rate), 1e-12) ** 0.5 / 20 + 1e-9)


def test_agreement_by_chance() -> None:
    """Samples that know nothing of their captions: 1 of others + 1, within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    samples, images = torch.randn(2, 2000, 8, generator=generator)
    rate = caption_agreement(samples, images).mean().item()
    assert rate == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 2000) ** 0.5)


def test_agreement_needs_enough_images() -> None:
    with pytest.raises(MezzotintError, match="9 other images are needed beside each caption's own, and there are 9 in"):
        caption_agreement(torch.zeros(9, 2), torch.zeros(9, 2))
    with pytest.raises(MezzotintError, match="give one pair a caption"):
        caption_agreement(torch.zeros(20, 2), torch.zeros(21, 2))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 squares of 8 pixels and their captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": f"n{i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def described(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder with captions, half of it held out."""
    run = tmp_path_factory.mktemp("described") / "run"
    data = [f"data=captions:{pictures}", "data.test_fraction=0.5", "training.steps=2", "training.validate_every=2"]
    mezzotint.train(recipe_of("unet", *data), run, quiet=True)
    return run


def test_captions_of_a_folder_are_remembered(described: Path, pictures: Path) -> None:
    pipeline = mezzotint.load(described)
    held_out = {caption for (caption,) in pipeline.recipe.data.load("test").captions(range(12))}  # type: ignore[union-attr]
    assert len(pipeline.prompts) == 12
    assert {*pipeline.prompts} | held_out == {f"n{i}" for i in range(24)}


def test_scored_samples_are_those_of_the_captions(described: Path) -> None:
    """The same agreement as of `sample`'s images of these captions against their pictures."""
    pipeline, network = mezzotint.load(described), feature_network("pixels")
    stir(pipeline.denoiser)
    dataset, asked = pipeline.recipe.data.load("test"), {"guidance": 3.0, "seed": 4, "steps": 2}
    scores = score_captions(pipeline, dataset, network, count=12, batch_size=5, **asked)  # type: ignore[arg-type]
    assert scores["captions"] == 12
    captions = [caption for (caption,) in dataset.captions(range(12))]  # type: ignore[union-attr]
    drawn = mezzotint.sample(pipeline, prompts=captions, count=12, **asked)  # type: ignore[arg-type]
    features = ((drawn.clamp(-1, 1) + 1) * 127.5).round().flatten(1)
    real = torch.stack([dataset[i][0] for i in range(12)]).float().flatten(1)  # type: ignore[index]
    assert scores["caption agreement"] == pytest.approx(caption_agreement(features, real).mean().item())
    every = evaluate(pipeline, reference=DataSettings(), features=network, count=20, captions=12, **asked)  # type: ignore[arg-type]
    assert every["captions, test"] == scores
    assert score_captions(pipeline, dataset, network, count=11)["captions"] == 11  # type: ignore[arg-type]


def test_what_cannot_be_scored(described: Path, pipeline: mezzotint.Pipeline) -> None:
    network = feature_network("pixels")
    captioned = mezzotint.load(described)
    with pytest.raises(MezzotintError, match="this model is not asked by captions"):
        score_captions(pipeline, digits("test"), network)
    with pytest.raises(MezzotintError, match="this data set has none to look up"):
        score_captions(captioned, digits("test"), network)
    with pytest.raises(MezzotintError, match="9 other images are needed"):
        score_captions(captioned, captioned.recipe.data.load("test"), network, count=9)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- command line


def test_prompts_on_the_command_line(command: Command, whole: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("four\n\n  five \n", encoding="utf-8")
    png = tmp_path / "png"
    asked = ["--prompt", "three", "--prompts", lines, "--negative-prompt", "six", "--guidance", 2, "--count", 6]
    code, out, err = command("sample", whole, *asked, "--png", png)
    assert (code, out.split()) == (0, [str(whole / "samples.png"), str(png)]), err
    expected = mezzotint.sample(
        mezzotint.load(whole), prompts=["three", "four", "five"], count=6, negative_prompt="six", guidance=2
    )
    for i in range(6):
        with Image.open(png / f"{i:06}.png") as picture:
            pixels = torch.from_numpy(np.asarray(picture).copy()).float()
        torch.testing.assert_close(pixels, (expected[i, 0].clamp(-1, 1) + 1) * 127.5, rtol=0, atol=0.6)
    code, _, err = command("sample", whole, "--out", tmp_path / "remembered.png")
    assert code == 0, err
    with Image.open(tmp_path / "remembered.png") as grid:
        assert grid.width > 4 * grid.height, "ten remembered captions, one image each, in one row"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3"], "this model is asked by captions, not by classes; give prompts"),
        (["--prompts", "EMPTY"], "holds no captions; expected one on each line"),
        (["--prompts", "BINARY"], "is not a text in UTF-8"),
        (["--prompts", "/nowhere/lines.txt"], "/nowhere/lines.txt: No such file or directory"),
        (["--levels", "levels.png"], "this model has one resolution, 8; several are those of a backbone.outer"),
    ],
)
def test_mistakes_with_prompts(
    command: Command, whole: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "EMPTY").write_text(" \n\n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    arguments = [str(tmp_path / text) if text.isupper() else text for text in arguments]
    code, out, err = command("sample", whole, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")


def test_prompts_for_a_model_of_classes(command: Command, tiny: Recipe, tmp_path: Path) -> None:
    mezzotint.train(override_recipe(tiny, ["training.steps=1"]), tmp_path / "run", quiet=True)
    for arguments, message in (
        (["--prompt", "three"], "this model is not asked by captions; give classes instead of prompts"),
        (["--negative-prompt", "three"], "a negative prompt means nothing for a model that is not asked by captions"),
    ):
        code, _, err = command("sample", tmp_path / "run", *arguments)
        assert code == 2
        assert message in err
    code, _, err = command("evaluate", tmp_path / "run", "--features", "pixels", "--count", 10, "--captions", 10)
    assert code == 2
    assert "this model is not asked by captions; leave the score of captions out" in err


def test_evaluate_captions(command: Command, described: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    asked = ["--features", "pixels", "--count", 12, "--captions", 12, "--out", out]
    code, printed, err = command("evaluate", described, *asked)
    assert code == 0, err
    scores = json.loads(out.read_text())
    for split in ("train", "test"):
        found = scores[f"captions, {split}"]
        assert found["captions"] == 12
        assert 0 <= found["caption agreement"] <= 1
    assert "caption agreement, 12 held-out captions" in " ".join(printed.split())
