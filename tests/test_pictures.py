"""Picture files: what they say of their pixels, by hand-computed values; and what in a folder is one."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import make_dataset

from mezzotint.data import load, pictures
from mezzotint.data.base import DecodedImages
from mezzotint.data.pictures import ENDINGS, background_rgb, flatten, read_picture
from mezzotint.data.transforms import adm_center_crop, picture_to_tensor
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.sources import image_source
from mezzotint.recipe import DataSettings, load_recipe

BLACK = (0, 0, 0)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def png(depth: int, colour: int, *rows: bytes, width: int, **chunks: bytes) -> io.BytesIO:
    """A PNG written by hand: of a bit depth, a colour type, and packed rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(name.encode(), content) for name, content in chunks.items())]
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def tiff(array: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1) -> io.BytesIO:
    """A grey TIFF written by hand, little-endian, `array` its bytes and `bits` its depth."""
    height, width = array.shape
    content = array.tobytes() if bits != 12 else bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10])  # 0, 2048, 4095, 16
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, height)]
    tags += [(279, len(content)), (339, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return io.BytesIO(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content)


def levels(source: io.BytesIO | Path, mode: str = "L", background: tuple[int, int, int] = BLACK) -> list:
    return np.asarray(flatten(read_picture(source), mode, background)).tolist()


# ------------------------------------------------------------------------------------------- bit depths


def test_deep_grey_is_scaled() -> None:
    values = [0, 128, 129, 8192, 32768, 65535]
    right = [[0, 0, 1, 32, 128, 255]]  # value / 257, rounded: 129 / 257 is just above a half
    row = np.array([values], np.uint16)
    assert levels(png(16, 0, row.astype(">u2").tobytes(), width=6)) == right
    assert levels(tiff(row, 16)) == right
    assert levels(encoded(Image.fromarray(row.astype(">u2")), "TIFF")) == right
    assert levels(tiff(row, 16, photometric=0)) == [[255 - level for level in right[0]]]  # white is zero
    assert levels(io.BytesIO(b"P5\n6 1\n65535\n" + row.astype(">u2").tobytes())) == right
    assert levels(io.BytesIO(b"P5\n2 1\n1000\n" + struct.pack(">2H", 500, 1000))) == [[128, 255]]
    assert levels(tiff(np.zeros((1, 4)), 12)) == [[0, 128, 255, 1]]  # 2,048 of 4,095 is 127.53, 16 is 0.996
    assert levels(png(16, 2, struct.pack(">3H", 0x1234, 0x80FF, 0xFFFF), width=1), "RGB") == [[[0x12, 0x80, 0xFF]]]


def test_floats_reach_from_0_to_1() -> None:
    row = np.array([[0, 0.25, 0.5, 0.75, 1]], np.float32)
    assert levels(tiff(row, 32, sample_format=3)) == [[0, 64, 128, 191, 255]]  # 127.5 to even
    assert levels(io.BytesIO(b"Pf\n5 1\n-1.0\n" + row.tobytes())) == [[0, 64, 128, 191, 255]]


@pytest.mark.parametrize("value", [255.0, 1.01, -0.1, np.nan, np.inf])
def test_floats_of_another_range_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="which level is white is not known, as its floats are not all within 0 and 1"):
        read_picture(tiff(np.array([[0, value]], np.float32), 32, sample_format=3))


def test_integers_of_32_bits_are_of_16_or_refused() -> None:
    assert levels(tiff(np.array([[0, 8192, 65535]], np.int32), 32, sample_format=2)) == [[0, 32, 255]]
    for value in (65536, -1):
        with pytest.raises(ValueError, match="levels are not all within 0 and 65535"):
            read_picture(tiff(np.array([[0, value]], np.int32), 32, sample_format=2))


# ----------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize(("depth", "row"), [(1, 0b01000000), (2, 0b00100000), (4, 0b00001010)])
def test_the_transparent_level_of_shallow_grey(depth: int, row: int) -> None:
    key = {1: 1, 2: 2, 4: 10}[depth]  # of two pixels the second
    assert levels(png(depth, 0, bytes([row]), width=2, tRNS=struct.pack(">H", key)), background=(7, 7, 7)) == [[0, 7]]


def test_transparent_levels_and_colours() -> None:
    grey = {"tRNS": struct.pack(">H", 300)}
    assert levels(png(16, 0, struct.pack(">2H", 300, 301), width=2, **grey), background=(9, 9, 9)) == [[9, 1]]
    assert levels(png(8, 0, b"\x05\x06", width=2, tRNS=b"\0\5"), background=(9, 9, 9)) == [[9, 6]]
    assert levels(png(8, 2, b"\1\2\3\4\5\6", width=2, tRNS=b"\0\1\0\2\0\3"), "RGB") == [[[0, 0, 0], [4, 5, 6]]]
    deep = {"tRNS": struct.pack(">3H", 0x1200, 0, 0xFF00)}
    row = struct.pack(">6H", 0x1200, 0, 0xFF00, 0xFF00, 0, 0xFF00)
    assert levels(png(16, 2, row, width=2, **deep), "RGB", (1, 2, 3)) == [[[1, 2, 3], [255, 0, 255]]]


def test_transparency_is_composed_on_the_background() -> None:
    for background, right in ((BLACK, 40), ((255, 255, 255), 244), ((100, 100, 100), 120)):
        assert levels(png(8, 4, b"\xc8\x33", width=1), background=background) == [[right]]  # 200 of a fifth, 51 / 255
    assert levels(png(8, 6, b"\xff\0\0\x33", width=1), "RGB", (255, 255, 255)) == [[[255, 204, 204]]]
    assert levels(png(16, 6, struct.pack(">4H", 65535, 0, 0, 0), width=1), "RGB", (1, 2, 3)) == [[[1, 2, 3]]]
    assert levels(png(8, 4, b"\0\0", width=1), "L", (255, 0, 0)) == [[76]]  # the grey of red: 0.299 · 255


def test_transparent_palettes() -> None:
    chunks = {"PLTE": bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]), "tRNS": b"\0\x33"}
    right = [[[1, 2, 3], [1, 53, 2], [0, 0, 255], [9, 9, 9]]]  # the second a fifth of green: 51 + 4/5 · 2
    assert levels(png(2, 3, b"\x1b", width=4, **chunks), "RGB", (1, 2, 3)) == right
    gif = Image.new("P", (2, 1))
    gif.putpalette([200, 0, 0, 0, 200, 0])
    gif.putdata([0, 1])
    assert levels(encoded(gif, "GIF", transparency=1), "RGB", (1, 2, 3)) == [[[200, 0, 0], [1, 2, 3]]]


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_alpha(mode: str) -> None:
    clear = Image.new({"La": "LA", "RGBa": "RGBA"}.get(mode, mode), (1, 1), 0).convert(mode)
    assert flatten(clear, "RGB", (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


# ------------------------------------------------------------------------------------- modes, animations


def noise(mode: str, width: int = 37, height: int = 23) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(pixels[..., 0])
    return Image.fromarray(pixels if mode == "CMYK" else pixels[..., :3], mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "YCbCr", "1"])
def test_opaque_pictures_keep_their_bits(mode: str, channels: int) -> None:
    picture = noise(mode) if mode in ("L", "CMYK") else noise("RGB").convert(mode)
    plain = np.asarray(adm_center_crop(picture.convert("L" if channels == 1 else "RGB"), 16)).reshape(16, 16, channels)
    found = picture_to_tensor(picture, (channels, 16, 16), BLACK)
    assert torch.equal(found, torch.from_numpy(plain.copy()).permute(2, 0, 1))


def test_palettes_are_resized_as_colours() -> None:
    picture = Image.new("P", (2, 2))
    picture.putpalette([0] * 30 + [255, 0, 0] + [0, 99, 0] * 9 + [0, 0, 255])  # red is 10, blue 20, green all between
    picture.putdata([10, 20, 20, 10])
    assert picture_to_tensor(read_picture(encoded(picture)), (3, 1, 1)).flatten().tolist() == [128, 0, 128]


def test_lab_and_cmyk() -> None:
    lab = Image.frombytes("LAB", (3, 1), bytes([0, 0, 0, 255, 0, 0, 136, 80, 67]))  # black, white, red; a, b are signed
    found = np.array(levels(encoded(lab, "TIFF"), "RGB"))[0]
    assert np.abs(found[:2] - [[0], [255]]).max() <= 1
    assert found[2][0] >= 250
    assert found[2][1:].max() <= 30
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert levels(encoded(cmyk, "TIFF"), "RGB") == [[[255, 0, 0]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    source = encoded(first, kind, save_all=True, append_images=[second], **lossless)
    assert levels(source, "RGB") == [[[255, 0, 0]] * 4] * 4


def test_only_pictures_are_opened() -> None:
    """PostScript would be drawn by another program."""
    with pytest.raises(UnidentifiedImageError):
        read_picture(encoded(Image.new("L", (4, 4)), "EPS"))
    with pytest.raises(UnidentifiedImageError):
        read_picture(encoded(Image.new("L", (4, 4)), "PDF"))
    assert {".jfif", ".gif", ".avif", ".jpe", ".apng", ".jp2"} < set(ENDINGS)
    assert not {".pdf", ".eps", ".ps", ".mpeg", ".h5", ".psd"} & set(ENDINGS)


# ------------------------------------------------------------------------------------------- orientation

TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation(orientation: int, tmp_path: Path) -> None:
    stored = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    right = TURNED[orientation](stored)
    for kind in ("PNG", "TIFF"):
        assert levels(encoded(Image.fromarray(stored), kind, exif=exif)) == right.tolist()
    deep = Image.fromarray(stored.astype(np.uint16) * 257)
    assert levels(encoded(deep, "PNG", exif=exif)) == right.tolist()
    for picture in (Image.fromarray(stored), deep):  # files with a name, which Pillow may map into memory
        picture.save(tmp_path / "named.tif", exif=exif)
        assert levels(tmp_path / "named.tif") == right.tolist()
    webp = encoded(Image.fromarray(stored).convert("RGB"), "WEBP", exif=exif, lossless=True)
    assert np.array(levels(webp, "RGB"))[..., 0].tolist() == right.tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
def test_a_damaged_tag_is_no_damaged_picture(exif: bytes) -> None:
    assert levels(encoded(Image.new("L", (2, 1), 100), "PNG", exif=exif)) == [[100, 100]]


# -------------------------------------------------------------------------------------- long and large


def test_long_pictures_are_cropped_before_they_are_enlarged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((1, 400_000), np.uint8)
    pixels[0, 200_000:] = 255  # an edge, exactly in the middle
    Image.fromarray(pixels).save(tmp_path / "long.png")
    Image.fromarray(pixels.T).save(tmp_path / "tall.png")
    assert (tmp_path / "long.png").stat().st_size < 1000
    made: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    dataset = load("folder", path=tmp_path, size=64, channels=3, labels=False)
    long, tall = dataset[0][0], dataset[1][0]
    assert max(made) <= 64 * 64  # and not 64 × 25,600,000
    assert torch.equal(long, tall.transpose(1, 2))
    # The square is one pixel wide, half a pixel on either side of the edge. Keys's kernel with a = −1/2, of the two
    # white pixels within its reach, whose middles are 0.5 and 1.5 to the right of the edge:
    x = (np.arange(64) + 0.5) / 64 - 0.5
    near, far = np.abs(x - 0.5), 1.5 - x
    right = (1.5 * near - 2.5) * near**2 + 1 + ((-0.5 * far + 2.5) * far - 4) * far + 2
    assert np.abs(long[0, 7].numpy() - 255 * right.clip(0, 1)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(200, 10), (9, 300), (801, 31), (5000, 40)])
def test_the_crop_before_is_the_crop_after(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise("RGB", width, height)
    found = np.asarray(adm_center_crop(picture, 16), np.int16)
    monkeypatch.setattr("mezzotint.data.transforms.LONG", 10**9)
    assert np.abs(found - np.asarray(adm_center_crop(picture, 16), np.int16)).max() <= 1


def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = bytearray(png(8, 2, b"", width=20_000).getvalue())
    header[20:24] = struct.pack(">I", 20_000)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    (tmp_path / "0.png").write_bytes(header)  # 400 million pixels, and none of them in the file
    noise("RGB").save(tmp_path / "1.png")
    dataset = load("folder", path=tmp_path, size=8, labels=False)
    assert torch.equal(dataset[0][0], dataset[1][0])
    assert "unreadable image skipped" in caplog.text
    assert "400000000 pixels" in caplog.text
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="it has 37 × 23 pixels, more than 100"):
        read_picture(tmp_path / "1.png")


# ---------------------------------------------------------------------------------------- one door for all


def write_odd(folder: Path) -> None:
    """Pictures that say something of their pixels, as 0.png to 4.gif."""
    exif = Image.Exif()
    exif[0x0112] = 6
    folder.mkdir(parents=True, exist_ok=True)
    alpha = noise("RGB")
    alpha.putalpha(noise("L"))
    alpha.save(folder / "0.png")
    Image.fromarray(np.random.default_rng(1).integers(0, 65536, (20, 30), dtype=np.uint16)).save(folder / "1.png")
    noise("RGB").save(folder / "2.jpg", exif=exif)
    noise("CMYK").save(folder / "3.jpg")
    first = noise("RGB").convert("P")
    first.save(folder / "4.gif", save_all=True, append_images=[noise("L").convert("P")], transparency=3)


def test_all_loaders_decode_alike(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_odd(tmp_path / "files" / "a")
    files = sorted((tmp_path / "files" / "a").iterdir())
    lines = [f'{{"file_name": "{file.name}", "text": "x"}}\n' for file in files]
    (tmp_path / "files" / "a" / "metadata.jsonl").write_text("".join(lines))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for file in files:
            archive.add(file, file.name)
    options = {"size": 8, "channels": 3, "background": "#102030"}
    right = [picture_to_tensor(read_picture(file), (3, 8, 8), (16, 32, 48)) for file in files]
    listed = tmp_path / "files" / "a"
    sets = [
        load("folder", path=tmp_path / "files", **options),
        load("captions", path=listed, **options),
        load("huggingface", path=listed, labels=False, **options),
    ]
    for dataset in sets:
        assert isinstance(dataset, DecodedImages)
        found = [dataset[i][0] for i in range(len(dataset))]
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    evaluated = next(image_source(listed, **options).batches(8))[0]
    assert torch.equal(evaluated, torch.stack(right))
    stream = load("webdataset", path=tmp_path, shuffle_buffer=1, **options)
    rows = [row for _, row in zip(range(5), stream.read(0, 0), strict=False)]
    assert torch.equal(torch.stack([stream.decode(rows, i).image for i in range(5)]), torch.stack(right))
    assert torch.equal(right[2], torch.stack([picture_to_tensor(noise_jpeg(files[2]), (3, 8, 8))])[0])


def noise_jpeg(file: Path) -> Image.Image:
    """What is stored in `file`, turned by hand."""
    with Image.open(file) as picture:
        return Image.fromarray(np.rot90(np.asarray(picture), -1).copy())


def test_the_background_is_part_of_the_identity(tmp_path: Path) -> None:
    write_odd(tmp_path)

    def identity(background: str) -> str:
        return load("folder", path=tmp_path, size=8, labels=False, background=background).identity

    assert identity("white") == identity("#fff") == identity("rgb(255, 255, 255)")
    assert identity("white") != identity("black")
    assert image_source(tmp_path, size=8).identity != image_source(tmp_path, size=8, background="black").identity


def test_backgrounds_are_colours(tmp_path: Path) -> None:
    assert background_rgb("#0080ff") == (0, 128, 255)
    for word in ("whit", "", "#12345", "#00000080", "rgba(0, 0, 0, 0)"):
        with pytest.raises(MezzotintError, match=r"data.background is .*, which is no opaque colour; expected a name"):
            background_rgb(word)
    with pytest.raises(MezzotintError, match="no opaque colour"):
        load_recipe("digits", overrides=["data.background=whit"])
    with pytest.raises(MezzotintError, match=r"data.background means nothing for the data set 'digits'"):
        DataSettings(background="black").load()


# ------------------------------------------------------------------------------------------------ folders


def save(*files: Path) -> None:
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(file, "PNG")


LITTER = ["__MACOSX/a/._0.png", "._1.png", ".ipynb_checkpoints/0.png", "@eaDir/0.png/THUMB.jpg", ".DS_Store"]


def test_what_other_systems_leave_is_no_image_and_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / ".hidden" / "set"  # where the set itself lies is one's own affair
    save(*(root / kind / f"{n}.png" for kind in ("cat", "dog") for n in range(2)))
    for name in LITTER:
        for place in (root, root / "cat"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"\0\5\x16\7")
    (root / "Thumbs.db").write_bytes(b"")
    (root / "dog" / "notes.txt").write_text("")
    save(root / "loose.png")
    dataset = load("folder", path=root, size=8)
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset) == 4
    assert [dataset[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert caplog.messages == [
        f"image folder {root}, left aside: hidden or left by other systems: 11 (such as .DS_Store); images outside of "
        "the folders of classes: 1 (such as loose.png); files with other endings: 1 (such as dog/notes.txt)"
    ]
    load("folder", path=root, size=8)
    assert len(caplog.messages) == 1  # the same is not said twice
    assert len(load("folder", path=root, size=8, labels=False)) == 5
    assert image_source(root, size=8).count == 5


def test_splits_beside_litter(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "a" / "0.png", tmp_path / "__MACOSX" / "a" / "0.png")
    assert len(load("folder", "test", path=tmp_path, size=8)) == 1


def test_tar_members_and_shards_of_other_systems(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = encoded(Image.new("L", (8, 8), 50)).getvalue()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("./__MACOSX/0.png", "./._0.png", "./0.png", "@eaDir/0.png/THUMB.jpg", ".cache/2.png", "./1.png"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    stream = load("webdataset", path=tmp_path, size=8)
    assert sorted(row.key for row in stream.rows(0, 0)) == ["./0", "./1"]
    assert caplog.messages == [
        f"1 tar shards of {tmp_path}, left aside: hidden or left by other systems: 4 (such as ./__MACOSX/0.png)"
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.timeout(10)
def test_pipes_and_loops_of_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "a" / "0.png", tmp_path / "b" / "0.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "self").symlink_to(tmp_path)  # no class
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "circle").symlink_to(tmp_path / "b" / "circle")
    dataset = load("folder", path=tmp_path, size=8)
    assert dataset.class_names == ("a", "b")
    names = [os.path.relpath(dataset.pictures.name(i), tmp_path) for i in range(len(dataset))]
    assert names == ["a/0.png", "a/b/0.png", "b/0.png", "b/a/0.png"]  # each class with what it links to
    assert "links to a folder that they are in: 5 (such as a/b/a)" in caplog.text
    assert "neither files nor folders: 2 (such as a/pipe.png)" in caplog.text  # met by both ways
    assert image_source(tmp_path, size=8).count == 4


def test_folders_are_listed_in_the_order_of_torchvision(tmp_path: Path) -> None:
    names = ["b/1.png", "b/x/0.jpg", "b/x-y/0.png", "b/x/y/2.png", "b/10.png", "a/z.PNG", "a.b/0.png", "a/0/0.png"]
    save(*(tmp_path / name for name in names))
    dataset = load("folder", path=tmp_path, size=8)
    classes = {name: label for label, name in enumerate(dataset.class_names)}
    right = make_dataset(str(tmp_path), classes, (".png", ".jpg"))
    assert list(dataset.pictures.samples) == right
    assert dataset.class_names == ("a", "a.b", "b")


def test_a_caption_of_a_file_that_is_left_aside(tmp_path: Path) -> None:
    save(tmp_path / "0.png", tmp_path / "1.psd")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "x"}\n{"file_name": "1.psd", "text": "y"}\n'
    )
    with pytest.raises(MezzotintError, match=r"names 1 images that are not read \(hidden, or of other endings than"):
        load("captions", path=tmp_path, size=8)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may open everything")
def test_a_folder_that_cannot_be_opened(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png")
    (tmp_path / "a").chmod(0)
    with pytest.raises(MezzotintError, match="cannot be opened"):
        load("folder", path=tmp_path, size=8)
