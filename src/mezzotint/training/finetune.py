"""Starting from other weights: what is kept of them, what is trained, and LoRA (arXiv 2106.09685) through peft."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mezzotint.backbones import DiffuSSM, DiT, UNet
from mezzotint.errors import MezzotintError, closest
from mezzotint.files import atomic_path, save_tensors, write_text
from mezzotint.interop import Checkpoint, read_checkpoint
from mezzotint.interop.checkpoint import network_sizes, network_words
from mezzotint.pipeline import Pipeline, load_tensors
from mezzotint.randomness import mix
from mezzotint.recipe import LoRASettings, Recipe, TrainingSettings

TIME_BIAS = "t_embedder.mlp.2.bias"
OUTPUT = tuple(f"{layer}.{kind}" for layer in ("final_layer.linear", "conv_out") for kind in ("weight", "bias"))
#: what a network has of labels, what it reads captions with, and what else is there for captions alone
LABELS = re.compile(r"((?:inner\.)*)y_embedder\.(embedder\.)?embedding_table\.weight")
READER = re.compile(r"(?:inner\.)*y_embedder\.(?:embedder\.)?encoder\..+")
CAPTIONS = re.compile(READER.pattern + r"|(?:inner\.)*y_embedder\.proj\..+|.+\.(?:norm_cond|kv_cond)\..+")
#: LoRA trains its own matrices and what reads labels or captions, since new ones have to be learnt; `training.freeze`
#: goes on
LORA_FREEZE = ("*", "!y_embedder", "!inner.*y_embedder")
#: where LoRA goes by default: by the network that is innermost
LORA_TARGETS: dict[type[nn.Module], tuple[str, ...]] = {
    DiT: ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    DiffuSSM: ("w0", "up", "ssm_out", "down.*", "w1", "w2", "w3"),
    UNet: ("attn.*.qkv", "attn.*.kv_cond", "attn.*.proj", "attn.*.ffn.*"),
}
ADAPTER = "default"
LORA_STREAM = 3  # of random numbers, beside the loop's


def take_classes(recipe: Recipe, class_names: Sequence[str]) -> Recipe:
    """`recipe` with as many classes as the data set has, whatever the published network had; 0 classes stay 0.

    Without classes there is nothing to guide towards: guidance.scale becomes 1. Captions need no classes.
    """
    if recipe.condition.name == "text":
        class_names = ()
    elif recipe.backbone.num_classes == 0 or not class_names:
        guidance = recipe.guidance.model_copy(update={"scale": 1.0})
        recipe, class_names = recipe.model_copy(update={"guidance": guidance}), ()
    backbone = recipe.backbone.model_copy(update={"num_classes": len(class_names)})
    return recipe.model_copy(update={"backbone": backbone})


# ---------------------------------------------------------------------------------------------------- initialisation


def start_from(source: str, pipeline: Pipeline) -> list[str]:
    """`initialise` a pipeline from a file or folder, which means what the recipe says where it does not say it itself.

    Raises `MezzotintError` as `read_checkpoint` and `initialise` do.
    """
    notes = []
    try:
        checkpoint = read_checkpoint(source)
    except MezzotintError:
        checkpoint = read_checkpoint(source, pipeline.recipe)  # raises again, unless it was this that was missing
        notes = [f"it does not say all that its weights mean; taken for what this recipe says ({pipeline.recipe.name})"]
    return notes + initialise(pipeline, checkpoint)


def initialise(pipeline: Pipeline, checkpoint: Checkpoint) -> list[str]:
    """Give a freshly built pipeline the checkpoint's weights; returns a sentence on each thing that is not as there.

    All parameters are kept, except that

    - the label table is kept for the same classes (as many, and of the same names where both have names). For others
      its rows stay fresh, but for the null row, which the unconditional branch was trained with. A network without
      classes takes the null row into the bias that it was always added to, and so computes what the checkpoint
      computes for the null class (unless the label was a token of its own). One with classes, started without, has a
      null row of zero, and so computes for the null class what the checkpoint computes.
    - what reads captions is kept for features of the same width, or for bytes; else it is fresh.
    - the output layer drops a variance that the recipe does not have, and starts one that the checkpoint lacks at zero.

    A Matryoshka network may have more levels than the checkpoint, or be one around a network that is none: the inner
    levels take all of it, and compute what it computes; the outer ones stay fresh (MDM, section 3.3).

    Buffers, such as the position table, are functions of the recipe and stay the pipeline's: any resolution will do.
    Raises `MezzotintError` where the two networks differ in anything else.
    """
    there, network = checkpoint.recipe, cast(Any, pipeline.denoiser.backbone)
    levels, has = len(pipeline.recipe.backbone.outer) + 1, len(there.backbone.outer) + 1
    if levels < has:
        raise MezzotintError(
            f"cannot start from {checkpoint.source}, which has {has} levels, where this recipe has {levels}; set "
            "backbone.outer as it is there"
        )
    for _ in range(levels - has):
        network = network.inner
    here = _inside(pipeline.recipe, has)
    if shape := _changed(_shape(there, here), _shape(here, there)):
        raise MezzotintError(
            f"cannot start from {checkpoint.source}, which is another network: {shape}; set these as they are there, "
            "or init to other weights"
        )
    notes = _grown(pipeline, levels - has)
    fresh, tensors = network.state_dict(), dict(checkpoint.tensors)
    tensors |= {name: buffer for name, buffer in network.named_buffers() if name in fresh}
    same = _same_classes(checkpoint.class_names, pipeline.class_names)
    notes += dict.fromkeys(
        _fit_labels(name, tensors, fresh, here, same) for name in sorted({*tensors, *fresh}) if LABELS.fullmatch(name)
    )
    notes += _fit_captions(tensors, fresh, there, here)
    notes += _fit_output(tensors, there, here)
    load_tensors(network, tensors, checkpoint.source)
    if words := _changed(_words(there, here), _words(here, there)):
        notes.append(f"it was trained with {words}; what that changes has to be learnt anew")
    return [note for note in notes if note]


def _inside(recipe: Recipe, levels: int) -> Recipe:
    """The recipe of the network's first levels."""
    backbone = recipe.backbone.model_copy(update={"outer": recipe.backbone.outer[: levels - 1]})
    return recipe.model_copy(update={"backbone": backbone})


def _grown(pipeline: Pipeline, new: int) -> list[str]:
    """A sentence on the outer levels that the checkpoint lacks. Raises `MezzotintError` where LoRA is to adapt them."""
    if not new:
        return []
    sides = ", ".join(f"{shape[-2]} × {shape[-1]}" for shape in pipeline.denoiser.level_shapes[-new:])
    if pipeline.recipe.training.lora.rank:
        raise MezzotintError(
            f"training.lora adapts weights that are there already, and the outer levels ({sides}) are new; set "
            "training.lora.rank=0"
        )
    return [f"the outer levels ({sides}) are new"]


def _fit_labels(name: str, tensors: dict[str, Tensor], fresh: dict[str, Tensor], here: Recipe, same_names: bool) -> str:
    """Make the label table `name`, or the lack of one, that of the network; returns a sentence on what is not kept."""
    theirs, ours = tensors.pop(name, None), fresh.get(name)
    if ours is None:
        assert theirs is not None
        biases = _added_to(name, here)
        for bias in biases:
            tensors[bias] = tensors[bias].float() + theirs[-1].float()
        lost = "; the null class is built in" if biases else ", and with it the token of the null class"
        return f"its label table ({len(theirs) - 1} classes) is dropped{lost}"
    if theirs is None:
        tensors[name] = ours.clone()
        tensors[name][-1] = 0
        return f"the label table is new ({len(ours) - 1} classes here, none there)"
    if theirs.shape == ours.shape and same_names:
        tensors[name] = theirs
        return ""
    tensors[name] = torch.cat([ours[:-1], theirs[-1:].to(ours)])
    return (
        f"the label table is new ({len(ours) - 1} classes here, {len(theirs) - 1} there) but for its null row, "
        "which is kept"
    )


def _added_to(table: str, recipe: Recipe) -> list[str]:
    """The biases of time's embeddings that the rows of a label table are added to; none where they are tokens.

    A UNet's are added in its own level and in all around it, those of another network in that alone.
    """
    found = LABELS.fullmatch(table)
    assert found is not None
    if found[2]:
        return ["inner." * depth + TIME_BIAS for depth in range(found[1].count("inner.") + 1)]
    return [found[1] + TIME_BIAS] if recipe.backbone.conditioning in ("adaln-zero", "adaln") else []


def _fit_captions(tensors: dict[str, Tensor], fresh: dict[str, Tensor], there: Recipe, here: Recipe) -> list[str]:
    """Make what reads captions that of the network, fresh where the two read other ones."""
    theirs, ours = there.backbone.text_features, here.backbone.text_features
    if theirs == ours:
        return []
    own = CAPTIONS if theirs is None or ours is None else READER
    for name in [name for name in tensors if own.fullmatch(name)]:
        del tensors[name]
    tensors |= {name: tensor for name, tensor in fresh.items() if own.fullmatch(name)}
    kinds = ["none" if n is None else f"features of width {n}" if n else "bytes" for n in (ours, theirs)]
    return [f"what reads captions is {'dropped' if ours is None else 'new'} ({kinds[0]} here, {kinds[1]} there)"]


def _same_classes(there: Sequence[str], here: Sequence[str]) -> bool:
    """Whether nine in ten classes share a synonym, as in "tench" and "tench, Tinca tinca", or one side has no names.

    WordNet's numbers (n01440764) count as none: folders of ImageNet are sorted by them into ImageNet's order.
    """
    if not there or not here or all(re.fullmatch(r"n\d{8}", name) for name in here):
        return True
    synonyms = [[{word.strip() for word in name.lower().split(",")} for name in names] for names in (there, here)]
    return len(there) == len(here) and sum(bool(a & b) for a, b in zip(*synonyms, strict=True)) >= 0.9 * len(here)


def _fit_output(tensors: dict[str, Tensor], there: Recipe, here: Recipe) -> list[str]:
    """Make the output layer's rows, ordered (p, p, C) with the channel fastest, those of the recipe."""
    new_variance = here.variance == "learned" and there.variance != "learned"
    data = here.latent_shape[0]
    wanted = data if here.variance == "none" else 2 * data
    for name in OUTPUT:
        if name in tensors and there.variance != here.variance:
            rows = tensors[name].unflatten(0, (-1, data if there.variance == "none" else 2 * data))
            kept = rows[:, :data] if new_variance else rows[:, :wanted]
            missing = rows.new_zeros(len(rows), wanted - kept.shape[1], *rows.shape[2:])
            tensors[name] = torch.cat([kept, missing], dim=1).flatten(0, 1)
    return ["the learned variance is new: half-way between its bounds"] if new_variance else []


def _shape(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """What this network must share with `other` to share weights."""
    sizes = network_sizes(recipe)
    if not _both_read(recipe, other):
        sizes.pop("backbone.text_width", None)
    return sizes


def _words(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """What the network's input and output mean, as far as that can differ from `other`."""
    words = {
        "target": recipe.target,
        **{f"interpolant.{key}": value for key, value in recipe.interpolant.model_dump().items()},
        "time_input": list(recipe.time_input),
        **network_words(recipe),
        "representation.name": recipe.representation.name,
        "condition.encoder": Path(recipe.condition.encoder).name,
    }
    if not (recipe.backbone.outer and other.backbone.outer):
        del words["interpolant.snr_power"]
    if not _both_read(recipe, other):
        del words["backbone.masked_text"], words["condition.encoder"]
    return words


def _both_read(recipe: Recipe, other: Recipe) -> bool:
    """Whether both networks read captions."""
    return None not in (recipe.backbone.text_features, other.backbone.text_features)


def _changed(there: dict[str, Any], here: dict[str, Any]) -> str:
    keys = [key for key in here if key in there and there[key] != here[key]]
    return ", ".join(f"{key} ({there[key]} there, {here[key]} here)" for key in keys)


# --------------------------------------------------------------------------------------------------- what is trained


def choose_trainable(backbone: nn.Module, settings: TrainingSettings, seed: int) -> str:
    """Freeze what training.freeze names and add LoRA's matrices; returns a line on how much is trained.

    With LoRA everything is frozen but its matrices, which change nothing at first (B = 0, A drawn from `seed`), and the
    label table; training.freeze goes on from there. Raises `MezzotintError` for a pattern that matches nothing, where
    nothing is left to train, and without peft.
    """
    parameters, lora = dict(backbone.named_parameters()), settings.lora
    frozen = _frozen(parameters, settings.freeze, lora.rank > 0)
    if lora.rank:
        _add_lora(backbone, lora, seed, [name for name in parameters if name not in frozen])
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    if not trained:
        raise MezzotintError(
            f"training.freeze {_listed(settings.freeze)} leaves nothing to train; take a pattern out, or add one that "
            'starts with "!" for what is to be trained'
        )
    return f"training {trained:,} of {sum(p.numel() for p in backbone.parameters()):,} parameters"


def _frozen(names: Iterable[str], patterns: Sequence[str], lora: bool) -> set[str]:
    """The names that are frozen by the last pattern matching them; a pattern also matches all that is below a name."""
    frozen: set[str] = set()
    for pattern in (*(LORA_FREEZE if lora else ()), *patterns):
        glob = pattern.removeprefix("!")
        matched = {name for name in names if fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")}
        if not matched and pattern in patterns:
            raise MezzotintError(f"training.freeze {pattern!r} matches no parameter; {_closest(glob, names)}")
        frozen = frozen - matched if pattern.startswith("!") else frozen | matched
    return frozen


def _add_lora(backbone: nn.Module, settings: LoRASettings, seed: int, trained: Sequence[str]) -> None:
    """Put LoRA's matrices beside the linear layers that it targets; `trained` are the parameters trained in full."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MezzotintError(
            "training.lora needs the package peft; install it with: pip install 'mezzotint[lora]'"
        ) from None
    # What reads labels or captions is trained in full, as a rule.
    linear = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and "y_embedder" not in name.split(".")
    ]
    chosen = settings.targets
    if chosen is None:
        innermost = [module for module in backbone.modules() if type(module) in LORA_TARGETS][-1]
        chosen = LORA_TARGETS[type(innermost)]
    targets: list[str] = []
    for target in chosen:
        matched = [name for name in linear if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")]
        if not matched and (settings.targets is not None or target == chosen[0]):
            raise MezzotintError(
                f"training.lora.targets {target!r} matches no linear layer; {_closest(target, linear)}"
            )
        targets += matched
    modules = sorted({name.rpartition(".")[0] for name in trained})
    if both := sorted(set(modules) & set(targets)):
        raise MezzotintError(
            f"training.freeze lets {_listed(both)} train in full, which LoRA adapts already; leave out one of the two"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        # A pattern, because of listed names peft also takes those that end so: a level's, and its inside's.
        target_modules="|".join(map(re.escape, targets)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, LORA_STREAM))
        inject_adapter_in_model(config, backbone, ADAPTER)
    # Only now, for `save_adapter`: told earlier, peft would wrap the modules, and their parameters would be renamed.
    config.modules_to_save = modules or None


def _closest(pattern: str, names: Iterable[str]) -> str:
    """`closest` among names in which a block's number is a star, so that they are few and can be used as they are."""
    return closest(pattern, dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------ what is saved


def merged(backbone: nn.Module) -> nn.Module:
    """A plain network that computes what `backbone` and its LoRA compute; it shares the tensors that are the same.

    The others are on the CPU, so that a checkpoint needs no more of a GPU's memory than a step.
    """
    if not hasattr(backbone, "peft_config"):
        return backbone
    from peft.tuners.lora import Linear

    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    plain = copy.deepcopy(backbone, shared)
    del plain.peft_config
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Linear):
            linear = cast(nn.Linear, layer.get_base_layer())
            weight = linear.weight.detach() + layer.get_delta_weight(ADAPTER).detach()
            linear.weight = nn.Parameter(weight.cpu(), requires_grad=False)
            plain.set_submodule(name, linear)
    return plain


def save_adapter(backbone: nn.Module, folder: Path, base: str | None) -> None:
    """Write LoRA's matrices, and what was trained in full beside them, as `peft.PeftModel.from_pretrained` reads them.

    `base` names the weights that they belong to. Nothing is written for a network without LoRA.
    """
    if not hasattr(backbone, "peft_config"):
        return
    config: dict[str, Any] = cast(Any, backbone).peft_config[ADAPTER].to_dict()
    whole = tuple(f"{module}." for module in config["modules_to_save"] or ())
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor
        for name, tensor in backbone.state_dict().items()
        if ".lora_" in name or name.startswith(whole)
    }
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_tensors(tensors, temporary, {"format": "pt"})
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=sorted))
