"""Latents of a frozen KL autoencoder, as in latent diffusion, DiT and SiT."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KLAutoencoder:
    """diffusers' AutoencoderKL from a local folder or the hub, frozen. Latents and images are float32."""

    stochastic = True

    def __init__(
        self,
        path: str,
        *,
        scale: float | None = None,
        stride: int | None = None,
        channels: int | None = None,
        precision: str = "fp32",
        slicing: bool = False,
        tiling: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """path: a folder with an autoencoder or with a whole pipeline (its sub-folder ``vae``), or a hub model.

        scale: factor on the latents; None takes the autoencoder's own (0.18215 for Stable Diffusion's). stride,
        channels: what the autoencoder must have. precision: "fp32" or "bf16", of weights and activations. slicing: one
        image at a time; tiling: one tile of an image at a time, which changes large images a little.
        Raises `MezzotintError` where diffusers or the files are missing, or the autoencoder is another than wanted.
        """
        self.precision, self.tiling = precision, tiling
        self.network: Any = _load(path)
        config = self.network.config
        self.channels, self.stride = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        if (channels or self.channels, stride or self.stride) != (self.channels, self.stride):
            raise MezzotintError(
                f"the autoencoder {path} has {self.channels} latent channels and a stride of {self.stride}, the recipe "
                f"{channels} and {stride}; set representation.channels={self.channels} and "
                f"representation.stride={self.stride}"
            )
        with _quiet_diffusers():  # which has advice on casting, for other networks
            self.network.requires_grad_(False).eval().to(device, PRECISIONS[precision])
        if slicing:
            self.network.enable_slicing()
        if tiling:
            self.network.enable_tiling()
        self.scale: float = config.scaling_factor if scale is None else scale
        self.shift: float = config.get("shift_factor") or 0.0

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @cached_property
    def digest(self) -> str:
        """Tells autoencoders apart: 16 hexadecimal digits over the weights and what else shapes the latents."""
        config = self.network.config
        # The structure is in the weights' names and shapes. The whole config would change with diffusers' version.
        digest = hashlib.sha256(f"{config.act_fn} {config.norm_num_groups} {config.sample_size}".encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to mean and log-variance, float32 (B, channels, H/stride, W/stride), unscaled.

        The log-variance is clamped to [-30, 20]. Raises `MezzotintError` for images of other channels.
        """
        expected = self.network.config.in_channels
        if images.shape[1] != expected:
            raise MezzotintError(
                f"the autoencoder takes images of {expected} channels, these have {images.shape[1]}; "
                f"set data.channels={expected}"
            )
        posterior = self.network.encode(images.to(PRECISIONS[self.precision])).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to `scaled_latents` (B, channels, H/stride, W/stride).

        With eps ~ N(0, 1) of the latents' shape a draw from the posterior, without it the posterior's mean.
        """
        return scaled_latents(*self.posterior(images), eps, scale=self.scale, shift=self.shift)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Scaled latents to images (B, 3, H, W), clamped to [-1, 1]."""
        z = (x / self.scale + self.shift).to(PRECISIONS[self.precision])
        images: Tensor = self.network.decode(z).sample
        return images.float().clamp(-1, 1)


def scaled_latents(mean: Tensor, log_variance: Tensor, eps: Tensor | None, *, scale: float, shift: float) -> Tensor:
    """x = scale · (z − shift) with z = mean + exp(½ log_variance) · eps; without eps z is the mean. Any shape.

    The scale is latent diffusion's (Rombach et al., 2022, section 4.3.2), the shift Stable Diffusion 3's.
    """
    z = mean if eps is None else mean + torch.exp(0.5 * log_variance) * eps
    return scale * (z - shift)


def _load(path: str) -> Any:
    """The network, on the CPU. Nothing is unpickled: diffusers reads ``.bin`` files with ``weights_only``."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise MezzotintError(
            "representation 'kl' needs the package diffusers; install it with: pip install 'mezzotint[latent]'"
        ) from None
    source, options = path, {}
    if (folder := Path(path).expanduser()).is_dir():
        if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            folder /= "vae"
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
        source, options = str(folder), {"use_safetensors": any((folder / name).is_file() for name in names)}
    try:
        with _quiet_diffusers():
            network, info = AutoencoderKL.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        where = "folder" if Path(source).exists() else "folder or hub model"
        raise MezzotintError(
            f"no autoencoder could be read from the {where} {source!r} ({type(error).__name__}); download "
            "stabilityai/sd-vae-ft-ema (hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema) and set "
            "representation.path to its folder"
        ) from None
    if missing := sorted(info["missing_keys"]):  # diffusers would leave them at random
        raise MezzotintError(
            f"the autoencoder {source} lacks {len(missing)} of its weights ({', '.join(missing[:3])}, …); "
            "download it again"
        )
    return network


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """diffusers logs what it then raises, and more; one sentence is enough."""
    from diffusers.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(before)
