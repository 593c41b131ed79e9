"""Other people's checkpoints, and ours for other people: official files, diffusers, safetensors, run folders."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mezzotint import pipeline
from mezzotint.devices import check_device
from mezzotint.errors import MezzotintError, closest, nearest, shortened
from mezzotint.files import new_folder, read_tensors, save_tensors
from mezzotint.interop import diffusers, hub, mdm, official
from mezzotint.interop.checkpoint import (
    Checkpoint,
    check,
    empty_backbone,
    fit,
    network_sizes,
    network_words,
    parse_header,
)
from mezzotint.pipeline import Pipeline, build_denoiser, no_weights
from mezzotint.pretrained import WEIGHTS
from mezzotint.recipe import Recipe, as_recipe, load_recipe
from mezzotint.representations.tokenizer import OWN_FOLDER, TOKENIZERS

__all__ = ["Checkpoint", "convert", "load", "read_checkpoint"]

Format = Literal["run", "diffusers", "official"]


def read_checkpoint(
    source: str | Path, recipe: Recipe | str | Path | None = None, *, weights: str = "model"
) -> Checkpoint:
    """The weights in `source`, whatever wrote them, and what they mean.

    source: a run folder (`weights`.safetensors of it), a .safetensors file, a .pt or .pth of the official DiT, SiT or
    MDM code, a folder of diffusers' DiTPipeline or DiTTransformer2DModel, or the Hugging Face hub's name of such a
    folder. recipe: what the weights mean, where the file does not say it or is wrong; its sizes are replaced by the
    file's. Nothing in a file is run. Raises `MezzotintError` where a file is damaged, not a network of ours, or
    ambiguous.
    """
    path, recipe = locate(source), None if recipe is None else as_recipe(recipe)
    if (path / "recipe.yaml").is_file():
        file = path / f"{weights}.safetensors"
        if not file.is_file():
            raise no_weights(path, weights)
        return _read_ours(file, *read_tensors(file), recipe, load_recipe(path))
    if weights != "model":
        raise MezzotintError(f"weights {weights!r} are a run folder's, which {source} is not; leave them out")
    if path.is_dir():
        if not diffusers.is_folder(path):
            raise MezzotintError(
                f"{path} is not a run folder: it has no recipe.yaml; nor one of diffusers, with a model_index.json or "
                "config.json (train a run with 'mezzotint train')"
            )
        return diffusers.read_folder(path, recipe)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, recipe)
    if path.suffix in official.SUFFIXES:
        if path.name.startswith(WEIGHTS):
            return diffusers.read_folder(path.parent, recipe, path)
        content = official.unpickle(path)
        tensors = official.weights_in(content)
        if mdm.is_mdm(tensors):
            return mdm.from_official(tensors, path, recipe)
        return official.from_official(tensors, path, recipe, content.get("args"))
    raise MezzotintError(f"{path} is no checkpoint; expected .safetensors, {', '.join(official.SUFFIXES)} or a folder")


def load(
    source: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    weights: str = "model",
    device: torch.device | str = "cpu",
) -> Pipeline:
    """The pipeline of any checkpoint that `read_checkpoint` reads, in float32 and evaluation mode on `device`.

    recipe: a recipe, its name or its file, for what the file does not tell; the file's network must be the recipe's.
    Raises `MezzotintError` as `read_checkpoint` does, and where the two differ.
    """
    path, device = locate(source), check_device(device)
    if recipe is None and (path / "recipe.yaml").is_file():
        return pipeline.load(path, weights=weights, device=device)
    asked = None if recipe is None else as_recipe(recipe)
    checkpoint = read_checkpoint(path, asked, weights=weights)
    loaded = checkpoint.recipe
    if asked is not None:
        _refuse_other_sizes(asked, checkpoint)
    elif loaded.representation.name == "kl" and (path / "vae" / "config.json").is_file():
        # The autoencoder beside the network, rather than the place that its recipe knew it at.
        representation = loaded.representation.model_copy(update={"path": str(path / "vae")})
        loaded = loaded.model_copy(update={"representation": representation})
    backbone = empty_backbone(loaded)
    # Copies, because a tensor of a mapped file changes with the file.
    tensors = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in checkpoint.tensors.items()}
    backbone.load_state_dict(tensors, assign=True)
    denoiser = build_denoiser(loaded, backbone)
    return Pipeline(loaded, denoiser.eval(), checkpoint.class_names, checkpoint.prompts)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Format = "run",
    recipe: Recipe | str | Path | None = None,
    weights: str = "model",
    vae: str | None = None,
) -> Path:
    """Write the checkpoint `source` in another format to the new place `out`, and return that. No bit is lost.

    to: "run", a run folder; "diffusers", a folder that DiTPipeline.from_pretrained opens; "official", a .pt for the
    official code. vae: diffusers: folder or hub name of the autoencoder to copy in (None: the recipe's).
    Raises `MezzotintError` as `read_checkpoint` does, where `out` is taken or a file's name for a format that is a
    folder, and where a format cannot express a model.
    """
    out = Path(out)
    if to not in get_args(Format):
        raise MezzotintError(f"format {to!r} is unknown; {closest(str(to), get_args(Format))}")
    if vae is not None and to != "diffusers":
        raise MezzotintError(f"vae means nothing for the format {to!r}; leave it out")
    if to != "official" and out.suffix in (".safetensors", *official.SUFFIXES):
        raise MezzotintError(
            f"{out} names a file, and the format {to!r} is a folder; for the official code's file add --to official, "
            "else name a folder"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())) or (out.is_dir() and to == "official"):
        raise MezzotintError(f"{out} exists already; choose another place, or remove it first")
    checkpoint = read_checkpoint(source, recipe, weights=weights)
    if to != "run":
        _refuse_other_networks(checkpoint, to)
    if to == "official":
        official.write_official(checkpoint, out)
        return out
    with new_folder(out) as folder:
        if to == "diffusers":
            diffusers.write_folder(checkpoint, folder, vae)
        else:
            checkpoint.recipe.write(folder)
            header = {
                "format": "mezzotint",
                "class_names": json.dumps(checkpoint.class_names),
                "prompts": json.dumps(checkpoint.prompts),
            }
            save_tensors(checkpoint.tensors, folder / "model.safetensors", header)
            if checkpoint.recipe.representation.name in TOKENIZERS and (path := checkpoint.recipe.representation.path):
                shutil.copytree(path, folder / OWN_FOLDER)
    return out


def is_checkpoint(source: str | Path) -> bool:
    """Whether `source` looks like what `read_checkpoint` reads, rather than like images."""
    path = Path(source)
    if path.is_dir():
        return (path / "recipe.yaml").is_file() or diffusers.is_folder(path)
    known = path.suffix in (".safetensors", *official.SUFFIXES)
    return known or (not path.exists() and hub.is_name(str(source)))


def locate(source: str | Path) -> Path:
    """The file or folder that `source` names, downloaded where it is a model of the Hugging Face hub.

    Raises `MezzotintError` where there is none.
    """
    if not isinstance(source, str | PathLike):
        raise MezzotintError(f"a file, a folder or a name on the hub was expected, not {shortened(source)}")
    path, name = Path(source), str(source)
    if path.exists():
        return path
    if not hub.is_name(name):
        raise MezzotintError(
            f"{source} is not a run folder, nor another checkpoint: there is no such file or folder here"
            + (f"; closest: {', '.join(near)}" if (near := near_runs(path)) else "")
        )
    elsewhere = ["vae/*", "state/*"]  # what is needed later or never
    folder = hub.snapshot(name, ["*.json", "*.yaml", "*.safetensors"], elsewhere)
    home = folder / "transformer" if (folder / "model_index.json").is_file() else folder
    return folder if any(home.glob("*.safetensors")) else hub.snapshot(name, ["*.json", "*.bin"], elsewhere)


def near_runs(path: Path) -> list[str]:
    """Run folders that a `path` where nothing is may stand for, beside it or in runs/."""
    runs: dict[str, Path] = {}
    with suppress(OSError):
        for place in (Path("runs"), path.parent):
            runs |= {file.parent.name: file.parent for file in place.glob("*/recipe.yaml")}
    return [str(runs[name]) for name in nearest(path.name, runs, cutoff=0.6)]


def _read_safetensors(path: Path, recipe: Recipe | None) -> Checkpoint:
    """A lone safetensors file: a diffusers folder's or an MDM by its names, ours by its header, else a DiT or SiT."""
    tensors, metadata = read_tensors(path)
    if any(name.startswith("transformer_blocks.") for name in tensors):
        return diffusers.read_folder(path.parent, recipe, path)
    if mdm.is_mdm(tensors):
        return mdm.from_official(tensors, path, recipe)
    if metadata.get("format") != "mezzotint":
        return official.from_official(tensors, path, recipe)
    beside = load_recipe(path.parent) if (path.parent / "recipe.yaml").is_file() else None
    return _read_ours(path, tensors, metadata, recipe, beside)


def _read_ours(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], recipe: Recipe | None, beside: Recipe | None
) -> Checkpoint:
    """What this library wrote: of the recipe `beside` it or in its header, or meaning what `recipe` says."""
    stored, class_names, prompts = parse_header(metadata, str(path))
    stored = beside or stored
    if recipe is not None:
        stored = fit(recipe, tensors, str(path), stored)
    if stored is None:
        raise MezzotintError(f"{path} does not say what its weights mean; give the recipe that they were trained with")
    return check(Checkpoint(tensors, stored, class_names, str(path), prompts))


def _refuse_other_sizes(asked: Recipe, checkpoint: Checkpoint) -> None:
    """Raise `MezzotintError` where the recipe that was asked for describes another network than the file holds."""
    here, there = _sizes(asked), _sizes(checkpoint.recipe)
    for key in ("backbone.num_classes", "backbone.text_features"):
        if here[key] is None:
            del here[key]
    if other := [key for key in {**there, **here} if key in here and there.get(key) != here[key]]:
        has = ", ".join(f"{key} {there.get(key)}" for key in other)
        says = ", ".join(str(here[key]) for key in other)
        raise MezzotintError(
            f"{checkpoint.source} has {has}, where recipe {asked.name!r} says {says}; leave the recipe out where the "
            "file says what it is, or change it to fit"
        )


def _sizes(recipe: Recipe) -> dict[str, Any]:
    """What a file can contradict of a recipe's network."""
    shape = (*([recipe.data.frames] if recipe.data.frames else []), *recipe.latent_shape)
    return {
        **network_sizes(recipe),
        **network_words(recipe),
        "backbone.num_classes": recipe.backbone.num_classes,
        "backbone.text_features": recipe.backbone.text_features,
        "outer levels": len(recipe.backbone.outer),
        "an input of": " × ".join(map(str, shape)),
        "a learned variance": "yes" if recipe.variance == "learned" else "no",
    }


def _refuse_other_networks(checkpoint: Checkpoint, to: Format) -> None:
    """Raise `MezzotintError` unless the network is one that others than this library know."""
    backbone, kinds = checkpoint.recipe.backbone, {"diffussm": "a DiffuSSM", "unet": "a UNet"}
    if backbone.outer:
        kind: str | None = "a Matryoshka network"
    elif backbone.text_features is not None and backbone.name == "dit":
        kind = "a DiT that reads captions"
    elif checkpoint.recipe.data.frames:
        kind = "a network of clips"
    else:
        kind = kinds.get(backbone.name)
    if kind is not None:
        raise MezzotintError(
            f"{checkpoint.source} is {kind}, and the format {to!r} is for DiT and SiT with classes or without; convert "
            "to a run folder"
        )
