"""What a network costs: parameters and multiply-adds, as the papers' tables count them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mezzotint import data
from mezzotint.conditions import Condition, Text
from mezzotint.denoiser import in_shape
from mezzotint.pipeline import build_backbone, build_denoiser, captioner
from mezzotint.recipe import Recipe, load_recipe, override_recipe, recipe_names, resolve
from mezzotint.samplers import SAMPLERS, Sampler
from mezzotint.training.finetune import choose_trainable


@dataclass(frozen=True)
class Cost:
    """Size and price of a network.

    params: all numbers it stores, fixed buffers (such as a position table) included.
    trainable_params: those that the optimiser changes.
    gmacs: 10⁹ multiply-adds of one forward pass. The papers call this "Gflops".
    """

    params: int
    trainable_params: int
    gmacs: float

    @property
    def training_gmacs(self) -> float:
        """10⁹ multiply-adds of training on one example: a backward pass is two of the forward's matrix products."""
        return 3 * self.gmacs


@dataclass(frozen=True)
class Published:
    """What `source` says of a network: 10⁹ multiply-adds of a forward pass, if it does, and millions of parameters."""

    gmacs: float | None
    params_millions: float
    source: str


_DIT, _DIFFUSSM, _MDM = "the DiT paper", "the DiffuSSM paper", "the public MDM code"
#: by recipe; SiT's networks are DiT's
PUBLISHED = {
    "dit-s-8-256": Published(0.36, 33, _DIT),
    "dit-s-4-256": Published(1.41, 33, _DIT),
    "dit-s-2-256": Published(6.06, 33, _DIT),
    "dit-b-8-256": Published(1.42, 131, _DIT),
    "dit-b-4-256": Published(5.56, 130, _DIT),
    "dit-b-2-256": Published(23.01, 130, _DIT),
    "dit-l-8-256": Published(5.01, 459, _DIT),
    "dit-l-4-256": Published(19.70, 458, _DIT),
    "dit-l-2-256": Published(80.71, 458, _DIT),
    "dit-xl-8-256": Published(7.39, 676, _DIT),
    "dit-xl-4-256": Published(29.05, 675, _DIT),
    "dit-xl-2-256": Published(118.64, 675, _DIT),
    "dit-xl-2-512": Published(524.60, 675, _DIT),
    "diffussm-xl-256": Published(280, 673, _DIFFUSSM),  # its totals over the images seen: 1.85e11 / 660M
    "diffussm-xl-512": Published(1066, 673, _DIFFUSSM),  # 3.22e11 / 302M
    "mdm-64": Published(None, 461.359107, _MDM),
    "mdm-256": Published(None, 476.613958, _MDM),
    "mdm-1024": Published(None, 480.970057, _MDM),
}


def published(recipe: Recipe) -> Published | None:
    """The published figures for this recipe's network; None where it has none, or the recipe was changed."""
    found = PUBLISHED.get(recipe.name.replace("sit-", "dit-"))
    if found is None or recipe.name not in recipe_names():
        return None
    shipped = load_recipe(recipe.name)
    same = (shipped.backbone, shipped.latent_shape, shipped.variance)
    return found if same == (recipe.backbone, recipe.latent_shape, recipe.variance) else None


def activation_bytes(recipe: Recipe, batch_size: int, precision: str = "fp32") -> int:
    """Bytes that a training step's forward pass keeps for the backward one; nothing is computed to tell.

    Weights, gradients, optimizer state (16 bytes a parameter with AdamW, and 4 for each average) and what a pass needs
    for a moment come on top.
    """
    recipe = _with_classes(recipe)
    kept: dict[int, tuple[int, Any]] = {}
    with FakeTensorMode():
        backbone = build_backbone(recipe)
        own = {tensor.untyped_storage()._cdata for tensor in [*backbone.parameters(), *backbone.buffers()]}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes(), storage  # held, so that its address is not given out again
            return tensor

        inputs = example_inputs(backbone, recipe, batch_size)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            backbone(*inputs)
    return sum(size for size, _ in kept.values())


def matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """10⁹ multiply-adds per second of a large square matrix product here and now: the best of several."""
    device = torch.device(device)
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for it
        fastest = min(fastest, time.perf_counter() - begun)
    return n**3 / 1e9 / fastest


def _real_fft(real: torch.Size, dims: list[int]) -> int:
    """Operations of FFTs of real numbers over `dims`, forth or back: 5/2·n·log₂ n for each n of them (radix 2)."""
    return round(2.5 * real.numel() * math.log2(math.prod(real[dim] for dim in dims)))


_FFTS = {  # FlopCounterMode knows products alone
    torch.ops.aten._fft_r2c: lambda real, dims, *_, **__: _real_fft(real, dims),
    torch.ops.aten._fft_c2r: lambda _, dims, *__, out_shape, **___: _real_fft(out_shape, dims),
}


def cost(model: nn.Module, inputs: tuple[Any, ...]) -> Cost:
    """Counts `model(*inputs)` without computing it; `inputs` are those of one example, (1, …) tensors on any device.

    Counted are matrix products, convolutions, attention and FFTs, but no elementwise work. The pass runs on the meta
    device whatever the model's own, so the model may be built under ``torch.device("meta")``, where the largest takes
    no memory and about half a second.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    arguments = tuple(value.to("meta") if isinstance(value, Tensor | Text) else value for value in inputs)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FFTS) as counter:
        functional_call(model, on_meta, arguments)
    return Cost(
        params=sum(tensor.numel() for tensor in tensors.values()),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        gmacs=counter.get_total_flops() / 2e9,
    )


def recipe_cost(recipe: Recipe, levels: int | None = None) -> Cost:
    """The cost of a recipe's network; where the recipe leaves the number of classes to the data, these are read.

    Where the data are not named yet, as in the recipe photos-32, it is that without classes.

    levels: how many of a Matryoshka network's are run, the smallest first (None: all).
    """
    recipe = _with_classes(recipe)
    with torch.device("meta"):
        backbone = build_backbone(recipe)
        choose_trainable(backbone, recipe.training, recipe.seed)
        x, t, y = example_inputs(backbone, recipe)
        if levels is not None:
            x = x[:, : sum(map(prod, cast(Any, backbone).level_shapes[:levels]))]
        return cost(backbone, (x, t, y))


def example_inputs(backbone: nn.Module, recipe: Recipe, batch_size: int = 1) -> tuple[Tensor, Tensor, Condition | None]:
    """x, t and y of a batch, all zeros, captions of full length, on the current default device."""
    y: Condition | None = None
    if (features := recipe.backbone.text_features) is not None:
        shape = (batch_size, recipe.condition.max_tokens)
        tokens = torch.zeros(*shape, features) if features else torch.zeros(shape, dtype=torch.int64)
        y = Text(tokens, torch.ones(shape, dtype=torch.bool))
    elif recipe.backbone.num_classes:
        y = torch.zeros(batch_size, dtype=torch.int64)
    return torch.zeros(batch_size, *in_shape(backbone)), torch.zeros(batch_size), y


def _with_classes(recipe: Recipe) -> Recipe:
    if recipe.condition.name == "text":
        if recipe.backbone.text_features is not None:
            return recipe
        backbone = recipe.backbone.model_copy(update={"num_classes": 0, "text_features": captioner(recipe).width})
        return recipe.model_copy(update={"backbone": backbone})
    if recipe.backbone.num_classes is not None:
        return recipe
    if recipe.data.path is None and recipe.data.name in data.OF_FOLDERS:  # no data yet
        return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"num_classes": 0})})
    return resolve(recipe, recipe.data.load("train"))


def sampling_evaluations(recipe: Recipe) -> dict[str, int | None]:
    """Network evaluations of one image by each sampler, at the recipe's number of steps; a guided one runs it twice.

    An SDE costs the same with any diffusion. None: the solver decides (ode-dopri5, whose steps are those it reports).
    """
    latent = "objective.residual_weight=0", "backbone={input: latent, output: latent}"
    small = "backbone={name: dit, patch_size: 1, width: 4, depth: 1, heads: 1, num_classes: 0}"
    # They depend on its interpolant and target alone.
    denoiser = build_denoiser(override_recipe(recipe, [*latent, small]))
    settings = recipe.sampling.model_dump()
    return {name: Sampler.parse(settings | {"sampler": name}).evaluations(denoiser) for name in SAMPLERS}
