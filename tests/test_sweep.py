"""Sweeps: the grid, what a cell costs and scores, going on after a kill, and what comes out."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import mezzotint
from mezzotint.cli.sweep import sweep_table
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import FeatureNetwork, extract
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.scores import figures
from mezzotint.evaluation.sources import PipelineSource, image_source
from mezzotint.evaluation.sweep import frechet_name, parse_axes, plot_sweep, sweep, sweep_pictures
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.recipe import Recipe, override_recipe
from mezzotint.samplers import Sampler


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))


def random_pipeline(recipe: Recipe, *overrides: str, classes: int = 10) -> mezzotint.Pipeline:
    """A network of random weights, so that guidance, times and classes all show in its samples."""
    made = mezzotint.build(override_recipe(recipe, [f"backbone.num_classes={classes}", *overrides]))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made


@pytest.fixture
def pipeline(tiny: Recipe) -> mezzotint.Pipeline:
    return random_pipeline(tiny)


def compute(images: Tensor) -> dict[str, Tensor]:
    features = images.flatten(1)[:, 20:28].float()
    return {"features": features, "logits": features[:, :5]}


NETWORK = FeatureNetwork("classifier (of the tests)", compute, dim=8)


def run(pipeline: mezzotint.Pipeline, out: Path, axes: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return sweep(pipeline, out, axes, **{"features": NETWORK, "count": 20, "plots": False, **options})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The samplers of the sources that are drawn while the test runs."""
    calls: list[str] = []
    batches = PipelineSource.batches

    def watched(self: PipelineSource, *arguments: Any, **options: Any) -> Iterator[Any]:
        calls.append(self.options["sampler"])
        yield from batches(self, *arguments, **options)

    monkeypatch.setattr(PipelineSource, "batches", watched)
    return calls


# ---- The grid --------------------------------------------------------------------------------------------------------


def test_axes_are_read() -> None:
    words = ["sampler=ddpm,sde-sigma", "steps=10,25", "guidance.interval=[0, 1],[0.2,0.8]", "guidance.channels=null,1"]
    axes, overrides = parse_axes([*words, "representation.path=vae", "data=folder:x,y"])
    assert axes == {
        "sampler": ["ddpm", "sde-sigma"],
        "steps": [10, 25],
        "guidance.interval": [[0, 1], [0.2, 0.8]],
        "guidance.channels": [None, 1],
    }
    assert overrides == ["representation.path=vae", "data=folder:x,y"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["steps"], "axis 'steps' is not of the form name=value,value"),
        (["=3"], "axis '=3' is not of the form"),
        (["steps=10,,20"], "axis 'steps=10,,20' is not of the form"),
        (["steps=10", "steps=20"], "axis 'steps' is given twice"),
        (["steps={"], "the values of axis 'steps={' are not valid YAML"),
        (["steps=10", "sampling.steps=20"], r"axis 'sampling\.steps' is given twice"),
        (["stepz=10"], "axis 'stepz' is unknown; closest: steps; expected sampler, steps, guidance, or a key of"),
        (["sampling.etta=1"], r"key 'sampling\.etta' is unknown; closest: eta"),
        (["sampler=ddpm,dppm"], "sampler 'dppm' is unknown; closest: ddpm"),
        (["sampler=ddpm", "steps=10,0"], r"sampling\.steps = 0 is not valid"),
        (["guidance=-1"], r"guidance\.scale = -1 is not valid"),
        (["guidance.interval=[1,0]"], r"guidance\.interval must be two times"),
        ([], "a sweep needs at least one axis"),
        (["sampler=sde-sigma", "steps=1"], "no combination of these values has a meaning for this model: sampling.st"),
        (["guidance.channels=3"], r"no combination .*: guidance\.channels is 3, but the model has 1 channel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_before_anything_is_drawn(
    pipeline: mezzotint.Pipeline, tmp_path: Path, drawn: list[str], words: list[str], sentence: str
) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        run(pipeline, tmp_path, parse_axes(words)[0])
    assert drawn == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [({"backbone.width": [8]}, "axis 'backbone.width' is unknown; expected"), ({"steps": []}, "has no values")],
)
def test_mistakes_in_python(pipeline: mezzotint.Pipeline, tmp_path: Path, axes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        run(pipeline, tmp_path, axes)
    with pytest.raises(MezzotintError, match="at least 2 samples, got a count of 1"):
        run(pipeline, tmp_path, {"steps": [2]}, count=1)


# ---- Cells -----------------------------------------------------------------------------------------------------------

SAMPLERS = ["ddpm", "ddim", "ode-euler", "ode-heun", "ode-rk4", "sde-sigma", "sde-heun-linear", "dpm-solver++"]


def test_a_cell_is_what_evaluate_finds_and_its_cost_is_counted(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    axes = {"sampler": SAMPLERS, "steps": [3], "guidance": [0, 1, 2]}
    rows = run(pipeline, tmp_path, axes, batch_size=8)
    assert [(row["sampler"], row["steps"], row["guidance"]) for row in rows] == [
        (sampler, 3, scale) for sampler in SAMPLERS for scale in (0, 1, 2)
    ]
    real = reference_statistics(pipeline.recipe.data, NETWORK, rows=10_000)
    for row in rows:
        settings = {"sampler": row["sampler"], "steps": row["steps"]}
        model = ConditionalModel(pipeline.denoiser, torch.zeros(1).long(), Guidance(scale=row["guidance"]))
        assert row["evaluations"] == Sampler.parse(settings).evaluations(model)
        assert row["network passes"] == row["evaluations"] * (2 if row["guidance"] == 2 else 1)
        assert row["seconds per image"] > 0
        assert row["note"] == ""
    row = rows[-1]
    seen = extract(image_source(pipeline, count=20, guidance=2.0, **settings), NETWORK, batch_size=8, keep_rows=None)
    expected = figures(seen, real)
    assert expected.pop("source").startswith("digits-1x8x8-samples-20-seed-0")
    assert seen.logits is not None
    assert seen.labels is not None
    expected["class agreement"] = (seen.logits.argmax(1) == seen.labels).double().mean().item()
    assert {name: row[name] for name in expected} == expected
    assert list(row) == [
        *("sampler", "steps", "guidance", "note", "evaluations", "network passes", "seconds per image"),
        *expected,
    ]


def test_the_calls_of_an_adaptive_solver_are_counted(
    pipeline: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, sizes = pipeline.denoiser.backbone.forward, []

    def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        sizes.append(len(x))
        return inner(x, *arguments, **options)

    monkeypatch.setattr(pipeline.denoiser.backbone, "forward", forward)
    rows = run(pipeline, tmp_path, {"sampler": ["ode-dopri5"], "sampling.rtol": [0.5, 0.02]}, batch_size=3, count=4)
    assert rows[0]["network passes"] + rows[1]["network passes"] == sum(sizes) / 4
    assert rows[0]["evaluations"] < rows[1]["evaluations"]
    sizes.clear()
    axes = {"sampler": ["ode-dopri5"], "sampling.rtol": [0.1], "guidance": [2], "guidance.interval": [[0.2, 0.6]]}
    [row] = run(pipeline, tmp_path, axes, count=4)
    assert row["network passes"] == sum(sizes) / 4
    assert row["evaluations"] < row["network passes"] < 2 * row["evaluations"], "guided within the interval alone"


def test_combinations_without_a_meaning_are_noted(tiny: Recipe, tmp_path: Path, drawn: list[str]) -> None:
    model = random_pipeline(tiny, "interpolant=cosine", "interpolant.num_steps=20", "target=noise", classes=0)
    axes = {"sampler": ["ddpm", "ode-euler"], "sampling.spacing": ["uniform", "ddim"], "steps": [8, 5]}
    notes = {(row["sampler"], row["sampling.spacing"], row["steps"]): row["note"] for row in run(model, tmp_path, axes)}
    assert notes.pop(("ode-euler", "ddim", 8)) == notes.pop(("ode-euler", "ddim", 5))
    assert "cannot make exactly 8 steps of 20 with a whole stride" in notes.pop(("ddpm", "ddim", 8))
    assert set(notes.values()) == {""}
    rows = run(model, tmp_path, {"guidance": [1, 4]})
    assert [row["note"] for row in rows][1].startswith("guidance.scale 4.0 needs a conditional model")
    assert "evaluations" not in rows[1]
    # What only drawing finds out ends the cell, not the sweep.
    rows = run(model, tmp_path, {"sampler": ["ddpm"], "sampling.variance": ["learned", "upper"]})
    assert [row["note"] for row in rows] == [
        "sampling.variance is 'learned', but this model has none; use lower or upper",
        "",
    ]
    with pytest.raises(MezzotintError, match=r"no cell could be scored: .*variance is 'learned'"):
        run(model, tmp_path, {"sampler": ["ddpm"], "sampling.variance": ["learned"]})


def test_the_same_images_are_drawn_once(pipeline: mezzotint.Pipeline, tmp_path: Path, drawn: list[str]) -> None:
    rows = run(pipeline, tmp_path, {"sampler": ["ddim", "ode-euler"], "sampling.eta": [0, 0.5], "steps": [3]})
    assert drawn == ["ddim", "ddim", "ode-euler"]
    assert [row["note"] for row in rows] == ["", "", "", "the same images as with sampling.eta=0.0"]
    assert rows[3] == {**rows[2], "sampling.eta": 0.5, "note": rows[3]["note"]}
    rows = run(pipeline, tmp_path, {"sampler": ["ode-dopri5"], "steps": [3, 9], "sampling.rtol": [0.1]})
    assert drawn[3:] == ["ode-dopri5"]
    assert rows[1]["note"] == "the same images as with steps=3"
    images = [mezzotint.sample(pipeline, count=2, sampler="ode-dopri5", steps=steps) for steps in (3, 9)]
    assert torch.equal(*images)
    rows = run(pipeline, tmp_path, {"guidance.interval": [[0, 1], [0, 0.5]], "guidance": [1, 3], "steps": [3, 3]})
    assert [row["guidance"] for row in rows] == [1, 3, 1, 3]
    assert [row["note"] for row in rows] == ["", "", "the same images as with guidance.interval=(0.0, 1.0)", ""]


# ---- Going on --------------------------------------------------------------------------------------------------------


def test_finished_cells_are_kept(pipeline: mezzotint.Pipeline, tmp_path: Path, drawn: list[str]) -> None:
    first = run(pipeline, tmp_path, {"sampler": ["ddim"], "steps": [2, 3]})
    assert len(drawn) == 2
    assert run(pipeline, tmp_path, {"steps": [2, 3], "sampler": ["ddim"]}, batch_size=7) == first
    assert len(drawn) == 2
    larger = run(pipeline, tmp_path, {"sampler": ["ddim", "ode-euler"], "steps": [2, 3, 4]})
    assert drawn[2:] == ["ddim", "ode-euler", "ode-euler", "ode-euler"]
    assert [row for row in larger if row in first] == first
    assert len(list((tmp_path / "sweep").iterdir())) == 6
    # All that the figures depend on makes another cell.
    one: dict[str, Any] = {"sampler": ["ddim"], "steps": [2]}
    pixels = FeatureNetwork("other", lambda images: images.flatten(1)[:, 20:25].float())
    for options in ({"seed": 1}, {"count": 21}, {"features": pixels}, {"reference": image_source("digits", count=99)}):
        drawn.clear()
        run(pipeline, tmp_path, one, **options)
        assert len(drawn) == 1, options
    with torch.no_grad():
        next(pipeline.denoiser.parameters()).add_(1e-3)
    assert run(pipeline, tmp_path, one) != first[:1]


def test_the_weights_of_a_feature_network_are_asked_for(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match="my-inception"):
        sweep(
            pipeline, tmp_path, {"steps": [2]}, features="inception", weights=tmp_path / "my-inception.pth", plots=False
        )


def test_an_interrupted_sweep_goes_on(
    pipeline: mezzotint.Pipeline, tmp_path: Path, drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"sampler": ["ddim", "ode-euler", "ode-heun"], "steps": [2]}

    class Stopping(FeatureNetwork):
        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            if drawn == ["ddim", "ode-euler"]:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path, axes, features=Stopping(NETWORK.name, compute, dim=8))
    assert len(list((tmp_path / "sweep").iterdir())) == 1
    assert not (tmp_path / "sweep.csv").exists()
    drawn.clear()
    rows = run(pipeline, tmp_path, axes)
    assert drawn == ["ode-euler", "ode-heun"]
    file = sorted((tmp_path / "sweep").iterdir())[0]
    file.write_text(file.read_text()[:-20])  # a damaged one is scored anew
    drawn.clear()
    again = run(pipeline, tmp_path, axes)
    assert len(drawn) == 1
    timing = "seconds per image"
    assert [{**row, timing: 0} for row in again] == [{**row, timing: 0} for row in rows]


def test_the_reference_is_looked_at_once(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    seen: list[int] = []

    def looking(images: Tensor) -> dict[str, Tensor]:
        seen.append(len(images))
        return compute(images)

    network = FeatureNetwork("looking", looking, dim=8, cacheable=False)
    run(pipeline, tmp_path, {"sampler": ["ddim"], "steps": [2, 3, 4]}, features=network)
    assert sum(seen) == 899 + 3 * 20


SHARED = """
import sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import TINY
from mezzotint.recipe import load_recipe
from mezzotint.training.parallel import world
from test_sweep import random_pipeline, run
torch.set_num_threads(1)
with world("cpu"):
    rows = run(random_pipeline(load_recipe("digits", TINY)), Path(sys.argv[1]), {"sampler": ["ddim", "ode-heun"]},
               batch_size=4, progress=True)
    assert len(rows) == 2
"""


def test_processes_share_a_cells_batches(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text(SHARED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(tmp_path / "shared.py"), str(tmp_path / "two"), str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, env=os.environ | settings | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    rows = run(pipeline, tmp_path / "one", {"sampler": ["ddim", "ode-heun"]}, batch_size=4)
    with open(tmp_path / "two" / "sweep.csv", newline="") as file:
        for ours, theirs in zip(rows, csv.DictReader(file), strict=True):
            assert (ours["sampler"], str(ours["evaluations"])) == (theirs["sampler"], theirs["evaluations"])
            assert float(theirs["FD-classifier"]) == pytest.approx(ours["FD-classifier"], rel=1e-9)


# ---- What comes out --------------------------------------------------------------------------------------------------


def test_table_file_and_pictures(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    axes = {"sampler": ["sde-sigma", "ode-heun"], "steps": [1, 3], "guidance": [1, 2], "sampling.eps": [0.01, 0.1]}
    rows = run(pipeline, tmp_path, axes, plots=True)
    with open(tmp_path / "sweep.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows) == 16
    assert list(read[0])[:4] == ["sampler", "steps", "guidance", "sampling.eps"]
    assert list(read[0])[-1] == "note"
    for ours, theirs in zip(rows, read, strict=True):
        assert theirs == {name: str(ours.get(name, "")) for name in theirs}
    assert all("must be at least 2 for sde" in row["note"] for row in read[:4])
    table = sweep_table(rows)
    assert "1: sampling.steps must be at least 2 for sde with this model" in table.notes[0]
    assert f"{rows[-1]['FD-classifier']:.0f}" in table.rows[-1]
    pictures = sweep_pictures(tmp_path)
    assert [path.name for path in pictures] == ["sweep-FD-classifier.png", "sweep-FD-classifier-guidance.png"]
    for path in pictures:
        with Image.open(path) as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
            assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours, "two lines in matplotlib's first two colours"
    before = pictures[0].read_bytes()
    run(pipeline, tmp_path, {"sampler": ["ode-heun"], "steps": [3], "sampling.eps": [0.01]}, plots=True)
    assert [path.name for path in sweep_pictures(tmp_path)] == ["sweep-FD-classifier.png"]
    assert pictures[0].read_bytes() != before


def test_what_a_finished_cell_says(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    [row] = run(pipeline, tmp_path, {"sampler": ["ddim"], "steps": [2], "guidance": [3]})
    [file] = (tmp_path / "sweep").iterdir()
    held = json.loads(file.read_text())
    assert held["settings"]["sampler"] == {"sampler": "ddim", "steps": 2, "spacing": "uniform", "eta": 0.0, "eps": 1e-3}
    assert held["settings"]["guidance"]["scale"] == 3
    assert (held["settings"]["features"], held["settings"]["reference_images"]) == (NETWORK.name, 899)
    assert held["figures"] == {name: value for name, value in row.items() if name in held["figures"]}


def test_without_matplotlib(
    pipeline: mezzotint.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MezzotintError, match=r"needs? the package matplotlib; install it with: pip install 'mezzotint\[e"
    ):
        run(pipeline, tmp_path, {"steps": [2]}, plots=True)
    assert drawn == []
    assert run(pipeline, tmp_path, {"steps": [2]})[0]["evaluations"] == 4
    assert sweep_pictures(tmp_path) == []


def test_names_and_nothing_to_draw(tmp_path: Path) -> None:
    assert frechet_name(["steps", "FD-dinov2 at N = ∞", "FD-a.b:c", "KID"]) == "FD-a.b:c"
    assert frechet_name(["steps", "FID", "FID, 95 % interval"]) == "FID"
    assert frechet_name(["FD-clip, 95 % interval"]) is None
    assert plot_sweep([{"sampler": "ddpm", "steps": 1, "guidance": 1.0, "note": "why"}], tmp_path) == []
    assert sweep_pictures(tmp_path / "nowhere") == []
    row = {"sampler": "ddpm", "steps": 1, "guidance": 1.0, "evaluations": 1.0, "FD-a.b:c": 2.0, "note": ""}
    many = [{**row, "guidance": float(scale), "FD-a.b:c": 3.0**scale} for scale in range(6)]
    written = plot_sweep(many, tmp_path, "$x")
    assert [path.name for path in written] == ["sweep-FD-a.b-c.png", "sweep-FD-a.b-c-guidance.png"]


def test_a_cells_images_are_those_of_sample(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    kept: list[Tensor] = []

    def keeping(images: Tensor) -> dict[str, Tensor]:
        kept.append(images)
        return compute(images)

    network = FeatureNetwork("keeping", keeping, dim=8)
    run(pipeline, tmp_path, {"sampler": ["ode-rk4"], "steps": [2], "guidance": [2]}, features=network, seed=3)
    expected = to_uint8(mezzotint.sample(pipeline, count=20, sampler="ode-rk4", steps=2, guidance=2.0, seed=3))
    assert torch.equal(kept[-1], expected)
