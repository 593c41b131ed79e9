"""Masked autoencoders (He et al. 2022, arXiv 2111.06377), through transformers: the baseline of what a network learns.

>>> train_mae(load_recipe("digits"), "mae")
>>> probe(open_mae("mae"), recipe.data)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mezzotint.backbones.layers import position_table
from mezzotint.data.transforms import to_float
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.augmentation import augmented_batches, cropping
from mezzotint.evaluation.sources import DatasetSource, image_source, to_channels
from mezzotint.files import new_folder, tensors_digest
from mezzotint.interop.hub import is_name
from mezzotint.interop.vit import processor_config
from mezzotint.locks import claimed
from mezzotint.pipeline import PRECISIONS
from mezzotint.pretrained import NO_CODE, from_hub, not_in_weights, quiet, transformers_for
from mezzotint.progress import track
from mezzotint.randomness import generator_for, mix
from mezzotint.recipe import Recipe, TrainingSettings, as_recipe
from mezzotint.settings import Decay, LearningRate, Settings
from mezzotint.training.loop import set_lr
from mezzotint.training.parallel import choose_device

#: of random numbers, told apart by what they are for
MASKS = 5


class MAESettings(Settings):
    """A masked autoencoder beside a recipe, whose data, patches, width, heads, steps and batch size it shares.

    The defaults that are not the recipe's are those of MAE's pre-training on ImageNet (its table 8).
    """

    depth: int | None = Field(None, ge=1)
    """Blocks of the encoder. None: half of the recipe's."""
    decoder_depth: int | None = Field(None, ge=1)
    """Blocks of the decoder. None: the other half (MAE: 8)."""
    decoder_width: int | None = Field(None, ge=4)
    """Channels of its tokens. None: half of the recipe's width (MAE: 512)."""
    decoder_heads: int | None = Field(None, ge=1)
    """Its attention heads. None: the recipe's."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that the encoder does not see."""
    norm_pix_loss: bool = True
    """Whether pixels to predict are standardised in each patch."""
    lr: LearningRate | None = None
    """Peak learning rate. None: 1.5e-4 for each 256 images of a batch."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which it rises linearly (40 of 800 epochs); a cosine to zero follows."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's, of matrices; vectors have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's."""
    crop: float = Field(0.2, gt=0, le=1)
    """Smallest share of an image's area that a random crop has; 1: no crops."""


def train_mae(
    recipe: Recipe | str | Path,
    out: str | Path,
    settings: MAESettings | None = None,
    *,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Train a ViTMAE on the recipe's training images into the new folder `out`, transformers'; returns its metrics.

    It has as many tokens as the recipe's network, and takes as many steps on batches of the same size. The loss is the
    squared error of hidden patches; its means over the first and the last tenth of the steps are returned. The folder
    appears whole or not at all; training is not resumed. Raises `MezzotintError` for a recipe whose network has no
    patches, sizes that do not fit, a folder in use, clips, streams and latents, and a loss that is not finite.
    """
    recipe = as_recipe(recipe)
    with claimed(Path(out)):
        return _train_into(Path(out), recipe, settings or MAESettings(), device, progress)


def _train_into(out: Path, recipe: Recipe, settings: MAESettings, device: str, progress: bool) -> dict[str, Any]:
    training = recipe.training
    transformers = transformers_for("a masked autoencoder")
    here = choose_device(device)
    config = transformers.ViTMAEConfig(**_sizes(recipe, settings))
    if recipe.data.frames:
        raise MezzotintError("a masked autoencoder here is of images, not of clips; set data.frames=0")
    source = image_source(recipe.data, split="train")
    assert isinstance(source, DatasetSource)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = transformers.ViTMAEForPreTraining(config)
        _initialise(network)
    network.to(here).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    lr = settings.lr or 1.5e-4 * training.batch_size / 256
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=settings.betas,
        fused=here.type in ("cpu", "cuda"),
    )
    plan = TrainingSettings(
        steps=training.steps, lr=lr, lr_schedule="cosine", warmup_steps=round(settings.warmup * training.steps)
    )
    from torchvision.transforms import v2

    size = recipe.data.size
    change = v2.Compose([*cropping((size, size), settings.crop, recipe.data.flip), v2.Lambda(to_float)])
    batches = augmented_batches(source, training.batch_size, training.steps, change, mix(recipe.seed, MASKS))
    autocast = torch.autocast(here.type, torch.bfloat16, enabled=training.precision == "bf16")
    tokens = (size // config.patch_size) ** 2
    losses = []
    for step, (images, _) in enumerate(track(batches, "mae", total=training.steps, enabled=progress)):
        generator = generator_for(recipe.seed, MASKS, step, device=here)
        noise = torch.rand(len(images), tokens, generator=generator, device=here)
        with autocast:
            loss = network(pixel_values=images.to(here), noise=noise).loss
        set_lr(optimizer, plan, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % training.log_every == 0 or step + 1 == training.steps:
            _check(losses, step + 1)
    tenth = math.ceil(training.steps / 10)
    every = torch.stack(losses).float()
    metrics = {
        "data": source.identity,
        "steps": training.steps,
        "batch_size": training.batch_size,
        "seed": recipe.seed,
        "settings": settings.model_dump(mode="json"),
        "first_loss": every[:tenth].mean().item(),
        "last_loss": every[-tenth:].mean().item(),
    }
    with new_folder(out) as folder:
        with quiet():
            network.cpu().save_pretrained(folder)
        for name, values in (
            ("preprocessor_config.json", processor_config(size, recipe.image_channels)),
            ("metrics.json", metrics),
        ):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return metrics


@torch.no_grad()
def _initialise(network: Any) -> None:
    """MAE's: Xavier's matrices, fixed sine-cosine positions in encoder and decoder.

    Done here, as some versions of transformers (5.23) leave both tables of positions of a new network at zero.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("_token"):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1 and parameter.requires_grad:
            nn.init.xavier_uniform_(parameter.flatten(1))
    side = network.config.image_size // network.config.patch_size
    for table in (network.vit.embeddings.position_embeddings, network.decoder.decoder_pos_embed):
        table.copy_(F.pad(position_table(table.shape[-1], side, side), (0, 0, 1, 0)))  # the class token has none


def _check(losses: Sequence[Tensor], step: int) -> None:
    if not losses[-1].isfinite():
        raise MezzotintError(f"the loss is NaN or infinite at step {step}; lower mae.lr, or look at the images")


def _sizes(recipe: Recipe, settings: MAESettings) -> dict[str, Any]:
    """The keywords of a ViTMAEConfig. Raises `MezzotintError` for sizes that mean nothing."""
    backbone = recipe.backbone
    if backbone.name != "dit" or backbone.outer:
        raise MezzotintError(
            "a masked autoencoder takes its sizes from a recipe with backbone dit, such as digits; this one has "
            f"{backbone.name}"
        )
    side = recipe.input_shape[-1] // backbone.patch_size
    decoder_width = settings.decoder_width or max(4, backbone.width // 2)
    decoder_heads = settings.decoder_heads or backbone.heads
    for name, width, heads in (
        ("backbone.width", backbone.width, backbone.heads),
        ("mae.decoder_width", decoder_width, decoder_heads),
    ):
        if width % heads or width % 4:
            raise MezzotintError(f"{name} {width} must be a multiple of 4 and of its {heads} heads; set another")
    seen = int(side**2 * (1 - settings.mask_ratio))
    if not 0 < seen < side**2:
        raise MezzotintError(
            f"mae.mask_ratio {settings.mask_ratio:g} leaves {seen} of {side**2} patches to see; at least one must be "
            "seen and one hidden"
        )
    depth = settings.depth or max(1, backbone.depth // 2)
    return {
        "image_size": recipe.data.size,
        "patch_size": recipe.data.size // side,
        "num_channels": recipe.image_channels,
        "hidden_size": backbone.width,
        "num_hidden_layers": depth,
        "num_attention_heads": backbone.heads,
        "intermediate_size": int(backbone.width * backbone.mlp_ratio),
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": settings.decoder_depth or max(1, backbone.depth - depth),
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": 4 * decoder_width,
        "mask_ratio": settings.mask_ratio,
        "norm_pix_loss": settings.norm_pix_loss,
        "layer_norm_eps": 1e-6,
    }


class MAE:
    """The encoder of a masked autoencoder, which sees all patches.

    name: what tells it apart, weights and preprocessing included. layers: its blocks, "1" to their number.
    """

    def __init__(self, network: Any, mean: Sequence[float], std: Sequence[float], precision: str = "fp32") -> None:
        """network: transformers' ViTMAEModel, with a mask ratio of 0; mean, std: of channels in [0, 1]."""
        config, self._network = network.config, network
        self.device: torch.device = network.device
        self.layers = tuple(str(k) for k in range(1, config.num_hidden_layers + 1))
        digest = tensors_digest(network.state_dict(), list(mean), list(std), not_in_weights(config))
        self.name = f"mae ({len(self.layers)} layers of {config.hidden_size}, {digest})"
        self.name += "" if precision == "fp32" else f" in {precision}"
        self._mean, self._std = (torch.tensor(list(v), device=self.device).view(1, -1, 1, 1) for v in (mean, std))
        network.to(PRECISIONS[precision])

    @torch.no_grad()
    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Images uint8 (B, C, S, S) to float32 (B, width) by layer: the mean of a block's tokens, without the class's.

        Raises `MezzotintError` for images of another size.
        """
        config = self._network.config
        images = to_channels(images.to(self.device), config.num_channels)
        side = config.image_size
        if images.shape[2:] != (side, side):
            raise MezzotintError(
                f"the masked autoencoder sees images of {side} × {side} pixels, not {images.shape[2]} × "
                f"{images.shape[3]}; set data.size={side}"
            )
        pixels = ((images / 255 - self._mean) / self._std).to(self._network.dtype)
        # Equal to the patches' numbers, the "noise" by which transformers shuffles them leaves them in order.
        order = torch.arange((side // config.patch_size) ** 2, device=self.device).expand(len(images), -1)
        states = self._network(pixel_values=pixels, noise=order, output_hidden_states=True).hidden_states
        return {layer: states[int(layer)][:, 1:].mean(1, dtype=torch.float32) for layer in layers}


def open_mae(source: str | Path, *, device: torch.device | str = "cpu", precision: str = "fp32") -> MAE:
    """The encoder in a ViTMAE folder, what `train_mae` wrote or another's, or of that name on the Hugging Face hub.

    Raises `MezzotintError` where there is none, for a model of another kind, or an unknown precision.
    """
    if precision not in PRECISIONS:
        raise MezzotintError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    transformers = transformers_for("a masked autoencoder")
    place = str(Path(source).expanduser())
    if not Path(place).is_dir():
        place = str(source)
        if not is_name(place):  # asking the hub takes long to fail
            raise MezzotintError(
                f"there is no masked autoencoder at {place!r}; give a folder that 'mezzotint train-mae' wrote, or the "
                "OWNER/NAME of a ViTMAE on the Hugging Face hub"
            )

    def read(local: bool) -> tuple[Any, Any]:
        config = transformers.AutoConfig.from_pretrained(place, **NO_CODE, local_files_only=local)
        if config.model_type != "vit_mae":
            raise ValueError(f"it is a {config.model_type}, expected a vit_mae")
        options: dict[str, Any] = {"local_files_only": local, "output_loading_info": True, "mask_ratio": 0.0}
        network, info = transformers.ViTMAEModel.from_pretrained(place, **options)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        return network, transformers.AutoImageProcessor.from_pretrained(place, **NO_CODE, local_files_only=local)

    network, processor = from_hub("masked autoencoder", place, read, "facebook/vit-mae-base", ", and name that folder")
    network.requires_grad_(False).eval().float().to(device)
    return MAE(network, processor.image_mean, processor.image_std, precision)
