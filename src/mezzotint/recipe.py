"""Recipes: one validated record that says everything about a run, and alone recreates it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml
from pydantic import Field, field_validator, model_validator

from mezzotint import data, files
from mezzotint.backbones import DIFFUSSM_CONFIGS, DIT_CONFIGS, MDM_CONFIGS
from mezzotint.backbones.diffussm import Scan
from mezzotint.backbones.layers import TIME_FREQUENCIES
from mezzotint.backbones.nested import LevelConfig
from mezzotint.backbones.s4d import Discretisation, Initialisation
from mezzotint.data import survey
from mezzotint.data.base import DecodedImages
from mezzotint.data.folder import IMAGES
from mezzotint.data.pictures import background_rgb
from mezzotint.data.splits import NoSuchSplit
from mezzotint.data.video import VIDEOS
from mezzotint.errors import MezzotintError, closest, shortened
from mezzotint.guidance import Guidance
from mezzotint.interpolants import InterpolantName
from mezzotint.recipes import recipe_names as recipe_names
from mezzotint.representations import TOKENIZERS, FitSettings
from mezzotint.representations.tokenizer import INFO, OWN_FOLDER, check_settings
from mezzotint.samplers import Sampler
from mezzotint.seal import check_unchanged, check_uncut, sealed
from mezzotint.settings import Decay, LearningRate, Seed, Settings
from mezzotint.targets import Target
from mezzotint.weightings import WeightingName
from mezzotint.written import Written, as_written, read_yaml, typed_text

#: keys of `data` whose None is left to the data, see `DataSettings.settled`
OPEN = ("labels", "test_fraction", "channels")


class DataSettings(Settings):
    """What the model is trained on."""

    name: str = "digits"
    """digits, idx, folder, captions, webdataset, huggingface, emoji, moving-digits, video or latents;
    `data=folder:PATH` sets name and path at once."""
    path: str | None = None
    """Folder, or Hugging Face hub name; latents: a folder that 'mezzotint encode' wrote. None: the data set's own
    default place, where it has one."""
    size: int = Field(8, ge=1)
    """Images are size × size: cropped and resized (folder, huggingface) or padded (idx); latents: they were so."""
    channels: Literal[1, 3] | None = 1
    """1 for grey, 3 for RGB; images are converted. None: 1 where the pictures looked at are all grey."""
    labels: bool | None = True
    """Whether to use class labels; false trains on a flat folder of images. None: of a folder, if it has classes."""
    background: str = "white"
    """folder, captions, webdataset, huggingface, video: the colour behind transparent pixels, by name or #rrggbb."""
    flip: bool = False
    """Flip training images horizontally at random."""
    test_fraction: float | None = Field(0.0, ge=0, lt=1)
    """Share of a folder without a test split of its own that is held out. None: 0.1, of 100 images and more. (A saved
    recipe holds what None came to, of this key, labels and channels.)"""
    max_unreadable: int = Field(10, ge=0)
    """How many unreadable images are replaced, with a warning each, before the run stops."""
    streaming: bool = False
    """huggingface: read the data set as a stream, without downloading it first."""
    shuffle_buffer: int = Field(1000, ge=1)
    """huggingface (streaming), webdataset: examples among which the next one is drawn."""
    image_column: str | None = None
    """huggingface: the column of images. None: found by its type."""
    label_column: str | None = None
    """huggingface: the column of labels. None: found by its type."""
    caption_column: str | None = None
    """captions, webdataset, video: the key of captions, text, caption or captions where not given; huggingface: their
    column."""
    frames: int = Field(0, ge=0)
    """moving-digits, video: frames of a clip. 0: images."""
    frame_stride: int | None = Field(None, ge=1)
    """video: take consecutive frames, so many apart. None: spread over the whole video."""
    objects: int = Field(1, ge=1)
    """moving-digits: digits in a clip, of one class."""
    examples: int = Field(10_000, ge=1)
    """moving-digits: number of clips."""
    workers: int = Field(0, ge=0)
    """Processes that decode images, or threads that read latents, beside the training process; 0 does so in it."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in data.SOURCES:
            raise ValueError(data.unknown(name))
        return name

    @field_validator("background")
    @classmethod
    def _colour(cls, background: str) -> str:
        try:
            background_rgb(background)
        except MezzotintError as error:
            raise ValueError(str(error)) from None
        return background

    def settled(self) -> DataSettings:
        """These settings with what is left open, `labels`, `test_fraction` and `channels`, as the data have it.

        Raises `MezzotintError` as `load` does.
        """
        if all(getattr(self, key) is not None for key in OPEN):
            return self
        takes = signature(data.SOURCES[self.name]).parameters
        found = self.model_copy(update={"channels": self.channels or 3, "test_fraction": self.test_fraction or 0.0})
        if self.labels is None:
            kind = {"folder": IMAGES, "video": VIDEOS}.get(self.name)
            labels = True if kind is None or self.path is None else survey.in_classes(self.path, kind)
            found = found.model_copy(update={"labels": labels})
        train = found.load("train")
        if self.test_fraction is None and "test_fraction" in takes:
            try:
                found.load("test")
            except NoSuchSplit:
                found = found.model_copy(update={"test_fraction": survey.share_to_hold_out(train)})
        if self.channels is None and not isinstance(train, data.CachedLatents):
            found = found.model_copy(update={"channels": 1 if survey.all_grey(train) else 3})
        return found

    def taken(self, found: DataSettings) -> str:
        """What `found`, these settled, has for each key that was left open, for a sentence; nothing without such."""
        why = {
            "labels=False": " (not in sub-folders by class)",
            "test_fraction=0.0": " (nothing is held out of fewer than 100 images, or beside a test split)",
        }
        values = [f"{key}={getattr(found, key)}" for key in OPEN if getattr(self, key) is None]
        return ", ".join(f"data.{value.lower()}{why.get(value, '')}" for value in values)

    def load(self, split: str = "train") -> data.ImageDataset | data.ImageStream:
        """The split "train" or "test" of this data set. Raises `MezzotintError` where it cannot be read."""
        if (settled := self.settled()) is not self:
            return settled.load(split)
        takes = signature(data.SOURCES[self.name]).parameters
        options = {}
        for key, value in self.model_dump(exclude={"name", "workers"}).items():
            if key in takes:
                options[key] = value
            elif key != "flip" and value != type(self).model_fields[key].default:
                raise MezzotintError(f"data.{key} means nothing for the data set {self.name!r}; leave it out")
        return data.load(self.name, split, **options)


class RepresentationSettings(Settings):
    """The space that x lives in."""

    name: Literal["pixels", "kl", "patch-pca", "patch-ae", "patch-vae", "conv-vae"] = "pixels"
    """pixels; kl: the latents of a frozen KL autoencoder (needs the extra 'latent'); patch-pca, patch-ae, patch-vae,
    conv-vae: tokenizers that are fitted to the training images (conv-vae needs the extra 'latent')."""
    path: str | None = None
    """All but pixels: a folder that 'mezzotint fit-tokenizer' wrote; for kl a folder (or a pipeline's, with a folder
    vae in it) or hub name of a diffusers AutoencoderKL, e.g. stabilityai/sd-vae-ft-ema. None, of tokenizers: training
    fits one first."""
    scale: float | None = None
    """kl: factor on the latents. None: the autoencoder's own (0.18215 for Stable Diffusion's)."""
    stride: int = Field(8, ge=1)
    """All but pixels: pixels per latent position along a side; of a patch tokenizer, the side p of a patch."""
    channels: int = Field(4, ge=1)
    """All but pixels: channels d of a latent."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """kl: of the autoencoder's weights and activations; latents and images stay fp32."""
    slicing: bool = False
    """kl: take one image at a time through the autoencoder, which saves memory."""
    tiling: bool = False
    """kl: take large images through the autoencoder in overlapping tiles: less memory, and slightly other images."""
    fit: FitSettings = FitSettings()
    """Tokenizers: how they are fitted."""


class OuterLevel(Settings):
    """One larger level of a Matryoshka network: a UNet around all that is inside (MDM, section 3.2)."""

    channels: tuple[int, ...] = Field(min_length=2)
    """Widths, the new resolution first; each has half the sides of the one before, the last one those of the inside."""
    resblocks: tuple[int, ...] = Field(min_length=2)
    """ResNet blocks at each width."""
    attention: tuple[int, ...] = ()
    """Attention layers after each ResNet block, at each width; empty: none."""
    feed_forward: bool = False
    """Whether attention layers have a feed-forward part."""
    heads: int = Field(8, ge=1)
    """Attention heads."""
    time_width: int | None = Field(None, ge=1)
    """Width of the embedding of time. None: the inside's."""
    time_frequencies: int | None = Field(None, ge=1)
    """Sinusoids of time: so many sines and as many cosines. None: the inside's, or 128 around a dit or diffussm."""
    groups: int = Field(32, ge=1)
    """Groups of the GroupNorms."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside of ResNet blocks."""
    micro_scale: float | None = Field(None, gt=0)
    """Micro conditioning: the side of an image that was not enlarged. None: the level is not told."""
    normalise_input: bool = False
    """Divide the level's input by its standard deviation (the published 1024 network, middle level)."""
    frame_ratio: int = Field(1, ge=1)
    """Clips: how many times as many frames as inside."""
    temporal_attention: tuple[int, ...] = ()
    """Clips: temporal attention layers after each ResNet block, at each width; empty: none."""
    tubelet_size: int = Field(1, ge=1)
    """Clips: successive frames seen as one; above 1, features inside must be of as many frames' time."""


class BackboneSettings(Settings):
    """The network."""

    name: str = "dit"
    """dit, diffussm or unet with the sizes below, or a configuration (dit-s-8 … dit-xl-2, diffussm-s … diffussm-xl,
    mdm-64, mdm-256, mdm-1024), whose sizes win where not given."""
    patch_size: int = Field(2, ge=1)
    """dit, diffussm: side of a patch, in pixels or latent positions. diffussm: 1 where not given."""
    width: int = Field(384, ge=1)
    """dit, diffussm: channels of a token."""
    depth: int = Field(12, ge=1)
    """dit, diffussm: number of blocks."""
    heads: int = Field(6, ge=1)
    """dit, unet: attention heads; must divide the widths. unet: 8 where not given."""
    mlp_ratio: float = Field(4.0, gt=0)
    """dit: hidden width of a block's MLP over width."""
    conditioning: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero"
    """dit: how time and class or captions enter (DiT, section 3.2). diffussm: how captions enter, not adaln."""
    tubelet_size: int = Field(1, ge=1)
    """dit, unet; clips: successive frames that are seen as one, a token's or an image of so many more channels; must
    divide their number, and the (first) width."""
    freq_shift: Literal[0, 1] = 0
    """dit: the time's frequencies are 10000^(-k / (128 - freq_shift)): 0 in the published networks, 1 in diffusers'."""
    hourglass: int = Field(2, ge=1)
    """diffussm: neighbouring positions that dense layers see as one; must divide their number and 2·width. 1: none."""
    scan: tuple[Scan, ...] = Field(("row",), min_length=1)
    """diffussm: orders in which the blocks read the positions, in turn: row, row-snake, column, column-snake."""
    state: int = Field(64, ge=1)
    """diffussm: numbers that a channel remembers, conjugates included."""
    initialisation: Initialisation = "lin"
    """diffussm: of the state matrix: lin (S4D-Lin), inv (S4D-Inv) or real."""
    discretisation: Discretisation = "zoh"
    """diffussm: zoh (zero-order hold) or bilinear."""
    bidirectional: bool = True
    """diffussm: whether a position sees those after it, too."""
    channels: tuple[int, ...] = Field((64, 128, 256), min_length=1)
    """unet: widths, the full resolution first; each has half the sides of the one before."""
    resblocks: tuple[int, ...] = (2, 2, 2)
    """unet: ResNet blocks at each width."""
    attention: tuple[int, ...] = ()
    """unet: attention layers (to itself and to captions) after each ResNet block, at each width; empty: none."""
    feed_forward: bool = False
    """unet: whether attention layers have a feed-forward part."""
    middle: bool = True
    """unet: two more blocks at the lowest resolution, with attention between them."""
    time_width: int | None = Field(None, ge=1)
    """unet: width of the embedding of time. None: four times the first width."""
    time_frequencies: int = Field(TIME_FREQUENCIES, ge=1)
    """unet: sinusoids of time: so many sines and as many cosines; official MDM networks have time_width / 8 of each."""
    groups: int = Field(32, ge=1)
    """unet: groups of the GroupNorms."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """unet: dropout inside of ResNet blocks."""
    micro_scale: float | None = Field(None, gt=0)
    """unet, micro conditioning: the side of an image that was not enlarged. None: the network is not told."""
    text_width: int | None = Field(None, ge=1)
    """unet: width of a caption's tokens inside of the network. None: that of the embedding of time."""
    masked_text: bool = True
    """unet: attend to no padding; the published networks do attend to it."""
    temporal_attention: tuple[int, ...] = ()
    """unet, clips: temporal attention layers after each ResNet block, at each width; empty: none."""
    adaln_ratio: float | None = Field(None, gt=0)
    """dit, adaln-zero and adaln: hidden width of the conditioning layers over width, 0.25 in l-DAE. None: none hidden,
    as published for DiT."""
    input: Literal["latent", "image"] = "latent"
    """What the network is given: x, or, of latents of patches, the image that they decode to (l-DAE)."""
    output: Literal["latent", "image"] = "latent"
    """What it gives: its target in x's space, or, of latents of patches and target data, the image."""
    num_classes: int | None = Field(None, ge=0)
    """Number of classes; 0 is unconditional. None: as many as the data set has (a saved recipe holds the number)."""
    text_features: int | None = Field(None, ge=0)
    """Captions: width of the encoder's features, 0 for bytes. None: as `condition` says (a saved recipe holds it)."""
    outer: tuple[OuterLevel, ...] = ()
    """Larger levels around the network, from the inside out, which make it a Matryoshka network: data.size is the
    outermost one's, and each is 2^(widths − 1) times as large as its inside."""

    @model_validator(mode="before")
    @classmethod
    def _published_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # for pydantic to refuse
        name = values.get("name", "dit")
        if not isinstance(name, str) or name not in CONFIGURATIONS:
            raise ValueError(f"backbone {shortened(name)} is unknown; {closest(str(name), CONFIGURATIONS)}")
        return CONFIGURATIONS[name] | {**values, "name": _network(name)}

    @model_validator(mode="after")
    def _own_options(self) -> BackboneSettings:
        own = NETWORK_OPTIONS[self.name]
        for network, options in NETWORK_OPTIONS.items():
            for key in options:
                if key not in own and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"backbone.{key} means nothing for {self.name}; leave it out, it is {network}'s")
        if self.name == "diffussm" and self.conditioning == "adaln":
            raise ValueError(
                "backbone.conditioning of diffussm is adaln-zero, cross-attention or in-context, not adaln"
            )
        return self

    def options(self) -> dict[str, Any]:
        """What the network's constructor takes of these, beside shapes and conditions."""
        options = {key: getattr(self, key) for key in NETWORK_OPTIONS[self.name]}
        if "temporal_attention" in options:
            options["temporal_attention"] = self.temporal_attention or False
        return options

    @property
    def enlargement(self) -> int:
        """Side of the outermost level over that of the network inside."""
        return math.prod(2 ** (len(level.channels) - 1) for level in self.outer)


def _mdm(levels: tuple[LevelConfig, ...]) -> dict[str, Any]:
    """A published Matryoshka network, whose captions' width is left to the encoder."""
    left_to_the_recipe = ("input_size", "text_features")
    inner, *outer = ({k: v for k, v in level.items() if k not in left_to_the_recipe} for level in levels)
    return {"heads": 8, **inner, "outer": tuple(outer)}


#: sizes by what backbone.name may be; and what a network's constructor takes of the settings
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dit": {},
    "diffussm": {"patch_size": 1},
    "unet": {"heads": 8},
    **{name: {**sizes} for name, sizes in (DIT_CONFIGS | DIFFUSSM_CONFIGS).items()},
    **{name: _mdm(levels) for name, levels in MDM_CONFIGS.items()},
}
#: what a backbone chosen by name brings along
SIZES = ("patch_size", "width", "depth", "heads", "channels", "resblocks", "attention")
TOKEN_OPTIONS = ("patch_size", "width", "depth", "conditioning")
NETWORK_OPTIONS: dict[str, tuple[str, ...]] = {
    "dit": (*TOKEN_OPTIONS, "heads", "mlp_ratio", "tubelet_size", "freq_shift", "adaln_ratio"),
    "diffussm": (
        *TOKEN_OPTIONS,
        "hourglass",
        "scan",
        "state",
        "initialisation",
        "discretisation",
        "bidirectional",
    ),
    "unet": (
        "heads",
        "channels",
        "resblocks",
        "attention",
        "feed_forward",
        "middle",
        "time_width",
        "time_frequencies",
        "groups",
        "dropout",
        "micro_scale",
        "text_width",
        "masked_text",
        "temporal_attention",
        "tubelet_size",
    ),
}


def _network(name: str) -> str:
    """The network of a configuration: dit of dit-xl-2."""
    network = name.partition("-")[0]
    return "unet" if network == "mdm" else network


class ConditionSettings(Settings):
    """What a sample is asked to be."""

    name: Literal["class", "text"] = "class"
    """class: the data set's classes, none where it has none; text: its captions, or its classes' names."""
    encoder: str = "bytes"
    """text: folder or hub name of a frozen text encoder of transformers (T5, CLIP, BERT and their relatives), e.g.
    google/flan-t5-xl; or bytes: a small transformer over the letters, trained along."""
    max_tokens: int = Field(64, ge=2)
    """text: tokens (or bytes) of a caption; longer ones are cut."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """text: of the frozen encoder's weights and features."""


class InterpolantSettings(Settings):
    """alpha(t) and sigma(t)."""

    name: InterpolantName = "linear"
    """linear, gvp, vp (SiT); ddpm, cosine (discrete steps); linear-variance, variance-exploding (l-DAE)."""
    beta_min: float = 0.1
    """vp: β at t = 0."""
    beta_max: float = 20.0
    """vp: β at t = 1."""
    num_steps: int = Field(1000, ge=1)
    """ddpm, cosine: number of steps."""
    sigma_max: float = Field(2**0.5, gt=0)
    """variance-exploding: sigma at t = 1."""
    snr_divisor: float = Field(1.0, gt=0)
    """Divide the signal-to-noise ratio by this at every t: s**power for an image s times larger per side."""
    snr_power: float = Field(1.0, ge=0)
    """Matryoshka networks: a level s times larger per side than the smallest has its ratio divided by s**snr_power."""


class ObjectiveSettings(Settings):
    """What training minimises."""

    weighting: WeightingName = "none"
    """none, noise, data, velocity, v, likelihood, vdm, min-snr, snr, alpha-squared or inverse-variance."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """min-snr: the cap on the signal-to-noise ratio."""
    times: Literal["auto", "uniform", "discrete", "logit-normal", "single"] = "auto"
    """Distribution of training times; auto is discrete where the interpolant has steps, else uniform; single: one
    noise level only, a classical denoising autoencoder, which cannot be sampled."""
    time_mean: float = 0.0
    """logit-normal: mean of logit t; above 0 favours noise."""
    time_std: float = Field(1.0, gt=0)
    """logit-normal: standard deviation of logit t."""
    noise_level: float = Field(3**-0.5, gt=0)
    """single: sigma / alpha of the level."""
    time_eps: float = Field(1e-5, gt=0, lt=0.5)
    """Margin kept from an end of [0, 1] at which the target or its weight is singular."""
    stratified: bool = False
    """Spread a batch's times evenly over the distribution."""
    condition_dropout: float = Field(0.1, ge=0, le=1)
    """Share of labels replaced by the null class, of captions by the empty one, for classifier-free guidance."""
    vlb_weight: float = Field(1.0, ge=0)
    """learned variance: factor on the variational bound (1: DiT's)."""
    residual_weight: float = Field(0.0, ge=0)
    """Networks that give images: on patch-pca, factor on the squared error of the components that the latents leave
    out, 0.1 in l-DAE, whose network so predicts the original image. 0: only the latents count."""
    level_weights: tuple[float, ...] = ()
    """Matryoshka networks: factors on the levels' losses, smallest level first. Empty: 1 each."""
    level_shares: tuple[float, ...] = ()
    """Matryoshka networks: shares of the examples that have a level and all smaller ones, smallest level first, so the
    first is 1; [1, 0.67] trains a third at the low resolution alone. Empty: 1 each."""


class LoRASettings(Settings):
    """Low-rank updates of linear layers, trained in place of the layers themselves (needs the extra 'lora')."""

    rank: int = Field(0, ge=0)
    """Rank of an update; 0: no LoRA."""
    alpha: int | None = Field(None, ge=1)
    """An update is scaled by alpha / rank. None: by 1."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Linear layers that get one: ends of their names, or glob patterns; adaLN_modulation.1 is what time enters by.
    None: the network's own, of DiT attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 (docs/finetuning.md)."""


class Stage(Settings):
    """A part of the training, before that of all levels of a Matryoshka network; what is not given is as in `training`.

    Both decays of the learning rate, cosine and linear, are over the stage's own steps.
    """

    levels: int = Field(ge=1)
    """How many levels are trained, the smallest first."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int | None = Field(None, ge=1)
    """Global batch size."""
    lr: LearningRate | None = None
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] | None = None
    """After warm-up: constant, or a decay to zero at the stage's last step."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    times: Literal["auto", "uniform", "discrete", "logit-normal"] | None = None
    """Distribution of training times; this and the next two in place of the objective's."""
    time_mean: float | None = None
    """logit-normal: mean of logit t."""
    time_std: float | None = Field(None, gt=0)
    """logit-normal: standard deviation of logit t."""


#: what of a stage is in place of the objective's settings, under the same names
STAGE_TIMES = {"times", "time_mean", "time_std"}


class TrainingSettings(Settings):
    """The loop."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps, those of the stages included."""
    stages: tuple[Stage, ...] = ()
    """Matryoshka networks: progressive training, what comes before all levels are trained, e.g.
    [{levels: 1, steps: 3000}], the low resolution alone. Empty: all levels from the start."""
    batch_size: int = Field(256, ge=1)
    """Global batch size: over all processes and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per step; each process splits its share of the batch in so many."""
    lr: LearningRate = 1e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up: constant, or a cosine or linear decay to zero at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; state-space parameters (Δ, A, C, D) have none."""
    ssm_lr: LearningRate | None = None
    """diffussm: peak learning rate of state-space parameters. None: that of all others."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's betas."""
    grad_clip: float | None = Field(None, gt=0)
    """Clip the gradient's global norm to this. None: do not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast the network; weights, optimizer and diffusion arithmetic stay fp32."""
    compile: bool = False
    """torch.compile the backbone."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of parameters that keep their values, e.g. blocks.*; one after a "!" is trained after all."""
    lora: LoRASettings = LoRASettings()
    ema: tuple[Decay, ...] = (0.9999,)
    """Decays of the averaged weights; the first is the run's model."""
    ema_warmup: bool = False
    """Cap each decay at (1 + step) / (10 + step), so that short runs forget their initial weights."""
    log_every: int = Field(50, ge=1)
    """Steps between log lines and checks for a non-finite loss."""
    validate_every: int = Field(0, ge=0)
    """Steps between validation losses on the test split; 0: never."""
    sample_every: int = Field(0, ge=0)
    """Steps between sample grids; 0: never."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints to keep."""

    def lr_scale(self, step: int) -> float:
        """The factor on the peak learning rate of the step that follows `step` finished ones of a single stage."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 1 - progress if self.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def lr_after(self, step: int) -> float:
        """The learning rate of the step that follows `step` finished ones; after the last one, what a decay leaves."""
        stage = [stage for stage in self.plan() if stage.first <= step][-1]
        return stage.settings.lr * stage.settings.lr_scale(step - stage.first)

    def plan(self) -> list[StagePlan]:
        """The stages in turn, the last one that of all levels, each with settings of its own."""
        plan, first = [], 0
        for stage in self.stages:
            given = stage.model_dump(exclude={"levels"}, exclude_none=True)
            times = {key: given.pop(key) for key in STAGE_TIMES & given.keys()}
            plan.append(StagePlan(first, stage.levels, self.model_copy(update={**given, "stages": ()}), times))
            first += stage.steps
        return [*plan, StagePlan(first, None, self.model_copy(update={"steps": self.steps - first, "stages": ()}), {})]


class StagePlan(NamedTuple):
    """One stage of a training."""

    first: int
    """Steps before it."""
    levels: int | None
    """Levels that are trained, None for all."""
    settings: TrainingSettings
    """Its own, `steps` those of this stage alone."""
    times: dict[str, Any]
    """What it has in place of the objective's settings."""


#: bytes of a recipe's name, which leave room for what is put behind it in names of files
MAX_NAME = 200
#: bytes of a recipe's file; the longest that the library ships has two thousand
MAX_BYTES = 2**16


class Recipe(Settings):
    """A run: the six words of the library, and how to train and sample."""

    name: str
    """The recipe's name."""
    description: str = ""
    """One line: what this is, and where it comes from."""
    seed: Seed = 0
    """Seed of everything random in training."""
    init: str | None = None
    """Weights to start from: a run folder, an official file, a safetensors file or a diffusers folder; the network then
    has the data set's classes. None: fresh ones."""
    data: DataSettings = DataSettings()
    representation: RepresentationSettings = RepresentationSettings()
    backbone: BackboneSettings = BackboneSettings()
    condition: ConditionSettings = ConditionSettings()
    interpolant: InterpolantSettings = InterpolantSettings()
    target: Target = "velocity"
    """What the network's output means: data, noise, velocity, score or v."""
    variance: Literal["none", "learned", "unused"] = "none"
    """learned: the network also outputs DiT's variance; unused: it outputs and ignores it, as SiT's published ones."""
    time_input: tuple[float, float] = (1000.0, 0.0)
    """(scale, offset) of the network's time, scale·t + offset: [1000, -1] is DiT's step index, [-1, 1] SiT's."""
    objective: ObjectiveSettings = ObjectiveSettings()
    training: TrainingSettings = TrainingSettings()
    sampling: Sampler = Sampler()
    guidance: Guidance = Guidance()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        size = len(name.encode("utf-8", "surrogatepass"))
        if name.strip() in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name) or size > MAX_NAME:
            raise ValueError(
                f"name = {shortened(name)} is not valid: a run is written to runs/<name>, so expected the name of a "
                f"folder, of at most {MAX_NAME} bytes and without slashes"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._check_tokenizer()
        self._check_network()
        self._check_image_space()
        self._check_stages()
        if self.training.batch_size % self.training.accumulate:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} is not divisible by "
                f"training.accumulate {self.training.accumulate}"
            )
        if self.training.lora.rank and self.init is None:
            raise ValueError(
                "training.lora adapts weights that are there already: set init to a checkpoint, or training.lora.rank=0"
            )
        return self

    def _check_tokenizer(self) -> None:
        settings = self.representation
        if settings.name not in TOKENIZERS:
            return
        if self.data.frames:
            raise ValueError(f"the representation {settings.name} is of images, not of clips; set data.frames=0")
        check_settings(
            settings.name, settings.stride, settings.channels, self.image_channels, self.data.size, settings.fit
        )

    def _check_image_space(self) -> None:
        backbone, representation = self.backbone, self.representation
        sides = [f"backbone.{key}=image" for key in ("input", "output") if getattr(backbone, key) == "image"]
        if sides and not representation.name.startswith("patch-"):
            raise ValueError(
                f"{sides[0]} is for patch-pca, patch-ae and patch-vae, not for {representation.name}; change "
                "representation, or leave it out"
            )
        if sides and (backbone.outer or self.variance != "none"):
            raise ValueError(f"{sides[0]} knows neither outer levels nor a learned variance; leave one of them out")
        if backbone.output == "image" and self.target != "data":
            raise ValueError(f"a network that gives images predicts the data, not {self.target}; set target=data")
        if len(sides) == 1 and backbone.name == "unet":
            raise ValueError("a unet's output has its input's sides; set both backbone.input and backbone.output")
        if self.objective.residual_weight and (
            backbone.output != "image" or representation.name != "patch-pca" or representation.fit.whiten
        ):
            raise ValueError(
                "objective.residual_weight is for networks that give images on patch-pca, not whitened; set "
                "backbone.output=image, or leave it out"
            )
        patches = self.input_shape[1] // backbone.patch_size
        if len(sides) == 1 and self.output_shape[1] % patches:
            raise ValueError(
                f"a network of {patches} × {patches} patches cannot give an output of {self.output_shape[1]} × "
                f"{self.output_shape[1]}; change backbone.patch_size"
            )

    def _check_network(self) -> None:
        backbone, size = self.backbone, self.input_shape[1]
        if size % backbone.enlargement:
            raise ValueError(
                f"the outer levels make the network {backbone.enlargement} times as large as inside, which does not "
                f"divide {size} × {size}; change backbone.outer or data.size"
            )
        height, patch, m = size // backbone.enlargement, backbone.patch_size, backbone.hourglass
        if backbone.name in ("dit", "diffussm") and height % patch:
            raise ValueError(
                f"the input is {height} × {height}, which a patch of {patch} does not divide; "
                "change backbone.patch_size or data.size"
            )
        if backbone.name == "diffussm" and ((height // patch) ** 2 % m or 2 * backbone.width % m):
            raise ValueError(
                f"an hourglass of {m} does not divide the {(height // patch) ** 2} positions and 2·width; change "
                "backbone.hourglass, backbone.patch_size or backbone.width"
            )
        if backbone.outer and self.variance != "none":
            raise ValueError("a Matryoshka network has no learned variance; set variance=none")
        if backbone.name == "diffussm" and self.data.frames:
            raise ValueError("clips need a network with time, and diffussm has none; set backbone to dit or unet")
        ratio = math.prod(level.frame_ratio for level in backbone.outer)
        if self.data.frames % ratio or (ratio > 1 and not self.data.frames):
            raise ValueError(
                f"frame_ratio makes {ratio} times as many frames as inside, which does not divide data.frames "
                f"{self.data.frames}; change one of them"
            )
        tubelet, frames = backbone.tubelet_size, self.data.frames // ratio
        width = backbone.channels[0] if backbone.name == "unet" else backbone.width
        if tubelet > 1 and (not frames or frames % tubelet or width % tubelet):
            raise ValueError(
                f"a tubelet of {tubelet} must divide the network's {frames} frames and its width of {width}; change "
                "backbone.tubelet_size, data.frames or the width"
            )
        levels = 1 + len(backbone.outer)
        for key in ("level_weights", "level_shares"):
            given = getattr(self.objective, key)
            if given and len(given) != levels:
                raise ValueError(f"objective.{key} has {len(given)} numbers for {levels} level(s); give one for each")
        shares = self.objective.level_shares
        if shares and (shares[0] != 1 or min(shares) <= 0 or list(shares) != sorted(shares, reverse=True)):
            raise ValueError(
                f"objective.level_shares {list(shares)} must begin with 1 and not rise, above 0: who has a level has "
                "all smaller ones"
            )

    def _check_stages(self) -> None:
        training, levels = self.training, 1 + len(self.backbone.outer)
        for stage in training.stages:
            if stage.levels > levels:
                raise ValueError(f"a stage of training trains {stage.levels} levels, but the network has {levels}")
        before = sum(stage.steps for stage in training.stages)
        if before >= training.steps:
            raise ValueError(
                f"training.stages take {before} steps, and training.steps are {training.steps} in all; the rest, which "
                "trains all levels, must be at least 1"
            )

    @property
    def image_channels(self) -> int:
        """Channels of an image, 3 as long as that is left to the data."""
        return self.data.channels or 3

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, or of a frame, in the space that x lives in; of a Matryoshka network: its largest."""
        size = self.data.size
        if self.representation.name == "pixels":
            return self.image_channels, size, size
        if size % self.representation.stride:
            raise ValueError(
                f"data.size {size} is not divisible by the autoencoder's stride {self.representation.stride}"
            )
        return self.representation.channels, size // self.representation.stride, size // self.representation.stride

    def _side_shape(self, side: str) -> tuple[int, int, int]:
        return (self.image_channels, self.data.size, self.data.size) if side == "image" else self.latent_shape

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network is given; of a Matryoshka network: its largest level."""
        return self._side_shape(self.backbone.input)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network gives, variance apart."""
        return self._side_shape(self.backbone.output)

    def settled(self) -> Recipe:
        """This recipe with what its data settings leave open as the data have it; see `DataSettings.settled`."""
        found = self.data.settled()
        return self if found is self.data else Recipe.parse({**self.model_dump(), "data": found.model_dump()})

    def to_yaml(self, *, ascii_only: bool = False) -> str:
        """Every field, resolved, as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=not ascii_only)

    def write(self, folder: Path) -> None:
        """Write the recipe.yaml of a run's folder, sealed (`mezzotint.seal`)."""
        files.write_text(folder / "recipe.yaml", sealed(self.to_yaml()))


#: ``["training.steps=5", "data=folder:photos"]``, as on the command line; or keys, dotted or nested, with Python's
#: values: ``{"training.steps": 5, "data": {"name": "folder", "path": Path("photos")}}``
Overrides = Sequence[str] | Mapping[str, Any]


def load_recipe(source: str | Path, overrides: Overrides = ()) -> Recipe:
    """A recipe by its name, by a YAML file or by a run folder, with overrides applied in order.

    >>> load_recipe("digits", ["training.steps=500", "training.lr=1e-3"])
    >>> load_recipe("digits", {"training": {"steps": 500, "lr": 1e-3}, "guidance.scale": 1.5})

    A recipe's number of classes is that of its data: on others, or on captions, it is theirs unless it is given, too,
    and with other data the recipe is called NAME-DATA, after the folder or the data set. A run's own recipe keeps both.
    Raises `MezzotintError` for an unknown name or key, a bad value, or a combination that means nothing.
    """
    recipe, given = Recipe.parse(_read(source)), _merged(overrides)
    base = recipe.model_dump()
    if has_recipe(source):
        return Recipe.parse(_merge(base, given, Recipe))
    made = Recipe.parse(_follow_data(base, given, _merge(base, given, Recipe)))
    if "name" in given or (made.data.name, made.data.path) == (recipe.data.name, recipe.data.path):
        return made
    return made.model_copy(update={"name": _called_after(recipe.name, made.data)})


def override_recipe(recipe: Recipe, overrides: Overrides) -> Recipe:
    """`recipe`, perhaps of a trained model, with overrides as of `load_recipe` in order, and nothing else changed.

    Raises `MezzotintError` as `load_recipe` does.
    """
    return Recipe.parse(_merge(recipe.model_dump(), _merged(overrides), Recipe))


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe itself, or what `load_recipe` finds by its name, file or run folder."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def resolve(recipe: Recipe, dataset: data.ImageDataset | data.ImageStream, text_features: int | None = None) -> Recipe:
    """The recipe with what only the data know filled in: number of classes, latents' scale. Checks that the two fit.

    text_features: where the condition is captions, the width of their encoder's features (0: bytes).
    """
    recipe = recipe.settled()
    wanted, has = recipe.backbone.num_classes, len(dataset.class_names)
    if recipe.condition.name == "text":
        if wanted:
            raise MezzotintError(f"the condition is text, so backbone.num_classes={wanted} means nothing; leave it out")
        if recipe.backbone.text_features not in (None, text_features):
            raise MezzotintError(
                f"the captions' features are {text_features} wide, but backbone.text_features is "
                f"{recipe.backbone.text_features}; leave it out"
            )
        wanted, has = 0, 0
    elif recipe.backbone.text_features is not None:
        raise MezzotintError("backbone.text_features is for captions; set condition=text, or leave it out")
    if wanted and not has:
        raise MezzotintError(
            f"the recipe has {wanted} classes but the data set is unlabelled; set backbone.num_classes=0 to train "
            "without classes"
        )
    if wanted and has > wanted:
        raise MezzotintError(
            f"the data set has {has} classes, more than backbone.num_classes={wanted}; raise it, or set it to null to "
            "have as many"
        )
    frames = (recipe.data.frames,) if recipe.data.frames else ()
    expected = (*frames, recipe.data.channels, recipe.data.size, recipe.data.size)
    if dataset.image_shape != expected:
        raise MezzotintError(
            f"the data set's images are {dataset.image_shape}, expected {expected} (channels, height, width); "
            "set data.size and data.channels"
        )
    representation = recipe.representation
    if isinstance(dataset, data.CachedLatents):
        if representation.name == "pixels":
            raise MezzotintError(
                "the data are latents, but the recipe's representation is pixels; set representation=kl, or the "
                "tokenizer that encoded them"
            )
        if recipe.latent_shape != dataset.latent_shape:
            raise MezzotintError(
                f"the latents are {dataset.latent_shape}, expected {recipe.latent_shape} (channels, height, width); "
                "set representation.channels and representation.stride to those of the autoencoder that encoded them"
            )
        if representation.name == "kl" and representation.scale not in (None, dataset.info.scale):
            raise MezzotintError(
                f"the latents were encoded for a scale of {dataset.info.scale}, but representation.scale is "
                f"{representation.scale}; set it to null or encode again"
            )
        if representation.name == "kl":
            representation = representation.model_copy(update={"scale": dataset.info.scale})
    backbone = recipe.backbone.model_copy(
        update={"num_classes": has if wanted is None else wanted, "text_features": text_features}
    )
    found = {"backbone": backbone, "representation": representation}
    if wanted is None and not has:  # nothing to guide towards
        found["guidance"] = recipe.guidance.model_copy(update={"scale": 1.0})
    return recipe.model_copy(update=found)


def advice(recipe: Recipe, dataset: data.ImageDataset | data.ImageStream) -> list[str]:
    """What a person should be told before `recipe`, resolved, is trained on `dataset`: a sentence on each thing."""
    found, classes, settings = [], recipe.backbone.num_classes or 0, recipe.data
    if classes > (has := len(dataset.class_names)):
        found.append(
            f"backbone.num_classes is {classes} and the data set has {has} classes, so {classes - has} will never be "
            "trained; leave it out to have as many as there are"
        )
    if settings.channels == 1 and isinstance(dataset, DecodedImages) and not survey.all_grey(dataset):
        found.append("data.channels=1 turns colour pictures grey; set data.channels=3 to train in colour")
    if settings.name == "folder" and settings.path and (captions := survey.captions_beside(settings.path)):
        found.append(
            f"{captions} holds captions, which data=folder leaves unused; data=captions:{settings.path} condition=text "
            "trains with them"
        )
    return found


def has_recipe(source: str | Path) -> bool:
    """Whether `source` is a folder with a recipe in it, as a run's is."""
    with suppress(OSError):  # a name that no file can have
        return (Path(source) / "recipe.yaml").is_file()
    return False


def _merged(overrides: Overrides) -> dict[str, Any]:
    """What the overrides say in all, the later ones over the earlier."""
    values: dict[str, Any] = {}
    for override in _nested(overrides):
        values = _merge(values, override, Recipe)
    return values


def _called_after(name: str, settings: DataSettings) -> str:
    """`name`-`folder` for a recipe on the data of a folder, `name`-`data set` for one on data without a path."""
    place = settings.name
    if settings.path is not None:
        folder, last = os.path.split(os.path.abspath(os.path.expanduser(settings.path)))
        last = os.path.basename(folder) if re.search(r"[*?{[]", last) else last  # a pattern of the files in a folder
        place = re.sub(r"[\x00-\x1f\x7f\\]", "-", last) or place
    return f"{name}-{place}".encode("utf-8", "ignore")[:MAX_NAME].decode("utf-8", "ignore")


def _follow_data(base: dict[str, Any], top: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """`merged`, which is `top` over `base`, without the number of classes of `base` where that is of other data.

    With captions there are no classes, either. 0 says that the network has none, of whatever data, and stays.
    """

    def given(values: dict[str, Any], section: str, key: str) -> Any:
        part = values.get(section)
        return part.get(key) if isinstance(part, dict) else None

    moved = any(given(base, "data", key) != given(merged, "data", key) for key in ("name", "path"))
    inherited = None if given(top, "backbone", "num_classes") is not None else given(merged, "backbone", "num_classes")
    if str(inherited) in ("None", "0") or not (moved or given(merged, "condition", "name") == "text"):
        return merged
    return _merge(merged, {"backbone": {"num_classes": None}}, Recipe)


def _read(source: str | Path, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    """The merged mapping of a recipe and of those that it extends; `extending` are those that it is the base of."""
    if not isinstance(source, str | os.PathLike):
        raise MezzotintError(f"a recipe's name, file or run folder was expected, not {shortened(source)}")
    path, is_file, is_folder = Path(source), False, False
    with suppress(OSError):  # a name that no file can have
        path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path
        is_file, is_folder = path.is_file(), path.is_dir()
    place = str(path.resolve()) if is_file else str(source)
    if place in extending:
        raise MezzotintError(f"the recipe {source} extends itself, by way of others or not; take an 'extends' out")
    if is_file:
        if path.stat().st_size > MAX_BYTES:
            raise MezzotintError(f"{source} is not a recipe: it has more than {MAX_BYTES:,} bytes")
        text = files.read_text(path)
        check_uncut(path, text)
    elif str(source) in (names := recipe_names()):
        text = (resources.files("mezzotint.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") or "/" in str(source):
        raise MezzotintError(f"there is no recipe file or run folder at {source}")
    else:
        hint = closest(str(source), names)
        if is_folder and source:
            hint += f"; a folder of pictures is the data of a recipe, data=folder:{source}"
        raise MezzotintError(f"recipe {shortened(str(source))} is unknown; {hint} (see 'mezzotint recipes')")
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise MezzotintError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise MezzotintError(f"{source} is not a recipe: expected a mapping of keys to values")
    if path.name == "recipe.yaml" and is_file and "extends" not in values:
        check_unchanged(path, text, values, ("guidance", [*Guidance.model_fields]))
    base = values.pop("extends", None)
    base = typed_text(base) if isinstance(base, Written) else base
    if base is not None and not isinstance(base, str):
        raise MezzotintError(
            f"{source} extends {shortened(base)}; expected a recipe's name, a YAML file or a run folder"
        )
    values.setdefault("name", path.stem if is_file else str(source))
    below = {} if base is None else _read(base, (*extending, place))
    merged = _follow_data(below, values, _merge(below, values, Recipe))
    section, own = merged.get("representation"), path.parent / OWN_FOLDER
    if path.name == "recipe.yaml" and isinstance(section, dict) and (own / INFO).is_file():
        section["path"] = str(own)  # wherever the run's folder is now
    return merged


def _merge(base: dict[str, Any], top: dict[str, Any], schema: type[Settings]) -> dict[str, Any]:
    """`top` laid over `base`, section by section. A backbone chosen by name brings its own sizes."""
    merged = dict(base)
    for key, value in top.items():
        section = schema.model_fields[key].annotation if key in schema.model_fields else None
        if not (isinstance(section, type) and issubclass(section, Settings)):
            merged[key] = value
            continue
        if isinstance(value, str):
            value = _named_section(key, value, section)
        below = merged.get(key)
        if not (isinstance(value, dict) and isinstance(below, dict)):
            merged[key] = value
            continue
        if key == "backbone" and "name" in value:
            dropped = {key for options in NETWORK_OPTIONS.values() for key in options}
            dropped -= {key for key in NETWORK_OPTIONS.get(_network(str(value["name"])), ()) if key not in SIZES}
            below = {k: v for k, v in below.items() if k not in dropped}
        merged[key] = _merge(below, value, section)
    return merged


def _named_section(key: str, word: str, section: type[Settings]) -> Any:
    """What a bare word means for a section: `data=folder:PATH`, `sampling=ddpm`, `interpolant=gvp`; or its mapping."""
    if word.startswith("{") and isinstance(word, Written):
        try:
            return read_yaml(word)
        except ValueError as error:
            raise MezzotintError(f"{key} = {shortened(word)} is not valid YAML: {error}") from None
    name = typed_text(word) if isinstance(word, Written) else word
    if key == "data" and name and ":" in name:
        name, _, path = name.partition(":")
        return {"name": name, "path": path}
    by = "sampler" if key == "sampling" else "name"
    return {by: name} if name and by in section.model_fields else name


def _nested(overrides: Overrides) -> list[dict[str, Any]]:
    """Each override as a nested mapping."""
    if isinstance(overrides, Mapping):
        return [_at_key(key, _plain(value)) for key, value in overrides.items()]
    if not isinstance(overrides, Iterable):
        raise MezzotintError(
            f"overrides are key=value texts, or a mapping from keys to values, not {shortened(overrides)}"
        )
    return [read_override(text) for text in ([overrides] if isinstance(overrides, str) else overrides)]


def _plain(value: Any) -> Any:
    """A value of Python as YAML could hold it: paths as text, arrays and tensors as lists, dotted keys nested."""
    if isinstance(value, Settings):
        return value.model_dump()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars, and tensors
        return value.tolist()
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, item in value.items():
            plain = _laid_over(plain, _at_key(key, _plain(item)))
        return plain
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    return value


def _laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {key for key, value in top.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return base | top | {key: _laid_over(base[key], top[key]) for key in both}


def _at_key(key: str, value: Any) -> dict[str, Any]:
    """A value at a dotted key, as a nested mapping."""
    if not isinstance(key, str) or not all(key.split(".")):
        raise MezzotintError(f"key {shortened(key)} is no name of a setting; expected one such as training.steps")
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def read_override(text: str) -> dict[str, Any]:
    """One dotted ``key=value`` as a nested mapping, the value as it was typed; else raises `MezzotintError`."""
    key, equals, written = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not all(key.split(".")):
        raise MezzotintError(f"override {shortened(text)} is not of the form key=value, e.g. training.steps=1000")
    return _at_key(key, as_written(written))
