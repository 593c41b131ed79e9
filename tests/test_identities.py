"""What is kept by an identity: it changes with whatever changes the content, and with nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_captions import write_shard

import mezzotint
from mezzotint.data import load
from mezzotint.data.base import InMemoryImages, same_content
from mezzotint.data.huggingface import Columns
from mezzotint.data.latents import CacheInfo
from mezzotint.evaluation import classifier, probing
from mezzotint.evaluation.classifier import trained_classifier
from mezzotint.evaluation.features import FeatureNetwork, feature_network
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.sources import PipelineSource, image_source, picture_folder
from mezzotint.guidance import Guidance
from mezzotint.recipe import override_recipe

# ---- Data sets -------------------------------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    """8 × 8 pixels, half of them transparent."""
    levels = np.random.default_rng(number).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    levels[..., 3] = 255 * (levels[..., 3] > 127)
    return Image.fromarray(levels)


def encoded(number: int) -> bytes:
    from io import BytesIO

    picture(number).save(data := BytesIO(), "png")
    return data.getvalue()


def write_idx(folder: Path, labels: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", (np.arange(6) + labels).astype(np.uint8) % 10)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind of data set."""
    place = tmp_path_factory.mktemp("places")
    for number in range(6):
        for folder in (place / "photos" / f"class{number % 2}", place / "captions"):
            folder.mkdir(parents=True, exist_ok=True)
            picture(number).save(folder / f"{number}.png")
        clip = place / "clips" / f"class{number % 2}" / f"{number}.gif"
        clip.parent.mkdir(parents=True, exist_ok=True)
        first, *rest = (picture(10 * number + k).convert("RGB") for k in range(5))
        first.save(clip, save_all=True, append_images=rest)
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}", "other": f"number {n}"}) for n in range(6)]
    (place / "captions" / "metadata.jsonl").write_text("\n".join(lines))
    texts = [json.dumps({"text": f"picture {n}", "other": f"number {n}"}).encode() for n in range(6)]
    write_shard(place / "shards" / "a.tar", [{"png": encoded(n), "json": texts[n]} for n in range(6)])
    write_idx(place / "idx")
    return place


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "digits": ({}, {"size": 9, "channels": 3, "labels": False, "split": "test"}),
    "idx": ({"path": "idx"}, {"size": 9, "channels": 3, "labels": False, "class_names": tuple("abcdefghij")}),
    "folder": (
        {"path": "photos", "size": 8},
        {"size": 9, "channels": 1, "labels": False, "background": "red", "test_fraction": 0.5},
    ),
    "captions": (
        {"path": "captions", "size": 8},
        {"size": 9, "channels": 1, "caption_column": "other", "background": "red", "test_fraction": 0.5},
    ),
    "webdataset": (
        {"path": "shards", "size": 8},
        {"size": 9, "channels": 1, "caption_column": "other", "background": "red"},
    ),
    "video": (
        {"path": "clips", "size": 8, "frames": 2},
        {"size": 9, "channels": 1, "frames": 3, "frame_stride": 1, "labels": False, "background": "red"},
    ),
    "moving-digits": (
        {"examples": 4, "frames": 2},
        {"examples": 5, "frames": 3, "objects": 2, "labels": False, "size": 18, "channels": 3, "split": "test"},
    ),
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, *item) for name, (_, more) in OPTIONS.items() for item in more.items()],
    ids=str,
)
def test_a_data_set_is_told_by_every_option(places: Path, name: str, option: str, value: Any) -> None:
    base = OPTIONS[name][0]
    base = base | ({"path": places / base["path"]} if "path" in base else {})
    assert load(name, **base).identity == load(name, **base).identity
    assert load(name, **base).identity != load(name, **base | {option: value}).identity


@pytest.mark.parametrize("name", ["folder", "captions", "webdataset", "video"])
def test_what_no_image_depends_on_is_in_no_identity(places: Path, name: str) -> None:
    base = OPTIONS[name][0] | {"path": places / OPTIONS[name][0]["path"]}
    more = {"max_unreadable": 0} | ({"shuffle_buffer": 1} if name == "webdataset" else {})
    assert load(name, **base | more).identity == load(name, **base).identity


def test_labels_and_names_of_files_are_content(tmp_path: Path) -> None:
    found = []
    for number, place in enumerate(("a/0.png", "a/1.png", "b/0.png")):
        for file, which in ((place, 0), ("a/9.png", 1), ("b/9.png", 2)):
            path = tmp_path / str(number) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(which).save(path)
        found.append(load("folder", path=tmp_path / str(number), size=8).identity)
    assert not same_content(found[0], found[2]), "the same pictures, one of another class"
    assert not same_content(found[0], found[1]), "the same pictures, one of another name"
    write_idx(tmp_path / "idx")
    before = load("idx", path=tmp_path / "idx").identity
    write_idx(tmp_path / "idx", labels=1)
    assert load("idx", path=tmp_path / "idx").identity != before


def test_a_row_of_the_hub_is_told_by_image_label_and_captions() -> None:
    columns = Columns("image", "label", "text", ("a", "b"))
    row = {"image": {"bytes": encoded(0), "path": None}, "label": 0, "text": "a cat"}
    contents = [columns.content(row | more) for more in ({}, {"label": 1}, {"text": "a dog"})]
    contents.append(columns.content(row | {"image": {"bytes": encoded(1), "path": None}}))
    assert len({*contents}) == 4


def test_a_hub_set_is_told_by_its_background_and_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [{"bytes": encoded(number), "path": None} for number in range(4)]
    features = datasets.Features(
        {key: datasets.Image() for key in ("one", "two")}
        | {key: datasets.ClassLabel(names=["a", "b"]) for key in ("kind", "rest")}
        | {"text": datasets.Value("string")}
    )
    rows = {"one": pictures, "two": pictures[::-1], "kind": [0, 1, 0, 1], "rest": [1, 1, 0, 0], "text": [*"wxyz"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    base = {"path": tmp_path / "set", "size": 8, "image_column": "one", "label_column": "kind"}
    more: list[dict[str, Any]] = [
        {}, {"size": 9}, {"channels": 1}, {"background": "red"}, {"image_column": "two"}, {"label_column": "rest"},
        {"labels": False}, {"caption_column": "text"}, {"test_fraction": 0.5},
    ]  # fmt: skip
    for streaming in (False, True):
        kept = [options for options in more if not (streaming and "test_fraction" in options)]
        found = [load("huggingface", **base | options, streaming=streaming).identity for options in kept]
        assert len({*found}) == len(kept)


def test_latents_are_told_by_all_that_made_them() -> None:
    info = {
        "image_shape": (3, 8, 8), "latent_shape": (4, 1, 1), "class_names": ("a",), "stochastic": True,
        "autoencoder": "0123", "precision": "fp32", "tiling": False, "scale": 0.5, "shift": 0.0, "std": None,
        "dtype": "float32", "shard_size": 4, "splits": {"train": {"identity": "x", "examples": 9}},
    }  # fmt: skip
    other = {
        "image_shape": (1, 8, 8), "latent_shape": (4, 2, 2), "class_names": ("b",), "stochastic": False,
        "autoencoder": "3210", "precision": "bf16", "tiling": True, "scale": 0.6, "shift": 0.1, "std": (1.0,) * 4,
        "dtype": "float16", "shard_size": 5, "splits": {"train": {"identity": "y", "examples": 9}},
    }  # fmt: skip
    assert set(other) == set(CacheInfo.model_fields) - {"format"}
    found = {CacheInfo.parse(info | {key: value}).fingerprint("train") for key, value in other.items()}
    assert len(found | {CacheInfo.parse(info).fingerprint("train")}) == len(other) + 1


# ---- What is evaluated -----------------------------------------------------------------------------------------------


def test_a_source_is_told_by_its_images(places: Path) -> None:
    found = [image_source("digits", **options).identity for options in ({}, {"count": 50}, {"count": 60})]
    found += [picture_folder(places / "photos").identity, picture_folder(places / "photos", size=7).identity]
    found += [picture_folder(places / "photos", background=colour).identity for colour in ("red", "blue")]
    found += [
        picture_folder(places / "photos", labels=False).identity,
        picture_folder(places / "photos", channels=1).identity,
    ]
    assert len({*found}) == len(found)


def test_samples_are_told_by_all_that_they_depend_on(pipeline: mezzotint.Pipeline) -> None:
    asked: list[dict[str, Any]] = [
        {}, {"count": 11}, {"seed": 1}, {"guidance": 2.0}, {"guidance": Guidance(scale=2.0, interval=(0.0, 0.5))},
        {"classes": [3]}, {"sampler": "ddim"}, {"steps": 4}, {"sampler": "ddim", "eta": 0.5},
    ]  # fmt: skip
    found = [PipelineSource(pipeline, **{"count": 10} | options).identity for options in asked]
    recipe = override_recipe(pipeline.recipe, ["sampling.spacing=quadratic"])
    found.append(PipelineSource(mezzotint.Pipeline(recipe, pipeline.denoiser), 10).identity)
    with torch.no_grad():
        next(pipeline.denoiser.parameters()).add_(1e-3)
    found.append(PipelineSource(pipeline, 10).identity)
    assert len({*found}) == len(found)


def test_a_network_is_told_by_what_it_computes() -> None:
    names = [feature_network(name, data="digits").name for name in ("pca:3", "pca:4")]
    names += [FeatureNetwork("a", lambda x: x, precision=precision).name for precision in ("fp32", "bf16")]
    assert len({*names}) == len(names)
    assert not feature_network(f"{__name__}:one_pixel").cacheable, "what it calls is not in its name"


def one_pixel(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, :2, 4].float()


def test_references_of_two_networks_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path))
    networks = [FeatureNetwork(f"{k} (test)", lambda images, k=k: k * one_pixel(images)) for k in (1, 2)]  # type: ignore[misc]
    one, two = (reference_statistics("digits", network, count=30).statistics["features"] for network in networks)
    torch.testing.assert_close(two.mean, 2 * one.mean)
    rows = [len(reference_statistics("digits", networks[0], count=30, rows=rows).rows) for rows in (0, 20, 10)]
    assert rows == [0, 20, 10], "a reference that keeps fewer is made anew"


def test_a_classifier_is_told_by_the_images_that_it_is_tested_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by its seed, and by the split that it is fitted on."""
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path))
    fitted: list[int] = []

    def fit(images: Any, labels: Any, names: Any, *, seed: int = 0) -> classifier.ClassifierNetwork:
        fitted.append(seed)
        return classifier.ClassifierNetwork(classifier.ConvNet(1, 10, 1).eval(), names, seed=seed)

    monkeypatch.setattr(classifier.ClassifierNetwork, "fit", fit)
    for more, expected in (({}, [0]), ({}, [0]), ({"seed": 1}, [0, 1]), ({"fit_on": "train"}, [0, 1, 0])):
        trained_classifier("digits", **more)  # type: ignore[arg-type]
        assert fitted == expected
    digits = load("digits", "train")
    assert isinstance(digits, InMemoryImages)
    fewer = InMemoryImages(digits.images[:100], digits.labels[:100], digits.class_names, "fewer")  # type: ignore[index]
    splits: Callable[..., Any] = lambda spec, split, **_: image_source(fewer if split == "train" else load(spec, split))  # noqa: E731
    monkeypatch.setattr(classifier, "image_source", splits)
    trained_classifier("digits")
    assert fitted == [0, 1, 0, 0], "the held-out images are the same, those that it is tested on are others"


def test_features_are_told_by_what_the_network_is_told(pipeline: mezzotint.Pipeline) -> None:
    keys = [probing.model_view(pipeline, [], t).key for t in (0.1, 0.2)]
    keys += [probing.model_view(pipeline, [], 0.1, True, seed).key for seed in (0, 1)]
    changed = override_recipe(pipeline.recipe, ["time_input=[100, 0]"])
    keys.append(probing.model_view(mezzotint.Pipeline(changed, pipeline.denoiser), [], 0.1).key)
    assert len({json.dumps(key) for key in keys}) == len(keys)
