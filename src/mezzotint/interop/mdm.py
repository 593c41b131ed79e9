"""The files of apple/ml-mdm, vis_model_64x64.pth and the like: {"state_dict": …} and what the training script adds.

Their networks are ours under other names, but for two things: attention projects with 1×1 convolutions, here linear
layers, and the sinusoids of time come sines first, here cosines first.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.backbones.nested import LevelConfig, NestedUNet, nest
from mezzotint.backbones.unet import UNet
from mezzotint.errors import MezzotintError
from mezzotint.interop.checkpoint import Checkpoint, check, count_numbered, fit, state_dict
from mezzotint.interop.official import unpickle, weights_in
from mezzotint.pipeline import load_tensors
from mezzotint.recipe import Recipe, load_recipe

NAMES = {
    "inner_unet": "inner",
    "temb_layer1": "t_embedder.mlp.0",
    "temb_layer2": "t_embedder.mlp.2",
    "cond_layers.scale.0": "micro_embedder.mlp.0",
    "cond_layers.scale.1": "micro_embedder.mlp.2",
    "cond_emb": "y_embedder.proj",
    "lm_proj": "y_embedder.embedder.encoder",
    "proj_out": "proj",
    "ffn.0": "norm_ffn",
    "ffn.1": "ffn.0",
    "ffn.3": "ffn.2",
}
"""The official words in a tensor's name, and ours."""

UNREADABLE = {
    "t_attn": "the official attention over frames",
    "lm_head": "attention layers on top of the captions' features (num_lm_head_layers)",
    "interp_layer": "conditioning on interpolation",
    "cond_layers": "micro conditioning on something else than scale",
}
"""What of the official code has no place in our networks."""

RECIPES = ("mdm-64", "mdm-256", "mdm-1024")
"""What the published files mean, by their number of levels."""

TOLD = ("channels", "resblocks", "attention", "feed_forward", "time_width", "time_frequencies")
"""Settings of any level that the shapes of its tensors tell."""


@dataclass(frozen=True)
class MDMCheckpoint:
    """Weights under our names, in the file's dtype, and the keyword arguments of each level, the smallest first.

    What no shape tells is as in the published networks: 8 heads, GroupNorms of 32 groups, padding attended to,
    `micro_scale` the level's side, and the inputs of all but the smallest and the largest level normalised. A network
    that was trained otherwise is read by changing `levels`.
    """

    tensors: dict[str, Tensor]
    levels: tuple[LevelConfig, ...]
    source: str

    def network(self) -> UNet | NestedUNet:
        """The network with these weights as they are, in evaluation mode."""
        with torch.device("meta"):
            network = nest(self.levels)
        network.load_state_dict(self.tensors, assign=True)
        return network.eval()


def from_official(content: Mapping[Any, Any], path: Path, recipe: Recipe | None) -> Checkpoint:
    """A state dict under the official names and what it means: what `recipe` says, or as published for so many levels.

    Sizes are the file's; what no shape tells (heads, groups of GroupNorms, the images' sides) is the recipe's. Raises
    MezzotintError as `read_mdm`, and for a recipe of another kind of network or another number of levels.
    """
    return _meant(from_mdm(content, str(path)), path, recipe)


def read_mdm(path: Path, *, input_size: int = 64) -> MDMCheckpoint:
    """A .pth of the official code, whose smallest images have sides of `input_size`, which no tensor tells.

    Nothing in the file is run: the configurations that the training script saves along are read as empty objects.
    Raises MezzotintError for a file that is damaged, not of that code, or of a network that we do not have.
    """
    return from_mdm(weights_in(unpickle(path)), str(path), input_size=input_size)


def is_mdm(names: Iterable[Any]) -> bool:
    """Whether these are the names of an official MDM network's tensors, wrapped or not."""
    return any(str(name).rpartition("temb_layer1.")[1:] == ("temb_layer1.", "weight") for name in names)


def from_mdm(content: Mapping[Any, Any], source: str, *, input_size: int = 64) -> MDMCheckpoint:
    """The checkpoint of a state dict under the official names. Raises MezzotintError as `read_mdm` does."""
    if not is_mdm(content):
        names = ", ".join(list(content)[:4]) or "nothing"
        raise MezzotintError(
            f"{source} is not an MDM: it has {len(content)} entries ({names}, …); expected the names of the official "
            "unet.py, such as temb_layer1.weight"
        )
    tensors: dict[str, Tensor] = {}
    for official, tensor in state_dict(content, source).items():
        name = _renamed(official)
        if word := next((word for word in UNREADABLE if re.search(rf"(^|\.){word}", name)), None):
            raise MezzotintError(f"{source} has {UNREADABLE[word]} ({official}), which our networks lack; take another")
        tensors[name] = _converted(name, tensor)
    levels = _levels(tensors, input_size, source)
    with torch.device("meta"):
        network = nest(levels)
        load_tensors(network, {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}, source)
    return MDMCheckpoint(tensors, levels, source)


def _meant(found: MDMCheckpoint, path: Path, recipe: Recipe | None) -> Checkpoint:
    count = len(found.levels)
    if recipe is None:
        if count > len(RECIPES):
            raise MezzotintError(f"{path} has {count} levels, more than the published networks; give its recipe")
        words = load_recipe(RECIPES[count - 1])
    else:
        words = recipe
    if words.backbone.name != "unet" or len(words.backbone.outer) != count - 1:
        raise MezzotintError(
            f"{path} is an MDM of {count} level(s), and recipe {words.name!r} another network; leave the recipe out, "
            f"or give one like {' or '.join(RECIPES[count - 1 : count]) or 'mdm-1024 with more backbone.outer'}"
        )
    try:  # as a rule the file's network is the recipe's
        meant = fit(words, found.tensors, str(path))
        return check(Checkpoint(found.tensors, meant, (), str(path)))
    except MezzotintError:
        meant = _with_sizes(words, found, named=recipe is not None)
        return check(Checkpoint(found.tensors, meant, (), str(path)))


def _with_sizes(recipe: Recipe, found: MDMCheckpoint, *, named: bool) -> Recipe:
    """`recipe` with the file's sizes; a name of its own where the recipe is not `named` by the user."""
    inner, *outer = found.levels
    given = recipe.backbone
    backbone = _sized(given.model_dump(), inner)
    backbone |= {key: inner.get(key) for key in ("middle", "text_width")}
    backbone["outer"] = [_sized(old.model_dump(), level) for old, level in zip(given.outer, outer, strict=True)]
    enlargement = math.prod(2 ** (len(level["channels"]) - 1) for level in outer)
    values = recipe.model_dump() | {"backbone": backbone}
    values["data"] |= {
        "size": recipe.data.size // given.enlargement * enlargement,
        "channels": inner["in_channels"],
    }
    if not named:
        stem = Path(found.source)
        values |= {"name": stem.stem, "description": f"Read from {stem.name}."}
    return fit(Recipe.parse(values), found.tensors, found.source)


def _sized(settings: dict[str, Any], level: LevelConfig) -> dict[str, Any]:
    scale = level.get("micro_scale")  # the shapes tell whether there is one
    told: dict[str, Any] = {key: value for key, value in level.items() if key in TOLD}
    return settings | told | {"micro_scale": scale and (settings["micro_scale"] or scale)}


def _renamed(official: str) -> str:
    words = "|".join(map(re.escape, NAMES))
    return re.sub(rf"(?<![^.])({words})(?=\.)", lambda match: NAMES[match[1]], official)


def _converted(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(("t_embedder.mlp.0.weight", "micro_embedder.mlp.0.weight")) and tensor.ndim == 2:
        return tensor.roll(tensor.shape[1] // 2, dims=1)
    if re.search(r"\.attn\.\d+\.(qkv|proj|ffn\.\d)\.weight$", name) and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


# --------------------------------------------------------------------------------------- which network it is


def _levels(tensors: Mapping[str, Tensor], size: int, source: str) -> tuple[LevelConfig, ...]:
    """The keyword arguments of each level, the smallest first, whose images have sides of `size`."""
    groups: dict[int, dict[str, Tensor]] = defaultdict(dict)  # by how many other levels are around
    for name, tensor in tensors.items():
        own = re.sub(r"^(inner\.)+", "", name)
        groups[(len(name) - len(own)) // len("inner.")][own] = tensor
    depths = sorted(groups, reverse=True)
    levels: list[LevelConfig] = []
    for depth in depths:
        sizes = groups[depth]
        try:
            level = _level(sizes) | _innermost(sizes, size) if depth == depths[0] else _level(sizes)
        except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
            raise MezzotintError(
                f"{source} is not a whole MDM ({error} tells no size of its level {len(levels) + 1}); copy it again"
            ) from None
        if depth != depths[0]:
            size *= 2 ** (len(level["channels"]) - 1)
            level["normalise_input"] = depth > 0
        if "micro_embedder.mlp.0.weight" in sizes:
            level["micro_scale"] = float(size)
        levels.append(level)
    return tuple(levels)


def _level(own: Mapping[str, Tensor]) -> LevelConfig:
    """What any level's shapes tell."""

    levels = range(max(1, count_numbered(own, "down_blocks")))
    resblocks = tuple(count_numbered(own, rf"down_blocks\.{i}\.resnets") for i in levels)
    return {
        "channels": tuple(len(own[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in levels),
        "resblocks": resblocks,
        "attention": tuple(count_numbered(own, rf"down_blocks\.{i}\.attn") // resblocks[i] for i in levels),
        "feed_forward": any(".ffn." in name for name in own),
        "time_width": len(own["t_embedder.mlp.0.weight"]),
        "time_frequencies": own["t_embedder.mlp.0.weight"].shape[1] // 2,
    }


def _innermost(own: Mapping[str, Tensor], size: int) -> LevelConfig:
    """What the smallest level's shapes tell besides."""
    level: LevelConfig = {
        "input_size": size,
        "in_channels": own["conv_in.weight"].shape[1],
        "out_channels": len(own["conv_out.weight"]),
        "middle": any(name.startswith("mid_blocks.") for name in own),
    }
    if "y_embedder.proj.weight" in own:
        width, features = own["y_embedder.embedder.encoder.weight"].shape
        level |= {"text_features": features, "text_width": width, "masked_text": False}
    return level
