"""End-to-end fine-tuning: the first layers of a network, trained on as a classifier by MAE's recipe.

(He et al. 2022, arXiv 2111.06377, table 9; l-DAE follows it.) Fine-tuning of a diffusion model as a diffusion model is
`training.finetune`.

    OUT/recipe.yaml               of the network
    OUT/classifier.safetensors    the network ("backbone."), the LayerNorm ("norm.") and the linear layer ("head.")
    OUT/settings.json             what it was trained by
    OUT/metrics.json              accuracy on the test split, at the end and after each epoch
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mezzotint.backbones.diffussm import Block as StateSpaceBlock
from mezzotint.backbones.layers import NORM_EPS
from mezzotint.backbones.layers import Block as AttentionBlock
from mezzotint.conditions.text import Text
from mezzotint.data.transforms import to_float
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError, expect
from mezzotint.evaluation.augmentation import Change, augmented_batches, cropping
from mezzotint.evaluation.probe import Labelled, accuracy
from mezzotint.evaluation.probing import TIMES, labelled_sources
from mezzotint.evaluation.sources import DatasetSource
from mezzotint.features import features_with_gradients, layers_of, pooled_features
from mezzotint.files import new_folder, read_tensors, write_text
from mezzotint.locks import claimed
from mezzotint.pipeline import A_PIPELINE, PRECISIONS, Pipeline, build, header_list, load_tensors, save_weights
from mezzotint.progress import console, track
from mezzotint.randomness import mix
from mezzotint.recipe import DataSettings, TrainingSettings, load_recipe
from mezzotint.representations import TOKENIZERS
from mezzotint.representations.tokenizer import OWN_FOLDER
from mezzotint.settings import Decay, LearningRate, Seed, Settings
from mezzotint.training.ema import EMA
from mezzotint.training.loop import set_lr

WEIGHTS, SETTINGS, METRICS = "classifier.safetensors", "settings.json", "metrics.json"
#: of transformer blocks where nothing is asked for
DROP_PATH = 0.1
#: what ends a residual branch of a block: attention, cross-attention, MLP; the state-space block's last layer
BRANCHES = ("attn", "cross_attn", "mlp", "w3")
#: of random numbers, told apart by what they are for
HEAD, IMAGES, STEPS = 1, 2, 3


class FinetuneSettings(Settings):
    """End-to-end fine-tuning. The defaults are l-DAE's for ViT-L on ImageNet, and MAE's where l-DAE has none."""

    epochs: int = Field(100, ge=1)
    """Times that the training images are gone through (MAE: 100 for ViT-B, 50 for ViT-L)."""
    batch_size: int = Field(1024, ge=1)
    """Images of a step; all of them, where there are fewer."""
    lr: LearningRate | None = None
    """Peak learning rate of the classifier's own layers. None: 1e-3 for each 256 images of a batch."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which it rises linearly (MAE: 5 of 100 epochs); a cosine to zero follows."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's, of matrices; vectors and state-space parameters have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's."""
    layer_decay: float = Field(0.65, gt=0, le=1)
    """What the learning rate is multiplied by from a layer to the one before it (l-DAE: 0.85 for ViT-B; MAE: 0.75)."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth: chance that the last block's branches are left out for an image; linear from 0 at the first.
    None: 0.1 for DiT and DiffuSSM, and none for networks without such blocks."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of a target that is spread over all classes."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of MixUp; 0: none. With CutMix, each has one half of the batches."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix; 0: none."""
    randaugment: int = Field(2, ge=0)
    """Operations of RandAugment on an image; 0: none."""
    magnitude: int = Field(9, ge=0, le=10)
    """Their strength, 10 being torchvision's greatest. (MAE: 9, with a deviation of 0.5, which torchvision lacks.)"""
    crop: float = Field(0.08, gt=0, le=1)
    """Smallest share of an image's area that a random crop has; 1: no crops. Flips are data.flip."""
    erase: float = Field(0.0, ge=0, le=1)
    """Chance of random erasing (MAE's code: 0.25)."""
    ema: float | None = Field(0.9999, gt=0, lt=1)
    """Decay of averaged weights, which are scored and kept, capped at (1 + step) / (10 + step). None: none (MAE)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast the network."""
    seed: Seed = 0
    """Of the new layers, the order of the images and all that is drawn."""


class Classifier(nn.Module):
    """The features of a denoiser's layer at time t, averaged over positions, then LayerNorm and a linear layer.

    The denoiser is told no class, or the caption `null`. Raises `MezzotintError` for an unknown layer or time.
    """

    def __init__(self, denoiser: Denoiser, layer: str, t: float, num_classes: int, null: Text | None = None) -> None:
        super().__init__()
        self.denoiser, self.layer, self.t, self.null = denoiser, layer, t, null
        device = next(denoiser.parameters()).device
        some = torch.zeros(1, *denoiser.in_shape, device=device)
        width = pooled_features(denoiser, some, t, [layer], null=null)[layer].shape[1]
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, device=device)
        self.head = nn.Linear(width, num_classes, device=device)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's: all classes are as likely at first
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, *denoiser.in_shape), what a pipeline's representation makes of images, → logits (B, num_classes)."""
        features = features_with_gradients(self.denoiser, x, self.t, [self.layer], null=self.null)[self.layer]
        return self.head(self.norm(features))

    @property
    def parts(self) -> nn.ModuleDict:
        """What a file holds."""
        return nn.ModuleDict({"backbone": self.denoiser.backbone, "norm": self.norm, "head": self.head})


def finetune_classifier(
    pipeline: Pipeline,
    out: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    data: DataSettings | None = None,
    layers: int | None = None,
    t: float = TIMES[0],
    count: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the first `layers` layers of a pipeline's network (None: half of them) as a classifier; returns metrics.

    The network sees clean images and is told t in [0, 1]; the pipeline is not changed. data: None for what it was
    trained on; count: so many of the training images. Top-1 accuracy on the test split is printed after each epoch and
    never chosen by: the classifier in the new folder `out` is the last one. The folder appears whole or not at all;
    training is not resumed.

    Raises `MezzotintError`, before any step, for a folder in use, an unknown layer or time, data without labels or
    held-out images, clips, and a drop path that has no blocks; and for a loss that is not finite.
    """
    expect(pipeline, Pipeline, A_PIPELINE)
    with claimed(Path(out)):
        return _finetune_into(
            Path(out), pipeline, settings or FinetuneSettings(), data or pipeline.recipe.data, layers, t, count, quiet
        )


def _finetune_into(
    out: Path,
    pipeline: Pipeline,
    settings: FinetuneSettings,
    data: DataSettings,
    layers: int | None,
    t: float,
    count: int | None,
    quiet: bool,
) -> dict[str, Any]:
    recipe = pipeline.recipe
    if recipe.data.frames:
        raise MezzotintError("fine-tuning is of images, not of clips; choose a model of images")
    order = list(layers_of(pipeline.denoiser))
    layers = max(1, len(order) // 2) if layers is None else layers
    layers_of(pipeline.denoiser, [layers])  # raises for too many, or none
    names = order[:layers]
    train, test = labelled_sources(data, count)
    classes = len(train.class_names)
    device = pipeline.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(settings.seed, HEAD))
        null = pipeline.no_caption if pipeline.denoiser.text else None
        classifier = Classifier(copy.deepcopy(pipeline.denoiser), names[-1], t, classes, null)
    depths = layer_depths(classifier, names)
    classifier.denoiser.requires_grad_(False)
    for parameter in depths:
        parameter.requires_grad_(True)
    add_drop_path(classifier.denoiser, names, settings.drop_path)

    batch_size = min(settings.batch_size, len(train.indices))
    lr = settings.lr or 1e-3 * batch_size / 256
    each = max(1, round(len(train.indices) / batch_size))
    steps = settings.epochs * each
    plan = TrainingSettings(
        steps=steps, lr=lr, lr_schedule="cosine", warmup_steps=min(steps - 1, round(settings.warmup * steps))
    )
    groups = layer_groups(classifier, depths, len(names), lr, settings)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, fused=device.type in ("cpu", "cuda"))
    ema = EMA(classifier, [] if settings.ema is None else [settings.ema], warmup=True)
    scored = ema.modules[0] if ema.modules else classifier
    mixed = mixing(settings, classes)
    autocast = torch.autocast(device.type, PRECISIONS["bf16"], enabled=settings.precision == "bf16")
    change = augmentation(settings, recipe.data.size, data.flip)
    batches = augmented_batches(train, batch_size, steps, change, mix(settings.seed, IMAGES))
    epochs: list[dict[str, Any]] = []
    for epoch in range(1, settings.epochs + 1):
        classifier.train()
        total = torch.zeros((), device=device)
        for number in track(range(each), f"epoch {epoch}/{settings.epochs}", total=each, enabled=not quiet):
            step = (epoch - 1) * each + number
            images, labels = next(batches)
            assert labels is not None
            images, targets = images.to(device), labels.to(device)
            # torchvision and the network's dropout draw from torch's global generators.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(mix(settings.seed, STEPS, step))
                if mixed is not None:
                    images, targets = mixed(images, targets)
                with torch.no_grad():
                    x = pipeline.representation.encode(images)
                with autocast:
                    logits = classifier(x)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
            set_lr(optimizer, plan, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            ema.update(classifier, step + 1)
            total += loss.detach()
        mean = total.item() / each
        if not torch.tensor(mean).isfinite():
            raise MezzotintError(f"the loss is NaN or infinite in epoch {epoch}; lower the learning rate (--lr)")
        epochs.append({"epoch": epoch, "loss": mean, **score(scored.eval(), pipeline, test)})
        if not quiet:
            top1 = epochs[-1]["top1"]
            console.print(f"epoch {epoch}/{settings.epochs}: loss {mean:.3f}, top-1 {top1:.2%}", soft_wrap=True)
    metrics = {
        "model": recipe.name,
        "data": train.identity,
        "test_data": test.identity,
        "train_images": len(train.indices),
        "test_images": len(test.indices),
        "classes": classes,
        "layers": len(names),
        "t": t,
        "lr": lr,
        **{name: value for name, value in epochs[-1].items() if name.startswith("top")},
        "epochs": epochs,
    }
    _save(scored, pipeline, train.class_names, settings, metrics, out)
    return metrics


def score(classifier: Classifier, pipeline: Pipeline, test: DatasetSource, batch_size: int = 256) -> dict[str, float]:
    """Top-1 accuracy in [0, 1] on all images of `test`, and top-5 with more than ten classes."""
    classes = classifier.head.out_features

    @torch.no_grad()
    def classify(images: Tensor) -> Tensor:
        return classifier(pipeline.representation.encode(to_float(images.to(pipeline.device)))).float()

    sums: dict[str, float] = {}
    for images, labels in test.batches(batch_size):
        assert labels is not None
        found = accuracy(classify, Labelled(images, labels.to(pipeline.device)), classes, batch_size)
        sums = {name: sums.get(name, 0.0) + value * len(images) for name, value in found.items()}
    return {name: total / len(test.indices) for name, total in sums.items()}


def _save(
    classifier: Classifier,
    pipeline: Pipeline,
    class_names: Sequence[str],
    settings: FinetuneSettings,
    metrics: Mapping[str, Any],
    out: Path,
) -> None:
    recipe = pipeline.recipe
    about = {"layer": classifier.layer, "t": repr(classifier.t), "class_names": json.dumps(class_names)}
    with new_folder(out) as folder:
        recipe.write(folder)
        if recipe.representation.name in TOKENIZERS:  # so that the folder needs no other
            shutil.copytree(Path(cast(str, recipe.representation.path)).expanduser(), folder / OWN_FOLDER)
        save_weights(classifier.parts, folder / WEIGHTS, about)
        write_text(folder / SETTINGS, settings.model_dump_json(indent=2) + "\n")
        write_text(folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def load_classifier(folder: str | Path, *, device: torch.device | str = "cpu") -> tuple[Pipeline, Classifier]:
    """What `finetune_classifier` wrote: the pipeline, for its representation and class names, and the classifier.

    Raises `MezzotintError` where a part of it is missing, cut off or does not fit.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise MezzotintError(
            f"{folder} holds no fine-tuned classifier; 'mezzotint finetune RUN --out FOLDER' makes one"
        )
    tensors, about = read_tensors(folder / WEIGHTS)
    class_names = header_list(about, "class_names", str(folder / WEIGHTS))
    try:
        layer, t = about["layer"], float(about["t"])
    except (KeyError, ValueError):
        raise MezzotintError(
            f"the header of {folder / WEIGHTS} names no layer and time, as 'mezzotint finetune' writes them; copy it "
            "again"
        ) from None
    pipeline = build(load_recipe(folder), class_names=class_names, device=device)
    null = pipeline.no_caption if pipeline.denoiser.text else None
    with torch.random.fork_rng(devices=[]):
        classifier = Classifier(pipeline.denoiser, layer, t, len(class_names), null)
    load_tensors(classifier.parts, tensors, str(folder / WEIGHTS))
    return pipeline, classifier.eval()


# ---- Layers ----------------------------------------------------------------------------------------------------------


def layer_depths(classifier: Classifier, names: Sequence[str]) -> dict[nn.Parameter, int]:
    """The parameters that the last of the layers `names` depends on, and the number of the first that does, from 1.

    0 are embeddings: those of layer 1 that are not in the list of modules in which the layers are. All parameters of
    the network are made to require gradients.
    """
    denoiser = classifier.denoiser.requires_grad_(True)
    backbone = denoiser.backbone
    some = torch.zeros(1, *denoiser.in_shape, device=next(backbone.parameters()).device)
    features = features_with_gradients(denoiser, some, classifier.t, names, null=classifier.null)
    place = {module: name for name, module in backbone.named_modules()}
    lists = tuple({_list_of(place[layer.module]) for layer in layers_of(denoiser, names).values()})
    embeddings = {parameter for name, parameter in backbone.named_parameters() if not name.startswith(lists)}
    depths: dict[nn.Parameter, int] = {}
    seen: set[Any] = set()
    for number, name in enumerate(names, 1):
        nodes: list[Any] = [features[name].grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):  # a leaf of autograd's graph
                depths[node.variable] = 0 if number == 1 and node.variable in embeddings else number
            nodes += [following for following, _ in node.next_functions]
    return depths


def _list_of(module: str) -> str:
    """The list that a module of this name is in: "inner.blocks." of "inner.blocks.3.attn"."""
    parts = module.split(".")
    return "".join(f"{part}." for part in parts[: next(k for k, part in enumerate(parts) if part.isdigit())])


def layer_groups(
    classifier: Classifier, depths: Mapping[nn.Parameter, int], layers: int, lr: float, settings: FinetuneSettings
) -> list[dict[str, Any]]:
    """AdamW's groups: the learning rate is lr · layer_decay^(layers + 1 − k), k the depth, layers + 1 for the new ones.

    Matrices decay; vectors and what a `ssm_parameters` of the network names do not.
    """
    modules = classifier.denoiser.modules()
    never = {parameter for module in modules for parameter in getattr(module, "ssm_parameters", tuple)()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in classifier.parameters():
        if not parameter.requires_grad:
            continue
        k, decays = depths.get(parameter, layers + 1), parameter.ndim > 1 and parameter not in never
        own = {
            "params": [],
            "initial_lr": lr * settings.layer_decay ** (layers + 1 - k),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        groups.setdefault((k, decays), own)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def add_drop_path(denoiser: Denoiser, names: Sequence[str], rate: float | None) -> None:
    """Leave residual branches of the layers' blocks out at random in training: layer k of K with rate·(k − 1)/(K − 1).

    None: a rate of 0.1 where there are blocks. Raises `MezzotintError` for a rate where there are none.
    """
    from torchvision.ops import stochastic_depth

    modules = [layer.module for layer in layers_of(denoiser, names).values()]
    blocks = [isinstance(module, AttentionBlock | StateSpaceBlock) for module in modules]
    if rate and not any(blocks):
        raise MezzotintError(
            f"drop_path {rate:g} is of the blocks of a DiT or DiffuSSM, and there are none among the layers "
            f"{', '.join(names)}; leave it out"
        )

    def drop(chance: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return stochastic_depth(output, chance, "row", module.training)

    rate = DROP_PATH if rate is None else rate
    for k, (module, is_block) in enumerate(zip(modules, blocks, strict=True)):
        chance = rate * k / max(1, len(modules) - 1)
        for name in BRANCHES if is_block and chance else ():
            if hasattr(module, name):
                cast(nn.Module, getattr(module, name)).register_forward_hook(partial(drop, chance))


# ---- Images ----------------------------------------------------------------------------------------------------------


def augmentation(settings: FinetuneSettings, size: int, flip: bool) -> Change:
    """One image uint8 (C, size, size) to float32 in [-1, 1]: crop, flip, RandAugment, random erasing."""
    from torchvision.transforms import v2

    changes = cropping((size, size), settings.crop, flip)
    if settings.randaugment and settings.magnitude:
        # Of 11 bins the last is torchvision's greatest strength, as 10 is that of the magnitudes in MAE.
        changes.append(v2.RandAugment(settings.randaugment, settings.magnitude, num_magnitude_bins=11))
    changes.append(v2.Lambda(to_float))
    if settings.erase:
        changes.append(v2.RandomErasing(settings.erase, value="random"))
    return cast(Change, v2.Compose(changes))


def mixing(settings: FinetuneSettings, num_classes: int) -> Any:
    """Images (B, C, H, W) and labels (B,) to mixed images and targets (B, num_classes); None: nothing is mixed."""
    from torchvision.transforms import v2

    kinds: list[Any] = []
    for kind, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix)):
        if alpha:
            kinds.append(kind(alpha=alpha, num_classes=num_classes))
    return v2.RandomChoice(kinds) if kinds else None
