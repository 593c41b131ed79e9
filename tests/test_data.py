"""Data sets by name: what they hold, how they are split, and what is said when something is wrong with them."""

from __future__ import annotations

import gzip
import logging
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import InMemoryImages, digits, hugging_face, idx, image_folder, load
from mezzotint.data.base import DecodedImages
from mezzotint.data.huggingface import HubStream
from mezzotint.data.idx_files import FASHION_CLASSES, FASHION_MNIST
from mezzotint.data.splits import NoSuchSplit, split_of
from mezzotint.data.transforms import adm_center_crop, flip, to_float, to_uint8
from mezzotint.errors import MezzotintError

os.environ["HF_HUB_OFFLINE"] = "1"


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """A smooth colour picture, different for every seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- by name


def test_the_default_is_digits() -> None:
    dataset = load()
    assert isinstance(dataset, InMemoryImages)
    assert dataset.identity == digits("train").identity
    assert load("digits", "test", size=16, channels=3, path=None).image_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("digit", {}, "data set 'digit' is unknown; closest: digits"),
        ("digits", {"pth": "x"}, "data set 'digits' takes no option 'pth'"),
        ("folder", {"size": 8}, "data set 'folder' needs the option 'path'; give one with data=folder:PATH"),
        ("digits", {"split": "dev"}, "split 'dev' is unknown; expected train or test or all"),
        ("digits", {"channels": 2}, "1 .grey. or 3 .RGB. channels, not 2"),
        ("digits", {"size": 0}, "at least 1 pixel, not 0"),
    ],
)
def test_load_explains_mistakes(name: str, options: dict, sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        load(name, **options)


# ---------------------------------------------------------------------------------------------- digits


def test_digits_split_is_stratified_disjoint_and_pinned() -> None:
    train, test, everything = digits("train"), digits("test"), digits("all")
    assert (len(train), len(test), len(everything)) == (898, 899, 1797)
    # The identity has a digest of the pixels: these two lines fail if the split ever changes.
    assert train.identity == "digits-1x8x8-train-5d5ad8e644b2"
    assert test.identity == "digits-1x8x8-test-9c8ee516f347"
    assert (train.labels.bincount() - test.labels.bincount()).abs().max() <= 2
    halves = torch.cat([train.images, test.images]).flatten(1)
    assert sorted(map(tuple, halves.tolist())) == sorted(map(tuple, everything.images.flatten(1).tolist()))


def test_digits_levels_sizes_and_labels() -> None:
    native, large = digits("train"), digits("train", size=16, channels=3, labels=False)
    assert native.images.dtype == torch.uint8
    assert (native.images.min(), native.images.max()) == (0, 255)
    assert native.images.unique().numel() == 17
    assert native.class_names == tuple("0123456789")
    assert large.image_shape == (3, 16, 16)
    assert large.class_names == ()
    assert large[5][1] == -1
    back = torch.nn.functional.avg_pool2d(large.images[:, :1].float(), 2)
    assert (back - native.images).abs().mean() < 15
    image, label = native[7]
    images, labels = native.get_batch(torch.tensor([3, 7]))
    assert torch.equal(images[1], image)
    assert labels[1] == label


# ------------------------------------------------------------------------------------------------- IDX


def write_idx(path: Path, array: np.ndarray, header: bytes | None = None, cut: int = 0) -> None:
    header = header or bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def idx_header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for prefix, count, suffix in (("train", 12, ".gz"), ("t10k", 5, "")):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return tmp_path


def test_idx_reads_plain_and_compressed_files(idx_folder: Path) -> None:
    train, test = idx(idx_folder, "train"), idx(idx_folder, "test", channels=3)
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    assert np.array_equal(train.images[:, 0].numpy(), expected)
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert train.class_names == tuple("0123456789")
    assert test.image_shape == (3, 28, 28)
    assert len(test) == 5
    assert train.identity != test.identity


def test_idx_pads_with_background(idx_folder: Path) -> None:
    native, padded = idx(idx_folder), idx(idx_folder, size=32, labels=False)
    assert padded.image_shape == (1, 32, 32)
    assert padded.labels is None
    assert torch.equal(padded.images[:, :, 2:30, 2:30], native.images)
    assert padded.images.sum() == native.images.sum()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: write_idx(f, np.zeros((12, 28, 28)), cut=100), "bytes, but its header says 9424; fetch it again"),
        (lambda f: write_idx(f, np.zeros((12, 28)), cut=0), "begins with 00000802, expected 00000803"),
        (lambda f: write_idx(f, np.zeros((9, 1, 1)), b"\x89PNG\r\n"), "not an IDX file"),
        (lambda f: f.write_bytes(f.read_bytes()[:500]), "cannot be read .*; fetch it again"),
        (lambda f: f.write_bytes(b"hello"), "cannot be read .*; fetch it again"),
        (lambda f: write_idx(f, np.zeros((0, 28, 28))), "is empty"),
        (lambda f: write_idx(f, np.zeros((10, 0, 28))), "is empty"),
        (
            lambda f: write_idx(f, np.zeros((13, 28, 28)), idx_header(12, 28, 28)),
            "more than 9425 bytes, but .* says 9424",
        ),
        (lambda f: write_idx(f, np.zeros((11, 28, 28))), "11 train images but 12 labels"),
        (lambda f: f.unlink(), "set data.path .* or install Debian's package dataset-fashion-mnist"),
    ],
)
def test_idx_explains_bad_files(idx_folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(idx_folder / "train-images-idx3-ubyte.gz")
    with pytest.raises(MezzotintError, match=sentence):
        idx(idx_folder)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(10**9, 1000, 1), (2**32 - 1,) * 3, (2**20, 1, 65)])
def test_idx_headers_that_promise_too_much(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    """Up to 10^28 images are refused by the header: no memory is taken for them."""
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write_idx(path, np.zeros(1000), idx_header(*shape))
    tracemalloc.start()
    sentence = r"the header .* says [\d,]+; expected at most 8,589,934,592, as" if suffix else "but its header says"
    with pytest.raises(MezzotintError, match=sentence):
        idx(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_idx_bombs_of_gzip(tmp_path: Path) -> None:
    """68 MB of zeros in 66 kB, which is what they say they are."""
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((2**20, 1, 65), np.uint8))
    assert (tmp_path / "train-images-idx3-ubyte.gz").stat().st_size < 70_000
    with pytest.raises(MezzotintError, match=r"says 68,157,440; .* of a file made by gzip 200 times its size"):
        idx(tmp_path)
    with open(tmp_path / "train-images-idx3-ubyte", "wb") as file:  # and a terabyte with a hole, which is found first
        file.write(idx_header(10**9, 1000, 1))
        file.truncate(16 + 10**12)
    with pytest.raises(MezzotintError, match=r"has 1,000,000,000,016 bytes, says 1,000,000,000,000; expected at most"):
        idx(tmp_path)


def test_idx_explains_bad_options(idx_folder: Path) -> None:
    with pytest.raises(MezzotintError, match=r"data.size is 16, less than the 28×28 pixels"):
        idx(idx_folder, size=16)
    with pytest.raises(MezzotintError, match="label 9, for which the 2 class names are too few"):
        idx(idx_folder, class_names=("a", "b"))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_found_without_a_path() -> None:
    test = load("idx", "test", size=32)
    assert isinstance(test, InMemoryImages)
    assert test.class_names == FASHION_CLASSES
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.image_shape == (1, 32, 32)


# ---------------------------------------------------------------------------------------------- folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes, ten images, of different sizes, modes and depths of folder."""
    for i, (name, count) in enumerate((("ant", 3), ("bee", 5), ("cow", 2))):
        for j in range(count):
            path = tmp_path / name / ("deep/er" if j == 1 else "") / f"{j}.{('png', 'jpg')[j % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(10 * i + j, 20 + j, 16 + 2 * i).convert("L" if j == 2 else "RGB").save(path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_classes_and_pixels(pictures: Path) -> None:
    dataset = image_folder(pictures, size=8)
    assert dataset.class_names == ("ant", "bee", "cow")
    assert [dataset[i][1] for i in range(len(dataset))] == [0] * 3 + [1] * 5 + [2] * 2
    image, _ = dataset[0]
    assert image.dtype == torch.uint8
    expected = np.array(adm_center_crop(Image.open(pictures / "ant" / "0.png"), 8)).transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)
    assert image_folder(pictures, size=8, channels=1)[0][0].shape == (1, 8, 8)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_folder_without_labels(pictures: Path) -> None:
    picture(99).save(pictures / "loose.png")
    dataset = image_folder(pictures, size=8, labels=False)
    assert len(dataset) == 11
    assert dataset.class_names == ()
    assert {dataset[i][1] for i in range(11)} == {-1}


def test_folder_identity_tells_contents_apart(pictures: Path) -> None:
    first, again = image_folder(pictures, size=8).identity, image_folder(pictures, size=8).identity
    assert first == again
    assert first != image_folder(pictures, size=16).identity
    picture(77, 90, 90).save(pictures / "ant" / "0.png")
    assert first != image_folder(pictures, size=8).identity


def test_folder_holds_out_a_fixed_part(pictures: Path) -> None:
    train = image_folder(pictures, 8, "train", test_fraction=0.3).pictures
    test = image_folder(pictures, 8, "test", test_fraction=0.3).pictures
    files = {split: {p.name(i) for i in range(len(p))} for split, p in (("train", train), ("test", test))}
    assert (len(train), len(test)) == (7, 3)
    assert not files["train"] & files["test"]
    assert files["test"] == {test.name(i) for i in range(3)}
    for fraction, sentence in ((0.0, "no test split, only train; set data.test_fraction"), (1.5, "less than 1")):
        with pytest.raises(MezzotintError, match=sentence):
            image_folder(pictures, 8, "test", test_fraction=fraction)


def test_folder_uses_its_own_splits(tmp_path: Path) -> None:
    for file in ("train/a/0.png", "train/b/0.png", "train/b/1.png", "val/b/7.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        picture(len(file)).save(tmp_path / file)
    train, test = image_folder(tmp_path, 8, "train"), image_folder(tmp_path, 8, "test")
    assert (len(train), len(test)) == (3, 1)
    assert train.class_names == test.class_names == ("a", "b")
    assert test[0][1] == 1  # the class of the training images, though it is the only one here
    with pytest.raises(MezzotintError, match=r"has a test split of its own, 'val'; leave data.test_fraction at 0"):
        image_folder(tmp_path, 8, "train", test_fraction=0.1)
    (tmp_path / "val" / "zoo").mkdir()
    with pytest.raises(MezzotintError, match="classes that the training images lack: zoo"):
        image_folder(tmp_path, 8, "test")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("Training", "Testing"),
        ("train", "dev"),
        ("training", "evaluation"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("TRAIN", "Valid"),
        ("DIV2K_train_HR", "DIV2K_valid_HR"),
    ],
)
def test_folder_splits_under_other_names(tmp_path: Path, train: str, test: str) -> None:
    for split, count in ((train, 3), (test, 2)):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / split / kind / f"{i}.png")
    (tmp_path / "annotations").mkdir()
    if not train.startswith("DIV"):
        (tmp_path / "annotations" / "notes.txt").write_text("no image, so in nobody's way")
    else:
        (tmp_path / "annotations").rmdir()
    for split, count in (("train", 6), ("test", 4)):
        dataset = image_folder(tmp_path, 8, split)
        assert (dataset.class_names, len(dataset)) == (("cat", "dog"), count)


def test_folder_with_a_preferred_and_another_test_split(tmp_path: Path) -> None:
    for i, file in enumerate(("train/a/0.png", "train/b/0.png", "val/b/0.png", "test/0.png")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / file)
    held_out = image_folder(tmp_path, 8, "test")  # `test` has no classes, as a competition's has none
    assert [Path(held_out.pictures.name(i)).parent.parent.name for i in range(len(held_out))] == ["val"]
    assert Path(image_folder(tmp_path, 8, "test", labels=False).pictures.name(0)).parent.name == "test"
    (tmp_path / "val").rename(tmp_path / "Test")
    with pytest.raises(MezzotintError, match="several test splits, Test, test; expected one"):
        image_folder(tmp_path, 8, "test", labels=False)


def test_folder_whose_sub_folders_may_be_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, file in enumerate(("train/a/0.png", "bus/0.png", "car/0.png")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / file)
    assert image_folder(tmp_path, 8).class_names == ("bus", "car", "train")
    assert [m.split(": ")[1] for m in caplog.messages] == [
        "train is taken for a class, not for a split, beside bus, car"
    ]
    (tmp_path / "car").rename(tmp_path / "val")
    for labels in (True, False):
        with pytest.raises(
            MezzotintError, match=r"has splits, train, val, and images beside them, in bus; expected spl"
        ):
            image_folder(tmp_path, 8, labels=labels)


def test_folder_with_splits_inside_of_classes(tmp_path: Path) -> None:
    for i, file in enumerate(("cat/train/0.png", "cat/test/0.png", "dog/train/0.png", "dog/test/0.png")):
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "set" / file)
    with pytest.raises(MezzotintError, match=r"splits inside of cat: test, train; expected classes inside of splits"):
        image_folder(tmp_path / "set", 8)


@pytest.mark.parametrize(
    ("name", "alone", "within"),
    [
        *[(name, "train", "train") for name in ("train", "Training", "train_set", "train2017", "training-images")],
        *[
            (name, "test", "test")
            for name in ("test", "VAL", "valid", "validation", "dev", "Eval", "test-set", "val 2")
        ],
        *[(name, None, "train") for name in ("DIV2K_train_HR", "imagenet-train-0000", "train_station")],
        *[(name, None, "test") for name in ("a-validation-00", "x.test")],
        *[
            (name, None, None)
            for name in ("restrain", "contest", "value", "device", "latest", "trains", "protest1", "")
        ],
    ],
)
def test_names_of_splits(name: str, alone: str | None, within: str | None) -> None:
    assert (split_of(name), split_of(name, within=True)) == (alone, within)


def test_folder_explains_what_is_missing(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(MezzotintError, match=r"does not exist; set data.path"):
        image_folder(tmp_path / "nowhere", 8)
    (empty := tmp_path / "empty").mkdir()
    for labels in (True, False):
        with pytest.raises(MezzotintError, match=r"empty holds no images; expected files like \.jpg"):
            image_folder(empty, 8, labels=labels)
    (flat := tmp_path / "flat").mkdir()
    picture(0).save(flat / "0.png")
    with pytest.raises(MezzotintError, match=r"1 images but no sub-folders; .* or set data.labels=false"):
        image_folder(flat, 8)
    with pytest.raises(MezzotintError, match="holds no images of the classes empty"):
        image_folder(pictures, 8)  # whose sub-folder `empty` was just made


def damage(folder: Path) -> list[Path]:
    """Three unreadable files: a truncated JPEG, a text, and a link to nothing."""
    broken = [folder / "bee" / "0.png", folder / "bee" / "3.jpg", folder / "cow" / "deep" / "er" / "1.jpg"]
    broken[0].write_text("not an image")
    picture(1, 200, 200).save(broken[1])
    broken[1].write_bytes(broken[1].read_bytes()[:-1000])
    broken[2].unlink()
    broken[2].symlink_to(folder / "nothing.jpg")
    return broken


def test_unreadable_images_are_reported_and_replaced(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = damage(pictures)
    dataset = image_folder(pictures, 8, max_unreadable=3)
    names = [dataset.pictures.name(i) for i in range(len(dataset))]
    caplog.clear()  # of the line on what was left aside
    with caplog.at_level(logging.WARNING, "mezzotint"):
        for _ in range(2):
            items = [dataset[i] for i in range(len(dataset))]
    assert len(caplog.messages) == 3  # each of them once
    for path, message in zip(broken, sorted(caplog.messages), strict=True):
        assert message.startswith(f"unreadable image skipped: {path} (")
    for path in broken:
        index = names.index(str(path))
        image, label = items[(index + 1) % len(items)]  # the next one stands in; after the last one, the first
        assert torch.equal(items[index][0], image)
        assert items[index][1] == label


def test_too_many_unreadable_images_are_an_error(pictures: Path) -> None:
    broken = damage(pictures)
    dataset = image_folder(pictures, 8, max_unreadable=2)
    with pytest.raises(MezzotintError, match="3 images cannot be read, and at most 2 may be skipped") as caught:
        [dataset[i] for i in range(len(dataset))]
    assert all(str(path) in str(caught.value) for path in broken)


# ---------------------------------------------------------------------------------------- Hugging Face

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _hub_is_out_of_reach(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 10 s an epoch
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def hub_rows(count: int, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    images = [b"broken %d" % i if i in broken else encoded(picture(i)) for i in range(count)]
    columns = {
        "picture": [{"bytes": image, "path": None} for image in images],
        "kind": [i % 3 for i in range(count)],
        "number": list(range(count)),
    }
    features = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["x", "y", "z"]),
        "number": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(params=["save_to_disk", "parquet"])
def hub_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "parquet":
        hub_rows(12).to_parquet(tmp_path / "train-00000-of-00001.parquet")
        hub_rows(4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(train=hub_rows(12), test=hub_rows(4)).save_to_disk(tmp_path)
    return tmp_path


def test_hugging_face_takes_brackets_for_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "[raw]").mkdir()
    with pytest.raises(MezzotintError, match=r"\[raw\] has \*, \? or \[ in its name, .* takes for a pattern; rename"):
        hugging_face(tmp_path / "[raw]", 8)


def test_hugging_face_folder(hub_folder: Path) -> None:
    train, test = hugging_face(hub_folder, 8), load("huggingface", "test", path=hub_folder, size=8)
    assert isinstance(train, DecodedImages)
    assert isinstance(test, DecodedImages)
    assert (len(train), len(test)) == (12, 4)
    assert train.class_names == ("x", "y", "z")
    image, label = train[4]
    assert label == 1
    assert np.array_equal(image.numpy(), np.array(adm_center_crop(picture(4), 8)).transpose(2, 0, 1))
    assert train.identity != test.identity
    assert train.identity == hugging_face(hub_folder, 8).identity


def test_hugging_face_identity_is_the_same_for_both_formats(tmp_path: Path) -> None:
    hub_rows(12).save_to_disk(tmp_path / "saved" / "set")
    (tmp_path / "files" / "set").mkdir(parents=True)
    hub_rows(12).to_parquet(tmp_path / "files" / "set" / "any.parquet")
    saved, files = hugging_face(tmp_path / "saved" / "set", 8), hugging_face(tmp_path / "files" / "set", 8)
    assert saved.identity == files.identity


@pytest.mark.parametrize("kept", ["bytes", "files"])
def test_hugging_face_identity_tells_a_single_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """Among those that are not read: by its size where it is in the set, by its content where it is a file."""
    monkeypatch.setattr("mezzotint.data.huggingface.SET_ROWS", 2)
    identities, images = [], [tmp_path / f"{i}.png" for i in range(9)]
    for value in (0, 99):
        for i, path in enumerate(images):
            picture(value if i == 5 else 7 * i).save(path)
        rows = {"image": [str(path) for path in images], "label": [0] * 9}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
        made = datasets.Dataset.from_dict(rows, features=features)
        if kept == "bytes":
            made.save_to_disk(tmp_path / str(value) / "set")
        else:
            monkeypatch.setattr("mezzotint.data.huggingface._load_parts", lambda *_, made=made: {"train": made})
        identities.append(hugging_face(tmp_path / str(value) / "set", 8).identity)
    assert identities[0] != identities[1]


def test_hugging_face_image_files_and_held_out_part(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / ("ant", "bee")[i % 2]).mkdir(exist_ok=True)
        picture(i).save(tmp_path / ("ant", "bee")[i % 2] / f"{i}.png")
    train = hugging_face(tmp_path, 8, "train", test_fraction=0.3)
    test = hugging_face(tmp_path, 8, "test", test_fraction=0.3)
    assert isinstance(train, DecodedImages)
    assert isinstance(test, DecodedImages)
    assert (len(train), len(test)) == (7, 3)
    assert train.class_names == ("ant", "bee")


def test_hugging_face_columns(tmp_path: Path) -> None:
    rows = hub_rows(6)
    second = rows.select_columns("picture").rename_column("picture", "second")
    datasets.concatenate_datasets([rows, second], axis=1).save_to_disk(tmp_path / "two")
    rows.remove_columns("kind").save_to_disk(tmp_path / "none")
    with pytest.raises(MezzotintError, match=r"several image columns, picture, second; .* set data.image_column"):
        hugging_face(tmp_path / "two", 8)
    assert len(hugging_face(tmp_path / "two", 8, image_column="second")) == 6
    with pytest.raises(MezzotintError, match="no image column 'pictur'; closest: picture"):
        hugging_face(tmp_path / "two", 8, image_column="pictur")
    with pytest.raises(MezzotintError, match=r"no label column; .* set data.label_column or data.labels=false"):
        hugging_face(tmp_path / "none", 8)
    assert hugging_face(tmp_path / "none", 8, labels=False).class_names == ()
    assert hugging_face(tmp_path / "none", 8, label_column="number").class_names == tuple("012345")
    with pytest.raises(MezzotintError, match="no column 'nmber'; closest: number"):
        hugging_face(tmp_path / "none", 8, label_column="nmber")
    with pytest.raises(MezzotintError, match=r"column 'picture' of .* not labels; expected ClassLabel"):
        hugging_face(tmp_path / "two", 8, image_column="second", label_column="picture")
    with pytest.raises(MezzotintError, match="expected ClassLabel, or integers unless streaming"):
        hugging_face(tmp_path / "none", 8, label_column="number", streaming=True)


def test_hugging_face_unreadable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub_rows(6, broken=(2, 3)).save_to_disk(tmp_path)
    dataset = hugging_face(tmp_path, 8, max_unreadable=2)
    assert torch.equal(dataset[2][0], dataset[4][0])
    assert [m.split(" (")[0] for m in caplog.messages] == [
        f"unreadable image skipped: example {i} of {tmp_path}" for i in (2, 3)
    ]
    with pytest.raises(MezzotintError, match="2 images cannot be read, and at most 1 may be skipped"):
        hugging_face(tmp_path, 8, max_unreadable=1)[2]


def test_hugging_face_label_that_is_no_class(tmp_path: Path) -> None:
    rows = hub_rows(3).map(lambda row: {"kind": -1 if row["number"] == 1 else row["kind"]})
    rows.save_to_disk(tmp_path)
    with pytest.raises(MezzotintError, match=r"label -1, expected 0 to 2, in example 1, .* set data.labels=false"):
        hugging_face(tmp_path, 8)
    stream = hugging_face(tmp_path, 8, streaming=True)
    assert isinstance(stream, HubStream)
    with pytest.raises(MezzotintError, match=r"label -1, expected 0 to 2; .* set data.labels=false"):
        [stream.decode([row], 0) for row in islice(stream.read(0, 0), 3)]


def hub_labels(labels: list[int | None]) -> datasets.Dataset:
    """`hub_rows` with other labels."""
    rows = hub_rows(len(labels))
    return rows.map(lambda row: {"kind": labels[row["number"]]})


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_test_split_without_labels(tmp_path: Path, streaming: bool) -> None:
    """As ImageNet's: its 100,000 test images have the label −1, and 50,000 for validation have labels."""
    unknown = hub_labels([-1, None, -1])
    datasets.DatasetDict(train=hub_rows(6), validation=hub_labels([2, 1]), test=unknown).save_to_disk(tmp_path / "both")
    held_out = hugging_face(tmp_path / "both", 8, "test", streaming=streaming)
    if isinstance(held_out, HubStream):
        assert [held_out.decode([row], 0).label for row in islice(held_out.read(0, 0), 2)] in ([2, 1], [1, 2])
    else:
        assert [held_out[i][1] for i in range(len(held_out))] == [2, 1]
        assert len(hugging_face(tmp_path / "both", 8, "test", labels=False)) == 3
    datasets.DatasetDict(train=hub_rows(6), test=unknown).save_to_disk(tmp_path / "one")
    with pytest.raises(NoSuchSplit, match=r"has no test split, only train, test \(test without labels"):
        hugging_face(tmp_path / "one", 8, "test", streaming=streaming)
    if not streaming:
        assert len(hugging_face(tmp_path / "one", 8, "test", test_fraction=0.5)) == 3
    unknown.save_to_disk(tmp_path / "none")
    with pytest.raises(MezzotintError, match=r"has no train split, only train \(train without labels, so set data.lab"):
        hugging_face(tmp_path / "none", 8, streaming=streaming)


def test_hugging_face_numbers_that_are_no_classes(tmp_path: Path) -> None:
    for name, wrong in (("huge", 10**9), ("negative", -5)):
        hub_rows(3).map(lambda row, i=wrong: {"number": i if row["number"] == 1 else 0}).save_to_disk(tmp_path / name)
    with pytest.raises(MezzotintError, match="has the label 1000000000, but there are 3 images; expected classes numb"):
        hugging_face(tmp_path / "huge", 8, label_column="number")
    with pytest.raises(MezzotintError, match="has the label -5, expected 0 to 0, in example 1, one of 1"):
        hugging_face(tmp_path / "negative", 8, label_column="number")


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_hides_no_files(tmp_path: Path, streaming: bool) -> None:
    """`datasets` takes such files alone once it has seen one of them."""
    for i, file in enumerate(("cat/0.png", "cat/train_1.png", "cat/test_2.png", "dog/3.png")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        picture(i).save(tmp_path / file)
    with pytest.raises(
        MezzotintError, match=r"of 2 files .* leave out the other 2: cat/0.png, dog/3.png; name all or no"
    ):
        hugging_face(tmp_path, 8, labels=False, streaming=streaming)
    for file in ("cat/train_1.png", "cat/test_2.png"):
        (tmp_path / file).unlink()
    whole = hugging_face(tmp_path, 8, streaming=streaming)
    assert whole.class_names == ("cat", "dog")
    assert isinstance(whole, HubStream) or len(whole) == 2


def test_hugging_face_explains_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MezzotintError, match=r"nobody/nothing cannot be loaded .*; expected a name on the hub"):
        hugging_face("nobody/nothing", 8)
    hub_rows(3).save_to_disk(tmp_path)
    with pytest.raises(MezzotintError, match=r"no test split, only train; set data.test_fraction"):
        hugging_face(tmp_path, 8, "test")
    with pytest.raises(MezzotintError, match="a stream cannot hold images out"):
        hugging_face(tmp_path, 8, test_fraction=0.5, streaming=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MezzotintError, match=r"pip install 'mezzotint\[hub\]'"):
        hugging_face(tmp_path, 8)


@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 40])
def test_a_stream_can_be_entered_anywhere(hub_folder: Path, start: int) -> None:
    stream = hugging_face(hub_folder, 8, streaming=True, shuffle_buffer=5)
    assert isinstance(stream, HubStream)
    whole, later = stream.read(0, seed=3), stream.read(start, seed=3)
    expected = [next(whole) for _ in range(start + 15)][start:]
    assert [next(later) for _ in range(15)] == expected


def test_a_stream_is_shuffled_anew_every_epoch(hub_folder: Path) -> None:
    stream = hugging_face(hub_folder, 8, streaming=True)
    assert isinstance(stream, HubStream)
    examples = stream.read(0, seed=3)
    epochs = [[next(examples).row["picture"]["bytes"] for _ in range(12)] for _ in range(2)]
    everything = {encoded(picture(i)) for i in range(12)}
    assert set(epochs[0]) == set(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    other = stream.read(0, seed=4)
    assert epochs[0] != [next(other).row["picture"]["bytes"] for _ in range(12)]


# ------------------------------------------------------------------------------------------ transforms


def test_levels_survive_the_way_to_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels).dtype == torch.float32
    assert (to_float(levels)[0], to_float(levels)[-1]) == (-1, 1)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_flip_mirrors_the_chosen_images() -> None:
    images = torch.arange(12.0).view(2, 2, 1, 3)
    flipped = flip(images, torch.tensor([False, True]))
    assert torch.equal(flipped[0], images[0])
    assert flipped[1].tolist() == [[[8, 7, 6]], [[11, 10, 9]]]


def resampled(image: np.ndarray, height: int, width: int, kernel: Callable, support: float) -> np.ndarray:
    """A separable filter that is stretched when it shrinks, in float64; rounded to whole levels after either axis."""
    for axis, size in ((1, width), (0, height)):
        scale = image.shape[axis] / size
        stretch = max(scale, 1.0)
        centres = (np.arange(size) + 0.5) * scale
        pixels = np.arange(image.shape[axis]) + 0.5
        weights = kernel((pixels[None] - centres[:, None]) / stretch)
        weights[np.abs(pixels[None] - centres[:, None]) > support * stretch] = 0
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
        image = np.floor(image + 0.5).clip(0, 255)
    return image


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys's kernel with a = −1/2."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


@pytest.mark.parametrize(("width", "height"), [(100, 40), (33, 70), (16, 16), (31, 32), (10, 7), (130, 129)])
def test_adm_crop_is_what_the_paper_trains_on(width: int, height: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    reference = np.asarray(image, np.float64)
    while min(reference.shape[:2]) >= 2 * 16:
        reference = resampled(reference, reference.shape[0] // 2, reference.shape[1] // 2, box, 0.5)
    scale = 16 / min(reference.shape[:2])
    reference = resampled(reference, *(round(side * scale) for side in reference.shape[:2]), bicubic, 2.0)
    top, left = ((side - 16) // 2 for side in reference.shape[:2])
    reference = reference[top : top + 16, left : left + 16]

    difference = np.abs(np.asarray(adm_center_crop(image, 16), np.float64) - reference)
    assert difference.shape == (16, 16, 3)
    assert difference.max() <= 2  # PIL rounds after the axis that it takes first, which differs between its versions
    assert difference.mean() < 0.3


def test_the_configuration_of_a_hub_s_set_is_asked_for(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.data import huggingface

    asked, found = [], huggingface._load_parts(hub_folder, None, False)

    def parts(path: object, config: str | None, streaming: bool) -> object:
        asked.append(config)
        return found

    monkeypatch.setattr(huggingface, "_load_parts", parts)
    hugging_face(hub_folder, 8, config="small")
    assert asked == ["small"]
