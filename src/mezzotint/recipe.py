"""Recipes: one validated record that says everything about a run, and alone recreates it."""

from __future__ import annotations

from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mezzotint import data
from mezzotint.backbones import DIFFUSSM_CONFIGS, DIT_CONFIGS
from mezzotint.backbones.diffussm import Scan
from mezzotint.backbones.s4d import Discretisation, Initialisation
from mezzotint.errors import MezzotintError, closest
from mezzotint.guidance import Guidance
from mezzotint.interpolants import InterpolantName
from mezzotint.samplers import Sampler
from mezzotint.settings import Settings
from mezzotint.targets import Target
from mezzotint.weightings import WeightingName


class DataSettings(Settings):
    """What the model is trained on."""

    name: str = "digits"
    """digits, idx, folder, huggingface or latents; `data=folder:PATH` sets name and path at once."""
    path: str | None = None
    """Folder, or Hugging Face hub name; latents: a folder that 'mezzotint encode' wrote. None: the data set's own
    default place, where it has one."""
    size: int = Field(8, ge=1)
    """Images are size × size: cropped and resized (folder, huggingface) or padded (idx); latents: they were so."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for RGB; images are converted."""
    labels: bool = True
    """Whether to use class labels; false trains on a flat folder of images."""
    flip: bool = False
    """Flip training images horizontally at random."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of a folder without a test split of its own that is held out."""
    max_unreadable: int = Field(10, ge=0)
    """How many unreadable images are replaced, with a warning each, before the run stops."""
    streaming: bool = False
    """huggingface: read the data set as a stream, without downloading it first."""
    image_column: str | None = None
    """huggingface: the column of images. None: found by its type."""
    label_column: str | None = None
    """huggingface: the column of labels. None: found by its type."""
    workers: int = Field(0, ge=0)
    """Processes that decode images, or threads that read latents, beside the training process; 0 does so in it."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in data.SOURCES:
            raise ValueError(f"data set {name!r} is unknown; {closest(name, data.SOURCES)}")
        return name

    def load(self, split: str = "train") -> data.ImageDataset | data.ImageStream:
        """The split "train" or "test" of this data set. Raises `MezzotintError` where it cannot be read."""
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

    name: Literal["pixels", "kl"] = "pixels"
    """pixels, or kl: the latents of a frozen KL autoencoder (needs the extra 'latent')."""
    path: str | None = None
    """kl: folder (or a pipeline's, with a sub-folder vae) or hub name of a diffusers AutoencoderKL, e.g.
    stabilityai/sd-vae-ft-ema."""
    scale: float | None = None
    """kl: factor on the latents. None: the autoencoder's own (0.18215 for Stable Diffusion's)."""
    stride: int = Field(8, ge=1)
    """kl: pixels per latent position along a side."""
    channels: int = Field(4, ge=1)
    """kl: channels of a latent."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """kl: of the autoencoder's weights and activations; latents and images stay fp32."""
    slicing: bool = False
    """kl: take one image at a time through the autoencoder, which saves memory."""
    tiling: bool = False
    """kl: take large images through the autoencoder in overlapping tiles: less memory, and slightly other images."""


class BackboneSettings(Settings):
    """The network."""

    name: str = "dit"
    """dit or diffussm with the sizes below, or a configuration (dit-s-8 … dit-xl-2, diffussm-s … diffussm-xl), whose
    sizes win where not given."""
    patch_size: int = Field(2, ge=1)
    """Side of a patch, in pixels or latent positions. diffussm: 1 where not given."""
    width: int = Field(384, ge=1)
    """Channels of a token."""
    depth: int = Field(12, ge=1)
    """Number of blocks."""
    heads: int = Field(6, ge=1)
    """dit: attention heads; must divide width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """dit: hidden width of a block's MLP over width."""
    conditioning: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero"
    """dit: how time and class enter (DiT, section 3.2)."""
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
    num_classes: int | None = Field(None, ge=0)
    """Number of classes; 0 is unconditional. None: as many as the data set has (a saved recipe holds the number)."""

    @model_validator(mode="before")
    @classmethod
    def _published_sizes(cls, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("name", "dit")
        if name not in CONFIGURATIONS:
            raise ValueError(f"backbone {name!r} is unknown; {closest(str(name), CONFIGURATIONS)}")
        return CONFIGURATIONS[name] | {**values, "name": _network(name)}

    @model_validator(mode="after")
    def _own_options(self) -> BackboneSettings:
        for network, options in NETWORK_OPTIONS.items():
            for key in options:
                if network != self.name and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"backbone.{key} means nothing for {self.name}; leave it out, it is {network}'s")
        return self


#: sizes by what backbone.name may be; and the options that only one of the networks has
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dit": {},
    "diffussm": {"patch_size": 1},
    **{name: {**sizes} for name, sizes in (DIT_CONFIGS | DIFFUSSM_CONFIGS).items()},
}
NETWORK_OPTIONS = {
    "dit": ("heads", "mlp_ratio", "conditioning", "freq_shift"),
    "diffussm": ("hourglass", "scan", "state", "initialisation", "discretisation", "bidirectional"),
}


def _network(name: str) -> str:
    """The network of a configuration: dit of dit-xl-2."""
    return name.partition("-")[0]


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


class ObjectiveSettings(Settings):
    """What training minimises."""

    weighting: WeightingName = "none"
    """none, noise, data, velocity, v, likelihood, vdm, min-snr, snr, alpha-squared or inverse-variance."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """min-snr: the cap on the signal-to-noise ratio."""
    times: Literal["auto", "uniform", "discrete", "logit-normal"] = "auto"
    """Distribution of training times; auto is discrete where the interpolant has steps, else uniform."""
    time_mean: float = 0.0
    """logit-normal: mean of logit t; above 0 favours noise."""
    time_std: float = Field(1.0, gt=0)
    """logit-normal: standard deviation of logit t."""
    time_eps: float = Field(1e-5, gt=0, lt=0.5)
    """Margin kept from an end of [0, 1] at which the target or its weight is singular."""
    stratified: bool = False
    """Spread a batch's times evenly over the distribution."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of labels replaced by the null class, for classifier-free guidance."""
    vlb_weight: float = Field(1.0, ge=0)
    """Factor on the variational bound of a learned variance (1: DiT's)."""


class LoRASettings(Settings):
    """Low-rank updates of linear layers, trained in place of the layers themselves (needs the extra 'lora')."""

    rank: int = Field(0, ge=0)
    """Rank of an update; 0: no LoRA."""
    alpha: int | None = Field(None, ge=1)
    """An update is scaled by alpha / rank. None: by 1."""
    targets: tuple[str, ...] = Field(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), min_length=1)
    """Linear layers that get one: ends of their names, or glob patterns; adaLN_modulation.1 is what time enters by."""


class TrainingSettings(Settings):
    """The loop."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(256, ge=1)
    """Global batch size: over all processes and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per step; each process splits its share of the batch in so many."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up: constant, or a cosine or linear decay to zero at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; state-space parameters (Δ, A, C, D) have none."""
    ssm_lr: float | None = Field(None, gt=0)
    """Peak learning rate of state-space parameters. None: that of all others."""
    betas: tuple[float, float] = (0.9, 0.999)
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
    ema: tuple[float, ...] = (0.9999,)
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


class Recipe(Settings):
    """A run: the six words of the library, and how to train and sample."""

    name: str
    """The recipe's name."""
    description: str = ""
    """One line: what this is, and where it comes from."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in training."""
    init: str | None = None
    """Weights to start from: a run folder, an official .pt, a safetensors file or a diffusers folder; the network then
    has the data set's classes. None: fresh ones."""
    data: DataSettings = DataSettings()
    representation: RepresentationSettings = RepresentationSettings()
    backbone: BackboneSettings = BackboneSettings()
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

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        height, patch, m = self.latent_shape[1], self.backbone.patch_size, self.backbone.hourglass
        if height % patch:
            raise ValueError(
                f"the input is {height} × {height}, which a patch of {patch} does not divide; "
                "change backbone.patch_size or data.size"
            )
        if self.backbone.name == "diffussm" and ((height // patch) ** 2 % m or 2 * self.backbone.width % m):
            raise ValueError(
                f"an hourglass of {m} does not divide the {(height // patch) ** 2} positions and 2·width; change "
                "backbone.hourglass, backbone.patch_size or backbone.width"
            )
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

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x, what the network sees."""
        size = self.data.size
        if self.representation.name == "pixels":
            return self.data.channels, size, size
        if size % self.representation.stride:
            raise ValueError(
                f"data.size {size} is not divisible by the autoencoder's stride {self.representation.stride}"
            )
        return self.representation.channels, size // self.representation.stride, size // self.representation.stride

    def to_yaml(self) -> str:
        """Every field, resolved, as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """Names of the recipes that the library ships."""
    return sorted(
        file.name.removesuffix(".yaml")
        for file in resources.files("mezzotint.recipes").iterdir()
        if file.name.endswith(".yaml")
    )


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe by its name, by a YAML file or by a run folder, with ``key=value`` overrides applied in order.

    Raises `MezzotintError` for an unknown name or key, a bad value, or a combination that means nothing.
    """
    return override_recipe(Recipe.parse(_read(source)), overrides)


def override_recipe(recipe: Recipe, overrides: list[str] | tuple[str, ...]) -> Recipe:
    """`recipe` with ``key=value`` overrides applied in order. Raises `MezzotintError` as `load_recipe` does."""
    values = recipe.model_dump()
    for override in overrides:
        values = _merge(values, _override(override))
    return Recipe.parse(values)


def resolve(recipe: Recipe, dataset: data.ImageDataset | data.ImageStream) -> Recipe:
    """The recipe with what only the data know filled in: number of classes, latents' scale. Checks that the two fit."""
    wanted, has = recipe.backbone.num_classes, len(dataset.class_names)
    if wanted and not has:
        raise MezzotintError(
            f"the recipe has {wanted} classes but the data set is unlabelled; set backbone.num_classes=0 to train "
            "without classes"
        )
    if wanted and has > wanted:
        raise MezzotintError(f"the data set has {has} classes, more than backbone.num_classes={wanted}; raise it.")
    expected = (recipe.data.channels, recipe.data.size, recipe.data.size)
    if dataset.image_shape != expected:
        raise MezzotintError(
            f"the data set's images are {dataset.image_shape}, expected {expected} (channels, height, width); "
            "set data.size and data.channels"
        )
    representation = recipe.representation
    if isinstance(dataset, data.CachedLatents):
        if representation.name != "kl":
            raise MezzotintError(
                f"the data are latents, but the recipe's representation is {representation.name}; set representation=kl"
            )
        if recipe.latent_shape != dataset.latent_shape:
            raise MezzotintError(
                f"the latents are {dataset.latent_shape}, expected {recipe.latent_shape} (channels, height, width); "
                "set representation.channels and representation.stride to those of the autoencoder that encoded them"
            )
        if representation.scale not in (None, dataset.info.scale):
            raise MezzotintError(
                f"the latents were encoded for a scale of {dataset.info.scale}, but representation.scale is "
                f"{representation.scale}; set it to null or encode again"
            )
        representation = representation.model_copy(update={"scale": dataset.info.scale})
    backbone = recipe.backbone.model_copy(update={"num_classes": has if wanted is None else wanted})
    return recipe.model_copy(update={"backbone": backbone, "representation": representation})


def _read(source: str | Path) -> dict[str, Any]:
    """The merged mapping of a recipe and of those that it extends."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(source) in (names := recipe_names()):
        text = (resources.files("mezzotint.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") or "/" in str(source):
        raise MezzotintError(f"there is no recipe file or run folder at {source}")
    else:
        raise MezzotintError(
            f"recipe {str(source)!r} is unknown; {closest(str(source), names)} (see 'mezzotint recipes')"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise MezzotintError(f"{source} is not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise MezzotintError(f"{source} is not a recipe: expected a mapping of keys to values")
    base = values.pop("extends", None)
    values.setdefault("name", path.stem if path.is_file() else str(source))
    return _merge({} if base is None else _read(base), values)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, section by section. A backbone chosen by name brings its own sizes."""
    merged = dict(base)
    for key, value in top.items():
        section = Recipe.model_fields[key].annotation if key in Recipe.model_fields else None
        if isinstance(value, str) and isinstance(section, type) and issubclass(section, Settings):
            value = _named_section(key, value)
        if not (isinstance(value, dict) and isinstance(below := merged.get(key), dict)):
            merged[key] = value
            continue
        if key == "backbone" and "name" in value:
            dropped = {"patch_size", "width", "depth", "heads"}.union(
                *(options for network, options in NETWORK_OPTIONS.items() if network != _network(str(value["name"])))
            )
            below = {k: v for k, v in below.items() if k not in dropped}
        merged[key] = _merge(below, value)
    return merged


def _named_section(key: str, word: str) -> dict[str, Any]:
    """What a bare word means for a section: `data=folder:PATH`, `sampling=ddpm`, `interpolant=gvp`."""
    if key == "data" and ":" in word:
        name, _, path = word.partition(":")
        return {"name": name, "path": path}
    return {"sampler" if key == "sampling" else "name": word}


def _override(text: str) -> dict[str, Any]:
    """One dotted ``key=value``, the value read as YAML, as a nested mapping."""
    key, equals, written = text.partition("=")
    if not equals or not all(key.split(".")):
        raise MezzotintError(f"override {text!r} is not of the form key=value, e.g. training.steps=1000")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise MezzotintError(f"the value of override {text!r} is not valid YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
