"""Networks that turn images into features, by name, and the way of many images through one.

>>> network = feature_network("inception", device="cuda")
>>> found = extract(image_source("samples.npz"), network)
>>> found.statistics["features"].mean
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mezzotint.errors import MezzotintError, closest
from mezzotint.evaluation.classifier import trained_classifier
from mezzotint.evaluation.sources import (
    ImageSource,
    gathered,
    image_source,
    imported,
    of_first,
    place,
    random_order,
    to_channels,
)
from mezzotint.evaluation.statistics import FeatureStatistics
from mezzotint.files import tensors_digest
from mezzotint.pretrained import NO_CODE, from_hub, not_in_weights, transformers_for
from mezzotint.progress import track
from mezzotint.recipe import DataSettings
from mezzotint.representations.pca import Moments, principal_components

NETWORKS = ("inception", "dinov2", "clip", "classifier", "pixels")
"""What `feature_network` knows by name, besides ``pca:COMPONENTS`` and ``module:function``."""
#: pixels of an image up to which their covariance fits into memory (0.5 GB)
MAX_PCA = 8192

T = TypeVar("T")

OUTPUTS = ("features", "spatial", "logits", "probabilities")
PRECISIONS = ("fp32", "bf16")


class FeatureNetwork:
    """Images to features: what every score is taken in, and so named in every score.

    name: what tells it apart, weights and preprocessing included; features of another name are not comparable.
    dim: numbers in an image's features; None where only the images tell. device: where it computes.
    cacheable: whether `name` stands for all that it does, so that features may be kept under it. accuracy: of its
    logits on images that it was not fitted on, where that was measured.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[[Tensor], Tensor | Mapping[str, Tensor]],
        *,
        dim: int | None = None,
        channels: int | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        embed: Callable[[Sequence[str]], Tensor] | None = None,
        cacheable: bool = True,
        accuracy: float | None = None,
    ) -> None:
        """compute: uint8 (B, C, H, W) on the device to the outputs, or to the features alone; embed: captions (B) to
        (B, D). channels: that compute takes; None: 1 and 3. precision: fp32, or bf16 by autocast, which the name tells.
        """
        if precision not in PRECISIONS:
            raise MezzotintError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
        self.name = name if precision == "fp32" else f"{name} in {precision}"
        self.dim, self.device, self.cacheable, self.accuracy = dim, torch.device(device), cacheable, accuracy
        self._compute, self._channels, self._precision, self._embed = compute, channels, precision, embed

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 (B, C, H, W), C 1 or 3, to float32 tensors on `device`.

        "features" (B, dim) always; "spatial" (B, 2023) of inception, for sFID; "logits" or "probabilities" (B, K) of
        classifiers, for the Inception score. Raises `MezzotintError` for other images and for NaN or infinite outputs.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise MezzotintError(
                f"images must be uint8 (B, C, H, W) of 1 or 3 channels, got {images.dtype} of {tuple(images.shape)}"
            )
        images = images.to(self.device)
        with self._arithmetic():
            outputs = self._compute(images if self._channels is None else to_channels(images, self._channels))
        outputs = {"features": outputs} if isinstance(outputs, Tensor) else outputs
        if not isinstance(outputs, Mapping) or "features" not in outputs or not set(outputs) <= set(OUTPUTS):
            what = (
                f"a dict of {', '.join(map(repr, outputs))}" if isinstance(outputs, Mapping) else type(outputs).__name__
            )
            raise MezzotintError(
                f"the feature network {self.name} gave {what}; expected a tensor (B, D), or a dict with 'features' and "
                f"perhaps {', '.join(OUTPUTS[1:])}"
            )
        return {key: self._checked(key, value, len(images)) for key, value in outputs.items()}

    @property
    def knows_text(self) -> bool:
        """Whether `embed_text` works."""
        return self._embed is not None

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions (B) to features float32 (B, dim) beside those of images. Raises `MezzotintError` but for clip."""
        if self._embed is None:
            raise MezzotintError(f"the feature network {self.name} knows no text; choose clip")
        with torch.no_grad(), self._arithmetic():
            return self._checked("text", self._embed(captions), len(captions))

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self._precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        # By default GPUs round convolutions' inputs to TF32's 10 bits, which moves a score's third digit.
        cudnn = torch.backends.cudnn
        return cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )

    def _checked(self, key: str, value: Tensor, count: int) -> Tensor:
        width = self.dim if key == "features" else None
        if not isinstance(value, Tensor) or value.shape != (count, width or value.shape[-1]):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise MezzotintError(
                f"the feature network {self.name} gave {key} of shape {shape}; expected ({count}, {width or 'D'})"
            )
        bad = count - int(value.isfinite().all(1).sum())
        if bad:
            raise MezzotintError(
                f"the feature network {self.name} gave NaN or infinite {key} for {bad} of {count} images; look at the "
                "images and at the network's weights"
            )
        return value.float()


def feature_network(
    name: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    data: DataSettings | str | None = None,
    seed: int = 0,
) -> FeatureNetwork:
    """The feature network of this name.

    - inception: Inception-v3 of 2015, of FID, sFID and the Inception score; weights: torch-fidelity's file.
    - dinov2, clip: through transformers; weights: a folder or a hub name (DINOv2 ViT-L/14, CLIP ViT-L/14).
    - classifier: a small network fitted on the held-out images of `data`, with `seed`; needs no download.
    - pixels: the pixels themselves, in [0, 1].
    - pca:COMPONENTS: so many principal components of the pixels, of the training images of `data`.
    - module:function: yours: images uint8 (B, C, H, W) on `device` to features (B, D), or to a dict (`FeatureNetwork`).

    Raises `MezzotintError` for another name, weights that are missing or do not fit, or a package that is missing.
    """
    pca = name.startswith("pca:")
    if name != "classifier" and (data is not None or seed) and not (pca and not seed):
        raise MezzotintError(
            f"data and seed are those of the feature network classifier, not of {name}; leave them out"
        )
    if weights is not None and name not in ("inception", "dinov2", "clip"):
        raise MezzotintError(f"the feature network {name} takes no weights; leave them out")
    if name == "pixels":
        return FeatureNetwork("pixels", lambda images: images.flatten(1) / 255, device=device)
    if pca:
        return _pca(name, data, device)
    if name == "classifier":
        if data is None:
            raise MezzotintError("the feature network classifier is fitted on a data set; name it, such as data=digits")
        known = trained_classifier(data, seed=seed)
        known.net.to(device)
        channels, dim = known.net.shape[0], known.net.head.in_features
        return FeatureNetwork(
            known.name,
            known,
            dim=dim,
            channels=channels,
            device=device,
            precision=precision,
            accuracy=known.tested,
        )
    if name == "inception":
        return _inception(weights, device, precision)
    if name in ("clip", "dinov2"):
        return _transformer(name, weights, device, precision)
    if ":" in name:
        return _own(name, device, precision)
    raise MezzotintError(f"feature network {name!r} is unknown; {closest(name, NETWORKS)}, or module:function")


def _pca(name: str, data: DataSettings | str | None, device: torch.device | str) -> FeatureNetwork:
    """The first principal components of all pixels of an image, in [0, 1]."""
    number = name.removeprefix("pca:")
    if not (number.isascii() and number.isdigit() and int(number)) or data is None:
        raise MezzotintError(
            f"{name} names no principal components of images; give their number, such as pca:16, and a data set"
        )
    source, count = image_source(data, split="train"), int(number)
    moments: Moments | None = None
    for images, _ in source.batches(256):
        pixels = images.flatten(1) / 255
        if not count <= pixels.shape[1] <= MAX_PCA:
            raise MezzotintError(
                f"{count} principal components cannot be had of {pixels.shape[1]:,} pixels; ask for 1 to the number of "
                f"pixels, which may be up to {MAX_PCA:,}, or set data.size"
            )
        moments = moments or Moments(pixels.shape[1], device)
        moments.update(pixels.to(device))
    assert moments is not None
    mean, basis = moments.mean.float(), principal_components(moments.covariance)[0][:count].float()
    digest = tensors_digest({"mean": mean, "basis": basis})
    return FeatureNetwork(
        f"{name} ({source.identity}, {digest})",
        lambda images: (images.flatten(1) / 255 - mean) @ basis.T,
        dim=count,
        device=device,
    )


def _own(spec: str, device: torch.device | str, precision: str) -> FeatureNetwork:
    """The user's function. Its file's digest is in the name, but what it calls is not: nothing is kept under it."""
    function = imported(spec)
    try:
        content = Path(inspect.getfile(inspect.unwrap(function))).read_bytes()
    except (TypeError, OSError):  # not written in Python, or an object
        content = b""
    name = f"{spec} ({hashlib.sha256(content).hexdigest()[:8]})"
    return FeatureNetwork(name, function, device=device, precision=precision, cacheable=False)


# ---- Inception -------------------------------------------------------------------------------------------------------

#: the address's last part ends in the first 8 digits of the file's SHA-256
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
#: channels of the first branch of the block mixed_6 that ADM's sFID sees
SPATIAL_CHANNELS = 7


def _inception(weights: str | Path | None, device: torch.device | str, precision: str) -> FeatureNetwork:
    """The TensorFlow graph of 2015-12-05 in torch-fidelity's port, its resizing (to 299 × 299) included.

    As ADM's evaluator reads the graph: features pool_3 (2048); logits pool_3 times the last layer's weights, without
    its biases (1008); spatial the first 7 channels of mixed_6/conv (its first 1 × 1 convolution, after ReLU), in the
    order (17, 17, 7) of TensorFlow's axes. The converter of torch-fidelity calls mixed_6/conv Mixed_6d.branch1x1.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise MezzotintError(
            "the feature network inception needs the package torch-fidelity; install it with: "
            "pip install 'mezzotint[eval]'"
        ) from None
    if weights is None:
        of_first(_download_inception)
        file = _download_inception()
    else:
        file = Path(weights).expanduser()
    content, state = _read_weights(file)
    # torch-fidelity unpickles what it is given, so it is given a file of our own, of the tensors that were read safely.
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
    except RuntimeError as error:
        raise MezzotintError(
            f"{file} does not hold the weights of Inception-v3 ({str(error).splitlines()[-1].strip()}); expected those "
            f"of {INCEPTION_URL}"
        ) from None
    spatial: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        spatial[:] = [output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)]

    network.Mixed_6d.branch1x1.register_forward_hook(keep)
    network.to(device)

    def compute(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(images)
        return {"features": features, "spatial": spatial.pop(), "logits": logits}

    name = f"inception-v3 (2015 TensorFlow graph, torch-fidelity {content})"
    return FeatureNetwork(name, compute, dim=2048, channels=3, device=device, precision=precision)


def is_inception(name: str) -> bool:
    """Whether a feature network's name is that of the Inception-v3 of FID."""
    return name.startswith("inception-v3 (2015 TensorFlow graph")


def _download_inception() -> Path:
    """The weights' file in torch.hub's folder ($TORCH_HOME/hub/checkpoints), downloaded where it is missing."""
    name = INCEPTION_URL.rpartition("/")[2]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=file.stem[-8:], progress=False)
        except (OSError, RuntimeError) as error:  # no network, no space; another file than expected
            raise MezzotintError(
                f"the weights of inception are not at {file} and cannot be downloaded ({error}); fetch {INCEPTION_URL} "
                "where there is a network and put it there, or name its place by weights"
            ) from None
    return file


def _read_weights(file: Path) -> tuple[str, dict[str, Tensor]]:
    """The first 8 digits of the file's SHA-256, and its tensors. Nothing but tensors is unpickled."""
    try:
        content = file.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise MezzotintError(
            f"cannot read the weights {file} ({error.strerror or error}); fetch {INCEPTION_URL}"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        raise MezzotintError(f"{file} is no whole PyTorch file of tensors; fetch {INCEPTION_URL}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MezzotintError(f"{file} holds no weights by name; fetch {INCEPTION_URL}")
    return hashlib.sha256(content).hexdigest()[:8], state


# ---- CLIP and DINOv2 -------------------------------------------------------------------------------------------------

HUB_NAMES = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-large"}
#: captions at a time
CAPTIONS = 256
#: PIL's numbers of the filters that models ask for
FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """How images become a vision transformer's input: resized, cut, scaled by channel.

    resize: the whole image to a square of `crop` where it is None, else its shorter side to so many pixels.
    """

    crop: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W) to float32 (B, 3, crop, crop).

        The levels are PIL's: antialiased, rounded (halves up) and clamped after either axis. One in a thousand differs,
        by 1, as PIL's weights are fixed-point numbers.
        """
        height, width = images.shape[2:]
        size = [self.crop, self.crop]
        if self.resize is not None:
            size = [int(self.resize * side / min(height, width)) for side in (height, width)]
        x = images.float()
        for axes in ([height, size[1]], size):
            if list(x.shape[2:]) != axes:
                x = interpolate(x, axes, mode=self.mode, antialias=True, align_corners=False)
                x = (x + 0.5).floor().clamp(0, 255)
        top, left = ((side - self.crop) // 2 for side in x.shape[2:])
        x = x[:, :, top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (x / 255 - mean) / std


def _transformer(kind: str, weights: str | Path | None, device: torch.device | str, precision: str) -> FeatureNetwork:
    """CLIP's image embeddings (before they are normalised), or DINOv2's class token after the last normalisation.

    CLIP's images are resized and cut as its processor says. DINOv2's processor would cut off an eighth, but the Fréchet
    distance in DINOv2 (Stein et al. 2023, arXiv 2306.04675) is that of whole images, squeezed to a square.
    """
    transformers = transformers_for(f"the feature network {kind}")
    source = str(weights or HUB_NAMES[kind])
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser())

    def read(local: bool) -> Any:
        return (
            *transformers.AutoModel.from_pretrained(
                source, output_loading_info=True, **NO_CODE, local_files_only=local
            ),
            transformers.AutoImageProcessor.from_pretrained(source, **NO_CODE, local_files_only=local),
        )

    network, info, processor = _from_hub(kind, source, read)
    if not network.config.model_type.startswith(kind):
        raise MezzotintError(f"the model {source} is a {network.config.model_type}; expected a {kind}")
    if missing := sorted(info["missing_keys"]):  # transformers would leave them at random
        raise MezzotintError(
            f"the model {source} lacks {len(missing)} of its weights ({', '.join(missing[:3])}, …); download it again"
        )
    network.requires_grad_(False).eval().float()  # transformers keeps a file's half precision
    prepare = _preprocessing(kind, source, processor)
    digest = tensors_digest(network.state_dict(), prepare, not_in_weights(network.config))
    network.to(device)

    if kind == "dinov2":

        def compute(images: Tensor) -> Tensor:
            features: Tensor = network(pixel_values=prepare(images)).pooler_output
            return features

        name = f"dinov2 ({network.config.hidden_size} features, {prepare.crop} px, {digest})"
        return FeatureNetwork(
            name, compute, dim=network.config.hidden_size, channels=3, device=device, precision=precision
        )

    def compute_clip(images: Tensor) -> Tensor:
        pooled = network.vision_model(pixel_values=prepare(images)).pooler_output
        features: Tensor = network.visual_projection(pooled)
        return features

    tokenizers: list[Any] = []  # read when first used: scores of images need none

    def embed(captions: Sequence[str]) -> Tensor:
        if not tokenizers:
            read = partial(transformers.AutoTokenizer.from_pretrained, source, **NO_CODE)
            tokenizers.append(_from_hub("tokenizer of clip", source, lambda local: read(local_files_only=local)))
        embedded = []
        for start in range(0, len(captions), CAPTIONS):
            tokens = tokenizers[0](
                list(captions[start : start + CAPTIONS]),
                padding=True,
                truncation=True,  # as everywhere: CLIP sees 77 tokens
                max_length=network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(device)
            pooled = network.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            embedded.append(network.text_projection(pooled))
        return torch.cat(embedded)

    dim = network.config.projection_dim
    name = f"clip ({dim} features, {prepare.crop} px, {digest})"
    return FeatureNetwork(name, compute_clip, dim=dim, channels=3, device=device, precision=precision, embed=embed)


def _preprocessing(kind: str, source: str, processor: Any) -> Preprocessing:
    """What preprocessor_config.json says, as far as it may differ between models of these kinds."""
    size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
    resize = size.get("shortest_edge")
    cut = crop if getattr(processor, "do_center_crop", False) else {"height": resize, "width": resize} | size
    side = cut.get("height")
    if side is None or side != cut.get("width"):
        raise MezzotintError(
            f"the image processor of {source} makes no squares (size {size}, crop {crop}); take another"
        )
    if processor.resample not in FILTERS:
        raise MezzotintError(
            f"the image processor of {source} resizes by PIL's filter {processor.resample}; known: bilinear, bicubic"
        )
    return Preprocessing(
        side,
        None if kind == "dinov2" else resize,
        tuple(processor.image_mean),
        tuple(processor.image_std),
        FILTERS[processor.resample],
    )


def _from_hub(kind: str, source: str, read: Callable[[bool], T]) -> T:
    name = HUB_NAMES["dinov2" if kind == "dinov2" else "clip"]
    return from_hub(kind, source, read, name, ", and name that folder by weights")


# ---- Many images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extracted:
    """What a feature network saw in the images of a source; the same on every process."""

    network: str
    """Its name."""
    source: str
    """The identity of the images."""
    count: int
    """How many there were."""
    statistics: dict[str, FeatureStatistics]
    """Of "features", and of "spatial" where the network has them."""
    rows: Tensor
    """The features float32 (n, D) of the images `indices`, on the CPU."""
    indices: Tensor
    """int64 (n,): in random order, always the same, so that a part of them is a fair sample."""
    logits: Tensor | None
    """float32 (count, K) in the images' order, where the network classifies."""
    labels: Tensor | None
    """int64 (count,), where the source has them."""


def extract(
    source: ImageSource,
    network: FeatureNetwork,
    *,
    batch_size: int = 64,
    keep_rows: int | None = 0,
    progress: bool = False,
) -> Extracted:
    """Go through all images of `source` once, and keep statistics of their features.

    keep_rows: also the features of so many images, chosen at random, always the same ones; the first ones of a source
    of unknown length; None: of all. Processes joined by torch.distributed (`training.parallel.world`) share the
    batches, and get the result that one process would get, up to the rounding of float64 sums. Raises `MezzotintError`
    as source and network do, on all processes, and for fewer than 2 images, which have no covariance.
    """
    if keep_rows is not None and keep_rows < 0:
        raise MezzotintError(f"keep_rows must be at least 0, got {keep_rows}")
    rank, world_size = place()
    total = None if source.count is None else math.ceil(source.count / batch_size / world_size)
    wanted: Tensor | None = None
    if keep_rows is not None:
        wanted = torch.arange(keep_rows) if source.count is None else random_order(source.count, keep_rows)
    statistics: dict[str, FeatureStatistics] = {}

    def own_share() -> list[_Part]:
        parts = []
        batches = source.batches(batch_size, rank=rank, world_size=world_size)
        for number, (images, labels) in enumerate(
            track(batches, "features", total=total or 0, enabled=progress and total is not None)
        ):
            outputs = network(images)
            for key in ("features", "spatial"):
                if key in outputs:
                    statistics.setdefault(key, FeatureStatistics(network.device)).update(outputs[key])
            first = (rank + number * world_size) * batch_size
            indices = torch.arange(first, first + len(images))
            kept = torch.ones_like(indices, dtype=torch.bool) if wanted is None else torch.isin(indices, wanted)
            rows = outputs["features"][kept.to(network.device)].cpu()
            parts.append(_Part(first, len(images), indices[kept], rows, _logits(outputs), labels))
        return parts

    shares = gathered(own_share)
    parts = sorted((part for share in shares for part in share), key=lambda part: part.first)
    count = sum(part.count for part in parts)
    if count < 2:
        raise MezzotintError(f"{source.identity} has {count} images; statistics need at least 2")
    # A process without a batch has no statistics, but takes part in joining them.
    keys = max(gathered(lambda: tuple(statistics)), key=len)
    joined = {key: statistics.get(key, FeatureStatistics(network.device)).all_reduce() for key in keys}
    indices, rows = (torch.cat(tensors) for tensors in zip(*((part.indices, part.rows) for part in parts), strict=True))
    if source.count is not None or len(indices) == count:
        order = random_order(count, len(indices))
        rows, indices = rows[order.argsort().argsort()], order
    return Extracted(
        network=network.name,
        source=source.identity,
        count=count,
        statistics=joined,
        rows=rows,
        indices=indices,
        logits=_joined([part.logits for part in parts]),
        labels=_joined([part.labels for part in parts]),
    )


@dataclass(frozen=True)
class _Part:
    """What is kept of one batch."""

    first: int
    count: int
    indices: Tensor
    rows: Tensor
    logits: Tensor | None
    labels: Tensor | None


def _logits(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Logits (B, K), or what are as good, on the CPU."""
    if "probabilities" in outputs:
        smallest = torch.finfo(torch.float32).tiny  # no logit may be infinite
        return outputs["probabilities"].clamp(min=smallest).log().cpu()
    return outputs["logits"].cpu() if "logits" in outputs else None


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if len(there) == len(tensors) else None
