"""Files of apple/ml-mdm: read, recognised, refused; against the official networks' numbers."""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint.backbones.nested import MDM_CONFIGS, NestedUNet, pack, unpack
from mezzotint.backbones.unet import UNet
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError
from mezzotint.interop import convert, is_checkpoint, load, read_checkpoint
from mezzotint.interop.checkpoint import empty_backbone
from mezzotint.interop.mdm import from_mdm, from_official, is_mdm, read_mdm
from mezzotint.pipeline import build_denoiser
from mezzotint.recipe import Recipe, load_recipe

TIME = 1024
TEXT = 16
TINY: tuple[dict[str, Any], ...] = (
    {"channels": (32, 64), "resblocks": (1, 1), "attention": (0, 2), "feed_forward": True, "micro_scale": 4.0},
    {"channels": (32, 32), "resblocks": (2, 1), "attention": (0, 0), "feed_forward": False, "micro_scale": 8.0},
    {"channels": (32, 32), "resblocks": (1, 1), "attention": (0, 0), "feed_forward": False, "micro_scale": 16.0},
)

# What the official networks (ml_mdm/models/unet.py and nested_unet.py, in float64 throughout) put out for the weights
# of `filled` and the inputs of `inputs`, smallest level first: the norm of each level, then its 8 values `places`.
OFFICIAL_UNET = """
    4.8971870866 0.4807930181 -0.4812892428 0.7017245815 0.5305205496
    -0.9634165802 -0.2458425229 0.1789488271 0.1820340555
"""
OFFICIAL_NESTED = """
    4.8921900142 0.0235358983 0.5641820515 0.2196044021 0.0930546056
    -0.9808993679 0.5271484947 0.1421289232 0.3185944088
    10.8032053384 0.5374203022 0.5461496725 -0.1687406238 -0.7276308457
    -0.1834079484 -0.1926998693 -0.4826807386 -0.3233692454
    24.3947134359 0.1715456921 -1.0582091599 0.1292619555 0.1734002759
    0.2111421641 -0.1334431548 -0.1079004590 0.2500243656
"""
# The same with an embedding of time that is 256 wide, and so has sinusoids 64 wide.
OFFICIAL_NARROW = """
    5.4052940998 -0.0102952466 0.5778280941 -0.0103205152 -0.0725538628
    -0.9668279771 0.6745612248 0.6526373636 0.1456785433
    10.8308990741 0.7759515839 0.7232868527 -0.7689354985 -0.4838360704
    -0.8089659314 0.0045098905 -0.4530455809 -0.2182917548
    24.8310481516 0.0735264349 0.0712590770 0.5970141133 0.8549063218
    -0.0452019309 0.4135466516 -0.0225007616 -0.1423476106
"""


def layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def block(
    name: str, inputs: list[int], width: int, attention: int, feed_forward: bool, resample: bool, text: int, time: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The official ResNetBlock: `attention` layers in all."""
    for i, n in enumerate(inputs):
        resnet = f"{name}.resnets.{i}"
        yield from layer(f"{resnet}.norm1", n)
        yield from layer(f"{resnet}.conv1", width, n, 3, 3)
        yield from layer(f"{resnet}.time_layer", 2 * width, time)
        yield from layer(f"{resnet}.norm2", width)
        yield from layer(f"{resnet}.conv2", width, width, 3, 3)
        if n != width:
            yield from layer(f"{resnet}.conv3", width, n, 1, 1)
    for i in range(attention):
        attn = f"{name}.attn.{i}"
        yield from layer(f"{attn}.norm", width)
        yield from layer(f"{attn}.qkv", 3 * width, width, 1, 1)
        yield from layer(f"{attn}.norm_cond", text)
        yield from layer(f"{attn}.kv_cond", 2 * width, text)
        yield from layer(f"{attn}.proj_out", width, width, 1, 1)
        if feed_forward:
            yield from layer(f"{attn}.ffn.0", width)
            yield from layer(f"{attn}.ffn.1", 4 * width, width, 1, 1)
            yield from layer(f"{attn}.ffn.3", width, 4 * width, 1, 1)
    if resample:
        yield from layer(f"{name}.resample", width, width, 3, 3)


def layout(levels: tuple[Any, ...], text: int = TEXT, time: int = TIME) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the official network whose levels, smallest first, these are."""
    *inner, level = levels
    channels, resblocks = level["channels"], level["resblocks"]
    last, ffn = len(channels) - 1, level.get("feed_forward", False)
    attention = level.get("attention", (0,) * (last + 1))
    for embedding in ("temb_layer{}", "cond_layers.scale.{}"):
        first = 1 if embedding.startswith("temb") else 0
        yield from layer(embedding.format(first), time, time // 4)
        yield from layer(embedding.format(first + 1), time, time)
    yield from layer("conv_in", channels[0], 3, 3, 3)
    skips, width = [channels[0]], channels[0]
    for i, n in enumerate(resblocks):
        widths = [width] + [channels[i]] * (n - 1)
        yield from block(f"down_blocks.{i}", widths, channels[i], n * attention[i], ffn, i < last, text, time)
        width = channels[i]
        skips += [width] * (n + (i < last))
    for k, i in enumerate(reversed(range(last + 1))):
        widths = []
        for _ in range(resblocks[i] + 1):
            widths.append(width + skips.pop())
            width = channels[i]
        yield from block(f"up_blocks.{k}", widths, width, (resblocks[i] + 1) * attention[i], ffn, i > 0, text, time)
    yield from layer("norm_out", channels[0])
    yield from layer("conv_out", 3, channels[0], 3, 3)
    if inner:
        yield from layer("in_adapter", inner[-1]["channels"][0], channels[-1], 3, 3)
        yield from layer("out_adapter", channels[-1], inner[-1]["channels"][0], 3, 3)
        yield from ((f"inner_unet.{name}", shape) for name, shape in layout(tuple(inner), text, time))
        return
    yield from block("mid_blocks.0", [channels[-1]], channels[-1], 1, ffn, False, text, time)
    yield from block("mid_blocks.1", [channels[-1]], channels[-1], 0, ffn, False, text, time)
    yield "cond_emb.weight", (time, text)
    yield from layer("lm_proj", text, text)


def filled(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Reproducible weights that depend on nothing but shape and place in the sorted list of names."""
    tensors = {}
    for k, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        values = torch.cos(k + n**1.5).view(shape)
        if len(shape) > 1:
            values *= 1.5 / torch.Size(shape[1:]).numel() ** 0.5
        else:
            values = 0.1 * values + name.endswith("weight")
        tensors[name] = values.to(dtype)
    return tensors


def inputs(dtype: torch.dtype, levels: int = 3) -> tuple[list[Tensor], Tensor, Text]:
    """Two examples: levels of 4, 8 and 16 pixels, the network's times, captions of 5 and 3 tokens."""
    x = [(torch.arange(6.0 * 16 * 4**k, dtype=torch.float64) ** 1.2).sin().view(2, 3, 4 * 2**k, -1) for k in range(3)]
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    features = (1.3 * torch.arange(10.0 * TEXT, dtype=torch.float64)).sin().view(2, 5, TEXT) * mask.unsqueeze(-1)
    return [level.to(dtype) for level in x[:levels]], torch.tensor([17, 740]).to(dtype), Text(features.to(dtype), mask)


def summary(levels: list[Tensor]) -> Tensor:
    """(levels, 9): the norm of each level and 8 of its values."""
    rows = []
    for level in levels:
        flat = level.double().flatten()
        places = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long()
        rows.append(torch.cat([flat.norm().view(1), flat[places]]))
    return torch.stack(rows)


def numbers(text: str) -> Tensor:
    return torch.tensor([float(value) for value in text.split()], dtype=torch.float64).view(-1, 9)


def tensors(levels: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return filled(dict(layout(TINY[:levels])), dtype)


PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@torch.no_grad()
def test_an_official_unet_gives_the_official_output(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    torch.save({"state_dict": tensors(1, dtype)}, tmp_path / "vis_model_4x4.pth")
    network = read_mdm(tmp_path / "vis_model_4x4.pth", input_size=4).network()
    assert isinstance(network, UNet)
    assert not network.training
    (x,), t, y = inputs(dtype, 1)
    expected = numbers(OFFICIAL_UNET)
    assert (summary([network(x, t, y)]) - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@torch.no_grad()
def test_an_official_nested_network_gives_the_official_outputs(dtype: torch.dtype, tolerance: float) -> None:
    network = from_mdm(tensors(3, dtype), "file", input_size=4).network()
    assert isinstance(network, NestedUNet)
    x, t, y = inputs(dtype)
    got = summary(unpack(network(pack(x), t, y), network.level_shapes))
    expected = numbers(OFFICIAL_NESTED)
    assert ((got - expected).abs() < tolerance * expected[:, :1]).all()


@torch.no_grad()
def test_an_official_network_with_a_narrow_embedding_of_time(tmp_path: Path) -> None:
    """Its sinusoids are a quarter as wide as the embedding, in its file and in the run that it becomes."""
    expected = numbers(OFFICIAL_NARROW)
    x, t, y = inputs(torch.float64)
    shapes = dict(layout(TINY, time=256))
    found = from_mdm(filled(shapes), "file", input_size=4)
    assert [level["time_frequencies"] for level in found.levels] == [32, 32, 32]
    network = found.network()
    got = summary(unpack(network(pack(x), t, y), network.level_shapes))  # type: ignore[arg-type]
    assert ((got - expected).abs() < 1e-8 * expected[:, :1]).all()

    torch.save({"state_dict": filled(shapes, torch.float32)}, tmp_path / "vis_model.pth")
    small = load_recipe("mdm-1024", ["data.size=64", "backbone.text_features=null", "backbone.micro_scale=4"])
    outer = zip(small.backbone.outer, (8, 16), strict=True)
    levels = tuple(level.model_copy(update={"micro_scale": scale}) for level, scale in outer)
    small = small.model_copy(update={"backbone": small.backbone.model_copy(update={"outer": levels})})
    run = convert(tmp_path / "vis_model.pth", tmp_path / "run", recipe=small)
    sizes = load_recipe(run).backbone
    assert [level.time_frequencies for level in (sizes, *sizes.outer)] == [32, 32, 32]
    loaded = load(run).denoiser.backbone
    x, t, y = inputs(torch.float32)
    got = summary(unpack(loaded(pack(x), t, y), loaded.level_shapes))  # type: ignore[arg-type]
    assert ((got - expected).abs() < 1e-5 * expected[:, :1]).all()


def test_sizes_are_read_from_the_shapes() -> None:
    levels = from_mdm(tensors(3), "file", input_size=4).levels
    for found, written in zip(levels, TINY, strict=True):
        assert found | written == found
        assert (found["time_width"], found["time_frequencies"]) == (TIME, 128)
    assert levels[0] | {"input_size": 4, "in_channels": 3, "out_channels": 3, "middle": True} == levels[0]
    assert levels[0] | {"text_features": TEXT, "text_width": TEXT, "masked_text": False} == levels[0]
    assert [level.get("normalise_input") for level in levels] == [None, True, False]


def test_a_network_without_text_micro_conditioning_or_middle() -> None:
    absent = ("cond_emb", "lm_proj", "cond_layers", "mid_blocks")
    shapes = {name: shape for name, shape in layout(TINY[:1]) if not name.startswith(absent) and "_cond" not in name}
    (level,) = from_mdm(filled(shapes), "file").levels
    assert not level["middle"]
    assert not level.keys() & {"text_features", "text_width", "micro_scale"}


@pytest.mark.parametrize(
    ("name", "count"), [("mdm-64", 461_359_107), ("mdm-256", 476_613_958), ("mdm-1024", 480_970_057)]
)
def test_published_sizes_are_recognised(name: str, count: int) -> None:
    shapes = dict(layout(MDM_CONFIGS[name], text=2048))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    levels = from_mdm({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "file").levels
    for found, published in zip(levels, MDM_CONFIGS[name], strict=True):
        assert found | published == found


def test_names_of_parallel_and_compiled_networks() -> None:
    plain = from_mdm(tensors(3), "file")
    for wrapped in (
        {f"module._orig_mod.{name}": tensor for name, tensor in tensors(3).items()},
        {f"model.{name.replace('inner_unet.', 'inner_unet.module.')}": tensor for name, tensor in tensors(3).items()},
    ):
        assert is_mdm(wrapped)
        read = from_mdm(wrapped, "file")
        assert plain.levels == read.levels
        assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in plain.tensors.items())


class Configuration:
    """As the training script saves along."""

    def __init__(self) -> None:
        self.image_size = 64


def touch(path: str) -> None:
    Path(path).touch()


class Command:
    """Would run something if it were unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return touch, (str(self.mark),)


def test_what_the_training_script_saves_along_is_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "vis_model.pth"
    arguments = argparse.Namespace(lr=1e-4, reader_config=Configuration())
    torch.save({"state_dict": tensors(1), "args": arguments, "batch_num": 7, "other": Command(mark)}, file)
    read = read_mdm(file, input_size=4)
    assert not mark.exists()
    assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in from_mdm(tensors(1), "").tensors.items())
    with pytest.raises(pickle.UnpicklingError):  # and the next file is read with the usual care
        torch.load(file, weights_only=True)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = tensors(1)

    def refused(content: Mapping[str, Any], sentence: str) -> None:
        with pytest.raises(MezzotintError, match=sentence):
            from_mdm(content, "file")

    refused({"x_embedder.proj.weight": torch.zeros(1)}, r"file is not an MDM: it has 1 entries \(x_embedder\.proj")
    refused(given | {"step": 3}, "its entry 'step' is no tensor")
    refused(given | {"lm_head.0.attn.qkv.weight": torch.zeros(1)}, "num_lm_head_layers.*which our networks lack")
    refused(given | {"down_blocks.1.t_attn.0.attn.norm.bias": torch.zeros(1)}, "official attention over frames")
    refused(given | {"cond_layers.watermark_score.0.bias": torch.zeros(1)}, "something else than scale")
    refused({k: v for k, v in given.items() if k != "conv_in.weight"}, "not a whole MDM.*conv_in.weight.*level 1")
    refused({k: v for k, v in given.items() if k.startswith("temb")}, "not a whole MDM.*down_blocks.0.resnets")
    refused({k: v for k, v in given.items() if k != "norm_out.bias"}, "do not fit the network: missing norm_out.bias")
    refused({k: v for k, v in given.items() if "lm_proj" not in k}, "not a whole MDM.*encoder.weight")
    narrow = r"micro_embedder\.mlp\.0\.weight has shape \(1024, 256\), expected \(1024, 64\)"
    refused(given | {"temb_layer1.weight": torch.zeros(TIME, 64)}, narrow)
    (tmp_path / "cut.pth").write_bytes(b"PK")
    with pytest.raises(MezzotintError, match="not a whole PyTorch file"):
        read_mdm(tmp_path / "cut.pth")


# ------------------------------------------------------------------------------------------- by the library's functions


def official_file(path: Path, levels: int = 3) -> Path:
    """As the training script saves it, with a configuration that is an object of the official code."""
    torch.save({"state_dict": tensors(levels), "args": argparse.Namespace(reader_config=Configuration())}, path)
    return path


def words(size: int = 64) -> Recipe:
    """Of a published network; its smallest images have `size` / 16 pixels."""
    return load_recipe("mdm-1024", [f"data.size={size}", "backbone.text_features=null"])


class Letters:
    """In place of a pretrained text encoder: a token for each letter."""

    width = TEXT

    def encode(self, captions: list[str], *, cached: bool = True) -> Text:
        length = max(1, *map(len, captions))
        numbers = torch.tensor([[ord(c) for c in caption.ljust(length)] for caption in captions], dtype=torch.float32)
        mask = torch.arange(length) < torch.tensor([[max(1, len(caption))] for caption in captions])
        features = (numbers.unsqueeze(-1) * torch.arange(1.0, TEXT + 1)).sin() * mask.unsqueeze(-1)
        return Text(features, mask)


@torch.no_grad()
def test_a_file_is_a_pipeline_whose_network_gives_the_official_outputs(tmp_path: Path) -> None:
    file = official_file(tmp_path / "vis_model.pth")
    assert is_checkpoint(file)
    read = read_checkpoint(file, words())
    sizes = read.recipe.backbone
    assert read.recipe.latent_shape == (3, 16, 16)
    assert (sizes.text_features, sizes.masked_text, sizes.heads, sizes.groups) == (TEXT, False, 8, 32)
    assert [sizes.channels, *(level.channels for level in sizes.outer)] == [level["channels"] for level in TINY]
    assert [level.normalise_input for level in sizes.outer] == [True, False]
    assert [sizes.micro_scale, *(level.micro_scale for level in sizes.outer)] == [64, 256, 1024], "as the recipe has it"

    small = ["backbone.micro_scale=4", "backbone.outer=" + "[{channels: [32, 32], resblocks: [2, 1], micro_scale: 8, "
             "normalise_input: true}, {channels: [32, 32], resblocks: [1, 1], micro_scale: 16}]",
             "backbone.channels=[32, 64]", "backbone.resblocks=[1, 1]", "backbone.attention=[0, 2]"]  # fmt: skip
    small += [f"backbone={{time_width: {TIME}, text_width: {TEXT}}}", "data.size=16", "backbone.text_features=null"]
    asked = load_recipe("mdm-1024", small)
    network = load(file, recipe=asked).denoiser.backbone
    x, t, y = inputs(torch.float32)
    expected = numbers(OFFICIAL_NESTED)
    got = summary(unpack(network(pack(x), t, y), network.level_shapes))  # type: ignore[arg-type]
    assert ((got - expected).abs() < 1e-5 * expected[:, :1]).all()


def test_a_file_converts_samples_and_keeps_every_bit(tmp_path: Path) -> None:
    file = official_file(tmp_path / "vis_model_256x256.pth", 2)
    found = read_checkpoint(file).recipe
    assert (found.name, found.description) == ("vis_model_256x256", "Read from vis_model_256x256.pth.")
    assert found.latent_shape == (3, 128, 128), "64, and the one level around it is twice as large"
    assert (found.target, found.interpolant.name, found.time_input) == ("v", "cosine", (1000, -1))
    assert (found.condition.name, found.condition.encoder) == ("text", "google/flan-t5-xl")

    run = convert(
        file, tmp_path / "run", recipe=load_recipe("mdm-256", ["data.size=16", "backbone.text_features=null"])
    )
    kept = from_mdm(tensors(2), "file").tensors
    written = load_file(run / "model.safetensors")
    assert written.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in written.items())
    pipeline = load(run)
    pipeline.captioner = Letters()  # type: ignore[assignment]
    images = mezzotint.sample(pipeline, prompts=["a red ball", "sea"], count=2, steps=2, guidance=2.0)
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()
    with pytest.raises(MezzotintError, match="is a Matryoshka network, and the format 'official' is for DiT and SiT"):
        convert(run, tmp_path / "out.pt", to="official")
    save_file(tensors(2), tmp_path / "vis_model_256x256.safetensors")
    assert read_checkpoint(tmp_path / "vis_model_256x256.safetensors").recipe.backbone == found.backbone


def test_a_file_of_another_network_than_the_recipe_s_is_refused(tmp_path: Path) -> None:
    file = official_file(tmp_path / "vis_model.pth", 1)
    sentence = r"vis_model\.pth is an MDM of 1 level\(s\), and recipe '{}' another network; .* or give one like mdm-64"
    for name in ("mdm-256", "dit-xl-2-256"):
        with pytest.raises(MezzotintError, match=sentence.format(name)):
            read_checkpoint(file, load_recipe(name))
    with pytest.raises(
        MezzotintError, match=r"has backbone.channels \(32, 64\), .*where recipe 'mdm-64' says \(256, 512"
    ):
        load(file, recipe=load_recipe("mdm-64"))
    with pytest.raises(MezzotintError, match=r"has 4 levels, more than the published networks; give its recipe"):
        from_official(filled(dict(layout((*TINY, TINY[2])))), file, None)
    with pytest.raises(MezzotintError, match=r"vis_model\.pth reads captions, which recipe 'mdm-64' has none of"):
        read_checkpoint(file, load_recipe("mdm-64", ["condition=class", "backbone.text_features=null"]))
    torch.save({"state_dict": 3, "temb": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(MezzotintError, match="its entry 'state_dict' is no tensor"):
        read_checkpoint(tmp_path / "other.pth", load_recipe("dit-xl-2-256"))


@pytest.mark.parametrize("name", MDM_CONFIGS)
def test_a_published_file_means_the_shipped_recipe(name: str) -> None:
    """Sizes alone, by tensors without memory."""
    shapes = dict(layout(MDM_CONFIGS[name], text=2048))
    content = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert from_official(content, Path("vis_model.pth"), None).recipe == load_recipe(name)


@pytest.mark.parametrize(("name", "power"), [("mdm-64", 0), ("mdm-256", 1), ("mdm-1024", 2)])
def test_the_recipes_have_the_public_schedule_at_every_level(name: str, power: int) -> None:
    """Against the products of 1 − β in float64, and the signal-to-noise ratio divided by (side / 64)^power."""
    recipe = load_recipe(name)
    denoiser = build_denoiser(recipe, empty_backbone(recipe))
    sides = [shape[-1] for shape in denoiser.level_shapes]
    assert sides == [64, 256, 1024][: len(sides)]
    signal = 1.0
    for step in range(1, 501):
        u, before = (math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (step, step - 1))
        signal *= 1 - min(1 - u / before, 0.999)
    x = torch.zeros(1, *denoiser.in_shape, dtype=torch.float64)
    c = denoiser.interpolant.coefficients(torch.tensor([0.5], dtype=torch.float64), x)
    alpha, sigma = (value.expand_as(x).flatten() for value in (c.alpha, c.sigma))
    end = 0
    for side in sides:
        shifted = 1 / (1 + (side / 64) ** power * (1 - signal) / signal)
        here = slice(end, end := end + 3 * side**2)
        for got, expected in ((alpha[here], shifted**0.5), (sigma[here], (1 - shifted) ** 0.5)):
            assert (got - expected).abs().max() < 1e-12
    assert end == x.numel()
