"""Moving data: digits that bounce, folders of videos, and clips and pyramids written as pictures."""

from __future__ import annotations

import gc
import json
import multiprocessing
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mezzotint.data import BatchOrder, MovingDigits, digits, iterate_batches, load, video
from mezzotint.data.base import DecodedImages
from mezzotint.data.digit_clips import moving_digits
from mezzotint.data.latents import encode_dataset
from mezzotint.data.transforms import adm_center_crop, flip, to_float
from mezzotint.data.video import frame_numbers
from mezzotint.errors import MezzotintError
from mezzotint.images import save_pyramid_grid, save_video

# --------------------------------------------------------------------------------------- moving digits


def test_moving_digits_are_digits_of_their_class() -> None:
    """Every frame is one of the split's digits of that class, whole, the same one throughout, in some half pixel."""
    clips, source = moving_digits("test", frames=4, examples=30), digits("test", size=16)
    assert clips.image_shape == (4, 1, 16, 16)
    assert len(clips) == 30
    for i in range(30):
        clip, label = clips[i]
        assert label == i % 10
        assert clip.dtype == torch.uint8
        shown = source.images[source.labels == label, 0].double()
        found = torch.zeros(4, len(shown), dtype=torch.bool)
        for top in (0, 1):
            for left in (0, 1):  # the digit's phases on the grid of pixels: 9 of these hold it
                phase = F.avg_pool2d(F.pad(shown, (left, 2 - left, top, 2 - top)), 2).round()
                windows = F.pad(clip[:, 0], (0, 1, 0, 1)).unfold(1, 9, 1).unfold(2, 9, 1)  # (F, 9, 9, 9, 9)
                inside = phase.sum((1, 2)) == clip.sum((1, 2, 3))[:, None]  # nothing is beside it
                found |= inside & (windows[:, :, :, None] == phase).flatten(4).all(-1).flatten(1, 2).any(1)
        assert found.all(0).any()


def test_moving_digits_bounce() -> None:
    """Places against a ball that is stepped frame by frame and turns round at the walls."""
    clips, frames, room = moving_digits(size=16, frames=40, examples=50), 40, 8.0
    draws = np.random.default_rng(0).random((50, 1, 5))
    for i in range(50):
        _, top, left, direction, speed = draws[i, 0]
        place = room * np.array([top, left])
        velocity = (1 + speed) / 2 * np.array([np.sin(2 * np.pi * direction), np.cos(2 * np.pi * direction)])
        for frame in range(frames):
            assert np.abs(clips.corners[i, frame, 0].numpy() / 2 - place).max() <= 0.25 + 1e-9
            place = place + velocity
            for axis in range(2):
                if place[axis] < 0:
                    place[axis], velocity[axis] = -place[axis], -velocity[axis]
                elif place[axis] > room:
                    place[axis], velocity[axis] = 2 * room - place[axis], -velocity[axis]


def test_two_digits_of_a_class_overlap_by_the_brighter() -> None:
    clips = moving_digits(frames=3, objects=2, examples=20)
    for i in range(20):
        clip, label = clips[i]
        assert set(digits().labels[clips.chosen[i]].tolist()) == {label}
        for frame in range(3):
            expected = np.zeros((32, 32))
            for k in range(2):
                top, left = clips.corners[i, frame, k].tolist()
                window = expected[top : top + 16, left : left + 16]
                window[:] = np.maximum(window, clips.sprites[clips.chosen[i, k]].numpy())
            shrunk = expected.reshape(16, 2, 16, 2).mean((1, 3))
            assert np.abs(clip[frame, 0].numpy() - shrunk).max() <= 0.5


def test_moving_digits_depend_on_the_index_alone() -> None:
    before = torch.get_rng_state()
    few, many = moving_digits(examples=7), moving_digits(examples=5000)
    assert all(torch.equal(few[i][0], many[i][0]) for i in range(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert few.identity != many.identity
    assert many.identity == moving_digits(examples=5000).identity
    test = moving_digits("test", examples=7)
    train_digits = {tuple(d) for d in digits("train", size=16).images.flatten(1).tolist()}
    assert not any(tuple(d) in train_digits for d in test.sprites.flatten(1).tolist())
    assert few.identity != test.identity
    assert not torch.equal(few.corners, test.corners)
    large = load("moving-digits", size=32, channels=3, labels=False, examples=5, frames=2)
    assert large.image_shape == (2, 3, 32, 32)
    assert large[0][0].shape == (2, 3, 32, 32)
    assert large[0][1] == -1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 8}, "even number of pixels from 16, not 8"),
        ({"size": 17}, "even number of pixels from 16, not 17"),
        ({"frames": 0}, "data.frames is 0; expected at least 1"),
        ({"examples": 0}, "data.examples is 0"),
        ({"examples": 10**12}, "place digits 16,000,000,000,000 times; expected at most 33,554,432"),
        ({"objects": 0}, "data.objects is 0"),
        ({"split": "all"}, "split 'all' is unknown"),
        ({"channels": 2}, "channels, not 2"),
    ],
)
def test_moving_digits_explain_mistakes(options: dict, sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        moving_digits(**options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_clips(workers: int) -> None:
    clips = moving_digits(frames=3, examples=10)
    order = BatchOrder.over(clips, 4, seed=1)
    whole = list(iterate_batches(clips, order, start_step=0, stop_step=6, captions=True))
    resumed = iterate_batches(clips, order, start_step=3, stop_step=6, workers=workers, captions=True)
    for batch, again in zip(whole[3:], resumed, strict=True):
        assert torch.equal(batch.images, again.images)
        assert batch.captions == again.captions == tuple(str(label) for label in batch.labels.tolist())
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (4, 3, 1, 16, 16)
        assert torch.equal(batch.images, to_float(torch.stack([clips[i][0] for i in batch.indices.tolist()])))
    which = torch.tensor([True, False, True, False])
    flipped = flip(whole[0].images, which)
    for image, mirrored, turned in zip(whole[0].images, flipped, which.tolist(), strict=True):
        assert torch.equal(mirrored, torch.from_numpy(image.numpy()[..., ::-1].copy()) if turned else image)


def test_clips_have_no_cache_of_latents(tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match="the data are clips"):
        encode_dataset(moving_digits(examples=2), None, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- videos


def grey_clip(levels: list[int], height: int = 24, width: int = 32) -> Tensor:
    """Frames (F, 3, H, W) in [−1, 1] of one grey each: what they show tells which they are."""
    return to_float(torch.tensor(levels, dtype=torch.uint8))[:, None, None, None].expand(-1, 3, height, width)


def levels_of(clip: Tensor) -> list[int]:
    return clip.float().mean((1, 2, 3)).round().int().tolist()


LEVELS = [10 * i for i in range(20)]


@pytest.fixture(params=[".gif", ".mp4"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == ".mp4":
        pytest.importorskip("av")
    return request.param


@pytest.mark.parametrize(
    ("frames", "stride", "expected"),
    [
        (20, None, LEVELS),
        (5, None, [0, 50, 100, 140, 190]),  # round(19 i / 4)
        (1, None, [0]),
        (4, 1, [80, 90, 100, 110]),
        (4, 3, [50, 80, 110, 140]),
    ],
)
def test_frames_are_spread_or_consecutive(
    tmp_path: Path, suffix: str, frames: int, stride: int | None, expected: list[int]
) -> None:
    save_video(grey_clip(LEVELS), tmp_path / f"clip{suffix}", 10)
    dataset = load("video", path=tmp_path, size=16, frames=frames, frame_stride=stride, labels=False)
    assert isinstance(dataset, DecodedImages)
    assert dataset.image_shape == (frames, 3, 16, 16)
    clip, label = dataset[0]
    assert clip.shape == (frames, 3, 16, 16)
    assert clip.dtype == torch.uint8
    assert label == -1
    assert np.abs(np.array(levels_of(clip)) - expected).max() <= (0 if suffix == ".gif" else 2)


def test_a_colon_in_a_path_is_no_protocol(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_video(grey_clip([90]), f"concat:a|b{suffix}", 10)
    dataset = load("video", path=".", size=16, frames=1, labels=False)
    assert abs(levels_of(dataset[0][0])[0] - 90) <= 2


def test_frames_are_cropped_as_images_are(tmp_path: Path) -> None:
    """GIFs of at most 256 colours are exact."""
    frames = np.random.default_rng(0).integers(0, 6, (3, 40, 60), dtype=np.uint8) * 51
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:])
    dataset = load("video", path=tmp_path, size=16, frames=3, labels=False, channels=1)
    expected = [np.array(adm_center_crop(picture, 16)) for picture in pictures]
    assert np.array_equal(dataset[0][0][:, 0].numpy(), expected)


def test_videos_by_class_and_split(tmp_path: Path, suffix: str) -> None:
    for i, name in enumerate(("train/a/0", "train/b/0", "train/b/1", "test/b/0")):
        save_video(grey_clip([i, 99, 200]), tmp_path / f"{name}{suffix}", 10)
    train, test = (load("video", split, path=tmp_path, size=8, frames=2) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b")
    assert [train[i][1] for i in range(3)] == [0, 1, 1]
    assert test[0][1] == 1
    assert train.identity != test.identity
    assert train.identity != load("video", path=tmp_path, size=8, frames=2, frame_stride=1).identity
    order = BatchOrder.over(train, 2)
    batches = [list(iterate_batches(train, order, start_step=0, stop_step=3, workers=w)) for w in (0, 1)]
    for batch, again in zip(*batches, strict=True):
        assert batch.images.shape == (2, 2, 3, 8, 8)
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.labels, again.labels)


def test_workers_outlive_the_frames_of_their_parent(tmp_path: Path) -> None:
    """What a process has read of videos is garbage, threads of FFmpeg and all, that a forked one may collect."""
    pytest.importorskip("av")
    save_video(grey_clip([0, 200]), tmp_path / "clip.mp4", 10)
    dataset = load("video", path=tmp_path, size=8, frames=2, labels=False)
    gc.disable()
    try:
        dataset[0]
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(10)
        hangs = child.is_alive()
        child.kill()
    finally:
        gc.enable()
    assert not hangs


def test_captioned_videos(tmp_path: Path) -> None:
    for i in range(4):
        save_video(grey_clip([20 * i, 255]), tmp_path / f"{i}.gif", 10)
    lines = [json.dumps({"file_name": f"{i}.gif", "text": f"level {20 * i}"}) for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    parts = [load("video", split, path=tmp_path, size=8, frames=2, test_fraction=0.5) for split in ("train", "test")]
    seen = []
    for part in parts:
        assert part.class_names == ()
        order = BatchOrder.over(part, 2)
        for batch in iterate_batches(part, order, start_step=0, stop_step=1, captions=True):
            levels = ((batch.images[:, 0] + 1) * 127.5).mean((1, 2, 3)).round().int().tolist()
            assert batch.captions == tuple(f"level {level}" for level in levels)
            seen += levels
    assert sorted(seen) == [0, 20, 40, 60]


def test_short_and_broken_videos_count_as_unreadable(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_video(grey_clip([0, 9, 18]), tmp_path / f"0{suffix}", 10)
    (tmp_path / f"1{suffix}").write_bytes(b"broken")
    save_video(grey_clip([50, 60, 70, 80]), tmp_path / f"2{suffix}", 10)
    dataset = load("video", path=tmp_path, size=8, frames=4, labels=False, max_unreadable=2)
    assert torch.equal(dataset[0][0], dataset[2][0])
    assert "it has 3 frames, and the clip needs 4" in caplog.text
    strict = load("video", path=tmp_path, size=8, frames=2, frame_stride=3, labels=False, max_unreadable=1)
    with pytest.raises(MezzotintError, match="2 images cannot be read, and at most 1 may be skipped"):
        strict[0]


def test_fewer_frames_than_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in files that tell the player to skip some: the frames that do come out are counted again."""
    pytest.importorskip("av")
    save_video(grey_clip(LEVELS), tmp_path / "clip.mp4", 10)
    whole, again = (load("video", path=tmp_path, size=8, frames=2, labels=False) for _ in range(2))
    asked = []

    def counted(count: int, frames: int, stride: int | None) -> list[int]:
        asked.append(count)
        return frame_numbers(count + 5 * (len(asked) == 1), frames, stride)

    expected = whole[0][0]
    monkeypatch.setattr(video, "frame_numbers", counted)
    assert torch.equal(again[0][0], expected)
    assert asked == [20, 20]


def test_videos_explain_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clips").mkdir()
    options = {"path": tmp_path / "clips", "size": 8, "labels": False}
    with pytest.raises(MezzotintError, match=r"video folder .* holds no videos; expected files like \.gif, \.mp4"):
        load("video", **options)
    (tmp_path / "clips" / "0.webm").write_bytes(b"")
    for key in ("frames", "frame_stride"):
        with pytest.raises(MezzotintError, match=f"data.{key} is 0; expected at least 1"):
            load("video", **options, **{key: 0})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MezzotintError, match=r"need the library PyAV.* pip install 'mezzotint\[video\]'"):
        load("video", **options)


# ---------------------------------------------------------------------------------------- pictures out


# What a player does with a frame whose upper quarter is white, by the matrix a, b, c, d: where the white is then.
MATRICES = {
    (1, 0, 0, 1): "top",
    (0, 1, -1, 0): "right",  # turned clockwise
    (-1, 0, 0, -1): "bottom",
    (0, -1, 1, 0): "left",
    (1, 0, 0, -1): "bottom",  # mirrored
    (-1, 0, 0, 1): "top",
    (0, 1, 1, 0): "left",
    (0, -1, -1, 0): "right",
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_are_turned_by_their_display_matrix(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    pytest.importorskip("av")
    clip = torch.full((2, 3, 32, 32), -1.0)
    clip[:, :, :8] = 1
    save_video(clip, tmp_path / "clip.mp4")
    content = (tmp_path / "clip.mp4").read_bytes()
    one = 1 << 16
    place = content.index(struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    a, b, c, d = (one * number for number in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "clip.mp4").write_bytes(content[:place] + turned + content[place + 36 :])
    frame = load("video", path=tmp_path, size=32, channels=1, frames=2, labels=False)[0][0][1, 0].float()
    edges = {"top": frame[:6], "bottom": frame[-6:], "left": frame[:, :6], "right": frame[:, -6:]}
    assert max(edges, key=lambda name: edges[name].mean()) == MATRICES[matrix]
    assert edges[MATRICES[matrix]].mean() > 240


def test_transparent_videos_are_composed_on_the_background(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames = np.zeros((2, 16, 16, 4), np.uint8)
    frames[:, :8] = (255, 0, 0, 255)  # the rest is clear
    with av.open(str(tmp_path / "0.mov"), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    first = Image.new("P", (16, 16), 1)
    first.putpalette([255, 0, 0, 9, 9, 9])
    first.paste(0, (0, 0, 16, 8))
    first.save(tmp_path / "1.gif", save_all=True, append_images=[first.copy()], transparency=1, disposal=2)
    options = {"size": 16, "frames": 2, "labels": False}
    for background, right in (("white", [255, 255, 255]), ("#102030", [16, 32, 48])):
        clips = load("video", path=tmp_path, background=background, **options)
        for clip in (clips[0][0], clips[1][0]):
            assert clip[0, :, 0, 0].tolist() == [255, 0, 0]
            assert clip[0, :, -1, -1].tolist() == right
    assert clips.identity != load("video", path=tmp_path, **options).identity


def test_videos_of_too_many_pixels_are_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("av")
    save_video(torch.zeros(2, 3, 16, 16), tmp_path / "0.mp4")
    save_video(torch.zeros(2, 3, 32, 32), tmp_path / "1.mp4")
    save_video(torch.zeros(2, 3, 32, 32), tmp_path / "2.gif")
    monkeypatch.setattr("mezzotint.data.pictures.MAX_PIXELS", 300)
    clips = load("video", path=tmp_path, size=8, frames=2, labels=False)
    for i in range(3):
        clips[i]
    assert caplog.text.count("it has 32 × 32 pixels, more than 300") == 2


def test_one_clip_as_a_gif_keeps_its_pixels_and_its_pace(tmp_path: Path) -> None:
    clip = to_float(torch.randint(0, 16, (7, 1, 9, 11), generator=torch.Generator().manual_seed(0)) * 16)
    save_video(clip, tmp_path / "clip.gif", 24)
    durations = []
    with Image.open(tmp_path / "clip.gif") as picture:
        assert picture.size == (11, 9)
        for frame in clip:
            picture.seek(len(durations))
            durations.append(picture.info["duration"])
            shown = np.array(picture.convert("L"), dtype=np.float64)
            assert np.abs(shown - (frame[0].numpy() + 1) * 127.5).max() < 1e-3
    assert sum(durations) == 290  # 7 frames at 24 a second, to the nearest hundredth
    assert set(durations) == {40, 50}


def test_mp4_has_the_frames_the_rate_and_the_colours(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clip = grey_clip([0, 60, 120, 240], 15, 17)
    save_video(clip, tmp_path / "deep" / "clip.mp4", 29.97)
    with av.open(str(tmp_path / "deep" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(2997, 100)
        assert (stream.height, stream.width) == (16, 18)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.abs(np.stack(frames).mean((1, 2, 3)) - [0, 60, 120, 240]).max() <= 2
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["clip.mp4"]


def test_a_grid_of_clips(tmp_path: Path) -> None:
    clips = torch.stack([grey_clip([50 * i, 50 * i + 9], 48, 48) for i in range(5)])
    save_video(clips, tmp_path / "grid.gif", 10, columns=3)
    with Image.open(tmp_path / "grid.gif") as picture:
        assert picture.size == (3 * 50 + 2, 2 * 50 + 2)
        for frame in range(2):
            picture.seek(frame)
            shown = np.array(picture.convert("L"))
            assert [shown[26 + 50 * (i // 3), 26 + 50 * (i % 3)] for i in range(5)] == [
                50 * i + 9 * frame for i in range(5)
            ]


def test_saving_explains_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = grey_clip([0, 1])
    for name, fps, sentence in (
        ("clip.avi", 8, r"as .gif or .mp4, not clip.avi; change the suffix"),
        ("clip.gif", 0, r".gif shows 0.1 to 50 frames per second, not 0"),
        ("clip.gif", 60, r"0.1 to 50 frames per second, not 60"),
    ):
        with pytest.raises(MezzotintError, match=sentence):
            save_video(clip, tmp_path / name, fps)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MezzotintError, match=r"MP4 files need the library PyAV.* pip install 'mezzotint\[video\]'"):
        save_video(clip, tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_pyramids_side_by_side(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randint(0, 256, (3, 3, s, s), generator=generator, dtype=torch.uint8) for s in (16, 32, 64)]
    save_pyramid_grid([to_float(level) for level in levels], tmp_path / "pyramid.png", columns=2)
    shown = np.array(Image.open(tmp_path / "pyramid.png"))
    assert shown.shape == (2 * 66 + 2, 6 * 66 + 2, 3)
    for image in range(3):
        for k, level in enumerate(levels):
            top, left = 2 + 66 * (image // 2), 2 + 66 * (3 * (image % 2) + k)
            pixels = level[image].permute(1, 2, 0).numpy()
            repeated = np.kron(pixels, np.ones((64 >> (4 + k), 64 >> (4 + k), 1), np.uint8))
            assert np.array_equal(shown[top : top + 64, left : left + 64], repeated)


def test_moving_digits_are_a_data_set() -> None:
    assert isinstance(load("moving-digits", examples=3), MovingDigits)
