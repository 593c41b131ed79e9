"""The files of facebookresearch/DiT, willisma/SiT and sihyun-yu/REPA: .pt, .pth, or the same tensors as .safetensors.

Their tensors have our names. A DiT file and a SiT file have the same names and shapes, so what the network was trained
for is not in them: it comes from the recipe, from the training script's arguments, or from the file's name. SiT's time
runs from noise to data, and so does its velocity: it is −ours. Since the velocity is the output of a linear layer, that
layer's sign is turned on the way in and on the way out, which loses no bit. REPA's networks are SiT's, but their time
runs as ours; they are told by their projectors.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.conditions.imagenet import imagenet_class_names
from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path
from mezzotint.interop.checkpoint import Checkpoint, Network, check, check_positions, family_recipe, state_dict
from mezzotint.recipe import Recipe

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
PROJECTORS = "projectors."  # REPA's, onto a frozen encoder's features: of training alone

# What the training scripts call our words, by their argument and in lower case. DiT's has no such arguments.
ARGUMENTS: dict[str, dict[str, dict[str, str]]] = {
    "DiT": {"path_type": {}, "prediction": {}},
    "SiT": {
        "path_type": {name: name for name in ("linear", "gvp", "vp")},
        "prediction": {name: name for name in ("velocity", "score", "noise")},
    },
    "REPA": {"path_type": {"linear": "linear", "cosine": "gvp"}, "prediction": {"v": "velocity"}},
}

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


def weights_in(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in what a training script saved, its average where there is one; else `content` itself."""
    return next(
        (content[key] for key in ("ema", "model", "state_dict") if isinstance(content.get(key), Mapping)), content
    )


def from_official(content: Mapping[Any, Any], path: Path, recipe: Recipe | None, arguments: Any = None) -> Checkpoint:
    """The checkpoint of a state dict under the official names and with the sign of the code that wrote it.

    arguments: those of the training script, where the file has them.
    """
    named = state_dict(content, str(path))
    tensors = {name: tensor for name, tensor in named.items() if not name.startswith(PROJECTORS)}
    aligned = len(tensors) < len(named)
    if aligned:
        tensors = _renumbered(tensors)
    network = Network.of(tensors, str(path))
    meant = recipe or _words(network, path, arguments, aligned)
    if aligned and _backwards(meant):
        raise MezzotintError(
            f"{path} is a SiT of REPA's code (it has projectors), whose time runs from data to noise, and recipe "
            f"{meant.name!r} has SiT's reversed time; leave the recipe out, or set time_input=[1,0]"
        )
    meant = network.fit(meant, str(path))
    names = imagenet_class_names() if network.num_classes == 1000 else ()
    checkpoint = check(Checkpoint(_turned(tensors, meant), meant, names, str(path)))
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

    Objects of other classes, such as the configurations that training scripts save along, become empty ones. Raises
    `MezzotintError` for a file that is cut off or holds something else.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file from before torch 1.6; or whatever is wrong with it shows below
        foreign = []
    allowed: list[Any] = [argparse.Namespace]  # the training scripts save their arguments in one
    allowed += [
        (type(re.sub(r"[^\w.]", "", name), (_Inert,), {}), name) for name in foreign if name != "argparse.Namespace"
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mappable(path))
    except Exception as error:  # whatever damaged bytes lead to
        name = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if name or foreign:
            raise MezzotintError(
                f"{path} holds code besides tensors ({name[1] if name else foreign[0]}), which was not run; save its "
                "state dict alone, or take a .safetensors file"
            ) from None
        raise MezzotintError(
            f"{path} is not a whole PyTorch file ({type(error).__name__}); take another checkpoint or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise MezzotintError(f"{path} holds a {type(content).__name__}, expected a state dict")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if empty := next((key for key, value in part.items() if isinstance(value, Tensor) and value.is_meta), None):
            raise MezzotintError(
                f"{path} is not a state dict: its entry {empty!r} has a shape and no numbers (device meta); save the "
                "network again after its weights are loaded"
            )
    return content


class _Inert:
    """In place of every class in a file: takes whatever the file would give to it, and does nothing with that."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _is_mappable(path: Path) -> bool:
    """Whether tensors lie in the file as they are: not in one from before torch 1.6, nor in one that was compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _turned(tensors: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """From the official sign to ours and back."""
    if not _backwards(recipe):
        return tensors
    return {name: -tensor if name in OUTPUT else tensor for name, tensor in tensors.items()}


def _backwards(recipe: Recipe) -> bool:
    """Whether the network's time runs from noise to data, and so does a velocity that it puts out."""
    return recipe.target == "velocity" and recipe.time_input[0] < 0


def _renumbered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's first files call the blocks after the aligned one `decoder_blocks`, counted from 0."""
    encoders = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})

    def place(found: re.Match[str]) -> str:
        return f"blocks.{encoders + int(found[1])}."

    return {re.sub(r"^decoder_blocks\.(\d+)\.", place, name): tensor for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------- what it was for


def _words(network: Network, path: Path, arguments: Any, aligned: bool) -> Recipe:
    """What the file was trained for, by its tensors, the training script's arguments or else by the file's name."""
    given = arguments if isinstance(arguments, Mapping) else getattr(arguments, "__dict__", {})
    if isinstance(arguments, _Inert):
        raise MezzotintError(
            f"{path} holds its training arguments as a {type(arguments).__name__}, which is not read; give a recipe "
            "that says what they were (dit-xl-2-256, sit-xl-2-256)"
        )
    model = given.get("model")
    families = {"sit"} if aligned else _families(model) if isinstance(model, str) else _families(path.stem)
    if len(families) != 1:
        raise MezzotintError(
            f"{path} may be a DiT or a SiT, whose files look the same; name it so (DiT-XL-2-256x256.pt) or give a "
            "recipe (dit-xl-2-256, sit-xl-2-256)"
        )
    family = families.pop()
    code = "REPA" if aligned else {"dit": "DiT", "sit": "SiT"}[family]
    words: dict[str, str] = {}
    for key, known in ARGUMENTS[code].items():
        if (value := given.get(key)) is not None:
            if str(value).lower() not in known:
                raise MezzotintError(
                    f"{path} was trained with {key} {value!r}, which the official {code} code does not know, so that "
                    "the direction of its time is not known either; give a recipe: sit-xl-2-256 with its interpolant "
                    "and target, and time_input=[1,0] where t = 0 is data (REPA) or [-1,1] where it is noise (SiT)"
                )
            words[key] = known[str(value).lower()]
    values = family_recipe(family, network, path).model_dump()
    values["target"] = words.get("prediction", values["target"])
    values["interpolant"]["name"] = words.get("path_type", values["interpolant"]["name"])
    if aligned:
        values |= {"name": path.stem, "description": f"Read from {path.name}.", "time_input": (1.0, 0.0)}
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
