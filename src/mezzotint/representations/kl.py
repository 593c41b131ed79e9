"""Latents of a frozen KL autoencoder, as in latent diffusion, DiT and SiT."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.pretrained import WEIGHTS, read_json, weights_file

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

        scale: factor on the latents; None takes the autoencoder's own (0.18215 for Stable Diffusion's). What else its
        config says of latents, shift_factor or latents_mean and latents_std, is applied, too (`scaled_latents`).
        stride, channels: what the autoencoder must have. precision: "fp32" or "bf16", of weights and activations.
        slicing: one image at a time; tiling: one tile of an image at a time, which changes large images a little.
        Raises `MezzotintError` where diffusers or the files are missing, or the autoencoder is another than wanted.
        """
        self.precision, self.tiling = precision, tiling
        self.network: Any = _load(path)
        config = self.network.config
        self.channels, self.stride = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        own_scale, self.shift, self.std = _scaling(config, self.channels, path)
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
        self.scale = own_scale if scale is None else scale

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

    @property
    def scaling(self) -> tuple[float, float | tuple[float, ...], tuple[float, ...] | None]:
        """Scale, shift and std of `scaled_latents`, which are not in the digest."""
        return self.scale, self.shift, self.std

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
        return scaled_latents(*self.posterior(images), eps, scale=self.scale, shift=self.shift, std=self.std)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Scaled latents to images (B, 3, H, W), clamped to [-1, 1]."""
        z = x / self.scale if self.std is None else x / self.scale * _each_channel(self.std, x)
        z = z + _each_channel(self.shift, x)
        images: Tensor = self.network.decode(z.to(PRECISIONS[self.precision])).sample
        return images.float().clamp(-1, 1)


def scaled_latents(
    mean: Tensor,
    log_variance: Tensor,
    eps: Tensor | None,
    *,
    scale: float,
    shift: float | Sequence[float],
    std: Sequence[float] | None = None,
) -> Tensor:
    """x = scale · (z − shift) / std with z = mean + exp(½ log_variance) · eps; without eps z is the mean. (B, C, h, w).

    The scale is latent diffusion's (Rombach et al., 2022, section 4.3.2), one shift Stable Diffusion 3's; shift and std
    for each of C channels are Playground 2.5's.
    """
    z = mean if eps is None else mean + torch.exp(0.5 * log_variance) * eps
    x = scale * (z - _each_channel(shift, z))
    return x if std is None else x / _each_channel(std, z)


def _each_channel(values: float | Sequence[float], like: Tensor) -> float | Tensor:
    """A number, or one for each channel of `like` (B, C, h, w) as (C, 1, 1)."""
    return values if isinstance(values, int | float) else like.new_tensor(values).view(-1, 1, 1)


def check_class(config: Mapping[str, Any], source: str | Path) -> None:
    """Raise `MezzotintError` unless a config of diffusers is an AutoencoderKL's."""
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise MezzotintError(
            f"{source} is a diffusers {name}, expected an AutoencoderKL; representation 'kl' reads no other autoencoder"
        )


def _scaling(
    config: Mapping[str, Any], channels: int, source: str
) -> tuple[float, float | tuple[float, ...], tuple[float, ...] | None]:
    """Scale, shift and std of `scaled_latents` by a config. Raises `MezzotintError` for what means nothing."""

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def refuse(key: str, expected: str) -> MezzotintError:
        return MezzotintError(
            f"the config of the autoencoder {source} says {key} {config[key]!r}, expected {expected}; download it again"
        )

    if not number(scale := config["scaling_factor"]) or not scale:
        raise refuse("scaling_factor", "a number other than 0")
    if not number(shift := config.get("shift_factor") or 0.0):
        raise refuse("shift_factor", "a number")
    each = {key: value for key in ("latents_mean", "latents_std") if (value := config.get(key)) is not None}
    if not each:
        return float(scale), float(shift), None
    if len(each) == 1 or shift:
        given = [*each, *(["shift_factor"] if shift else [])]
        raise MezzotintError(
            f"the config of the autoencoder {source} says {' and '.join(given)}; expected both of latents_mean and "
            "latents_std, or a shift_factor alone"
        )
    for key, values in each.items():
        if not isinstance(values, list | tuple) or len(values) != channels or not all(map(number, values)):
            raise refuse(key, f"{channels} numbers, one for each channel")
    if min(each["latents_std"]) <= 0:
        raise refuse("latents_std", "numbers above 0")
    mean, std = (tuple(map(float, values)) for values in each.values())
    return float(scale), mean, std


def _load(path: str) -> Any:
    """The network, on the CPU. Nothing is unpickled: diffusers reads ``.bin`` files with ``weights_only``."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise MezzotintError(
            "representation 'kl' needs the package diffusers; install it with: pip install 'mezzotint[latent]'"
        ) from None
    source, options = path, {}
    file: Path | None = None
    if (folder := Path(path).expanduser()).is_dir():
        if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            folder /= "vae"
        if (folder / "config.json").is_file():
            check_class(read_json(folder / "config.json"), folder)
        file = weights_file(folder)
        source, options = str(folder), _weights_options(folder, file)
    try:
        with _quiet_diffusers():
            if file is not None and file.suffix == ".safetensors":
                _refuse_quantised(file)
            if not options:
                check_class(AutoencoderKL.load_config(source), source)
            network, info = AutoencoderKL.from_pretrained(source, output_loading_info=True, **options)
    except MezzotintError:
        raise
    except Exception as error:  # what a missing or damaged file, or a config of any content, leads to
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


def _weights_options(folder: Path, file: Path | None) -> dict[str, Any]:
    """How diffusers is told which weights a folder has."""
    if file is None:
        return {"use_safetensors": (folder / f"{WEIGHTS}.safetensors.index.json").is_file()}
    variant = file.stem.removeprefix(WEIGHTS).removeprefix(".")
    return {"use_safetensors": file.suffix == ".safetensors", "variant": variant or None}


def _refuse_quantised(file: Path) -> None:
    """Raise `MezzotintError` where weights are no floating point of 16 bits or more, which diffusers would cast."""
    with safe_open(str(file), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if (dtype := tensors.get_slice(name).get_dtype()) not in ("F16", "BF16", "F32", "F64"):
                raise MezzotintError(
                    f"{name} in {file} has dtype {dtype}, expected floating point of 16 bits or more; quantised "
                    "weights are not supported"
                )


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
