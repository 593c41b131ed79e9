"""Every key of a recipe does something: what a small change of it must change, or why nothing here can.

A key that is added to the recipe and not to `EFFECTS` fails `test_the_table_has_every_key`. The table says that a key
arrives; that it arrives with the right value is the subject of test_right_values.py, and of the rooms' own tests.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import mezzotint
from mezzotint.conditions.text import Text
from mezzotint.data import BatchOrder, has_captions, iterate_batches
from mezzotint.errors import MezzotintError
from mezzotint.pipeline import captioner
from mezzotint.recipe import Recipe, load_recipe, override_recipe
from mezzotint.representations import representation
from mezzotint.settings import Settings
from mezzotint.training import loop
from mezzotint.training.run_folder import flat
from mezzotint.training.tokenizers import fit_tokenizer

# ------------------------------------------------------------------------------------------------- what can be seen


def made(recipe: Recipe) -> mezzotint.Pipeline:
    """The recipe's pipeline; no weight is zero, as many of a fresh network are."""
    pipeline = mezzotint.build(recipe, class_names=[*"0123456789"])
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return pipeline


def shapes(recipe: Recipe, folder: Path) -> Any:
    """Names and shapes of the network's parameters and buffers."""
    return {name: tuple(value.shape) for name, value in mezzotint.build(recipe).denoiser.state_dict().items()}


def initial(recipe: Recipe, folder: Path) -> Any:
    return mezzotint.build(recipe).denoiser.state_dict()


def network(recipe: Recipe, folder: Path) -> Any:
    """What the network makes of two examples, in training as dropout is, and the shapes of its parameters."""
    pipeline = made(recipe)
    denoiser = pipeline.denoiser.train()
    x = torch.randn((2, *denoiser.in_shape), generator=torch.Generator().manual_seed(1))
    y = pipeline.captioner.encode(["a cat", "of three dogs, one and two"]) if denoiser.text else torch.tensor([1, 2])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return shapes(recipe, folder), denoiser(x, torch.tensor([0.3, 0.7]), y).output


def objective(recipe: Recipe, folder: Path) -> Any:
    """Times, left-out conditions and losses of a batch."""
    pipeline = made(recipe)
    found = loop.make_objective(recipe, pipeline.denoiser)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((32, *pipeline.denoiser.in_shape), generator=generator)
    draw = found.draw(32, generator)
    with torch.no_grad():
        return draw.t, draw.drop, found(x, torch.arange(32) % 10, draw)["loss"]


def samples(recipe: Recipe, folder: Path) -> Any:
    return mezzotint.sample(made(recipe), count=3)


def batch(recipe: Recipe, folder: Path) -> Any:
    """The kind and the first batch of the training images: pixels, labels, captions."""
    try:
        dataset = recipe.data.load()
        order = BatchOrder.over(dataset, 8, recipe.seed)
        found = next(iterate_batches(dataset, order, start_step=0, stop_step=1, captions=has_captions(dataset)))
    except MezzotintError as error:
        return str(error)
    return type(dataset).__name__, found.images, found.labels, found.captions


def training(recipe: Recipe, folder: Path) -> Any:
    """A run: weights, what the optimizer has of them, log, names of files."""
    groups: list[Any] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            groups.append({key: value for key, value in group.items() if key != "params"})
            groups.append([optimizer.state[parameter]["exp_avg_sq"].clone() for parameter in group["params"]])

    hook = register_optimizer_step_post_hook(look)
    try:
        pipeline = mezzotint.train(recipe, folder / "run", quiet=True, device="cpu")
    finally:
        hook.remove()
    lines = [json.loads(line) for line in (folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]
    files = sorted(str(path.relative_to(folder)) for path in (folder / "run").rglob("*") if "tfevents" not in path.name)
    return pipeline.denoiser.state_dict(), groups, log, files


def tokenizer(recipe: Recipe, folder: Path) -> Any:
    """A tokenizer that is fitted: its weights, and what it measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mezzotint.training.tokenizers.save_grid", lambda *_, **__: None)
        metrics = fit_tokenizer(recipe, folder / "tokenizer", device="cpu", quiet=True, trust_code=True)
    place = {"path": str(folder / "tokenizer")}
    settings = recipe.representation.model_dump(exclude={"fit"}) | place
    return metrics, representation(**settings).state_dict()  # type: ignore[attr-defined]


def autoencoder(recipe: Recipe, folder: Path) -> Any:
    """Latents of three images, and the images that the encoder is given at a time."""
    given: list[Any] = []
    space: Any = representation(**recipe.representation.model_dump(exclude={"fit"}))
    space.network.encoder.register_forward_pre_hook(lambda _, inputs: given.append((inputs[0].shape, inputs[0].dtype)))
    return space.encode(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))), given


def captions(recipe: Recipe, folder: Path) -> Any:
    """What captions are read with; of an encoder, what it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mezzotint.pipeline.TextEncoder", lambda *given, **more: (given, more))
        reader: Any = captioner(recipe)
    return reader.encode(["a long caption of three dogs"]) if hasattr(reader, "encode") else reader


def decoders(recipe: Recipe, folder: Path) -> Any:
    """How many processes decode images."""
    asked: list[Any] = []

    def loader(batches: Any, sampler: range, num_workers: int, **_: Any) -> Iterator[Any]:
        asked.append(num_workers)
        return map(batches.__getitem__, sampler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mezzotint.data.loader.DataLoader", loader)
        training(recipe, folder)
    return asked


def compiling(recipe: Recipe, folder: Path) -> Any:
    """Whether the network is compiled."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self)))
        training(recipe, folder)
    return asked


def micro_batches(recipe: Recipe, folder: Path) -> Any:
    """The examples that the objective is given at a time."""
    sizes: list[int] = []
    forward = loop.Objective.forward

    def spied(self: Any, x: Tensor, y: Any, draw: Any) -> Any:
        sizes.append(len(x))
        return forward(self, x, y, draw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Objective, "forward", spied)
        training(recipe, folder)
    return sizes


def one_map(images: Tensor) -> list[Tensor]:
    """A perceptual network."""
    return [images]


def two_maps(images: Tensor) -> list[Tensor]:
    """Another."""
    return [images, F.avg_pool2d(images, 2)]


def digest(value: Any) -> str:
    """Of numbers, texts and tensors, in whatever they are."""

    def parts(value: Any) -> Iterator[bytes]:
        if isinstance(value, Text):
            value = (value.tokens, value.mask)
        if isinstance(value, Tensor):
            yield f"{value.shape} {value.dtype}".encode()
            yield value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, dict):
            for key in value:
                yield from (repr(key).encode(), *parts(value[key]))
        elif isinstance(value, list | tuple):
            yield b"("
            for one in value:
                yield from parts(one)
            yield b")"
        else:
            yield repr(value).encode()

    return hashlib.sha256(b"\0".join(parts(value))).hexdigest()


# ------------------------------------------------------------------------------------------------------- the table


class Effect(NamedTuple):
    """Of a key: what sees a change of it, the change, and what it is a change of, besides `BASE`."""

    seen_by: Callable[[Recipe, Path], Any]
    change: str
    base: tuple[str, ...] = ()


BASE = (
    *TINY,
    "backbone.num_classes=10",
    "training.steps=2",
    "training.batch_size=4",
    "training.log_every=1",
    "training.checkpoint_every=100",
    "training.ema=[0.5]",
    "training.ema_warmup=false",
    "training.weight_decay=0",
    "training.grad_clip=null",
)
CLIPS = ("data={name: moving-digits, size: 16, frames: 4, examples: 8}", "backbone.patch_size=4")
SSM = ("backbone={name: diffussm, width: 16, depth: 1, patch_size: 2, hourglass: 2, scan: [row]}",)
INNER = "name: unet, channels: [8, 8], resblocks: [1, 1], attention: [0, 1], middle: false, heads: 2, groups: 4"
UNET = (f"backbone={{{INNER}}}",)
UNET_CLIPS = (*UNET, *CLIPS[:1])
UNET_TEXT = (*UNET, "condition=text", "backbone={num_classes: 0, text_features: 0}")
LEVEL = {"channels": [8, 8], "resblocks": [1, 1], "groups": 4, "heads": 2}


def outer(**changes: Any) -> str:
    return f"backbone.outer={json.dumps([LEVEL | changes])}"


NESTED = ("data.size=16", *UNET, outer())
NESTED_ATTENTION = ("data.size=16", *UNET, outer(attention=[0, 1]))
NESTED_CLIPS = ("data={name: moving-digits, size: 16, frames: 4, examples: 8}", *UNET, outer())


def stages(**changes: Any) -> str:
    return f"training.stages={json.dumps([{'levels': 1, 'steps': 2} | changes])}"


STAGED = (*NESTED, "training.steps=4", "training.lr=1e-3", "training.ema=[]", stages())
LOGIT = "objective.times=logit-normal"
DDPM = ("interpolant={name: ddpm, num_steps: 50}", "target=noise")
LEARNED = (*DDPM, "variance=learned")
PCA = ("representation={name: patch-pca, stride: 2, channels: 2}", "representation.fit.examples=200")
PCA_IMAGE = (*PCA, "target=data", "backbone={input: image, output: image, patch_size: 2}")
FIT = "steps: 4, batch_size: 8, examples: 32"
PATCH_AE = (f"representation={{name: patch-ae, stride: 2, channels: 2, fit: {{{FIT}}}}}",)
PATCH_VAE = (f"representation={{name: patch-vae, stride: 2, channels: 2, fit: {{{FIT}, kl_weight: 1}}}}",)
CONV = (f"representation={{name: conv-vae, stride: 2, channels: 2, fit: {{{FIT}, widths: [4, 4], groups: 2}}}}",)
ADVERSARIAL = (
    *CONV,
    "representation.fit={adversarial_weight: 1, adversarial_start: 1, discriminator_width: 4, discriminator_layers: 1}",
)
PERCEPTUAL = (*CONV, f"representation.fit={{perceptual_weight: 1, perceptual_network: '{__name__}:one_map'}}")
KL = ("data={size: 32, channels: 3}", "representation={name: kl, path: 'KL', stride: 8, channels: 4}")
FOLDER = ("data=folder:FOLDER/photos", "data.channels=3")
VIDEO = ("data=video:FOLDER/clips", "data={channels: 3, frames: 2}", "backbone.patch_size=4")
HUB = ("data=huggingface:FOLDER/hub", "data={channels: 3, image_column: first, label_column: kind}")
ADAPTED = ("init=FOLDER/run", "training.lora.rank=2", "training.ema=[]")
GUIDED = ("guidance.scale=3",)
SDE = ("sampling=sde-sigma",)

EFFECTS: dict[str, Effect | str] = {
    "name": "the name of the run's folder, unless --out says another; tests/test_cli.py",
    "description": "for people alone",
    "seed": Effect(training, "seed=1"),
    "init": Effect(training, "init=FOLDER/other", ("init=FOLDER/run",)),
    "target": Effect(objective, "target=data"),
    "variance": Effect(objective, "variance=learned", DDPM),
    "time_input": Effect(network, "time_input=[100, 0]"),
    # data
    "data.name": Effect(batch, "data={name: folder, labels: false}", ("data=captions:FOLDER/captions",)),
    "data.path": Effect(batch, "data.path=FOLDER/others", FOLDER),
    "data.size": Effect(batch, "data.size=16"),
    "data.channels": Effect(batch, "data.channels=3"),
    "data.labels": Effect(batch, "data.labels=false"),
    "data.background": Effect(batch, "data.background=red", FOLDER),
    "data.flip": Effect(training, "data.flip=true", ("data.flip=false",)),
    "data.test_fraction": Effect(batch, "data.test_fraction=0.5", FOLDER),
    "data.max_unreadable": Effect(batch, "data.max_unreadable=0", ("data=folder:FOLDER/broken", "data.channels=3")),
    "data.streaming": Effect(batch, "data.streaming=true", HUB),
    "data.shuffle_buffer": Effect(batch, "data.shuffle_buffer=1", ("data=webdataset:FOLDER/shards",)),
    "data.image_column": Effect(batch, "data.image_column=second", HUB),
    "data.label_column": Effect(batch, "data.label_column=rest", HUB),
    "data.caption_column": Effect(batch, "data.caption_column=other", ("data=captions:FOLDER/captions",)),
    "data.frames": Effect(batch, "data.frames=2", CLIPS),
    "data.frame_stride": Effect(batch, "data.frame_stride=2", VIDEO),
    "data.objects": Effect(batch, "data.objects=2", CLIPS),
    "data.examples": Effect(batch, "data.examples=16", CLIPS),
    "data.workers": Effect(decoders, "data.workers=1", (*FOLDER, "backbone.num_classes=2")),
    # representation
    "representation.name": Effect(shapes, "representation={name: patch-pca, stride: 2, channels: 2}"),
    "representation.path": Effect(training, "representation.path=FOLDER/tokenizer", PCA),
    "representation.scale": Effect(autoencoder, "representation.scale=0.5", KL),
    "representation.stride": Effect(tokenizer, "representation.stride=4", PCA),
    "representation.channels": Effect(tokenizer, "representation.channels=3", PCA),
    "representation.precision": Effect(autoencoder, "representation.precision=bf16", KL),
    "representation.slicing": Effect(autoencoder, "representation.slicing=true", KL),
    "representation.tiling": Effect(autoencoder, "representation.tiling=true", KL),
    "representation.fit.examples": Effect(tokenizer, "representation.fit.examples=50", PCA),
    "representation.fit.whiten": Effect(tokenizer, "representation.fit.whiten=true", PCA),
    "representation.fit.steps": Effect(tokenizer, "representation.fit.steps=5", PATCH_AE),
    "representation.fit.batch_size": Effect(tokenizer, "representation.fit.batch_size=4", PATCH_AE),
    "representation.fit.lr": Effect(tokenizer, "representation.fit.lr=2e-3", PATCH_AE),
    "representation.fit.betas": Effect(tokenizer, "representation.fit.betas=[0.9, 0.9]", PATCH_AE),
    "representation.fit.reconstruction": Effect(tokenizer, "representation.fit.reconstruction=l1", PATCH_AE),
    "representation.fit.kl_weight": Effect(tokenizer, "representation.fit.kl_weight=2", PATCH_VAE),
    "representation.fit.perceptual_weight": Effect(tokenizer, "representation.fit.perceptual_weight=2", PERCEPTUAL),
    "representation.fit.perceptual_network": Effect(
        tokenizer, f"representation.fit.perceptual_network={__name__}:two_maps", PERCEPTUAL
    ),
    "representation.fit.adversarial_weight": Effect(tokenizer, "representation.fit.adversarial_weight=2", ADVERSARIAL),
    "representation.fit.adversarial_start": Effect(tokenizer, "representation.fit.adversarial_start=3", ADVERSARIAL),
    "representation.fit.discriminator_width": Effect(
        tokenizer, "representation.fit.discriminator_width=8", ADVERSARIAL
    ),
    "representation.fit.discriminator_layers": Effect(
        tokenizer, "representation.fit.discriminator_layers=2", ("data.size=16", *ADVERSARIAL)
    ),
    "representation.fit.widths": Effect(tokenizer, "representation.fit.widths=[8, 4]", CONV),
    "representation.fit.layers": Effect(tokenizer, "representation.fit.layers=1", CONV),
    "representation.fit.groups": Effect(tokenizer, "representation.fit.groups=4", CONV),
    # backbone
    "backbone.name": Effect(shapes, "backbone.name=diffussm"),
    "backbone.patch_size": Effect(network, "backbone.patch_size=4"),
    "backbone.width": Effect(network, "backbone.width=32"),
    "backbone.depth": Effect(network, "backbone.depth=2"),
    "backbone.heads": Effect(network, "backbone.heads=4"),
    "backbone.mlp_ratio": Effect(network, "backbone.mlp_ratio=2"),
    "backbone.conditioning": Effect(network, "backbone.conditioning=in-context"),
    "backbone.tubelet_size": Effect(network, "backbone.tubelet_size=2", CLIPS),
    "backbone.freq_shift": Effect(network, "backbone.freq_shift=1"),
    "backbone.hourglass": Effect(network, "backbone.hourglass=1", SSM),
    "backbone.scan": Effect(network, "backbone.scan=[column]", SSM),
    "backbone.state": Effect(network, "backbone.state=8", SSM),
    "backbone.initialisation": Effect(initial, "backbone.initialisation=inv", SSM),
    "backbone.discretisation": Effect(network, "backbone.discretisation=bilinear", SSM),
    "backbone.bidirectional": Effect(network, "backbone.bidirectional=false", SSM),
    "backbone.channels": Effect(network, "backbone.channels=[8, 16]", UNET),
    "backbone.resblocks": Effect(network, "backbone.resblocks=[1, 2]", UNET),
    "backbone.attention": Effect(network, "backbone.attention=[1, 1]", UNET),
    "backbone.feed_forward": Effect(network, "backbone.feed_forward=true", UNET),
    "backbone.middle": Effect(network, "backbone.middle=true", UNET),
    "backbone.time_width": Effect(network, "backbone.time_width=16", UNET),
    "backbone.time_frequencies": Effect(network, "backbone.time_frequencies=16", UNET),
    "backbone.groups": Effect(network, "backbone.groups=2", UNET),
    "backbone.dropout": Effect(network, "backbone.dropout=0.5", UNET),
    "backbone.micro_scale": Effect(network, "backbone.micro_scale=8", UNET),
    "backbone.text_width": Effect(network, "backbone.text_width=8", UNET_TEXT),
    "backbone.masked_text": Effect(network, "backbone.masked_text=false", UNET_TEXT),
    "backbone.temporal_attention": Effect(network, "backbone.temporal_attention=[0, 1]", UNET_CLIPS),
    "backbone.adaln_ratio": Effect(network, "backbone.adaln_ratio=0.25"),
    "backbone.input": Effect(shapes, "backbone.input=image", (*PCA, "backbone.patch_size=2")),
    "backbone.output": Effect(shapes, "backbone.output=image", (*PCA, "target=data", "backbone.patch_size=2")),
    "backbone.num_classes": Effect(shapes, "backbone.num_classes=3"),
    "backbone.text_features": Effect(shapes, "backbone.text_features=6", UNET_TEXT),
    "backbone.outer.channels": Effect(network, outer(channels=[4, 8]), NESTED),
    "backbone.outer.resblocks": Effect(network, outer(resblocks=[1, 2]), NESTED),
    "backbone.outer.attention": Effect(network, outer(attention=[0, 1]), NESTED),
    "backbone.outer.feed_forward": Effect(network, outer(attention=[0, 1], feed_forward=True), NESTED_ATTENTION),
    "backbone.outer.heads": Effect(network, outer(attention=[0, 1], heads=4), NESTED_ATTENTION),
    "backbone.outer.time_width": Effect(network, outer(time_width=16), ("data.size=16", outer())),
    "backbone.outer.time_frequencies": Effect(network, outer(time_frequencies=16), NESTED),
    "backbone.outer.groups": Effect(network, outer(groups=2), NESTED),
    "backbone.outer.dropout": Effect(network, outer(dropout=0.5), NESTED),
    "backbone.outer.micro_scale": Effect(network, outer(micro_scale=16), NESTED),
    "backbone.outer.normalise_input": Effect(network, outer(normalise_input=True), NESTED),
    "backbone.outer.frame_ratio": Effect(network, outer(frame_ratio=2), NESTED_CLIPS),
    "backbone.outer.temporal_attention": Effect(network, outer(temporal_attention=[0, 1]), NESTED_CLIPS),
    "backbone.outer.tubelet_size": Effect(
        network, outer(frame_ratio=2, tubelet_size=2), (*NESTED_CLIPS, outer(frame_ratio=2))
    ),
    # condition
    "condition.name": Effect(training, "condition=text", ("backbone.num_classes=null",)),
    "condition.encoder": Effect(captions, "condition.encoder=google/t5", ("condition=text",)),
    "condition.max_tokens": Effect(captions, "condition.max_tokens=8", ("condition=text",)),
    "condition.precision": Effect(captions, "condition.precision=bf16", ("condition=text", "condition.encoder=clip")),
    # interpolant
    "interpolant.name": Effect(objective, "interpolant=gvp"),
    "interpolant.beta_min": Effect(objective, "interpolant.beta_min=0.2", ("interpolant=vp",)),
    "interpolant.beta_max": Effect(objective, "interpolant.beta_max=10", ("interpolant=vp",)),
    "interpolant.num_steps": Effect(objective, "interpolant.num_steps=40", DDPM),
    "interpolant.sigma_max": Effect(objective, "interpolant.sigma_max=3", ("interpolant=variance-exploding",)),
    "interpolant.snr_divisor": Effect(objective, "interpolant.snr_divisor=4"),
    "interpolant.snr_power": Effect(objective, "interpolant.snr_power=2", NESTED),
    # objective
    "objective.weighting": Effect(objective, "objective.weighting=snr", ("target=data",)),
    "objective.min_snr_gamma": Effect(objective, "objective.min_snr_gamma=1", ("objective.weighting=min-snr",)),
    "objective.times": Effect(objective, LOGIT),
    "objective.time_mean": Effect(objective, "objective.time_mean=1", (LOGIT,)),
    "objective.time_std": Effect(objective, "objective.time_std=2", (LOGIT,)),
    "objective.noise_level": Effect(objective, "objective.noise_level=2", ("objective.times=single",)),
    "objective.time_eps": Effect(objective, "objective.time_eps=0.1", ("target=score",)),
    "objective.stratified": Effect(objective, "objective.stratified=true"),
    "objective.condition_dropout": Effect(objective, "objective.condition_dropout=0.9"),
    "objective.vlb_weight": Effect(objective, "objective.vlb_weight=2", LEARNED),
    "objective.residual_weight": Effect(
        training, "objective.residual_weight=0.5", (*PCA_IMAGE, "objective.residual_weight=0.1")
    ),
    "objective.level_weights": Effect(objective, "objective.level_weights=[1, 2]", NESTED),
    "objective.level_shares": Effect(objective, "objective.level_shares=[1, 0.5]", NESTED),
    # training
    "training.steps": Effect(training, "training.steps=3"),
    "training.batch_size": Effect(training, "training.batch_size=8"),
    "training.accumulate": Effect(micro_batches, "training.accumulate=2"),
    "training.lr": Effect(training, "training.lr=1e-3"),
    "training.lr_schedule": Effect(training, "training.lr_schedule=cosine"),
    "training.warmup_steps": Effect(training, "training.warmup_steps=2"),
    "training.weight_decay": Effect(training, "training.weight_decay=0.5"),
    "training.ssm_lr": Effect(training, "training.ssm_lr=1e-5", SSM),
    "training.betas": Effect(training, "training.betas=[0.5, 0.9]"),
    "training.grad_clip": Effect(training, "training.grad_clip=1e-3"),
    "training.precision": Effect(training, "training.precision=bf16"),
    "training.compile": Effect(compiling, "training.compile=true"),
    "training.freeze": Effect(training, "training.freeze=[blocks]"),
    "training.ema": Effect(training, "training.ema=[0.5, 0.9]"),
    "training.ema_warmup": Effect(training, "training.ema_warmup=true"),
    "training.log_every": Effect(training, "training.log_every=2"),
    "training.validate_every": Effect(training, "training.validate_every=1"),
    "training.sample_every": Effect(training, "training.sample_every=1"),
    "training.checkpoint_every": Effect(training, "training.checkpoint_every=1"),
    "training.keep_checkpoints": Effect(training, "training.keep_checkpoints=1", ("training.checkpoint_every=1",)),
    "training.lora.rank": Effect(training, "training.lora.rank=4", ADAPTED),
    "training.lora.alpha": Effect(training, "training.lora.alpha=8", ADAPTED),
    "training.lora.targets": Effect(training, "training.lora.targets=[attn.qkv]", ADAPTED),
    "training.stages.levels": Effect(training, stages(levels=2), STAGED),
    "training.stages.steps": Effect(training, stages(steps=1), STAGED),
    "training.stages.batch_size": Effect(training, stages(batch_size=2), STAGED),
    "training.stages.lr": Effect(training, stages(lr=1e-2), STAGED),
    "training.stages.lr_schedule": Effect(training, stages(lr_schedule="cosine"), STAGED),
    "training.stages.warmup_steps": Effect(training, stages(warmup_steps=2), STAGED),
    "training.stages.times": Effect(training, stages(times="logit-normal"), STAGED),
    "training.stages.time_mean": Effect(training, stages(time_mean=1), (*STAGED, LOGIT)),
    "training.stages.time_std": Effect(training, stages(time_std=2), (*STAGED, LOGIT)),
    # sampling
    "sampling.sampler": Effect(samples, "sampling=ode-euler"),
    "sampling.steps": Effect(samples, "sampling.steps=4"),
    "sampling.spacing": Effect(samples, "sampling.spacing=quadratic"),
    "sampling.eta": Effect(samples, "sampling.eta=1", ("sampling=ddim",)),
    "sampling.variance": Effect(
        samples, "sampling.variance=upper", (*DDPM, "sampling={sampler: ddpm, steps: 20, threshold: static}")
    ),
    "sampling.diffusion": Effect(samples, "sampling.diffusion=constant", SDE),
    "sampling.diffusion_scale": Effect(samples, "sampling.diffusion_scale=2", SDE),
    "sampling.last_step": Effect(samples, "sampling.last_step=tweedie", SDE),
    "sampling.last_step_size": Effect(samples, "sampling.last_step_size=0.2", SDE),
    "sampling.rtol": Effect(samples, "sampling.rtol=0.5", ("sampling=ode-dopri5", "sampling.rtol=0.1")),
    "sampling.atol": Effect(samples, "sampling.atol=0.5", ("sampling=ode-dopri5", "sampling.rtol=0.1")),
    "sampling.threshold": Effect(samples, "sampling.threshold=static"),
    "sampling.threshold_quantile": Effect(samples, "sampling.threshold_quantile=0.5", ("sampling.threshold=dynamic",)),
    "sampling.eps": Effect(samples, "sampling.eps=0.1", ("target=noise",)),
    # guidance
    "guidance.scale": Effect(samples, "guidance.scale=2", GUIDED),
    "guidance.interval": Effect(samples, "guidance.interval=[0, 0.5]", GUIDED),
    "guidance.channels": Effect(samples, "guidance.channels=1", (*GUIDED, "data.channels=3")),
}


def keys_of(schema: type[Settings], prefix: str = "") -> Iterator[str]:
    """Every key of a record, those of the records in it and in its lists included."""
    for name, field in schema.model_fields.items():
        inside = [field.annotation, *get_args(field.annotation)]
        sections = [one for one in inside if isinstance(one, type) and issubclass(one, Settings)]
        yield from keys_of(sections[0], f"{prefix}{name}.") if sections else [prefix + name]


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of every kind, two runs and a tokenizer; what needs an extra is made by `needs`."""
    folder = tmp_path_factory.mktemp("places")
    generator = np.random.default_rng(0)
    for name, count in (("photos", 8), ("others", 8), ("broken", 8), ("captions", 8)):
        for number in range(count):
            place = folder / name / ("" if name == "captions" else f"class{number % 2}")
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (9, 12, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    (folder / "broken" / "class0" / "0.png").write_bytes(b"no picture")
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}", "other": f"number {n}"}) for n in range(8)]
    (folder / "captions" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "a.tar", "w") as archive:
        for number in range(8):
            data = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(data, "png")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = data.tell()
            data.seek(0)
            archive.addfile(member, data)
    for number in range(4):
        place = folder / "clips" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        first, *rest = (Image.fromarray(one) for one in generator.integers(0, 256, (9, 8, 8), dtype=np.uint8))
        first.save(place / f"{number}.gif", save_all=True, append_images=rest)
    plain = load_recipe("digits", [*TINY, "training.steps=3", "training.lr=0.01", "training.ema=[]"])
    for name, seed in (("run", 0), ("other", 1)):
        mezzotint.train(override_recipe(plain, [f"seed={seed}"]), folder / name, quiet=True, device="cpu")
    fit_tokenizer(load_recipe("digits", [*BASE, *PCA, "seed=3"]), folder / "tokenizer", device="cpu", quiet=True)
    return folder


def hub(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(one) for one in generator.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)]
    columns = {"first": pictures[:8], "second": pictures[8:], "kind": [0, 1] * 4, "rest": [1, 0] * 4}
    columns["text"] = [f"picture {number}" for number in range(8)]
    kinds = {name: datasets.Image() for name in ("first", "second")}
    kinds |= {name: datasets.ClassLabel(names=["a", "b"]) for name in ("kind", "rest")}
    kinds["text"] = datasets.Value("string")
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(folder)


def kl(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1}
    diffusers.AutoencoderKL(**blocks, **sizes, sample_size=16).save_pretrained(folder)


NEEDS: dict[str, tuple[str, Callable[[Path], None]]] = {"FOLDER/hub": ("hub", hub), "'KL'": ("KL", kl)}
EXTRAS = {"conv-vae": "diffusers", "lora.rank=2": "peft"}


def prepared(effect: Effect, places: Path) -> tuple[Recipe, str]:
    """The base recipe and the change of it, with the folders that they name."""
    words = " ".join([*effect.base, effect.change])
    for word, package in EXTRAS.items():
        if word in words:
            pytest.importorskip(package)
    for word, (name, make) in NEEDS.items():
        if word in words and not (places / name).exists():
            make(places / name)

    def there(word: str) -> str:
        return word.replace("FOLDER", str(places)).replace("'KL'", str(places / "KL"))

    return load_recipe("digits", [*BASE, *map(there, effect.base)]), there(effect.change)


#: of a base recipe and what looks at it, a digest of what it saw
_seen: dict[tuple[Callable[..., Any], str], str] = {}


def seen(effect: Effect, recipe: Recipe, folder: Path) -> str:
    key = effect.seen_by, recipe.to_yaml()
    if key not in _seen:
        folder.mkdir()
        _seen[key] = digest(effect.seen_by(recipe, folder))
    return _seen[key]


# ------------------------------------------------------------------------------------------------------------- tests


def test_the_table_has_every_key() -> None:
    assert sorted(EFFECTS) == sorted(keys_of(Recipe))


@pytest.mark.parametrize("key", [key for key, effect in EFFECTS.items() if isinstance(effect, Effect)])
def test_a_change_is_seen(key: str, places: Path, tmp_path: Path) -> None:
    effect = EFFECTS[key]
    assert isinstance(effect, Effect)
    base, change = prepared(effect, places)
    changed = override_recipe(base, [change])
    section = next((part for part in ("backbone.outer", "training.stages") if key.startswith(f"{part}.")), key)
    before, after = (flat(recipe.model_dump()) for recipe in (base, changed))
    assert before[section] != after[section], "the change changes the key"
    assert seen(effect, base, tmp_path / "base") != seen(effect, changed, tmp_path / "changed")


LOOKERS = {(effect.seen_by, effect.base): effect for effect in EFFECTS.values() if isinstance(effect, Effect)}
ONE_OF_EACH = {effect.seen_by: effect for effect in LOOKERS.values()}


@pytest.mark.parametrize("effect", ONE_OF_EACH.values(), ids=lambda effect: effect.seen_by.__name__)
def test_without_a_change_the_same_is_seen(effect: Effect, places: Path, tmp_path: Path) -> None:
    """Or the table would say nothing."""
    base, _ = prepared(effect, places)
    (tmp_path / "again").mkdir()
    assert digest(effect.seen_by(base, tmp_path / "again")) == seen(effect, base, tmp_path / "base")
