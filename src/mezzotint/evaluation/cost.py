"""What a network costs: parameters and multiply-adds, as the papers' tables count them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.pipeline import build_backbone, build_denoiser
from mezzotint.recipe import Recipe, override_recipe, resolve
from mezzotint.samplers import SAMPLERS, Sampler


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


def cost(model: nn.Module, inputs: tuple[Any, ...]) -> Cost:
    """Counts `model(*inputs)` without computing it; `inputs` are those of one example, (1, …) tensors on any device.

    Counted are matrix products, convolutions and attention, but not FFTs or elementwise work. The pass runs on the meta
    device whatever the model's own, so the model may be built under ``torch.device("meta")``, where the largest takes
    no memory and about half a second.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    arguments = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, on_meta, arguments)
    return Cost(
        params=sum(tensor.numel() for tensor in tensors.values()),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        gmacs=counter.get_total_flops() / 2e9,
    )


def recipe_cost(recipe: Recipe) -> Cost:
    """The cost of a recipe's network; where the recipe leaves the number of classes to the data, these are read."""
    if recipe.backbone.num_classes is None:
        recipe = resolve(recipe, recipe.data.load("train"))
    with torch.device("meta"):
        backbone = build_backbone(recipe)
        labels = torch.zeros(1, dtype=torch.int64) if recipe.backbone.num_classes else None
        return cost(backbone, (torch.zeros(1, *recipe.latent_shape), torch.zeros(1), labels))


def sampling_evaluations(recipe: Recipe) -> dict[str, int | None]:
    """Network evaluations of one image by each sampler, at the recipe's number of steps; a guided one runs it twice.

    An SDE costs the same with any diffusion. None: the solver decides (ode-dopri5, whose steps are those it reports).
    """
    small = ["backbone.width=4", "backbone.depth=1", "backbone.heads=1", "backbone.num_classes=0"]
    denoiser = build_denoiser(override_recipe(recipe, small))  # they depend on its interpolant and target alone
    settings = recipe.sampling.model_dump()
    return {name: Sampler.parse(settings | {"sampler": name}).evaluations(denoiser) for name in SAMPLERS}
