"""Latents of a frozen KL autoencoder, as in latent diffusion, DiT and SiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError


class KLAutoencoder:
    """diffusers' AutoencoderKL from a local folder or the hub, frozen, in float32."""

    stochastic = True

    def __init__(self, path: str, *, scale: float | None = None, device: torch.device | str = "cpu") -> None:
        """scale: factor on the latents; None takes the autoencoder's own (0.18215 for Stable Diffusion's).

        Raises `MezzotintError` where diffusers or the files are missing.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise MezzotintError(
                "representation 'kl' needs the package diffusers; install it with: pip install 'mezzotint[latent]'"
            ) from None
        try:
            self.network: Any = AutoencoderKL.from_pretrained(path)
        except (OSError, ValueError) as error:
            where = "folder" if Path(path).exists() else "folder or hub model"
            raise MezzotintError(
                f"no autoencoder could be read from the {where} {path!r} ({type(error).__name__}); download "
                "stabilityai/sd-vae-ft-ema from the Hugging Face hub and set representation.path to its folder"
            ) from None
        self.network.requires_grad_(False).eval().to(device)
        self.scale = self.network.config.scaling_factor if scale is None else scale

    @torch.no_grad()
    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, channels, H/stride, W/stride).

        With eps ~ N(0, 1) of the latents' shape a draw from the posterior, without it the posterior's mean.
        """
        posterior = self.network.encode(images).latent_dist
        return self.scale * (posterior.mean if eps is None else posterior.mean + posterior.std * eps)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W), clamped to [-1, 1]."""
        return self.network.decode(x / self.scale).sample.clamp(-1, 1)
