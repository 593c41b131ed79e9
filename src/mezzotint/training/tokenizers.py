"""Fitting tokenizers: from a recipe's training images to a folder, and into the run folders that need one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.data import CachedLatents, ImageDataset, ImageStream
from mezzotint.data.loader import BatchOrder, dataset_batches, iterate_batches
from mezzotint.data.splits import NoSuchSplit
from mezzotint.data.transforms import flip
from mezzotint.errors import MezzotintError
from mezzotint.files import new_folder, write_text
from mezzotint.images import save_grid
from mezzotint.locks import claimed
from mezzotint.progress import console, progress_bar
from mezzotint.randomness import generator_for
from mezzotint.recipe import Recipe, as_recipe
from mezzotint.representations.pca import Moments, principal_components
from mezzotint.representations.tokenizer import (
    CLASSES,
    OWN_FOLDER,
    TOKENIZERS,
    ConvVAE,
    FitSettings,
    PatchAutoencoder,
    PatchPCA,
    PatchTokenizer,
    Tokenizer,
    TokenizerInfo,
    open_tokenizer,
    patches,
    save_tokenizer,
)
from mezzotint.training.parallel import World, choose_device
from mezzotint.training.tokenizer_losses import (
    FeatureMaps,
    PatchDiscriminator,
    adaptive_weight,
    feature_maps,
    hinge_loss,
    kl_divergence,
    perceptual_distance,
)

STREAM = 4  # of random numbers, beside the training loop's
SHOWN, FILTERS = 20, 256
LOG_EVERY = 100


def fit_tokenizer(
    recipe: Recipe | str | Path, out: str | Path, *, device: str = "auto", quiet: bool = False, trust_code: bool = False
) -> dict[str, Any]:
    """Fit the tokenizer of `recipe.representation` to `recipe.data` into the new folder `out`; returns its metrics.

    The folder appears whole or not at all. The metrics are those of `measure` on the test split, on the training
    images where there is none, and the means of the losses over the last tenth of the steps. trust_code: import the
    module:function that the recipe may name. Raises `MezzotintError` for a representation that is not fitted, a folder
    in use, data that do not fit, a non-finite loss, a full disk.
    """
    recipe = as_recipe(recipe)
    settings, out = recipe.representation, Path(out)
    if settings.name not in TOKENIZERS:
        raise MezzotintError(
            f"the representation {settings.name!r} is not fitted; set representation to one of {', '.join(TOKENIZERS)}"
        )
    with claimed(out):
        return _fit_into(out, recipe, device, quiet, trust_code)


def _fit_into(out: Path, recipe: Recipe, device: str, quiet: bool, trust_code: bool) -> dict[str, Any]:
    recipe = recipe.settled()
    settings, here = recipe.representation, choose_device(device)
    dataset = _images(recipe, "train")
    try:
        split, held_out = "test", _images(recipe, "test")
    except NoSuchSplit:
        split, held_out = "train", dataset
    info = tokenizer_info(recipe, dataset.identity)
    tokenizer, losses = fit(info, dataset, recipe, here, quiet=quiet, trust_code=trust_code)
    some = next(sampled_batches(held_out, SHOWN, SHOWN, recipe)).to(here)
    with torch.no_grad():
        pairs = torch.stack([some, tokenizer.decode(tokenizer.encode(some))], dim=1)
    metrics: dict[str, Any] = {"split": split} | measure(
        tokenizer, sampled_batches(held_out, settings.fit.examples, settings.fit.batch_size, recipe, flips=False)
    )
    metrics |= {"latent_scale": tokenizer.latent_scale.item(), "losses": losses}
    with new_folder(out) as folder:
        save_tokenizer(tokenizer, folder)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        # A row of images, and below it a row of what became of them.
        rows = [row for ten in pairs.split(10) for row in ten.unbind(1)]
        save_grid(torch.cat(rows), folder / "reconstructions.png", columns=10)
        if isinstance(tokenizer, PatchTokenizer):
            save_filters(tokenizer, folder / "filters.png")
    return metrics


def tokenizer_info(recipe: Recipe, data: str = "") -> TokenizerInfo:
    """What a tokenizer of the recipe's is, fitted to a data set of this identity."""
    settings = recipe.representation
    return TokenizerInfo.model_validate(
        {
            "name": settings.name,
            "stride": settings.stride,
            "channels": settings.channels,
            "fit": settings.fit,
            "image_channels": recipe.image_channels,
            "data": data,
        }
    )


def own_tokenizer(recipe: Recipe, run: Path, here: World, *, quiet: bool = False, trust_code: bool = False) -> Recipe:
    """`recipe` with a tokenizer of the run's own, RUN/tokenizer: a copy of representation.path, else fitted here.

    Any other recipe as it is. Every process calls it. Raises `MezzotintError` as `fit_tokenizer` and `open_tokenizer`
    do, and for a run that has another tokenizer than representation.path.
    """
    settings, problem, place = recipe.representation, "", run / OWN_FOLDER
    if settings.name not in TOKENIZERS:
        return recipe
    if here.is_main:
        try:
            _provide(recipe, place, str(here.device), quiet, trust_code)
        except MezzotintError as error:
            problem = str(error)
    if here.any(bool(problem)):
        raise MezzotintError(problem or "the tokenizer cannot be had; see the first process's message")
    return recipe.model_copy(update={"representation": settings.model_copy(update={"path": str(place)})})


def _provide(recipe: Recipe, place: Path, device: str, quiet: bool, trust_code: bool) -> None:
    settings = recipe.representation
    wanted: dict[str, Any] = {"name": settings.name, "stride": settings.stride, "channels": settings.channels}
    given = None if settings.path is None else Path(settings.path).expanduser()
    if place.exists():
        own = open_tokenizer(place, **wanted)
        if given is not None and given.exists() and open_tokenizer(given).digest != own.digest:
            raise MezzotintError(
                f"{place} is another tokenizer than representation.path {given}; leave it out, or choose another --out"
            )
        if given is None and own.info.fit != settings.fit:
            raise MezzotintError(f"{place} was fitted with other settings than representation.fit; remove it")
        return
    if given is None:
        if recipe.data.name == "latents":
            raise MezzotintError(
                "the data are latents, which no tokenizer can be fitted to; set representation.path to the one that "
                "encoded them"
            )
        if not quiet:
            console.print(f"fitting {settings.name} into {place}", soft_wrap=True)
        fit_tokenizer(recipe, place, device=device, quiet=quiet, trust_code=trust_code)
        return
    open_tokenizer(given, **wanted)
    with new_folder(place) as folder:
        shutil.copytree(given, folder, dirs_exist_ok=True)


def check_latents(dataset: ImageDataset | ImageStream, recipe: Recipe) -> None:
    """Raises `MezzotintError` for cached latents of another tokenizer than that of representation.path."""
    if not isinstance(dataset, CachedLatents):
        return
    assert recipe.representation.path is not None
    if open_tokenizer(recipe.representation.path).digest != dataset.info.autoencoder:
        raise MezzotintError(
            f"the latents in {dataset.folder} were encoded by another tokenizer than {recipe.representation.path}; set "
            "representation.path to the one that encoded them"
        )


def _images(recipe: Recipe, split: str) -> ImageDataset | ImageStream:
    """A split of the recipe's images. Raises `MezzotintError` where they are none, or of another shape."""
    dataset = recipe.data.load(split)
    if isinstance(dataset, CachedLatents):
        raise MezzotintError("the data are latents, and a tokenizer is fitted to images; set data to the images")
    expected = (recipe.image_channels, recipe.data.size, recipe.data.size)
    if dataset.image_shape != expected:
        raise MezzotintError(
            f"the data set's images are {dataset.image_shape}, expected {expected} (channels, height, width); "
            "set data.size and data.channels"
        )
    return dataset


@dataclass(frozen=True)
class _Slices:
    """Chosen examples one after another: an `Order`."""

    chosen: Tensor
    size: int

    def indices(self, step: int) -> Tensor:
        return self.chosen[step * self.size : (step + 1) * self.size]


def sampled_batches(
    dataset: ImageDataset | ImageStream, count: int, batch_size: int, recipe: Recipe, *, flips: bool | None = None
) -> Iterator[Tensor]:
    """Up to `count` images drawn at random from the data set, each once, in batches (B, C, H, W).

    flips: each image's mirror image, too; None: where data.flip. Of a stream, the first `count`, made whole batches.
    """
    if isinstance(dataset, ImageStream):
        order = BatchOrder(None, batch_size, recipe.seed)
        stop = math.ceil(count / batch_size)
        batches = iterate_batches(dataset, order, start_step=0, stop_step=stop, workers=recipe.data.workers)
    else:
        chosen = BatchOrder(len(dataset), min(count, len(dataset)), recipe.seed).indices(0)
        steps = range(math.ceil(len(chosen) / batch_size))
        batches = dataset_batches(dataset, _Slices(chosen, batch_size), steps, slice(None), recipe.data.workers)
    for batch in batches:
        yield batch.images
        if recipe.data.flip if flips is None else flips:
            yield batch.images.flip(-1)


# ------------------------------------------------------------------------------------------------------------- fitting


def fit(
    info: TokenizerInfo,
    dataset: ImageDataset | ImageStream,
    recipe: Recipe,
    device: torch.device,
    *,
    quiet: bool,
    trust_code: bool,
) -> tuple[Tokenizer, dict[str, float]]:
    """A tokenizer fitted to the data set, frozen, and its losses at the end (none of PCA).

    Raises `MezzotintError` for data that are too few, or a loss that is not finite.
    """

    def batches() -> Iterator[Tensor]:
        found = sampled_batches(dataset, info.fit.examples, info.fit.batch_size, recipe)
        return (images.to(device) for images in found)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = CLASSES[info.name](info).to(device)
    losses: dict[str, float] = {}
    if isinstance(tokenizer, PatchTokenizer):
        moments = Moments(info.patch_dimension, device)
        for images in batches():
            moments.update(patches(images, info.stride))
        tokenizer.mean.copy_(moments.mean)
        if isinstance(tokenizer, PatchPCA):
            set_components(tokenizer, moments.covariance)
    if isinstance(tokenizer, PatchAutoencoder | ConvVAE):
        losses = train_tokenizer(tokenizer, dataset, recipe, quiet=quiet, trust_code=trust_code)
    normalise(tokenizer, batches())
    return tokenizer.requires_grad_(False).eval(), losses


def set_components(tokenizer: PatchPCA, covariance: Tensor) -> None:
    """Give the tokenizer the principal components of patches with this covariance (D, D).

    Raises `MezzotintError` where it whitens components that have no variance.
    """
    basis, variances = principal_components(covariance)
    rank = int((variances > variances[0] * torch.finfo(torch.float32).eps).sum())
    if tokenizer.info.fit.whiten and rank < tokenizer.channels:
        raise MezzotintError(
            f"only {rank} components of these patches vary, and {tokenizer.channels} cannot be whitened; set "
            f"representation.channels={rank} or representation.fit.whiten=false"
        )
    tokenizer.basis.copy_(basis)
    tokenizer.variances.copy_(variances)


@torch.no_grad()
def normalise(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> None:
    """Measure the latents' mean and scale (see `Tokenizer`) on these images; draws from a posterior included."""
    moments, noise, count = Moments(tokenizer.channels, tokenizer.device), 0.0, 0
    for images in batches:
        mean, log_variance = tokenizer.moments(images)
        moments.update(mean.movedim(1, -1).flatten(0, -2))
        if log_variance is not None:
            noise += log_variance.double().exp().sum().item()
            count += log_variance.numel()
    variance = moments.covariance.diagonal().mean().item() + (noise / count if count else 0.0)
    if not variance > 0:
        raise MezzotintError("the latents do not vary at all; check that the images do, or set other fit settings")
    tokenizer.latent_mean.copy_(moments.mean.view(-1, 1, 1))
    tokenizer.latent_scale.fill_(math.sqrt(variance))


class TokenizerLosses:
    """The loss of a tokenizer on a batch, and its discriminator.

    Per image: Σ|x − x̂|² (or Σ|x − x̂|) + N·perceptual_weight·perceptual + kl_weight·KL + adversarial, N numbers an
    image, the last adversarial_weight·λ·(−mean D(x̂)) with VQGAN's adaptive λ. What has the weight 0 is not computed.
    """

    def __init__(
        self, info: TokenizerInfo, size: int, seed: int, device: torch.device, *, trust_code: bool = False
    ) -> None:
        fit = self.settings = info.fit
        self.features: FeatureMaps | None = None
        self.discriminator: PatchDiscriminator | None = None
        if fit.perceptual_weight:
            self.features = feature_maps(fit.perceptual_network, size, device, trust_code=trust_code)
        if fit.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = PatchDiscriminator(
                    info.image_channels, width=fit.discriminator_width, layers=fit.discriminator_layers
                ).to(device)

    def tokenizer_loss(
        self, tokenizer: Tokenizer, images: Tensor, generator: torch.Generator, *, adversarial: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss ("loss") with its parts, means over the batch, and the reconstructions."""
        fit = self.settings
        mean, log_variance = tokenizer.moments(images)
        z = mean
        if log_variance is not None:
            eps = torch.randn(mean.shape, generator=generator, device=mean.device)
            z = mean + torch.exp(0.5 * log_variance) * eps
        made = tokenizer.reconstruct(z)
        difference = images - made
        error = difference.abs() if fit.reconstruction == "l1" else difference.square()
        parts = {"reconstruction": error.flatten(1).sum(1).mean()}
        total = parts["reconstruction"]
        if self.features is not None:
            parts["perceptual"] = perceptual_distance(self.features, images, made).mean()
            total = total + fit.perceptual_weight * images[0].numel() * parts["perceptual"]
        likelihood = total
        if log_variance is not None and fit.kl_weight:
            parts["kl"] = kl_divergence(mean, log_variance).mean()
            total = total + fit.kl_weight * parts["kl"]
        if self.discriminator is not None and adversarial:
            assert isinstance(tokenizer, ConvVAE)
            parts["adversarial"] = -self.discriminator(made).mean()
            weight = adaptive_weight(likelihood, parts["adversarial"], tokenizer.last_layer).detach()
            total = total + fit.adversarial_weight * weight * parts["adversarial"]
        return {"loss": total, **parts}, made


def train_tokenizer(
    tokenizer: PatchAutoencoder | ConvVAE,
    dataset: ImageDataset | ImageStream,
    recipe: Recipe,
    *,
    quiet: bool = False,
    trust_code: bool = False,
) -> dict[str, float]:
    """Train in place; returns the means of the losses over the last tenth of the steps.

    What a step does depends on (recipe.seed, step) and the steps before. Raises `MezzotintError` for a non-finite loss.
    """
    settings, device = tokenizer.info.fit, tokenizer.device
    losses = TokenizerLosses(tokenizer.info, recipe.data.size, recipe.seed, device, trust_code=trust_code)
    critic = losses.discriminator
    step_tokenizer = _adam(tokenizer.train(), settings, settings.steps)
    step_critic = None
    if critic is not None:
        step_critic = _adam(critic, settings, settings.steps - settings.adversarial_start)
    order = BatchOrder.over(dataset, settings.batch_size, recipe.seed)
    batches = iterate_batches(dataset, order, start_step=0, stop_step=settings.steps, workers=recipe.data.workers)
    log = _FitLog(settings.steps, quiet)
    with log.bar:
        for step, batch in enumerate(batches):
            generator = generator_for(recipe.seed, STREAM, step, device=device)
            images = batch.images.to(device, non_blocking=True)
            if recipe.data.flip:
                images = flip(images, torch.rand(len(images), generator=generator, device=device) < 0.5)
            adversarial = critic is not None and step >= settings.adversarial_start
            if critic is not None:
                critic.requires_grad_(False)  # passes gradients on, and keeps none
            parts, made = losses.tokenizer_loss(tokenizer, images, generator, adversarial=adversarial)
            step_tokenizer(parts["loss"])
            if adversarial and critic is not None and step_critic is not None:
                critic.requires_grad_(True)
                parts["discriminator"] = hinge_loss(critic(images), critic(made.detach()))
                step_critic(parts["discriminator"])
            log.add(step + 1, {name: part.detach() for name, part in parts.items()})
    return log.means()


def _adam(module: nn.Module, settings: FitSettings, steps: int) -> Callable[[Tensor], None]:
    """What moves the module down a loss, by `steps` steps of Adam in all."""
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.lr, betas=settings.betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


class _FitLog:
    """Losses to the terminal, read from the device every `LOG_EVERY` steps only, when they are also checked."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.steps, self.quiet = steps, quiet
        self.pending: list[dict[str, Tensor]] = []
        self.kept: list[tuple[int, dict[str, float]]] = []
        self.bar = progress_bar("loss")
        self.bar.disable = self.bar.disable or quiet
        self.task = self.bar.add_task("fitting", total=steps, loss="")

    def add(self, step: int, parts: dict[str, Tensor]) -> None:
        """The losses of a finished step. Raises `MezzotintError` where one since the last check is not finite."""
        self.pending.append(parts)
        self.bar.update(self.task, completed=step)
        if step % LOG_EVERY and step != self.steps:
            return
        for number, values in enumerate(self.pending, step - len(self.pending) + 1):
            found = {name: value.item() for name, value in values.items()}
            if not math.isfinite(found["loss"]):
                raise MezzotintError(
                    f"the loss became {found['loss']} at step {number} of fitting; lower representation.fit.lr"
                )
            self.kept.append((number, found))
        self.pending.clear()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.bar.update(self.task, loss=shown)
        if not self.quiet and not console.is_terminal and (step % (10 * LOG_EVERY) == 0 or step == self.steps):
            console.print(f"fitting step {step}/{self.steps}  {shown}")

    def means(self) -> dict[str, float]:
        """Each loss over the last tenth of the steps that had it."""
        last = [values for number, values in self.kept if number > self.steps - max(1, self.steps // 10)]
        names = dict.fromkeys(name for values in last for name in values)
        columns = {name: [values[name] for values in last if name in values] for name in names}
        return {name: sum(column) / len(column) for name, column in columns.items()}


# ----------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> dict[str, float | int]:
    """How well images come back, from the means of their posteriors: "mse", "psnr", "explained_variance", "images".

    mse: mean squared error of the decoded images in [-1, 1], and psnr that in decibels, 10·log10(4 / mse).
    explained_variance: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over patches of stride × stride, x̄ the average patch, x̂ not
    clamped; for PCA on its own training images the share of the first components' variances.
    """
    errors, unclamped, squares, images_seen, numbers = 0.0, 0.0, 0.0, 0, 0
    sums = torch.zeros(tokenizer.info.patch_dimension, dtype=torch.float64, device=tokenizer.device)
    for batch in batches:
        images = batch.to(tokenizer.device)
        made = tokenizer.decode(tokenizer.encode(images), clamp=False)
        errors += (images - made.clamp(-1, 1)).double().square().sum().item()
        unclamped += (images - made).double().square().sum().item()
        vectors = patches(images, tokenizer.stride).double()
        squares, sums = squares + vectors.square().sum().item(), sums + vectors.sum(0)
        images_seen, numbers = images_seen + len(images), numbers + images.numel()
    mse = errors / numbers
    variation = squares - sums.square().sum().item() * len(sums) / numbers  # about the average patch
    return {
        "images": images_seen,
        "mse": mse,
        "psnr": 10 * math.log10(4 / max(mse, 1e-20)),
        "explained_variance": 1 - unclamped / max(variation, 1e-20),
    }


def save_filters(tokenizer: PatchTokenizer, path: str | Path) -> None:
    """Draw the filters as a PNG, each p × p and scaled by its largest magnitude (l-DAE, figure 4).

    Of PCA the components, the largest variance first, up to 256 of all D; else V's rows (of means), then U's.
    """
    if isinstance(tokenizer, PatchPCA):
        rows = tokenizer.basis[:FILTERS]
    else:
        v, u = tokenizer.filters()
        rows = torch.cat([v[: tokenizer.channels][:FILTERS], u[:FILTERS]])
    scaled = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    pictures = scaled.view(len(rows), tokenizer.info.image_channels, tokenizer.stride, tokenizer.stride)
    columns = math.ceil(math.sqrt(len(rows)))
    save_grid(pictures.detach(), path, columns=columns if isinstance(tokenizer, PatchPCA) else len(rows) // 2)
