"""The first blocks of a DiT, at one time, as a plain vision transformer for transformers (l-DAE's encoder)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mezzotint.backbones import DiT
from mezzotint.backbones.layers import NORM_EPS
from mezzotint.errors import MezzotintError
from mezzotint.files import check_free, new_folder, save_tensors
from mezzotint.pipeline import Pipeline
from mezzotint.representations.tokenizer import PatchTokenizer

#: vectors that time regresses for attention and as many for the MLP, by conditioning: shift, scale and, if 3, gate
VECTORS = {"adaln-zero": 3, "adaln": 2}


@torch.no_grad()
def export_vit(pipeline: Pipeline, out: str | Path, *, t: float = 0.01, layers: int | None = None) -> Path:
    """Write the first `layers` blocks (None: half of them) of a DiT at time t in [0, 1] as a folder of transformers.

    At a fixed t and the null class or caption, adaptive LayerNorm is LayerNorm with other weights, and a gate a factor
    on the layer before it. What a patch tokenizer does to a patch is affine, like the patch embedding, and becomes part
    of it. The folder holds an `IJepaModel` (transformers 4.47 or newer), which is `ViTModel` without a class token: of
    images in [-1, 1] its ``hidden_states[-1]`` are the tokens that block `layers` gives at t for their x without noise,
    and ``last_hidden_state`` these after a LayerNorm without parameters.

    Raises `MezzotintError` for other networks and representations, for a t or a number of layers that is not there, and
    where `out` is taken.
    """
    network = _network(pipeline)
    depth, out = len(network.blocks), Path(out)
    layers = max(1, depth // 2) if layers is None else layers
    if not 1 <= layers <= depth:
        raise MezzotintError(f"there are no {layers} layers to export; the network has {depth}, so give 1 to {depth}")
    if not 0 <= t <= 1:
        raise MezzotintError(f"t must be from 0 (data) to 1 (noise), got {t:g}; step 10 of 1000 is 0.01")
    check_free(out)
    network = copy.deepcopy(network).cpu().double()
    width = network.pos_embed.shape[2]
    weight, bias = _patch_embedding(pipeline, network)
    tensors = {
        "embeddings.patch_embeddings.projection.weight": weight,
        "embeddings.patch_embeddings.projection.bias": bias,
        "embeddings.position_embeddings": network.pos_embed,
        "layernorm.weight": torch.ones(width),
        "layernorm.bias": torch.zeros(width),
    }
    for k, c in enumerate(_conditions(pipeline, network, t)[:layers]):
        block = _block(cast(Any, network.blocks[k]), c.chunk(2))
        tensors |= {f"encoder.layer.{k}.{name}": tensor for name, tensor in block.items()}
    with new_folder(out) as folder:
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        save_tensors(floats, folder / "model.safetensors", {"format": "pt"})
        for name, values in (
            ("config.json", _config(pipeline, network, layers)),
            ("preprocessor_config.json", processor_config(pipeline.recipe.data.size, pipeline.recipe.image_channels)),
        ):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return out


def _network(pipeline: Pipeline) -> DiT:
    network, recipe = pipeline.denoiser.backbone, pipeline.recipe
    if not isinstance(network, DiT) or network.conditioning not in VECTORS:
        kind = "of several levels" if recipe.backbone.outer else f"with {recipe.backbone.conditioning}"
        raise MezzotintError(
            "only a DiT with conditioning adaln-zero or adaln becomes a plain vision transformer at a fixed time; this "
            f"network is a {recipe.backbone.name} {kind}"
        )
    name = recipe.representation.name
    if name != "pixels" and not name.startswith("patch-"):
        raise MezzotintError(
            f"the representation {name} is not linear in patches, so that no patch embedding can contain it; pixels, "
            "patch-pca, patch-ae and patch-vae can be exported"
        )
    return network


def _conditions(pipeline: Pipeline, network: DiT, t: float) -> list[Tensor]:
    """What t and the null class or caption give each block, (vectors, width)."""
    scale, offset = pipeline.denoiser.time_input
    y: Any = pipeline.no_caption.to("cpu") if pipeline.denoiser.text else torch.tensor([network.num_classes])
    *each, _ = network.condition(torch.tensor([scale * t + offset], dtype=torch.float64), y)
    return [c.reshape(-1, network.pos_embed.shape[2]) for c in each]


def _patch_embedding(pipeline: Pipeline, network: DiT) -> tuple[Tensor, Tensor]:
    """The projection (width, C, P, P) and the bias (width,) that take a patch of the image to its token.

    The map is affine, so its values at zero and at each unit patch tell all of it.
    """
    size, channels = pipeline.recipe.data.size // network.grid[0], pipeline.recipe.image_channels
    units = torch.eye(channels * size**2, dtype=torch.float64).reshape(-1, channels, size, size)
    inputs = torch.cat([torch.zeros_like(units[:1]), units])
    if pipeline.recipe.representation.name != "pixels":
        tokenizer = copy.deepcopy(cast(PatchTokenizer, pipeline.representation)).cpu().double()
        inputs = tokenizer.encode(inputs)
        if pipeline.recipe.backbone.input == "image":
            inputs = tokenizer.decode(inputs, clamp=False)
    tokens = network.x_embedder(inputs).squeeze(1)
    return (tokens[1:] - tokens[0]).T.reshape(-1, *units.shape[1:]), tokens[0]


def _block(block: Any, branches: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A block's tensors under the names of published ViT checkpoints; `branches`: the vectors of attention and MLP."""
    names = ("layernorm_before", "attention.output.dense"), ("layernorm_after", "output.dense")
    tensors: dict[str, Tensor] = {}
    layers = block.attn.proj, block.mlp.fc2
    for (norm, last), layer, (shift, scale, *gate) in zip(names, layers, branches, strict=True):
        factor = gate[0] if gate else torch.ones_like(scale)
        tensors |= {f"{norm}.weight": 1 + scale, f"{norm}.bias": shift}
        tensors |= {f"{last}.weight": factor.unsqueeze(1) * layer.weight, f"{last}.bias": factor * layer.bias}
    for kind in ("weight", "bias"):
        for name, part in zip(("query", "key", "value"), getattr(block.attn.qkv, kind).chunk(3), strict=True):
            tensors[f"attention.attention.{name}.{kind}"] = part
        tensors[f"intermediate.dense.{kind}"] = getattr(block.mlp.fc1, kind)
    return tensors


def _config(pipeline: Pipeline, network: DiT, layers: int) -> dict[str, Any]:
    block, data = cast(Any, network.blocks[0]), pipeline.recipe.data
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": network.pos_embed.shape[2],
        "num_hidden_layers": layers,
        "num_attention_heads": block.attn.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": NORM_EPS,
        "image_size": data.size,
        "patch_size": data.size // network.grid[0],
        "num_channels": data.channels,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


def processor_config(size: int, channels: int) -> dict[str, Any]:
    """transformers' image processor that makes a centre crop in [-1, 1] of so many pixels a side and channels."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
        "do_convert_rgb": channels == 3,
    }
