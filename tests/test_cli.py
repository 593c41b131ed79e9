"""The command line, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY, Command
from PIL import Image


@pytest.fixture
def mezzotint(command: Command) -> Command:
    """By the name that a user types."""
    return command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mezzotint import load_recipe, train

    folder = tmp_path_factory.mktemp("cli") / "run"
    train(load_recipe("digits", TINY), folder, quiet=True)
    return folder


def test_train_sample_evaluate(mezzotint: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mezzotint("train", "digits", *TINY, "--out", run).code == 0
    files = ["--png", tmp_path / "png", "--trajectory", tmp_path / "way.gif"]
    settings = ["--sampler", "ddim", "--steps", 4, "--guidance", 1.5, "sampling.eta=0.5", "guidance.interval=[0.2,1]"]
    drawn = mezzotint("sample", run, "--classes", "3, 8", "--count", 6, *files, *settings)
    assert drawn.code == 0, drawn.err
    written = [run / "samples.png", tmp_path / "png", tmp_path / "way.gif"]
    assert drawn.out.split() == list(map(str, written))
    assert all(path.exists() for path in written)
    assert len(list((tmp_path / "png").iterdir())) == 6
    archived = mezzotint("sample", run, "--classes", "3, 8", "--count", 6, "--npz", tmp_path / "s.npz", *settings)
    assert archived.out.split() == [str(run / "samples.png"), str(tmp_path / "s.npz")]
    import numpy as np

    with np.load(tmp_path / "s.npz") as file, Image.open(tmp_path / "png" / "000005.png") as picture:
        assert file["arr_1"].tolist() == [3, 3, 3, 8, 8, 8]
        assert np.array_equal(file["arr_0"][5, ..., 0], np.asarray(picture))
    with Image.open(run / "samples.png") as grid:
        assert grid.width > grid.height, "two rows, one a class, of three"
    scored = mezzotint("evaluate", run, "--count", 100, "--guidance", 2, "--likelihood", 8)
    assert scored.code == 0, scored.err
    scores = json.loads((run / "scores.json").read_text())
    assert scores["classifier_accuracy"] >= 0.97
    assert scores["guidance"] == 2
    assert scores["bits_per_dim"] > 0
    samples, guided, real = (scores["sets"][name] for name in ("samples", "guided", "real"))
    assert 0 <= samples["class agreement"] <= 1
    assert samples["images"] == guided["images"] == real["images"] == 100
    assert samples["FD-classifier"] > real["FD-classifier"] > 0
    assert scores["features"].startswith("classifier (digits-1x8x8-test")
    assert "FD-classifier" in scored.out
    assert "real data" in scored.out


def test_evaluate_images_against_images(mezzotint: Command, trained: Path, tmp_path: Path) -> None:
    """Two sets that no model of ours made: an .npz against a folder of the same images is at distance zero."""
    sets = tmp_path / "s.npz", tmp_path / "png"
    assert mezzotint("sample", trained, "--count", 60, "--npz", sets[0], "--png", sets[1]).code == 0
    scored = mezzotint("evaluate", *sets, "--features", "pixels", "--out", tmp_path / "a.json", "--infinity")
    assert scored.code == 0, scored.err
    same = json.loads((tmp_path / "a.json").read_text())["sets"]["samples"]
    assert same["FD-pixels"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == 1
    assert "FD-pixels at N = ∞" in same
    against = mezzotint("evaluate", sets[0], "digits", "--features", "pixels", "--out", tmp_path / "b.json")
    assert against.code == 0, against.err
    assert json.loads((tmp_path / "b.json").read_text())["sets"]["samples"]["FD-pixels"] > 1
    judged = mezzotint("evaluate", sets[0], "digits", "--out", tmp_path / "c.json")
    assert judged.code == 0, judged.err
    assert "class agreement" in json.loads((tmp_path / "c.json").read_text())["sets"]["samples"]


def test_the_same_command_writes_the_same_file(mezzotint: Command, trained: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert mezzotint("sample", trained, "--out", tmp_path / name, "--count", 4).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_cost(mezzotint: Command) -> None:
    counted = json.loads(mezzotint("cost", "dit-xl-2-256", "--json").out)
    assert (counted["params"], counted["trainable_params"]) == (675_129_632, 674_834_720)
    assert counted["gmacs"] == pytest.approx(118.64, rel=3e-3)
    shown = mezzotint("cost", "dit-s-8-256").out
    assert "33,148,160" in shown
    assert "  at least " in shown, "the time is a bound"
    assert json.loads(mezzotint("cost", "digits", "backbone=dit-s-2", "--json").out)["params"] > 32e6


def test_cost_of_the_samplers(mezzotint: Command) -> None:
    counted = json.loads(mezzotint("cost", "dit-xl-2-256", "--samplers", "--json").out)["evaluations"]
    assert (counted["ddpm"], counted["ode-heun"], counted["sde-heun"], counted["ode-dopri5"]) == (250, 499, 499, None)
    shown = mezzotint("cost", "sit-xl-2-256", "--samplers").out
    assert "59,311" in shown, "250 guided steps of 118.62 GMACs, twice"


def test_convert_and_sample_a_checkpoint(mezzotint: Command, trained: Path, tmp_path: Path) -> None:
    """A recipe with a file gives the very images of the run that the file came from."""
    ours = tmp_path / "model.safetensors"
    ours.write_bytes((trained / "model.safetensors").read_bytes())
    grids = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    assert mezzotint("sample", trained, "--count", 4, "--out", grids[0]).code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((trained / "recipe.yaml").read_text())
    drawn = mezzotint("sample", recipe, "--weights", ours, "--count", 4, "--out", grids[1])
    assert drawn.code == 0, drawn.err
    copied = mezzotint("convert", trained, tmp_path / "copy")
    assert copied.out.strip() == str(tmp_path / "copy"), copied.err
    assert mezzotint("sample", tmp_path / "copy", "--count", 4, "--out", grids[2]).code == 0
    assert len({grid.read_bytes() for grid in grids}) == 1
    assert "exists already" in mezzotint("convert", trained, tmp_path / "copy").err


def test_sampling_in_bf16_is_near_that_in_fp32(mezzotint: Command, trained: Path, tmp_path: Path) -> None:
    import numpy as np

    drawn = []
    for precision in ("fp32", "bf16"):
        npz = tmp_path / f"{precision}.npz"
        assert mezzotint("sample", trained, "--count", 20, "--npz", npz, "--precision", precision).code == 0
        drawn.append(np.load(npz)["arr_0"].astype(float))
    assert 0 < np.abs(drawn[0] - drawn[1]).mean() < 3, "grey levels of 255"


def test_imagenet_classes_by_name() -> None:
    from mezzotint.conditions import imagenet_class_names, parse_classes
    from mezzotint.errors import MezzotintError

    names = imagenet_class_names()
    assert len(names) == 1000
    assert parse_classes(["golden retriever", "Otter", "88", "null"], 1000, names) == [207, 360, 88, 1000]
    with pytest.raises(MezzotintError, match="2 classes are called 'cardigan': 264, 474; give one's number"):
        parse_classes(["cardigan"], 1000, names)
    with pytest.raises(MezzotintError, match="class 'goldn retriever' is unknown; closest: golden retriever"):
        parse_classes(["goldn retriever"], 1000, names)


def test_sweep_and_its_pictures_in_the_page(mezzotint: Command, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "model.safetensors"):
        (run / name).write_bytes((trained / name).read_bytes())
    grid = ["sampler=ddim,sde-sigma", "steps=2,3", "--count", 100, "--features", "pixels"]
    swept = mezzotint("sweep", run, *grid)
    assert swept.code == 0, swept.err
    assert len((run / "sweep.csv").read_text().splitlines()) == 5
    assert "FD-pixels" in swept.out
    pictures = list(run.glob("sweep-*.png"))
    assert pictures
    page = mezzotint("evaluate", run, "--count", 50, "--html", tmp_path / "page.html")
    assert page.code == 0, page.err
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert text.count("data:image/png;base64,") > len(pictures)
    assert "is unknown" in mezzotint("sweep", run, "samplr=ddim").err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["sample"],
        ["evaluate"],
        ["probe"],
        ["fit-tokenizer"],
        ["export-vit"],
        ["denoise"],
        ["study"],
        ["sweep"],
        ["convert"],
        ["encode"],
        ["cost"],
        ["recipes"],
    ],
)
def test_help_teaches(mezzotint: Command, words: list[str]) -> None:
    shown = mezzotint(*words, "--help")
    assert shown.code == 0
    assert "Usage: mezzotint" in shown.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "digitz"], "recipe 'digitz' is unknown; closest: digits"),
        (["train", "digits", "training.stps=3"], "key 'training.stps' is unknown; closest: steps"),
        (["train", "digits", "training.lr=fast"], "training.lr = 'fast' is not valid"),
        (["train", "digits", "backbone.patch_size=3"], "a patch of 3 does not divide"),
        (["train", "digits", "data=folder:/nowhere/at/all"], "does not exist"),
        (["train", "digits", "--device", "tpu9"], "device 'tpu9' is not available here"),
        (["sample", "RUN", "--steps", "0"], "sampling.steps = 0 is not valid"),
        (["sample", "RUN", "--classes", "eleven"], "class 'eleven' is unknown"),
        (["sample", "RUN", "--classes", "11"], "class 11 is out of range"),
        (["sample", "RUN", "--classes", ","], "--classes names no class"),
        (["sample", "RUN", "--sampler", "dppm"], "sampler 'dppm' is unknown; closest: ddpm"),
        (["sample", "RUN", "--guidance=-1"], "guidance.scale = -1.0 is not valid"),
        (["sample", "RUN", "guidance.interval=[-1,1]"], "guidance.interval must be two times"),
        (["sample", "RUN", "backbone.width=8"], "would change the trained model"),
        (["sample", "RUN", "--weights", "best"], "has no weights 'best'; it has: model"),
        (["sample", "/nowhere"], "/nowhere is not a run folder"),
        (["sample", "digits"], "digits is a recipe, which has no weights; give a checkpoint by --weights"),
        (["sample", "dit-xl-2-256", "--weights", "/no.pt"], "/no.pt is not a run folder, nor another checkpoint"),
        (["sample", "dit-xl-2-256", "--weights", "RUN"], "where recipe 'dit-xl-2-256' says"),
        (["sample", "RUN", "--precision", "fp8"], "precision 'fp8' is unknown; known: fp32, bf16"),
        (["sample", "RUN", "--count", "50000"], "50000 images are too many to keep in memory; give --npz"),
        (["sample", "RUN", "--npz", "a.npz", "--trajectory", "a.gif"], "do not go together"),
        (["convert", "RUN", "here", "--to", "onnx"], "format 'onnx' is unknown"),
        (
            ["convert", "RUN", "here.pt"],
            "here.pt names a file, and the format 'run' is a folder; for the official code's",
        ),
        (["convert", "RUN", "here.safetensors", "--to", "diffusers"], "the format 'diffusers' is a folder"),
        (["convert", "RUN", "here", "seed=1"], "override 'seed=1' is of no recipe; name one by --recipe"),
        (["encode", "digits"], "the representation 'pixels' has no latents to encode"),
        (["encode", "folder:/nowhere"], "image folder /nowhere does not exist"),
        (["sample", "RUN", "--out", "/proc/no.png"], "cannot write /proc/no.png"),
        (["evaluate", "RUN", "--steps", "-1"], "sampling.steps = -1 is not valid"),
        (["evaluate", "RUN", "a", "b"], "images are compared with one reference, not with a and b"),
        (["evaluate", "here.npz"], "there are no images at 'here.npz'"),
        (["evaluate", "moving-digits"], "images are scored against others; give a reference"),
        (["evaluate", "RUN", "--features", "inceptoin"], "feature network 'inceptoin' is unknown; closest: inception"),
        (["evaluate", "RUN", "backbone.width=8"], "would change the trained model"),
        (["evaluate", "here.npz", "digits", "--steps", "5"], "here.npz is images, which no sampler draws"),
        (["cost", "dit-xxl-2"], "recipe 'dit-xxl-2' is unknown; closest: dit-xl-"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    mezzotint, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = mezzotint(*[str(trained) if argument == "RUN" else argument for argument in arguments])
    assert result.code == 2
    assert sentence in result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert result.out == ""
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


# ---- Anybody's text --------------------------------------------------------------------------------------------------

ODD = ["grids [cfg]", "grids [/tmp]", "a[/b]", ":smile: [bold]", "50% {x}", "élan", "a*?"]


@pytest.mark.parametrize("name", ODD)
def test_paths_are_printed_as_they_are(mezzotint: Command, trained: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name / "x.png"
    drawn = mezzotint("sample", trained, "--count", 1, "--steps", 1, "--out", out)
    assert (drawn.code, drawn.out) == (0, f"{out}\n")
    assert out.is_file()
    refused = mezzotint("train", tmp_path / name / "r.yaml")
    assert (refused.code, refused.err) == (
        2,
        f"error: there is no recipe file or run folder at {tmp_path / name / 'r.yaml'}",
    )


def test_tables_progress_and_log_lines_have_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import logging

    from rich.console import Console

    from mezzotint import progress
    from mezzotint.cli.tables import Table, print_table

    assert not progress.console._markup
    written = io.StringIO()
    shown = Console(file=written, force_terminal=True, width=200, markup=False, emoji=False, color_system=None)
    monkeypatch.setattr(progress, "console", shown)
    monkeypatch.setattr("mezzotint.cli.tables.results", shown)
    print_table(Table(["a[/b]"], [["[bold]c"]], title="[/t]", notes=[":smile:"]))
    with progress.messages():
        logging.getLogger("x").warning("%s", "d[/e]")
    assert list(progress.track(range(2), "f[/g]", total=2)) == [0, 1]
    with progress.progress_bar("loss") as bar:
        bar.add_task("h[/i]", total=1, loss="j[/k]")
        bar.refresh()
    for text in ("a[/b]", "[/t]", ":smile:", "[bold]c", "d[/e]", "f[/g]", "h[/i]", "j[/k]"):
        assert text in written.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_of_any_encoding_shows_everything(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    import io
    import sys

    import yaml

    from mezzotint.cli import main

    def run(*arguments: str) -> tuple[str, str]:
        streams = io.BytesIO(), io.BytesIO()
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
        monkeypatch.setattr(sys, "argv", ["mezzotint", *arguments])
        with pytest.raises(SystemExit):
            main()
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (stream.getvalue().decode(encoding) for stream in streams)
        return out, err

    assert "8 \\xd7 8" in run("recipes")[0] or encoding == "cp1252"
    assert "mdm-1024" in run("recipes")[0]
    assert "Train, sample and score" in run("--help")[0]
    assert "--guidance" in run("sample", "--help")[0]
    assert "parameters" in run("cost", "digits")[0]
    assert "\\u2192" in run("sample", "→/\udcff")[1]
    written = yaml.safe_load(run("recipes", "digits", "description=→ é \udcff")[0])
    assert written["description"] == "→ é \udcff"


def test_names_that_are_not_utf8(mezzotint: Command, tmp_path: Path) -> None:
    """A class's name and a folder's in Latin-1, and one of decomposed letters, as macOS has them."""
    data = tmp_path / "photos \udcff [a*]"
    for number, name in enumerate(("caf\udce9", "e\u0301lan", "a[b]")):
        try:
            (data / name).mkdir(parents=True)
        except OSError:
            pytest.skip("this file system has names in UTF-8 alone")
        for image in range(2):
            Image.new("L", (8, 8), 90 * number + image).save(data / name / f"{image}.png")
    run = tmp_path / "run"
    words = [f"data=folder:{data}", "data.size=8", "data.channels=1", *TINY]
    trained = mezzotint("train", "digits", *words, "--out", run)
    assert trained.code == 0, trained.err
    files = ["--npz", tmp_path / "x\udcff.npz", "--out", tmp_path / "x\udcff.png"]
    drawn = mezzotint("sample", run, "--classes", "élan, caf\udce9, A[B]", *files, "--count", 3, "--steps", 1)
    assert drawn.code == 0, drawn.err
    import numpy as np

    names = sorted(["caf\udce9", "e\u0301lan", "a[b]"])
    with np.load(tmp_path / "x\udcff.npz") as file:
        assert [names[label] for label in file["arr_1"]] == ["e\u0301lan", "caf\udce9", "a[b]"]
    page = ["--features", "pixels", "--html", tmp_path / "page.html"]
    scored = mezzotint("evaluate", run, data, "--count", 6, "--steps", 1, *page)
    assert scored.code == 0, scored.err
    assert (tmp_path / "page.html").is_file()
    refused = mezzotint("train", "digits", *TINY, "--out", tmp_path / "run \udcff")
    assert (refused.code, "is not in UTF-8" in refused.err) == (2, True)
    assert not (tmp_path / "run \udcff").exists()


def test_what_stands_in_the_way_is_told_before_anything_is_drawn(
    mezzotint: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rather than when the images are there, and lost."""
    monkeypatch.setattr("mezzotint.pipeline.sample", None)
    for option in ("--out", "--levels", "--trajectory"):
        assert f"{tmp_path} is a folder; name the file to write" in mezzotint("sample", trained, option, tmp_path).err
    (tmp_path / "file").touch()
    assert "is a file; choose a folder" in mezzotint("sample", trained, "--png", tmp_path / "file").err
    monkeypatch.undo()
    for count in (3, 2):
        drawn = mezzotint("sample", trained, "--count", count, "--png", tmp_path / "png", "--out", tmp_path / "x.png")
        assert drawn.code == 0, drawn.err
    (said,) = caplog.messages
    assert said.endswith("png holds 1 other files, such as 000002.png, which stay beside the 2 images")


def test_a_path_that_no_file_system_has_is_not_repeated_by_the_page(mezzotint: Command) -> None:
    refused = mezzotint("sweep", "x" * 5000, "steps=1")
    assert refused.code == 2
    assert "File name too long" in refused.err
    assert len(refused.err) < 2100
