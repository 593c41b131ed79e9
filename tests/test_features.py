"""Evaluation's way from images to features: sources, feature networks, extraction, references, the small classifier."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import urllib.error
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mezzotint
from mezzotint import data
from mezzotint.data.base import InMemoryImages
from mezzotint.data.transforms import adm_center_crop, to_float, to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation import features as features_module
from mezzotint.evaluation.classifier import ClassifierNetwork, trained_classifier
from mezzotint.evaluation.features import FeatureNetwork, Preprocessing, extract, feature_network
from mezzotint.evaluation.reference import Reference, reference_statistics
from mezzotint.evaluation.sources import (
    FunctionSource,
    ImageSource,
    NpzSource,
    PipelineSource,
    image_source,
    random_order,
)
from mezzotint.evaluation.statistics import FeatureStatistics
from mezzotint.recipe import DataSettings, Recipe, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(folder))
    return folder


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_npz(path: Path, images: Tensor, labels: Tensor | None = None, **arrays: Any) -> Path:
    """ADM's layout, of images (N, C, H, W)."""
    values = {"arr_0": images.permute(0, 2, 3, 1).numpy()} | ({} if labels is None else {"arr_1": labels.numpy()})
    np.savez(path, **values, **arrays)
    return path


def write_pictures(folder: Path, images: Tensor, names: list[str] | None = None) -> Path:
    for i, image in enumerate(images):
        file = folder / (names[i] if names else f"{i:03}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file)
    return folder


def everything(source: ImageSource, batch_size: int = 4) -> tuple[Tensor, Tensor | None]:
    images, labels = zip(*source.batches(batch_size), strict=True)
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


# ---- Sources ---------------------------------------------------------------------------------------------------------

IMAGES, LABELS = noise(11, 3, 6, 6), torch.arange(11) % 3


def in_memory() -> InMemoryImages:
    return InMemoryImages(IMAGES, LABELS, ("a", "b", "c"), "memory-3x6x6")


@pytest.fixture(params=["data", "folder", "npz", "compressed", "function", "pipeline"])
def source(request: pytest.FixtureRequest, tmp_path: Path, tiny: Recipe) -> ImageSource:
    """Every kind of source; all but the pipeline hold IMAGES and LABELS."""
    if request.param == "data":
        return image_source(in_memory())
    if request.param == "folder":
        names = [f"{'abc'[int(label)]}/{i:02}.png" for i, label in enumerate(LABELS)]
        write_pictures(tmp_path / "pictures", IMAGES, names)
        folder = image_source(tmp_path / "pictures")
        assert folder.class_names == ("a", "b", "c")
        return folder
    if request.param == "npz":
        return image_source(write_npz(tmp_path / "samples.npz", IMAGES, LABELS))
    if request.param == "compressed":
        np.savez_compressed(
            tmp_path / "samples.npz", IMAGES.permute(0, 2, 3, 1).numpy(), LABELS.numpy().astype(np.uint8)
        )
        return image_source(str(tmp_path / "samples.npz"))
    if request.param == "function":
        return image_source(lambda: [(IMAGES[:5], LABELS[:5]), (to_float(IMAGES[5:]), LABELS[5:])])
    return image_source(labelled(tiny), count=11, seed=3)


def labelled(tiny: Recipe) -> mezzotint.Pipeline:
    return mezzotint.build(resolve(tiny, data.load("digits")))


def test_sources_hold_their_images_in_order_and_again(source: ImageSource) -> None:
    images, labels = everything(source)
    assert images.dtype == torch.uint8
    assert labels is not None
    if not isinstance(source, PipelineSource):
        order = LABELS.argsort(stable=True) if source.identity.startswith("pictures") else torch.arange(11)
        assert torch.equal(images, IMAGES[order])
        assert torch.equal(labels, LABELS[order])
    assert source.count in (11, None)
    assert [len(batch) for batch, _ in source.batches(4)] == [4, 4, 3]
    assert torch.equal(everything(source)[0], images)


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_the_batches_of_one(source: ImageSource, world_size: int) -> None:
    whole = list(source.batches(4))
    shares = [list(source.batches(4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for number, (images, labels) in enumerate(whole):
        again, labels_again = shares[number % world_size].pop(0)
        assert torch.equal(images, again)
        assert labels is not None
        assert labels_again is not None
        assert torch.equal(labels, labels_again)
    assert not any(shares)


def test_identities_name_files(source: ImageSource) -> None:
    assert source.identity
    assert not set(source.identity) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert source.cacheable != isinstance(source, FunctionSource)


def test_a_count_takes_a_fixed_random_part(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", IMAGES, LABELS)
    chosen = random_order(11, 4).sort().values
    assert not torch.equal(chosen, torch.arange(4))
    assert torch.equal(random_order(11, 7)[:4], random_order(11, 4))
    for some in (image_source(path, count=4), image_source(in_memory(), count=4)):
        images, labels = everything(some, 3)
        assert torch.equal(images, IMAGES[chosen])
        assert labels is not None
        assert torch.equal(labels, LABELS[chosen])
        assert some.identity.endswith("-4-of-11")
    with pytest.raises(MezzotintError, match="has 11 images, fewer than the 12 asked for"):
        image_source(path, count=12)
    with pytest.raises(MezzotintError, match="count must be at least 1, got 0"):
        image_source(path, count=0)


def test_data_sets_by_name_and_by_settings() -> None:
    digits = data.load("digits", "test")
    for source in (image_source("digits"), image_source(DataSettings()), image_source(digits)):
        assert (source.identity, source.count) == (digits.identity, 899)
    assert image_source("digits", split="train", size=16).identity == data.load("digits", size=16).identity
    assert image_source(DataSettings(), split="train").identity == data.load("digits").identity


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("digitz", {}, r"no images at 'digitz'; .* or a data set \(closest: digits"),
        ("no/such/file.npz", {}, "no images at 'no/such/file.npz'; expected a folder of pictures"),
        ("digits", {"colour": 3}, "takes no option 'colour'"),
        (DataSettings(), {"size": 3}, "the data set 'digits' takes no option 'size'; closest: split|known: split"),
        (in_memory(), {"split": "train"}, "a data set takes no option 'split'"),
        ("nowhere:function", {}, "nowhere:function cannot be imported"),
        ("json:nothing", {}, "json:nothing cannot be imported .*no attribute 'nothing'"),
        ("json:__name__", {}, "is str; expected a function"),
    ],
)
def test_unknown_sources_and_options_are_explained(spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        image_source(spec, **options)


def test_folders_must_agree_on_a_size_or_are_cropped(tmp_path: Path) -> None:
    write_pictures(tmp_path, noise(2, 3, 8, 8))
    write_pictures(tmp_path, noise(1, 3, 9, 20, seed=1), ["zz.png"])
    source = image_source(tmp_path)
    with pytest.raises(MezzotintError, match=r"zz.png is 20 × 9 pixels and .*000.png 8 × 8; .* set data.size"):
        everything(source)
    images, labels = everything(image_source(tmp_path, size=4))
    assert labels is None
    assert images.shape == (3, 3, 4, 4)
    expected = np.asarray(adm_center_crop(Image.open(tmp_path / "zz.png"), 4))
    assert np.array_equal(images[2].permute(1, 2, 0).numpy(), expected)


def test_folders_keep_grey_and_tell_when_they_cannot(tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey", noise(2, 1, 8, 8))
    assert everything(image_source(tmp_path / "grey"))[0].shape == (2, 1, 8, 8)
    assert everything(image_source(tmp_path / "grey", channels=3))[0].shape == (2, 3, 8, 8)
    write_pictures(tmp_path / "grey", noise(1, 3, 8, 8), ["colour.png", "z.png"][1:])
    with pytest.raises(MezzotintError, match=r"z.png is in colour and .*000.png is grey; set data.channels=3"):
        everything(image_source(tmp_path / "grey"))


def test_folders_without_pictures_or_with_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(MezzotintError, match=r"holds no pictures; expected files like .jpg"):
        image_source(tmp_path)
    write_pictures(tmp_path, noise(2, 3, 8, 8))
    before = image_source(tmp_path).identity
    (tmp_path / "001.png").write_bytes((tmp_path / "001.png").read_bytes()[:-40])
    with pytest.raises(MezzotintError, match=r"001.png cannot be read"):
        everything(image_source(tmp_path))
    Image.fromarray(np.full((8, 8), 2.0, np.float32)).save(tmp_path / "001.png", "TIFF")
    with pytest.raises(MezzotintError, match=r"001.png cannot be read \(which level is white is not known"):
        everything(image_source(tmp_path))
    assert image_source(tmp_path).identity != before


def test_folders_decode_in_other_processes(tmp_path: Path) -> None:
    write_pictures(tmp_path, IMAGES)
    assert torch.equal(everything(image_source(tmp_path, workers=1))[0], IMAGES)


def test_npz_of_grey_images_written_as_rgb(tmp_path: Path) -> None:
    grey = noise(5, 1, 4, 4)
    path = write_npz(tmp_path / "grey.npz", grey.expand(-1, 3, -1, -1))
    assert torch.equal(everything(image_source(path, channels=1))[0], grey)
    assert everything(image_source(path))[0].shape[1] == 3
    colour = write_npz(tmp_path / "colour.npz", IMAGES)
    with pytest.raises(MezzotintError, match="in colour, and grey ones are needed"):
        everything(image_source(colour, channels=1))


class Evil:
    """What a pickled array could do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, ("unpickled",)


def test_unusable_npz_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(message: str, *arrays: Any, **named: Any) -> None:
        if arrays or named:
            np.savez("x.npz", *arrays, **named)
        with pytest.raises(MezzotintError, match=message):
            everything(image_source("x.npz"))

    pixels = IMAGES.permute(0, 2, 3, 1).numpy()
    refused("x.npz has no arr_0, only mu, sigma; expected images uint8", mu=np.zeros(3), sigma=np.eye(3))
    refused(
        r"arr_0 of x.npz is float32 of shape \(11, 6, 6, 3\); expected images uint8 \(N, H, W, 3\)",
        pixels / np.float32(255),
    )
    refused(r"arr_0 of x.npz is uint8 of shape \(11, 6, 6\)", pixels[..., 0])
    refused(r"arr_0 of x.npz is uint8 of shape \(11, 3, 6, 6\)", IMAGES.numpy())
    refused(r"shape \(0, 6, 6, 3\)", pixels[:0])
    refused("arr_0 of x.npz is object", np.array([Evil()], dtype=object))
    refused(r"arr_1 of x.npz is object of shape \(1,\); expected labels", pixels, np.array([Evil()], dtype=object))
    refused(r"arr_1 of x.npz is int64 of shape \(3,\); expected labels, 11 integers", pixels, np.arange(3))
    refused(r"arr_1 of x.npz is float64", pixels, np.zeros(11))
    assert not Path("unpickled").exists()
    np.savez("x.npz", pixels)
    content = bytearray(Path("x.npz").read_bytes())
    Path("x.npz").write_bytes(content[:-100])
    refused("x.npz is no whole .npz")
    content[200] ^= 255  # within the pixels: the archive's checksum tells
    Path("x.npz").write_bytes(content)
    refused("x.npz is no whole .npz .*CRC")


@pytest.mark.parametrize("shape", ["(1000000000000,)", f"({2**40}, {2**40}, 1, 3)", "(-1, 8, 8, 3)", "(" * 300, "3"])
@pytest.mark.parametrize("name", ["arr_0", "arr_1", "mu", "sigma", "network"])
def test_absurd_headers_are_one_sentence(tmp_path: Path, name: str, shape: str) -> None:
    """What a header claims is not believed before the file's length bears it out, and no memory is asked for."""
    arrays = {
        "arr_0": np.zeros((3, 2, 2, 3), np.uint8),
        "arr_1": np.zeros(3, int),
        "mu": np.zeros(3),
        "sigma": np.eye(3),
    }
    file = tmp_path / "x.npz"
    np.savez(file, **arrays | {"network": np.array("pixels"), "rows": np.zeros((0, 3)), "indices": np.zeros(0, int)})
    with zipfile.ZipFile(file) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    kind = {"arr_0": "|u1", "arr_1": "<i8", "network": "<U6"}.get(name, "<f8")
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    members[f"{name}.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    network = feature_network("pixels")
    with pytest.raises(MezzotintError, match=r"x\.npz"):
        everything(image_source(file)) if name.startswith("arr") else reference_statistics(file, network, cache=False)


def test_npz_files_are_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz(tmp_path / "a.npz", IMAGES)
    asked: list[int] = []
    original = zipfile.ZipExtFile.read

    def counted(self: Any, n: int = -1) -> bytes:
        asked.append(n)
        return original(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    everything(NpzSource(path))
    assert max(asked) <= 4096
    assert -1 not in asked


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.full((2, 3, 4, 4), torch.nan), "NaN or far outside of"),
        (noise(2, 3, 4, 4).float(), "NaN or far outside of"),
        (noise(2, 3, 4, 4).long(), r"gave torch.int64 of shape \(2, 3, 4, 4\); expected images"),
        (noise(2, 4, 4, 3), r"gave torch.uint8 of shape \(2, 4, 4, 3\)"),
        ([noise(2, 3, 4, 4), noise(2, 3, 5, 5)], r"images of shape \(3, 4, 4\) without labels, then .* \(3, 5, 5\)"),
        ([noise(4, 3, 4, 4), noise(2, 3, 5, 5)], "expected all alike"),
        ((noise(2, 3, 4, 4), torch.zeros(3)), "expected 2 integers"),
        (7, "returned int; expected images or batches"),
        ([7], "gave int; expected images"),
        ([], "gave 0 images, expected at least 1"),
    ],
)
def test_functions_that_give_no_images_are_explained(result: Any, message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        everything(FunctionSource(lambda: result, "mine:images"))


def test_functions_may_be_endless_or_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_images.py").write_text(
        "import torch\ndef draw():\n    while True:\n        yield torch.zeros(3, 1, 4, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    images, labels = everything(image_source("my_images:draw", count=10))
    assert images.shape == (10, 1, 4, 4)
    assert labels is None
    assert (images == 128).all()
    with pytest.raises(MezzotintError, match="gave 2 images, expected 3"):
        everything(FunctionSource(lambda: noise(2, 1, 4, 4), "mine:images", 3))


def test_a_pipeline_gives_the_images_of_sample(tiny: Recipe) -> None:
    pipeline = labelled(tiny)
    source = image_source(pipeline, count=9, seed=2, classes=[3, 8], guidance=1.5, steps=2)
    images, labels = everything(source)
    expected = mezzotint.sample(pipeline, [3, 8], 9, seed=2, guidance=1.5, steps=2, batch_size=4)
    assert torch.equal(images, to_uint8(expected))
    assert labels is not None
    assert labels.tolist() == [3] * 5 + [8] * 4
    identities = {source.identity}
    for options in ({"seed": 3}, {"count": 8}, {"classes": [8, 3]}, {"guidance": 2.0}, {"steps": 3}):
        identities.add(
            image_source(pipeline, **{"count": 9, "seed": 2, "classes": [3, 8], "steps": 2} | options).identity
        )
    with torch.no_grad():
        next(pipeline.denoiser.backbone.parameters()).add_(1)
    identities.add(image_source(pipeline, count=9, seed=2, classes=[3, 8], guidance=1.5, steps=2).identity)
    assert len(identities) == 7


def test_streams_and_latents_are_refused() -> None:
    class Stream:
        image_shape, class_names, identity = (3, 4, 4), (), "stream"

        def read(self, start: int, seed: int) -> Iterator[Any]: ...

        def decode(self, window: Any, position: int) -> tuple[Tensor, int]: ...

    with pytest.raises(MezzotintError, match=r"set data.streaming=false"):
        image_source(Stream())


# ---- Feature networks ------------------------------------------------------------------------------------------------


def test_pixels() -> None:
    network = feature_network("pixels")
    assert network.name == "pixels"
    outputs = network(torch.tensor([0, 51, 255, 0, 0, 255], dtype=torch.uint8).view(1, 3, 1, 2))
    assert torch.equal(outputs["features"], torch.tensor([[0, 0.2, 1, 0, 0, 1]]))


def test_your_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_features.py"
    file.write_text(
        "def mean(images):\n    return images.double().mean((2, 3))\n"
        "def both(images):\n    x = mean(images)\n    return {'features': x, 'probabilities': x.softmax(1)}\n"
    )
    monkeypatch.chdir(tmp_path)
    network = feature_network("my_features:both")
    assert network.name == f"my_features:both ({hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"
    assert not network.cacheable
    outputs = network(IMAGES)
    assert outputs["features"].dtype == torch.float32
    torch.testing.assert_close(outputs["features"], IMAGES.float().mean((2, 3)))
    assert set(feature_network("my_features:mean")(IMAGES)) == {"features"}
    found = extract(image_source(in_memory()), network, batch_size=4)
    assert found.logits is not None
    torch.testing.assert_close(found.logits.softmax(1), outputs["probabilities"])


def test_networks_see_the_channels_that_they_want() -> None:
    grey = noise(2, 1, 4, 4)
    seen: list[Tensor] = []

    def compute(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1).float()

    FeatureNetwork("three", compute, channels=3)(grey)
    assert torch.equal(seen.pop(), grey.expand(-1, 3, -1, -1))
    FeatureNetwork("one", compute, channels=1)(grey.expand(-1, 3, -1, -1))
    assert torch.equal(seen.pop(), grey)
    with pytest.raises(MezzotintError, match="in colour"):
        FeatureNetwork("one", compute, channels=1)(IMAGES)


def test_bf16_is_in_the_name_and_in_the_products() -> None:
    weight = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))

    def compute(images: Tensor) -> Tensor:
        return images.flatten(1).float() @ weight

    exact, rounded = FeatureNetwork("net", compute), FeatureNetwork("net", compute, precision="bf16")
    assert rounded.name == "net in bf16"
    images = noise(2, 3, 4, 4)
    a, b = exact(images)["features"], rounded(images)["features"]
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=20)
    with pytest.raises(MezzotintError, match="precision 'fp16' is unknown"):
        FeatureNetwork("net", compute, precision="fp16")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            torch.tensor([[1.0], [torch.nan], [torch.inf]]),
            "network mine gave NaN or infinite features for 2 of 3 images",
        ),
        (torch.zeros(2, 4), r"gave features of shape \(2, 4\); expected \(3, D\)"),
        (torch.zeros(3, 4, 4), r"gave features of shape \(3, 4, 4\)"),
        ({"logits": torch.zeros(3, 4)}, "gave a dict of 'logits'; expected a tensor"),
        ({"features": torch.zeros(3, 4), "other": torch.zeros(3, 4)}, "gave a dict of 'features', 'other'"),
        ({"features": [1, 2, 3]}, "gave features of shape list"),
        (None, "gave NoneType; expected a tensor"),
    ],
)
def test_unusable_features_are_explained(outputs: Any, message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        FeatureNetwork("mine", lambda images: outputs)(noise(3, 1, 4, 4))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), noise(3, 4, 4), noise(2, 4, 4, 3), noise(0, 3, 4, 4)])
def test_networks_refuse_what_are_no_images(images: Tensor) -> None:
    with pytest.raises(MezzotintError, match=r"images must be uint8 \(B, C, H, W\) of 1 or 3 channels, got"):
        feature_network("pixels")(images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inceptoin", {}, "feature network 'inceptoin' is unknown; closest: inception"),
        ("pixels", {"weights": "file"}, "the feature network pixels takes no weights"),
        ("pixels", {"data": "digits"}, "data and seed are those of the feature network classifier, not of pixels"),
        ("classifier", {}, "classifier is fitted on a data set; name it"),
        ("json:nothing", {}, "json:nothing cannot be imported"),
    ],
)
def test_unknown_networks_and_options_are_explained(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        feature_network(name, **options)
    with pytest.raises(MezzotintError, match="knows no text; choose clip"):
        feature_network("pixels").embed_text(["a"])


# ---- Inception -------------------------------------------------------------------------------------------------------


def test_inception_explains_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        MezzotintError,
        match=r"not at .*/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth and cannot be downloaded .* fetch "
        r"https://.*6726825d.pth where there is a network and put it there",
    ):
        features_module._download_inception()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MezzotintError, match=r"needs the package torch-fidelity; .* pip install 'mezzotint\[eval\]'"):
        feature_network("inception")


def test_weights_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"

    def refused(message: str) -> None:
        with pytest.raises(MezzotintError, match=message):
            features_module._read_weights(file)

    refused("cannot read the weights .*weights.pth .No such file")
    torch.save({"weight": Evil()}, file)
    refused("no whole PyTorch file of tensors")
    file.write_bytes(pickle.dumps(Evil(), protocol=2))
    refused("no whole PyTorch file of tensors")
    torch.save({"weight": torch.zeros(2)}, file)
    digest, state = features_module._read_weights(file)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    assert list(state) == ["weight"]
    file.write_bytes(file.read_bytes()[:-50])
    refused("no whole PyTorch file of tensors")
    torch.save([torch.zeros(2)], file)
    refused("holds no weights by name")
    assert not Path("unpickled").exists()


def test_inception_is_the_graph_that_adm_reads(tmp_path: Path) -> None:
    port = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    resize = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")

    class Unloaded(port.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> None: ...

    torch.manual_seed(0)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    reference = Unloaded("reference", ["2048", "logits"], empty)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")

    network = feature_network("inception", weights=tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    assert network.name == f"inception-v3 (2015 TensorFlow graph, torch-fidelity {digest})"
    images = noise(2, 3, 20, 33)
    found = network(images)
    with torch.no_grad():
        pool, logits = reference(images)
        x = resize.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        x = (x - 128) / 128
        for name, layer in reference.named_children():
            if name == "Mixed_6d":
                break
            x = layer(x)
        branch = reference.Mixed_6d.branch1x1
        x = torch.relu(branch.bn(branch.conv(x))).permute(0, 2, 3, 1)  # TensorFlow's axes
    assert torch.equal(found["features"], pool)
    # ADM: softmax(pool · weights), without the layer's biases.
    torch.testing.assert_close(found["logits"], logits - reference.fc.bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["spatial"], x[..., :7].reshape(2, 2023))

    del (state := reference.state_dict())["fc.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(MezzotintError, match=r"does not hold the weights of Inception-v3 .*fc.bias"):
        feature_network("inception", weights=tmp_path / "cut.pth")


# ---- CLIP and DINOv2 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def clip(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def save_clip(folder: Path) -> Path:
    """A CLIP model of random weights that knows the letters a to e."""
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["<|startoftext|>", "<|endoftext|>", *"abcde", *(f"{letter}</w>" for letter in "abcde")]
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=tower | ends | {"vocab_size": len(words), "max_position_embeddings": 16},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    side = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def dinov2(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


def save_dinov2(folder: Path) -> Path:
    """A DINOv2 model of random weights in half precision."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    transformers.Dinov2Model(config).half().save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    ).save_pretrained(folder)
    return folder


def pictures(count: int, width: int, height: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def stacked(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


@pytest.mark.parametrize(("width", "height"), [(50, 37), (16, 16), (9, 12), (160, 90)])
@pytest.mark.parametrize(("mode", "resample"), [("bicubic", 3), ("bilinear", 2)])
def test_images_are_resized_as_pil_does(width: int, height: int, mode: str, resample: int) -> None:
    images = pictures(2, width, height)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    scale = 20 / min(width, height)
    for resize, size in ((None, (16, 16)), (20, (int(scale * width), int(scale * height)))):
        resized = [image.resize(size, resample) for image in images]
        left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
        expected = stacked([image.crop((left, top, left + 16, top + 16)) for image in resized])
        found = Preprocessing(16, resize, mean, std, mode)(stacked(images))
        levels = (found * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)) * 255
        differences = (levels - expected).abs().round()
        assert differences.max() <= 1
        assert differences.mean() < (0.01 if mode == "bicubic" else 0.1)  # simple ratios hit many halves


def test_clip_is_transformers_model(transformers: Any, clip: Path) -> None:
    network = feature_network("clip", weights=clip)
    assert network.dim == 12
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    images = pictures(3, 40, 24)
    with torch.no_grad():
        pixels = transformers.AutoImageProcessor.from_pretrained(clip)(images=images, return_tensors="pt").pixel_values
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        tokens = transformers.AutoTokenizer.from_pretrained(clip)(["a b c", "d"], padding=True, return_tensors="pt")
        text = model.text_projection(model.text_model(**tokens).pooler_output)
    torch.testing.assert_close(network(stacked(images))["features"], expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(network.embed_text(["a b c", "d"]), text)
    assert network.embed_text(["e " * 50]).shape == (1, 12)  # cut to what the model sees


def test_clip_reads_captions_with_their_mask(transformers: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else may tell: padding comes last, and no token of CLIP's looks at what follows."""
    network, masks = feature_network("clip", weights=clip), []
    kind = type(transformers.CLIPModel.from_pretrained(clip).text_model)
    forward = kind.forward

    def spied(self: Any, *inputs: Any, **more: Any) -> Any:
        masks.append(more["attention_mask"].tolist())
        return forward(self, *inputs, **more)

    monkeypatch.setattr(kind, "forward", spied)
    network.embed_text(["a b c", "d"])
    assert masks == [[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]]


def test_dinov2_sees_whole_images(transformers: Any, dinov2: Path) -> None:
    network = feature_network("dinov2", weights=str(dinov2))
    model = transformers.Dinov2Model.from_pretrained(dinov2).float().eval()
    images = pictures(3, 40, 24)
    squeezed = stacked([image.resize((28, 28), 3) for image in images]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(squeezed - mean) / std).last_hidden_state[:, 0]
    found = network(stacked(images))["features"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_a_model_is_named_by_its_content(transformers: Any, dinov2: Path, tmp_path: Path) -> None:
    name = feature_network("dinov2", weights=dinov2).name
    assert name.startswith("dinov2 (16 features, 28 px, ")
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    processor = transformers.AutoImageProcessor.from_pretrained(dinov2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert feature_network("dinov2", weights=tmp_path).name == name
    processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path)
    other = feature_network("dinov2", weights=tmp_path).name
    with torch.no_grad():
        model.layernorm.bias.add_(1)
    model.save_pretrained(tmp_path)
    assert len({name, other, feature_network("dinov2", weights=tmp_path).name}) == 3


def test_unusable_models_are_explained(transformers: Any, clip: Path, dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match="is a clip; expected a dinov2"):
        feature_network("dinov2", weights=clip)
    with pytest.raises(
        MezzotintError, match=r"no dinov2 could be read from the folder .*hf download facebook/dinov2-large"
    ):
        feature_network("dinov2", weights=tmp_path)
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    processor = transformers.AutoImageProcessor.from_pretrained(dinov2)
    state = model.state_dict()
    del state["layernorm.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    processor.save_pretrained(tmp_path)
    with pytest.raises(MezzotintError, match=r"lacks 1 of its weights .layernorm.bias"):
        feature_network("dinov2", weights=tmp_path)
    model.save_pretrained(tmp_path)
    processor.crop_size = {"height": 28, "width": 14}
    processor.save_pretrained(tmp_path)
    with pytest.raises(MezzotintError, match="makes no squares"):
        feature_network("dinov2", weights=tmp_path)


# ---- The classifier --------------------------------------------------------------------------------------------------


def test_the_classifier_reads_digits_it_never_saw() -> None:
    train, held_out = data.load("digits", "train"), data.load("digits", "test")
    assert isinstance(train, InMemoryImages)
    assert isinstance(held_out, InMemoryImages)
    assert train.labels is not None
    assert held_out.labels is not None
    network = ClassifierNetwork.fit(held_out.images, held_out.labels, held_out.class_names, seen=9_000)
    assert network.accuracy(train.images, train.labels) > 0.96
    assert network.agreement(train.images, (train.labels + 1) % 10) < 0.03
    outputs = network(train.images)
    assert outputs["features"].shape == (898, 96)
    assert torch.equal(outputs["logits"].argmax(1), network.predict(train.images))


def test_fitting_is_a_function_of_images_and_seed() -> None:
    state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    first, second, other = (
        ClassifierNetwork.fit(IMAGES, LABELS, ("a", "b", "c"), seed=seed, seen=400) for seed in (0, 0, 1)
    )
    assert first.name == second.name != other.name
    assert torch.equal(first(IMAGES)["logits"], second(IMAGES)["logits"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 31), (1, 28, 28), (3, 40, 90)])
def test_the_classifier_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    images = noise(6, *shape)
    network = ClassifierNetwork.fit(images, torch.arange(6) % 2, ("a", "b"), seen=64)
    assert network(images)["features"].shape == (6, 96)
    torch.testing.assert_close(network(images)["features"][2:3], network(images[2:3])["features"])


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all fits, which are made short."""
    seeds: list[int] = []
    fit = ClassifierNetwork.fit

    def short(images: Tensor, labels: Tensor, names: tuple[str, ...], *, seed: int = 0) -> ClassifierNetwork:
        seeds.append(seed)
        return fit(images[:64], labels[:64], names, seed=seed, seen=64)

    monkeypatch.setattr(ClassifierNetwork, "fit", short)
    return seeds


def test_a_classifier_is_fitted_once(fits: list[int], cache: Path) -> None:
    network = feature_network("classifier", data="digits")
    assert (network.dim, fits) == (96, [0])
    again = trained_classifier(DataSettings())
    assert fits == [0]
    assert again.name == network.name
    assert again.tested is not None
    identity = data.load("digits", "test").identity
    assert network.name.startswith(f"classifier ({identity}, seed 0, {again.tested:.1%} right, ")
    images = noise(5, 1, 8, 8)
    assert torch.equal(again(images)["features"], network(images)["features"])
    assert torch.equal(network(images.expand(-1, 3, -1, -1))["features"], network(images)["features"])
    assert "seed 1" in feature_network("classifier", data="digits", seed=1).name
    assert fits == [0, 1]
    trained_classifier("digits", seed=1)
    assert fits == [0, 1]
    (file,) = (cache / "classifiers").glob("*seed-0*")
    file.write_bytes(file.read_bytes()[:-20])
    assert trained_classifier("digits").name == network.name
    trained_classifier("digits")
    assert fits == [0, 1, 0]


def test_unusable_classes_are_explained() -> None:
    with pytest.raises(MezzotintError, match="has no labels, which a classifier needs"):
        trained_classifier("digits", labels=False)
    with pytest.raises(MezzotintError, match="at least 2 classes"):
        ClassifierNetwork.fit(IMAGES, LABELS * 0, ("a",))
    network = ClassifierNetwork.fit(IMAGES, LABELS, ("a", "b", "c"), seen=64)
    with pytest.raises(MezzotintError, match="labels must be 11 integers"):
        network.accuracy(IMAGES, LABELS[:3])
    with pytest.raises(MezzotintError, match="images must be uint8"):
        network.predict(IMAGES.float())


# ---- Extraction ------------------------------------------------------------------------------------------------------


def projection(width: int = 5, name: str = "projection", **options: Any) -> FeatureNetwork:
    """A fixed random projection of the pixels of IMAGES, with logits and spatial features."""
    weight = torch.randn(108, width, generator=torch.Generator().manual_seed(0))

    def compute(images: Tensor) -> dict[str, Tensor]:
        features = images.flatten(1).float() @ weight / 255
        return {"features": features, "logits": features[:, :3], "spatial": features[:, 3:] ** 2}

    return FeatureNetwork(name, compute, dim=width, **options)


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_extraction_gathers_everything_in_order(batch_size: int) -> None:
    network = projection()
    outputs = network(IMAGES)
    found = extract(image_source(in_memory()), network, batch_size=batch_size, keep_rows=4)
    assert (found.network, found.source, found.count) == ("projection", "memory-3x6x6", 11)
    for key in ("features", "spatial"):
        expected = outputs[key].double().numpy()
        np.testing.assert_allclose(found.statistics[key].mean, expected.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.statistics[key].covariance, np.cov(expected.T), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.indices, random_order(11, 4))
    torch.testing.assert_close(found.rows, outputs["features"][found.indices])
    assert found.logits is not None
    torch.testing.assert_close(found.logits, outputs["logits"])
    assert torch.equal(found.labels, LABELS)
    everything = extract(image_source(in_memory()), network, batch_size=batch_size, keep_rows=None)
    torch.testing.assert_close(everything.rows, outputs["features"][random_order(11, 11)])


def test_extraction_of_unknown_length() -> None:
    network = projection()
    source = FunctionSource(lambda: IMAGES, "mine:images")
    found = extract(source, network, batch_size=4, keep_rows=5)
    assert found.count == 11
    assert torch.equal(found.indices, torch.arange(5))
    torch.testing.assert_close(found.rows, network(IMAGES[:5])["features"])
    assert found.labels is None
    assert len(extract(source, network, keep_rows=None).rows) == 11
    with pytest.raises(MezzotintError, match="mine-images has 1 images; statistics need at least 2"):
        extract(FunctionSource(lambda: IMAGES[:1], "mine:images"), network)
    with pytest.raises(MezzotintError, match="keep_rows must be at least 0"):
        extract(source, network, keep_rows=-1)


SHARED = """
import sys
import torch
import torch.distributed as dist
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import FeatureNetwork, extract
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.sources import image_source, of_first
from mezzotint.training.parallel import world

def compute(images):
    features = images.flatten(1).float() ** 2
    return {"features": features, "logits": features[:, :3], "spatial": features[:, ::2]}

def broken(images):
    return torch.full((len(images), 2), torch.nan if dist.get_rank() else 1.0)

with world("cpu") as here:
    torch.set_num_threads(1)
    network = FeatureNetwork("squares", compute)
    found = extract(image_source(sys.argv[1]), network, batch_size=64, keep_rows=40)
    few = extract(image_source(sys.argv[1], count=50), network, batch_size=64, keep_rows=None)  # one process has none
    reference = reference_statistics(sys.argv[1], network, count=200, rows=20)
    again = reference_statistics(sys.argv[1], network, count=200, rows=20)
    assert torch.equal(reference.rows, again.rows)
    assert of_first(lambda: here.rank) == 0
    try:
        extract(image_source(sys.argv[1]), FeatureNetwork("broken", broken))
    except MezzotintError as error:
        assert "NaN" in str(error)
    else:
        raise AssertionError
    torch.save([found, few, reference], f"{sys.argv[2]}-{here.rank}.pt")
"""


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text(SHARED)
    images = write_npz(tmp_path / "images.npz", noise(300, 1, 8, 8), torch.arange(300) % 7)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"OMP_NUM_THREADS": "1", "MEZZOTINT_CACHE": str(tmp_path / "cache"), "WORLD_SIZE": "2"}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun sets them
    command = [sys.executable, str(tmp_path / "shared.py"), str(images), str(tmp_path / "found")]
    processes = [subprocess.Popen(command, env=os.environ | settings | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 1

    scope: dict[str, Any] = {}
    exec(SHARED.partition("def broken")[0], scope)
    network = FeatureNetwork("squares", scope["compute"])
    expected = [
        extract(image_source(images), network, batch_size=64, keep_rows=40),
        extract(image_source(images, count=50), network, batch_size=64, keep_rows=None),
        reference_statistics(images, network, count=200, rows=20),
    ]
    for rank in (0, 1):
        for one, other in zip(torch.load(tmp_path / f"found-{rank}.pt", weights_only=False), expected, strict=True):
            for key in ("features", "spatial"):
                assert one.statistics[key].n == other.statistics[key].n
                torch.testing.assert_close(one.statistics[key].mean, other.statistics[key].mean, rtol=1e-9, atol=0)
                torch.testing.assert_close(
                    one.statistics[key].covariance, other.statistics[key].covariance, rtol=1e-9, atol=1e-9
                )
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.indices, other.indices)
            if not isinstance(other, Reference):
                assert other.logits is not None
                assert torch.equal(one.logits, other.logits)
                assert torch.equal(one.labels, other.labels)


# ---- References ------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted() -> tuple[FeatureNetwork, list[int]]:
    """A network and the number of images of each of its calls."""
    calls: list[int] = []
    inner = projection()

    def compute(images: Tensor) -> dict[str, Tensor]:
        calls.append(len(images))
        return inner(images)

    return FeatureNetwork("projection", compute, dim=5), calls


def same(one: Reference, other: Reference) -> bool:
    return torch.equal(one.rows, other.rows) and all(
        torch.allclose(one.statistics[key].covariance, other.statistics[key].covariance, rtol=1e-12)
        for key in one.statistics | other.statistics
    )


def test_a_reference_is_computed_once(counted: tuple[FeatureNetwork, list[int]], cache: Path) -> None:
    network, calls = counted
    first = reference_statistics(in_memory(), network, rows=6)
    assert calls == [11]
    assert (first.count, len(first.rows), first.network) == (11, 6, "projection")
    again = reference_statistics(in_memory(), network, rows=6)
    assert same(first, again)
    fewer = reference_statistics(in_memory(), network, rows=2)
    assert torch.equal(fewer.rows, extract(image_source(in_memory()), projection(), keep_rows=2).rows)
    assert calls == [11]
    assert len(reference_statistics(in_memory(), network, rows=50).rows) == 11  # all there are
    assert len(reference_statistics(in_memory(), network, rows=50).rows) == 11
    assert calls == [11, 11]
    reference_statistics(in_memory(), network, count=5)
    reference_statistics(in_memory(), projection(name="other"))
    assert len(list((cache / "references").iterdir())) == 3
    reference_statistics(in_memory(), network, cache=False)
    assert calls == [11, 11, 5, 11]


def test_a_damaged_reference_is_computed_anew(counted: tuple[FeatureNetwork, list[int]], cache: Path) -> None:
    network, calls = counted
    first = reference_statistics(in_memory(), network, rows=3)
    (file,) = (cache / "references").iterdir()
    file.write_bytes(file.read_bytes()[:-200])
    assert same(first, reference_statistics(in_memory(), network, rows=3))
    assert calls == [11, 11]


def test_what_code_gives_is_not_kept(cache: Path) -> None:
    reference_statistics(FunctionSource(lambda: IMAGES, "mine:images"), projection())
    reference_statistics(in_memory(), projection(cacheable=False))
    assert not (cache / "references").exists()


def test_a_saved_reference_belongs_to_its_network(tmp_path: Path) -> None:
    network = projection()
    saved = reference_statistics(in_memory(), network, rows=4)
    saved.save(tmp_path / "digits.npz")
    read = reference_statistics(tmp_path / "digits.npz", network, rows=3)
    assert same(read, reference_statistics(in_memory(), network, rows=3))
    assert read.source == "memory-3x6x6"
    with pytest.raises(
        MezzotintError, match=r"digits.npz holds statistics of the network 'projection', not of 'other'; choose"
    ):
        reference_statistics(tmp_path / "digits.npz", projection(name="other"))
    with pytest.raises(MezzotintError, match="keeps the features of 4 images, fewer than the 7 needed"):
        reference_statistics(tmp_path / "digits.npz", network, rows=7)
    # Whoever reads mu and sigma (pytorch-fid, clean-fid) can read it, too.
    assert FeatureStatistics.load(tmp_path / "digits.npz").n == 11
    (tmp_path / "digits.npz").write_bytes((tmp_path / "digits.npz").read_bytes()[:-100])
    with pytest.raises(MezzotintError, match=r"digits.npz is no whole .npz of plain arrays"):
        reference_statistics(tmp_path / "digits.npz", network)


@pytest.fixture
def adm(tmp_path: Path) -> tuple[Path, FeatureStatistics]:
    """A reference batch as ADM's are: statistics of more images than it holds, without a number."""
    generator = torch.Generator().manual_seed(1)
    statistics = FeatureStatistics.of(torch.randn(50, 5, generator=generator))
    spatial = FeatureStatistics.of(torch.randn(50, 2, generator=generator))
    arrays = statistics.to_arrays() | spatial.to_arrays("_s")
    del arrays["n"], arrays["n_s"]
    return write_npz(tmp_path / "adm.npz", IMAGES, **arrays), statistics


INCEPTION = "inception-v3 (2015 TensorFlow graph, torch-fidelity 6726825d)"


def test_adm_statistics_are_those_of_inception(adm: tuple[Path, FeatureStatistics]) -> None:
    path, statistics = adm
    reference = reference_statistics(path, projection(name=INCEPTION))
    assert reference.count is None
    assert len(reference.rows) == 0
    torch.testing.assert_close(reference.statistics["features"].covariance, statistics.covariance)
    assert reference.statistics["spatial"].width == 2
    with_rows = reference_statistics(path, projection(name=INCEPTION), rows=4)
    torch.testing.assert_close(with_rows.statistics["features"].covariance, statistics.covariance)
    torch.testing.assert_close(with_rows.rows, projection()(IMAGES)["features"][random_order(11, 4)])
    other = reference_statistics(path, projection())
    assert other.count == 11
    assert not torch.allclose(other.statistics["features"].mean, statistics.mean)


def test_statistics_without_images(adm: tuple[Path, FeatureStatistics], tmp_path: Path) -> None:
    adm[1].save(tmp_path / "fid.npz")
    reference = reference_statistics(tmp_path / "fid.npz", projection(name=INCEPTION))
    assert (reference.count, set(reference.statistics)) == (50, {"features"})
    assert reference.source.startswith("fid.npz (")
    with pytest.raises(MezzotintError, match="of inception alone, and no images, which the network 'projection' would"):
        reference_statistics(tmp_path / "fid.npz", projection())
    with pytest.raises(MezzotintError, match="no images, which 3 rows of features would need"):
        reference_statistics(tmp_path / "fid.npz", projection(name=INCEPTION), rows=3)
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(MezzotintError, match=r"half.npz: .*sigma"):
        reference_statistics(tmp_path / "half.npz", projection(name=INCEPTION))
    np.savez(tmp_path / "other.npz", nothing=np.zeros(3))
    with pytest.raises(MezzotintError, match=r"other.npz has no arr_0, only nothing"):
        reference_statistics(tmp_path / "other.npz", projection())


def test_a_reference_by_the_command_line_s_words(counted: tuple[FeatureNetwork, list[int]]) -> None:
    reference = reference_statistics("digits", feature_network("pixels"), split="train", rows=5)
    expected = torch.from_numpy(np.asarray(everything(image_source("digits", split="train"))[0])).flatten(1) / 255
    torch.testing.assert_close(reference.statistics["features"].mean, expected.double().mean(0))
    with pytest.raises(MezzotintError, match="rows must be at least 0"):
        reference_statistics("digits", counted[0], rows=-1)
