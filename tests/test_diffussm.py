"""DiffuSSM: S4D against the recurrence it stands for, the block against its equations, counts against the paper's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT
from safetensors.torch import load_file
from torch import Tensor, nn

import mezzotint
from mezzotint.backbones import DIFFUSSM_CONFIGS, DiffuSSM
from mezzotint.backbones.diffussm import Block, ScanOrder
from mezzotint.backbones.s4d import S4D, fast_length
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.pipeline import build_backbone
from mezzotint.recipe import Recipe, load_recipe
from mezzotint.training.loop import parameter_groups, set_lr

INITIALISATIONS = ("lin", "inv", "real")
DISCRETISATIONS = ("zoh", "bilinear")
SMALL = ("backbone={name: diffussm, width: 16, depth: 2, state: 4}", *SHORT)


def tiny(**changes: Any) -> DiffuSSM:
    config: dict[str, Any] = {
        "input_size": 4, "in_channels": 2, "out_channels": 4, "width": 16, "depth": 2, "state": 4, "num_classes": 3,
    }  # fmt: skip
    return DiffuSSM(**config | changes)


def stir(module: nn.Module) -> None:
    """Move every parameter off its initial value, and no state-space layer out of its range."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)


def batch(rows: int = 4, columns: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, 2, rows, columns), t and y of two examples, the second of the null class."""
    x = torch.arange(4 * rows * columns, dtype=dtype).cos().view(2, 2, rows, columns)
    return x, torch.tensor([3.0, 99.5], dtype=dtype), torch.tensor([1, 3])


def system(layer: S4D) -> tuple[Tensor, Tensor, Tensor]:
    """A, C and Δ of a layer, complex where it is."""
    decay = -layer.log_decay.exp()
    a = decay.to(torch.complex128) if layer.frequency is None else torch.complex(decay, layer.frequency)
    c = layer.C.to(torch.complex128) if layer.frequency is None else torch.view_as_complex(layer.C)
    return a, c, layer.log_dt.exp().unsqueeze(-1)


def recurrence(layer: S4D, u: Tensor) -> Tensor:
    """The layer one position after the other: its state, discretised as its class says, and nothing of its code."""
    a, c, dt = system(layer)
    if layer.discretisation == "zoh":
        a_bar, b_bar = (dt * a).exp(), ((dt * a).exp() - 1) / a
    else:
        a_bar, b_bar = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
    weight = 1 if layer.frequency is None else 2
    outputs = layer.D * u
    for direction in range(len(a)):
        order = range(u.shape[1]) if direction == 0 else range(u.shape[1] - 1, -1, -1)
        h = torch.zeros(len(u), *a.shape[1:], dtype=torch.complex128)
        read: dict[int, Tensor] = {}
        for position in order:
            h = a_bar[direction] * h + b_bar[direction] * u[:, position, :, None]
            read[position] = weight * (c[direction] * h).sum(-1).real
        outputs = outputs + torch.stack([read[position] for position in range(u.shape[1])], dim=1)
    return outputs


# ------------------------------------------------------------------------------------------------------------- S4D


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
@pytest.mark.parametrize("length", [1, 2, 9, 64, 100])
def test_kernel_is_the_formula(initialisation: Any, discretisation: Any, length: int) -> None:
    """K_l = 2·Re Σ C (e^{ΔA} − 1)/A · e^{lΔA} and its bilinear sister, term by term in float64."""
    torch.manual_seed(0)
    layer = S4D(8, state=64, initialisation=initialisation, discretisation=discretisation)
    kernel = layer.kernel(length)
    a, c, dt = (tensor.unsqueeze(-1) for tensor in system(layer.double()))
    positions = torch.arange(length, dtype=torch.float64)
    if discretisation == "zoh":
        terms = c * ((dt * a).exp() - 1) / a * (positions * dt * a).exp()
    else:
        terms = c * dt / (1 - dt * a / 2) * ((1 + dt * a / 2) / (1 - dt * a / 2)) ** positions
    expected = (1 if initialisation == "real" else 2) * terms.sum(-2).real
    assert kernel.dtype == torch.float32
    assert kernel.shape == (2, 8, length)
    assert (kernel - expected).abs().max() < 1e-5


def test_keeps_its_precision_on_long_sequences() -> None:
    """In float32 as in float64: kernels, outputs and gradients."""
    torch.manual_seed(0)
    layer, u, probe = S4D(16), torch.randn(1, 4096, 16), torch.randn(1, 4096, 16) / 64
    found = []
    for kind in (torch.float32, torch.float64):
        layer.to(kind)
        y = layer(u.to(kind))
        found.append([layer.kernel(4096), y, *torch.autograd.grad((y * probe).sum(), list(layer.parameters()))])
    for single, double in zip(*found, strict=True):
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 1e-5 * double.abs().max().clamp(min=1)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 12, 17])
def test_layer_is_the_recurrence(initialisation: Any, discretisation: Any, bidirectional: bool, length: int) -> None:
    """Outputs and gradients, in float64, at odd and even lengths."""
    torch.manual_seed(0)
    layer = S4D(
        3, state=6, initialisation=initialisation, discretisation=discretisation, bidirectional=bidirectional
    ).double()
    stir(layer)
    u = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, length, 3, dtype=torch.float64)
    inputs = [u, *layer.parameters()]
    y, expected = layer(u), recurrence(layer, u)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad((y * probe).sum(), inputs)
    for got, wanted in zip(gradients, torch.autograd.grad((expected * probe).sum(), inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_initial_system() -> None:
    n = torch.arange(32)
    for initialisation, imaginary in (("lin", math.pi * n), ("inv", 64 / math.pi * (64 / (2 * n + 1) - 1))):
        a, c, dt = system(S4D(5, initialisation=initialisation))  # type: ignore[arg-type]
        expected = torch.complex(torch.full((32,), -0.5), imaginary.float())
        torch.testing.assert_close(a, expected.expand(2, 5, 32))
        torch.testing.assert_close(dt.flatten(), 10 ** torch.linspace(-3, -1, 5).repeat(2))
        assert c.shape == (2, 5, 32)
    a, _, _ = system(S4D(5, initialisation="real", bidirectional=False))
    torch.testing.assert_close(a.real.float(), -torch.arange(1.0, 65).expand(1, 5, 64))


def test_one_direction_sees_the_past_alone() -> None:
    torch.manual_seed(0)
    u = torch.randn(1, 10, 4)
    later = u.clone()
    later[:, 6:] += 1
    causal, both = S4D(4, bidirectional=False), S4D(4)
    torch.testing.assert_close(causal(u)[:, :6], causal(later)[:, :6])
    assert (both(u)[:, :6] - both(later)[:, :6]).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("minimum", "length"), [(1, 2), (13, 16), (127, 128), (1567, 1600), (2047, 2048), (2 * 97, 200)]
)
def test_fast_length(minimum: int, length: int) -> None:
    assert fast_length(minimum) == length


def test_stays_single_in_half_precision() -> None:
    torch.manual_seed(0)
    layer = S4D(4)
    u = torch.randn(1, 50, 4).bfloat16()
    expected = layer(u.float())
    assert all(parameter.dtype == torch.float32 for parameter in layer.bfloat16().parameters())
    y = layer(u)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(u.float()), expected)
    assert layer.double().D.dtype == torch.float64


def test_kernel_is_kept_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes the parameters, in whatever way, the next output is theirs."""
    torch.manual_seed(0)
    layer, u = S4D(4).eval(), torch.randn(1, 9, 4)
    made = 0
    kernel = S4D.kernel

    def counted(self: S4D, length: int) -> Tensor:
        nonlocal made
        made += 1
        return kernel(self, length)

    monkeypatch.setattr(S4D, "kernel", counted)
    with torch.no_grad():
        first = layer(u)
        assert torch.equal(layer(u), first)
        assert made == 1
        layer(u[:, :5])
        assert made == 2
        layer.log_dt.data += 0.1
        assert not torch.equal(layer(u), first)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(u).sum().backward()
    with torch.no_grad():
        before = layer(u)
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(layer(u), before)
        assert torch.equal(layer(u), layer.train()(u))
    assert layer(u).requires_grad


# ----------------------------------------------------------------------------------------------------------- block


@pytest.mark.parametrize("m", [1, 2, 4])
def test_block_is_its_equations(m: int) -> None:
    """One vector at a time, from the state-space layer's recurrence to the residual."""
    torch.manual_seed(0)
    width, groups = 6 if m < 4 else 4, 3
    block = Block(width, m, ScanOrder("row", groups, m), S4D(width, state=4)).double()
    stir(block)
    x, c = torch.randn(2, groups, width).double(), torch.randn(2, 1, 3 * width).double()

    def sigma(value: Tensor) -> Tensor:
        return 0.5 * value * (1 + torch.erf(value / 2**0.5))

    def affine(layer: nn.Module, value: Tensor) -> Tensor:
        return layer.weight @ value + layer.bias  # type: ignore[operator]

    for b in range(2):
        shift, scale, gate = c[b, 0].chunk(3)
        centred = x[b] - x[b].mean(-1, keepdim=True)
        i = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
        u = torch.zeros(groups * m, width).double()
        for j in range(groups):
            for k in range(m):
                rows = slice(k * width, (k + 1) * width)
                inner = sigma(affine(block.w0, i[j]))
                u[j * m + k] = sigma(block.up.weight[rows] @ inner + block.up.bias[rows])
        ssm = recurrence(block.ssm, u.unsqueeze(0))[0]
        y = torch.stack([affine(block.ssm_out, sigma(row)) for row in ssm])
        for j in range(groups):
            mixed = torch.cat([sigma(affine(block.down[k], y[j * m + k])) for k in range(m)])
            assert mixed.shape == (2 * width,)
            o = affine(block.w3, sigma(affine(block.w2, mixed)) * sigma(affine(block.w1, i[j])))
            torch.testing.assert_close(block(x, c)[b, j], x[b, j] + gate * o, rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_block_counts(m: int) -> None:
    """(11 + M)·D² weights in the dense layers, 9D² + 2MD² at M = 2; W^Y has D², the regression 3D²."""
    d = 8
    block = Block(d, m, ScanOrder("row", 2, m), S4D(d))
    weights = {name: p.numel() for name, p in block.named_parameters() if name.endswith("weight")}
    outside = weights.pop("adaLN_modulation.weight"), weights.pop("ssm_out.weight")
    assert outside == (3 * d * d, d * d)
    assert sum(weights.values()) == (11 + m) * d * d
    if m == 2:
        assert sum(weights.values()) == 9 * d * d + 2 * m * d * d
    assert sum(p.numel() for p in block.ssm.parameters()) == 2 * d * (1 + 2 * 32 + 2 * 32) + d


def test_scan_orders() -> None:
    grid = torch.arange(6).view(1, 6, 1)  # rows 0 1 2 / 3 4 5
    orders = {
        "row": [0, 1, 2, 3, 4, 5],
        "row-snake": [0, 1, 2, 5, 4, 3],
        "column": [0, 3, 1, 4, 2, 5],
        "column-snake": [0, 3, 4, 1, 2, 5],
    }
    for scan, expected in orders.items():
        order = ScanOrder(scan, 2, 3)  # type: ignore[arg-type]
        assert order(grid).flatten().tolist() == expected
        assert torch.equal(order.undo(order(grid)), grid)


def test_blocks_take_turns_in_scanning() -> None:
    model = tiny(scan=("row", "column-snake"), depth=3)
    assert [(block.order.by_column, block.order.snake) for block in model.blocks] == [
        (False, False), (True, True), (False, False),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- network


def test_published_counts() -> None:
    """XL: 29 layers, 673M ± 2 % parameters, 280 GMACs ± 10 % a 256 × 256 image, 7.5·L·D² of them in a block."""
    recipe = load_recipe("diffussm-xl-256")
    counted = recipe_cost(recipe)
    assert counted.trainable_params == pytest.approx(673e6, rel=0.02)
    assert counted.gmacs == pytest.approx(280, rel=0.1)
    with torch.device("meta"):
        model = build_backbone(recipe)
    assert isinstance(model, DiffuSSM)
    assert len(model.blocks) == 29
    # Weights of dense layers, and how many of the L = 1,024 positions or J = 512 groups each of them is applied to.
    length, d = 1024, 1152
    macs = sum(
        p.numel() * (length if "ssm_out" in name else length // 2)
        for name, p in model.blocks[0].named_parameters()
        if name.endswith("weight") and "adaLN" not in name and "down" not in name
    )
    macs += sum(down.weight.numel() * length // 2 for down in model.blocks[0].down)  # type: ignore[union-attr]
    assert macs == 7.5 * length * d * d
    # All else: the kernels (64 a position, direction and channel), three FFTs of 2,048, time and class, in and out.
    kernels = 2 * 64 * length * d
    ffts = 3 * 1.25 * 2 * length * math.log2(2 * length) * d
    outside = 256 * d + d * d + 2 * d * d + (512 * 8 + 512 * 16) * d
    assert counted.gmacs * 1e9 == pytest.approx(29 * (macs + kernels + ffts + 3 * d * d) + outside, rel=1e-6)


def test_trains_everything_but_the_position_table() -> None:
    model = tiny(scan=("row", "column-snake"))
    stir(model)
    model(*batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert "pos_embed" in dict(model.named_buffers())


def test_initialisation_is_dits_outside_the_state_spaces() -> None:
    torch.manual_seed(0)
    model = tiny(width=64, num_classes=100)
    own = {id(parameter) for parameter in model.ssm_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            assert ".ssm." in name
            assert parameter.any()
        elif "bias" in name or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert not parameter.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max().item() <= bound, name


def test_blocks_are_the_identity_and_the_output_zero_at_first() -> None:
    model = tiny()
    x, c = torch.randn(2, 8, 16), torch.randn(2, 1, 16)
    for block in model.blocks:
        assert torch.equal(block(x, block.adaLN_modulation(c)), x)
    assert not model(*batch()).any()


@pytest.mark.parametrize(
    "changes", [{}, {"patch_size": 2}, {"hourglass": 1}, {"hourglass": 4}, {"bidirectional": False}]
)
def test_time_class_and_known_conditions(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    stir(model)
    x, t, y = batch()
    output = model(x, t, y)
    assert output.shape == (2, 4, 4, 4)
    later, null = model(x, t + torch.tensor([1.0, 0.0]), y), model(x, t, torch.tensor([3, 3]))
    for changed in (later, null):
        assert not torch.allclose(changed[0], output[0])
        torch.testing.assert_close(changed[1], output[1])
    torch.testing.assert_close(model(x, t, condition=model.condition(t, y)), output)


def test_output_is_in_its_inputs_place() -> None:
    """Where nothing mixes or tells positions apart, whole rows move together; the grid may be rectangular."""
    model = tiny(input_size=(4, 6), num_classes=0)
    stir(model)
    model.pos_embed.zero_()
    with torch.no_grad():
        for block in model.blocks:
            block.ssm.C.zero_()
    x, t, _ = batch(4, 6)
    output = model(x, t)
    assert output.shape == (2, 4, 4, 6)
    torch.testing.assert_close(model(x.roll((1, 2), (2, 3)), t), output.roll((1, 2), (2, 3)), rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks() -> None:
    model = tiny(depth=1, scan=("column-snake",))
    stir(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch()), model(*batch()))


def test_runs_in_bfloat16() -> None:
    model = tiny()
    stir(model)
    expected = model(*batch())
    output = model.bfloat16()(*batch())
    assert output.dtype == torch.bfloat16
    assert F.mse_loss(output.float(), expected) < 1e-3 * expected.square().mean()


def test_configs() -> None:
    assert DIFFUSSM_CONFIGS["diffussm-xl"] == {"depth": 29, "width": 1152, "patch_size": 1}
    assert [config["width"] for config in DIFFUSSM_CONFIGS.values()] == [384, 768, 1152]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "input size 4×4 cannot be cut into patches of 3; use multiples of 3"),
        ({"hourglass": 3}, r"an hourglass of 3 does not divide 16 positions and 2·width = 32"),
        ({"scan": ("row", "spiral")}, "scan 'spiral' is unknown; "),
        ({"scan": ()}, "scan is empty; known: row, row-snake"),
        ({"state": 5}, "a state of 5 is not made of conjugate pairs; use an even number, or real A"),
        ({"initialisation": "legs"}, "initialisation 'legs' is unknown; "),
        ({"discretisation": "euler"}, "discretisation 'euler' is unknown; "),
    ],
)
def test_impossible_networks_fail(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        tiny(**changes)


def test_wrong_inputs_fail() -> None:
    x, t, y = batch()
    with pytest.raises(MezzotintError, match=r"shape \(2, 2, 4, 3\), expected \(B, 2, 4, 4\)"):
        tiny()(x[..., :3], t, y)
    with pytest.raises(MezzotintError, match=r"class labels are missing; pass y \(B,\), with 3 where"):
        tiny()(x, t)


# --------------------------------------------------------------------------------------- in recipes and in training


def small(*more: str) -> Recipe:
    return load_recipe("digits", (*SMALL, *more))


def test_names_bring_their_sizes_and_leave_the_others_options() -> None:
    changed = load_recipe("dit-xl-2-256", ["backbone.conditioning=in-context", "backbone=diffussm-s"]).backbone
    assert (changed.name, changed.depth, changed.width, changed.patch_size) == ("diffussm", 13, 384, 1)
    back = load_recipe("diffussm-xl-256-uni", ["backbone=dit-s-2"]).backbone
    assert (back.name, back.patch_size, back.bidirectional) == ("dit", 2, True)
    uni = load_recipe("diffussm-xl-256-uni", ["backbone=diffussm-s"]).backbone
    assert (uni.depth, uni.bidirectional) == (13, False)
    assert Recipe.parse(load_recipe("diffussm-fashion-mnist").model_dump()).backbone.scan == ("row", "column")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone=diffussm-xxl", "backbone 'diffussm-xxl' is unknown; closest: diffussm-xl"),
        ("backbone.mlp_ratio=2", r"backbone\.mlp_ratio means nothing for diffussm; leave it out, it is dit's"),
        ("backbone.hourglass=3", "an hourglass of 3 does not divide the 64 positions"),
        ("backbone.scan=[spiral]", "scan"),
    ],
)
def test_meaningless_recipes_fail(override: str, message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        small(override)


def test_state_spaces_learn_at_their_own_rate() -> None:
    recipe = small("training.lr=1e-2", "training.ssm_lr=1e-3", "training.weight_decay=0.1", "training.warmup_steps=2")
    backbone = build_backbone(recipe)
    optimizer = torch.optim.AdamW(parameter_groups(backbone, recipe.training), lr=1.0, weight_decay=0.1)
    set_lr(optimizer, recipe.training, 0)
    dense, ssm = optimizer.param_groups
    assert (dense["lr"], dense["weight_decay"]) == (5e-3, 0.1)
    assert (ssm["lr"], ssm["weight_decay"]) == (5e-4, 0.0)
    assert {id(p) for p in ssm["params"]} == {id(p) for name, p in backbone.named_parameters() if ".ssm." in name}
    assert len(dense["params"]) + len(ssm["params"]) == len(list(backbone.parameters()))


@pytest.mark.parametrize(
    "overrides",
    [
        ["interpolant=ddpm", "target=noise", "variance=learned", "time_input=[1000,-1]", "sampling=ddpm"],
        ["interpolant=vp", "target=score", "objective.weighting=velocity", "guidance.scale=2"],
        ["interpolant={name: variance-exploding, sigma_max: 80}", "target=data"],
        ["interpolant=cosine", "target=v", "training.precision=bf16", "backbone.scan=[row,column]"],
        ["backbone.num_classes=0", "data.labels=false", "backbone.bidirectional=false", "sampling=sde-heun"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_word_trains_and_samples(tmp_path: Path, overrides: list[str]) -> None:
    mezzotint.train(small(*overrides), tmp_path / "run", quiet=True)
    assert mezzotint.sample(mezzotint.load(tmp_path / "run"), count=2).isfinite().all()


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    rates = ("training.ssm_lr=1e-3", "training.weight_decay=0.1")
    mezzotint.train(small(*rates), tmp_path / "whole", quiet=True)
    mezzotint.train(small(*rates, "training.steps=3"), tmp_path / "parts", quiet=True)
    mezzotint.train(small(*rates), tmp_path / "parts", resume=True, quiet=True)
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name
