"""What a run's TensorBoard logs and sample grids say: the recipe, the classes, what a picture was drawn for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Command
from PIL import Image

import mezzotint
from mezzotint.images import GREY, LABEL_LINES, LINE, grid_image, save_animation, save_pyramid_grid, save_video
from mezzotint.pipeline import label_names

GRID = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).repeat(6, 1, 1, 1)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_a_run_is_described_in_tensorboard(tmp_path: Path) -> None:
    """HPARAMS has the resolved recipe and scalars that are there; TEXT the recipe and classes; IMAGES grids."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    words = {"training.sample_every": 3, "training.validate_every": 3, "training.lr": 2e-3, "target": "noise"}
    recipe = mezzotint.override_recipe(mezzotint.load_recipe("digits", TINY), words)
    mezzotint.train(recipe, tmp_path, quiet=True)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()

    found = events.PluginTagToContent("hparams")
    parsed = {tag: HParamsPluginData.FromString(content) for tag, content in found.items()}
    start = parsed["_hparams_/session_start_info"].session_start_info.hparams
    assert start["training.lr"].number_value == pytest.approx(2e-3)
    assert start["backbone.num_classes"].number_value == 10
    assert start["target"].string_value == "noise"
    assert start["training.ema"].string_value == "[0.999]"
    assert start["training.compile"].bool_value is False
    experiment = parsed["_hparams_/experiment"].experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"loss/train", "loss/validation"}
    assert metrics <= set(events.Tags()["scalars"])
    assert {info.name for info in experiment.hparam_infos} == set(start)
    assert "_hparams_/session_end_info" in parsed

    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "lr: 0.002" in texts["recipe/text_summary"]
    assert "3. 3" in texts["classes/text_summary"]

    shown = events.Images("samples")
    assert [image.step for image in shown] == [3, 6]
    file = tmp_path / "samples" / "step-00000006.png"
    assert shown[-1].encoded_image_string == file.read_bytes()
    with Image.open(io.BytesIO(shown[-1].encoded_image_string)) as picture:
        assert picture.size == (shown[-1].width, shown[-1].height)
        assert picture.width > 8 * 50 + 2, "no names beside the rows"


def test_without_labels_a_grid_is_what_it_was() -> None:
    """make_grid's: 2 pixels of grey around each image, 48 a side."""
    picture = pixels(grid_image(GRID, 3))
    assert picture.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    assert (picture[:2] == GREY).all()
    assert (pixels(grid_image(GRID, 3, labels=())) == picture).all()


def test_a_row_of_one_class_has_its_name_beside_it() -> None:
    plain = pixels(grid_image(GRID, 3))
    named = pixels(grid_image(GRID, 3, labels=[*["cat"] * 3, *["a dog"] * 3]))
    margin = named.shape[1] - plain.shape[1]
    assert margin > 0
    assert (named[:, margin:] == plain).all()
    rows = (named[:, :margin] != GREY).any((1, 2)).nonzero()[0]
    assert rows.min() > 2
    assert rows.max() < 100
    assert not ((rows > 40) & (rows < 62)).any(), "the names are in the middle of their rows"
    other = pixels(grid_image(GRID, 3, labels=[*["a dog"] * 3, *["cat"] * 3]))
    assert other.shape == named.shape
    assert (other != named).any()


def test_else_each_image_has_its_label_above_it() -> None:
    """Twice the pixels, and a strip that holds two lines; a longer text is cut, and none is left empty."""
    long = "a very long caption of a picture that nobody could write on two lines of a hundred pixels"
    labels = ["cat", "dog", long, "", "x" * 80, "Crème brûlée"]
    named = pixels(grid_image(GRID, 3, labels=labels))
    strip, side = LABEL_LINES * LINE, 96
    assert named.shape[:2] == (2 * (strip + side + 2) + 2, 3 * (side + 2) + 2)
    plain = pixels(grid_image(GRID, 3, min_side=side))
    assert (named[2 + strip : 2 + strip + side, 2 : 2 + side] == plain[2 : 2 + side, 2 : 2 + side]).all()
    for number, label in enumerate(labels):
        row, column = divmod(number, 3)
        top, left = 2 + row * (strip + side + 2), 2 + column * (side + 2)
        written = (named[top : top + strip, left : left + side] != GREY).any()
        assert written == bool(label)
    assert (named[:, [0, 1, -2, -1]] == GREY).all(), "text runs out of its cell"


def test_labels_are_one_for_each() -> None:
    with pytest.raises(mezzotint.MezzotintError, match="5 labels for 6 images"):
        grid_image(GRID, 3, labels=["a"] * 5)


def test_animations_videos_and_levels_have_labels_too(tmp_path: Path) -> None:
    names = ["a", "b"]
    save_animation(GRID.reshape(3, 2, 1, 8, 8), tmp_path / "a.gif", labels=names)
    save_video(GRID.reshape(2, 3, 1, 8, 8), tmp_path / "v.gif", labels=names)
    save_pyramid_grid([GRID[:2, :, ::2, ::2], GRID[:2]], tmp_path / "p.png", 2, labels=names)
    for file, width in (("a.gif", 2), ("v.gif", 2), ("p.png", 4)):
        with Image.open(tmp_path / file) as picture:
            assert picture.size == (98 * width + 2, 98 + LABEL_LINES * LINE + 2), file


def test_what_is_written_is_what_was_asked_for(pipeline: mezzotint.Pipeline) -> None:
    pipeline.class_names = ("tench, Tinca tinca", *"123456789")
    assert label_names(pipeline, torch.tensor([0, 3, 10])) == ["tench", "3", "no class"]
    assert label_names(pipeline, ["a caption"]) == ["a caption"]
    assert label_names(pipeline, None) == []
    pipeline.class_names = ()
    assert label_names(pipeline, torch.tensor([0])) == []


def test_sample_writes_names_unless_told_not_to(pipeline: mezzotint.Pipeline, tmp_path: Path, command: Command) -> None:
    pipeline.save(tmp_path / "run")
    again = mezzotint.load(tmp_path / "run")
    assert again.class_names == tuple("0123456789")
    base = ("sample", tmp_path / "run", "--classes", "3, 8", "--count", 6, "--steps", 1, "--sampler", "ode-euler")
    sizes = []
    for option in ("--labels", "--no-labels"):
        assert command(*base, option, "--out", tmp_path / "x.png").code == 0
        with Image.open(tmp_path / "x.png") as picture:
            sizes.append(picture.size)
    assert sizes[1] == (3 * 50 + 2, 2 * 50 + 2)
    assert sizes[0][0] > sizes[1][0]
    assert sizes[0][1] == sizes[1][1]


def test_a_label_without_end_is_cut_at_once() -> None:
    images = torch.zeros(2, 3, 32, 32)
    shown = [grid_image(images, 2, labels=[letters] * 2) for letters in ("[" * 10**6, "[" * 10**4, "a b " * 10**6)]
    assert {picture.size for picture in shown} == {shown[0].size}
    assert shown[0].tobytes() == shown[1].tobytes()
