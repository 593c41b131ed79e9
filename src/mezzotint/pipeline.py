"""A recipe made real: build it, load it from a run folder, sample it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mezzotint import interpolants
from mezzotint.backbones import DiffuSSM, DiT, NestedUNet, UNet
from mezzotint.conditions.classes import Classes, class_labels, parse_classes
from mezzotint.conditions.encoders import TextEncoder
from mezzotint.conditions.text import Bytes, Captioner, Text
from mezzotint.denoiser import Denoiser, parameter_count
from mezzotint.devices import check_device
from mezzotint.errors import MezzotintError, check_count, expect, shortened
from mezzotint.files import atomic_path, parse_json, read_tensors, save_tensors, tensors_digest
from mezzotint.finite import check_finite, nonfinite
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.interpolants import interpolant
from mezzotint.progress import track
from mezzotint.recipe import Recipe, as_recipe, load_recipe
from mezzotint.representations import KLAutoencoder, Pyramid, Representation, representation
from mezzotint.representations.image_space import ImageSpace
from mezzotint.representations.tokenizer import PatchTokenizer
from mezzotint.samplers import Sampler, example_generators, randn

BACKBONES: dict[str, type[nn.Module]] = {"dit": DiT, "diffussm": DiffuSSM, "unet": UNet}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: what weights in a file may be; 8 bits and fewer mean nothing without a scale, which no file here has
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: signal-to-noise ratio up to which the end of a path counts as pure noise
MAX_SNR_OF_NOISE = 0.01
A_PIPELINE = "a pipeline, as mezzotint.load and mezzotint.build give one"


@dataclass(repr=False)
class Pipeline:
    """A denoiser with its recipe, its representation and text encoder (read when first used) and what it can be asked.

    class_names: of its classes; prompts: of one that is asked by captions, some that it was trained with.
    """

    recipe: Recipe
    denoiser: Denoiser
    class_names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.recipe.representation.path is not None:
            self.connect()

    def __repr__(self) -> str:
        recipe, backbone = self.recipe, self.denoiser.backbone
        asked = f"{self.denoiser.num_classes} classes" if self.denoiser.num_classes else "no condition"
        if self.denoiser.text:
            asked = f"captions ({recipe.condition.encoder})"
        shapes = ", ".join(" × ".join(map(str, shape)) for shape in self.denoiser.level_shapes)
        kind = type(self.denoiser.interpolant)
        path = recipe.interpolant.name if kind.__module__ == interpolants.__name__ else kind.__name__
        parameter = next(backbone.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        return (
            f"Pipeline({recipe.name!r}\n"
            f"  network         {backbone._get_name()}, {parameter_count(backbone):,} parameters, {asked}\n"
            f"  path            {path}, the network predicts {self.denoiser.target}\n"
            f"  representation  {recipe.representation.name}, {shapes}\n"
            f"  weights         {dtype} on {parameter.device})"
        )

    def connect(self) -> None:
        """Give a network that works on images the tokenizer through which it does; nothing for any other network."""
        if self.denoiser.space is not None:
            self.denoiser.space.tokenizer = cast(PatchTokenizer, self.representation)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def prepare(self, precision: str = "fp32", *, compiled: bool = False) -> Pipeline:
        """Make the network ready for sampling, in place: weights and activations in `precision`, compiled if so.

        What is outside of the network (states, guidance, the samplers' arithmetic) stays float32. Raises
        `MezzotintError` for an unknown precision.
        """
        if precision not in PRECISIONS:
            raise MezzotintError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
        self.denoiser.backbone.to(PRECISIONS[precision])
        if compiled:
            self.denoiser.backbone.compile()
        return self

    @property
    def header(self) -> dict[str, str]:
        """What a file of weights says besides them."""
        return {"class_names": json.dumps(list(self.class_names)), "prompts": json.dumps(list(self.prompts))}

    def save(self, run: str | Path) -> None:
        """Write the folder `run`, recipe.yaml and model.safetensors, which `mezzotint.load` and every command read.

        Raises `MezzotintError` for a network of your own, which no recipe builds.
        """
        backbone = self.denoiser.backbone
        if type(backbone) not in (*BACKBONES.values(), NestedUNet):
            raise MezzotintError(
                f"a {backbone._get_name()} is not what the recipe would build, so a folder of it could not be "
                "loaded; save its state_dict instead"
            )
        self.recipe.write(Path(run))
        save_weights(backbone, Path(run) / "model.safetensors", self.header)

    @cached_property
    def representation(self) -> Representation:
        made = representation(**self.recipe.representation.model_dump(exclude={"fit"}), device=self.device)
        shapes = self.denoiser.level_shapes
        return made if len(shapes) == 1 else Pyramid(made, shapes)

    @property
    def digests(self) -> dict[str, str]:
        """Tells apart by content what it computes with: weights, tokenizer or autoencoder, text encoder.

        The recipe names files, which may change behind their names. Reads what is not read yet.
        """
        parts = {"representation": getattr(self.representation, "base", self.representation)}
        parts |= {"captioner": self.captioner} if self.denoiser.text else {}
        found = {name: part.digest for name, part in parts.items() if hasattr(part, "digest")}
        if isinstance(autoencoder := parts["representation"], KLAutoencoder):
            found["scaling"] = repr(autoencoder.scaling)
        return {"weights": tensors_digest(self.denoiser.backbone.state_dict()), **found}

    @cached_property
    def captioner(self) -> Captioner:
        """What captions are read with."""
        return captioner(self.recipe, self.device)

    @cached_property
    def no_caption(self) -> Text:
        """The empty caption, which stands for none."""
        return self.captioner.encode([""])


def captioner(recipe: Recipe, device: torch.device | str = "cpu") -> Captioner:
    """What the recipe's captions are read with. Raises `MezzotintError` as `TextEncoder` does."""
    settings = recipe.condition
    if settings.encoder == "bytes":
        return Bytes(settings.max_tokens, device)
    return TextEncoder(settings.encoder, max_tokens=settings.max_tokens, precision=settings.precision, device=device)


def build_backbone(recipe: Recipe) -> nn.Module:
    """The recipe's network with freshly initialised weights, on the current default device."""
    settings, (channels, height, width), output = recipe.backbone, recipe.input_shape, recipe.output_shape
    shape: dict[str, Any] = {
        "input_size": (height // settings.enlargement, width // settings.enlargement),
        "in_channels": channels,
        "out_channels": output[0] if recipe.variance == "none" else 2 * output[0],
        "num_classes": settings.num_classes or 0,
        "text_features": settings.text_features,
    }
    frames = recipe.data.frames // math.prod(level.frame_ratio for level in settings.outer)
    if settings.name != "diffussm":
        shape["frames"] = frames
    if settings.name != "unet":
        shape["out_patch_size"] = settings.patch_size * output[1] // height
    network = BACKBONES[settings.name](**shape, **settings.options())
    for level in settings.outer:
        frames *= level.frame_ratio
        options = level.model_dump(exclude={"frame_ratio"})
        network = NestedUNet(
            network, frames=frames, **options | {"temporal_attention": level.temporal_attention or False}
        )
    return network


def build_denoiser(recipe: Recipe, backbone: nn.Module | None = None) -> Denoiser:
    """The recipe's denoiser around `backbone`, or around one with freshly initialised weights."""
    settings = recipe.interpolant.model_dump()
    power = settings.pop("snr_power")
    backbone = build_backbone(recipe) if backbone is None else backbone
    path = interpolant(settings.pop("name"), **settings)
    shapes = getattr(backbone, "level_shapes", ())
    if len(shapes) > 1:
        path = interpolants.Pyramid(
            path, [math.prod(shape) for shape in shapes], [shape[-1] for shape in shapes], power
        )
    return Denoiser(
        backbone,
        path,
        recipe.target,
        learned_variance=recipe.variance == "learned",
        time_input=recipe.time_input,
        space=image_space(recipe),
    )


def image_space(recipe: Recipe) -> ImageSpace | None:
    """What the recipe puts between x and a network that works on images, still without its tokenizer."""
    sides = {side: getattr(recipe.backbone, side) == "image" for side in ("input", "output")}
    return ImageSpace(recipe.latent_shape, **sides) if any(sides.values()) else None


def build(
    recipe: Recipe | str | Path, *, class_names: Sequence[str] = (), device: torch.device | str = "cpu"
) -> Pipeline:
    """A pipeline with fresh weights, initialised from recipe.seed without touching the global random state.

    recipe: one, or its name, file or run folder. Raises `MezzotintError` as `load_recipe` does, and for a device that
    is not there.
    """
    recipe, device = as_recipe(recipe), check_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        denoiser = build_denoiser(recipe)
    return Pipeline(recipe, denoiser.to(device).eval(), tuple(class_names))


def no_weights(run: Path, weights: str) -> MezzotintError:
    """What is to be said where a run folder lacks these weights."""
    if there := ", ".join(sorted(path.stem for path in run.glob("*.safetensors"))):
        return MezzotintError(f"run {run} has no weights {weights!r}; it has: {there}")
    return MezzotintError(
        f"run {run} has no weights yet, as it was stopped before its first checkpoint; go on with it by "
        f"'mezzotint resume {run}'"
    )


def load(run: str | Path, *, weights: str = "model", device: torch.device | str = "cpu") -> Pipeline:
    """The pipeline of a run folder: recipe.yaml and `weights`.safetensors (the first EMA; see `mezzotint train`).

    Raises `MezzotintError` where the folder, the weights or a part of them is missing, cut off or of another shape.
    """
    run, device = Path(run), check_device(device)
    if not (run / "recipe.yaml").is_file():
        raise MezzotintError(f"{run} is not a run folder: it has no recipe.yaml (train one with 'mezzotint train')")
    recipe = load_recipe(run)
    file = run / f"{weights}.safetensors"
    if not file.is_file():
        raise no_weights(run, weights)
    pipeline = build(recipe)
    tensors, metadata = read_tensors(file)
    load_tensors(pipeline.denoiser.backbone, tensors, str(file))
    pipeline.class_names, pipeline.prompts = (header_list(metadata, key, file) for key in ("class_names", "prompts"))
    pipeline.denoiser.to(device)
    return pipeline


def save_weights(backbone: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a backbone's parameters and buffers as safetensors, whole or not at all."""
    with atomic_path(path) as temporary:
        save_tensors(backbone.state_dict(), temporary, {"format": "mezzotint", **metadata})


def header_list(metadata: Mapping[str, str], key: str, source: str | Path) -> tuple[str, ...]:
    """The texts that a safetensors header lists under `key`; none where it has none.

    Raises `MezzotintError` for what is no JSON list of texts.
    """
    try:
        values = parse_json(metadata.get(key, "[]"))
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise MezzotintError(
            f"the header of {source} is damaged: its {key} are no JSON list of texts; take another checkpoint or copy "
            "it again"
        )
    return tuple(values)


def check_dtype(name: str, tensor: Tensor, source: str, wanted: torch.dtype = torch.float32) -> None:
    """Raise `MezzotintError` unless a file's tensor is of the `wanted` dtype, or both are floats of any width."""
    if tensor.dtype != wanted and not (wanted in FLOATS and tensor.dtype in FLOATS):
        expected = "floating point of 16 bits or more" if wanted in FLOATS else wanted
        counts = tensor.dtype in (torch.int16, torch.int32, torch.int64)
        hint = "a counter is no weight, leave it out of the file" if counts else "quantised weights are not supported"
        raise MezzotintError(f"{name} in {source} has dtype {tensor.dtype}, expected {expected}; {hint}")


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load `tensors` into `module`, all of them and nothing else.

    Where `module` has floating point, theirs may have another width, of 16 bits at least: anything else is quantised.
    Raises `MezzotintError` with the list of what does not fit, and for numbers that are not finite.
    """
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise MezzotintError(f"the tensors in {source} do not fit the network: {shown}")
    for name, tensor in tensors.items():
        check_dtype(name, tensor, source, wanted[name].dtype)
    check_finite(tensors, source)
    module.load_state_dict(tensors)


def choose_labels(
    pipeline: Pipeline, classes: Classes | None, count: int, prompts: str | Sequence[str] | None = None
) -> Tensor | list[str] | None:
    """What `count` images are asked to be: `classes` or `prompts`, evenly and in order. None: unconditional.

    Neither given: all classes of the model, or the captions that it remembers. A tensor of labels, or a list of
    captions. Raises `MezzotintError` where the model is not asked that way, and for what is no count.
    """
    expect(pipeline, Pipeline, A_PIPELINE)
    check_count("count", count)
    if pipeline.denoiser.text:
        if classes is not None:
            raise MezzotintError("this model is asked by captions, not by classes; give prompts")
        prompts = pipeline.prompts if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise MezzotintError("this model is asked by captions and remembers none; give prompts")
        if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise MezzotintError(f"{shortened(other[0])} is no prompt; expected text")
        return [prompts[i * len(prompts) // count] for i in range(count)]
    if prompts is not None:
        raise MezzotintError(
            "this model is not asked by captions; "
            + ("give classes instead of prompts" if pipeline.denoiser.num_classes else "leave prompts out")
        )
    if not pipeline.denoiser.num_classes and classes is None:
        return None
    everything = range(pipeline.denoiser.num_classes)
    if classes is None:
        return class_labels(everything, count)
    return class_labels(parse_classes(classes, pipeline.denoiser.num_classes, pipeline.class_names), count)


def label_names(pipeline: Pipeline, labels: Tensor | Sequence[str] | None) -> list[str]:
    """What to write beside the images of these labels, which `choose_labels` gave: captions, or classes' names.

    Of a class with several names, "tench, Tinca tinca", the first. None where the classes have no names.
    """
    if not isinstance(labels, Tensor):
        return list(labels or ())
    if not pipeline.class_names:
        return []
    names = [name.split(", ")[0] for name in pipeline.class_names]
    return [names[label] if label < len(names) else "no class" for label in labels.tolist()]


def sample(
    pipeline: Pipeline,
    classes: Classes | None = None,
    count: int = 16,
    *,
    prompts: str | Sequence[str] | None = None,
    negative_prompt: str = "",
    guidance: float | Guidance | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    trajectory: bool = False,
    **options: Any,
) -> Tensor:
    """Draw `count` images, float32 (count, C, H, W) in [-1, 1] on the CPU; (states, count, C, H, W) with `trajectory`.

    Of clips, (count, F, C, H, W). classes: a number or name, or several (numbers also as a tensor, an array, a range),
    that the images are spread over evenly and in order (None: all); prompts: a caption or several, likewise (None: some
    that it was trained with). negative_prompt: what guidance leads away from. guidance: a scale, or a `Guidance`; None
    and the unnamed fields of `Sampler` (sampler, steps, eta, ...) are taken from the recipe. levels, among the options:
    draw the first so many levels of a Matryoshka network alone, which gives the image of the last of them. Image i
    depends on (seed, i) and its condition alone, whatever the batch size.
    Raises `MezzotintError` for an unknown class or option, or a combination that means nothing.
    """
    batches = sample_batches(
        pipeline,
        choose_labels(pipeline, classes, count, prompts),
        range(count),
        negative_prompt=negative_prompt,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        trajectory=trajectory,
        **options,
    )
    return torch.cat(list(batches), dim=1 if trajectory else 0)


def sample_levels(
    pipeline: Pipeline,
    classes: Classes | None = None,
    count: int = 16,
    *,
    prompts: str | Sequence[str] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The images of `sample` at all resolutions of a Matryoshka network, each (count, C, h, w), smallest first.

    `options` are those of `sample` but `trajectory`. Raises `MezzotintError` as `sample` does, and for a model of one
    resolution.
    """
    shapes, space = pipeline.denoiser.level_shapes, pipeline.representation
    if not isinstance(space, Pyramid):
        raise MezzotintError(f"this model has one resolution, {shapes[0][-1]}; several are those of a backbone.outer")
    labels = choose_labels(pipeline, classes, count, prompts)
    batches = [space.decode_levels(states[-1]) for states in state_batches(pipeline, labels, range(count), **options)]
    return [check_images(torch.cat(level).float().cpu(), range(count)) for level in zip(*batches, strict=True)]


def sample_batches(
    pipeline: Pipeline,
    labels: Tensor | Sequence[str] | None,
    indices: Sequence[int],
    *,
    trajectory: bool = False,
    **options: Any,
) -> Iterator[Tensor]:
    """The images number `indices` of `sample`, up to `batch_size` at a time; image i is of labels[i], class or caption.

    Raises `MezzotintError` as `sample` does.
    """

    first = 0
    for states in state_batches(pipeline, labels, indices, trajectory=trajectory, **options):
        chosen = indices[first : first + len(states[-1])]
        first += len(chosen)
        walked = states if trajectory else states[-1:]
        decoded = [check_images(pipeline.representation.decode(x).float().cpu(), chosen) for x in walked]
        check_images(states[-1], chosen)  # an infinity, which a decoder may have clamped
        yield torch.stack(decoded) if trajectory else decoded[0]


def check_images(images: Tensor, indices: Sequence[int]) -> Tensor:
    """`images` (B, ...), those of these numbers, or their latents; raises `MezzotintError` where one is not finite."""
    if nonfinite({"images": images}) is not None:
        bad = [index for index, image in zip(indices, images, strict=True) if not image.isfinite().all()]
        raise MezzotintError(
            f"the model gave NaN or infinite numbers for {len(bad)} of {len(images)} images, the first being number "
            f"{bad[0]}; lower the guidance, take more steps, another sampler or precision fp32, or look at the weights"
        )
    return images


def conditional_model(
    pipeline: Pipeline,
    labels: Tensor | Sequence[str] | None,
    indices: Sequence[int],
    guidance: Guidance,
    negative_prompt: str = "",
) -> ConditionalModel:
    """The denoiser asked for the images number `indices` of those that `choose_labels` gave."""
    denoiser = pipeline.denoiser
    if isinstance(labels, Tensor) or labels is None:
        return ConditionalModel(
            denoiser, None if labels is None else labels[list(indices)].to(pipeline.device), guidance
        )
    read = pipeline.captioner.encode
    null = read([negative_prompt], cached=False) if negative_prompt else pipeline.no_caption
    return ConditionalModel(denoiser, read([labels[i] for i in indices], cached=False), guidance, null)


def listed(labels: Tensor | Sequence[str] | None) -> list[int] | list[str] | None:
    """What `choose_labels` gave, as JSON holds it."""
    return labels.tolist() if isinstance(labels, Tensor) else None if labels is None else list(labels)


def check_sampling(pipeline: Pipeline) -> None:
    """Raise `MezzotintError` for a model that no sampler can draw from: it knows one noise level, or never pure noise.

    A path's end counts as noise from a signal-to-noise ratio of 1 / 100 downwards.
    """
    if pipeline.recipe.objective.times == "single":
        raise MezzotintError(
            "this model was trained at a single noise level, so it cannot lead from noise to data; train it with "
            "objective.times=auto to sample it"
        )
    path = pipeline.denoiser.interpolant
    end = path.at(torch.ones((), dtype=torch.float64))
    ratio = (end.alpha / end.sigma).square().max().item()
    if ratio > MAX_SNR_OF_NOISE:
        raise MezzotintError(
            f"at t = 1 this model's signal-to-noise ratio is {ratio:.2g}, which is not noise that sampling could start "
            "from; take an interpolant that ends in noise, such as linear-variance, or raise interpolant.sigma_max "
            "(variance-exploding), and train again"
        )


@torch.no_grad()
def state_batches(
    pipeline: Pipeline,
    labels: Tensor | Sequence[str] | None,
    indices: Sequence[int],
    *,
    negative_prompt: str = "",
    guidance: float | Guidance | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    trajectory: bool = False,
    levels: int | None = None,
    **options: Any,
) -> Iterator[list[Tensor]]:
    """`sample_batches` before decoding: a list of each batch's states, the last one or, with `trajectory`, all.

    levels: draw the first so many levels of a pyramid alone (None: all).
    """
    check_count("batch_size", batch_size)
    if levels is not None and levels not in range(1, len(pipeline.denoiser.level_shapes) + 1):
        raise MezzotintError(
            f"levels is {shortened(levels)}; this model has {len(pipeline.denoiser.level_shapes)}: leave it out for all"
        )
    check_sampling(pipeline)
    recipe, denoiser = pipeline.recipe, pipeline.denoiser
    sampler = Sampler.parse(recipe.sampling.model_dump() | options)
    if guidance is None:
        guidance = recipe.guidance
    elif not isinstance(guidance, Guidance):
        guidance = Guidance.parse(recipe.guidance.model_dump() | {"scale": guidance})
    if negative_prompt and not denoiser.text:
        raise MezzotintError("a negative prompt means nothing for a model that is not asked by captions; leave it out")
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        model = conditional_model(pipeline, labels, chosen, guidance, negative_prompt)
        generators = example_generators(seed, chosen)
        x = denoiser.interpolant.prior_std * randn(
            (len(chosen), *denoiser.in_shape), generators, device=pipeline.device
        )
        if levels is not None:
            x = x[:, : sum(math.prod(shape) for shape in denoiser.level_shapes[:levels])]
        model.expect(sampler.times(model))
        steps = sampler.path(model, x, generators)
        label = f"sampling {start + len(chosen)}/{len(indices)}"
        states = [x]
        for x in track(steps, label, total=sampler.steps, enabled=progress):
            states = [*states, x] if trajectory else [x]
        yield states
