"""DiT: equality with the official network, its tables, its initialisation and its four conditioning designs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones import DIT_CONFIGS, DiT
from mezzotint.backbones.dit import BLOCKS, CrossAttention
from mezzotint.backbones.layers import Attention, LabelEmbedding, TimestepEmbedding, position_table
from mezzotint.errors import MezzotintError

# The official network's answer (facebookresearch/DiT models.py with timm 1.0.31, float32) for the weights that `fill`
# gives it and the input of `test_equals_official`.
OFFICIAL_OUTPUT = """
    -4.831947 -1.060149 -4.758719 -1.024585 -2.547752  0.695058 -2.604921  0.276039
    -4.863613 -1.154274 -4.852091 -1.118210 -2.729737  0.348206 -2.677442  0.408063
    -2.484366  1.006334 -2.365068  1.021609 -1.448271  0.090874 -1.662832  0.258345
    -2.385390  1.058649 -2.423050  1.079776 -1.494314  0.269185 -1.843556  0.207250
    -1.829459 -5.590874 -1.723137 -5.597184 -1.159664 -0.077328 -0.760274  0.114854
    -1.769125 -5.774656 -1.720042 -5.592330 -0.799647  0.037740 -0.679569  0.117072
     1.708475  1.209013  1.521479  0.934897  0.780541 -0.942720  1.106772 -1.196752
     1.675218  0.876766  1.482997  1.046722  1.014305 -1.197571  1.187057 -1.221019
    -4.401525 -2.951602 -4.266312 -2.853953 -0.056882  3.760739  0.089924  3.560378
    -4.406577 -2.897093 -4.269192 -2.985208 -0.053258  3.652697  0.065439  3.474324
    -1.753699 -0.928300 -1.603829 -0.978152 -0.404511 -0.948371 -0.521691 -0.836620
    -1.670495 -0.949555 -1.844916 -1.071669 -0.409324 -0.805152 -0.593816 -0.746968
    -2.583051 -4.959518 -2.409280 -4.865631 -3.069109 -0.425989 -2.886211 -0.303682
    -2.472382 -5.037473 -2.400045 -5.035837 -2.984550 -0.386745 -2.825391 -0.417350
     3.965447  0.666247  3.802392  0.686397 -1.556612  2.778966 -1.518249  2.705161
     3.943986  0.639628  3.705355  0.525922 -1.496511  2.706724 -1.508138  2.686079
"""

OFFICIAL_NAMES = {
    "pos_embed",
    *(f"x_embedder.proj.{kind}" for kind in ("weight", "bias")),
    *(f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    "y_embedder.embedding_table.weight",
    *(
        f"{module}.{kind}"
        for module in (
            "blocks.0.attn.qkv",
            "blocks.0.attn.proj",
            "blocks.0.mlp.fc1",
            "blocks.0.mlp.fc2",
            "blocks.0.adaLN_modulation.1",
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        )
        for kind in ("weight", "bias")
    ),
}


def tiny(**changes: Any) -> DiT:
    config: dict[str, Any] = {
        "input_size": 4, "patch_size": 2, "in_channels": 2, "out_channels": 4,
        "width": 16, "depth": 2, "heads": 2, "num_classes": 3,
    }  # fmt: skip
    return DiT(**config | changes)


def fill(parameters: Iterable[Tensor]) -> None:
    """Dense, reproducible values in [-0.3, 0.3] that depend on nothing but a parameter's place in the list."""
    with torch.no_grad():
        for k, parameter in enumerate(parameters):
            n = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.3 * torch.cos(k + n**1.5).view_as(parameter))


def batch(rows: int = 4, columns: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, 2, rows, columns), t and y of two examples, the second of the null class."""
    x = torch.arange(4 * rows * columns, dtype=dtype).cos().view(2, 2, rows, columns)
    return x, torch.tensor([3.0, 99.5], dtype=dtype), torch.tensor([1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_official(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    fill(model.parameters())
    expected = torch.tensor([float(value) for value in OFFICIAL_OUTPUT.split()], dtype=dtype).view(2, 4, 4, 4)
    output = model(*batch(dtype=dtype))
    assert output.dtype == dtype
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


def test_names_are_official() -> None:
    assert set(tiny(depth=1).state_dict()) == OFFICIAL_NAMES


def test_trains_everything_but_the_position_table() -> None:
    model = tiny()
    fill(model.parameters())
    model(*batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert "pos_embed" in dict(model.named_buffers())


def test_position_table_formula() -> None:
    rows, columns, width = 3, 5, 24
    expected = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for i in range(width // 4):
                x, y = (position / 10000 ** (i / (width / 4)) for position in (column, row))
                quarters = [np.sin(x), np.cos(x), np.sin(y), np.cos(y)]
                expected[row * columns + column, i :: width // 4] = quarters
    torch.testing.assert_close(position_table(width, rows, columns), torch.from_numpy(expected).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_timestep_embedding_formula(dtype: torch.dtype) -> None:
    embedding = TimestepEmbedding(256)
    first, activation, second = embedding.mlp
    assert isinstance(activation, nn.SiLU)
    t = torch.tensor([0, 1, 250, 999])
    angles = t.numpy()[:, None] * 10000.0 ** (-np.arange(128) / 128)
    sinusoids = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1)).float()
    expected = second(nn.functional.silu(first(sinusoids)))
    torch.testing.assert_close(embedding(t.to(dtype)), expected, rtol=1e-4, atol=1e-4)
    known = torch.tensor([1.0, 250.0])  # in 8 bits, too
    torch.testing.assert_close(embedding(known.bfloat16()), embedding(known), rtol=1e-6, atol=1e-6)


def test_time_keeps_its_precision_in_bfloat16() -> None:
    model = tiny().bfloat16()
    fill(model.parameters())
    x, _, y = batch(dtype=torch.bfloat16)
    output = model(x, torch.tensor([998.0, 999.0]), y)  # both are 1000 in bfloat16
    assert output.dtype == torch.bfloat16
    same_time = model(x, torch.tensor([999.0, 999.0]), y)
    assert not torch.equal(output[0], same_time[0])
    assert torch.equal(output[1], same_time[1])


def test_attention_equals_torch() -> None:
    attention, reference = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = attention.qkv.weight.data, attention.qkv.bias.data
    reference.out_proj.load_state_dict(attention.proj.state_dict())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(x), reference(x, x, x)[0])


def test_cross_attention_equals_torch() -> None:
    attention, reference = CrossAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    reference.in_proj_weight.data = torch.cat([attention.q.weight.data, attention.kv.weight.data])
    reference.in_proj_bias.data = torch.cat([attention.q.bias.data, attention.kv.bias.data])
    reference.out_proj.load_state_dict(attention.proj.state_dict())
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 3, 16, generator=generator)
    torch.testing.assert_close(attention(x, c), reference(x, c, c)[0])


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_published_initialisation(conditioning: Any) -> None:
    torch.manual_seed(0)
    model = tiny(conditioning=conditioning, width=64, num_classes=100)
    for name, parameter in model.named_parameters():
        zero = "bias" in name or name == "final_layer.linear.weight"
        if zero or (conditioning == "adaln-zero" and "adaLN_modulation" in name):
            assert not parameter.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones(64)), name
        else:  # uniform within Xavier's bound, which the largest of many draws comes close to
            bound = (6 / (parameter.shape[0] + parameter[0].numel())) ** 0.5
            assert 0.98 * bound < parameter.abs().max().item() <= bound, name


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_output_is_zero_at_first(conditioning: Any) -> None:
    assert not tiny(conditioning=conditioning)(*batch()).any()


def test_adaln_zero_blocks_are_the_identity_at_first() -> None:
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 4, 16, generator=generator), torch.randn(2, 1, 16, generator=generator)
    for block in tiny().blocks:
        assert torch.equal(block(x, block.adaLN_modulation(c)), x)


def test_adaln_equals_adaln_zero_with_gates_of_one() -> None:
    plain, gated = tiny(conditioning="adaln"), tiny()
    fill(plain.parameters())
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            source = plain.get_parameter(name)
            if parameter.shape == source.shape:
                parameter.copy_(source)
            else:  # four regressed vectors against six: shift, scale, (gate), shift, scale, (gate)
                shift1, scale1, shift2, scale2 = source.chunk(4)
                gate = torch.zeros_like(shift1) if name.endswith("weight") else torch.ones_like(shift1)
                parameter.copy_(torch.cat([shift1, scale1, gate, shift2, scale2, gate]))
    torch.testing.assert_close(gated(*batch()), plain(*batch()))


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_time_and_class_reach_the_output(conditioning: Any) -> None:
    model = tiny(conditioning=conditioning)
    fill(model.parameters())
    x, t, y = batch()
    output = model(x, t, y)
    later, null = model(x, t + torch.tensor([1.0, 0.0]), y), model(x, t, torch.tensor([3, 3]))
    for changed in (later, null):
        assert not torch.allclose(changed[0], output[0])
        torch.testing.assert_close(changed[1], output[1])


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_unconditional(conditioning: Any) -> None:
    model = tiny(conditioning=conditioning, num_classes=0)
    fill(model.parameters())
    x, t, _ = batch()
    assert not any("y_embedder" in name for name in model.state_dict())
    assert model(x, t).shape == (2, 4, 4, 4)
    assert not torch.allclose(model(x, t + 1), model(x, t))


def test_null_class_is_one_more_row() -> None:
    labels = LabelEmbedding(3, 16)
    assert labels.embedding_table.weight.shape == (4, 16)
    assert torch.equal(labels(torch.tensor([3]))[0], labels.embedding_table.weight[3])


def test_rectangular_input() -> None:
    """An output patch is in its input patch's place: where nothing tells positions apart, both move together."""
    model = tiny(input_size=(4, 8))
    fill(model.parameters())
    model.pos_embed.zero_()
    x, t, y = batch(4, 8)
    output = model(x, t, y)
    assert output.shape == (2, 4, 4, 8)
    torch.testing.assert_close(model(x.roll((2, 4), (2, 3)), t, y), output.roll((2, 4), (2, 3)))


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_a_clip_is_one_sequence_of_all_frames(conditioning: Any) -> None:
    """Frames one below the other are an image of the same tokens; only the table of positions is another."""
    clips, tall = tiny(frames=3, conditioning=conditioning), tiny(input_size=(12, 4), conditioning=conditioning)
    for model in (clips, tall):
        fill(model.parameters())
    angle = torch.arange(3, dtype=torch.float64).unsqueeze(1) * 10_000 ** (-torch.arange(8) / 8)
    in_time = torch.cat([angle.sin(), angle.cos()], dim=1).repeat_interleave(4, dim=0)
    torch.testing.assert_close(clips.pos_embed[0].double(), position_table(16, 2, 2).repeat(3, 1).double() + in_time)
    tall.pos_embed = clips.pos_embed
    x, t, y = batch(12, 4)
    frames = x.unflatten(2, (3, 4)).transpose(1, 2)
    output, features = clips.forward_features(frames, t, y, torch.ones(2, 3, 16, 2, 2))
    expected, maps = tall.forward_features(x, t, y, torch.ones(2, 16, 6, 2))
    torch.testing.assert_close(output, expected.unflatten(2, (3, 4)).transpose(1, 2))
    torch.testing.assert_close(features, maps.unflatten(2, (3, 2)).transpose(1, 2))
    with pytest.raises(MezzotintError, match=r"expected \(B, 3, 2, 4, 4\); resize it or .* in_channels and frames"):
        clips(x, t, y)


def test_a_token_of_several_frames() -> None:
    """Tubelets are a convolution over time and space; from there on, their frames are so many more channels."""
    clips = tiny(frames=6, tubelet_size=2)
    channels = tiny(frames=3, in_channels=4, out_channels=8)
    for model in (clips, channels):
        fill(model.parameters())
    x, t, y = batch(4, 4 * 6)
    x = x.unflatten(3, (6, 4)).permute(0, 3, 1, 2, 4).contiguous()  # (2, 6, 2, 4, 4)
    features = torch.randn(2, 6, 8, 2, 2, generator=torch.Generator().manual_seed(3))
    output, maps = clips.forward_features(x, t, y, features)
    assert (output.shape, maps.shape, clips.feature_channels) == ((2, 6, 4, 4, 4), features.shape, 8)
    expected, wide = channels.forward_features(x.reshape(2, 3, 4, 4, 4), t, y, features.reshape(2, 3, 16, 2, 2))
    torch.testing.assert_close(output, expected.reshape(2, 6, 4, 4, 4))
    torch.testing.assert_close(maps, wide.reshape(2, 6, 8, 2, 2))

    kernel = clips.x_embedder.proj.weight.unflatten(1, (2, 2)).transpose(1, 2)  # (width, channels, frames, p, p)
    tokens = F.conv3d(x.transpose(1, 2), kernel, clips.x_embedder.proj.bias, stride=(2, 2, 2))
    found: list[Tensor] = []
    clips.x_embedder.register_forward_hook(lambda *arguments: found.append(arguments[-1]))
    clips(x, t, y)
    torch.testing.assert_close(found[0].view(2, 12, 16), tokens.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("frames", "tubelet_size"), [(0, 2), (6, 4), (6, 3), (6, 0)])
def test_tubelets_that_do_not_fit(frames: int, tubelet_size: int) -> None:
    with pytest.raises(MezzotintError, match=rf"{tubelet_size} must divide the frames \({frames}\) and the width \(16"):
        tiny(frames=frames, tubelet_size=tubelet_size)


def test_attributes() -> None:
    model = tiny(out_channels=None, input_size=(4, 8))
    assert (model.in_channels, model.out_channels, model.input_size, model.num_classes) == (2, 2, (4, 8), 3)


def test_configs() -> None:
    assert len(DIT_CONFIGS) == 12
    assert DIT_CONFIGS["dit-xl-2"] == {"depth": 28, "width": 1152, "heads": 16, "patch_size": 2}


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_compiles_without_graph_breaks(conditioning: Any) -> None:
    model = tiny(conditioning=conditioning, depth=1)
    fill(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch()), model(*batch()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": "adaln-one"}, "conditioning 'adaln-one' is unknown; closest: adaln"),
        ({"patch_size": 3}, "input size 4×4 cannot be cut into patches of 3; use multiples of 3"),
        ({"heads": 3}, "width 16 cannot be split into 3 heads; use a multiple of 3"),
        ({"width": 18}, "width 18 cannot hold a sine-cosine position table; use a multiple of 4"),
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
