"""diffusers' folders: DiTPipeline and DiTTransformer2DModel, read and written without importing diffusers.

What differs there from the official network, all of it found in diffusers 0.42:
- Every block has a copy of the time and class embedding. Copies that differ are refused; written ones are equal.
- Queries, keys and values are three layers. The position table is computed, not stored.
- The time's frequencies are 10000^(−k/127), the official ones 10000^(−k/128): `backbone.freq_shift` 1 and 0.
- The LayerNorm before the MLP has the config's norm_eps, 1e-5 where it says none; the official eps, and ours, is 1e-6.
- DiTPipeline takes row 1000 of the label table as the null class, whatever the number of classes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mezzotint.backbones.layers import position_table
from mezzotint.conditions.imagenet import imagenet_class_names
from mezzotint.errors import MezzotintError
from mezzotint.files import read_tensors, save_tensors
from mezzotint.interop import hub
from mezzotint.interop.checkpoint import (
    Checkpoint,
    Network,
    check,
    check_positions,
    family_recipe,
    parse_header,
    state_dict,
)
from mezzotint.interop.official import unpickle
from mezzotint.interpolants import interpolant
from mezzotint.pretrained import WEIGHTS, read_json, weights_file
from mezzotint.recipe import Recipe
from mezzotint.representations.kl import check_class

NULL_CLASS = 1000
POSITIONS = "pos_embed.pos_embed"
MAX_SIDE = 512  # patches; a position table that is not in the file is computed, and no file may ask for any size

# diffusers' modules and ours: the network's, and each block's.
GLOBAL_MODULES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
BLOCK_MODULES = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
EMBEDDINGS = {  # of which every block has a copy
    "norm1.emb.timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "norm1.emb.timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "norm1.emb.timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "norm1.emb.timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "norm1.emb.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
LABELS = "y_embedder.embedding_table.weight"

# What a config must say, where it says anything, for the network to be a DiT of ours.
EXPECTED_CONFIG: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
PREDICTION_TYPES = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}

Number = TypeVar("Number", int, float)

log = logging.getLogger("mezzotint")


# ------------------------------------------------------------------------------------------------------------ reading


def is_folder(folder: Path) -> bool:
    """Whether `folder` looks like one that diffusers wrote."""
    return (folder / "model_index.json").is_file() or (folder / "config.json").is_file()


def read_folder(folder: Path, recipe: Recipe | None, weights: Path | None = None) -> Checkpoint:
    """The checkpoint of a DiTPipeline or DiTTransformer2DModel folder, or of the file `weights` in one of the latter.

    One that we wrote holds its recipe; another one is taken for an official DiT (freq_shift 0) with its scheduler's
    schedule and prediction, unless `recipe` says otherwise. Raises `MezzotintError` where a part is missing or unknown.
    """
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if index and index.get("_class_name") != "DiTPipeline":
        raise MezzotintError(f"{folder} is a diffusers {index.get('_class_name')}, expected a DiTPipeline")
    home = folder / "transformer" if index else folder
    if not (home / "config.json").is_file():
        raise MezzotintError(f"{home} has no config.json; download the whole folder")
    config = read_json(home / "config.json")
    if config.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise MezzotintError(f"{home} is a diffusers {config.get('_class_name')}, expected a DiTTransformer2DModel")
    for key, expected in EXPECTED_CONFIG.items():
        if config.get(key, expected) != expected:
            raise MezzotintError(f"{home / 'config.json'} says {key} {config[key]!r}; only {expected!r} is supported")
    whole = weights is None or re.search(r"-\d+-of-\d+\.", weights.name)  # a shard stands for all of them
    content, metadata = _read_weights(home) if weights is None or whole else _read_file(weights)
    stored, class_names, _ = parse_header(metadata, str(home))
    heads = _number(config, "num_attention_heads", 16, home)
    tensors = _from_diffusers(state_dict(content, str(home)), home, config, stored)
    network = Network.of(tensors, str(folder))
    if network.size != (size := _number(config, "sample_size", 32, home)):
        raise MezzotintError(f"{home / 'config.json'} says sample_size {size}, its patches make {network.size}")
    fitted = network.fit(recipe or stored or _foreign_recipe(network, folder, heads), str(folder), heads)
    if stored is None:
        class_names = _class_names(index, network.num_classes)
    checkpoint = check(Checkpoint(tensors, fitted, class_names, str(folder)))
    check_positions(tensors["pos_embed"], str(folder))
    return checkpoint


def _number(config: Mapping[str, Any], key: str, default: Number, home: Path) -> Number:
    """config[key], of default's type, finite and above 0."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, type(default)) or not 0 < value < math.inf:
        raise MezzotintError(f"the config in {home} says {key} {value!r}, expected a number; download it again")
    return value


def _read_weights(home: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Tensors and metadata: one safetensors file, its shards, a .bin, or the only variant that there is."""
    single, shards = weights_file(home), home / f"{WEIGHTS}.safetensors.index.json"
    if shards.is_file() and (single is None or single.name != f"{WEIGHTS}.safetensors"):
        tensors: dict[str, Any] = {}
        metadata: dict[str, str] = {}
        parts = read_json(shards).get("weight_map")
        for name in sorted(set(map(str, parts.values() if isinstance(parts, dict) else ()))):
            if not os.path.isfile(home / Path(name).name):  # whatever the name is, such as too long a one
                raise MezzotintError(f"{home} lacks {name}, which its index lists; download the whole folder")
            part, metadata = read_tensors(home / Path(name).name)
            tensors |= part
        return tensors, metadata
    if single is not None:
        return _read_file(single)
    there = ", ".join(sorted(path.name for path in home.iterdir()))
    raise MezzotintError(f"{home} has no {WEIGHTS}.safetensors, nor shards or a .bin; it has: {there}")


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    return read_tensors(path) if path.suffix == ".safetensors" else (unpickle(path), {})


def _from_diffusers(
    content: Mapping[str, Tensor], home: Path, config: Mapping[str, Any], stored: Recipe | None
) -> dict[str, Tensor]:
    """Tensors under our names, of as many classes as `stored` says."""
    depth = len({name.split(".")[1] for name in content if name.startswith("transformer_blocks.")})
    if depth != (layers := _number(config, "num_layers", 28, home)):
        raise MezzotintError(f"{home / 'config.json'} says num_layers {layers}, the weights have {depth} blocks")
    wanted = [f"{module}.{kind}" for module in GLOBAL_MODULES for kind in ("weight", "bias")]
    for i in range(depth):
        modules = [*BLOCK_MODULES, *QKV]
        wanted += [f"transformer_blocks.{i}.{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        wanted += [f"transformer_blocks.{i}.{name}" for name in EMBEDDINGS]
    problems = [f"missing {name}" for name in wanted if name not in content]
    problems += [f"unexpected {name}" for name in content if name not in {*wanted, POSITIONS}]
    if not problems:  # shapes that what follows relies on; the others are compared with the network's
        width = content["pos_embed.proj.bias"].numel()
        shapes = {"weight": (width, width), "bias": (width,)}
        problems = [
            f"{name} has shape {tuple(content[name].shape)}, expected {shapes[kind]}"
            for i in range(depth)
            for name, kind in ((f"transformer_blocks.{i}.{m}.{kind}", kind) for m in QKV for kind in shapes)
            if content[name].shape != shapes[kind]
        ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise MezzotintError(f"the tensors in {home} are not those of a DiTTransformer2DModel: {shown}")
    if uneven := _uneven_copy(content, depth):
        raise MezzotintError(
            f"{uneven} in {home} differs from block 0's; the official DiT, and ours, has one for all blocks"
        )

    tensors = {ours: content[f"transformer_blocks.0.{name}"] for name, ours in EMBEDDINGS.items()}
    for module, ours in GLOBAL_MODULES.items():
        tensors |= {f"{ours}.{kind}": content[f"{module}.{kind}"] for kind in ("weight", "bias")}
    for i in range(depth):
        for kind in ("weight", "bias"):
            qkv = [content[f"transformer_blocks.{i}.{module}.{kind}"] for module in QKV]
            tensors[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            for module, ours in BLOCK_MODULES.items():
                tensors[f"blocks.{i}.{ours}.{kind}"] = content[f"transformer_blocks.{i}.{module}.{kind}"]
    if POSITIONS in content:
        tensors["pos_embed"] = content[POSITIONS]
    else:
        side = _number(config, "sample_size", 32, home) // _number(config, "patch_size", 2, home)
        if side > MAX_SIDE:
            raise MezzotintError(f"the config in {home} means {side} patches a side, at most {MAX_SIDE} are supported")
        tensors["pos_embed"] = position_table(width, side, side).unsqueeze(0)
    if stored is not None:
        classes = stored.backbone.num_classes or 0
        if not classes:
            del tensors[LABELS]
        elif classes < NULL_CLASS:
            tensors[LABELS] = tensors[LABELS][: classes + 1]
    return tensors


def _uneven_copy(content: Mapping[str, Tensor], depth: int) -> str | None:
    """The first embedding that is not the same in every block."""
    for i in range(1, depth):
        for name in EMBEDDINGS:
            if not torch.equal(content[f"transformer_blocks.{i}.{name}"], content[f"transformer_blocks.0.{name}"]):
                return f"transformer_blocks.{i}.{name}"
    return None


def _class_names(index: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Each class's first name in a pipeline's id2label, or ImageNet's names for 1,000 classes without one."""
    labels = index.get("id2label")
    if isinstance(labels, dict) and set(labels) == {str(i) for i in range(num_classes)}:
        return tuple(str(labels[str(i)]).split(",")[0].strip() for i in range(num_classes))
    return imagenet_class_names() if num_classes == 1000 else ()


def _foreign_recipe(network: Network, folder: Path, heads: int) -> Recipe:
    """An official DiT's recipe with the schedule, the prediction and the autoencoder of a pipeline that is not ours."""
    values = family_recipe("dit", network, folder, heads).model_dump()
    if (folder / "vae" / "config.json").is_file() and values["representation"]["name"] == "kl":
        values["representation"] |= {"path": str((folder / "vae").absolute()), "scale": None}
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        config = read_json(path)
        steps = _number(config, "num_train_timesteps", 1000, path.parent)
        prediction, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
        ends = _number(config, "beta_start", 1e-4, path.parent), _number(config, "beta_end", 0.02, path.parent)
        name = {"linear": "ddpm", "squaredcos_cap_v2": "cosine"}.get(str(schedule))
        scaled = math.isclose(ends[0], 0.1 / steps) and math.isclose(ends[1], 20 / steps)
        target = next((ours for ours, theirs in PREDICTION_TYPES.items() if theirs == prediction), None)
        if not (name and target) or (name == "ddpm" and not scaled) or config.get("trained_betas") is not None:
            raise MezzotintError(
                f"{path} has beta_schedule {schedule!r} from {ends[0]:g} to {ends[1]:g} and prediction_type "
                f"{prediction!r}, which are no interpolant and target of ours; give a recipe that says what they are"
            )
        values |= {"target": target, "time_input": (steps, -1)}
        values["interpolant"] |= {"name": name, "num_steps": steps}
    return Recipe.parse(values)


# ------------------------------------------------------------------------------------------------------------ writing


def write_folder(checkpoint: Checkpoint, folder: Path, vae: str | None) -> None:
    """Write a DiTPipeline into the new, empty `folder`, with the autoencoder `vae` (None: the recipe's) copied in.

    Raises `MezzotintError` for a network or a diffusion that DiTPipeline cannot run. Logs a warning where it needs a
    hand: without the autoencoder at hand, and for the official frequencies of time.
    """
    recipe = checkpoint.recipe
    scheduler = scheduler_config(recipe)
    network = Network.of(checkpoint.tensors, checkpoint.source)
    _refuse_other_networks(recipe, network)
    labels: dict[str, str] = {}
    if network.num_classes:
        names = checkpoint.class_names or tuple(map(str, range(network.num_classes)))
        labels = {str(i): name for i, name in enumerate(names)}
    index = {
        "_class_name": "DiTPipeline",
        **({"id2label": labels} if labels else {}),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "transformer" / "config.json", _network_config(recipe, network))
    _write_autoencoder(recipe, vae, folder / "vae")
    header = {"format": "pt", "class_names": json.dumps(checkpoint.class_names), "recipe": recipe.to_yaml()}
    tensors = _to_diffusers(checkpoint.tensors, network)
    save_tensors(tensors, folder / "transformer" / f"{WEIGHTS}.safetensors", header)
    if recipe.backbone.freq_shift == 0:
        log.warning(
            "diffusers computes the time's sinusoids with other frequencies than the network was trained with; after "
            "loading, set them right: for block in pipe.transformer.transformer_blocks: "
            "block.norm1.emb.time_proj.downscale_freq_shift = 0"
        )


def scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """A DDIMScheduler for the recipe's diffusion. Raises `MezzotintError` for one that DiTPipeline cannot sample."""
    path = recipe.interpolant
    steps = path.num_steps
    if path.name not in ("ddpm", "cosine"):
        raise _inexpressible(f"interpolant {path.name}", "ddpm and cosine have betas")
    if recipe.target not in PREDICTION_TYPES:
        raise _inexpressible(f"target {recipe.target}", f"its schedulers read {', '.join(PREDICTION_TYPES)}")
    if recipe.time_input != (steps, -1):
        scale, offset = recipe.time_input
        raise _inexpressible(f"time_input [{scale:g}, {offset:g}]", f"it passes the step index, [{steps}, -1]")
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": steps,
        "beta_start": 0.1 / steps,
        "beta_end": 20 / steps,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": PREDICTION_TYPES[recipe.target],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    }
    if path.snr_divisor != 1:
        settings = path.model_dump(exclude={"snr_power"})
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_squared = interpolant(settings.pop("name"), **settings).alpha(t) ** 2
        config["trained_betas"] = (1 - alpha_squared[1:] / alpha_squared[:-1]).tolist()
    elif path.name == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    return config


def _refuse_other_networks(recipe: Recipe, network: Network) -> None:
    backbone = recipe.backbone
    if recipe.representation.name != "kl":
        raise _inexpressible(
            f"representation {recipe.representation.name}", "it decodes latents of a KL autoencoder (kl)"
        )
    if backbone.conditioning != "adaln-zero":
        raise _inexpressible(f"backbone.conditioning {backbone.conditioning}", "it has adaln-zero")
    if backbone.adaln_ratio is not None:
        raise _inexpressible(f"backbone.adaln_ratio {backbone.adaln_ratio:g}", "its conditioning layers are single")
    if network.hidden != 4 * network.width:
        raise _inexpressible(f"backbone.mlp_ratio {backbone.mlp_ratio:g}", "its ratio is 4")
    if network.num_classes > NULL_CLASS:
        raise _inexpressible(
            f"backbone.num_classes {network.num_classes}", f"it takes row {NULL_CLASS} of the table as the null class"
        )


def _inexpressible(word: str, instead: str) -> MezzotintError:
    return MezzotintError(
        f"diffusers' DiTPipeline cannot express {word}: {instead}; convert to a run folder, or to the official format"
    )


def _network_config(recipe: Recipe, network: Network) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": recipe.backbone.heads,
        "attention_head_dim": network.width // recipe.backbone.heads,
        "in_channels": network.channels,
        "out_channels": (1 + network.doubled) * network.channels,
        "num_layers": network.depth,
        "sample_size": network.size,
        "patch_size": network.patch_size,
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_eps": 1e-6,
        "dropout": 0.0,
        **EXPECTED_CONFIG,
    }


def _to_diffusers(tensors: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """Tensors under diffusers' names, the label table with its null row (the only one without classes) at 1000."""
    width = network.width
    if network.num_classes:
        table = tensors[LABELS]
        table = torch.cat([table, table[-1:].expand(NULL_CLASS - network.num_classes, -1)])
    else:
        table = torch.zeros(NULL_CLASS + 1, width, dtype=tensors["t_embedder.mlp.0.weight"].dtype)
    embeddings = {name: table if ours == LABELS else tensors[ours] for name, ours in EMBEDDINGS.items()}

    written: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        written |= {f"{module}.{kind}": tensors[f"{ours}.{kind}"] for module, ours in GLOBAL_MODULES.items()}
    for i in range(network.depth):
        for kind in ("weight", "bias"):
            qkv = tensors[f"blocks.{i}.attn.qkv.{kind}"].split(width)
            written |= {f"transformer_blocks.{i}.{m}.{kind}": part for m, part in zip(QKV, qkv, strict=True)}
            for module, ours in BLOCK_MODULES.items():
                written[f"transformer_blocks.{i}.{module}.{kind}"] = tensors[f"blocks.{i}.{ours}.{kind}"]
        written |= {f"transformer_blocks.{i}.{name}": tensor for name, tensor in embeddings.items()}
    side = network.size // network.patch_size
    table = tensors["pos_embed"]
    if table.dtype != torch.float32 or not torch.equal(table[0], position_table(width, side, side)):
        written[POSITIONS] = table  # so that it comes back bit for bit; diffusers computes its own and says so
    return written


def _write_autoencoder(recipe: Recipe, vae: str | None, folder: Path) -> None:
    """Copy the autoencoder's config and weights, with the latents' scale; log a warning where there is none at hand."""
    source, scale = vae or recipe.representation.path, recipe.representation.scale
    weights = None if source is None else _find_autoencoder(source)
    if weights is None:
        if vae is not None and not hub.is_name(vae):
            raise MezzotintError(f"{vae} is no folder of an autoencoder; give one with a config.json and its weights")
        log.warning(
            "%s, so the new folder has no vae/: put its config.json and weights there%s, or open the folder by "
            "DiTPipeline.from_pretrained(FOLDER, vae=AutoencoderKL.from_pretrained(...))",
            "the recipe names no autoencoder" if source is None else f"the autoencoder {source} could not be had",
            "" if scale is None else f" (with a scaling_factor of {scale:g})",
        )
        return
    config = read_json(weights.parent / "config.json")
    check_class(config, weights.parent)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key):
            raise _inexpressible(f"an autoencoder with a {key} ({source})", "it only scales latents")
    if scale is not None:
        config["scaling_factor"] = scale
    _write_json(folder / "config.json", config)
    shutil.copyfile(weights, folder / f"{WEIGHTS}{weights.suffix}")  # a variant, too, by the usual name


def _find_autoencoder(source: str) -> Path | None:
    """The weights, beside their config.json, in a local folder (or a pipeline's), or of a hub model; None without."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _autoencoder_weights(folder) or _autoencoder_weights(folder / "vae")
    if hub.is_name(source):
        for suffix in ("safetensors", "bin"):
            with suppress(MezzotintError):
                folder = hub.snapshot(source, ["config.json", f"{WEIGHTS}.{suffix}"])
                if weights := _autoencoder_weights(folder):
                    return weights
    return None


def _autoencoder_weights(folder: Path) -> Path | None:
    return weights_file(folder) if (folder / "config.json").is_file() else None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
