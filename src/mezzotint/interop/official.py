"""The files of facebookresearch/DiT and willisma/SiT: .pt and .pth, or the same tensors as .safetensors.

Their tensors have our names. A DiT file and a SiT file have the same names and shapes, so what the network was trained
for is not in them: it comes from the recipe, from the training script's arguments, or from the file's name. SiT's time
runs from noise to data, and so does its velocity: it is −ours. Since the velocity is the output of a linear layer, that
layer's sign is turned on the way in and on the way out, which loses no bit.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.conditions.imagenet import imagenet_class_names
from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path
from mezzotint.interop.checkpoint import Checkpoint, Network, check, check_positions, family_recipe
from mezzotint.recipe import Recipe

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")

# The words that the official codes know, for a network that they can sample.
_NETWORK: dict[str, tuple[object, ...]] = {
    "backbone.conditioning": ("adaln-zero",),
    "backbone.freq_shift": (0,),
    "backbone.adaln_ratio": (None,),
    "backbone.input": ("latent",),
    "backbone.output": ("latent",),
    "interpolant.snr_divisor": (1.0,),
}
KNOWN: dict[str, dict[str, tuple[object, ...]]] = {
    "DiT": {
        **_NETWORK,
        "interpolant.name": ("ddpm",),
        "interpolant.num_steps": (1000,),
        "target": ("noise",),
        "variance": ("learned", "none"),
        "time_input": ((1000.0, -1.0),),
    },
    "SiT": {
        **_NETWORK,
        "interpolant.name": ("linear", "gvp", "vp"),
        "interpolant.beta_min": (0.1,),
        "interpolant.beta_max": (20.0,),
        "target": ("velocity", "score", "noise"),
        "variance": ("unused", "none"),
        "time_input": ((-1.0, 1.0),),
    },
}


def read_official(path: Path, recipe: Recipe | None) -> Checkpoint:
    """A .pt or .pth of the official code: a state dict, or a training checkpoint (its EMA is taken)."""
    content = unpickle(path)
    arguments = content.get("args")
    for key in ("ema", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return from_official(content, path, recipe, arguments)


def from_official(content: Mapping[str, Any], path: Path, recipe: Recipe | None, arguments: Any = None) -> Checkpoint:
    """The checkpoint of a state dict under the official names and with the official sign."""
    if strange := next((key for key, value in content.items() if not isinstance(value, Tensor)), None):
        raise MezzotintError(
            f"{path} is not a state dict: its entry {strange!r} is no tensor; expected names to tensors"
        )
    # What DistributedDataParallel and torch.compile put before every name.
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value.detach() for name, value in content.items()}
    network = Network.of(tensors, str(path))
    recipe = network.fit(recipe or _words(network, path, arguments), str(path))
    names = imagenet_class_names() if network.num_classes == 1000 else ()
    checkpoint = check(Checkpoint(_turned(tensors, recipe), recipe, names, str(path)))
    check_positions(tensors["pos_embed"], str(path))
    return checkpoint


def write_official(checkpoint: Checkpoint, path: Path) -> None:
    """A bare state dict, as the official scripts' --ckpt reads it. Raises `MezzotintError` for words they lack."""
    _refuse_other_words(checkpoint.recipe)
    # Copies: torch.save would write the whole storage that a tensor is a part of.
    tensors = {name: tensor.clone() for name, tensor in _turned(checkpoint.tensors, checkpoint.recipe).items()}
    with atomic_path(path) as temporary:
        torch.save(tensors, temporary)


def unpickle(path: Path) -> dict[str, Any]:
    """The mapping in a file of torch.save. Nothing in it is run: tensors, plain containers and argparse.Namespace only.

    Raises `MezzotintError` for a file that holds code, is cut off or something else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training scripts save their arguments in one
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # a file from before torch 1.6
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError) as error:
        if isinstance(error, pickle.UnpicklingError) and (name := re.search(r"GLOBAL (\S+)", str(error))):
            raise MezzotintError(
                f"{path} holds code besides tensors ({name[1]}), which was not run; save its state dict alone, or take "
                "a .safetensors file"
            ) from None
        raise MezzotintError(
            f"{path} is not a whole PyTorch file ({type(error).__name__}); take another checkpoint or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise MezzotintError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _turned(tensors: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """From the official sign to ours and back."""
    if recipe.target != "velocity":
        return tensors
    return {name: -tensor if name in OUTPUT else tensor for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------- what it was for


def _words(network: Network, path: Path, arguments: Any) -> Recipe:
    """What the file was trained for, by the training script's arguments or else by the file's name."""
    model = getattr(arguments, "model", None)
    families = _families(model) if isinstance(model, str) else _families(path.stem)
    if len(families) != 1:
        raise MezzotintError(
            f"{path} may be a DiT or a SiT, whose files look the same; name it so (DiT-XL-2-256x256.pt) or give a "
            "recipe (dit-xl-2-256, sit-xl-2-256)"
        )
    recipe = family_recipe(families.pop(), network, path)
    trained = {
        key: value.lower()
        for key, argument in (("interpolant", "path_type"), ("target", "prediction"))
        if isinstance(value := getattr(arguments, argument, None), str)
    }
    if not trained:
        return recipe
    values = recipe.model_dump()
    values |= {"target": trained.get("target", recipe.target)}
    values["interpolant"] |= {"name": trained.get("interpolant", recipe.interpolant.name)}
    return Recipe.parse(values)


def _families(text: str) -> set[str]:
    """Which of "dit" and "sit" a word of `text` begins with."""
    return set(re.findall(r"(?<![a-z])(dit|sit)(?![a-z])", text.lower()))


def _refuse_other_words(recipe: Recipe) -> None:
    """Raise `MezzotintError` unless one of the official codes samples what `recipe` means."""
    code = "DiT" if recipe.interpolant.name == "ddpm" and recipe.target != "velocity" else "SiT"
    for key, known in KNOWN[code].items():
        value = reduce(getattr, key.split("."), recipe)
        if value not in known:
            options = " or ".join(map(_written, known))
            raise MezzotintError(
                f"the official {code} code has no {key} {_written(value)}, only {options}; convert to a run folder"
            )
    if not recipe.backbone.num_classes:
        raise MezzotintError(f"the official {code} code has no network without classes; convert to a run folder")


def _written(value: object) -> str:
    return f"[{', '.join(f'{part:g}' for part in value)}]" if isinstance(value, tuple) else str(value)
