"""The UNet of MDM: conditioning, attention, frames, its place inside another network. test_mdm_checkpoints.py has the
official network's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.unet import EmbeddedCondition, ResNet, SpatialAttention, TemporalAttention, UNet
from mezzotint.conditions.text import Text, byte_tokens
from mezzotint.errors import MezzotintError

T = torch.tensor([3.0, 700.0])


def tiny(**changes: Any) -> UNet:
    options: dict[str, Any] = {
        "input_size": 8,
        "in_channels": 2,
        "channels": (16, 32),
        "resblocks": (1, 2),
        "attention": (0, 1),
        "heads": 4,
    }
    torch.manual_seed(0)
    return UNet(**options | changes).eval()


def dense(module: Any, dtype: torch.dtype = torch.float32) -> Any:
    """With every parameter drawn at random, those that start at zero, too."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return module.to(dtype)


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 2, 8, 8)), generator=torch.Generator().manual_seed(1))


def captions(length: int = 4, features: int = 6) -> Text:
    """Of 4 and 2 tokens."""
    mask = torch.arange(length) < torch.tensor([[4], [2]])
    tokens = torch.zeros(2, length, features)
    tokens[:, :4] = images(2, 4, features)
    return Text(tokens * mask.unsqueeze(-1), mask)


# ------------------------------------------------------------------------------------------------------- its parts


def test_a_resnet_block_is_film_inside_a_residual() -> None:
    block = dense(ResNet(8, 16, 12, groups=4, dropout=0.0), torch.float64)
    x, embedding = images(2, 8, 5, 6).double(), images(2, 12).double()
    h = F.conv2d(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias)), *block.conv1.parameters(), padding=1)
    scale, shift = (embedding @ block.time_layer.weight.T + block.time_layer.bias).view(2, 32, 1, 1).split(16, dim=1)
    h = F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias) * (1 + scale) + shift)
    expected = F.conv2d(x, *block.conv3.parameters()) + F.conv2d(h, *block.conv2.parameters(), padding=1)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("frames", [1, 3])
def test_spatial_attention_adds_two_softmaxes(masked: bool, frames: int) -> None:
    layer = dense(SpatialAttention(8, heads=2, text_width=6, groups=4, feed_forward=True), torch.float64)
    x, text = images(2 * frames, 8, 3, 2).double(), captions()
    tokens = text.tokens.double()
    got = layer(x, EmbeddedCondition(None, None, tokens, text.mask[:, None, None] if masked else None))

    expected = []
    for i in range(2 * frames):
        caption = i // frames
        h = F.group_norm(x[i : i + 1], 4, layer.norm.weight, layer.norm.bias)[0].flatten(1).T
        q, k, v = (h @ layer.qkv.weight.T + layer.qkv.bias).split(8, dim=1)
        known = tokens[caption, text.mask[caption]] if masked else tokens[caption]
        known = F.layer_norm(known, (6,), layer.norm_cond.weight, layer.norm_cond.bias)
        k_cond, v_cond = (known @ layer.kv_cond.weight.T + layer.kv_cond.bias).split(8, dim=1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            own = (q[:, part] @ k[:, part].T / 2).softmax(1) @ v[:, part]
            heads.append(own + (q[:, part] @ k_cond[:, part].T / 2).softmax(1) @ v_cond[:, part])
        y = x[i].flatten(1).T + torch.cat(heads, 1) @ layer.proj.weight.T + layer.proj.bias
        h = F.group_norm(y.T.view(1, 8, 3, 2), 4, layer.norm_ffn.weight, layer.norm_ffn.bias)[0].flatten(1).T
        first, _, second = layer.ffn
        h = h @ first.weight.T + first.bias
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        expected.append((y + h @ second.weight.T + second.bias).T.view(8, 3, 2))
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_temporal_attention_sees_one_position_in_all_frames() -> None:
    layer = dense(TemporalAttention(8, heads=1, frames=3), torch.float64)
    x = images(2 * 3, 8, 2, 2).double()
    got = layer(x).view(2, 3, 8, 2, 2)
    for b, row, column in ((0, 0, 0), (1, 1, 0)):
        clip = x.view(2, 3, 8, 2, 2)[b, :, :, row, column]
        angles = torch.outer(torch.arange(3.0), 10_000 ** -(torch.arange(4.0) / 4)).double()
        h = F.layer_norm(clip, (8,), layer.norm.weight, layer.norm.bias) + torch.cat([angles.sin(), angles.cos()], 1)
        q, k, v = (h @ layer.attn.qkv.weight.T + layer.attn.qkv.bias).split(8, dim=1)
        h = (q @ k.T / math.sqrt(8)).softmax(1) @ v
        expected = clip + h @ layer.attn.proj.weight.T + layer.attn.proj.bias
        torch.testing.assert_close(got[b, :, :, row, column], expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the network


def test_starts_at_zero_and_every_parameter_learns() -> None:
    network = tiny(
        text_features=6, text_width=12, feed_forward=True, micro_scale=8.0, frames=2, temporal_attention=True
    )
    x = images(2, 2, 2, 8, 8)
    assert torch.equal(network(x, T, captions()), torch.zeros_like(x))
    dense(network)(x, T, captions()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_attributes_and_shapes() -> None:
    network = dense(tiny(input_size=(8, 4), in_channels=3, out_channels=6))
    assert (network.input_size, network.in_channels, network.out_channels) == ((8, 4), 3, 6)
    assert (network.num_classes, network.text_features, network.in_shape) == (0, None, (3, 8, 4))
    assert (network.feature_channels, network.feature_stride) == (16, (1, 1))
    x = images(2, 3, 8, 4)
    assert network(x, T).shape == (2, 6, 8, 4)
    assert torch.equal(network(x, T, torch.tensor([1, 2])), network(x, T))  # it looks at no label
    assert not torch.equal(network(x, T + 1), network(x, T))
    one = network(x[1:], T[1:])
    torch.testing.assert_close(network(x, T)[1:], one)


@torch.no_grad()
def test_features_are_added_behind_the_input_layer() -> None:
    network = dense(tiny(), torch.float64)
    x = images().double()
    shift = images(16).double()
    output, features = network.forward_features(x, T, None, shift.view(1, 16, 1, 1).expand(2, 16, 8, 8))
    torch.testing.assert_close(output, network.output(features))
    network.conv_in.bias += shift
    torch.testing.assert_close(output, network(x, T), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_classes_without_any_cross_attention() -> None:
    network = dense(tiny(num_classes=3))
    assert not [name for name, _ in network.named_parameters() if "cond" in name]
    x = images()
    outputs = [network(x, T, torch.tensor([y, y])) for y in range(4)]
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])
    mixed = network(x, T, torch.tensor([0, 3]))
    torch.testing.assert_close(mixed, torch.stack([outputs[0][0], outputs[3][1]]))


@torch.no_grad()
def test_captions_of_features_and_of_bytes() -> None:
    x = images()
    network = dense(tiny(text_features=6, text_width=12))
    output = network(x, T, captions())
    assert not torch.allclose(output, network(x, T, captions()[torch.tensor([1, 0])]))
    torch.testing.assert_close(output, network(x, T, captions(length=9)))  # padding is not looked at
    unmasked = dense(tiny(text_features=6, text_width=12, masked_text=False))
    assert not torch.allclose(unmasked(x, T, captions()), unmasked(x, T, captions(length=9)))
    network = dense(tiny(text_features=0, text_width=32))
    first, second = (network(x, T, byte_tokens(["a cat", word], 12)) for word in ("dog", "dogs"))
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


@torch.no_grad()
def test_micro_conditioning() -> None:
    network = tiny(micro_scale=8.0)
    x, large = images(), torch.tensor([8.0, 900.0])
    dense(network)
    assert torch.equal(network(x, T, scale=large), network(x, T))
    small = network(x, T, scale=torch.tensor([8.0, 4.0]))
    torch.testing.assert_close(small[0], network(x, T)[0])
    assert not torch.allclose(small[1], network(x, T)[1])


@torch.no_grad()
def test_frames_are_images_until_they_attend_to_each_other() -> None:
    options: dict[str, Any] = {"text_features": 6, "text_width": 12}
    film = tiny(frames=3, temporal_attention=(0, 1), **options)
    picture = dense(tiny(**options))
    clips = images(2, 3, 2, 8, 8)
    missing, extra = film.load_state_dict(picture.state_dict(), strict=False)
    assert not extra
    assert {name.split(".")[2] for name in missing} == {"temporal"}
    output = film(clips, T, captions())
    assert output.shape == clips.shape
    for frame in range(3):
        torch.testing.assert_close(output[:, frame], picture(clips[:, frame], T, captions()))
    dense(film)
    assert not torch.allclose(film(clips.flip(1), T, captions()).flip(1), film(clips, T, captions()))
    x, features = film.forward_features(clips, T, captions(), torch.zeros(2, 3, 16, 8, 8))
    assert torch.equal(x, film(clips, T, captions()))
    assert features.shape == (2, 3, 16, 8, 8)


@pytest.mark.parametrize("options", [{}, {"channels": (48, 40), "heads": 8}, {"groups": 1}, {"middle": False}])
@torch.no_grad()
def test_groups_fit_any_width(options: dict[str, Any]) -> None:
    network = dense(tiny(**options))
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert all(norm.num_groups == math.gcd(norm.num_channels, options.get("groups", 32)) for norm in norms)
    assert network(images(), T).isfinite().all()


@torch.no_grad()
def test_memory_formats_and_precisions() -> None:
    network = dense(tiny(num_classes=3))
    x, y = images(), torch.tensor([0, 3])
    expected = network(x, T, y)
    last = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last), T, y), expected)
    half = network.to(torch.bfloat16)(x, T, y)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_compiles_whole() -> None:
    small: dict[str, Any] = {"channels": (16, 16), "resblocks": (1, 1), "middle": False}
    captioned: dict[str, Any] = {"text_features": 6, "text_width": 12, "micro_scale": 8.0}
    network = dense(tiny(**small, **captioned, frames=2, temporal_attention=(0, 1)))
    x = images(2, 2, 2, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, T, captions()), network(x, T, captions()))


def test_dropout_acts_in_training_only() -> None:
    network = dense(tiny(dropout=0.5))
    x = images()
    assert torch.equal(network(x, T), network(x, T))
    network.train()
    assert not torch.equal(network(x, T), network(x, T))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"resblocks": (1,)}, r"resblocks \[1\] does not have one number for each of the 2 levels"),
        ({"attention": (0, 1, 1)}, r"attention \[0, 1, 1\] does not have one number"),
        ({"frames": 2, "temporal_attention": (1,)}, r"temporal_attention \[1\] does not have one number"),
        ({"resblocks": (0, 1)}, "leaves a level without a ResNet block"),
        ({"input_size": (8, 7)}, "input size 8×7 cannot be halved 1 times for 2 levels; use multiples of 2"),
        ({"heads": 5}, "width 32 cannot be split into 5 heads; use a multiple of 5"),
        ({"num_classes": 3, "text_features": 6}, "either class labels or captions"),
    ],
)
def test_networks_that_mean_nothing(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        tiny(**options)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(MezzotintError, match=r"shape \(2, 2, 4, 4\), expected \(B, 2, 8, 8\); resize it"):
        tiny()(images(2, 2, 4, 4), T)
    with pytest.raises(MezzotintError, match=r"expected \(B, 3, 2, 8, 8\)"):
        tiny(frames=3)(images(), T)
    with pytest.raises(MezzotintError, match=r"class labels are missing; pass y \(B,\), with 3 where"):
        tiny(num_classes=3)(images(), T)
    with pytest.raises(MezzotintError, match="captions are missing"):
        tiny(text_features=6)(images(), T)
    with pytest.raises(MezzotintError, match="captions are bytes, but the network was built for features of width 6"):
        tiny(text_features=6)(images(), T, byte_tokens(["a", "b"], 3))
