"""Files that were cut, flipped, or written by somebody with other intentions: found, never used, never run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

import mezzotint
from mezzotint.conditions.encoders import TextEncoder
from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path, file_checksum, read_tensors, save_tensors, tensors_checksum
from mezzotint.recipe import Recipe, load_recipe
from mezzotint.seal import FIRST_LINE
from mezzotint.training.checkpoints import MANIFEST, Checkpoints
from mezzotint.training.parallel import World
from mezzotint.training.tokenizer_losses import feature_maps

ALONE = World(0, 1, torch.device("cpu"))


def state(value: float) -> dict[str, Any]:
    """Every kind of thing that a training state has."""
    return {
        "backbone": {"weight": torch.full((3, 2), value), "half": torch.full((2,), value, dtype=torch.bfloat16)},
        "optimizer": {"param_groups": {"lr": value, "betas": (0.9, value), "fused": None, "amsgrad": False}},
        "ema": [{"weight": torch.full((3, 2), -value)}],
    }


def value_of(state: dict[str, Any]) -> float:
    """The number that a `state` was made of; fails unless all of it was."""
    value: float = state["optimizer"]["param_groups"]["lr"]
    expected = globals()["state"](value)
    assert state["optimizer"] == expected["optimizer"]
    for key in ("weight", "half"):
        assert torch.equal(state["backbone"][key], expected["backbone"][key])
    assert torch.equal(state["ema"][0]["weight"], expected["ema"][0]["weight"])
    return value


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """States of steps 1 and 2, holding the numbers 1 and 2."""
    made = Checkpoints(tmp_path / "state", ALONE, keep=2)
    for step in (1, 2):
        made.save(step, state(float(step)))
    return made


def flips(file: Path, count: int) -> Iterator[None]:
    """The file with one bit flipped, at about `count` places from its first byte to its last; then as it was."""
    with open(file, "r+b", buffering=0) as opened:
        size = file.stat().st_size
        for number, place in enumerate(range(0, size, max(1, size // count))):
            opened.seek(place)
            (byte,) = opened.read(1)
            for content in (byte ^ 1 << number % 8, byte):
                opened.seek(place)
                opened.write(bytes([content]))
                if content != byte:
                    yield


# --------------------------------------------------------------------------------------------------- training states


def test_every_flipped_bit_of_a_state_is_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() == 2
    files = sorted(checkpoints.path(2).iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", MANIFEST]
    for file in files:
        for _ in flips(file, 150):
            assert checkpoints.latest() == 1, file.name
    read = state(0.0)
    assert checkpoints.load(2, read) == 2
    assert value_of(read) == 2


def test_a_manifest_nested_too_deeply_is_damage(checkpoints: Checkpoints) -> None:
    (checkpoints.path(2) / MANIFEST).write_text("[" * 100_000)
    assert checkpoints.latest() == 1


def test_the_manifest_holds_sizes_and_crc32(checkpoints: Checkpoints) -> None:
    place = checkpoints.path(2)
    manifest = json.loads((place / MANIFEST).read_text())
    assert manifest == {
        name: {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        for name in (".metadata", "__0_0.distcp")
        if (content := (place / name).read_bytes())
    }


def test_processes_share_the_reading(checkpoints: Checkpoints) -> None:
    (checkpoints.path(2) / "__0_0.distcp").write_bytes(b"")
    found = [Checkpoints(checkpoints.folder, World(rank, 2, torch.device("cpu")), 2).damage(2) for rank in (0, 1)]
    assert found[0] == ""
    assert found[1].startswith("__0_0.distcp has not the")


def of_before(place: Path) -> None:
    """Give a state the manifest that earlier versions wrote: sizes alone."""
    sizes = {file.name: file.stat().st_size for file in place.iterdir() if file.name != MANIFEST}
    (place / MANIFEST).write_text(json.dumps(sizes))


def test_a_state_of_earlier_versions_is_read_and_fails_over_to_the_one_before(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        of_before(checkpoints.path(step))
    read = state(0.0)
    assert checkpoints.load(2, read) == 2
    assert value_of(read) == 2
    file = checkpoints.path(2) / ".metadata"
    content = file.read_bytes()
    file.write_bytes(content[:9] + b"?" + content[10:])
    assert checkpoints.latest() == 2, "no checksum: only reading it tells"
    assert checkpoints.load(2, read) == 1
    assert value_of(read) == 1
    (sentence,) = caplog.messages
    assert "step-00000002 is damaged: .metadata cannot be read" in sentence
    file = checkpoints.path(1) / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(MezzotintError, match=r"no checkpoint in .*state can be read .*remove that folder to begin"):
        checkpoints.load(2, read)


# ------------------------------------------------------------------------------------------------ nothing in them runs


class Code:
    """Pickled, a call that makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


def test_pickled_code_in_a_state_never_runs(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tmp_path / "made"
    pickle.loads(pickle.dumps(Code(made)))
    assert made.exists(), "the pickle works"
    made.unlink()

    checkpoints.save(3, state(3.0) | {"more": Code(made)})  # among what is no tensor
    with pytest.raises(MezzotintError, match=r"no checkpoint .* can be read"):  # the others have no "more"
        checkpoints.load(3, state(0.0) | {"more": None})
    assert "step-00000003 is damaged: it holds more than tensors and numbers" in caplog.text

    checkpoints.save(3, state(3.0))
    (checkpoints.path(3) / ".metadata").write_bytes(pickle.dumps(Code(made)))
    of_before(checkpoints.path(3))
    assert checkpoints.load(3, state(0.0)) == 2
    assert ".metadata cannot be read (it names pathlib.Path.touch, which is not part of" in caplog.messages[-1]
    assert not made.exists()


def test_metadata_that_name_files_elsewhere_are_refused(checkpoints: Checkpoints) -> None:
    file = checkpoints.path(2) / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../step-00000001/__0_0.distcp"
    file.write_bytes(pickle.dumps(metadata))
    of_before(checkpoints.path(2))
    read = state(0.0)
    assert checkpoints.load(2, read) == 1
    assert value_of(read) == 1


def test_a_state_of_another_user_is_refused(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getuid()
    if own == 0:
        os.chown(checkpoints.path(2) / "__0_0.distcp", 54321, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(MezzotintError, match=r"step-00000002.* was written by another user .*--trust-code"):
        checkpoints.latest()
    assert Checkpoints(checkpoints.folder, ALONE, 2, trust_code=True).latest() == 2


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is made when the module `beside`, in the working folder, is imported."""
    (tmp_path / "beside.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\n\ndef maps(images):\n    return [images]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    return tmp_path / "imported"


def test_code_that_a_recipe_names_is_not_imported_unless_trusted(module: Path) -> None:
    with pytest.raises(MezzotintError, match=r"perceptual_network beside:maps is code, .*--trust-code"):
        feature_maps("beside:maps", 8)
    assert not module.exists()
    assert len(feature_maps("beside:maps", 8, trust_code=True)(torch.zeros(1, 1, 8, 8))) == 1
    assert module.exists()
    assert feature_maps("mezzotint.studies.perceptual:digits", 8), "the library's own"


def test_what_was_typed_is_trusted_and_what_a_file_says_is_not(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = "representation.fit.perceptual_network=beside:maps"
    vae = ("representation={name: conv-vae, stride: 2, channels: 2}", "representation.fit={widths: [32, 32]}")
    Path("mine.yaml").write_text(load_recipe("digits", [*vae, named]).to_yaml())
    trusted: list[bool] = []

    def called(*_: Any, trust_code: bool, **__: Any) -> Any:
        trusted.append(trust_code)
        raise MezzotintError("enough")

    monkeypatch.setattr("mezzotint.training.tokenizers.fit_tokenizer", called)
    monkeypatch.setattr("mezzotint.training.train", called)
    for name in ("fit-tokenizer", "train"):
        for words in (["mine.yaml"], ["mine.yaml", "--trust-code"], ["digits", *vae, named]):
            assert command(name, *words).code == 2
    assert command("train", "digits", *vae, named, "--resume").code == 2
    Path("mine.yaml").write_text(load_recipe("digits", [*vae, named.replace("beside:maps", "r:p")]).to_yaml())
    assert command("fit-tokenizer", "mine.yaml", "data=folder:photos").code == 2
    assert trusted == [False, True, True, False, True, True, False, False], "a state, or part of a path, was not typed"


def test_code_beside_a_model_of_transformers_is_not_imported(module: Path) -> None:
    pytest.importorskip("transformers")
    folder = module.parent / "encoder"
    folder.mkdir()
    (module.parent / "beside.py").rename(folder / "beside.py")
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "beside.Config"}}')
    with pytest.raises(MezzotintError, match="no text encoder could be read from the folder"):
        TextEncoder(str(folder))
    assert not module.exists()


# ----------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_says_how_much_is_needed(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {file: file.read_bytes() for file in checkpoints.folder.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", contextmanager(lambda *_: iter([Full()])))
        with pytest.raises(MezzotintError, match=r"checkpoint .*03: No space left on device \(64 KiB are needed, "):
            checkpoints.save(3, state(3.0) | {"large": torch.zeros(2**14)})
    assert {file: file.read_bytes() for file in checkpoints.folder.rglob("*") if file.is_file()} == before


def test_weights_on_a_full_disk(tmp_path: Path) -> None:
    """A real failing write: the process may not write files of more than 8 KiB."""

    def write() -> None:
        with atomic_path(tmp_path / "here") as temporary:
            save_tensors({"x": torch.zeros(2**20)}, temporary, {})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(MezzotintError, match=r"cannot write .*here: .*File too large.*4\.0 MiB are needed"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"b": torch.arange(6.0).view(2, 3), "a": torch.ones((), dtype=torch.bfloat16), "empty": torch.zeros(0, 2)}


def test_every_flipped_bit_of_weights_is_found(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    about = {"format": "mezzotint", "class_names": '["cat", "dog"]'}
    save_tensors(tensors, file, about)
    found, metadata = read_tensors(file)
    assert metadata == about
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    passed = 0
    for _ in flips(file, 10_000):
        try:
            found, metadata = read_tensors(file)
        except MezzotintError:
            continue
        # Only the checksum's own name: without it the file is one of before, whose tensors are what they were.
        passed += 1
        assert {key: metadata[key] for key in about} == about
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert passed <= len("crc32")


def test_the_same_weights_are_the_same_bytes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Safetensors orders its metadata anew each time; letters beyond ASCII and control characters stay as they are."""
    about = {"format": "mezzotint", "class_names": '["é", "\u2028"]', "step": "\b\f\x7f\n", "z": "", "a": "b"}
    file, contents = tmp_path / "x.safetensors", set()
    for _ in range(8):
        save_tensors(tensors, file, about)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    assert read_tensors(file)[1] == about


def test_weights_without_a_checksum_are_read_as_before(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "others.safetensors"
    save_file(tensors, file, {"format": "pt"})
    assert read_tensors(file)[1] == {"format": "pt"}
    save_tensors(tensors, file, {"format": "pt"})
    assert load_file(file).keys() == tensors.keys()
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    save_file({"b": tensors["b"] + 1}, file, header["__metadata__"])
    with pytest.raises(MezzotintError, match=r"others.safetensors is damaged: .*leaves crc32 out of the header"):
        read_tensors(file)


def test_checksums_are_crc32_of_names_shapes_dtypes_and_values(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")
    assert file_checksum(tmp_path / "file") == "cbf43926", "the check value of CRC-32/ISO-HDLC"
    one = {"x": torch.tensor([1, 2], dtype=torch.uint8)}
    assert tensors_checksum(one, {}) == f"{zlib.crc32(b'[]x (2,) torch.uint8' + bytes([1, 2])):08x}"
    others = [{"y": one["x"]}, {"x": one["x"].view(1, 2)}, {"x": one["x"].view(torch.int8)}, {"x": one["x"].flip(0)}]
    assert len({tensors_checksum(other, {}) for other in [one, *others]} | {tensors_checksum(one, {"a": "b"})}) == 6


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def run(pipeline: mezzotint.Pipeline, tmp_path: Path) -> Path:
    """A run's folder with its recipe and a file of weights."""
    pipeline.recipe.write(tmp_path)
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def test_a_runs_recipe_that_is_cut_anywhere_is_refused(run: Path, pipeline: mezzotint.Pipeline) -> None:
    file = run / "recipe.yaml"
    text = file.read_bytes()
    assert load_recipe(run) == pipeline.recipe
    for end in reversed(range(len(text) - 1)):  # the last byte ends the last line
        os.truncate(file, end)
        with pytest.raises(MezzotintError, match=r"recipe.yaml is cut short|is not a recipe|UTF-8"):
            load_recipe(run)
    file.write_bytes(text[:-1])
    assert load_recipe(run) == pipeline.recipe
    copy = run / "copy.yaml"
    copy.write_bytes(text[:-20])
    with pytest.raises(MezzotintError, match=r"copy.yaml is cut short"):
        load_recipe(copy)


def test_a_recipe_of_earlier_versions_is_read_where_it_is_whole(run: Path, pipeline: mezzotint.Pipeline) -> None:
    file = run / "recipe.yaml"
    text = pipeline.recipe.to_yaml().encode()
    file.write_bytes(text)
    assert load_recipe(run) == pipeline.recipe
    for end in reversed([*range(0, len(text) - 30, 311), *range(len(text) - 30, len(text))]):
        os.truncate(file, end)
        with pytest.raises(MezzotintError):
            load_recipe(run)
    file.write_text("name: mine\ntarget: noise\n")
    with pytest.raises(MezzotintError, match=r"every field up to guidance.channels; .*as RECIPE with --weights"):
        load_recipe(run)
    (run / "model.safetensors").unlink()
    assert load_recipe(run).target == "noise", "no run: written by hand"


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("target: velocity", "target: noise", "target"),
        ("width: 16", "width: 17", "backbone"),
        ("  labels: true", "  labels: false", "data"),
        ("seed: 0", "seed: 0\nextra: 1", "extra"),
        ("variance: none\n", "", "variance"),
    ],
)
def test_an_edited_recipe_of_a_run_names_what_was_changed(run: Path, before: str, after: str, changed: str) -> None:
    file = run / "recipe.yaml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    with pytest.raises(MezzotintError, match=rf"recipe.yaml is not what the run wrote: {changed} changed; undo that"):
        load_recipe(run)
    (run / "elsewhere").mkdir()
    (run / "elsewhere" / "recipe.yaml").write_text(text.replace("target: velocity", "target: noise"))
    assert load_recipe(run / "elsewhere").target == "noise", "a copy that is no run's any more may say anything"


def test_what_may_be_edited_in_a_runs_recipe(run: Path) -> None:
    file = run / "recipe.yaml"
    text = file.read_text()
    for before, after in (
        ("name: digits", "name: mine"),
        ("  path: null", "  path: elsewhere"),
        ("  sampler: ode-heun", "  sampler: ddim   # better"),
        ("  scale: 1.0\n  interval", "  scale: 4.0\n  interval"),
        ("  log_every: 2", "  log_every: 5"),
        (FIRST_LINE, FIRST_LINE + "# My notes.\n"),
    ):
        assert before in text
        text = text.replace(before, after, 1)
    file.write_text(text + "# and more\n")
    recipe: Recipe = load_recipe(run)
    assert (recipe.name, recipe.data.path, recipe.sampling.sampler) == ("mine", "elsewhere", "ddim")
    assert (recipe.guidance.scale, recipe.training.log_every) == (4.0, 5)
