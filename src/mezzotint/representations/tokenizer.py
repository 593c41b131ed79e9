"""Tokenizers: representations that are fitted to images by this library, and live in a folder of their own.

FOLDER/
  tokenizer.json         `TokenizerInfo`: what it is
  tokenizer.safetensors  its weights, and its latents' mean and scale
  metrics.json, filters.png, reconstructions.png   what fitting found (`mezzotint fit-tokenizer`)
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mezzotint.errors import MezzotintError
from mezzotint.files import file_checksum, parse_json, read_tensors, save_tensors, write_text
from mezzotint.finite import check_finite
from mezzotint.settings import Decay, LearningRate, Settings

TokenizerName = Literal["patch-pca", "patch-ae", "patch-vae", "conv-vae"]
TOKENIZERS: tuple[str, ...] = get_args(TokenizerName)
FORMAT = 1
INFO, WEIGHTS = "tokenizer.json", "tokenizer.safetensors"
INFO_CHECKSUM = "tokenizer.json"  # the key in the weights' header of the CRC-32 of the file beside them
OWN_FOLDER = "tokenizer"  # that of a run's own tokenizer, within its folder
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0  # as diffusers clamps them


class FitSettings(Settings):
    """How a tokenizer is fitted to the training images."""

    examples: int = Field(10_000, ge=1)
    """Images, drawn at random, that patches' and latents' means and variances are measured on, and held-out ones that
    reconstruction is; at most all."""
    whiten: bool = False
    """patch-pca: divide each component by its standard deviation."""
    steps: int = Field(5000, ge=1)
    """All but patch-pca: optimizer steps."""
    batch_size: int = Field(64, ge=1)
    """All but patch-pca: images in a step."""
    lr: LearningRate = 1e-3
    """All but patch-pca: Adam's peak learning rate, of the discriminator too; both decay to zero along a cosine."""
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    """All but patch-pca: Adam's betas."""
    reconstruction: Literal["l1", "l2"] = "l2"
    """All but patch-pca: absolute or squared differences, summed over an image."""
    kl_weight: float = Field(1e-6, ge=0)
    """patch-vae, conv-vae: factor on the KL divergence from N(0, I), summed over a latent; 1 is the l-DAE paper's
    formula, 1e-6 latent diffusion's."""
    perceptual_weight: float = Field(0.0, ge=0)
    """conv-vae: factor on the perceptual distance, which counts for each number of an image; 1 is VQGAN's, 0 none."""
    perceptual_network: str = "vgg16"
    """conv-vae: vgg16 (torchvision's, of ImageNet), or module:function of yours: images (B, C, H, W) in [-1, 1] to a
    list of feature maps (B, c, h, w)."""
    adversarial_weight: float = Field(0.0, ge=0)
    """conv-vae: factor on the adversarial loss, beside its adaptive weight; 0.5 is latent diffusion's, 0 none."""
    adversarial_start: int = Field(1000, ge=0)
    """conv-vae: step at which discriminator and adversarial loss begin."""
    discriminator_width: int = Field(64, ge=1)
    """conv-vae: channels of the discriminator's first layer."""
    discriminator_layers: int = Field(3, ge=1)
    """conv-vae: layers of the discriminator that halve the sides."""
    widths: tuple[int, ...] = Field((128, 256, 512, 512), min_length=1)
    """conv-vae: channels, the full resolution first; each has half the sides of the one before."""
    layers: int = Field(2, ge=1)
    """conv-vae: ResNet blocks at each width."""
    groups: int = Field(32, ge=1)
    """conv-vae: groups of the GroupNorms; must divide the widths."""


#: settings of `FitSettings` that mean something for some tokenizers alone
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "whiten": ("patch-pca",),
    "kl_weight": ("patch-vae", "conv-vae"),
    **{
        key: ("conv-vae",)
        for key in FitSettings.model_fields
        if key.startswith(("perceptual", "adversarial", "discriminator", "widths", "layers", "groups"))
    },
}


class TokenizerInfo(Settings):
    """tokenizer.json."""

    format: int = FORMAT
    """Version of the layout."""
    name: TokenizerName
    """Which tokenizer."""
    image_channels: int = Field(ge=1)
    """Of the images that it takes."""
    stride: int = Field(ge=1)
    """Pixels per latent position along a side: of a patch, its side."""
    channels: int = Field(ge=1)
    """Channels of a latent."""
    fit: FitSettings
    """How it was fitted."""
    data: str = ""
    """Identity of the data set that it was fitted to."""

    @property
    def patch_dimension(self) -> int:
        """D, the numbers in a patch."""
        return self.image_channels * self.stride**2


def check_settings(name: str, stride: int, channels: int, image_channels: int, size: int, fit: FitSettings) -> None:
    """Raises `ValueError` with one sentence where a tokenizer cannot be so."""
    for key, names in OWN_SETTINGS.items():
        if name not in names and getattr(fit, key) != FitSettings.model_fields[key].default:
            raise ValueError(f"representation.fit.{key} means nothing for {name}; leave it out, it is {names[-1]}'s")
    if size % stride:
        raise ValueError(
            f"patches of {stride} × {stride} do not tile images of {size} × {size}; change representation.stride or "
            "data.size"
        )
    dimension = image_channels * stride**2
    if name != "conv-vae":
        if channels > dimension:
            raise ValueError(
                f"representation.channels={channels} is more than the {dimension} numbers in a patch of "
                f"{image_channels} × {stride} × {stride}; lower it or raise representation.stride"
            )
        return
    if stride != 2 ** (len(fit.widths) - 1):
        raise ValueError(
            f"{len(fit.widths)} widths make a stride of {2 ** (len(fit.widths) - 1)}, not representation.stride="
            f"{stride}; change it or representation.fit.widths"
        )
    if odd := [width for width in fit.widths if width % fit.groups]:
        raise ValueError(
            f"representation.fit.groups={fit.groups} does not divide the width {odd[0]}; change one of them"
        )
    smallest = discriminator_size(fit.discriminator_layers)
    if fit.adversarial_weight and size < smallest:
        raise ValueError(
            f"a discriminator of {fit.discriminator_layers} layers needs images of {smallest} × {smallest} or more, "
            f"not {size} × {size}; lower representation.fit.discriminator_layers"
        )


def discriminator_size(layers: int) -> int:
    """Side of the smallest image that a `PatchDiscriminator` of so many layers takes."""
    return 3 * 2**layers


# --------------------------------------------------------------------------------------------------------- tokenizers


class Tokenizer(nn.Module, ABC):
    """Images to x = (z − mean) / scale and back, z being the raw latents.

    The mean is one number per channel, the scale one for all: the root of the mean of the channels' variances over the
    training images, so that x has unit variance on average and the channels keep their relative variances.
    """

    # Its posterior is of x itself: for a cache of latents there is nothing left to scale.
    scale, shift, std, precision, tiling = 1.0, 0.0, None, "fp32", False
    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(self, info: TokenizerInfo) -> None:
        super().__init__()
        self.info, self.stride, self.channels = info, info.stride, info.channels
        self.stochastic = info.name in ("patch-vae", "conv-vae")  # whether `encode` draws from a posterior
        self.digest = ""  # tells tokenizers apart: 16 hexadecimal digits over the weights' file
        self.register_buffer("latent_mean", torch.zeros(info.channels, 1, 1))
        self.register_buffer("latent_scale", torch.ones(()))

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    @abstractmethod
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) to z, or to mean and log-variance of z: each (B, channels, H/stride, W/stride).

        Raises `MezzotintError` for images of other channels or of sides that the stride does not divide.
        """

    @abstractmethod
    def reconstruct(self, z: Tensor) -> Tensor:
        """Raw latents (B, channels, h, w) to images, not clamped."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """x of images as `moments` has z."""
        mean, log_variance = self.moments(images)
        if log_variance is not None:
            log_variance = log_variance - 2 * self.latent_scale.log()
        return (mean - self.latent_mean) / self.latent_scale, log_variance

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to x (B, channels, H/stride, W/stride).

        Where `stochastic`, with eps ~ N(0, 1) of x's shape a draw from the posterior, without it the posterior's mean.
        Raises `MezzotintError` as `moments` does.
        """
        mean, log_variance = self.posterior(images)
        return mean if eps is None or log_variance is None else mean + torch.exp(0.5 * log_variance) * eps

    def decode(self, x: Tensor, *, clamp: bool = True) -> Tensor:
        """x to images (B, C, H, W), clamped to [-1, 1] unless told otherwise."""
        images = self.reconstruct(self.latent_scale * x + self.latent_mean)
        return images.clamp(-1, 1) if clamp else images

    def check(self, images: Tensor) -> None:
        """Raises `MezzotintError` for images of other channels or of sides that the stride does not divide."""
        expected, stride = self.info.image_channels, self.stride
        if images.shape[-3] != expected:
            raise MezzotintError(
                f"the tokenizer takes images of {expected} channel(s), these have {images.shape[-3]}; "
                f"set data.channels={expected}"
            )
        if images.shape[-2] % stride or images.shape[-1] % stride:
            raise MezzotintError(
                f"patches of {stride} × {stride} do not tile images of {images.shape[-2]} × {images.shape[-1]}; "
                "change data.size"
            )


def patches(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) to their patches (B·H/side·W/side, C·side·side), row by row; a patch is (C, side, side)."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * side**2)


class PatchTokenizer(Tokenizer):
    """Linear on each patch: z = V(x − mean) and x ≈ Uᵀz + mean (l-DAE, section 4.2), mean the average patch."""

    mean: Tensor

    def __init__(self, info: TokenizerInfo) -> None:
        super().__init__(info)
        self.register_buffer("mean", torch.zeros(info.patch_dimension))

    @abstractmethod
    def filters(self) -> tuple[Tensor, Tensor]:
        """V (channels, D; of a VAE with as many rows more, for log-variances) and U (channels, D)."""

    def project(self, images: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows·(x − mean) + bias of every patch x: images (B, C, H, W), rows (k, D) to (B, k, H/p, W/p)."""
        self.check(images)
        kernels = rows.view(-1, self.info.image_channels, self.stride, self.stride)
        offset = -rows @ self.mean
        return F.conv2d(images, kernels, offset if bias is None else offset + bias, stride=self.stride)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Uᵀz + mean."""
        return self.assemble(z, self.filters()[1])

    def assemble(self, z: Tensor, rows: Tensor) -> Tensor:
        """rowsᵀz + mean for every patch: z (B, k, h, w), rows (k, D) to images (B, C, h·p, w·p)."""
        shape = (self.info.image_channels, self.stride, self.stride)
        images = F.conv_transpose2d(z, rows.view(-1, *shape), stride=self.stride)
        return images + self.mean.view(shape).repeat(1, z.shape[-2], z.shape[-1])


class PatchPCA(PatchTokenizer):
    """Principal components of patches: the rows of V are orthonormal, and V = U unless whitened."""

    basis: Tensor
    variances: Tensor

    def __init__(self, info: TokenizerInfo) -> None:
        super().__init__(info)
        dimension = info.patch_dimension
        self.register_buffer("basis", torch.eye(dimension))  # all components, (D, D); latents are the first of them
        self.register_buffer("variances", torch.ones(dimension))

    def filters(self) -> tuple[Tensor, Tensor]:
        """V and U (channels, D)."""
        rows = self.basis[: self.channels]
        if not self.info.fit.whiten:
            return rows, rows
        deviations = self.variances[: self.channels].sqrt().unsqueeze(1)
        return rows / deviations, rows * deviations

    def moments(self, images: Tensor) -> tuple[Tensor, None]:
        return self.project(images, self.filters()[0]), None

    def coefficients(self, images: Tensor) -> Tensor:
        """V(x − mean) in the full basis, never whitened: images (B, C, H, W) to (B, D, H/p, W/p)."""
        return self.project(images, self.basis)

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """The inverse of `coefficients`: (B, D, h, w) to images (B, C, h·p, w·p), not clamped."""
        return self.assemble(coefficients, self.basis)


class PatchAutoencoder(PatchTokenizer):
    """patch-ae: min ‖x − UᵀVx‖²; patch-vae: V also gives log-variances, and KL(Vx ‖ N(0, I)) is added."""

    def __init__(self, info: TokenizerInfo) -> None:
        super().__init__(info)
        rows = 2 * info.channels if self.stochastic else info.channels
        scale = 1 / math.sqrt(info.patch_dimension)
        self.encoder = nn.Parameter(torch.randn(rows, info.patch_dimension) * scale)
        self.decoder = nn.Parameter(torch.randn(info.channels, info.patch_dimension) * scale)
        self.bias = nn.Parameter(torch.zeros(rows)) if self.stochastic else None

    def filters(self) -> tuple[Tensor, Tensor]:
        """V (channels or 2·channels, D) and U (channels, D)."""
        return self.encoder, self.decoder

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.project(images, self.encoder, self.bias)
        if not self.stochastic:
            return found, None
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)


class ConvVAE(Tokenizer):
    """diffusers' AutoencoderKL, the network of latent diffusion's KL autoencoder, of any widths."""

    def __init__(self, info: TokenizerInfo) -> None:
        super().__init__(info)
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise MezzotintError(
                "representation 'conv-vae' needs the package diffusers; install it with: "
                "pip install 'mezzotint[latent]'"
            ) from None
        fit = info.fit
        self.network: Any = AutoencoderKL(
            in_channels=info.image_channels,
            out_channels=info.image_channels,
            down_block_types=("DownEncoderBlock2D",) * len(fit.widths),
            up_block_types=("UpDecoderBlock2D",) * len(fit.widths),
            block_out_channels=fit.widths,
            layers_per_block=fit.layers,
            latent_channels=info.channels,
            norm_num_groups=fit.groups,
        )

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self.check(images)
        posterior = self.network.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def reconstruct(self, z: Tensor) -> Tensor:
        """The decoder's images."""
        images: Tensor = self.network.decode(z).sample
        return images

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, at which the adaptive weight compares gradients."""
        weight: Tensor = self.network.decoder.conv_out.weight
        return weight


CLASSES: dict[str, type[Tokenizer]] = {
    "patch-pca": PatchPCA,
    "patch-ae": PatchAutoencoder,
    "patch-vae": PatchAutoencoder,
    "conv-vae": ConvVAE,
}

# --------------------------------------------------------------------------------------------------------------- files


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer.safetensors into a folder that is not in use yet."""
    write_text(folder / INFO, json.dumps(tokenizer.info.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    about = {"format": "mezzotint", INFO_CHECKSUM: file_checksum(folder / INFO)}
    save_tensors(tokenizer.state_dict(), folder / WEIGHTS, about)


def open_tokenizer(
    path: str | Path,
    *,
    name: str | None = None,
    stride: int | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
) -> Tokenizer:
    """The tokenizer of a folder, frozen, on `device`.

    name, stride, channels: what it must be. Raises `MezzotintError` where the folder is none of a tokenizer, damaged,
    or of another tokenizer than wanted.
    """
    folder = Path(path).expanduser()
    info = _read_info(folder)
    asked = (name or info.name, stride or info.stride, channels or info.channels)
    if asked != (info.name, info.stride, info.channels):
        raise MezzotintError(
            f"the tokenizer {folder} is {info.name} with a stride of {info.stride} and {info.channels} channels, the "
            f"recipe's {asked[0]} with {asked[1]} and {asked[2]}; set representation={info.name}, "
            f"representation.stride={info.stride} and representation.channels={info.channels}"
        )
    tokenizer = CLASSES[info.name](info)
    try:
        tensors, about = read_tensors(folder / WEIGHTS)
        described = about.get(INFO_CHECKSUM) in (None, file_checksum(folder / INFO))
        check_finite(tensors, str(folder / WEIGHTS))
        tokenizer.load_state_dict(tensors)
        tokenizer.digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]
    except (OSError, MezzotintError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise MezzotintError(
            f"{folder / WEIGHTS} cannot be read ({problem}); fit the tokenizer again or copy its folder again"
        ) from None
    if not described:
        raise MezzotintError(
            f"{folder / INFO} is damaged, or not that of {WEIGHTS}; fit the tokenizer again or copy its folder again"
        )
    return tokenizer.requires_grad_(False).eval().to(device)


def _read_info(folder: Path) -> TokenizerInfo:
    file = folder / INFO
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MezzotintError(
            f"{folder} is not a tokenizer's folder: it has no {INFO}; make one with 'mezzotint fit-tokenizer', or set "
            "representation.path=null to have one fitted"
        ) from None
    except (OSError, ValueError) as error:
        raise MezzotintError(f"{file} cannot be read ({error}); fit the tokenizer again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise MezzotintError(f"{file} is not of format {FORMAT}, which this version reads; fit the tokenizer again")
    try:
        return TokenizerInfo.parse(values)
    except MezzotintError as error:
        raise MezzotintError(f"{file} is damaged: {error}; fit the tokenizer again") from None
