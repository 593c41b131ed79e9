"""Pictures of one's own: what a recipe takes from the data, and what it is told where it does not suit them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Command
from PIL import Image

import mezzotint
from mezzotint.data import captioned_folder, image_folder
from mezzotint.data.pictures import read_picture
from mezzotint.errors import MezzotintError
from mezzotint.interop import load
from mezzotint.recipe import DataSettings, load_recipe, override_recipe, resolve
from mezzotint.training import train

Colours = tuple[int, int, int]
RED, GREY = (200, 30, 30), (90, 90, 90)


def save(path: Path, colour: Colours = RED, size: tuple[int, int] = (20, 12), **options: Any) -> Path:
    """A picture of one colour, with a darker left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.full((size[1], size[0], 3), colour, np.uint8)
    levels[:, : size[0] // 2] //= 2
    Image.fromarray(levels).save(path, **options)
    return path


def photos(folder: Path, count: int = 4, classes: tuple[str, ...] = ("ant", "bee", "cow"), **options: Any) -> Path:
    """`count` different pictures of each class; without classes all in `folder` itself."""
    for name in classes or ("",):
        for number in range(count):
            save(folder / name / f"{number:03d}.jpg", size=(20 + number, 12), **options)
    return folder


# ------------------------------------------------------------------------------------------ classes and names


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        ([], 1000),
        (["training.steps=5"], 1000),
        (["data=folder:photos"], None),
        (["data.path=photos"], None),
        (["data={name: folder, path: photos}"], None),
        (["data=huggingface:ILSVRC/imagenet-1k"], 1000),  # which is the recipe's own
        (["condition=text"], None),
        (["data=folder:photos", "backbone.num_classes=1000"], 1000),
        (["backbone.num_classes=1000", "data=folder:photos"], 1000),
        (["backbone={name: dit-s-2, num_classes: 7}", "data=folder:photos"], 7),
        (["backbone=dit-s-4", "data=folder:photos"], None),
        (["backbone.num_classes=0", "data=folder:photos"], 0),
    ],
)
def test_a_number_of_classes_belongs_to_its_data(overrides: list[str], classes: int | None) -> None:
    assert load_recipe("dit-s-2-256", overrides).backbone.num_classes == classes


def test_a_network_without_classes_stays_so_on_any_data() -> None:
    assert load_recipe("ldae-01-no-classes", ["data=folder:photos"]).backbone.num_classes == 0


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("extends: dit-s-2-256\ndata: folder:photos", None),
        ("extends: dit-s-2-256\ndata: {path: photos}", None),
        ("extends: dit-s-2-256\ncondition: text", None),
        ("extends: dit-s-2-256\ntraining: {steps: 5}", 1000),
        ("extends: dit-s-2-256\ndata: folder:photos\nbackbone: {num_classes: 9}", 9),
    ],
)
def test_classes_of_a_recipe_that_extends_another(tmp_path: Path, text: str, classes: int | None) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(tmp_path / "mine.yaml").backbone.num_classes == classes


def test_a_published_recipe_learns_the_classes_that_there_are(tmp_path: Path) -> None:
    small = [*TINY, "data.size=8", "representation=pixels", "data.workers=0", "objective.times=discrete"]
    words = load_recipe("dit-s-2-256", [f"data=folder:{photos(tmp_path / 'photos')}", *small])
    trained = train(words, tmp_path / "run", quiet=True)
    assert trained.denoiser.num_classes == 3
    assert load_recipe(tmp_path / "run").backbone.num_classes == 3


def test_captions_in_place_of_published_classes(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", classes=())
    (folder / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"{number:03d}.jpg", "text": f"number {number}"}) + "\n" for number in range(4)
        )
    )
    words = load_recipe(
        "dit-s-2-256", ["condition=text", f"data=captions:{folder}", "data.size=64", "representation=pixels"]
    )
    resolved = resolve(words, words.data.load("train"), text_features=0)
    assert (resolved.backbone.num_classes, resolved.backbone.text_features) == (0, 0)


def test_without_classes_there_is_no_guidance(tmp_path: Path) -> None:
    words = load_recipe("dit-xl-2-256", [f"data=folder:{photos(tmp_path, classes=())}", "data.labels=false"])
    assert words.guidance.scale == 1.5
    assert resolve(words, words.data.load("train")).guidance.scale == 1


def test_classes_that_will_never_be_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = load_recipe("digits", [*TINY, f"data=folder:{photos(tmp_path / 'photos')}", "data.channels=3"])
    train(override_recipe(words, ["backbone.num_classes=10"]), tmp_path / "run", quiet=True)
    assert "num_classes is 10 and the data set has 3 classes, so 7 will never be trained" in caplog.text
    with pytest.raises(MezzotintError, match=r"has 3 classes, more than backbone.num_classes=2; raise it"):
        resolve(override_recipe(words, ["backbone.num_classes=2"]), words.data.load())


def test_weights_keep_their_classes_whatever_they_are_scored_on(tmp_path: Path) -> None:
    words = load_recipe("dit-s-2-256", [*TINY, "data.size=32"])
    made = mezzotint.build(words)
    torch.save(made.denoiser.backbone.state_dict(), tmp_path / "DiT.pt")
    asked = load_recipe("dit-s-2-256", [*TINY, "data.size=32", "data=folder:photos"])
    assert asked.backbone.num_classes is None
    assert load(tmp_path / "DiT.pt", recipe=asked).denoiser.num_classes == 1000


@pytest.mark.parametrize(
    ("recipe", "overrides", "name"),
    [
        ("photos-32", ["data=folder:some/cats"], "photos-32-cats"),
        ("photos-32", ["data.path=cats/"], "photos-32-cats"),
        ("photos-32", ["data=folder:dogs/../Été à Rome"], "photos-32-Été à Rome"),
        ("photos-32", ["data=folder:cats", "name=mine"], "mine"),
        ("photos-32", ["name=mine", "data=folder:cats"], "mine"),
        ("photos-32", ["data=folder:" + "é" * 300], "photos-32-" + "é" * 95),
        ("digits", ["data=idx"], "digits-idx"),
        ("digits", ["data=digits", "data.size=16"], "digits"),
        ("dit-s-2-256", ["data=huggingface:uoft-cs/cifar10"], "dit-s-2-256-cifar10"),
        ("dit-s-2-256", ["data=webdataset:shards/{00..99}.tar"], "dit-s-2-256-shards"),
        ("dit-s-2-256", ["data=huggingface:ILSVRC/imagenet-1k"], "dit-s-2-256"),
    ],
)
def test_a_run_is_called_after_its_data(recipe: str, overrides: list[str], name: str) -> None:
    found = load_recipe(recipe, overrides)
    assert found.name == name
    assert load_recipe(recipe, [*overrides, f"name={name}"]) == found, "a name that a folder can have"


def test_a_run_keeps_its_name_and_its_classes(tmp_path: Path) -> None:
    words = load_recipe("digits", [*TINY, "backbone.num_classes=10"])
    words.write(tmp_path)
    moved = ["data=folder:elsewhere"]
    for found in (load_recipe(tmp_path, moved), override_recipe(words, moved)):
        assert (found.name, found.backbone.num_classes, found.data.path) == ("digits", 10, "elsewhere")


def test_a_run_of_another_name_is_resumed(tmp_path: Path) -> None:
    """As one that was begun when recipes kept their names on other data."""
    changes = [*TINY, f"data=folder:{photos(tmp_path / 'photos')}", "data.channels=3"]
    train(load_recipe("digits", [*changes, "name=digits", "training.steps=2"]), tmp_path / "run", quiet=True)
    train(load_recipe("digits", [*changes, "training.steps=4"]), tmp_path / "run", quiet=True, resume=True)
    assert load_recipe(tmp_path / "run").name == "digits-photos"


def test_a_class_beyond_the_last_is_an_error(command: Command, tmp_path: Path, tiny: Any) -> None:
    train(tiny, tmp_path / "run", quiet=True)
    failed = command("sample", tmp_path / "run", "--classes", "10", "--count", 1, "--out", tmp_path / "x.png")
    assert failed.code == 2
    assert "class 10 is" in failed.err
    assert not (tmp_path / "x.png").exists()
    drawn = command("sample", tmp_path / "run", "--classes", "null", "--count", 1, "--out", tmp_path / "x.png")
    assert drawn.code == 0, drawn.err


# ------------------------------------------------------------------------------------- what the data say


def left_open(folder: Path, name: str = "folder", **given: Any) -> DataSettings:
    return DataSettings(
        **{"name": name, "path": str(folder), "size": 8, "channels": None, "labels": None, "test_fraction": None}
        | given
    ).settled()


@pytest.mark.parametrize(
    ("colours", "channels"),
    [([GREY, GREY], 1), ([GREY, RED], 3), ([(120, 100, 80)] * 2, 3), ([(91, 90, 88)] * 2, 1)],
)
def test_colours(tmp_path: Path, colours: list[Colours], channels: int) -> None:
    """JPEG files are of RGB here, whatever is in them, as those of cameras; sepia is a colour, and rounding is none."""
    for number, colour in enumerate(colours):
        save(tmp_path / f"{number}.jpg", colour)
    assert left_open(tmp_path).channels == channels


def test_colours_of_other_data_sets(tmp_path: Path) -> None:
    open_settings = {"path": None, "labels": True, "test_fraction": 0.0}
    assert left_open(tmp_path, "digits", **open_settings).channels == 1
    assert left_open(tmp_path, "moving-digits", **open_settings, size=16, frames=2, examples=4).channels == 1
    save(tmp_path / "0.png", (30, 30, 30))
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    assert left_open(tmp_path, "captions").channels == 1


@pytest.mark.parametrize(("count", "fraction"), [(33, 0.0), (34, 0.1)])  # of each of three classes
def test_a_part_is_held_out_of_enough_pictures(tmp_path: Path, count: int, fraction: float) -> None:
    assert left_open(photos(tmp_path, count)).test_fraction == fraction
    assert left_open(tmp_path, test_fraction=0.5).test_fraction == 0.5


def test_nothing_is_held_out_beside_a_test_split(tmp_path: Path) -> None:
    photos(tmp_path / "train", 40)
    photos(tmp_path / "val", 2)
    settings = left_open(tmp_path)
    assert (settings.test_fraction, settings.labels) == (0, True)
    assert len(settings.load("test")) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["a/0.png", "b/0.png"], True),
        (["train/a/0.png", "train/b/0.png", "test/a/0.png"], True),
        (["a/0.png", "b/0.png", "b/deep/1.png", "cover.png"], True),
        (["0.png", "1.png"], False),
        (["DCIM/0.png", "DCIM/1.png"], False),
        (["train/0.png", "test/0.png"], False),
        (["0.png", "1.png", "2.png", "a/0.png", "b/0.png"], False),
    ],
)
def test_whether_sub_folders_are_classes(tmp_path: Path, files: list[str], labels: bool) -> None:
    for number, file in enumerate(files):
        save(tmp_path / file, (number, 0, 0))
    assert left_open(tmp_path).labels is labels


def test_settings_that_leave_nothing_open_are_not_touched(tmp_path: Path) -> None:
    settings = DataSettings(name="folder", path=str(tmp_path / "not-there"))
    assert settings.settled() is settings


def test_photos_as_they_come(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole command on a flat folder: sizes differ, one is on its side, one is broken; then resumed."""
    monkeypatch.chdir(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # of a phone that was held upright
    for number in range(12):
        save(tmp_path / "cats" / f"{number}.jpg", (200, 20 * number, 0), (60 + number, 20), exif=turned)
    (tmp_path / "cats" / "5.jpg").write_bytes(b"\xff\xd8 cut off")
    words = [*TINY, "training.sample_every=0"]
    done = command("train", "photos-32", "data=folder:cats", *words)
    assert done.code == 0, done.err
    assert "data.labels=false (not in sub-folders by class), data.test_fraction=0.0" in done.err
    assert [record.getMessage()[:36] for record in caplog.records] == ["unreadable image skipped: cats/5.jpg"]
    found = load_recipe(tmp_path / "runs/photos-32-cats")
    assert (found.data.channels, found.data.labels, found.data.test_fraction) == (3, False, 0)
    assert (found.backbone.num_classes, found.name) == (0, "photos-32-cats")
    longer = ["training.steps=8", "--resume"]
    resumed = command("train", "photos-32", "data=folder:cats", *words, *longer)
    assert resumed.code == 0, resumed.err
    assert command("sample", "runs/photos-32-cats", "--count", 2).code == 0


def test_photos_need_a_folder(command: Command, tmp_path: Path) -> None:
    failed = command("train", "photos-32", "--out", tmp_path / "run")
    assert failed.code == 2
    assert "data set 'folder' needs the option 'path'; give one with data=folder:PATH" in failed.err
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("name", ["photos-32", "photos-64", "photos-256-latent"])
def test_recipes_of_photos(name: str, tmp_path: Path) -> None:
    folder = photos(tmp_path / "cats")
    found = load_recipe(name, [f"data=folder:{folder}"]).settled()
    resolved = resolve(found, found.data.load())
    assert resolved.backbone.num_classes == 3
    assert resolved.data.channels == 3
    assert resolved.data.size == int(name.split("-")[1])


# ------------------------------------------------------------------------------------- what is left unused


def warnings_of(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, *changes: str) -> list[str]:
    with caplog.at_level(logging.WARNING, "mezzotint"):
        train(load_recipe("digits", [*TINY, f"data=folder:{folder}", *changes]), tmp_path / "run", quiet=True)
    return [record.getMessage() for record in caplog.records]


def test_colour_pictures_that_would_train_grey(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(photos(tmp_path / "photos"), tmp_path, caplog) == [
        "data.channels=1 turns colour pictures grey; set data.channels=3 to train in colour"
    ]


def test_grey_pictures_are_no_cause_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(photos(tmp_path / "photos", colour=GREY), tmp_path, caplog) == []


@pytest.mark.parametrize("file", ["metadata.jsonl", "000.txt"])
def test_captions_that_would_be_left_unused(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = photos(tmp_path / "photos", classes=())
    (folder / file).write_text("a cat")
    assert warnings_of(folder, tmp_path, caplog, "data.channels=3", "data.labels=false") == [
        f"{folder / file} holds captions, which data=folder leaves unused; "
        f"data=captions:{folder} condition=text trains with them"
    ]


# ----------------------------------------------------------------------------------------- captions in text files


def test_captions_in_text_files(tmp_path: Path) -> None:
    for name, text in (("0", "a cat\non a sofa\n"), ("deep/1", "\ufeffein Käfer")):
        save(tmp_path / f"{name}.jpg").with_suffix(".txt").write_text(text, encoding="utf-8")
    dataset = captioned_folder(tmp_path, 8)
    assert dataset.captions([0, 1]) == [("a cat\non a sofa",), ("ein Käfer",)]
    (tmp_path / "0.txt").write_text("a dog")
    assert captioned_folder(tmp_path, 8).identity != dataset.identity
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.jpg,from the table\ndeep/1.jpg,another\n")
    assert captioned_folder(tmp_path, 8).captions([0]) == [("from the table",)]


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (lambda folder: (folder / "0.txt").unlink(), {}, r"1 images in .* have no caption .* as others have: 0.jpg; "),
        (lambda folder: (folder / "0.txt").write_text(" \n"), {}, r"1 images in .* have no caption"),
        (lambda folder: [file.unlink() for file in folder.glob("*.txt")], {}, "or NAME.txt beside each image"),
        (lambda folder: None, {"caption_column": "alt"}, "which have no key 'alt'; leave data.caption_column out"),
    ],
)
def test_text_files_explain_what_is_missing(
    tmp_path: Path, change: Callable[[Path], object], options: dict[str, str], sentence: str
) -> None:
    for number in range(2):
        save(tmp_path / f"{number}.jpg").with_suffix(".txt").write_text("a cat")
    change(tmp_path)
    with pytest.raises(MezzotintError, match=sentence):
        captioned_folder(tmp_path, 8, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("limit", "reads"), [(4 * 3 * 8 * 8, 4), (4 * 3 * 8 * 8 - 1, 8)])
def test_pictures_of_a_small_set_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, reads: int
) -> None:
    read: list[object] = []
    monkeypatch.setattr("mezzotint.data.base.KEPT_BYTES", limit)
    monkeypatch.setattr("mezzotint.data.folder.read_picture", lambda file: (read.append(file), read_picture(file))[1])
    dataset = image_folder(photos(tmp_path, classes=()), 8, labels=False)
    first, second = ([dataset[i][0] for i in range(4)] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert len(read) == reads
