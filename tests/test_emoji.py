"""Emoji drawn from colour fonts that the tests make: which code points, how they look, how they are split."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import BatchOrder, InMemoryImages, emoji_font, iterate_batches, load
from mezzotint.data.emoji_font import emoji
from mezzotint.errors import MezzotintError

fontTools = pytest.importorskip("fontTools")

from fontTools.fontBuilder import FontBuilder  # noqa: E402
from fontTools.pens.ttGlyphPen import TTGlyphPen  # noqa: E402
from fontTools.ttLib import newTable  # noqa: E402
from fontTools.ttLib.tables.BitmapGlyphMetrics import BigGlyphMetrics, SmallGlyphMetrics  # noqa: E402
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17  # noqa: E402
from fontTools.ttLib.tables.E_B_L_C_ import (  # noqa: E402
    BitmapSizeTable,
    SbitLineMetrics,
    Strike,
    eblc_index_sub_table_1,
)

COLOURS = {
    0x1F600: (255, 0, 0),  # grinning face
    0x1F601: (0, 128, 0),
    0x1F602: (0, 0, 255),
    0x1F603: (200, 100, 0),
    0x1F604: (120, 0, 120),
    0x1F605: (0, 0, 0),
    0x1F606: (90, 90, 90),
    0x1F607: (10, 200, 200),
    0x1F608: (250, 5, 100),
    0x2B55: (0, 77, 7),
}
LEFT_OUT = {
    0x23: (1, 1, 1),  # a key
    0x31: (2, 2, 2),
    0x20E3: (3, 3, 3),  # the keycap around it
    0x1F1E6: (4, 4, 4),  # half of a flag
    0x1F3FB: (5, 5, 5),  # a tone of skin
    0x1F9B0: (6, 6, 6),  # red hair
    0xFE4E5: (7, 7, 7),  # private use: no name
    0x1F609: (255, 0, 0),  # looks like U+1F600
    0x1F60A: (250, 250, 250),  # as good as white
}
LINE_METRICS = (
    "ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset", "minOriginSB",
    "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2",
)  # fmt: skip
CAPTIONS = [unicodedata.name(chr(point)).lower() for point in sorted(COLOURS)]


def builder(em: int, points: Iterable[int] = COLOURS | LEFT_OUT) -> tuple[FontBuilder, dict[int, str]]:
    """A font with a name for every code point, and no pictures yet."""
    names = {point: f"u{point:X}" for point in points}
    made = FontBuilder(em, isTTF=True)
    made.setupGlyphOrder([".notdef", *names.values()])
    made.setupCharacterMap(names)
    made.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    return made, names


def finish(made: FontBuilder, em: int, path: Path) -> Path:
    made.setupHorizontalMetrics(dict.fromkeys(made.font.getGlyphOrder(), (em, 0)))
    made.setupHorizontalHeader(ascent=em, descent=0)
    made.setupOS2()
    made.setupPost()
    made.save(path)
    return path


def layered_font(path: Path) -> Path:
    """COLR version 0: every picture is one square layer in one colour, 60 % of the em."""
    em = 100
    made, names = builder(em)
    pen = TTGlyphPen(None)
    corners = [(20, 20), (20, 80), (80, 80), (80, 20)]
    pen.moveTo(corners[0])
    for corner in corners[1:]:
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    made.setupGlyf(dict.fromkeys(made.font.getGlyphOrder(), square))
    colours = COLOURS | LEFT_OUT
    made.setupCPAL([[(r / 255, g / 255, b / 255, 1.0) for r, g, b in colours.values()]])
    made.setupCOLR({names[point]: [(names[0x1F600], i)] for i, point in enumerate(colours)}, version=0)
    return finish(made, em, path)


def bitmap_font(path: Path, em: int = 40, colours: Mapping[int, tuple[int, int, int]] = COLOURS | LEFT_OUT) -> Path:
    """CBDT, as Noto's: a PNG of 30 × 40 pixels for every picture, a transparent column left and right in it."""
    made, names = builder(em, colours)
    made.setupGlyf({name: TTGlyphPen(None).glyph() for name in made.font.getGlyphOrder()})
    width, height = 30, em
    bitmaps = {}
    for point, colour in colours.items():
        picture = np.zeros((height, width, 4), np.uint8)
        picture[:, 1:-1] = (*colour, 255)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        glyph = cbdt_bitmap_format_17(b"", made.font)
        glyph.metrics = SmallGlyphMetrics()
        glyph.metrics.height, glyph.metrics.width = height, width
        glyph.metrics.BearingX, glyph.metrics.BearingY, glyph.metrics.Advance = 0, height, width
        glyph.imageData = buffer.getvalue()
        bitmaps[names[point]] = glyph
    made.font["CBDT"] = data = newTable("CBDT")
    data.version, data.strikeData = 3.0, [bitmaps]
    strike = Strike()
    table = strike.bitmapSizeTable = BitmapSizeTable()
    for side in ("hori", "vert"):
        line = SbitLineMetrics()
        vars(line).update(dict.fromkeys(LINE_METRICS, 0) | {"ascender": em, "widthMax": width})
        setattr(table, side, line)
    table.ppemX = table.ppemY = em
    table.colorRef, table.bitDepth, table.flags = 0, 32, 1
    index = eblc_index_sub_table_1(b"", made.font)
    index.indexFormat, index.imageFormat, index.names = 1, 17, list(bitmaps)
    index.metrics = BigGlyphMetrics()
    strike.indexSubTables = [index]
    made.font["CBLC"] = place = newTable("CBLC")
    place.version, place.strikes = 3.0, [strike]
    return finish(made, em, path)


@pytest.fixture(scope="module", params=["bitmaps", "layers"])
def font(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fonts") / "NotoColorEmoji.ttf"
    return bitmap_font(path) if request.param == "bitmaps" else layered_font(path)


def test_every_emoji_has_its_name_and_its_colour(font: Path) -> None:
    dataset = load("emoji", path=font, size=20, test_fraction=0)
    assert isinstance(dataset, InMemoryImages)
    assert list(dataset.texts or ()) == CAPTIONS
    assert "grinning face" in CAPTIONS
    assert dataset.image_shape == (3, 20, 20)
    assert dataset.class_names == ()
    assert dataset.identity.startswith("emoji-3x20x20-train-")
    middle = dataset.images[:, :, 10, 10].tolist()
    assert middle == [list(COLOURS[point]) for point in sorted(COLOURS)]


def test_bitmaps_keep_their_shape_in_the_middle_of_white(tmp_path: Path) -> None:
    """28 × 40 opaque pixels, in a square of 40: drawn at the size of the bitmaps they are not resampled at all."""
    dataset = emoji(bitmap_font(tmp_path / "f.ttf"), size=40, test_fraction=0)
    expected = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    expected[:, :, 6:34] = torch.tensor(COLOURS[min(COLOURS)], dtype=torch.uint8)[:, None, None]
    assert torch.equal(dataset.images[0], expected)


def test_held_out_captions_are_disjoint_and_always_the_same(font: Path) -> None:
    train, test = emoji(font, "train", test_fraction=0.3), emoji(font, "test", test_fraction=0.3)
    assert (len(train), len(test)) == (7, 3)
    assert sorted([*(train.texts or ()), *(test.texts or ())]) == sorted(CAPTIONS)
    assert emoji(font, "test", test_fraction=0.3).identity == test.identity != train.identity
    assert (len(emoji(font)), len(emoji(font, "test"))) == (9, 1)


def test_batches_have_captions(font: Path) -> None:
    dataset = emoji(font, size=16, test_fraction=0)
    order = BatchOrder.over(dataset, 4, seed=2)
    batch = next(iterate_batches(dataset, order, start_step=0, stop_step=1, captions=True))
    assert batch.labels is None
    assert batch.captions == tuple(CAPTIONS[i] for i in batch.indices.tolist())


def test_the_system_font_is_found(font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_font, "FONT_FOLDERS", (str(tmp_path / "none"), str(font.parent)))
    assert len(emoji(test_fraction=0)) == len(COLOURS)
    monkeypatch.setattr(emoji_font, "FONT_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(MezzotintError, match=r"apt install fonts-noto-color-emoji\) or set data.path"):
        emoji()


def test_mistakes_are_explained(font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.ttf").write_text("no font")
    plain, _ = builder(100)
    plain.setupGlyf({name: TTGlyphPen(None).glyph() for name in plain.font.getGlyphOrder()})
    finish(plain, 100, tmp_path / "plain.ttf")
    cases = [
        ({"path": font, "size": 8}, r"16 to 128 pixels, not 8; set data.size"),
        ({"path": font, "split": "test", "test_fraction": 0.0}, r"no test split of their own; set data.test_fraction"),
        ({"path": tmp_path / "text.ttf"}, r"text.ttf cannot be read .* set data.path to a font file"),
        ({"path": tmp_path / "nothing.ttf"}, r"nothing.ttf cannot be read"),
        ({"path": tmp_path / "plain.ttf"}, r"has no colours; set data.path to a colour font"),
    ]
    for options, sentence in cases:
        with pytest.raises(MezzotintError, match=sentence):
            emoji(**options)
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    with pytest.raises(MezzotintError, match=r"pip install 'mezzotint\[emoji\]'"):
        emoji(font)
