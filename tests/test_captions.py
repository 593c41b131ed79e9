"""Captions: folders with metadata.jsonl, tar shards, Hugging Face columns, and how they reach a batch."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import (
    Batch,
    BatchOrder,
    ImageStream,
    InMemoryImages,
    captions_of,
    check_captions,
    digits,
    load,
    tar_shards,
)
from mezzotint.data import iterate_batches as iterate
from mezzotint.data.base import DecodedImages
from mezzotint.data.tar_shards import TarStream, expand_braces
from mezzotint.errors import MezzotintError

COUNT = 12


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(i: int) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(i))).permute(2, 0, 1)


def write_captioned(folder: Path, numbers: range, entries: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        picture(i).save(folder / f"{i:02}.png")
    if entries is None:
        entries = [{"file_name": f"{i:02}.png", "text": f"picture {i}"} for i in numbers]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return folder


def write_shard(path: Path, examples: list[dict[str, bytes]], first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, example in enumerate(examples, first):
            for extension, data in example.items():
                info = tarfile.TarInfo(f"data/{i:04}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def captioned_example(i: int) -> dict[str, bytes]:
    return {"png": png(i), "txt": f"picture {i}\n".encode()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        examples = [captioned_example(i) for i in range(4 * shard, 4 * shard + 4)]
        write_shard(tmp_path / "shards" / f"{shard:03}.tar", examples, 4 * shard)
    return tmp_path / "shards"


def batches(dataset: object, steps: range = range(5), seed: int = 1, **options: object) -> list[Batch]:
    order = BatchOrder.over(dataset, 4, seed)
    return list(iterate(dataset, order, start_step=steps.start, stop_step=steps.stop, captions=True, **options))


def number_of(image: torch.Tensor) -> int:
    """Which `picture` a float image is."""
    levels = ((image + 1) * 127.5).round().to(torch.uint8)
    return next(i for i in range(COUNT) if torch.equal(levels, pixels(i)))


# --------------------------------------------------------------------------------------------- batches


@pytest.fixture(params=["memory", "folder", "shards", "hub", "hub stream"])
def captioned(request: pytest.FixtureRequest, tmp_path: Path, shards: Path) -> object:
    """`COUNT` pictures; number i has three captions, "i a" to "i c", except in the shards and in the folder."""
    several = [[f"picture {i}", f"{i} b", f"{i} c"] for i in range(COUNT)]
    if request.param == "memory":
        return InMemoryImages(torch.stack([pixels(i) for i in range(COUNT)]), None, (), "memory", several)
    if request.param == "folder":
        entries = [{"file_name": f"{i:02}.png", "captions": texts} for i, texts in enumerate(several)]
        return load("captions", path=write_captioned(tmp_path / "folder", range(COUNT), entries), size=8)
    if request.param == "shards":
        return load("webdataset", path=shards, size=8, shuffle_buffer=5)
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(i) for i in range(COUNT)], "notes": several}
    features = datasets.Features({"image": datasets.Image(), "notes": datasets.Sequence(datasets.Value("string"))})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "hub")
    stream = {"streaming": True, "shuffle_buffer": 5} if request.param == "hub stream" else {}
    return load("huggingface", path=tmp_path / "hub", size=8, caption_column="notes", **stream)


def test_captions_belong_to_their_images(captioned: object) -> None:
    for batch in batches(captioned):
        assert batch.labels is None
        assert batch.captions is not None
        for image, caption in zip(batch.images, batch.captions, strict=True):
            assert caption.removeprefix("picture ").split()[0] == str(number_of(image))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_runs_and_all_processes_see_the_same_captions(captioned: object, workers: int) -> None:
    whole = batches(captioned)
    resumed = batches(captioned, range(2, 5), workers=workers)
    assert [batch.captions for batch in resumed] == [batch.captions for batch in whole[2:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, whole[2:], strict=True))
    ranks = [batches(captioned, range(2, 5), rank=rank, world_size=2) for rank in range(2)]
    assert [a.captions + b.captions for a, b in zip(*ranks, strict=True)] == [batch.captions for batch in whole[2:]]


def test_every_caption_has_its_turn() -> None:
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    dataset = InMemoryImages(images, None, (), "two", [["a", "b", "c"], "d"])
    seen = Counter(c for batch in batches(dataset, range(600)) for c in batch.captions or ())
    assert seen["d"] == 1200
    assert all(abs(seen[c] - 400) < 4 * (1200 * 2 / 9) ** 0.5 for c in "abc")  # four standard deviations
    one, other = ([batch.captions for batch in batches(dataset, seed=seed)] for seed in (1, 2))
    assert one != other


def test_class_names_stand_in_for_captions() -> None:
    dataset = digits()
    for batch in batches(dataset):
        assert batch.captions == tuple(str(label) for label in batch.labels.tolist())
    assert captions_of(dataset, [5, 7], dataset.labels[[5, 7]]) == [(str(int(dataset.labels[i])),) for i in (5, 7)]


def test_class_names_stand_in_for_captions_of_a_stream(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"png": png(i), "cls": str(i % 2).encode()} for i in range(COUNT)])
    (tmp_path / "classnames.txt").write_text("even\nodd\n")
    stream = load("webdataset", path=tmp_path, size=8)
    assert stream.class_names == ("even", "odd")
    for batch in batches(stream):
        assert batch.captions == tuple(("even", "odd")[number_of(image) % 2] for image in batch.images)
        assert batch.labels.tolist() == [number_of(image) % 2 for image in batch.images]


def test_captions_come_only_when_asked_for(captioned: object) -> None:
    order = BatchOrder.over(captioned, 4)
    assert next(iterate(captioned, order, start_step=0, stop_step=1)).captions is None


def test_neither_captions_nor_classes() -> None:
    dataset = digits(labels=False)
    with pytest.raises(MezzotintError, match=r"neither captions nor classes, .* e.g. data=captions:PATH"):
        batches(dataset)
    with pytest.raises(MezzotintError, match="neither captions nor classes"):
        check_captions(dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_caption_of_an_unreadable_image_is_that_of_its_stand_in(tmp_path: Path, workers: int) -> None:
    folder = write_captioned(tmp_path, range(COUNT))
    for i in (3, 4, 11):
        (folder / f"{i:02}.png").write_bytes(b"broken")
    dataset = load("captions", path=folder, size=8)
    for batch in batches(dataset, range(6), workers=workers):
        expected = [{3: 5, 4: 5, 11: 0}.get(i, i) for i in batch.indices.tolist()]
        assert [number_of(image) for image in batch.images] == expected
        assert batch.captions == tuple(f"picture {i}" for i in expected)


# ---------------------------------------------------------------------------------------------- folder


def test_folder_captions_in_all_their_forms(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    picture(3).save(tmp_path / "deep" / "03.png")
    entries = [
        {"file_name": "00.png", "text": "one, with \u2028 a line separator", "other": 1},
        {"file_name": "01.png", "caption": "two"},
        {"file_name": "./02.png", "captions": ["three", "drei"]},
        {"file_name": "deep/03.png", "text": "four"},
        {"file_name": "00.png", "text": "eins"},
    ]
    dataset = load("captions", path=write_captioned(tmp_path, range(3), entries), size=8)
    assert isinstance(dataset, DecodedImages)
    text = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text("\n" + text.replace("\\u2028", "\u2028"), encoding="utf-8")
    again = load("captions", path=tmp_path, size=8)
    expected = [("one, with \u2028 a line separator", "eins"), ("two",), ("three", "drei"), ("four",)]
    assert dataset.captions(range(4)) == again.captions(range(4)) == expected
    assert dataset.identity == again.identity
    assert dataset.class_names == ()
    assert torch.equal(dataset[3][0], pixels(3))


def test_folder_identity_depends_on_the_captions(tmp_path: Path) -> None:
    before = load("captions", path=write_captioned(tmp_path, range(2)), size=8).identity
    entries = [{"file_name": f"{i:02}.png", "text": f"another {i}"} for i in range(2)]
    assert load("captions", path=write_captioned(tmp_path, range(2), entries), size=8).identity != before


@pytest.mark.parametrize("shared", [False, True])
def test_folder_splits(tmp_path: Path, shared: bool) -> None:
    for split, numbers in (("train", range(4)), ("validation", range(4, 6))):
        write_captioned(tmp_path / split, numbers)
        if shared:
            lines = (tmp_path / split / "metadata.jsonl").read_text().replace('e": "', f'e": "{split}/')
            (tmp_path / split / "metadata.jsonl").unlink()
            with open(tmp_path / "metadata.jsonl", "a") as file:
                file.write(lines)
    train, test = (load("captions", split, path=tmp_path, size=8) for split in ("train", "test"))
    assert train.captions(range(4)) == [(f"picture {i}",) for i in range(4)]
    assert test.captions([1]) == [("picture 5",)]
    with pytest.raises(MezzotintError, match="a test split of its own, 'validation'"):
        load("captions", path=tmp_path, size=8, test_fraction=0.1)


def test_folder_holds_images_out_with_their_captions(tmp_path: Path) -> None:
    write_captioned(tmp_path, range(10))
    parts = [load("captions", split, path=tmp_path, size=8, test_fraction=0.3) for split in ("train", "test")]
    assert [len(part) for part in parts] == [7, 3]
    for part in parts:
        for i in range(len(part)):
            assert part.captions([i]) == [(f"picture {number_of(part[i][0] / 127.5 - 1)}",)]


@pytest.mark.parametrize(
    ("line", "options", "sentence"),
    [
        ('{"file_name": "00.png", "text"', {}, r"line 2 of .*metadata.jsonl is not JSON .*; expected one object per"),
        ('["00.png"]', {}, "line 2 of .* names no file"),
        ('{"file": "00.png", "text": "x"}', {}, "line 2 of .* names no file"),
        ('{"file_name": "01.png", "title": "x"}', {}, "line 2 of .* no caption; .* under the key text or caption or"),
        ('{"file_name": "01.png", "text": []}', {}, "line 2 of .* no caption"),
        ('{"file_name": "01.png", "text": 5}', {}, "line 2 of .* no caption"),
        ('{"file_name": "01.png", "text": null}', {}, "line 2 of .* no caption"),
        ('{"file_name": "01.png", "text": [null]}', {}, "line 2 of .* no caption"),
        ('{"file_name": "01.png", "text": "x"},', {}, "line 2 of .* is not JSON"),
        ('{"file_name": null, "text": "x"}', {}, "line 2 of .* names no file"),
        ("[" * 100_000, {}, r"line 2 of .* is not JSON \(it is nested too deeply\)"),
        ('{"file_name": "/nowhere/01.png", "text": "x"}', {}, "names 1 images that are not there: .*nowhere/01.png"),
        ('{"file_name": "01.png", "text": "x"}', {"caption_column": "title"}, "line 1 of .* no caption; .* key title"),
        ('{"file_name": "77.png", "text": "x"}', {}, "names 1 images that are not there: 77.png; add the files"),
        (f'{{"file_name": "{"7" * 5000}.png", "text": "x"}}', {}, "names 1 images that are not there: 777"),
        ("", {}, "1 images have no caption in .*: 01.png; add a line for each"),
    ],
)
def test_folder_explains_a_bad_file(tmp_path: Path, line: str, options: dict, sentence: str) -> None:
    write_captioned(tmp_path, range(2))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "zero"}\n' + line)
    with pytest.raises(MezzotintError, match=sentence):
        load("captions", path=tmp_path, size=8, **options)


def test_folder_captions_with_nulls_and_other_paths(tmp_path: Path) -> None:
    folder = write_captioned(tmp_path, range(5), [])
    picture(5).save(folder / unicodedata.normalize("NFD", "é.png"))  # as macOS writes it
    (folder / "deep").mkdir()
    (folder / "04.png").rename(folder / "deep" / "04.png")
    entries = [
        {"file_name": "00.png", "text": None, "caption": "zero"},
        {"file_name": str(folder / "01.png"), "text": ["one", None, "uno"]},
        {"file_name": ".\\02.png", "text": [], "captions": ["two"]},
        {"file_name": "03.png", "text": [None], "caption": "three"},
        {"file_name": "deep\\04.png", "text": ""},
        {"file_name": "é.png", "text": "five"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8-sig")
    dataset = load("captions", path=folder, size=8)
    expected = [("zero",), ("one", "uno"), ("two",), ("three",), ("five",), ("",)]  # a folder's own files come first
    assert dataset.captions(range(6)) == expected


def test_folder_captions_in_tables(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    names = ["00.png", "01.png"]
    (write_captioned(tmp_path / "csv", range(2)) / "metadata.jsonl").unlink()
    (tmp_path / "csv" / "metadata.csv").write_text(
        'file_name,width,text\r\n01.png,8,"one, ""uno"""\r\n00.png,8,zero\r\n', encoding="utf-8-sig"
    )
    (write_captioned(tmp_path / "parquet", range(2)) / "metadata.jsonl").unlink()
    table = pa.table({"file_name": names, "text": [None, "ein"], "captions": [["zero"], ["one", None]]})
    parquet.write_table(table, tmp_path / "parquet" / "metadata.parquet")
    assert load("captions", path=tmp_path / "csv", size=8).captions(range(2)) == [("zero",), ('one, "uno"',)]
    assert load("captions", path=tmp_path / "parquet", size=8).captions(range(2)) == [("zero",), ("ein",)]
    captions = load("captions", path=tmp_path / "parquet", size=8, caption_column="captions").captions(range(2))
    assert captions == [("zero",), ("one",)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "metadata.csv",
            b"file_name,text\n00.png,a cat, on a sofa\n",
            "line 2 of .* more fields than the first line; put",
        ),
        ("metadata.csv", b"file_name;text\n00.png;a cat\n", "line 2 of .* names no file"),
        ("metadata.csv", b"file_name,text\n00.png,\n", "line 2 of .* no caption; expected a string"),
        (
            "metadata.csv",
            b'file_name,text\n00.png,"' + b"x" * 200_000,
            r"metadata.csv is not CSV after line 1 \(field larger",
        ),
        ("metadata.csv", "file_name,text\n00.png,x\n".encode("utf-16"), "is not a text in UTF-8 .*; write it again as"),
        ("metadata.parquet", b"PAR1 no", "metadata.parquet cannot be read .*; write it again as parquet"),
    ],
)
def test_folder_explains_a_bad_table(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    pytest.importorskip("pyarrow")
    (write_captioned(tmp_path, range(1)) / "metadata.jsonl").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MezzotintError, match=sentence):
        load("captions", path=tmp_path, size=8)


def test_folder_captions_in_two_files_or_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (write_captioned(tmp_path, range(1)) / "metadata.parquet").write_bytes(b"")
    with pytest.raises(MezzotintError, match=r"several files of captions, metadata.jsonl, metadata.parquet; keep one"):
        load("captions", path=tmp_path, size=8)
    (tmp_path / "metadata.jsonl").unlink()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MezzotintError, match=r"pip install 'mezzotint\[hub\]', or write metadata.jsonl"):
        load("captions", path=tmp_path, size=8)


def test_folder_without_a_file(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(MezzotintError, match=r"no file metadata.jsonl; write one .* or use data=folder:PATH"):
        load("captions", path=tmp_path, size=8)


# ------------------------------------------------------------------------------------------ tar shards


def take(stream: ImageStream, start: int, count: int, seed: int = 3) -> list:
    return list(islice(stream.read(start, seed), count))


@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 40])
def test_shards_can_be_entered_anywhere(shards: Path, start: int) -> None:
    stream = load("webdataset", path=shards, size=8, shuffle_buffer=5)
    assert take(stream, start, 15) == take(stream, 0, start + 15)[start:]


def test_the_seed_of_the_order_is_that_of_a_stream(shards: Path) -> None:
    stream = load("webdataset", path=shards, size=8)
    seen = [[batch.captions for batch in batches(stream, range(3), seed)] for seed in (1, 2, 1)]
    assert seen[0] == seen[2] != seen[1]


def test_shards_are_shuffled_anew_every_epoch(shards: Path) -> None:
    stream = load("webdataset", path=shards, size=8, shuffle_buffer=5)
    keys = [example.row.key for example in take(stream, 0, 24)]
    everything = sorted(f"data/{i:04}" for i in range(COUNT))
    assert sorted(keys[:12]) == sorted(keys[12:]) == everything
    assert keys[:12] != keys[12:]
    assert keys[:12] != [example.row.key for example in take(stream, 0, 12, seed=4)]
    unshuffled = load("webdataset", path=shards, size=8, shuffle_buffer=1)
    keys = [example.row.key for example in take(unshuffled, 0, 12)]
    assert {tuple(keys[i : i + 4]) for i in (0, 4, 8)} == {tuple(everything[i : i + 4]) for i in (0, 4, 8)}


def test_shards_by_pattern_split_and_fraction(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    def keys(**options: object) -> set[str]:
        stream = load("webdataset", size=8, **options)
        assert isinstance(stream, TarStream)
        return {shard.name for shard in stream.shards}

    assert keys(path=shards) == keys(path=f"{shards}/{{000..002}}.tar") == keys(path=f"{shards}/0*.tar")
    assert keys(path=f"{shards}/{{000,002}}.tar") == {"000.tar", "002.tar"}
    train, test = (keys(path=shards, split=split, test_fraction=0.3) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 1)
    assert train | test == keys(path=shards)
    (shards / "test").mkdir()
    assert keys(path=shards) == {"000.tar", "001.tar", "002.tar"}  # that folder is empty
    (shards / "train").mkdir()
    (shards / "000.tar").rename(shards / "test" / "000.tar")
    (shards / "001.tar").rename(shards / "train" / "001.tar")
    assert keys(path=shards, split="test") == {"000.tar"}
    assert keys(path=shards) == {"001.tar"}
    assert [message.split(" has ")[1] for message in caplog.messages] == [
        "splits, and 1 tar shards beside them are left out: 002.tar"
    ] * 2


@pytest.mark.parametrize("name", ["[raw]", "a*?", "{x,y}"])
def test_the_name_of_a_folder_is_no_pattern(shards: Path, name: str) -> None:
    folder = shards.rename(shards.parent / name)
    patterns = [folder, folder / "000.tar", folder / "0*.tar", folder / "{000..002}.tar"]
    for pattern in patterns[: 2 if "{" in name else 4]:  # braces are patterns wherever a pattern is meant
        stream = load("webdataset", path=pattern, size=8)
        assert isinstance(stream, TarStream)
        assert len(stream.shards) == (1 if pattern.name == "000.tar" else 3)


def test_shards_whose_names_tell_the_split(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    def keys(split: str = "train", **options: object) -> list[str]:
        stream = load("webdataset", split, path=shards, size=8, **options)
        assert isinstance(stream, TarStream)
        return [shard.name for shard in stream.shards]

    for old, new in (("000", "set-train-000"), ("001", "set-validation-000"), ("002", "set-train-001")):
        (shards / f"{old}.tar").rename(shards / f"{new}.tar")
    assert keys() == ["set-train-000.tar", "set-train-001.tar"]
    assert keys("test") == ["set-validation-000.tar"]
    with pytest.raises(MezzotintError, match="a test split of its own, 'validation'"):
        keys(test_fraction=0.5)
    assert not caplog.messages
    (shards / "set-train-001.tar").rename(shards / "other.tar")
    assert keys() == ["other.tar", "set-train-000.tar", "set-validation-000.tar"]
    assert "all 3 tar shards are taken for training, among them set-validation-000.tar" in caplog.text


def test_braces_are_those_of_shells() -> None:
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(
    "pattern", ["{0..99999999}.tar", "{0..999}{0..9999}.tar", "{a,b}" * 40, "x{0..%s}" % ("9" * 18)]
)
def test_braces_of_too_many_shards(tmp_path: Path, pattern: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(MezzotintError, match="names more than 1,000,000 tar shards; mend the numbers in braces"):
        load("webdataset", path=tmp_path / pattern, size=8)
    assert time.perf_counter() - begun < 1
    assert expand_braces("{0..%s}" % ("9" * 5000)) == ["{0..%s}" % ("9" * 5000)]  # no number
    assert len(expand_braces("{1..3}" * 3 + "{0..0}" * 2000)) == 27


def test_shards_with_json_captions(tmp_path: Path) -> None:
    entries = [{"caption": ["one", "uno"], "title": "t0"}, {"caption": "two", "title": "t1"}]
    examples = [
        {"mask.png": png(9), "png": png(i), "json": json.dumps(entry).encode()} for i, entry in enumerate(entries)
    ]
    write_shard(tmp_path / "0.tar", examples)
    for options, expected in (({}, {("one", "uno"), ("two",)}), ({"caption_column": "title"}, {("t0",), ("t1",)})):
        stream = load("webdataset", path=tmp_path, size=8, **options)
        window = take(stream, 0, 2)
        assert {stream.decode(window, i).captions for i in range(2)} == expected
        assert {number_of(stream.decode(window, i).image / 127.5 - 1) for i in range(2)} == {0, 1}
    with pytest.raises(MezzotintError, match="no caption under the key 'nope'"):
        load("webdataset", path=tmp_path, size=8, caption_column="nope")


def test_broken_examples_of_shards_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples = [captioned_example(i) for i in range(6)]
    examples[1]["png"] = b"broken"
    del examples[3]["txt"]
    del examples[5]["png"]
    write_shard(tmp_path / "0.tar", examples)
    stream = load("webdataset", path=tmp_path, size=8, shuffle_buffer=1, max_unreadable=3)
    window = take(stream, 0, 6)
    decoded = [stream.decode(window, i) for i in range(6)]
    by_key = {example.row.key: got for example, got in zip(window, decoded, strict=True)}
    assert all(got.captions[0] in {"picture 0", "picture 2", "picture 4"} for got in decoded)
    assert by_key["data/0001"].captions == ("picture 2",)
    assert len(caplog.messages) == 3
    assert all("in " + str(tmp_path / "0.tar") in message for message in caplog.messages)
    few = load("webdataset", path=tmp_path, size=8, max_unreadable=2)
    with pytest.raises(MezzotintError, match="3 images cannot be read, and at most 2 may be skipped"):
        [few.decode(window, i) for i in range(6)]


def test_a_broken_first_caption_of_shards_says_nothing_about_the_others(tmp_path: Path) -> None:
    broken = [b'{"caption": "zero",}', b'{"caption": null}', b'{"caption": [null]}', b"[" * 100_000, b"\xff"]
    examples = [{"png": png(i), "json": text} for i, text in enumerate(broken)]
    examples += [{"png": png(i), "json": b'{"caption": ["x", null]}'} for i in range(5, 8)]
    write_shard(tmp_path / "0.tar", examples)
    stream = load("webdataset", path=tmp_path, size=8, shuffle_buffer=1, max_unreadable=5)
    window = take(stream, 0, 8)
    assert [stream.decode(window, i).captions for i in range(8)] == [("x",)] * 8
    write_shard(tmp_path / "0.tar", examples[:1])
    with pytest.raises(MezzotintError, match=r"the caption of data/0000 .* cannot be read \(.*\); mend it"):
        load("webdataset", path=tmp_path, size=8)


def test_byte_order_marks_in_shards(tmp_path: Path) -> None:
    files = {"txt": "zero", "json": '{"text": "zero"}', "cls": "1"}
    for kind, text in files.items():
        write_shard(tmp_path / kind / "0.tar", [{"png": png(0), kind: text.encode("utf-8-sig")}])
    (tmp_path / "cls" / "classnames.txt").write_text("tench\ngoldfish\n", encoding="utf-8-sig")
    for kind in files:
        stream = load("webdataset", path=tmp_path / kind, size=8)
        example = stream.decode(take(stream, 0, 1), 0)
        assert (example.captions, example.label) == (((), 1) if kind == "cls" else (("zero",), -1))
    assert stream.class_names == ("tench", "goldfish")
    (tmp_path / "cls" / "classnames.txt").write_text("tench\ngoldfish\n", encoding="utf-16")
    with pytest.raises(MezzotintError, match=r"classnames.txt is not a text in UTF-8 .*; write it again"):
        load("webdataset", path=tmp_path / "cls", size=8)


def test_shards_that_are_no_files(shards: Path) -> None:
    (shards / "._000.tar").write_bytes(b"Mac OS X")  # of no concern
    assert len(load("webdataset", path=shards, size=8).shards) == 3  # type: ignore[union-attr]
    (shards / "a.tar").symlink_to(shards / "a.tar")
    (shards / "b.tar").symlink_to(shards / "nowhere")
    (shards / "c.tar").mkdir()
    os.mkfifo(shards / "d.tar")  # a reader would wait for ever
    for path in (shards, shards / "*.tar"):
        with pytest.raises(
            MezzotintError, match=r"4 tar shards of .* no files, or links to nowhere: a.tar, b.tar, c.tar"
        ):
            load("webdataset", path=path, size=8)


def test_shards_explain_mistakes(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "blank" / "0.tar", [])
    write_shard(tmp_path / "cls" / "0.tar", [{"png": png(0), "cls": b"0"}])
    cases = [
        ({"path": tmp_path / "empty"}, "has no tar shards; set data.path to a folder of .tar files"),
        ({"path": tmp_path / "blank"}, "hold no examples"),
        ({"path": f"{shards}/{{000..004}}.tar"}, r"2 of the 5 tar shards .* are missing, the first one .*003.tar"),
        ({"path": f"{shards}/9*.tar"}, "has no tar shards"),
        ({"path": tmp_path / "cls"}, "has labels, but there is no file .*classnames.txt"),
        ({"path": tmp_path / "cls", "labels": False, "test_fraction": 0.5}, "holds whole shards out"),
        ({"path": shards, "split": "test"}, "no test split, only train; set data.test_fraction"),
        ({"path": shards, "shuffle_buffer": 0}, "shuffle_buffer is 0; expected at least 1"),
    ]
    for options, sentence in cases:
        with pytest.raises(MezzotintError, match=sentence):
            load("webdataset", size=8, **options)
    (tmp_path / "cls" / "classnames.txt").write_text("zero\n")
    write_shard(tmp_path / "cls" / "0.tar", [{"png": png(0), "cls": b"1"}])
    stream = load("webdataset", path=tmp_path / "cls", size=8)
    with pytest.raises(MezzotintError, match=r"label 1, expected 0 to 0; mend classnames.txt"):
        stream.decode(take(stream, 0, 1), 0)


@pytest.mark.parametrize("keep", [0, 700, 1024, 3000, 3072])
def test_shards_that_break_off_are_named(shards: Path, keep: int) -> None:
    data = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(data[:keep])
    stream = load("webdataset", path=shards, size=8)
    with pytest.raises(MezzotintError, match=r"001.tar cannot be read .*; expected a whole, uncompressed tar file"):
        take(stream, 0, 12)


def tar_header(name: str, kind: bytes, size: bytes) -> bytes:
    """A header with a size that `tarfile` would not write."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def base256(size: int) -> bytes:
    return bytes([0x80 if size >= 0 else 0xFF]) + (size % 256**11).to_bytes(11, "big")


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L"])  # a file; the names or attributes of the next one
@pytest.mark.parametrize("size", [2**33, 10**11, 2**62, 2**80, -1, -512, -513, -1024])
def test_shards_with_absurd_sizes(tmp_path: Path, kind: bytes, size: int) -> None:
    (tmp_path / "0.tar").write_bytes(tar_header("a.png", kind, base256(size)) + bytes(1024))
    begun = time.perf_counter()
    with pytest.raises(MezzotintError, match=r"0.tar cannot be read \(.+\); expected a whole, uncompressed tar file"):
        load("webdataset", path=tmp_path, size=8)
    assert time.perf_counter() - begun < 1


def test_shards_with_headers_about_headers(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_header("a", b"x", b"%011o\0" % 0) * 3000 + bytes(1024))
    with pytest.raises(MezzotintError, match=r"0.tar cannot be read \(.*recursion"):
        load("webdataset", path=tmp_path, size=8)


def test_a_long_file_in_a_shard_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [captioned_example(i) for i in range(3)]
    examples[1]["txt"] = b"x" * 5000
    write_shard(tmp_path / "0.tar", examples)
    monkeypatch.setattr(tar_shards, "MAX_TEXT", 4999)
    stream = load("webdataset", path=tmp_path, size=8, shuffle_buffer=1)
    assert stream.decode(take(stream, 0, 3), 1).captions == ("picture 2",)
    for label in (b"1000000000", b"-1", b"9" * 4999):
        write_shard(tmp_path / "cls" / "0.tar", [{"png": png(0), "cls": label}])
        (tmp_path / "cls" / "classnames.txt").write_text("one\n")
        stream = load("webdataset", path=tmp_path / "cls", size=8)
        with pytest.raises(MezzotintError, match=r"expected 0 to 0; mend|not one image could be read"):
            stream.decode(take(stream, 0, 1), 0)


# ---------------------------------------------------------------------------------------- Hugging Face


def test_hugging_face_captions_and_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(i) for i in range(4)], "kind": [0, 1, 0, 1], "text": [f"picture {i}" for i in range(4)]}
    rows["text"][2] = None
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"]), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    dataset = load("huggingface", path=tmp_path, size=8, caption_column="text")
    assert dataset.class_names == ("x", "y")
    assert torch.equal(dataset[2][0], pixels(3))  # without a caption, it counts as unreadable
    assert dataset.captions([1, 2, 3]) == [("picture 1",), ("picture 3",), ("picture 3",)]
    assert load("huggingface", path=tmp_path, size=8).identity != dataset.identity
    for wanted, sentence in (("kind", "not captions; expected strings"), ("txt", "no column 'txt'; closest: text")):
        with pytest.raises(MezzotintError, match=sentence):
            load("huggingface", path=tmp_path, size=8, caption_column=wanted)


def hub_captions(folder: Path, texts: list, several: bool) -> None:
    datasets = pytest.importorskip("datasets")
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "text": datasets.Sequence(text) if several else text}
    rows = {"image": [picture(i) for i in range(len(texts))], "text": texts}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "texts",
    [["zero", None, "two"], [["zero"], [], ["two"]], [["zero"], [None], [None, "two"]], [["zero"], None, ["two"]]],
)
def test_hugging_face_captions_with_holes(tmp_path: Path, texts: list, streaming: bool) -> None:
    hub_captions(tmp_path, texts, several=isinstance(texts[0], list))
    options = {"path": tmp_path, "size": 8, "labels": False, "caption_column": "text", "streaming": streaming}
    dataset = load("huggingface", max_unreadable=1, **options)
    if isinstance(dataset, ImageStream):
        window = take(dataset, 0, 3)
        assert {dataset.decode(window, i).captions for i in range(3)} == {("zero",), ("two",)}
        return
    assert dataset.captions(range(3)) == [("zero",), ("two",), ("two",)]  # before any image was read, too
    assert torch.equal(dataset[1][0], pixels(2))
    with pytest.raises(
        MezzotintError, match=r"1 of 3 images of .* no caption .*, example 1 among them, and at most 0 may"
    ):
        load("huggingface", max_unreadable=0, **options)


def test_hugging_face_files_with_offsets_to_nowhere(tmp_path: Path) -> None:
    """They are mapped into memory, where reading outside would end the process."""
    hub_captions(tmp_path, ["abc", "defgh"], several=False)
    file = next(tmp_path.glob("*.arrow"))
    before, after = struct.pack("<3i", 0, 3, 8), struct.pack("<3i", 0, 3, 2**31 - 1)
    assert file.read_bytes().count(before) == 1
    file.write_bytes(file.read_bytes().replace(before, after))
    with pytest.raises(
        MezzotintError, match=r"cannot be loaded \(.*\); expected a name on the hub within reach, or a fold"
    ):
        load("huggingface", path=tmp_path, size=8, labels=False, caption_column="text")
