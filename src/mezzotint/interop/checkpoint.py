"""What every checkpoint becomes when it is read, and what its tensors alone tell about the network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones import DIT_CONFIGS
from mezzotint.backbones.layers import TIME_FREQUENCIES, position_table
from mezzotint.errors import MezzotintError
from mezzotint.finite import check_finite
from mezzotint.pipeline import build_backbone, check_dtype, header_list, load_tensors
from mezzotint.recipe import Recipe, load_recipe, recipe_names
from mezzotint.written import read_yaml

# How far a position table may lie from the sine-cosine one; in half precision, its own rounding.
POSITION_TOLERANCE = 1e-4

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Of a backbone's settings, what is no size: words, and what acts in training alone.
NO_SIZES = ("freq_shift", "masked_text", "normalise_input", "dropout")


@dataclass(frozen=True)
class Checkpoint:
    """Weights under this library's names and conventions, and the recipe that says what they mean.

    `tensors` are named as the backbone's state_dict and keep the file's dtype. `recipe` has the network's sizes as the
    tensors have them. `source` names the file in messages. `prompts` are captions that the network was trained with.
    """

    tensors: dict[str, Tensor]
    recipe: Recipe
    class_names: tuple[str, ...]
    source: str
    prompts: tuple[str, ...] = ()


def count_numbered(names: Iterable[str], place: str) -> int:
    """How many modules `place`.0, `place`.1, … (a regular expression) have tensors, as far as none is left out."""
    found = {m[1] for name in names if (m := re.match(rf"{place}\.(\d+)\.", name))}
    return next(i for i in count() if str(i) not in found)


@dataclass(frozen=True)
class Network:
    """A DiT's sizes, read from the shapes of its tensors."""

    width: int
    depth: int
    patch_size: int
    hidden: int
    """Hidden width of a block's MLP."""
    num_classes: int
    text_features: int | None
    conditioning: str
    channels: int
    size: int
    """Side of the square input, in pixels or latent positions."""
    doubled: bool
    """Whether the output has twice the input's channels."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str) -> Network:
        """The network of tensors under the official names. Raises `MezzotintError` where they are no DiT's."""

        def shape(name: str, dimensions: int) -> tuple[int, ...]:
            if name not in tensors or tensors[name].ndim != dimensions or not tensors[name].numel():
                held = f"{tuple(tensors[name].shape)} for {name!r}" if name in tensors else f"no tensor {name!r}"
                names = ", ".join(list(tensors)[:4]) or "nothing"
                raise MezzotintError(
                    f"{source} is not a DiT or SiT: it has {held} (of {len(tensors)} tensors: {names}, …); expected "
                    "the names of the official models.py"
                )
            return tuple(tensors[name].shape)

        width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
        _, tokens, _ = shape("pos_embed", 3)
        rows, _ = shape("final_layer.linear.weight", 2)
        outputs, side = rows / patch**2, isqrt(tokens)
        if side**2 != tokens:
            raise MezzotintError(f"{source} has {tokens} positions, which make no square; a recipe's input is square")
        if outputs not in (channels, 2 * channels):
            raise MezzotintError(
                f"{source} puts out {outputs:g} channels for {channels}; expected {channels}, or {2 * channels} with a "
                "variance"
            )
        num_classes, text_features = conditions(tensors)
        return cls(
            width=width,
            depth=count_numbered(tensors, "blocks"),
            patch_size=patch,
            hidden=shape("blocks.0.mlp.fc1.weight", 2)[0],
            num_classes=num_classes,
            text_features=text_features,
            conditioning=_conditioning(tensors, width),
            channels=channels,
            size=side * patch,
            doubled=outputs == 2 * channels,
        )

    @property
    def published(self) -> str | None:
        """The name of the published configuration with these sizes."""
        sizes = {"depth": self.depth, "width": self.width, "patch_size": self.patch_size}
        return next((name for name, config in DIT_CONFIGS.items() if sizes.items() <= config.items()), None)

    def published_heads(self, source: str) -> int:
        """Attention heads of the published networks of this depth and width; no shape tells them.

        Raises `MezzotintError` where there is none.
        """
        for config in DIT_CONFIGS.values():
            if (config["depth"], config["width"]) == (self.depth, self.width):
                return config["heads"]
        raise MezzotintError(
            f"the number of attention heads cannot be read from {source} (depth {self.depth}, width {self.width} is no "
            f"published size); give a recipe with backbone.width={self.width} and its backbone.heads"
        )

    def fit(self, recipe: Recipe, source: str, heads: int | None = None) -> Recipe:
        """`recipe` with its sizes replaced by this network's.

        `heads` are what the file says; where it does not, a recipe of this width says them, or the published sizes.
        Raises `MezzotintError` where none does, or where the recipe's inputs are of another kind.
        """
        backbone = recipe.backbone.model_dump()
        if heads is None and backbone["width"] == self.width:
            heads = backbone["heads"]
        ratio = backbone["mlp_ratio"]
        if int(self.width * ratio) != self.hidden:
            ratio = self.hidden / self.width
            if int(self.width * ratio) != self.hidden:  # the quotient was rounded down
                ratio = (self.hidden + 0.5) / self.width
        backbone |= {
            "patch_size": self.patch_size,
            "width": self.width,
            "depth": self.depth,
            "heads": heads or self.published_heads(source),
            "mlp_ratio": ratio,
            "num_classes": self.num_classes,
            "text_features": self.text_features,
            "conditioning": self.conditioning,
        }
        return _around(backbone, recipe, source, self.channels, self.size, self.doubled)


def fit(recipe: Recipe, tensors: Mapping[str, Tensor], source: str, stored: Recipe | None = None) -> Recipe:
    """What `recipe` means, with the sizes of the network whose tensors these are.

    They are those of `stored`, the file's own recipe; without it, a DiT's are read from the shapes, and any other
    network must be the recipe's but for what it reads of labels or captions. Raises `MezzotintError` as `Network.fit`.
    """
    given = recipe.backbone
    plain = given.name == "dit" and not given.outer and (given.input, given.output) == ("latent", "latent")
    if stored is None and plain:
        return Network.of(tensors, source).fit(recipe, source)
    if stored is None:
        num_classes, text_features = conditions(tensors)
        backbone = given.model_dump() | {"num_classes": num_classes, "text_features": text_features}
        stored = recipe
    else:
        backbone = stored.backbone.model_dump()
        if given.name == stored.backbone.name:
            backbone["freq_shift"] = given.freq_shift  # no size, but a word
        if stored.condition.name != recipe.condition.name:
            recipe = recipe.model_copy(update={"condition": stored.condition})
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"frames": stored.data.frames})})
    channels, size, _ = stored.latent_shape
    return _around(backbone, recipe, source, channels, size, stored.variance != "none")


def _around(backbone: dict[str, Any], recipe: Recipe, source: str, channels: int, size: int, doubled: bool) -> Recipe:
    """`recipe` with this network, and with what follows from it.

    channels, size: of its input; doubled: whether its output has twice as many. Raises `MezzotintError` where the
    recipe's inputs or its conditions are of another kind.
    """
    values = recipe.model_dump() | {"backbone": backbone}
    if recipe.representation.name == "pixels":
        if channels not in (1, 3):
            raise MezzotintError(
                f"{source} works on {channels} channels and recipe {recipe.name!r} on pixels; give a recipe on latents "
                "(representation=kl)"
            )
        values["data"] |= {"channels": channels, "size": size}
    else:
        values["representation"]["channels"] = channels
        values["data"]["size"] = size * recipe.representation.stride
    if not doubled:
        values["variance"] = "none"
    elif recipe.variance == "none":
        values["variance"] = "unused"  # the recipe knows of no variance, so none is what the second half means
    if backbone["text_features"] is None:
        values["condition"]["name"] = "class"
        if not backbone["num_classes"]:
            values["guidance"] |= {"scale": 1.0}
    elif recipe.condition.name != "text":
        raise MezzotintError(
            f"{source} reads captions, which recipe {recipe.name!r} has none of; give a recipe with condition=text and "
            "the encoder that it was trained with"
        )
    return Recipe.parse(values)


def conditions(tensors: Mapping[str, Tensor]) -> tuple[int, int | None]:
    """`num_classes` and `text_features` of the network whose tensors these are, whichever of ours it is."""
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:.+\.)?y_embedder\.(?:embedder\.)?(embedding_table|encoder.*)\.weight", name)
        if found is None or tensor.ndim != 2:
            continue
        if found[1] == "embedding_table":
            return max(0, len(tensor) - 1), None
        return 0, tensor.shape[1] if found[1] == "encoder" else 0  # else an encoder of bytes
    return 0, None


def network_sizes(recipe: Recipe) -> dict[str, Any]:
    """What two networks have in common where one's tensors mean the same in the other, by keys of a recipe.

    Left out are the input's sides, labels, captions and the variance, which `finetune.initialise` can fit, and words
    that only change what is computed (see `network_words`).
    """
    backbone = recipe.backbone
    sizes = {"name": backbone.name, **backbone.options()}
    if backbone.name == "unet":
        sizes = _resolved(sizes, {"time_width": 4 * backbone.channels[0]})
        sizes["text_width"] = backbone.text_width or sizes["time_width"]
    elif backbone.name == "dit":
        sizes["mlp_ratio"] = int(backbone.width * backbone.mlp_ratio) / backbone.width  # as whole channels have it
    inside: dict[str, Any] = {"time_frequencies": TIME_FREQUENCIES, **sizes}
    for i, level in enumerate(backbone.outer):
        inside = _resolved(level.model_dump(), {"time_width": 4 * level.channels[0], **inside})
        sizes |= {f"outer[{i}].{key}": value for key, value in inside.items()}
    sizes = {f"backbone.{key}": value for key, value in sizes.items() if key.rpartition(".")[2] not in NO_SIZES}
    sizes |= {f"backbone.{side}": getattr(backbone, side) for side in ("input", "output")}
    return sizes | {"channels": recipe.latent_shape[0]}


def _resolved(level: dict[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's settings with what they leave open, and of time what is so `otherwise`."""
    attention = level["attention"] or (0,) * len(level["channels"])
    times = ("time_width", "time_frequencies")
    return level | {"attention": attention} | {key: level[key] or otherwise[key] for key in times}


def network_words(recipe: Recipe) -> dict[str, Any]:
    """What no tensor's shape depends on, and yet what a network computes, by keys of a recipe."""
    words: dict[str, Any] = {"backbone.freq_shift": recipe.backbone.freq_shift}
    words["backbone.masked_text"] = recipe.backbone.masked_text
    for i, level in enumerate(recipe.backbone.outer):
        words[f"backbone.outer[{i}].normalise_input"] = level.normalise_input
    return words


def _conditioning(tensors: Mapping[str, Tensor], width: int) -> str:
    """The design of the blocks, by what the first one has (DiT, section 3.2)."""
    layers = [f"blocks.0.adaLN_modulation.{number}.weight" for number in (3, 1)]  # the last one of an MLP first
    if (regressed := next((tensors[name] for name in layers if name in tensors), None)) is not None:
        return "adaln" if regressed.shape[:1] == (4 * width,) else "adaln-zero"
    return "cross-attention" if "blocks.0.cross_attn.q.weight" in tensors else "in-context"


def empty_backbone(recipe: Recipe) -> nn.Module:
    """The recipe's network without memory for its weights, and so without the time that initialising them takes."""
    with torch.device("meta"):
        return build_backbone(recipe)


def check(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, if its tensors are all that its recipe's network needs and nothing else.

    Raises `MezzotintError` with the list of what is missing, unexpected or misshapen, for quantised weights and
    for numbers that are not finite.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in checkpoint.tensors.items()}
    load_tensors(empty_backbone(checkpoint.recipe), shapes, checkpoint.source)
    check_finite(checkpoint.tensors, checkpoint.source)
    return checkpoint


def state_dict(content: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a state dict, under names without the words of what the network was wrapped in.

    Those are DistributedDataParallel's, FSDP's, torch.compile's and activation checkpointing's, anywhere in a name, and
    a first word that all names have, such as Lightning's. Raises `MezzotintError` for what is no state dict, and for
    quantised weights.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise MezzotintError(f"{source} is not a state dict: its entry {key!r} is no tensor; expected tensors")
        if value.layout != torch.strided:
            raise MezzotintError(f"{source} is not a state dict: its entry {key!r} is sparse; save it dense")
        name = re.sub(rf"(?<![^.])({'|'.join(WRAPPERS)})\.", "", str(key))
        check_dtype(name, value, source)
        if name in tensors:
            raise MezzotintError(f"{source} has {name} twice, once as {key}; save the network's own state dict")
        tensors[name] = value.detach()
    while len(tensors) > 1 and len(words := {name.partition(".")[0] for name in tensors}) == 1:
        first = len(words.pop()) + 1
        if not all(len(name) > first for name in tensors):
            break
        tensors = {name[first:]: tensor for name, tensor in tensors.items()}
    return tensors


def check_positions(table: Tensor, source: str) -> None:
    """Raise `MezzotintError` unless `table` (1, T, width) is the fixed sine-cosine one, to its own precision."""
    side = isqrt(table.shape[1])
    error = (table[0].float() - position_table(table.shape[2], side, side)).abs().max()
    if not error <= max(POSITION_TOLERANCE, torch.finfo(table.dtype).eps):  # a NaN fails too
        raise MezzotintError(
            f"pos_embed in {source} is not the sine-cosine table (off by up to {error:.2g}): trained or interpolated "
            "positions are not supported"
        )


def parse_header(metadata: Mapping[str, str], source: str) -> tuple[Recipe | None, tuple[str, ...], tuple[str, ...]]:
    """The recipe, the classes' names and the captions in a safetensors header, where it has them."""
    names, prompts = (header_list(metadata, key, source) for key in ("class_names", "prompts"))
    try:
        values = read_yaml(metadata["recipe"]) if "recipe" in metadata else None
    except ValueError:
        values = ()
    if values is not None and not isinstance(values, dict):
        raise MezzotintError(f"the header of {source} is damaged; take another checkpoint or copy it again")
    return None if values is None else Recipe.parse(values), names, prompts


def family_recipe(family: str, network: Network, path: Path, heads: int | None = None) -> Recipe:
    """What a published family, "dit" or "sit", means: the shipped recipe of the network's sizes, or one like it.

    Raises `MezzotintError` where that leaves something open: the number of heads, or the space of the inputs.
    """
    heads = heads or network.published_heads(str(path))
    pixels = network.channels in (1, 3)
    if not pixels and network.channels != 4:
        raise MezzotintError(
            f"{path} works on {network.channels} channels, neither latents of 4 nor pixels of 1 or 3; give a recipe "
            "that says representation"
        )
    published = f"{network.published}-{8 * network.size}".replace("dit", family, 1)
    if published in recipe_names() and not pixels and network.num_classes == 1000:
        return load_recipe(published)
    values = load_recipe(f"{family}-xl-2-256").model_dump()
    values |= {"name": path.stem, "description": f"Read from {path.name}.", "guidance": {}}
    values["backbone"] |= {"width": network.width, "heads": heads}
    if pixels:
        values["representation"] = {"name": "pixels"}
    return Recipe.parse(values)
