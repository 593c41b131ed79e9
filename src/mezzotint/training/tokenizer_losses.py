"""What tokenizers are trained with: reconstruction, KL, perceptual and adversarial losses (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.errors import MezzotintError

FeatureMaps = Callable[[Tensor], Sequence[Tensor]]

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_LAYERS = (3, 8, 15, 22, 29)  # of torchvision's `features`: the ReLU before each halving
VGG16_SMALLEST = 16
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_ADAPTIVE_WEIGHT = 1e4


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, I)) in nats, of (B, ...) to (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's: the mean of max(0, 1 − D(real)) and of max(0, 1 + D(generated)), averaged."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + generated).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, layer: Tensor, delta: float = 1e-6) -> Tensor:
    """‖∇ reconstruction‖ / (‖∇ adversarial‖ + delta) at the parameters `layer` (VQGAN, equation 7), at most 10⁴."""
    norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + delta)).clamp(max=MAX_ADAPTIVE_WEIGHT)


class PatchDiscriminator(nn.Sequential):
    """pix2pix's convolutional classifier of overlapping patches: images (B, C, H, W) to scores (B, 1, h, w)."""

    def __init__(self, channels: int, *, width: int = 64, layers: int = 3) -> None:
        """layers: how many of them halve the sides; an image has 3·2^layers pixels or more along a side."""
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def perceptual_distance(features: FeatureMaps, images: Tensor, others: Tensor) -> Tensor:
    """LPIPS (arXiv 1801.03924, equation 1) with all channels alike: images (B, C, H, W) to (B,).

    At every layer the features are normalised to unit length at each position; their squared distance is averaged over
    positions and summed over layers.
    """
    distance = torch.zeros(len(images), device=images.device)
    with torch.no_grad():
        there = features(images)
    for one, other in zip(there, features(others), strict=True):
        difference = F.normalize(one, dim=1, eps=1e-10) - F.normalize(other, dim=1, eps=1e-10)
        distance = distance + difference.square().sum(1).flatten(1).mean(1)
    return distance


def feature_maps(name: str, size: int, device: torch.device | str = "cpu", *, trust_code: bool = False) -> FeatureMaps:
    """vgg16, or the function that ``module:function`` names; images (B, C, H, W) in [-1, 1] to feature maps.

    size: side of the images. trust_code: import a module that is not this library's. Raises `MezzotintError` for an
    unknown name, for a module that is not trusted, images that are too small for vgg16, and weights that cannot be had.
    """
    if ":" in name:
        if not trust_code and not name.startswith("mezzotint.studies.perceptual:"):
            raise MezzotintError(
                f"the recipe's representation.fit.perceptual_network {name} is code, which is run for nobody but who "
                "trusts it; say --trust-code (trust_code=True), or name it on the command line, as KEY=VALUE"
            )
        from mezzotint.evaluation.sources import imported

        return cast(FeatureMaps, imported(name))
    if name != "vgg16":
        raise MezzotintError(f"representation.fit.perceptual_network {name!r} is neither vgg16 nor module:function")
    if size < VGG16_SMALLEST:
        raise MezzotintError(
            f"vgg16 needs images of {VGG16_SMALLEST} × {VGG16_SMALLEST} or more, not {size} × {size}; set "
            "representation.fit.perceptual_weight=0, or perceptual_network to a module:function of yours"
        )
    return VGG16Features(_vgg16_weights()).to(device)


class VGG16Features(nn.Module):
    """torchvision's VGG16, frozen: images (B, 1 or 3, H, W) in [-1, 1] to five feature maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: dict[str, Any] | None = None) -> None:
        """weights: of the whole network; None leaves them fresh."""
        from torchvision.models import vgg16  # seconds to import

        super().__init__()
        network = vgg16()
        if weights is not None:
            network.load_state_dict(weights)
        self.layers = network.features[: VGG16_LAYERS[-1] + 1].requires_grad_(False).eval()
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # its input is a kept feature map's gradient path
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = ((images.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        maps = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in VGG16_LAYERS:
                maps.append(x)
        return maps


def _vgg16_weights() -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.hub.load_state_dict_from_url(
            VGG16_URL, map_location="cpu", weights_only=True, check_hash=True
        )
    except (OSError, RuntimeError) as error:
        raise MezzotintError(
            f"the weights of vgg16 cannot be downloaded ({error}); put {VGG16_URL} into "
            f"{torch.hub.get_dir()}/checkpoints, or set representation.fit.perceptual_weight=0, or perceptual_network "
            "to a module:function of yours"
        ) from None
    return found
