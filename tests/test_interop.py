"""Other people's checkpoints: read, written, sampled; against the official networks' numbers and diffusers itself."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint.backbones import DIT_CONFIGS
from mezzotint.conditions.text import byte_tokens
from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.interop import Checkpoint, convert, is_checkpoint, load, read_checkpoint
from mezzotint.interop.checkpoint import Network, empty_backbone, family_recipe
from mezzotint.interop.diffusers import scheduler_config
from mezzotint.interpolants import interpolant
from mezzotint.pipeline import Pipeline, build, save_weights
from mezzotint.recipe import Recipe, load_recipe, override_recipe
from mezzotint.samplers import Sampler

SIZES = [
    "data.size=32",
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.heads=2",
    "backbone.num_classes=3",
    "representation.path=null",
]

# The official networks' answers (models.py of facebookresearch/DiT and of willisma/SiT with timm 1.0.31, float32) for
# the weights that `fill` gives them and `x`: DiT at step 250 of class 1, SiT at its time 0.3 of class 2.
OFFICIAL_DIT = """
    -3.927664 -1.134126 -4.746130 -1.711849  0.969759  1.483863  1.415102  1.820334
    -4.970140 -1.956866 -5.016981 -2.102942  1.602534  1.942176  1.462762  0.753431
    -2.057858 -0.569262 -2.042004 -1.229311  1.437743 -0.381695  2.040334 -0.135494
    -2.160495 -0.776022 -1.753624 -0.713701  1.678489 -0.020281  1.852871  0.060075
    -1.344778 -0.362841 -2.127876  0.092854  0.822434 -1.758248  1.420120 -2.323603
    -2.276041 -0.027893 -1.555305 -0.320552  1.277360 -2.043594  0.802727 -1.596173
     0.830367  1.612907  0.996173  1.971795  0.420238 -0.398047  0.230995 -0.545534
     1.180929  2.159624  1.827701  1.342401  0.193096 -0.456765 -0.156126 -0.397936
    -1.165398  0.704416 -1.365605  1.022974 -3.131443 -0.464492 -2.967674 -0.484313
    -1.317547  1.021395 -1.521352  1.367751 -3.273662 -0.281353 -2.902670  0.032196
     0.160249  0.328389  0.453152 -0.802111  4.039451 -1.182533  3.948025 -1.896015
     0.544173 -0.694012  0.424997 -0.340418  4.038793 -2.121448  4.889752 -1.893862
    -3.941992  1.030580 -3.430041  0.991939  1.444574 -1.382216  0.422512 -1.961412
    -3.497037  1.148728 -4.936154  0.653023  0.561051 -2.153899  1.127959 -1.040522
    -0.049208 -0.709623  0.077938 -1.306541  1.064908  0.780953  1.096929  0.522709
    -0.103149 -1.460665  0.553021 -0.795346  1.204198  0.707827  0.843524  0.408117
"""
OFFICIAL_SIT = """
    -4.081459 -1.676277 -3.911080 -0.792126  0.666960  0.872920 -0.563033  1.527868
    -4.101661 -1.093608 -4.524440 -1.820304 -0.140733  1.693647  0.287955  0.273201
    -1.619067 -1.359987 -1.537265 -1.838252  3.049688 -0.053640  3.492677 -0.077259
    -1.438862 -1.602753 -1.422993 -1.245142  3.181349  0.237091  3.210487 -0.046670
    -0.615086 -0.268061 -1.867458 -0.692797  0.022128 -0.774323 -0.295397 -1.945690
    -1.940792 -0.486666 -0.866118 -0.792125 -0.222487 -1.633229 -0.420728 -0.904621
     1.159028  0.758611  0.498962  0.576344  0.307523 -0.300683  0.697665 -0.841369
     0.669395  0.774579  1.689746  0.399237  0.543915 -0.696345 -0.053213 -0.430480
"""

REMEDY = "for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"


def numbers(text: str) -> Tensor:
    return torch.tensor([float(value) for value in text.split()])


def fill(parameters: Iterable[Tensor]) -> None:
    """Dense, reproducible values in [-0.3, 0.3] that depend on nothing but a parameter's place in the list."""
    with torch.no_grad():
        for k, parameter in enumerate(parameters):
            n = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.3 * torch.cos(k + n**1.5).view_as(parameter))


def latents() -> Tensor:
    return torch.arange(64.0).cos().view(1, 4, 4, 4)


def recipe(name: str = "dit", *changes: str) -> Recipe:
    """The published recipe of a family, with a network of a few thousand weights on 4 × 4 latents."""
    return load_recipe(f"{name}-xl-2-256", [*SIZES, *changes])


def made(words: Recipe, names: tuple[str, ...] = ("cat", "dog", "owl")) -> Pipeline:
    pipeline = build(words, class_names=names)
    fill(pipeline.denoiser.parameters())
    return pipeline


def run_of(pipeline: Pipeline, folder: Path, **metadata: str) -> Path:
    """A run folder, as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(pipeline.recipe.to_yaml())
    metadata = {"step": "6", "class_names": json.dumps(pipeline.class_names)} | metadata
    save_weights(pipeline.denoiser.backbone, folder / "model.safetensors", metadata)
    return folder


def official(path: Path, words: Recipe | None = None, **around: Any) -> Path:
    """A file of the official code: its tensors have our names. The weights are `fill`'s, as the reference's were."""
    tensors = dict(made(words or recipe()).denoiser.backbone.state_dict())
    torch.save({"ema": tensors, **around} if around else tensors, path)
    return path


def tensors_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached."""
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' network is a published one, whose heads are known."""
    monkeypatch.setitem(DIT_CONFIGS, "dit-t-2", {"depth": 2, "width": 16, "heads": 2, "patch_size": 2})


# ------------------------------------------------------------------------------------------------- official networks


@torch.no_grad()
def test_an_official_dit_file_gives_the_official_output(tmp_path: Path) -> None:
    pipeline = load(official(tmp_path / "DiT.pt"), recipe=recipe())
    expected = numbers(OFFICIAL_DIT).view(1, 8, 4, 4)
    prediction = pipeline.denoiser(latents(), torch.tensor([251 / 1000]), torch.tensor([1]))
    assert prediction.variance is not None
    got = torch.cat([prediction.noise, prediction.variance], dim=1)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not pipeline.denoiser.training


@pytest.mark.parametrize("t", [0.7, torch.tensor([0.7])])
@torch.no_grad()
def test_an_official_sit_file_gives_the_official_velocity_turned_round(t: float | Tensor, tmp_path: Path) -> None:
    pipeline = load(official(tmp_path / "SiT.pt", recipe("sit")), recipe=recipe("sit"))
    expected = -numbers(OFFICIAL_SIT).view(1, 4, 4, 4)
    got = pipeline.denoiser(latents(), t, torch.tensor([2])).velocity
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_safetensors_file_without_our_header_has_the_official_sign(tmp_path: Path) -> None:
    pipeline = made(recipe("sit"))
    run = run_of(pipeline, tmp_path / "run")
    theirs, ours = tmp_path / "SiT.safetensors", run / "model.safetensors"
    save_file(tensors_of(run), theirs, {"format": "pt"})
    turned = read_checkpoint(theirs, recipe("sit")).tensors
    for name, tensor in read_checkpoint(ours).tensors.items():
        assert torch.equal(turned[name], -tensor if name.startswith("final_layer.linear") else tensor)


def test_a_training_checkpoint_gives_its_average_and_says_what_it_was_trained_for(
    tiny_size: None, tmp_path: Path
) -> None:
    arguments = argparse.Namespace(model="SiT-T/2", path_type="GVP", prediction="score", lr=1e-4, ckpt=None)
    average = dict(made(recipe()).denoiser.backbone.state_dict())
    weights = average | {"final_layer.linear.bias": torch.ones(32)}
    content = {"model": weights, "ema": average, "opt": {"state": {0: {"step": torch.ones(())}}}, "args": arguments}
    torch.save(content, tmp_path / "0400000.pt")
    checkpoint = read_checkpoint(tmp_path / "0400000.pt")
    assert_same(checkpoint.tensors, average)  # a score keeps its sign
    words = checkpoint.recipe
    assert (words.interpolant.name, words.target, words.variance) == ("gvp", "score", "unused")
    assert (words.time_input, words.backbone.heads, words.backbone.num_classes) == ((-1, 1), 2, 3)
    assert words.latent_shape == (4, 4, 4)
    del content["ema"]
    torch.save(content, tmp_path / "0400000.pt")
    assert_same(read_checkpoint(tmp_path / "0400000.pt").tensors, weights)


@pytest.mark.parametrize("name", ["dit-s-8-256", "dit-b-4-256", "dit-l-2-256", "dit-xl-2-512", "sit-xl-2-256"])
def test_published_sizes_are_recognised(name: str) -> None:
    published = load_recipe(name)
    network = Network.of(empty_backbone(published).state_dict(), "file")
    found = family_recipe(name[:3], network, Path("file.pt"))
    assert network.fit(found, "file") == published
    assert network.fit(load_recipe("dit-xl-2-256"), "file").backbone == published.backbone


def test_the_file_s_name_says_what_it_is(tiny_size: None, tmp_path: Path) -> None:
    official(tmp_path / "DiT-T-2-32x32.pt")
    words = load(tmp_path / "DiT-T-2-32x32.pt").recipe
    assert (words.name, words.target, words.variance) == ("DiT-T-2-32x32", "noise", "learned")
    assert (words.interpolant.name, words.time_input) == ("ddpm", (1000, -1))
    assert words.guidance == Guidance()
    (tmp_path / "DiT-T-2-32x32.pt").rename(tmp_path / "my_SiT.pth")
    assert load(tmp_path / "my_SiT.pth").recipe.target == "velocity"
    for ambiguous in ("model.pt", "edition.pt", "dit-or-sit.pt"):
        shutil.copy(tmp_path / "my_SiT.pth", tmp_path / ambiguous)
        with pytest.raises(MezzotintError, match=r"may be a DiT or a SiT.*or give a recipe"):
            load(tmp_path / ambiguous)


def test_pixels_and_other_sizes_are_inferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIT_CONFIGS, "dit-t-2", {"depth": 1, "width": 20, "heads": 5, "patch_size": 2})
    words = recipe(
        "sit",
        "representation={name: pixels, path: null, scale: null}",
        "data.size=8",
        "data.channels=3",
        "backbone={width: 20, depth: 1, heads: 5, patch_size: 4, mlp_ratio: 2.35, num_classes: 7}",
        "variance=none",
    )
    found = load(official(tmp_path / "sit.pt", words)).recipe
    assert found.latent_shape == (3, 8, 8)
    assert found.variance == "none"
    assert int(20 * found.backbone.mlp_ratio) == 47
    assert found.backbone.model_copy(update={"mlp_ratio": 2.35}) == words.backbone


@pytest.mark.parametrize("conditioning", ["adaln", "cross-attention", "in-context"])
@pytest.mark.parametrize("classes", [0, 3])
def test_conditioning_designs_are_inferred(conditioning: str, classes: int, tmp_path: Path) -> None:
    words = recipe("dit", f"backbone.conditioning={conditioning}", f"backbone.num_classes={classes}")
    given = override_recipe(words, ["backbone.conditioning=adaln-zero", "backbone.num_classes=9"])
    assert read_checkpoint(official(tmp_path / "dit.pt", words), given).recipe.backbone == words.backbone


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module._orig_mod.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."),
        lambda name: f"model.{name}".replace("blocks.1.attn.", "blocks.1.attn.module."),
        lambda name: f"net.module.{name}",
    ],
)
def test_names_of_parallel_and_compiled_networks(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    tensors = made(recipe()).denoiser.backbone.state_dict()
    torch.save({wrapped(name): tensor for name, tensor in tensors.items()}, tmp_path / "dit.pt")
    assert_same(read_checkpoint(tmp_path / "dit.pt", recipe()).tensors, tensors)


def test_a_tensor_under_two_wrapped_names_is_refused(tmp_path: Path) -> None:
    tensors = dict(made(recipe()).denoiser.backbone.state_dict())
    torch.save(tensors | {"module.pos_embed": tensors["pos_embed"]}, tmp_path / "dit.pt")
    with pytest.raises(MezzotintError, match=r"has pos_embed twice, once as module\.pos_embed"):
        read_checkpoint(tmp_path / "dit.pt", recipe())


# ------------------------------------------------------------------------------------------------------ other codes


def repa(path: Path, *, legacy: bool = False, projector: str = "0.weight", **around: Any) -> Path:
    """A file of REPA's code: a SiT without doubled output, and projectors. Its weights are those of `OFFICIAL_SIT`."""
    tensors = dict(made(recipe("sit")).denoiser.backbone.state_dict())
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[name] = tensors[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)  # of each pixel of a patch half
    tensors[f"projectors.0.{projector}"] = torch.ones(2048, 16)
    if legacy:
        tensors = {name.replace("blocks.1.", "decoder_blocks.0."): tensor for name, tensor in tensors.items()}
    torch.save({"ema": tensors, **around} if around else tensors, path)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_a_repa_file_runs_in_our_time_and_keeps_its_sign(legacy: bool, tiny_size: None, tmp_path: Path) -> None:
    """Its network is SiT's, but t = 0 is data: what it puts out at 0.3 is our velocity there."""
    arguments = argparse.Namespace(model="SiT-T/2", path_type="cosine", prediction="v", enc_type="dinov2-vit-b")
    pipeline = load(repa(tmp_path / "0400000.pt", legacy=legacy, args=arguments))
    words = pipeline.recipe
    assert (words.interpolant.name, words.target, words.time_input) == ("gvp", "velocity", (1, 0))
    expected = numbers(OFFICIAL_SIT).view(1, 4, 4, 4)
    got = pipeline.denoiser(latents(), 0.3, torch.tensor([2])).velocity
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()

    published = load(repa(tmp_path / "last.pt", projector="projection_layer.weight")).recipe  # iREPA's name
    assert (published.interpolant.name, published.time_input) == ("linear", (1, 0))
    with pytest.raises(MezzotintError, match=r"SiT of REPA's code .* 'sit-xl-2-256' has SiT's reversed time"):
        load(tmp_path / "last.pt", recipe=recipe("sit", "variance=none"))


@torch.no_grad()
def test_a_recipe_of_our_time_keeps_the_sign(tmp_path: Path) -> None:
    """Such as a REPA network whose projectors were dropped: the direction of time says what a velocity is."""
    words = recipe("sit", "time_input=[1, 0]")
    pipeline = load(official(tmp_path / "stripped.pt", words), recipe=words)
    expected = numbers(OFFICIAL_SIT).view(1, 4, 4, 4)
    got = pipeline.denoiser(latents(), 0.3, torch.tensor([2])).velocity
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("model", "path_type", "prediction", "sentence"),
    [
        ("SiT-T/2", "linear", "v", "prediction 'v', which the official SiT code does not know"),
        ("SiT-T/2", "cosine", "velocity", "path_type 'cosine', which the official SiT code does not know"),
        ("SiT-T/2", ["GVP"], "velocity", r"path_type \['GVP'\], which"),
        ("DiT-T/2", "Linear", "velocity", "path_type 'Linear', which the official DiT code does not know"),
    ],
)
def test_words_of_other_codes_are_asked_for(
    model: str, path_type: Any, prediction: str, sentence: str, tiny_size: None, tmp_path: Path
) -> None:
    arguments = argparse.Namespace(model=model, path_type=path_type, prediction=prediction)
    file = official(tmp_path / "0400000.pt", args=arguments)
    with pytest.raises(MezzotintError, match=f"{sentence}.*give a recipe: sit-xl-2-256"):
        load(file)
    assert load(file, recipe=recipe("sit")).recipe.target == "velocity"
    with pytest.raises(MezzotintError, match="'velocity', which the official REPA code does not know"):
        load(repa(tmp_path / "repa.pt", args={"prediction": "velocity"}))


def test_a_step_in_a_foreign_header_is_no_mark_of_ours(tmp_path: Path) -> None:
    tensors = dict(made(recipe("sit")).denoiser.backbone.state_dict())
    for header in ({"format": "pt", "step": "400000"}, {"step": "400000", "class_names": "[]"}):
        save_file(tensors, tmp_path / "SiT.safetensors", header)
        read = read_checkpoint(tmp_path / "SiT.safetensors", recipe("sit")).tensors
        assert torch.equal(read["final_layer.linear.bias"], -tensors["final_layer.linear.bias"])


def test_loading_owns_its_memory_and_leaves_randomness_alone(tmp_path: Path) -> None:
    file = official(tmp_path / "DiT.pt")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    pipeline = load(file, recipe=recipe())
    assert torch.equal(torch.rand(4), expected)
    with open(file, "r+b") as damaged:  # a mapped tensor would change with it
        damaged.write(b"\0" * file.stat().st_size)
    assert_same(pipeline.denoiser.backbone.state_dict(), dict(made(recipe()).denoiser.backbone.state_dict()))
    assert all(parameter.requires_grad for parameter in pipeline.denoiser.parameters())
    images = Sampler(sampler="ddim", steps=2).path(ConditionalModel(pipeline.denoiser), latents(), torch.Generator())
    assert list(images)[-1].isfinite().all()


def test_1000_classes_have_imagenet_s_names(tmp_path: Path) -> None:
    words = recipe("dit", "backbone.num_classes=1000", "backbone.depth=1")
    checkpoint = read_checkpoint(official(tmp_path / "dit.pt", words), words)
    assert len(checkpoint.class_names) == 1000
    assert checkpoint.class_names[207] == "golden retriever"


# --------------------------------------------------------------------------------------------------- every backbone

UNET = "backbone={name: unet, channels: [8, 16], resblocks: [1, 1], attention: [0, 1], heads: 2, time_width: 16}"
OUTER = "backbone.outer=[{channels: [4, 8], resblocks: [1, 1], groups: 4}]"
CAPTIONS = ("condition={name: text, max_tokens: 8}",)
EVERY_BACKBONE = {  # what `convert` calls it, and overrides of the digits' recipe
    "diffussm": ("a DiffuSSM", "backbone={name: diffussm, width: 16, depth: 2, state: 4, scan: [row, column]}"),
    "diffussm with captions": (
        "a DiffuSSM",
        "backbone={name: diffussm, width: 16, depth: 1, state: 4, conditioning: cross-attention}",
        *CAPTIONS,
    ),
    "unet": ("a UNet", UNET, "backbone.micro_scale=8"),
    "nested": ("a Matryoshka network", UNET, OUTER, "backbone.text_width=12", *CAPTIONS),
    "nested dit": (
        "a Matryoshka network",
        "backbone={name: dit, width: 16, depth: 1, heads: 2}",
        OUTER,
    ),
    "dit with captions": (
        "a DiT that reads captions",
        "backbone={name: dit, width: 16, depth: 1, heads: 2, conditioning: in-context}",
        *CAPTIONS,
    ),
}


def any_output(pipeline: Pipeline) -> Tensor:
    """Of two examples, each of another class or caption."""
    shape = (2, *pipeline.denoiser.in_shape)
    x = torch.arange(2.0 * math.prod(shape[1:])).sin().view(shape)
    y: Any = torch.tensor([0, 2]) if pipeline.denoiser.num_classes else None
    if pipeline.denoiser.text:
        y = byte_tokens(["one", "a seven"], 8)
    with torch.no_grad():
        return pipeline.denoiser(x, 0.3, y).output


@pytest.mark.parametrize("kind", EVERY_BACKBONE)
def test_every_backbone_goes_through_files_and_folders(kind: str, tmp_path: Path) -> None:
    called, *changes = EVERY_BACKBONE[kind]
    asked = load_recipe("digits", changes)  # which leaves to the data and the encoder what is read of them
    text = asked.condition.name == "text"
    words = override_recipe(
        asked, [f"backbone={{num_classes: {0 if text else 3}, text_features: {0 if text else 'null'}}}"]
    )
    pipeline = made(words, ())
    run = run_of(pipeline, tmp_path / "run", prompts='["one", "two"]')
    expected = any_output(pipeline)
    assert expected.std() > 1e-3

    alone, bare = tmp_path / "alone.safetensors", tmp_path / "bare.safetensors"
    save_weights(pipeline.denoiser.backbone, alone, {"recipe": words.to_yaml()})
    save_weights(pipeline.denoiser.backbone, bare, {})
    again = convert(run, tmp_path / "again")
    assert is_checkpoint(run)
    assert is_checkpoint(alone)
    for source, given in ((run, None), (run, asked), (alone, None), (bare, asked)):
        loaded = load(source, recipe=given)
        assert loaded.recipe == words
        assert torch.equal(any_output(loaded), expected)
        assert loaded.prompts == (("one", "two") if source == run else ())
    assert_same(tensors_of(again), tensors_of(run))
    assert load_recipe(again) == words
    assert read_checkpoint(again).prompts == ("one", "two")
    with pytest.raises(MezzotintError, match="does not say what its weights mean"):
        load(bare)
    formats: list[Any] = ["official", "diffusers"]
    for to in formats:
        with pytest.raises(MezzotintError, match=rf"is {called}, and the format '{to}' is for DiT and SiT"):
            convert(run, tmp_path / "out", to=to)


def test_another_recipe_than_a_file_s_is_refused(tmp_path: Path) -> None:
    words = load_recipe("digits", [UNET, OUTER, *CAPTIONS, "backbone={num_classes: 0, text_features: 0}"])
    run = run_of(made(words, ()), tmp_path / "run")

    def refused(sentence: str, *changes: str) -> None:
        with pytest.raises(MezzotintError, match=sentence):
            load(run, recipe=load_recipe("digits", [UNET, OUTER, *CAPTIONS, *changes]))

    refused(r"has backbone\.resblocks \(1, 1\), where recipe 'digits' says \(1, 2\)", "backbone.resblocks=[1, 2]")
    refused(
        r"has backbone\.outer\[0\]\.channels \(4, 8\), an input of 1 × 8 × 8, where .* says \(4, 4\), 1 × 16 × 16",
        "backbone.outer=[{channels: [4, 4], resblocks: [1, 1], groups: 4}]",
        "data.size=16",
    )
    refused("has outer levels 1, an input of 1 × 8 × 8, where .* says 0, 1 × 4 × 4", "backbone.outer=[]", "data.size=4")
    refused("has backbone.name unet.* says dit", "backbone=dit", "backbone.outer=[]")
    refused("has backbone.text_features 0, where .* says 16", "backbone.text_features=16")
    bare = tmp_path / "bare.safetensors"
    save_file(tensors_of(run), bare, {"format": "mezzotint"})
    with pytest.raises(MezzotintError, match=r"bare\.safetensors reads captions, which recipe 'digits' has none of"):
        load(bare, recipe=load_recipe("digits", [UNET, OUTER]))
    other = load_recipe("digits", [UNET, *CAPTIONS])
    with pytest.raises(MezzotintError, match=r"bare\.safetensors do not fit the network: missing down_blocks\.1\.attn"):
        load(bare, recipe=other)
    converted = convert(run, tmp_path / "converted", recipe=override_recipe(other, ["target=v", "condition=class"]))
    assert load_recipe(converted) == override_recipe(words, ["target=v"]), "the meaning alone is the given recipe's"


# -------------------------------------------------------------------------------------------------- there and back

ROUND_TRIPS = [  # a recipe, and the formats that can express it
    (recipe("dit"), "run official diffusers"),
    (recipe("sit"), "run official"),
    (recipe("dit", "backbone.num_classes=0", "guidance={scale: 1, channels: null}"), "run diffusers"),
    (recipe("dit", "backbone.num_classes=1000"), "run official diffusers"),
    (recipe("dit", "variance=none", "interpolant=cosine", "target=v", "backbone.freq_shift=1"), "run diffusers"),
    (recipe("dit", "variance=unused", "target=data", "training.lr=3e-4"), "run diffusers"),
    (recipe("sit", "interpolant=vp", "target=noise", "variance=none"), "run official"),
    (recipe("sit", "backbone.conditioning=in-context", "backbone.mlp_ratio=2.35"), "run"),
]


@pytest.mark.parametrize(("words", "to"), [(words, to) for words, formats in ROUND_TRIPS for to in formats.split()])
def test_run_to_another_format_and_back_loses_nothing(words: Recipe, to: Any, tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(words.backbone.num_classes or 0))
    pipeline = made(words, names)
    run = run_of(pipeline, tmp_path / "run")
    name = "other.pt" if to == "official" else "other"
    other = convert(run, tmp_path / name, to=to)
    back = convert(other, tmp_path / "back", recipe=words if to == "official" else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", name, "run"]
    assert_same(tensors_of(back), tensors_of(run))
    assert load_recipe(back) == words
    loaded = load(back)
    if to != "official":  # which has no place for names
        assert loaded.class_names == names
    x, y = latents(), torch.zeros(1, dtype=torch.int64) if names else None
    assert torch.equal(loaded.denoiser(x, 0.5, y).output, pipeline.denoiser(x, 0.5, y).output)
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in back.iterdir())  # under the usual umask


@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_official_to_run_and_back_loses_nothing(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    words = recipe(family)
    tensors = {name: tensor.to(dtype) for name, tensor in made(words).denoiser.backbone.state_dict().items()}
    torch.save(tensors, tmp_path / f"{family}.pt")
    run = convert(tmp_path / f"{family}.pt", tmp_path / "run", recipe=words)
    back = convert(run, tmp_path / "back.pt", to="official")
    assert_same(torch.load(back, weights_only=True), tensors)
    assert back.stat().st_size < 1.2 * (tmp_path / f"{family}.pt").stat().st_size
    if family == "dit":
        folder = convert(back, tmp_path / "diffusers", to="diffusers", recipe=words)
        assert_same(read_checkpoint(folder).tensors, tensors)
        convert(folder, tmp_path / "again.pt", to="official")
        assert_same(torch.load(tmp_path / "again.pt", weights_only=True), tensors)
    for pipeline in (load(run), load(back, recipe=words)):
        for name, tensor in pipeline.denoiser.backbone.state_dict().items():
            sign = -1 if family == "sit" and name.startswith("final_layer.linear") else 1
            assert torch.equal(tensor, sign * tensors[name].float())
            assert tensor.dtype == torch.float32


def test_a_run_s_other_weights(tmp_path: Path) -> None:
    pipeline = made(recipe())
    run = run_of(pipeline, tmp_path / "run")
    (run / "model.safetensors").rename(run / "model-ema-0.9.safetensors")
    with pytest.raises(MezzotintError, match=r"has no weights 'model'; it has: model-ema-0\.9"):
        convert(run, tmp_path / "out")
    convert(run, tmp_path / "out", weights="model-ema-0.9")
    assert_same(tensors_of(tmp_path / "out"), dict(pipeline.denoiser.backbone.state_dict()))
    with pytest.raises(MezzotintError, match="weights 'ema' are a run folder's"):
        read_checkpoint(official(tmp_path / "dit.pt"), weights="ema")


def test_a_run_loads_as_before_and_its_weights_alone_too(tmp_path: Path) -> None:
    pipeline = made(recipe("sit"))
    run = run_of(pipeline, tmp_path / "run")
    for loaded in (load(run), load(run / "model.safetensors"), load(str(run), recipe=recipe("sit"))):
        assert loaded.recipe == pipeline.recipe
        assert loaded.class_names == pipeline.class_names
        assert_same(loaded.denoiser.backbone.state_dict(), dict(pipeline.denoiser.backbone.state_dict()))
    alone = tmp_path / "alone.safetensors"
    shutil.move(run / "model.safetensors", alone)
    with pytest.raises(MezzotintError, match="does not say what its weights mean; give the recipe"):
        load(alone)
    assert torch.equal(
        load(alone, recipe=recipe("sit")).denoiser(latents(), 0.5).output,
        pipeline.denoiser(latents(), 0.5).output,
    )
    save_weights(pipeline.denoiser.backbone, alone, {"recipe": pipeline.recipe.to_yaml()})
    assert load(alone).recipe == pipeline.recipe


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    run = run_of(made(recipe()), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for to, place in (("run", "full"), ("diffusers", "full"), ("official", "full"), ("official", "full/mine.txt")):
        with pytest.raises(MezzotintError, match="exists already; choose another place"):
            convert(run, tmp_path / place, to=to)  # type: ignore[arg-type]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    convert(run, tmp_path / "empty")
    assert load(tmp_path / "empty").recipe == recipe()
    with pytest.raises(MezzotintError, match=r"cannot write .*: (Not a directory|File exists)"):
        convert(run, tmp_path / "full" / "mine.txt" / "out")
    with pytest.raises(MezzotintError, match="format 'onnx' is unknown"):
        convert(run, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(MezzotintError, match="vae means nothing for the format 'run'"):
        convert(run, tmp_path / "out", vae="x")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(made(recipe()), tmp_path / "run")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mezzotint.files.save_file", full)
    formats: list[Any] = ["run", "diffusers"]
    for to in formats:
        with pytest.raises(MezzotintError, match=r"cannot write .*out: No space left on device"):
            convert(run, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize(
    ("to", "words", "sentence"),
    [
        ("official", recipe("dit", "interpolant=cosine"), "official SiT code has no interpolant.name cosine, only linear or gvp or vp"),  # noqa: E501
        ("official", recipe("sit", "time_input=[1000, 0]"), r"SiT code has no time_input \[1000, 0\], only \[-1, 1\]"),
        ("official", recipe("dit", "backbone.freq_shift=1"), "DiT code has no backbone.freq_shift 1, only 0"),
        ("official", recipe("dit", "target=data"), "DiT code has no target data, only noise"),
        ("official", recipe("dit", "backbone.conditioning=adaln"), "no backbone.conditioning adaln, only adaln-zero"),
        ("official", recipe("dit", "backbone.num_classes=0"), "no network without classes"),
        ("diffusers", recipe("sit"), "DiTPipeline cannot express interpolant linear: ddpm and cosine have betas"),
        ("diffusers", recipe("dit", "target=score"), "cannot express target score: its schedulers read noise, data, v"),
        ("diffusers", recipe("dit", "time_input=[1000, 0]"), r"time_input \[1000, 0\]: it passes the step index, \[1000, -1\]"),  # noqa: E501
        ("diffusers", recipe("dit", "backbone.conditioning=adaln"), "backbone.conditioning adaln: it has adaln-zero"),
        ("diffusers", recipe("dit", "backbone.mlp_ratio=2"), "backbone.mlp_ratio 2: its ratio is 4"),
        ("diffusers", recipe("dit", "backbone.num_classes=1001"), "num_classes 1001: it takes row 1000 of the table"),
        ("diffusers", recipe("dit", "representation=pixels", "data.size=4"), "representation pixels: it decodes latents"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_a_format_cannot_express_is_refused(to: Any, words: Recipe, sentence: str, tmp_path: Path) -> None:
    run = run_of(made(words, ()), tmp_path / "run")
    with pytest.raises(MezzotintError, match=sentence):
        convert(run, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == [run]


# ------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


@pytest.fixture
def vae(diffusers: Any, tmp_path: Path) -> Path:
    """A tiny autoencoder with Stable Diffusion's stride of 8, in a folder as diffusers writes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
            scaling_factor=0.25,
        )
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("classes", [0, 3, 1000])
@torch.no_grad()
def test_diffusers_network_puts_out_the_same(classes: int, diffusers: Any, tmp_path: Path) -> None:
    pipeline = made(recipe("dit", f"backbone.num_classes={classes}", "backbone.freq_shift=1"), ())
    run = run_of(pipeline, tmp_path / "run")
    convert(run, tmp_path / "out", to="diffusers")
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    assert network.config.norm_eps == 1e-6
    x, t = latents().repeat(3, 1, 1, 1), torch.tensor([0.0, 250.0, 999.0])
    theirs, ours = torch.tensor([0, 2, 1000]), torch.tensor([0, 2, classes])
    expected = pipeline.denoiser.backbone(x, t, ours if classes else None)
    got = network(x, t, theirs).sample
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "words",
    [
        ["backbone.freq_shift=1"],
        ["backbone.freq_shift=0"],
        ["interpolant=cosine", "target=v", "variance=none", "backbone.freq_shift=1"],
        ["interpolant=cosine", "target=data", "variance=unused", "backbone.freq_shift=1"],
        ["interpolant={name: cosine, snr_divisor: 4}", "backbone.freq_shift=1"],
        ["interpolant={name: ddpm, num_steps: 500}", "time_input=[500, -1]", "backbone.freq_shift=1"],
    ],
)
@torch.no_grad()
def test_diffusers_pipeline_draws_the_same(
    words: list[str], diffusers: Any, vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DiTPipeline from the folder, and ours: DDIM from the same noise, guidance on all channels."""
    pipeline = made(recipe("dit", *words, f"representation.path={vae}", "representation.scale=0.5"))
    final = pipeline.denoiser.backbone.final_layer
    final.linear.weight.mul_(0.1)  # type: ignore[union-attr, operator]
    run = run_of(pipeline, tmp_path / "run")
    convert(run, tmp_path / "out", to="diffusers")
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"cat": 0, "dog": 1, "owl": 2}
    assert pipe.vae.config.scaling_factor == 0.5

    def theirs() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        drawn = pipe([0, 2], guidance_scale=2.0, generator=generator, num_inference_steps=10, output_type="pt")
        return drawn.images * 2 - 1

    if pipeline.recipe.backbone.freq_shift == 0:
        assert REMEDY in caplog.text
        unremedied = theirs()
        exec(REMEDY, {"pipe": pipe})
        assert (theirs() - unremedied).abs().max() > 1e-3
    else:
        assert not caplog.records
    x = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(5))
    model = ConditionalModel(pipeline.denoiser, torch.tensor([0, 2]), Guidance(scale=2.0))
    *_, x = Sampler(sampler="ddim", spacing="ddim", steps=10).path(model, x, torch.Generator())
    ours = load(tmp_path / "out").representation.decode(x)
    assert ours.std() > 0.1
    assert (ours.abs() < 0.99).float().mean() > 0.5
    torch.testing.assert_close(theirs(), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddpm", "cosine"])
@pytest.mark.parametrize("divisor", [1.0, 4.0])
@pytest.mark.parametrize("steps", [100, 1000])
def test_diffusers_scheduler_has_our_schedule(name: str, divisor: float, steps: int, diffusers: Any) -> None:
    words = recipe(
        "dit", f"interpolant={{name: {name}, num_steps: {steps}, snr_divisor: {divisor}}}", f"time_input=[{steps}, -1]"
    )
    scheduler = diffusers.DDIMScheduler.from_config(scheduler_config(words))
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    alpha = interpolant(name, num_steps=steps, snr_divisor=divisor).alpha(t)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha**2, rtol=1e-3, atol=1e-6)


def test_the_exported_config_is_the_published_one(tmp_path: Path) -> None:
    """What facebook/DiT-XL-2-256 has on the hub, in the keys that matter."""
    config = scheduler_config(load_recipe("dit-xl-2-256"))
    assert {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")} == {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
    }
    assert (config["clip_sample"], config["prediction_type"], config["steps_offset"]) == (False, "epsilon", 0)


def test_no_autoencoder_at_hand(diffusers: Any, vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(made(recipe("dit", "representation.path=stabilityai/sd-vae-ft-ema")), tmp_path / "run")
    convert(run, tmp_path / "out", to="diffusers")
    assert "stabilityai/sd-vae-ft-ema could not be had" in caplog.text
    assert "scaling_factor of 0.18215" in caplog.text
    assert not (tmp_path / "out" / "vae").exists()
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", vae=network)
    assert pipe.vae is network
    with pytest.raises(MezzotintError, match="nowhere/at/all is no folder of an autoencoder"):
        convert(run, tmp_path / "other", to="diffusers", vae="nowhere/at/all")
    convert(run, tmp_path / "other", to="diffusers", vae=str(vae))
    assert diffusers.DiTPipeline.from_pretrained(tmp_path / "other").vae.config.scaling_factor == 0.18215
    assert load(tmp_path / "other").recipe.representation.path == str(tmp_path / "other" / "vae")
    assert read_checkpoint(tmp_path / "other").recipe.representation.path == "stabilityai/sd-vae-ft-ema"


def foreign(diffusers: Any, folder: Path, **options: Any) -> Any:
    """A DiT as diffusers itself writes it, with the copies of the embeddings equal, as in the published folders."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=4, num_embeds_ada_norm=3
    ).eval()
    fill(network.parameters())
    first, second = (block.norm1.emb for block in network.transformer_blocks)
    second.load_state_dict(first.state_dict())
    network.save_pretrained(folder, **options)
    return network


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}, {"safe_serialization": False}])
@torch.no_grad()
def test_a_foreign_folder(options: dict[str, Any], diffusers: Any, tmp_path: Path) -> None:
    network = foreign(diffusers, tmp_path / "transformer", **options)
    assert (len(list((tmp_path / "transformer").iterdir())) > 3) == ("max_shard_size" in options)
    words = load(tmp_path / "transformer").recipe
    assert (words.target, words.variance, words.interpolant.name) == ("noise", "learned", "ddpm")
    assert (words.backbone.freq_shift, words.backbone.heads, words.backbone.num_classes) == (0, 2, 3)
    asked = override_recipe(words, ["backbone.freq_shift=1"])
    x, t, y = latents(), torch.tensor([250.0]), torch.tensor([3])
    expected = network(x, t, y).sample
    got = load(tmp_path / "transformer", recipe=asked).denoiser.backbone(x, t, y)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()  # though its norm_eps is 1e-5
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "norm_num_groups": 32, "only_cross_attention": False}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "transformer").recipe == words


def test_a_foreign_pipeline(diffusers: Any, vae: Path, tmp_path: Path) -> None:
    network = foreign(diffusers, tmp_path / "transformer")
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    labels = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark"}
    pipe = diffusers.DiTPipeline(
        network, diffusers.AutoencoderKL.from_pretrained(vae), scheduler, {key: labels[key] for key in labels}
    )
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index | {"id2label": labels}))
    loaded = load(tmp_path / "pipe")
    assert loaded.class_names == ("tench", "goldfish", "shark")
    assert (loaded.recipe.target, loaded.recipe.interpolant.name) == ("v", "cosine")
    assert loaded.recipe.representation.path == str(tmp_path / "pipe" / "vae")
    assert mezzotint.sample(loaded, ["goldfish"], 1, sampler="ddim", steps=2).shape == (1, 3, 32, 32)
    config = json.loads((tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text())
    place = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(config | {"num_train_timesteps": 500}))
    fewer = load(tmp_path / "pipe").recipe
    assert (fewer.interpolant.num_steps, fewer.time_input) == (500, (500, -1))
    config["beta_schedule"] = "scaled_linear"
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(MezzotintError, match=r"beta_schedule 'scaled_linear' .* give a recipe that says what they are"):
        load(tmp_path / "pipe")
    assert load(tmp_path / "pipe", recipe=loaded.recipe).recipe == loaded.recipe


def test_an_autoencoder_that_ditpipeline_would_misread_is_refused(vae: Path, tmp_path: Path) -> None:
    run = run_of(made(recipe()), tmp_path / "run")
    original = (vae / "config.json").read_text()
    for changes, sentence in (
        ({"shift_factor": 0.1}, "cannot express an autoencoder with a shift_factor"),
        ({"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}, "cannot express an autoencoder with a latents_mean"),
        ({"_class_name": "AutoencoderTiny"}, "is a diffusers AutoencoderTiny, expected an AutoencoderKL"),
    ):
        (vae / "config.json").write_text(original)
        edited(vae / "config.json", **changes)
        with pytest.raises(MezzotintError, match=sentence):
            convert(run, tmp_path / "out", to="diffusers", vae=str(vae))


def test_the_only_variant_of_a_folder_s_weights(diffusers: Any, vae: Path, tmp_path: Path) -> None:
    """It is read, and goes into a new folder by the usual name; of two files the one that is named is read."""
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    run = run_of(made(recipe()), tmp_path / "run")
    folder = convert(run, tmp_path / "out", to="diffusers", vae=str(vae))
    diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    plain = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    variant = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    half = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(half, variant)
    assert read_checkpoint(variant, recipe()).tensors["pos_embed"].dtype == torch.float32, "computed, not stored"
    assert read_checkpoint(variant, recipe()).tensors["x_embedder.proj.weight"].dtype == torch.float16
    assert read_checkpoint(plain, recipe()).tensors["x_embedder.proj.weight"].dtype == torch.float32
    plain.unlink()
    assert read_checkpoint(folder, recipe()).tensors["x_embedder.proj.weight"].dtype == torch.float16


def test_weights_of_a_folder_by_themselves(tmp_path: Path) -> None:
    run = run_of(made(recipe("dit", "backbone.num_classes=2"), ("cat", "dog")), tmp_path / "run")
    folder = convert(run, tmp_path / "out", to="diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["id2label"] == {"0": "cat", "1": "dog"}
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for source in (folder, folder / "transformer", file):
        checkpoint = read_checkpoint(source)
        assert_same(checkpoint.tensors, tensors_of(run))
        assert checkpoint.class_names == ("cat", "dog")
    with safe_open(str(file), framework="pt") as opened:
        table = opened.get_tensor("transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight")
    assert table.shape == (1001, 16)
    assert torch.equal(table[2:], table[2:3].expand(999, -1))


def test_names_of_classes_without_names(tmp_path: Path) -> None:
    run = run_of(made(recipe(), ()), tmp_path / "run")
    folder = convert(run, tmp_path / "out", to="diffusers")
    assert json.loads((folder / "model_index.json").read_text())["id2label"] == {"0": "0", "1": "1", "2": "2"}
    assert read_checkpoint(folder).class_names == ()


def test_a_position_table_that_rounds_otherwise_comes_back(tmp_path: Path) -> None:
    pipeline = made(recipe())
    pipeline.denoiser.backbone.pos_embed[0, 1, 0] += 1e-6  # type: ignore[operator, index]
    run = run_of(pipeline, tmp_path / "run")
    convert(run, tmp_path / "out", to="diffusers")
    assert_same(read_checkpoint(tmp_path / "out").tensors, tensors_of(run))


# ------------------------------------------------------------------------------------------------ damaged or hostile


class Evil:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_not_run(legacy: bool, tmp_path: Path) -> None:
    content = {"ema": made(recipe()).denoiser.backbone.state_dict(), "args": Evil(tmp_path / "owned")}
    torch.save(content, tmp_path / "DiT.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(MezzotintError, match=r"DiT\.pt holds code besides tensors \((posix|nt)\.system\), which was"):
        load(tmp_path / "DiT.pt", recipe=recipe())
    assert not (tmp_path / "owned").exists()


class Foreign:
    """Of a training script that is not here, with a state."""

    def __init__(self, word: object) -> None:
        self.word = word


def test_objects_besides_tensors_are_empty(tiny_size: None, tmp_path: Path) -> None:
    tensors = made(recipe()).denoiser.backbone.state_dict()
    around = {"config": Foreign(3), "path": Path("x"), "args": argparse.Namespace(model="DiT-T/2", other=Foreign("y"))}
    torch.save({"ema": tensors, **around}, tmp_path / "0400000.pt")
    assert_same(load(tmp_path / "0400000.pt").denoiser.backbone.state_dict(), dict(tensors))
    torch.save({"ema": tensors, "args": Foreign("SiT-T/2")}, tmp_path / "SiT.pt")
    with pytest.raises(
        MezzotintError, match=r"its training arguments as a \S*Foreign, which is not read; give a recipe"
    ):
        load(tmp_path / "SiT.pt")
    assert load(tmp_path / "SiT.pt", recipe=recipe("sit")).recipe.target == "velocity"
    torch.save(Foreign(tensors), tmp_path / "whole.pt")
    with pytest.raises(MezzotintError, match=r"holds a \S*Foreign, expected a state dict"):
        load(tmp_path / "whole.pt", recipe=recipe())
    torch.save({"ema": tensors, "args": Words(model="DiT-T/2")}, tmp_path / "words.pt")
    with pytest.raises(MezzotintError, match=r"holds code besides tensors \(\S*Words\), which was not run"):
        load(tmp_path / "words.pt")


def test_a_class_under_any_name_is_an_empty_one(tmp_path: Path) -> None:
    """Damage makes names that Python has for no class, such as one with a zero byte."""
    file = official(tmp_path / "DiT.pt", config=Foreign(3))
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "DiT-2.pt", "w") as damaged:
        for entry in archive.infolist():
            damaged.writestr(entry.filename, archive.read(entry).replace(b"Foreign", b"For\0ign"))
    assert b"Foreign" in content
    assert_same(read_checkpoint(tmp_path / "DiT-2.pt", recipe()).tensors, read_checkpoint(file, recipe()).tensors)


def test_a_name_with_a_large_number_is_no_large_network(tmp_path: Path) -> None:
    tensors = made(recipe()).denoiser.backbone.state_dict()
    for name in ("blocks.9999999999.x", f"blocks.{'9' * 5000}.x"):
        save_file({**tensors, name: torch.zeros(1)}, tmp_path / "DiT.safetensors")
        with pytest.raises(MezzotintError, match="blocks"):
            read_checkpoint(tmp_path / "DiT.safetensors", recipe())


class Words(dict[str, Any]):
    """A mapping of a training script's own."""


def test_a_file_that_was_compressed_is_read(tmp_path: Path) -> None:
    file = official(tmp_path / "DiT.pt")
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in stored.infolist():
            small.writestr(entry.filename, stored.read(entry))
    assert_same(read_checkpoint(tmp_path / "small.pt", recipe()).tensors, read_checkpoint(file, recipe()).tensors)


def test_a_file_from_before_torch_1_6(tmp_path: Path) -> None:
    tensors = made(recipe()).denoiser.backbone.state_dict()
    torch.save(tensors, tmp_path / "DiT.pt", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "DiT.pt", recipe()).tensors, dict(tensors))


@pytest.mark.parametrize("name", ["DiT.pt", "DiT.safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 0.5, -10])
def test_a_truncated_file(name: str, keep: float, tmp_path: Path) -> None:
    file = official(tmp_path / "DiT.pt")
    if name != "DiT.pt":
        save_file(torch.load(file, weights_only=True), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(MezzotintError, match=r"is not a whole (PyTorch|safetensors) file .* copy it again"):
        load(tmp_path / name, recipe=recipe())


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = dict(made(recipe()).denoiser.backbone.state_dict())
    tensors["stranger"] = tensors.pop("blocks.1.mlp.fc1.bias")
    tensors["t_embedder.mlp.0.bias"] = tensors["t_embedder.mlp.0.bias"][:3]
    torch.save(tensors | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(())}, tmp_path / "dit.pt")
    with pytest.raises(MezzotintError, match=r"blocks\.0\.adaLN_modulation\.1\.weight has shape \(\)"):
        load(tmp_path / "dit.pt", recipe=recipe())
    torch.save(tensors, tmp_path / "dit.pt")
    with pytest.raises(MezzotintError) as caught:
        load(tmp_path / "dit.pt", recipe=recipe())
    assert (
        "missing blocks.1.mlp.fc1.bias; unexpected stranger; t_embedder.mlp.0.bias has shape (3,), expected (16,)"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, r"is not a DiT or SiT: it has no tensor 'x_embedder\.proj\.weight' \(of 2 tensors: conv1\.weight, fc\.bias"),  # noqa: E501
        ({"ema": {"weight": 3}}, "is not a state dict: its entry 'weight' is no tensor"),
        ({"x_embedder.proj.weight": torch.ones(2, 2).to_sparse()}, "is sparse; save it dense"),
        ({"x_embedder.proj.weight": torch.ones(2, 2, device="meta")}, "has a shape and no numbers"),
        ([torch.zeros(2)], "holds a list, expected a state dict"),
        ({}, "it has no tensor"),
    ],
)  # fmt: skip
def test_other_files(content: Any, sentence: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "dit.pt")
    with pytest.raises(MezzotintError, match=sentence):
        load(tmp_path / "dit.pt", recipe=recipe())


def test_trained_positions_are_refused(tmp_path: Path) -> None:
    tensors = dict(made(recipe()).denoiser.backbone.state_dict())
    trained, spoiled = r"not the sine-cosine table .* positions are not supported", "^pos_embed of .* holds NaN"
    cases = (torch.float32, 0.001, trained), (torch.bfloat16, 0.1, trained), (torch.float32, float("nan"), spoiled)
    for dtype, change, sentence in cases:
        changed = {"pos_embed": (tensors["pos_embed"] + change).to(dtype)}
        torch.save(tensors | changed, tmp_path / "dit.pt")
        with pytest.raises(MezzotintError, match=sentence):
            load(tmp_path / "dit.pt", recipe=recipe())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_quantised_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    run = run_of(made(recipe()), tmp_path / "run")
    tensors = tensors_of(run)
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].to(dtype)
    torch.save(tensors, tmp_path / "dit.pt")
    save_file(tensors, run / "model.safetensors", {"format": "mezzotint"})
    for source, words in ((tmp_path / "dit.pt", recipe()), (run, None)):
        with pytest.raises(MezzotintError, match=rf"has dtype {dtype}, expected floating point of 16 bits or more"):
            load(source, recipe=words)
    folder = convert(run_of(made(recipe()), tmp_path / "good"), tmp_path / "diffusers", to="diffusers")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "transformer_blocks.0.attn1.to_q.weight"
    save_file(load_file(file) | {name: torch.zeros(16, 16, dtype=dtype)}, file)
    with pytest.raises(MezzotintError, match=rf"attn1\.to_q\.weight in .* has dtype {dtype}, expected floating point"):
        load(folder, recipe=recipe())


def test_a_counter_in_a_state_dict_is_called_one(tmp_path: Path) -> None:
    torch.save(tensors_of(run_of(made(recipe()), tmp_path / "run")) | {"step": torch.tensor(5)}, tmp_path / "dit.pt")
    with pytest.raises(
        MezzotintError, match=r"^step in .* has dtype torch\.int64, .*; a counter is no weight, leave it"
    ):
        load(tmp_path / "dit.pt", recipe=recipe())


@pytest.mark.parametrize("key", ["class_names", "prompts"])
@pytest.mark.parametrize("value", ["cat, dog", '"cat"', '{"cat": 0}', "[1, 2]", "null", "[" * 200_000])
def test_a_header_that_lists_no_names(key: str, value: str, tmp_path: Path) -> None:
    run = run_of(made(recipe()), tmp_path / "run", **{key: value})
    for source in (run, run / "model.safetensors"):
        with pytest.raises(MezzotintError, match=f"the header of .* is damaged: its {key} are no JSON list of texts"):
            load(source)


@pytest.mark.parametrize("value", ["just words", "[1, 2]", "a: [", "[" * 2_000])
def test_a_header_that_holds_no_recipe(value: str, tmp_path: Path) -> None:
    save_weights(made(recipe()).denoiser.backbone, tmp_path / "a.safetensors", {"recipe": value})
    with pytest.raises(MezzotintError, match=r"the header of .*a\.safetensors is damaged"):
        load(tmp_path / "a.safetensors")


def raw(path: Path, header: str, length: int | None = None) -> Path:
    """A safetensors file of this header, said to have another length, and 16 bytes of tensors."""
    content = header.encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + bytes(16))
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ("{}", 2**63),
        ("{}", 10**9),
        ("[" * 100_000, None),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', None),  # noqa: E501
        ('{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 16]}}', None),
        ('{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}', None),
        ('{"a": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}}', None),
        ('{"__metadata__": {"step": 4}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', None),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_header(header: str, length: int | None, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match=r"a\.safetensors is not a whole safetensors file .* copy it again"):
        load(raw(tmp_path / "a.safetensors", header, length), recipe=recipe())


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "BOOL"])
def test_a_dtype_that_no_network_has(dtype: str, tmp_path: Path) -> None:
    entry = {"dtype": dtype, "shape": [32 if dtype == "F4" else 16], "data_offsets": [0, 16]}
    with pytest.raises(MezzotintError, match=r"a\.safetensors"):
        load(raw(tmp_path / "a.safetensors", json.dumps({"pos_embed": entry})), recipe=recipe())


@pytest.mark.parametrize("name", ["model.safetensors", "DiT.pt", "DiT.pth"])
def test_a_folder_or_nothing_where_a_file_is_expected(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(MezzotintError, match="is not a run folder: it has no recipe"):
        load(tmp_path / name, recipe=recipe())
    (tmp_path / name).rmdir()
    (tmp_path / name).touch()
    with pytest.raises(MezzotintError, match="is not a whole"):
        load(tmp_path / name, recipe=recipe())
    run = run_of(made(recipe()), tmp_path / "run")
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").mkdir()
    with pytest.raises(MezzotintError, match="has no weights 'model'"):
        load(run)


def test_heads_are_in_no_tensor(tmp_path: Path) -> None:
    file = official(tmp_path / "DiT.pt")
    for given in (None, load_recipe("dit-xl-2-256")):  # whose 16 heads are of another width
        with pytest.raises(MezzotintError, match=r"the number of attention heads .* backbone\.width=16 and its"):
            read_checkpoint(file, given)
    assert load(file, recipe=recipe("dit", "backbone.heads=4")).recipe.backbone.heads == 4


def test_a_recipe_of_another_network_is_refused(tmp_path: Path) -> None:
    file = official(tmp_path / "DiT.pt")
    with pytest.raises(
        MezzotintError,
        match=r"has backbone\.depth 2, backbone\.num_classes 3, an input of 4 × 4 × 4, where recipe 'dit-xl-2-256' "
        r"says 28, 1000, 4 × 32 × 32; leave the recipe out",
    ):
        load(file, recipe=load_recipe("dit-xl-2-256", ["backbone.width=16", "backbone.heads=2"]))
    with pytest.raises(MezzotintError, match="a learned variance no, where recipe 'dit-xl-2-256' says yes"):
        load(official(tmp_path / "plain.pt", recipe("dit", "variance=none")), recipe=recipe())
    assert load(file, recipe=recipe("dit", "backbone.num_classes=null")).recipe.backbone.num_classes == 3
    assert load(official(tmp_path / "half.pt", recipe("sit", "variance=none")), recipe=recipe("sit"))


def test_unequal_copies_of_the_embeddings_are_refused(tmp_path: Path) -> None:
    folder = convert(run_of(made(recipe()), tmp_path / "run"), tmp_path / "out", to="diffusers")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"][3] += 1e-3
    save_file(tensors, file)
    with pytest.raises(
        MezzotintError, match=r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_2\.bias in"
    ):
        load(folder)
    del tensors["transformer_blocks.1.ff.net.2.bias"]
    tensors["lora.weight"] = torch.zeros(2)
    save_file(tensors, file)
    with pytest.raises(
        MezzotintError, match=r"missing transformer_blocks\.1\.ff\.net\.2\.bias; unexpected lora\.weight"
    ):
        load(folder)


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_folders(tmp_path: Path) -> None:
    run = run_of(made(recipe()), tmp_path / "run")
    good = convert(run, tmp_path / "good", to="diffusers")

    def folder(name: str) -> Path:
        return shutil.copytree(good, tmp_path / name)

    edited(folder("a") / "model_index.json", _class_name="StableDiffusionPipeline")
    edited(folder("b") / "transformer" / "config.json", _class_name="UNet2DModel")
    edited(folder("c") / "transformer" / "config.json", activation_fn="geglu")
    edited(folder("k") / "transformer" / "config.json", patch_size=1)
    edited(folder("l") / "transformer" / "config.json", num_layers="two")
    (folder("d") / "transformer" / "config.json").unlink()
    (folder("e") / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder("f") / "transformer" / "config.json").write_text("{")
    (folder("m") / "model_index.json").write_text("[" * 200_000)
    edited(folder("n") / "transformer" / "config.json", num_layers=10**12)
    edited(folder("o") / "transformer" / "config.json", sample_size=10**9)
    edited(folder("p") / "transformer" / "config.json", num_attention_heads=True)
    edited(folder("q") / "scheduler" / "scheduler_config.json", beta_schedule=["linear"])
    edited(folder("r") / "scheduler" / "scheduler_config.json", beta_end=math.inf)
    for foreign in ("q", "r"):
        file = tmp_path / foreign / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file), file)
    sentences = {
        "a": "is a diffusers StableDiffusionPipeline, expected a DiTPipeline",
        "b": "is a diffusers UNet2DModel, expected a DiTTransformer2DModel",
        "c": "says activation_fn 'geglu'; only 'gelu-approximate' is supported",
        "k": "says sample_size 4, its patches make 8",
        "l": "says num_layers 'two', expected a number",
        "d": r"has no config\.json; download the whole folder",
        "e": r"has no diffusion_pytorch_model\.safetensors, nor shards or a \.bin; it has: config\.json",
        "f": r"config\.json is missing or no JSON; download the whole folder again",
        "m": r"model_index\.json is missing or no JSON",
        "n": r"says num_layers 1000000000000, the weights have 2 blocks",
        "o": r"means 500000000 patches a side, at most 512 are supported",
        "p": "says num_attention_heads True, expected a number",
        "q": r"beta_schedule \['linear'\] .* give a recipe that says what they are",
        "r": "says beta_end inf, expected a number",
        "g": r"is not a run folder: it has no recipe\.yaml; nor one of diffusers",
        "h": "h is not a run folder, nor another checkpoint: there is no such file or folder here",
        "i.txt": r"i\.txt is no checkpoint; expected \.safetensors, \.pt",
    }
    (tmp_path / "g").mkdir()
    (tmp_path / "i.txt").write_text("hello")
    for name, sentence in sentences.items():
        with pytest.raises(MezzotintError, match=sentence):
            load(tmp_path / name)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    with pytest.raises(MezzotintError, match=r"facebook/DiT-XL-2-256 is not a path here, and the .*'hf download"):
        load("facebook/DiT-XL-2-256")
    folder = convert(run_of(made(recipe()), tmp_path / "run"), tmp_path / "out", to="diffusers")
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("facebook/DiT-XL-2-256").class_names == ("cat", "dog", "owl")
    assert [name for name, _ in asked] == ["facebook/DiT-XL-2-256"]
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert load("facebook/DiT-XL-2-256").recipe.backbone.num_classes == 1000  # without our header, 997 null rows
    assert [options["allow_patterns"][-1] for _, options in asked[1:]] == ["*.safetensors", "*.bin"]


def test_a_checkpoint_is_a_record(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(official(tmp_path / "dit.pt"), recipe())
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.source == str(tmp_path / "dit.pt")
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in checkpoint.tensors.values())
