"""Tar shards of images with captions or labels, the format of WebDataset.

Read by Python's `tarfile`: the library `webdataset` keeps its place in a running pipeline, while here the example of
every number must follow from the seed alone. Only headers are read in order; the bytes of an example are read where
they lie, when it is decoded.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mezzotint.data.base import Example, ShuffledStream, content_identity
from mezzotint.data.captions import caption_in
from mezzotint.data.folder import IMAGES, some
from mezzotint.data.listing import LITTER_REASON, LeftAside, is_litter
from mezzotint.data.pictures import background_rgb, read_picture
from mezzotint.data.splits import check_split, held_out, pick_split, split_of, split_word
from mezzotint.data.transforms import check_channels, check_size, picture_to_tensor
from mezzotint.errors import MezzotintError
from mezzotint.files import content_digests, name_bytes, parse_json, read_text

logger = logging.getLogger("mezzotint")

CLASS_NAMES = "classnames.txt"
"""The file beside the shards, or one folder up, that names the classes, one a line."""

MAX_IMAGE, MAX_TEXT = 2**30, 2**20
"""Bytes of an image, and of a caption or a label, in a shard; what is longer is unreadable."""
MAX_SHARDS = 1_000_000
"""That a pattern may name."""
FIRST_EXAMPLES = 16
"""How many examples tell whether there are captions: a broken one says nothing about the others."""


class TarExample(NamedTuple):
    """The files of an example: where in a shard they lie."""

    shard: Path
    key: str
    places: Mapping[str, tuple[int, int]]  # offset and size in bytes, by the part of the file name after its first dot

    def read(self, extension: str, most: int) -> bytes:
        """Raises `ValueError` for more than `most` bytes."""
        offset, size = self.places[extension]
        if size > most:
            raise ValueError(f"its .{extension} has {size:,} bytes, more than {most:,}")
        with open(self.shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    @property
    def image(self) -> str | None:
        """The extension of its image: of several, the one with the fewest dots, so jpg rather than mask.png or gif."""
        images = (extension for extension in self.places if f".{extension}".endswith(IMAGES.endings))
        rank = IMAGES.endings.index
        return min(images, key=lambda name: (name.count("."), rank("." + name.rpartition(".")[2])), default=None)

    def captions(self, caption_column: str | None) -> tuple[str, ...]:
        """From its .txt, else from its .json; none where both are missing."""
        if "txt" in self.places and caption_column is None:
            return (self.read("txt", MAX_TEXT).decode("utf-8-sig").strip(),)
        entry: Any = parse_json(self.read("json", MAX_TEXT)) if "json" in self.places else None
        return caption_in(entry, caption_column) or () if isinstance(entry, dict) else ()


class TarStream(ShuffledStream):
    """An `ImageStream` over tar shards; see `web_dataset`."""

    def __init__(
        self, shards: Sequence[Path], *, captioned: bool, caption_column: str | None, shuffle_buffer: int, **about: Any
    ) -> None:
        super().__init__(**about)
        self.shards, self.shuffle_buffer = tuple(shards), shuffle_buffer
        self.captioned, self.caption_column = captioned, caption_column

    @property
    def has_captions(self) -> bool:
        return self.captioned

    def rows(self, epoch: int, seed: int) -> Iterator[TarExample]:
        """The shards in random order, their examples shuffled within a buffer."""
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(len(self.shards))
        buffer: list[TarExample] = []
        left = LeftAside()
        for row in (row for number in order for row in shard_examples(self.shards[number], left)):
            if len(buffer) < self.shuffle_buffer:
                buffer.append(row)
            else:
                place = int(generator.integers(len(buffer)))
                row, buffer[place] = buffer[place], row
                yield row
        left.report(f"{len(self.shards)} tar shards of {self.shards[0].parent}")  # of the whole epoch, so once
        yield from (buffer[place] for place in generator.permutation(len(buffer)))

    def decode_row(self, row: TarExample) -> Example:
        if row.image is None:
            raise ValueError("the image is missing")
        captions = row.captions(self.caption_column) if self.captioned else ()
        if self.captioned and not captions:
            raise ValueError("the caption is missing")
        label = self._label(row) if self.class_names else -1
        picture = read_picture(io.BytesIO(row.read(row.image, MAX_IMAGE)))
        return Example(picture_to_tensor(picture, self.image_shape, self.background), label, captions)

    def row_name(self, row: TarExample, number: int) -> str:
        return f"{row.key} (example {number}) in {row.shard}"

    def _label(self, row: TarExample) -> int:
        label = int(row.read("cls", MAX_TEXT).decode("utf-8-sig"))
        if not 0 <= label < len(self.class_names):
            raise MezzotintError(
                f"{row.key} in {row.shard} has the label {label}, expected 0 to {len(self.class_names) - 1}; mend "
                f"{CLASS_NAMES} or set data.labels=false"
            )
        return label


def web_dataset(
    path: str | Path,
    size: int,
    split: str = "train",
    channels: int = 3,
    labels: bool = True,
    caption_column: str | None = None,
    test_fraction: float = 0.0,
    shuffle_buffer: int = 1000,
    max_unreadable: int = 10,
    background: str = "white",
) -> TarStream:
    """An endless stream of the examples in tar shards: an image, with a caption in .txt or .json, or a label in .cls.

    `path` is a folder of ``.tar`` files, perhaps with sub-folders train and test, or a pattern such as
    ``shards/{00000..00099}.tar`` or ``shards/train-*.tar``. What the first example has, all must have: an example
    without counts as unreadable. The key of the caption in .json is `caption_column`, by default text, caption or
    captions. Labels count from 0 and need the file `CLASS_NAMES`. Shards come in random order, their examples shuffled
    within `shuffle_buffer`; `test_fraction` holds whole shards out. Images become squares of `size` pixels by
    `adm_center_crop`. Raises `MezzotintError` for shards that are missing, empty or no tar files, a split that is not
    there, and labels without names.
    """
    check_split(split)
    check_channels(channels)
    check_size(size)
    colour = background_rgb(background)
    if shuffle_buffer < 1:
        raise MezzotintError(f"data.shuffle_buffer is {shuffle_buffer}; expected at least 1, which does not shuffle")
    shards = _shards(str(path), split, test_fraction)
    rows = (row for shard in shards for row in shard_examples(shard))
    first = next(rows, None)
    if first is None:
        raise MezzotintError(f"the tar shards of {path} hold no examples; check data.path")
    class_names: tuple[str, ...] = ()
    if labels and "cls" in first.places:
        class_names = _class_names(first.shard)
    captioned = _has_captions(chain([first], islice(rows, FIRST_EXAMPLES - 1)), caption_column)

    place = Path(path).expanduser().resolve()
    name = place.name if place.is_dir() else place.parent.name  # of a pattern, where it is
    shape = (channels, size, size)
    digests = content_digests(shards)
    content = [name_bytes(shard.name) + b"\0" + digest for shard, digest in zip(shards, digests, strict=True)]
    content.append(repr((sorted(first.places), caption_column, colour)).encode())
    return TarStream(
        shards,
        captioned=captioned,
        caption_column=caption_column,
        shuffle_buffer=shuffle_buffer,
        image_shape=shape,
        class_names=class_names,
        identity=content_identity(name, split, shape, class_names, content),
        max_unreadable=max_unreadable,
        background=colour,
    )


def shard_examples(shard: Path, left: LeftAside | None = None) -> Iterator[TarExample]:
    """The examples in a shard, one after another: neighbouring files whose paths agree up to the first dot of the name.

    Files of other systems are counted in `left`. Raises `MezzotintError` for a file that is no uncompressed tar file,
    or cut off.
    """
    key: str | None = None
    places: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.size < 0 or member.sparse is not None:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes or is stored with holes")
                end = member.offset_data - (-member.size // 512) * 512
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if any(is_litter(part) for part in member.name.split("/") if part not in ("", ".", "..")):
                    if left is not None and not member.isdir():
                        left.add(LITTER_REASON, member.name)
                    continue
                if not member.isreg() or not extension:
                    continue
                if (here := os.path.join(folder, stem)) != key:
                    if key is not None:
                        yield TarExample(shard, key, places)
                    key, places = here, {}
                places[extension.lower()] = member.offset_data, member.size
        with open(shard, "rb") as file:  # `tarfile` takes whatever is no header for the end
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"it breaks off after {end} bytes")
    except Exception as error:  # `tarfile` meets damaged headers with a dozen unrelated types
        reason = str(error) or type(error).__name__  # `MemoryError` says nothing
        raise MezzotintError(
            f"tar shard {shard} cannot be read ({reason}); expected a whole, uncompressed tar file, so fetch it "
            "again or remove it"
        ) from error
    if key is not None:
        yield TarExample(shard, key, places)


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}b`` as a00b, a01b, a02b, and ``{x,y}`` as x, y, as shells do it, any number of times.

    Raises `MezzotintError` for more than `MAX_SHARDS` words.
    """
    parts: list[Iterable[str]] = []
    count = 1
    for position, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        words: Iterable[str] = [part]
        if position % 2:  # in braces
            words = part.split(",") if "," in part else [f"{{{part}}}"]
            if numbers := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part):
                first, last = numbers.groups()
                count *= max(0, int(last) - int(first) + 1)
                words = map(f"{{:0{len(first)}}}".format, range(int(first), int(last) + 1))
            else:
                count *= len(words)
        if count > MAX_SHARDS:
            raise MezzotintError(f"{pattern} names more than {MAX_SHARDS:,} tar shards; mend the numbers in braces")
        parts.append(words)
    return ["".join(words) for words in product(*parts)]


def _matching(word: str) -> list[str]:
    """The files that a pattern means; the name of a file or folder that is there is no pattern, whatever is in it."""
    if os.path.isfile(word) or not glob.has_magic(word):
        return [word]
    folder, name = os.path.split(word)
    return sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)))


def _shards(path: str, split: str, test_fraction: float) -> list[Path]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        shards = pick_split(_parts(folder), split, test_fraction, f"folder of tar shards {folder}")
    else:
        pick_split({"train": folder}, split, test_fraction, f"the tar shards {path}")
        words = [str(folder)] if folder.is_file() else expand_braces(str(folder))
        if missing := [word for word in words if not glob.has_magic(word) and not os.path.isfile(word)]:
            raise MezzotintError(
                f"{len(missing)} of the {len(words)} tar shards of {path} are missing, the first one {missing[0]}; "
                "set data.path to a folder of .tar files or a pattern like shards/{00000..00099}.tar"
            )
        shards = [Path(name) for word in words for name in _matching(word)]
    if not shards:
        raise MezzotintError(
            f"{folder} has no tar shards; set data.path to a folder of .tar files, or a pattern of them"
        )
    if broken := [shard.name for shard in shards if not shard.is_file()]:
        raise MezzotintError(
            f"{len(broken)} tar shards of {path} are no files, or links to nowhere: {some(broken)}; remove or "
            "fetch them"
        )
    if test_fraction and len(shards) == 1:
        raise MezzotintError(
            f"{folder} has one tar shard, and data.test_fraction holds whole shards out; set it to 0 or split the shard"
        )
    return [shards[i] for i in held_out(len(shards), split, test_fraction)]


def _tar_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_litter(path.name))


def _parts(folder: Path) -> dict[str, list[Path]]:
    """The shards in a folder by split: in sub-folders, else told apart by their names, else all for training."""
    shards = _tar_files(folder)
    inside = {path.name: _tar_files(path) for path in folder.iterdir() if split_of(path.name)}
    if any(inside.values()):
        if shards:
            names = some([shard.name for shard in shards])
            logger.warning("%s has splits, and %d tar shards beside them are left out: %s", folder, len(shards), names)
        return {name: found for name, found in inside.items() if found}
    parts: dict[str, list[Path]] = {}
    for shard in shards:
        parts.setdefault(split_word(shard.stem) or "", []).append(shard)
    if {split_of(word) for word in parts} == {"train", "test"}:
        return parts
    if tests := [shard.name for word, found in parts.items() if split_of(word) == "test" for shard in found]:
        logger.warning("%s: all %d tar shards are taken for training, among them %s", folder, len(shards), some(tests))
    return {"train": shards}


def _class_names(shard: Path) -> tuple[str, ...]:
    for folder in (shard.parent, shard.parent.parent):
        if (file := folder / CLASS_NAMES).is_file():
            return tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    raise MezzotintError(
        f"{shard} has labels, but there is no file {shard.parent / CLASS_NAMES} to name the classes; write one, a name "
        "a line, or set data.labels=false"
    )


def _has_captions(examples: Iterable[TarExample], caption_column: str | None) -> bool:
    """Whether there are captions: the first of `examples` that has one, or nowhere to have one, tells."""
    mistake: str | None = None
    for example in examples:
        where = f"{example.key} in {example.shard}"
        try:
            if example.captions(caption_column):
                return True
            problem = (
                f"{where} has no caption under the key {caption_column!r} of a .json file; set data.caption_column"
            )
            mistake = mistake or (f"{problem} to another key" if caption_column is not None else None)
        except ValueError as error:
            mistake = mistake or f"the caption of {where} cannot be read ({error}); mend it"
        if not {"txt", "json"} & {*example.places}:
            break
    if mistake:
        raise MezzotintError(mistake)
    return False
