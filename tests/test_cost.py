"""The cost model against the DiT paper's tables (Tables 1 and 4, Figure 5) and the official parameter counts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.backbones import DIT_CONFIGS, DiT
from mezzotint.evaluation.cost import Cost, activation_bytes, cost, matmul_rate, published, recipe_cost
from mezzotint.pipeline import build_backbone
from mezzotint.recipe import load_recipe, recipe_names

# name: published Gflops, millions of parameters
PUBLISHED = {
    "dit-s-8": (0.36, 33),
    "dit-s-4": (1.41, 33),
    "dit-s-2": (6.06, 33),
    "dit-b-8": (1.42, 131),
    "dit-b-4": (5.56, 130),
    "dit-b-2": (23.01, 130),
    "dit-l-8": (5.01, 459),
    "dit-l-4": (19.70, 458),
    "dit-l-2": (80.71, 458),
    "dit-xl-8": (7.39, 676),
    "dit-xl-4": (29.05, 675),
    "dit-xl-2": (118.64, 675),
}


@cache
def published_cost(name: str, input_size: int = 32, **options: Any) -> Cost:
    with torch.device("meta"):
        model = DiT(
            input_size=input_size, in_channels=4, out_channels=8, num_classes=1000, **DIT_CONFIGS[name], **options
        )
    return cost(model, (torch.empty(1, 4, input_size, input_size), torch.empty(1), torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    gflops, millions = PUBLISHED[name]
    counted = published_cost(name)
    assert round(counted.trainable_params / 1e6) == millions  # the table leaves the fixed positions out: see B/2
    assert counted.gmacs == pytest.approx(gflops, rel=0.003, abs=0.005)  # abs: the table's last digit


def test_published_size_at_512() -> None:
    counted = published_cost("dit-xl-2", input_size=64)
    assert counted.gmacs == pytest.approx(524.60, rel=0.003)
    assert round(counted.trainable_params / 1e6) == 675


@pytest.mark.parametrize(
    ("conditioning", "gflops"), [("in-context", 119.4), ("cross-attention", 137.6), ("adaln", 118.6)]
)
def test_published_designs(conditioning: str, gflops: float) -> None:
    assert published_cost("dit-xl-2", conditioning=conditioning).gmacs == pytest.approx(gflops, rel=0.001)


def test_exact_official_counts() -> None:
    """The totals of the official code's parameters(), where the position table is a frozen parameter."""
    xl, s = published_cost("dit-xl-2"), published_cost("dit-s-8")
    assert (xl.params, xl.trainable_params) == (675_129_632, 674_834_720)
    assert (s.params, s.trainable_params) == (33_148_160, 33_142_016)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("table", torch.zeros(5))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q = self.linear(x)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)


def test_counts_by_hand() -> None:
    """T·D² for the linear layer, T²·D for each of the two products of attention, whatever the heads."""
    counted = cost(Attend(), (torch.zeros(1, 2, 6, 8), False))
    assert counted == Cost(params=64 + 3 + 5, trainable_params=64, gmacs=2 * (6 * 8 * 8 + 2 * 6 * 6 * 8) / 1e9)


def test_leaves_the_model_alone() -> None:
    model = Attend()
    cost(model, (torch.zeros(1, 2, 6, 8), False))
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_what_a_real_pass_keeps(precision: str) -> None:
    """Against the storages that autograd holds after a forward pass on real memory."""
    recipe = load_recipe("dit-s-8-256", ["backbone.depth=2"])
    backbone = build_backbone(recipe)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    held: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*backbone.parameters(), *backbone.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.zeros(3, 4, 32, 32), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = backbone(*inputs)
    expected = sum(size for pointer, size in held.items() if pointer not in own)
    assert output.requires_grad, "or nothing would have been kept"
    assert activation_bytes(recipe, 3, precision) == pytest.approx(expected, rel=0.01)


def test_published_figures_stand_beside_unchanged_recipes_only() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        paper = published(recipe)
        assert (paper is not None) == (
            name.startswith(("dit-", "sit-"))
            or name in ("diffussm-xl-256", "diffussm-xl-512", "mdm-64", "mdm-256", "mdm-1024")
        )
        if paper is not None and recipe.backbone.name == "dit" and recipe.data.size == 256:
            size = name.removeprefix("dit-").removeprefix("sit-").removesuffix("-256")
            assert (paper.gmacs, paper.params_millions) == PUBLISHED[f"dit-{size}"]
    assert published(load_recipe("dit-s-2-256", ["backbone.depth=3"])) is None
    assert published(load_recipe("dit-s-2-256", ["training.lr=1"])) is not None


@pytest.mark.parametrize(
    ("name", "count"), [("mdm-64", 461_359_107), ("mdm-256", 476_613_958), ("mdm-1024", 480_970_057)]
)
def test_matryoshka_recipes_have_the_public_networks_parameters(name: str, count: int) -> None:
    """The counts are those of the official code's networks with features 2,048 wide; no text encoder is read."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build_backbone(recipe).parameters()) == count
    paper = published(recipe)
    assert paper is not None
    assert (paper.gmacs, paper.params_millions) == (None, count / 1e6)


def test_the_video_recipe_is_the_public_network_with_attention_over_time() -> None:
    recipe = load_recipe("mdm-video-256")
    with torch.device("meta"):
        network = build_backbone(recipe)
    assert network.level_shapes == ((8, 3, 64, 64), (16, 3, 256, 256))
    counts = {True: 0, False: 0}
    for name, parameter in network.named_parameters():
        counts[".temporal." in name] += parameter.numel()
    assert counts[False] == 476_613_958
    # After each of 5 + 5 blocks of 512 and 768 channels inside, and of 3 of 256 outside: norm, q, k, v and output.
    widths = 5 * [512] + 5 * [768] + 3 * [256]
    assert counts[True] == sum(2 * width + 4 * width**2 + 4 * width for width in widths)


def test_freezing_lowers_the_trained_parameters_alone() -> None:
    whole, half = (recipe_cost(load_recipe("dit-s-8-256", more)) for more in ([], ["training.freeze=[blocks]"]))
    assert half.params == whole.params
    assert half.gmacs == whole.gmacs
    assert half.trainable_params < 0.1 * whole.trainable_params


def test_matmul_rate_is_positive() -> None:
    assert matmul_rate() > 0.1


def test_the_cost_of_the_first_levels_is_that_of_the_inner_network() -> None:
    nested = load_recipe("mdm-emoji-32")
    inner = load_recipe("mdm-emoji-32", ["backbone.outer=[]", "data.size=16", "training.stages=[]"])
    assert recipe_cost(nested, levels=1).gmacs == pytest.approx(recipe_cost(inner).gmacs, rel=1e-9)
    assert recipe_cost(nested, levels=2).gmacs == recipe_cost(nested).gmacs > recipe_cost(inner).gmacs
