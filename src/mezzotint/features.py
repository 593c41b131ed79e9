"""What a network makes of images on the way: features of its layers, averaged over positions.

>>> found = pooled_features(denoiser, x, 0.01, ["6", "12"])
>>> found["12"].shape                                              # (B, width)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from mezzotint.backbones.layers import Layer
from mezzotint.conditions.text import Text
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError, expect, shortened


def layers_of(denoiser: Denoiser, names: str | int | Sequence[str | int] = ()) -> dict[str, Layer]:
    """The network's layers `names`, by name, in order of execution; none named: all.

    A number counts them from 1 in that order, so that of a transformer k is its first k blocks. Raises `MezzotintError`
    for one that the network does not have, and for a network whose layers have no names.
    """
    layers = getattr(denoiser.backbone, "layers", None)
    if not isinstance(layers, dict):
        raise MezzotintError(
            f"the network {denoiser.backbone._get_name()} does not name its layers, so their features cannot be asked "
            "for; give it an attribute layers, a dict from names to mezzotint.backbones.layers.Layer as they run"
        )
    return {name: layers[name] for name in chosen_layers(list(layers), names)}


def chosen_layers(order: Sequence[str], names: str | int | Sequence[str | int] = ()) -> list[str]:
    """`layers_of`, of a network whose layers have the names `order`."""
    names = [names] if isinstance(names, str | int) else names
    chosen = set()
    for name in map(str, names):
        number = int(name) if name.isascii() and name.isdigit() else 0
        if name not in order and not 1 <= number <= len(order):
            named = "" if order[-1] == str(len(order)) else f", or by name: {', '.join(order)}"
            raise MezzotintError(f"the network has no layer {name!r}; it has 1 to {len(order)}{named}")
        chosen.add(name if name in order else order[number - 1])
    return [name for name in order if name in chosen or not names]


@torch.no_grad()
def pooled_features(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    layers: str | int | Sequence[str | int] = (),
    *,
    eps: Tensor | None = None,
    null: Text | None = None,
) -> dict[str, Tensor]:
    """Features (B, C) of each of `layers` (see `layers_of`), averaged over tokens, pixels and frames, in float32.

    x (B, *in_shape): clean data, of a pyramid all levels. t in [0, 1] is the time that the network is told; with eps
    (N(0, 1), of x's shape) it sees α(t)·x + σ(t)·eps, otherwise x itself. The condition is the null class, or `null`,
    one caption. One forward pass, never compiled, which ends with the last of the layers and keeps none of their
    outputs. Raises `MezzotintError` for an unknown layer, and for a t outside of [0, 1].
    """
    return features_with_gradients(denoiser, x, t, layers, eps=eps, null=null)


def features_with_gradients(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    layers: str | int | Sequence[str | int] = (),
    *,
    eps: Tensor | None = None,
    null: Text | None = None,
) -> dict[str, Tensor]:
    """`pooled_features`, to train the network through them."""
    check_time(t)
    expect(denoiser, Denoiser, "a Denoiser, such as pipeline.denoiser")
    wanted = layers_of(denoiser, layers)
    if eps is not None:
        c = denoiser.interpolant.coefficients(t, x)
        x = c.alpha * x + c.sigma * eps
    batch = len(x)
    found: dict[str, Tensor] = {}

    def keep(name: str, tokens: slice) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            found[name] = _pooled(output, tokens, batch)
            if len(found) == len(wanted):
                raise _Enough

        return hook

    hooks = [layer.module.register_forward_hook(keep(name, layer.tokens)) for name, layer in wanted.items()]
    y = None if null is None else null[torch.zeros(batch, dtype=torch.int64, device=x.device)]
    try:
        with _eagerly():
            denoiser(x, t, y, condition=_shared_conditions(denoiser, t, null, batch))
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name in wanted}


def _eagerly() -> AbstractContextManager[Any]:
    """A compiled network would not see the hooks, nor stop at them."""
    # Importing torch's compiler just to say so takes seconds; what is compiled has imported it.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def check_time(t: float) -> None:
    """Raises `MezzotintError` unless t is in [0, 1]."""
    if not isinstance(t, SupportsFloat) or not 0 <= float(t) <= 1:
        shown = f"{float(t):g}" if isinstance(t, SupportsFloat) else shortened(t)
        raise MezzotintError(
            f"t = {shown} is outside of [0, 1], where 0 is data and 1 is noise; step 10 of 1000 is 0.01"
        )


class _Enough(Exception):
    """The last layer has been seen."""


def _pooled(output: Tensor, tokens: slice, batch: int) -> Tensor:
    """Tokens (B, T, C), or maps (B, C, H, W) or (B·F, C, H, W), → (B, C)."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    if output.ndim == 3:
        return output[:, tokens].mean(1, dtype=dtype)
    mean = output.mean((2, 3), dtype=dtype)
    return mean if len(mean) == batch else mean.unflatten(0, (batch, -1)).mean(1)


def _shared_conditions(denoiser: Denoiser, t: float, null: Text | None, batch: int) -> list[Tensor] | None:
    """What time and condition give is the same for all examples: computed once, and expanded without a copy."""
    if not denoiser.has_conditions:
        return None
    device = next(denoiser.parameters()).device
    given = torch.full((1,), denoiser.num_classes, device=device) if null is None else null
    return [layer[0].expand(batch, *layer.shape[2:]) for layer in denoiser.conditions([t], given)]
