"""Networks inside others: features in, features out, for DiT and DiffuSSM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_diffussm import stir
from torch import Tensor

from mezzotint.backbones import DiffuSSM, DiT
from mezzotint.conditions.text import byte_tokens
from mezzotint.errors import MezzotintError

NETWORKS: list[tuple[Any, dict[str, Any], tuple[int, int]]] = [
    *(
        (DiT, {"patch_size": 2, "heads": 2, "conditioning": conditioning}, (2, 2))
        for conditioning in ("adaln-zero", "adaln", "cross-attention", "in-context")
    ),
    (DiffuSSM, {"state": 4}, (1, 2)),
    (DiffuSSM, {"state": 4, "hourglass": 4, "scan": ("column",)}, (1, 4)),
    (DiffuSSM, {"state": 4, "patch_size": 2, "hourglass": 1}, (2, 2)),
    (DiffuSSM, {"state": 4, "text_features": 0, "conditioning": "in-context", "num_classes": 0}, (1, 2)),
]


def network(kind: Any, options: dict[str, Any]) -> Any:
    sizes = {"input_size": (4, 8), "in_channels": 2, "out_channels": 4, "width": 16, "depth": 2, "num_classes": 3}
    torch.manual_seed(0)
    model = kind(**sizes | options).double()
    stir(model)
    return model


def inputs(model: Any) -> tuple[Tensor, Tensor, Any]:
    x = torch.arange(128.0, dtype=torch.float64).cos().view(2, 2, 4, 8)
    y = torch.tensor([1, 3]) if model.text_features is None else byte_tokens(["red", "heart"], 8)
    return x, torch.tensor([3.0, 99.5], dtype=torch.float64), y


def features(model: Any) -> Tensor:
    down, across = model.feature_stride
    shape = 2, model.feature_channels, 4 // down, 8 // across
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "options", "stride"), NETWORKS)
def test_features_in_and_out(kind: Any, options: dict[str, Any], stride: tuple[int, int]) -> None:
    model = network(kind, options)
    assert (model.feature_channels, model.feature_stride) == (16, stride)
    arguments, given = inputs(model), features(model)
    output, found = model.forward_features(*arguments, None)
    assert torch.equal(model(*arguments), output)
    assert found.shape == given.shape
    changed, found_then = model.forward_features(*arguments, given)
    assert not torch.allclose(changed, output)
    assert not torch.allclose(found_then, found)
    # They are added where the position table is: (B, C, h, w) read row by row.
    model.pos_embed = model.pos_embed + torch.einsum("bchw->bhwc", given).reshape(2, -1, 16)
    torch.testing.assert_close(model.forward_features(*arguments, None), (changed, found_then))


@pytest.mark.parametrize(("kind", "options", "stride"), NETWORKS)
def test_features_are_what_the_final_layer_reads(kind: Any, options: dict[str, Any], stride: tuple[int, int]) -> None:
    """Each pixel of the output is made of the features at its place, and of no others."""
    model = network(kind, options)
    arguments = inputs(model)
    output, found = model.forward_features(*arguments, features(model))
    tokens: list[Tensor] = []
    model.final_layer.register_forward_hook(lambda module, inputs, output: tokens.extend([inputs[0], output]))
    model.forward_features(*arguments, features(model))
    down, across = stride
    columns = 8 // across
    for row, column in ((0, 0), (1, 1), (4 // down - 1, columns - 1)):
        assert torch.equal(tokens[0][:, row * columns + column], found[:, :, row, column])
        pixels = output[:, :, row * down : (row + 1) * down, column * across : (column + 1) * across]
        numbers = tokens[1][:, row * columns + column]
        torch.testing.assert_close(numbers.sort(dim=1).values, pixels.flatten(1).sort(dim=1).values)


@pytest.mark.parametrize(("kind", "options", "stride"), NETWORKS[::4])
def test_gradients_pass_through(kind: Any, options: dict[str, Any], stride: tuple[int, int]) -> None:
    model = network(kind, options)
    given = features(model).requires_grad_()
    output, found = model.forward_features(*inputs(model), given)
    (gradient,) = torch.autograd.grad(output.sum() + found.square().sum(), given)
    assert (gradient != 0).all()


@pytest.mark.parametrize(("kind", "options", "stride"), NETWORKS)
def test_known_conditions(kind: Any, options: dict[str, Any], stride: tuple[int, int]) -> None:
    model = network(kind, options)
    x, t, y = inputs(model)
    expected = model.forward_features(x, t, y, features(model))
    known = model.forward_features(x, t, None, features(model), condition=model.condition(t, y))
    torch.testing.assert_close(known, expected)


def test_features_take_the_networks_dtype() -> None:
    model = network(DiT, NETWORKS[0][1]).bfloat16()
    output, found = model.forward_features(*inputs(model), features(model))
    assert output.dtype == found.dtype == torch.bfloat16


def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    model = network(DiffuSSM, {"state": 4, "depth": 1})
    arguments = (*inputs(model), features(model))
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), model.forward_features(*arguments))


def test_impossible_features_fail() -> None:
    model = network(DiT, NETWORKS[0][1])
    with pytest.raises(MezzotintError, match=r"features have shape \(2, 16, 2, 3\), expected \(2, 16, 2, 4\); see"):
        model.forward_features(*inputs(model), features(model)[..., :3])
    across_rows = network(DiffuSSM, {"state": 4, "hourglass": 16})
    assert across_rows(*inputs(across_rows)).shape == (2, 4, 4, 8)
    with pytest.raises(
        MezzotintError, match="rows of 8 positions cannot be cut into groups of 16, so that there is no"
    ):
        across_rows.forward_features(*inputs(across_rows), None)
