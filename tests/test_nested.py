"""Nested networks: packed pyramids, the inner network's exact place, other backbones inside, frames."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.backbones import DiT
from mezzotint.backbones.nested import MDM_CONFIGS, NestedUNet, nest, pack, unpack
from mezzotint.backbones.unet import UNet
from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError

T = torch.tensor([3.0, 700.0])


class Tokens(nn.Module):
    """A backbone that is no UNet: one feature for every 2 × 4 pixels, labels of its own."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 2
        self.input_size = (4, 8)
        self.num_classes = num_classes
        self.feature_channels, self.feature_stride = 12, (2, 4)
        self.enter = nn.Conv2d(2, 12, (2, 4), stride=(2, 4))
        self.label = nn.Embedding(num_classes + 1, 12)
        self.leave = nn.ConvTranspose2d(12, 2, (2, 4), stride=(2, 4))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward_features(x, t, y, None)[0]

    def forward_features(self, x: Tensor, t: Tensor, y: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.enter(x) if features is None else self.enter(x) + features
        h = torch.tanh(h + (self.label(y) * t.view(-1, 1) / 1000)[:, :, None, None])
        return self.leave(h), h


class Film(nn.Module):
    """A video backbone of 2 frames that hands on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = self.out_channels = 1
        self.input_size, self.frames, self.num_classes = (4, 4), 2, 0
        self.in_shape = (2, 1, 4, 4)
        self.feature_channels, self.feature_stride = 8, (1, 1)

    def forward_features(self, x: Tensor, t: Tensor, y: None, features: Tensor) -> tuple[Tensor, Tensor]:
        self.given = features
        return x, torch.arange(1.0, 3).view(1, 2, 1, 1, 1).expand_as(features)


def small(**changes: Any) -> UNet:
    options: dict[str, Any] = {
        "input_size": 4,
        "in_channels": 2,
        "channels": (16, 16),
        "resblocks": (1, 1),
        "attention": (0, 1),
        "heads": 4,
    }
    return UNet(**options | changes)


def around(inner: nn.Module, **changes: Any) -> NestedUNet:
    return NestedUNet(inner, **{"channels": (8, 16), "resblocks": (1, 1), "heads": 4} | changes).eval()


def dense(module: Any, *, adapters: bool = True) -> Any:
    """With every parameter drawn at random, those that start at zero, too; `adapters` False: but the adapters'."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            values = scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
            if adapters or "adapter" not in name:
                parameter.copy_(values)
    return module.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def captions(width: int = 6) -> Text:
    return Text(noise(2, 3, width), torch.tensor([[True, True, True], [True, False, False]]))


def test_pack_and_unpack() -> None:
    levels = [noise(2, 3, 4, 4), noise(2, 3, 8, 8), noise(2, 5, 3, 16, 16)]
    shapes = [level.shape[1:] for level in levels]
    x = pack(levels)
    assert x.shape == (2, 48 + 192 + 3840)
    for level, back in zip(levels, unpack(x, shapes), strict=True):
        assert torch.equal(level, back)
        assert back.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert [tuple(level.shape) for level in unpack(x[:, :240], shapes)] == [(2, 3, 4, 4), (2, 3, 8, 8)]
    for other in (x[:, :239], x[:, :0], x[0], levels[0]):
        with pytest.raises(MezzotintError, match=r"expected \(B, 48\) or \(B, 240\) or \(B, 4080\): the flattened"):
            unpack(other, shapes)


@pytest.mark.parametrize(
    ("name", "count"), [("mdm-64", 461_359_107), ("mdm-256", 476_613_958), ("mdm-1024", 480_970_057)]
)
def test_published_networks(name: str, count: int) -> None:
    with torch.device("meta"):
        network = nest(MDM_CONFIGS[name])
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    side = int(name.split("-")[1])
    assert network.input_size == (side, side)
    if isinstance(network, NestedUNet):
        assert network.level_shapes[-1] == (3, side, side)
        assert network.in_shape == (sum(3 * 64**2 * 16**k for k in range(len(network.level_shapes))),)


def test_the_innermost_level_may_be_changed() -> None:
    levels: list[Any] = [
        {"input_size": 4, "channels": (8,), "resblocks": (1,), "text_features": 6, "masked_text": False},
        {"channels": (8, 8), "resblocks": (1, 1), "micro_scale": 8.0},
    ]
    network = nest(levels, text_features=None, num_classes=3, in_channels=1)
    assert (network.num_classes, network.text_features, network.in_channels) == (3, None, 1)
    assert network.embed_condition(torch.tensor([3])).tokens is None


# ------------------------------------------------------------------------------------------ the inner network's place


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", [{"num_classes": 3}, {"text_features": 6, "text_width": 10}])
@torch.no_grad()
def test_growing_leaves_the_inner_network_as_it_is(depth: int, options: dict[str, Any]) -> None:
    network: Any = small(**options)
    for _ in range(depth):
        network = around(network)
    dense(network, adapters=False)
    inner = network.inner if depth == 1 else network.inner.inner
    y = captions() if "text_features" in options else torch.tensor([1, 3])
    x = noise(2, *network.in_shape)
    levels, outputs = (unpack(tensor, network.level_shapes) for tensor in (x, network(x, T, y)))
    assert torch.equal(outputs[0], inner(levels[0], T, y))
    for k in range(1, depth + 2):  # a part of the pyramid: only its networks run
        part = network(pack(levels[:k]), T, y)
        torch.testing.assert_close(part, pack(outputs[:k]))
    dense(network)
    low = unpack(network(x, T, y), network.level_shapes)[0]
    assert not torch.allclose(low, inner(levels[0], T, y))
    assert torch.equal(network(x[:, :32], T, y), inner(levels[0], T, y).flatten(1))


def test_every_parameter_learns_and_everything_starts_at_zero() -> None:
    network = around(around(small(text_features=6, text_width=10)), attention=(0, 1), micro_scale=16.0)
    x = noise(2, *network.in_shape)
    assert torch.equal(network(x, T, captions()), torch.zeros_like(x))
    dense(network)(x, T, captions()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_labels_and_captions_reach_all_levels() -> None:
    network = dense(around(small(num_classes=3)), adapters=False)  # what the top level knows, it knows by itself
    x = noise(2, *network.in_shape)
    first, second = (network(x, T, torch.tensor([1, y]))[:, 32:] for y in (1, 2))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    network = dense(around(small(text_features=6, text_width=10), attention=(0, 1)), adapters=False)
    unlike = Text(captions().tokens.roll(1, dims=1), captions().mask)  # for the first, another order of the tokens
    first, second = (network(x, T, y)[:, 32:] for y in (captions(), unlike))
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


@torch.no_grad()
def test_the_inner_features_come_back() -> None:
    network = dense(around(small()))
    x = noise(2, *network.in_shape)
    before = network(x, T)
    network.out_adapter.weight.zero_()
    after = network(x, T)
    assert torch.equal(before[:, :32], after[:, :32])
    assert not torch.allclose(before[:, 32:], after[:, 32:])


@torch.no_grad()
def test_normalised_input() -> None:
    x = noise(2, 160)
    large = torch.cat([x[:, :32], 5 * x[:, 32:]], dim=1)
    network = dense(around(small(), normalise_input=True))
    torch.testing.assert_close(network(large, T), network(x, T))
    unlike = dense(around(small()))
    assert not torch.allclose(unlike(large, T), unlike(x, T))
    one = x[:, 32:] / x[:, 32:].std(dim=1, keepdim=True)
    torch.testing.assert_close(network(x, T), unlike(torch.cat([x[:, :32], one], dim=1), T))


@torch.no_grad()
def test_scales_of_images() -> None:
    network = dense(around(small(micro_scale=4.0), micro_scale=8.0))
    x = noise(2, 160)
    assert torch.equal(network(x, T, scale=torch.tensor([8.0, 9.0])), network(x, T))
    low = network(x[:, :32], T)
    assert torch.equal(network(x[:, :32], T, scale=torch.tensor([5.0, 4.0])), low)
    assert not torch.allclose(network(x[:, :32], T, scale=torch.tensor([3.0, 4.0]))[0], low[0])


# ------------------------------------------------------------------------------------------------- other backbones


@torch.no_grad()
def test_another_backbone_inside() -> None:
    network = dense(around(Tokens()), adapters=False)
    assert network.level_shapes == ((2, 4, 8), (2, 8, 16))
    assert (network.num_classes, network.text_features, network.in_channels) == (3, None, 2)
    x, y = noise(2, *network.in_shape), torch.tensor([1, 3])
    low, _ = unpack(x, network.level_shapes)
    expected = network.inner(low, T, y).flatten(1)
    assert torch.equal(network(x, T, y)[:, :64], expected)
    assert torch.equal(network(x[:, :64], T, y), expected)
    other = network(x, T, torch.tensor([1, 2]))[:, 64:]  # the outer level reads labels, too
    torch.testing.assert_close(other[0], network(x, T, y)[0, 64:])
    assert not torch.allclose(other[1], network(x, T, y)[1, 64:])
    dense(network)
    assert not torch.allclose(network(x, T, y)[:, :64], network.inner(low, T, y).flatten(1))
    outermost = dense(around(network))
    x = noise(2, *outermost.in_shape)
    assert outermost(x, T, y, scale=T).shape == x.shape
    assert torch.equal(outermost(x[:, :320], T, y), network(x[:, :320], T, y))


@torch.no_grad()
def test_adapters_of_patches_see_one_patch_each() -> None:
    network = dense(around(Tokens()))
    h, features = noise(2, 16, 4, 8), noise(2, 12, 2, 2)
    weight, bias = network.in_adapter.parameters()
    patch = h[1, :, 2:4, 4:8]
    torch.testing.assert_close(network.in_adapter(h)[1, :, 1, 1], (weight * patch).sum((1, 2, 3)) + bias)
    weight, bias = network.out_adapter.parameters()
    expected = torch.einsum("i,iopq->opq", features[1, :, 0, 1], weight) + bias[:, None, None]
    torch.testing.assert_close(network.out_adapter(features)[1, :, 0:2, 4:8], expected)


# --------------------------------------------------------------------------------------------------------- video


@torch.no_grad()
def test_low_resolutions_with_a_condition_embedded_ahead() -> None:
    """As guidance embeds it, once for all steps: whatever the network inside is."""
    dit = DiT(input_size=4, patch_size=2, in_channels=3, width=16, depth=1, heads=2, num_classes=5)
    y = torch.tensor([3, 5])
    for network in (dense(around(dit)), dense(around(small(num_classes=5)))):
        x = noise(2, *network.in_shape)
        for count in (math.prod(network.level_shapes[0]), x.shape[1]):
            expected = network(x[:, :count], T, y)
            assert torch.equal(network(x[:, :count], T, network.embed_condition(y)), expected)


@torch.no_grad()
def test_more_frames_outside_than_inside() -> None:
    network = dense(around(Film(), frames=6, channels=(8, 8)))
    assert network.level_shapes == ((2, 1, 4, 4), (6, 1, 8, 8))
    x = noise(2, *network.in_shape)
    network(x, T)
    embedding = network.embed_time(T, network.embed_condition(None), None)
    film = unpack(x, network.level_shapes)[1]
    deepest = network.encode(film.flatten(0, 1), None, embedding, network.embed_condition(None))[-1]
    means = deepest.view(2, 2, 3, 8, 4, 4).mean(2).flatten(0, 1)
    torch.testing.assert_close(network.inner.given, network.in_adapter(means).view(2, 2, 8, 4, 4))
    back = network._from_inner(network.inner.given).view(2, 6, 8, 4, 4)
    for frame in range(6):
        torch.testing.assert_close(back[:, frame], network.out_adapter(network.inner.given[:, frame // 3]))


@torch.no_grad()
def test_video_of_unets() -> None:
    inner = small(frames=2, temporal_attention=(0, 1), text_features=6, text_width=10)
    network = dense(around(inner, frames=4, temporal_attention=True), adapters=False)
    x = noise(2, *network.in_shape)
    low = unpack(x, network.level_shapes)[0]
    output = network(x, T, captions())
    assert output.shape == x.shape == (2, 2 * 2 * 16 + 4 * 2 * 64)
    assert torch.equal(output[:, :64], inner(low, T, captions()).flatten(1))
    assert around(inner).frames == 2


@torch.no_grad()
def test_tubelets_are_frames_of_more_channels() -> None:
    """Two frames as one: the network of half the frames and twice the channels, with the same weights."""
    inner: dict[str, Any] = {"temporal_attention": (0, 1), "text_features": 6, "text_width": 10}
    network = dense(around(small(frames=4, tubelet_size=2, **inner), frames=4, tubelet_size=2, temporal_attention=True))
    wide = around(small(in_channels=4, frames=2, **inner), temporal_attention=True)
    wide.load_state_dict(network.state_dict())
    x = noise(2, *network.in_shape)
    low, high = unpack(x, network.level_shapes)
    given = pack([low.reshape(2, 2, 4, 4, 4), high.reshape(2, 2, 4, 8, 8)])
    assert given.equal(x)  # frames and channels stand side by side as they are
    torch.testing.assert_close(network(x, T, captions()), wide(given, T, captions()))
    features = noise(2, 4, 4, 8, 8)
    output, found = network.forward_features(x, T, captions(), features)
    expected, maps = wide.forward_features(given, T, captions(), features.reshape(2, 2, 8, 8, 8))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found, maps.reshape(2, 4, 4, 8, 8))


@torch.no_grad()
@pytest.mark.parametrize(("frames", "tubelets"), [((2, 4), (1, 2)), ((4, 4), (2, 2)), ((4, 4), (2, 1))])
def test_a_tubelet_meets_its_own_time_inside(frames: tuple[int, int], tubelets: tuple[int, int]) -> None:
    """Where nothing else joins the frames, only those outside of the first half change the first half inside."""
    network = dense(
        around(small(frames=frames[0], tubelet_size=tubelets[0]), frames=frames[1], tubelet_size=tubelets[1])
    )
    x = noise(2, *network.in_shape)
    low, high = (level.clone() for level in unpack(x, network.level_shapes))
    high[:, frames[1] // 2 :] += 1
    before, after = (unpack(network(each, T), network.level_shapes) for each in (x, pack([low, high])))
    for was, now in zip(before, after, strict=True):
        half = was.shape[1] // 2
        torch.testing.assert_close(was[:, :half], now[:, :half])
        assert not torch.allclose(was[:, half:], now[:, half:])


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("inner", "options", "sentence"),
    [
        (
            small(),
            {"input_size": 16},
            "16×16 does not nest around 4×4: 2 levels of channels make it 2 times as large; ",
        ),
        (small(), {"input_size": (8, 4)}, "8×4 does not nest around 4×4.*use 8×8 or another number of levels"),
        (small(), {"time_width": 32}, "time_width 32 is not the inner network's 64"),
        (small(), {"frames": 2}, "2 frames do not nest around 0; use a multiple, or build both with frames"),
        (small(frames=4), {"frames": 6}, "6 frames do not nest around 4; use a multiple"),
        (
            small(frames=4),
            {"frames": 4, "tubelet_size": 2},
            "4 frames in tubelets of 2 do not nest around 4 in tubelets of 1; make them as many tubelets",
        ),
        (small(), {"tubelet_size": 2}, r"tubelet_size 2 must divide the frames \(0\)"),
        (
            small(frames=2),
            {"frames": 6, "tubelet_size": 3, "channels": (8, 16)},
            "3 must divide .* the width .8.; images",
        ),
        (small(out_channels=4), {}, "the inner network has 2 channels in and 4 out"),
        (small(), {"resblocks": (1,)}, r"resblocks \[1\] does not have one number"),
    ],
)
def test_networks_that_do_not_nest(inner: nn.Module, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        around(inner, **options)


def test_inputs_that_are_no_pyramid() -> None:
    network = around(small())
    assert around(small(), input_size=8).input_size == network.input_size == (8, 8)
    for x in (noise(2, 33), noise(2, 2, 8, 8)):
        with pytest.raises(MezzotintError, match=r"expected \(B, 32\) or \(B, 160\)"):
            network(x, T)
    with pytest.raises(MezzotintError, match="features need all 2 levels, not 1"):
        network.forward_features(noise(2, 32), T)


@torch.no_grad()
def test_compiles_whole() -> None:
    inner = small(channels=(16,), resblocks=(1,), attention=(1,), middle=False, text_features=6, text_width=10)
    network = dense(around(inner, channels=(8, 8), normalise_input=True, micro_scale=8.0))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(noise(2, 160), T, captions()), network(noise(2, 160), T, captions()))


@pytest.mark.parametrize("masked", [True, False])
def test_a_level_around_a_transformer_attends_to_padding_where_told(masked: bool) -> None:
    inner = DiT(input_size=4, patch_size=2, in_channels=1, width=16, depth=1, heads=2, text_features=6)
    sizes: dict[str, Any] = {"channels": (8, 8), "resblocks": (1, 1), "attention": (0, 1), "heads": 2, "groups": 4}
    network = NestedUNet(inner, **sizes, masked_text=masked).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    tokens, mask = torch.randn(2, 3, 6, generator=generator), torch.tensor([[True, True, False]] * 2)
    x = torch.randn(2, *network.in_shape, generator=generator)
    other = torch.where(mask.unsqueeze(-1), tokens, tokens + 1)
    with torch.no_grad():
        one, two = (network(x, T, Text(some, mask)) for some in (tokens, other))
    assert torch.equal(one, two) == masked
