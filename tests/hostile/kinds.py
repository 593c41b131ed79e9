"""The kinds of cases: a valid input, what is done to it, who reads it, and what may come out.

A kind is a function of a `Case`; it returns where the input was read and raises `MezzotintError` where it was refused.
What is valid is made once (`make_seeds`); a case has copies.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import inspect
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import typer
import yaml
from damage import ODD_TEXTS, damage_file, damage_folder, damaged_bytes, damaged_tree, odd_value
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from mezzotint import cli, data
from mezzotint.archive import sample_to_npz
from mezzotint.data import iterate_batches
from mezzotint.encoding import encode
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import feature_network
from mezzotint.evaluation.frechet import frechet_distance
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.sources import image_source, picture_folder
from mezzotint.interop import convert, read_checkpoint
from mezzotint.interop import load as load_checkpoint
from mezzotint.pipeline import build, sample, save_weights
from mezzotint.recipe import DataSettings, Recipe, load_recipe, override_recipe, read_override, recipe_names
from mezzotint.representations.tokenizer import open_tokenizer
from mezzotint.training.loop import make_objective
from mezzotint.training.tokenizers import fit_tokenizer

#: a network of a thousand weights, and a run of two steps
TINY = (
    "backbone.width=8", "backbone.depth=1", "backbone.heads=2", "training.steps=2", "training.batch_size=4",
    "training.warmup_steps=0", "training.lr_schedule=constant", "training.checkpoint_every=1", "training.log_every=1",
    "objective.times=auto", "sampling=ode-euler", "sampling.steps=1",
)  # fmt: skip
SIZE = 12
"""Sides of the pictures."""
#: modules that a pickle of a stranger names; none may be looked up
STRANGERS = ("os", "posix", "subprocess", "builtins", "sys", "evil", "runpy", "importlib", "shutil")


class Wrong(Exception):
    """A case that ended neither in a right result nor in a sentence."""


@dataclass
class Case:
    """One case: its random numbers, its folder, which is the working one, and the valid inputs."""

    rng: random.Random
    folder: Path
    seeds: Path
    did: list[str] = field(default_factory=list)
    """What was done, for the report."""

    def copy(self, name: str, to: str | None = None) -> Path:
        source, place = self.seeds / name, self.folder / (to or name)
        place.parent.mkdir(parents=True, exist_ok=True)
        return Path((shutil.copytree if source.is_dir() else shutil.copyfile)(source, place))

    def damage(self, place: Path, **options: Any) -> None:
        self.did.append((damage_folder if place.is_dir() else damage_file)(self.rng, place, **options))


class Kind(NamedTuple):
    run: Callable[[Case], object]
    weight: float
    """How often, beside the others."""


KINDS: dict[str, Kind] = {}


def kind(weight: float) -> Callable[[Callable[[Case], object]], Callable[[Case], object]]:
    def add(function: Callable[[Case], object]) -> Callable[[Case], object]:
        KINDS[function.__name__] = Kind(function, weight)
        return function

    return add


class Quiet(io.StringIO):
    """In place of standard output or error; as an encoding one: what cannot be written is an error there, too."""

    def write(self, text: str) -> int:
        text.encode("utf-8", "surrogateescape")
        return super().write(text)


def expect_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Raises `Wrong` unless the tensors agree to the bit."""
    if found.keys() != wanted.keys():
        raise Wrong(f"{what} has other tensors than it was saved with")
    for name, tensor in wanted.items():
        ours = found[name]
        if ours.dtype != tensor.dtype or ours.shape != tensor.shape or not _bits(ours).equal(_bits(tensor)):
            raise Wrong(f"{what} was read with other values than it was saved with")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


# ---- What is valid ---------------------------------------------------------------------------------------------------


def make_seeds(folder: Path) -> None:
    """Small valid inputs of every kind."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    digits = load_recipe("digits", TINY)
    run = folder / "run"
    mezzotint.train(digits, run, quiet=True)
    shutil.copytree(run, folder / "going")  # the same run, stopped after its first step
    shutil.rmtree(folder / "going/state/step-00000002")
    pipeline = mezzotint.load(run)
    sample_to_npz(pipeline, folder / "samples.npz", count=6)
    (folder / "samples.npz.json").unlink()
    reference_statistics(str(folder / "samples.npz"), feature_network("pixels"), rows=4).save(folder / "reference.npz")
    n, d = 8, 4
    features = rng.normal(size=(n, d))
    np.savez(folder / "statistics.npz", mu=features.mean(0), sigma=np.cov(features.T))

    for number, ending in enumerate(("png", "jpg", "gif", "tif", "webp", "bmp")):
        for name in ("cat", "dog"):
            (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (SIZE + number, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.{ending}")
    (folder / "captions").mkdir()
    lines = []
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"captions/{number}.png")
        lines.append({"file_name": f"{number}.png", "text": f"number {number}"})
    (folder / "captions/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = load_recipe("digits", [*TINY, f"data=captions:{folder / 'captions'}", "data.channels=3", "condition=text"])
    mezzotint.train(text, folder / "text-run", quiet=True)

    (folder / "shards").mkdir()
    (folder / "shards/classnames.txt").write_text("cat\ndog\n")
    for shard in range(2):
        with tarfile.open(folder / f"shards/{shard:05}.tar", "w") as archive:
            for number in range(3):
                png = (folder / f"captions/{number}.png").read_bytes()
                for ending, content in (("png", png), ("txt", b"a caption"), ("cls", b"1"), ("json", b'{"text": "x"}')):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    (folder / "idx").mkdir()
    images, labels = rng.integers(0, 256, (6, 8, 8), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    for split in ("train", "t10k"):
        image_file = struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape) + images.tobytes()
        label_file = struct.pack(">BBBBI", 0, 0, 8, 1, len(labels)) + labels.tobytes()
        (folder / f"idx/{split}-images-idx3-ubyte").write_bytes(image_file)
        (folder / f"idx/{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(label_file, mtime=0))

    tokenizer = ["representation=patch-pca", "representation.stride=2", "representation.channels=3"]
    words = load_recipe("digits", [*TINY, *tokenizer, "backbone.patch_size=1"])
    fit_tokenizer(words, folder / "tokenizer", quiet=True)
    words = override_recipe(words, [f"representation.path={folder / 'tokenizer'}"])
    encode(words, folder / "latents", splits=["train"], shard_size=800, progress=False, device="cpu")

    sizes = ("data.size=32", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "backbone.num_classes=3")
    published = load_recipe("dit-xl-2-256", [*sizes, "representation.path=null"])
    made = build(published, class_names=("cat", "dog", "owl"))
    for parameter in made.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (folder / "foreign").mkdir()
    (folder / "foreign/recipe.yaml").write_text(made.recipe.to_yaml())
    save_weights(made.denoiser.backbone, folder / "foreign/model.safetensors", {})
    convert(folder / "foreign", folder / "DiT-XL-2.pt", to="official")
    convert(folder / "foreign", folder / "diffusers", to="diffusers")
    tensors = {name: tensor.clone() for name, tensor in torch.load(folder / "DiT-XL-2.pt").items()}
    save_file(tensors, folder / "DiT-XL-2.safetensors")
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=3)
    torch.save({"ema": tensors, "opt": {"lr": 1e-4}, "args": arguments}, folder / "trained.pt")


# ---- Recipes, overrides ----------------------------------------------------------------------------------------------

BASES = ("digits", "mdm-64", "dit-xl-2-256", "ldae-10-original-image", "mdm-moving-digits", "dae-digits")


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """A recipe that was read means the same when it is written and read again, and all its numbers are numbers."""
    written = folder / "written.yaml"
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    if load_recipe(written) != recipe:
        raise Wrong("a recipe that was written is read as another one")
    stack: list[Any] = [recipe.model_dump()]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, float) and not math.isfinite(value):
            raise Wrong(f"a recipe with {value} was read")
    if Path(recipe.name).name != recipe.name or recipe.name in ("", ".", ".."):
        raise Wrong(f"a recipe with the name {recipe.name!r}, which is a way to another folder, was read")


@cache
def base_recipe(name: str) -> Recipe:
    return load_recipe(name)


def dump(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@kind(5)
def recipe(case: Case) -> None:
    """A recipe's nodes or bytes."""
    rng = case.rng
    file = case.folder / "x.yaml"
    base = rng.choice(BASES)
    tree: Any = {"extends": base} if rng.random() < 0.3 else base_recipe(base).model_dump(mode="json")
    how = rng.randrange(5)
    if how < 2:
        text = dump(damaged_tree(rng, tree)).encode("utf-8", "surrogateescape")
    elif how == 2:  # a line of a person
        lines = dump(tree).splitlines()
        place = rng.randrange(len(lines) + 1)
        key = rng.choice(("seed", "data", "backbone", "  name", "  width", "extends", "training", "  lr", "target", ""))
        lines.insert(place, f"{key}: {rng.choice(ODD_TEXTS)}")
        text = "\n".join(lines).encode("utf-8", "surrogateescape")
    elif how == 3:
        text = damaged_bytes(rng, dump(tree).encode())
    else:
        bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, rng.randrange(2, 12)))
        loops = (
            "extends: x.yaml\n",
            "extends: ./x.yaml\n",
            "data: &d\n  <<: *d\n",
            "seed: &s [*s]\n",
            "&a ? *a\n: 1\n",
        )
        text = rng.choice((bomb, *loops, f"data: {'[' * 5000}", f"data: {'{a: ' * 3000}", "- a\n- b\n")).encode()
    file.write_bytes(text)
    case.did.append(repr(text[:600]))
    check_recipe(load_recipe(file), case.folder)


@kind(1.5)
def run_recipe(case: Case) -> None:
    """A run's recipe.yaml cut short or changed: what it says is what the run was trained with."""
    run = case.copy("run/recipe.yaml").parent
    (case.folder / "run/model.safetensors").symlink_to(case.seeds / "run/model.safetensors")
    file = run / "recipe.yaml"
    content = file.read_bytes()
    file.write_bytes(content[: case.rng.randrange(len(content))])
    case.did.append(f"cut {file.name} to {file.stat().st_size} of {len(content)} bytes")
    if load_recipe(run) != load_recipe(case.seeds / "run"):
        raise Wrong("a recipe.yaml that was cut off is read as another recipe")


def keys_of(model: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, about in model.model_fields.items():
        yield before + name
        if isinstance(about.annotation, type) and issubclass(about.annotation, BaseModel):
            yield from keys_of(about.annotation, f"{before}{name}.")


KEYS = tuple(keys_of(Recipe))


@kind(5)
def override(case: Case) -> None:
    """key=value on the command line."""
    rng = case.rng
    given = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(KEYS)
        if rng.random() < 0.1:
            key = rng.choice((key + "x", key.upper(), f".{key}", f"{key}.", f"{key}.a", "", " ", "a.b.c", "extends"))
        value = rng.choice(ODD_TEXTS) if rng.random() < 0.7 else dump(odd_value(rng)).strip()
        given.append(f"{key}={value}" if rng.random() < 0.97 else f"{key}{value}")
    case.did.append(repr(given))
    check_recipe(override_recipe(base_recipe(rng.choice(BASES)), given), case.folder)


@kind(0.25)
def words(case: Case) -> None:
    """Any combination of valid words: refused when it is built, or it trains, samples and stays finite."""
    rng = case.rng
    changes = []
    for _ in range(rng.choice((1, 2, 3, 4, 6))):
        key, value = rng.choice(WORDS)
        changes.append(f"{key}={json.dumps(rng.choice(value))}")
    base = rng.choice((["backbone=dit"], ["backbone=diffussm"], [UNET], [NESTED]))
    case.did.append(repr([*base, *changes]))
    made = load_recipe("digits", [*SMALL, *base, *changes, "backbone.num_classes=2"])
    check_recipe(made, case.folder)
    if made.representation.name != "pixels":
        return
    pipeline = build(made, class_names=("a", "b"))
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    objective = make_objective(made, pipeline.denoiser)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *made.output_shape, generator=generator) * 2 - 1
    x = pipeline.representation.encode(images)
    loss = objective(x, torch.tensor([0, 1]), objective.draw(2, generator))["loss"]
    if not loss.isfinite().all():
        raise Wrong("the loss of fresh weights is not finite")
    if not sample(pipeline, count=2).isfinite().all():
        raise Wrong("samples of fresh weights are not finite")


SMALL = ("backbone.width=8", "backbone.depth=1", "backbone.heads=2", "sampling.steps=2", "objective.times=auto")
UNET = "backbone={name: unet, channels: [8, 8], resblocks: [1, 1], groups: 2, heads: 2, attention: [0, 1]}"
NESTED = UNET[:-1] + ", outer: [{channels: [4, 8], resblocks: [1, 1], groups: 2, heads: 2}]}"


def choices_of(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Small valid values of every setting that is a word, a switch or a number."""
    for name, about in model.model_fields.items():
        kind_, key = about.annotation, before + name
        if isinstance(kind_, type) and issubclass(kind_, BaseModel):
            yield from choices_of(kind_, f"{key}.")
        elif get_origin(kind_) is Literal:
            yield key, get_args(kind_)
        elif kind_ is bool:
            yield key, (False, True)
        elif kind_ is int:
            yield key, (1, 2, 4)
        elif kind_ is float:
            yield key, (0.1, 0.5, 1.0, 2.0)


#: some are drawn more often than the many that matter less
WORDS = [
    (key, values)
    for key, values in choices_of(Recipe)
    if key.split(".")[0]
    in ("interpolant", "target", "variance", "objective", "sampling", "guidance", "backbone", "condition")
    and key not in ("objective.time_eps", "condition.name", "backbone.outer")
]
WORDS += [("interpolant", ("linear", "gvp", "vp", "ddpm", "cosine", "variance-exploding", "linear-variance"))] * 12
WORDS += [("target", ("data", "noise", "velocity", "score", "v"))] * 12
WORDS += [
    (
        "sampling.sampler",
        ("ddpm", "ddim", "ode-heun", "ode-rk4", "ode-dopri5", "sde-sigma", "sde-heun-sigma", "dpm-solver++"),
    )
] * 12
WORDS += [("guidance.scale", (0.0, 1.5, 4.0)), ("guidance.interval", ([0.2, 0.8], [0, 1], [0.5, 0.5]))] * 4


# ---- Weights ---------------------------------------------------------------------------------------------------------


@kind(3)
def run_weights(case: Case) -> None:
    """A run's model.safetensors: whatever is read has the run's bits."""
    run = case.copy("run")
    file = run / "model.safetensors"
    file.write_bytes(damaged_bytes(case.rng, file.read_bytes()))
    wanted = load_file(case.seeds / "run/model.safetensors")
    found = mezzotint.load(run).denoiser.backbone.state_dict()
    if b'"crc32":' in file.read_bytes():  # a file without a checksum is one that somebody made on purpose
        expect_same({name: found[name] for name in wanted}, wanted, "a run's model.safetensors")


def with_header(content: bytes, header: object) -> bytes:
    """A safetensors file with another header before the same bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    text = json.dumps(header).encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@kind(2)
def safetensors(case: Case) -> None:
    """Lone safetensors files, ours and others': their bytes, and what their headers say."""
    rng = case.rng
    name = rng.choice(("run/model.safetensors", "DiT-XL-2.safetensors", "text-run/model.safetensors"))
    file = case.copy(name, rng.choice(("DiT-XL-2.safetensors", "x.safetensors", "SiT.safetensors")))
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    how = rng.randrange(4)
    if how == 0:
        content = damaged_bytes(rng, content)
    elif how == 1:
        content = with_header(content, damaged_tree(rng, header))
    elif how == 2:  # what others write there
        said = {"format": "pt", "step": "3", "class_names": "{", "prompts": "[1]", "recipe": "{}", "cache": "x"}
        said |= {"class_names": rng.choice(('["a"]', "[null]", "3", "[" * 5000, "NaN", '{"a": 1}', ""))}
        some = rng.sample(sorted(said), rng.randrange(1, len(said) + 1))
        content = with_header(content, header | {"__metadata__": {key: said[key] for key in some}})
    else:  # other kinds of numbers, other shapes
        tensors = load_file(file)
        key = rng.choice(sorted(tensors))
        t = tensors[key]
        kinds = (
            torch.bool,
            torch.float8_e4m3fn,
            torch.int64,
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.uint8,
        )
        changed = (t.to(rng.choice(kinds)), t[..., :1], t.flatten(), t[None], t[:0], t * float("nan"), t * float("inf"))
        tensors[key] = rng.choice(changed).contiguous()
        if rng.random() < 0.3:
            tensors = {rng.choice(("module.", "_orig_mod.", "")) + name: tensor for name, tensor in tensors.items()}
        if rng.random() < 0.2:
            tensors["blocks.9999999999.x"] = torch.zeros(1)
        file.unlink()
        save_file(tensors, file)
        content = file.read_bytes()
    file.write_bytes(content)
    case.did.append(f"{name}: {content[:300]!r}")
    asked = None if rng.random() < 0.6 else load_recipe(case.seeds / ("run" if "run" in name else "foreign"))
    checkpoint = read_checkpoint(file, asked)
    check_network(case, checkpoint)


def check_network(case: Case, checkpoint: Any) -> None:
    """What a checkpoint says it is can be built, and is of finite numbers."""
    for name, tensor in checkpoint.tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise Wrong(f"{name} was read as {tensor.dtype}, or with values that are not finite")
    if case.rng.random() < 0.3:
        load_checkpoint(checkpoint.source, recipe=checkpoint.recipe)


class Evil:
    """Whose unpickling calls something."""

    def __init__(self, call: Any, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call, self.arguments


def evil(rng: random.Random) -> object:
    """An object whose pickle, where it is run, leaves a file "executed" behind or looks a stranger's class up."""
    if "evil" not in sys.modules:
        stranger = sys.modules["evil"] = types.ModuleType("evil")
        stranger.Thing = type("Thing", (), {"__module__": "evil"})  # type: ignore[attr-defined]
    calls = (
        (os.system, "touch executed"),
        (eval, "open('executed', 'w')"),
        (os.mkdir, "executed"),
        (getattr, "", "join"),
    )
    call, *arguments = rng.choice(calls)
    return rng.choice((Evil(call, *arguments), Evil(call, *arguments), sys.modules["evil"].Thing()))


@kind(2.5)
def pickles(case: Case) -> None:
    """.pt files: their bytes, what training scripts save along, and strangers' classes."""
    rng = case.rng
    name = rng.choice(("DiT-XL-2.pt", "trained.pt"))
    file = case.copy(name, rng.choice(("DiT-XL-2.pt", "x.pth", "SiT-XL-2.ckpt", "y.bin")))
    how = rng.randrange(4)
    if how == 0:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    elif how == 1:
        tensors = torch.load(case.seeds / "DiT-XL-2.pt")
        content: Any = {"ema": tensors, "args": rng.choice(({}, {"model": "DiT-XL/2"}, None, [], 3))}
        content[rng.choice(("args", "opt", "ema", "extra"))] = evil(rng)
        torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    elif how == 2:
        arguments = {"model": "SiT-XL/2", "path_type": rng.choice(("Linear", "GVP", "cosine", "linear", 3)),
                     "prediction": rng.choice(("velocity", "v", "noise", "x", None)), "loss_weight": None}  # fmt: skip
        namespace = argparse.Namespace(**arguments)
        content = {"ema": torch.load(case.seeds / "DiT-XL-2.pt"), "args": rng.choice((namespace, arguments))}
        if rng.random() < 0.4:
            content["ema"][rng.choice(sorted(content["ema"]))] = rng.choice((None, 3, "x", [torch.zeros(2)]))
        if rng.random() < 0.3:
            content = rng.choice(([content], content["ema"], {}, {1: torch.zeros(1)}, torch.zeros(3), {"ema": {}}, "x"))
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(rng.choice((evil(rng), {"ema": evil(rng)}, {"a": 1})), protocol=rng.randrange(5)))
    checkpoint = read_checkpoint(file, None if rng.random() < 0.5 else load_recipe(case.seeds / "foreign"))
    check_network(case, checkpoint)


@kind(1.5)
def diffusers(case: Case) -> None:
    """diffusers' folders."""
    folder = case.copy("diffusers")
    if case.rng.random() < 0.2:
        index = {"weight_map": {"a": case.rng.choice(("../x", "/etc/passwd", "x.safetensors", None, 3))}}
        source = next(folder.rglob("diffusion_pytorch_model.safetensors"))
        source.rename(source.with_name("x.safetensors"))
        source.with_name(f"{source.name}.index.json").write_text(json.dumps(damaged_tree(case.rng, index)))
    case.damage(folder)
    check_network(case, read_checkpoint(folder))


@kind(1.5)
def tokenizer(case: Case) -> None:
    """A tokenizer's folder."""
    folder = case.copy("tokenizer")
    case.damage(folder, only=lambda file: file.name.startswith("tokenizer."))
    found = open_tokenizer(folder).state_dict()
    wanted = open_tokenizer(case.seeds / "tokenizer").state_dict()
    expect_same(found, wanted, "a tokenizer")


# ---- Data ------------------------------------------------------------------------------------------------------------


def read_all(dataset: Any) -> list[Tensor]:
    """Some batches, as training reads them."""
    order = data.BatchOrder.over(dataset, 4, 0)
    return [
        b.images
        for b in iterate_batches(dataset, order, start_step=0, stop_step=2, captions=data.has_captions(dataset))
    ]


def settings(case: Case, name: str, path: Path, **options: Any) -> Any:
    rng = case.rng
    options = {"name": name, "path": str(path), "size": 8, "channels": 3} | options
    if rng.random() < 0.3:
        options["test_fraction"] = 0.4
    return DataSettings.parse(options).load(rng.choice(("train", "train", "test")))


@kind(3)
def pictures(case: Case) -> None:
    """Folders of pictures: damaged ones, odd modes, odd names."""
    rng = case.rng
    folder = case.copy("photos")
    if rng.random() < 0.5:
        mode = rng.choice(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"))
        picture = Image.new(mode, rng.choice(((1, 1), (1, 300), (300, 1), (9, 9), (40_000, 1))))
        for ending in rng.sample(("png", "tif", "webp", "gif", "jpg", "bmp", "ppm"), 7):
            with contextlib.suppress(OSError, ValueError, KeyError, SystemError):
                picture.save(folder / "cat" / f"odd.{ending}")
                break
    if rng.random() < 0.3:
        odd = rng.choice(
            ("[a]", "__MACOSX", "._x.png", ".hidden", "a#b", "e\u0301", "a\udc80b", "Thumbs.db", "x" * 200)
        )
        place = folder / rng.choice((odd, f"cat/{odd}", f"{odd}.png"))
        shutil.copy(folder / "dog/0.png", place) if rng.random() < 0.5 else place.mkdir()
    if rng.random() < 0.03:
        os.mkfifo(folder / "cat/pipe.png")
    if rng.random() < 0.1:
        (folder / "cat/loop").symlink_to("..")
    for _ in range(rng.choice((0, 1, 3))):
        case.damage(folder)
    if rng.random() < 0.3:
        source = picture_folder(folder, size=rng.choice((None, 8)))
        for index in range(len(source)):
            source[index]
        return
    read = read_all(settings(case, "folder", folder, labels=rng.random() < 0.8))
    if any(images.shape[1:] != (3, 8, 8) or not images.abs().amax() <= 1 for images in read):
        raise Wrong("a batch of another shape, or outside of [-1, 1]")


@kind(3)
def captions(case: Case) -> None:
    """metadata.jsonl and its relatives."""
    rng = case.rng
    folder = case.copy("captions")
    file = folder / "metadata.jsonl"
    lines: list[Any] = [json.loads(line) for line in file.read_text().splitlines()]
    if (how := rng.randrange(4)) == 0:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    elif how == 1:
        tree = damaged_tree(rng, lines)
        text = "".join(json.dumps(line) + "\n" for line in (tree if isinstance(tree, list) else [tree]))
        file.write_text(text, encoding=rng.choice(("utf-8", "utf-16", "utf-8-sig")), errors="surrogateescape")
    elif how == 2:
        captions = (None, "", [], [None], ["a", None], 3, ["a", "b"], " ", "ü\u2028", {"a": 1}, ["x"] * 100)
        names = (
            "0.png",
            "./0.png",
            "sub/../0.png",
            "/0.png",
            "C:\\0.png",
            "..\\0.png",
            "0.PNG",
            "",
            ".",
            "..",
            "no.png",
        )
        for line in rng.sample(lines, 2):
            line[rng.choice(("text", "caption", "captions", "additional_feature"))] = rng.choice(captions)
            if rng.random() < 0.5:
                line["file_name"] = rng.choice(names)
        file.write_text("".join(json.dumps(line) + rng.choice(("\n", ",\n", "\r\n", "\n\n")) for line in lines))
    else:
        file.unlink()
        rows = "".join(f"{i}.png{rng.choice((',', ';', chr(9)))}caption {i}\n" for i in range(5))
        rows = rng.choice(("file_name,text\n", "\ufefffile_name,text\n", "a,b\n", "")) + rows
        (folder / "metadata.csv").write_bytes(damaged_bytes(rng, rows.encode()))
    if rng.random() < 0.2:
        case.damage(folder)
    dataset = settings(case, "captions", folder, caption_column=rng.choice((None, None, "text", "no")))
    read_all(dataset)
    for options in dataset.captions(range(len(dataset))):
        if not options or not all(isinstance(text, str) for text in options):
            raise Wrong(f"an image has the captions {options!r}")


@kind(2)
def shards(case: Case) -> None:
    """Tar shards."""
    rng = case.rng
    folder = case.copy("shards")
    for _ in range(rng.choice((1, 1, 3))):
        case.damage(folder)
    if rng.random() < 0.3:
        with tarfile.open(folder / "00002.tar", "w") as archive:
            for name, content in (("a.png", b"x"), ("a.json", b"[" * 9999), ("b.cls", b"9" * 5000), ("b.png", b"")):
                member = tarfile.TarInfo(rng.choice((name, f"../{name}", f"/{name}", f"{name}\udcff")))
                member.size, member.type = (
                    len(content),
                    rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE)),
                )
                archive.addfile(member, io.BytesIO(content))
    patterns = (
        "",
        "{00000..00001}.tar",
        "*.tar",
        "{0..99999999}.tar",
        "{0..99999999999999999999}{0..9}.tar",
        "[",
        "{",
        "{1..0}",
    )
    pattern = rng.choice((*patterns[:1] * 6, *patterns))
    read_all(settings(case, "webdataset", folder / pattern, labels=rng.random() < 0.5))


@kind(2)
def idx(case: Case) -> None:
    """IDX files."""
    rng = case.rng
    folder = case.copy("idx")
    if (how := rng.random()) < 0.5:
        case.damage(folder)
    elif how < 0.95:  # a header that promises more, compressed or not
        shape = [rng.choice((0, 1, 6, 8, 2**16, 2**31, 2**32 - 1)) for _ in range(3)]
        head = (0, rng.choice((0, 1)), rng.choice((8, 9, 13)), rng.choice((1, 3, 255)))
        content = struct.pack(">BBBBIII", *head, *shape) + bytes(rng.choice((0, 10, 384)))
        name = rng.choice(("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"))
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    else:  # many zeros in a small file
        bomb = gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 6) + bytes(2**26))
        (folder / "train-labels-idx1-ubyte.gz").write_bytes(bomb)
    size = rng.choice((8, 8, 12))
    read_all(data.load("idx", rng.choice(("train", "test")), path=str(folder), size=size, labels=rng.random() < 0.8))


@kind(2)
def latents(case: Case) -> None:
    """Cached latents: what is read is what was encoded."""
    folder = case.copy("latents")
    case.damage(folder)
    found = data.load("latents", "train", path=str(folder), size=8)
    wanted = data.load("latents", "train", path=str(case.seeds / "latents"), size=8)
    read = [dataset.get_batch(torch.arange(0, len(wanted), 7)) for dataset in (found, wanted)]  # type: ignore[union-attr]
    expect_same(dict(enumerate(read[0])), dict(enumerate(read[1])), "a folder of latents")  # type: ignore[arg-type]


@kind(3)
def npz(case: Case) -> None:
    """.npz of samples, of statistics, of our own references."""
    rng = case.rng
    name = rng.choice(("samples.npz", "statistics.npz", "reference.npz"))
    file = case.copy(name)
    if whole := rng.random() < 0.5:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    else:
        with np.load(file) as archive:
            arrays = dict(archive)
        key = rng.choice(sorted(arrays))
        a = arrays[key]
        with np.errstate(all="ignore"):
            kinds = [a.astype(t) for t in ("f2", "f8", "i4", "?", "c8", ">f4")] if a.dtype.kind != "U" else [a]
        nan = np.full(a.shape, np.nan)
        shapes = (
            a.flatten(),
            a[None],
            a[:0] if a.ndim else a,
            a[..., :1] if a.ndim else a,
            np.zeros((0, 0)),
            np.zeros(()),
            np.asfortranarray(a),
        )
        other = (
            np.array([{}], object),
            np.array("x"),
            nan,
            np.full(a.shape, np.inf),
            -np.abs(nan),
        )
        arrays[key] = rng.choice((*kinds, *shapes, *other))
        if rng.random() < 0.2:
            del arrays[key]
        if rng.random() < 0.3:
            arrays["mu"] = rng.choice((np.zeros(3), np.zeros((2, 2)), np.array("x"), np.array([np.nan] * 4)))
        np.savez(file, **arrays)
        if rng.random() < 0.2:  # an array that says it is large
            import zipfile

            with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w") as member:
                shape = rng.choice(((10**12, 8, 8, 3), (2**40, 2**40, 8, 3), (-1, 8, 8, 3), (8, 8, 3), (1, 0, 8, 3)))
                header = {"descr": rng.choice(("|u1", "|O", "<f8", "|S9", "x")), "fortran_order": False, "shape": shape}
                with contextlib.suppress(ValueError):
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(bytes(100))
    case.did.append(name)
    if rng.random() < 0.5:
        source = image_source(str(file), count=rng.choice((None, 4)))
        read = torch.cat([images for images, _ in source.batches(4)])
        wanted = torch.cat([images for images, _ in image_source(str(case.seeds / "samples.npz")).batches(6)])
        if whole and name == "samples.npz" and source.count == len(wanted) and not read.equal(wanted):
            raise Wrong("an .npz was read with other pixels than it was saved with")
        return
    network = feature_network("pixels")
    reference = reference_statistics(str(file), network, rows=rng.choice((0, 4)))
    if not reference.rows.isfinite().all():
        raise Wrong("features that are not finite were read")
    for statistics in reference.statistics.values():
        if not math.isfinite(frechet_distance(statistics, statistics)):
            raise Wrong("statistics that are not finite were scored")


# ---- Runs and the command line ---------------------------------------------------------------------------------------


def command(case: Case, *words: object) -> int:
    """``mezzotint WORDS`` in this process, judged by what a user sees of it; its exit code."""
    case.did.append("mezzotint " + " ".join(repr(str(word)) for word in words))
    out, err, before = Quiet(), Quiet(), sys.argv
    sys.argv = ["mezzotint", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1 if stopped.code else 0
    finally:
        sys.argv = before
    said = err.getvalue().strip()
    case.did.append(f"exit {code}: {said[-600:]}")
    if code not in (0, 2):
        raise Wrong(f"exit {code}: {said[-200:]}")
    if code == 2:
        if "Traceback" in said or not said:
            raise Wrong(f"exit 2 with {said[-200:]!r}")
        if "error: " in said and "Usage" not in said:
            from fuzz import check_sentence

            check_sentence(said.rpartition("error: ")[2])
    return code


@kind(0.7)
def run_folder(case: Case) -> None:
    """A run folder in which people and other programs have been: what a command makes of it."""
    rng = case.rng
    run = case.copy("run")
    for _ in range(rng.choice((1, 1, 2))):
        case.damage(run)
    if rng.random() < 0.5:
        states = ("state/step-00000020-backup", "state/step-", "state/step-x", "state/.step-00000003.tmp")
        odd = rng.choice((*states, "model-ema-.safetensors", "logs/x", "samples.png", "tokenizer", "adapter"))
        with contextlib.suppress(OSError):
            (run / odd).mkdir(parents=True)
        case.did.append(f"a folder {odd}")
    command(case, "sample", run, "--count", 2, "--steps", 1, "--device", "cpu")


@kind(0.2)
def resume(case: Case) -> None:
    """A run that is gone on with after damage: refused, or with the weights of one that was left alone."""
    rng = case.rng
    run = case.copy("going")
    case.damage(run)
    if rng.random() < 0.4:
        odd = rng.choice(("state/step-00000001-backup", "state/step-x", "logs/y", "state/.step-00000002.tmp"))
        with contextlib.suppress(OSError):
            (run / odd).mkdir(parents=True)
    if command(case, "train", "digits", *TINY, "--out", run, "--resume", "--device", "cpu") == 0:
        found, wanted = load_file(run / "model.safetensors"), load_file(case.seeds / "run/model.safetensors")
        expect_same(found, wanted, "a run that was gone on with")


@kind(0.3)
def prompts(case: Case) -> None:
    """Files of captions."""
    rng = case.rng
    file = case.folder / rng.choice(("prompts.txt", "[x].txt", "ü.txt"))
    text = "\n".join(rng.choice(ODD_TEXTS) for _ in range(rng.choice((0, 1, 3))))
    file.write_bytes(damaged_bytes(rng, text.encode("utf-8", "surrogateescape")))
    case.did.append(repr(file.read_bytes()[:300]))
    command(case, "sample", case.seeds / "text-run", "--prompts", file, "--count", 2, "--steps", 1, "--out", "x.png")


class Parameter(NamedTuple):
    """Of a command: an argument, or an option with its names."""

    name: str
    options: tuple[str, ...]  # none of an argument
    type: Any
    many: bool
    required: bool


def parameters_of(function: Callable[..., object]) -> Iterator[Parameter]:
    hints = get_type_hints(function, include_extras=True)
    for name, about in inspect.signature(function).parameters.items():
        if len(said := get_args(hints[name])) != 2:  # typer's context
            continue
        kind_, info = said
        plain = next(
            (t for t in (kind_, *get_args(kind_)) if t is not type(None) and get_origin(t) is not UnionType), kind_
        )
        many = get_origin(plain) is list
        option = isinstance(info, typer.models.OptionInfo)
        names = tuple(info.param_decls or [f"--{name.replace('_', '-')}"]) if option else ()
        required = about.default is inspect.Parameter.empty
        yield Parameter(name, names, get_args(plain)[0] if many else plain, many, required)


COMMANDS = {
    info.name or info.callback.__name__: list(parameters_of(info.callback))
    for info in cli.app.registered_commands
    if info.callback is not None
}
#: commands that would do honest work for minutes are given what they refuse, or only asked for a plan
ALWAYS: dict[str, tuple[str, ...]] = {
    "study": ("--cells", "nothing"),
    "resume": ("--steps", "2"),
    "finetune": ("--epochs", "0"),
    "probe": ("--epochs", "1", "--count", "20"),
    "train-mae": ("training.steps=0",),
    "fit-tokenizer": ("representation.stride=3",),
    "evaluate": ("--count", "4", "--features", "pixels"),
    "sweep": ("--count", "4", "--no-plots", "--features", "pixels"),
    "sample": ("--count", "2", "--steps", "1"),
    "denoise": ("--count", "2"),
    "cost": ("--json",),
}


@kind(1.5)
def command_line(case: Case) -> None:
    """Any command with any options, some of them odd."""
    rng = case.rng
    name = rng.choice(sorted(COMMANDS))
    known = [case.seeds / seed for seed in ("samples.npz", "diffusers", "DiT-XL-2.pt", "photos")]
    models: list[object] = [
        *[case.copy(rng.choice(("run", "run", "text-run")))] * 12,  # a copy, because commands write into it
        *known,
        "digits",
        *rng.sample(recipe_names(), 2),
        *rng.sample(ODD_TEXTS, 4),
    ]
    words: list[object] = [name]
    arguments: list[object] = list(TINY) if name in ("train", "fit-tokenizer", "train-mae") else []
    odd = [text for text in ODD_TEXTS if "\0" not in text]
    for parameter in COMMANDS[name]:
        if parameter.options:
            if rng.random() < 0.25:
                option = rng.choice(parameter.options)
                words += (
                    option.split("/")[:1] if parameter.type is bool else [option, rng.choice(_values(parameter, odd))]
                )
        elif parameter.many:
            if rng.random() < 0.4:
                key = rng.choice([key for key in KEYS if key.startswith(("sampling", "guidance", "data"))])
                arguments.append(f"{key}={rng.choice(odd)}")
        elif parameter.required or rng.random() < 0.5:
            choices = {"study": ["ldae", *odd[:6]], "recipes": ["digits", *odd[:6]]}.get(name, models)
            if name in ("train", "fit-tokenizer", "train-mae", "cost"):
                choices = ["digits"] * 6 + odd
            words.append("out" if parameter.name == "out" else rng.choice(choices))
    words += ALWAYS.get(name, ())
    if name == "train":
        words += ["--out", rng.choice(("out", "a[/b]", "ü", "#", "a b"))]
    if "--device" not in words and any(p.name == "device" for p in COMMANDS[name]):
        words += ["--device", "cpu"]
    if rng.random() < 0.3:
        words.insert(rng.randrange(1, len(words) + 1), rng.choice(odd))
    command(case, *words, *arguments)


def _values(parameter: Parameter, odd: list[str]) -> list[Any]:
    """What an option may be given: odd words, and numbers that are refused or quickly done."""
    if parameter.type is int:
        return [0, 1, 2, 3, -1, 10**30, 2**63, *odd[:20]]
    if parameter.type is float:
        return [0, 0.5, 1, -1, "nan", "inf", "-inf", 1e300, *odd[:20]]
    return odd


__all__ = ["KINDS", "STRANGERS", "Case", "MezzotintError", "Quiet", "Wrong", "make_seeds", "read_override"]
