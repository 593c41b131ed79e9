"""The study of l-DAE: its cells are the paper's recipes made small, kept and resumed; and pictures of denoising."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Command
from PIL import Image
from test_ldae import STEPS
from torch import Tensor

import mezzotint
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.classifier import ClassifierNetwork
from mezzotint.evaluation.denoising import compare_noise, denoise, network_image
from mezzotint.pipeline import Pipeline, build
from mezzotint.recipe import Recipe, load_recipe
from mezzotint.representations.tokenizer import INFO
from mezzotint.samplers import example_generators, randn
from mezzotint.studies import ldae as ldae_study
from mezzotint.studies import perceptual
from mezzotint.studies.ldae import (
    FINAL,
    SCALES,
    TRAJECTORY,
    Cell,
    _tokenizer_folder,
    _with_tokenizer,
    accuracy_of,
    choose_cells,
    estimate,
    jobs_of,
    study,
    token_dimension,
)
from mezzotint.studies.report import PAPER
from mezzotint.training.loop import Log
from mezzotint.training.tokenizers import fit_tokenizer

PCA = "ldae-05c-patch-pca"
SMALL = (
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.heads=2",
    "training.steps=8",
    "training.warmup_steps=2",
    "training.batch_size=16",
    "training.checkpoint_every=4",
)
#: what a small data set may change of a recipe for ImageNet
MAY_DIFFER = re.compile(
    r"data\.(name|path|size|channels|flip|workers)|seed|representation\.(stride|channels)|representation\.fit\."
    r"(examples|steps|batch_size|widths|layers|groups|discriminator_.*|adversarial_start|perceptual_network)|"
    r"backbone\.(width|depth|heads)|training\.(steps|warmup_steps|batch_size|lr|ema|ema_warmup|checkpoint_every)"
)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {key: value for name, below in values.items() for key, value in flat(below, f"{prefix}{name}.").items()}


def differences(one: Recipe, other: Recipe) -> set[str]:
    a, b = (flat(recipe.model_dump(mode="json", exclude={"name", "description"})) for recipe in (one, other))
    return {key for key in a if a[key] != b[key]}


# ----------------------------------------------------------------------------------------------------------- the cells


@pytest.mark.parametrize("text", ["", "{", "[]", '{"psnr": 20.0}', '{"psnr": [], "explained_variance": 1}', "\0\xff"])
def test_a_tokenizer_whose_figures_are_damaged_is_one_sentence(text: str, tmp_path: Path) -> None:
    job = next(job for job in jobs_of("digits", tmp_path, seeds=[0]) if job.cell.recipe == PCA)
    folder = _tokenizer_folder(job)
    folder.mkdir(parents=True)
    (folder / INFO).write_text("{}")
    (folder / "metrics.json").write_text(text, encoding="latin-1")
    with pytest.raises(MezzotintError, match=r"metrics\.json is damaged; remove .* fits anew"):
        _with_tokenizer(job, "cpu")
    (folder / "metrics.json").write_text('{"psnr": 20.0, "explained_variance": 0.5}')
    assert _with_tokenizer(job, "cpu")[1] == {"psnr": 20.0, "explained_variance": 0.5}


@pytest.mark.parametrize("data", SCALES)
def test_cells_are_the_papers_recipes_made_small(data: str) -> None:
    """Nothing of what the paper compares is changed by the scale; and a cell's command makes the cell's recipe."""
    for job in jobs_of(data, "out", seeds=[3]):
        allowed = {"objective.noise_level"} if job.cell.group == "noise" else set()
        if job.recipe.backbone.num_classes or job.recipe.backbone.input == "image":
            allowed |= {"backbone.num_classes", "backbone.patch_size"}
        changed = differences(job.recipe, load_recipe(job.cell.recipe))
        assert {key for key in changed if not MAY_DIFFER.fullmatch(key)} <= allowed, job.name
        words = shlex.split(job.command)
        assert words[:2] == ["mezzotint", "train"]
        assert load_recipe(words[2], words[3:]) == job.recipe
        assert job.recipe.seed == 3
        assert job.recipe.training.warmup_steps * 4 == job.recipe.training.steps, "as 100 of 400 epochs"
        build(job.recipe)


@pytest.mark.parametrize("data", SCALES)
def test_steps_differ_in_the_study_by_what_the_paper_changed(data: str) -> None:
    recipes = {job.cell.name: job.recipe for job in jobs_of(data, "out", seeds=[0])}
    scale = {"representation.stride", "representation.channels", "backbone.patch_size", "representation.fit."}
    for name, before, paper in STEPS:
        changed = differences(recipes[name], recipes[before])
        extra = {key for key in changed - set(paper) if not key.startswith(tuple(scale))}
        assert not extra, name
        assert bool(changed - set(paper)) <= (name == "ldae-05a-patch-vae"), "where the tokenizer's kind changes"


@pytest.mark.parametrize("data", SCALES)
def test_labels_are_used_by_the_first_step_alone(data: str) -> None:
    recipes = {job.cell.name: job.recipe for job in jobs_of(data, "out", seeds=[0])}
    assert [name for name, recipe in recipes.items() if recipe.backbone.num_classes != 0] == ["ldae-00-dit"]
    perceptual = [name for name, recipe in recipes.items() if recipe.representation.fit.perceptual_weight]
    assert perceptual == ["ldae-00-dit", "ldae-01-no-classes"]


def test_cells_by_name_and_by_group() -> None:
    for data in SCALES:
        names = [cell.name for cell in choose_cells(data)]
        assert len(set(names)) == len(names) == 14 + 8 + 2
        assert [cell.name for cell in choose_cells(data, ["trajectory"])] == list(TRAJECTORY)
        assert len(choose_cells(data, ["dimension"])) == 4 * 3, "with those that the trajectory has"
        noise = [cell.name for cell in choose_cells(data, ["noise", PCA])]
        assert noise == [PCA, FINAL, "ldae-single-level", "ldae-single-level-sigma0.2", "ldae-single-level-sigma1"]


@pytest.mark.parametrize("data", SCALES)
def test_a_token_stands_for_as_many_numbers_whatever_the_tokenizer(data: str) -> None:
    scale = SCALES[data]
    found: dict[str, set[int]] = {}
    tokens = set()
    for job in jobs_of(data, "out", seeds=[0]):
        if job.cell.group != "noise":
            found.setdefault(job.recipe.representation.name, set()).add(token_dimension(job.recipe))
        tokens.add(job.recipe.input_shape[1] // job.recipe.backbone.patch_size)
    assert all(dimensions == set(scale.dimensions) for dimensions in found.values()), found
    assert len(tokens) == 1


def test_papers_figures_are_those_of_the_recipes() -> None:
    assert list(PAPER) == list(TRAJECTORY)
    for name, figure in PAPER.items():
        assert f"{figure} %" in load_recipe(name).description


# --------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.evaluation.probe.MIN_STEPS", 5)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes Ctrl-C come after so many steps in all; the steps that are taken are listed."""

    def arm(after: int) -> list[int]:
        taken: list[int] = []
        advance = Log.advance

        def watched(self: Log, step: int) -> None:
            taken.append(step)
            advance(self, step)
            if len(taken) == after:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Log, "advance", watched)
        return taken

    return arm


def test_study_goes_on_where_it_was_interrupted(
    quick: None, interrupt: Callable[[int], list[int]], command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    words = ("study", "ldae", "--data", "digits", "--seeds", "0", "--cells", f"{PCA},{FINAL}", *SMALL)
    taken = interrupt(8 + 5)
    stopped = command(*words, "--out", out)
    assert stopped.code == 130
    assert f"stopped; continue with: mezzotint study ldae {' '.join(SMALL)} --data digits" in stopped.err
    assert [path.name for path in (out / "cells").iterdir()] == [f"{PCA}-seed0.json"]
    first = out / "cells" / f"{PCA}-seed0.json"
    before = first.stat().st_mtime_ns
    whole = command(*words, "--out", out)
    assert whole.code == 0, whole.err
    assert "1 of 2 cells to do: about 0 minutes, 1 process(es) of 1 thread(s)" in whole.err
    assert taken == [*range(1, 9), *range(1, 9)], "no step twice"
    assert first.stat().st_mtime_ns == before
    assert not list(out.glob("runs/*/state"))
    assert len(list((out / "tokenizers").iterdir())) == 1, "both cells have the same"

    cells = {path.stem: json.loads(path.read_text())["result"] for path in (out / "cells").iterdir()}
    final = cells[f"{FINAL}-seed0"]
    layers = {(row["layer"], row["t"]) for row in final["rows"]}
    assert layers == {("1", 0.01), ("2", 0.01), ("1", 0.0), ("1", 0.02), ("1", 0.04), ("1", 0.08)}
    page = (out / "study.md").read_text()
    assert page.strip() == whole.out.strip()
    for name in (PCA, FINAL):
        row = cells[f"{name}-seed0"]
        figures = [f"{100 * accuracy_of(row, probe):.1f}" for probe in ("linear", "knn")]
        assert f"| {name} | {PAPER[name]} | {' | '.join(figures)} |" in page
    for picture in ("trajectory", "ablations", "denoised", "noise"):
        with Image.open(out / "figures" / f"{picture}.png") as shown:
            assert min(shown.size) > 100

    others = study("digits", tmp_path / "other", seeds=[0], cells=[FINAL], overrides=SMALL)
    assert others[0]["rows"] == final["rows"], "as without the interruption"
    assert others[0]["command"] == final["command"]
    assert "was made with other settings" in command(*words, "training.lr=1", "--out", out).err
    taken.clear()
    assert len(study("digits", out, seeds=[0], cells=[PCA, FINAL], overrides=SMALL)) == 2
    assert taken == []


def test_a_cut_off_cell_is_made_again(quick: None, tmp_path: Path) -> None:
    rows = study("digits", tmp_path, seeds=[0], cells=[PCA], overrides=SMALL)
    file = tmp_path / "cells" / f"{PCA}-seed0.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    again = study("digits", tmp_path, seeds=[0], cells=[PCA], overrides=SMALL)
    assert again[0]["rows"] == rows[0]["rows"]


def test_processes_make_the_same_cells(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # spawned processes take ten seconds to import everything
    monkeypatch.setattr("mezzotint.studies.ldae.get_context", lambda _: fork)
    rows = [study("digits", tmp_path / str(n), seeds=[0, 1], cells=[PCA], overrides=SMALL, processes=n) for n in (2, 1)]
    assert [row["seed"] for row in rows[0]] == [0, 1]
    assert [row["rows"] for row in rows[0]] == [row["rows"] for row in rows[1]]
    assert rows[0][0]["rows"] != rows[0][1]["rows"]


def test_estimate_counts_a_shared_tokenizer_once_and_writes_nothing(tmp_path: Path, command: Command) -> None:
    cells = [PCA, "ldae-06-clean-data", "ldae-05b-patch-ae"]
    jobs = jobs_of("digits", tmp_path, seeds=[0], cells=cells, overrides=SMALL)
    found = estimate(jobs, device="cpu")
    assert set(found) == {job.name for job in jobs}
    assert all(parts["training"] > 0 and parts["probes"] > 0 for parts in found.values())
    assert found["ldae-06-clean-data-seed0"]["tokenizer"] == 0 < found[f"{PCA}-seed0"]["tokenizer"]
    shown = command("study", "ldae", "--data", "digits", "--seeds", 1, "--cells", PCA, "--plan", "--out", tmp_path)
    assert shown.code == 0, shown.err
    assert f"{PCA}-seed1" in shown.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["study", "ldea"], "study 'ldea' is unknown; known: ldae"),
        (["study", "ldae", "--data", "digitz"], "no scale for the data set 'digitz'; closest: digits"),
        (["study", "ldae", "--cells", "ldae-05c-pach-pca"], "cell 'ldae-05c-pach-pca' is unknown; closest: ldae-05c-p"),
        (["study", "ldae", "--seeds", "0;1"], "--seeds '0;1' is not whole numbers with commas between"),
        (["study", "ldae", "--seeds", "1,1"], "seeds are different numbers from 0 upwards"),
        (["study", "ldae", "--seeds=-1"], "seeds are different numbers from 0 upwards"),
        (["study", "ldae", "training.stps=3"], "key 'training.stps' is unknown; closest: steps"),
        (["study", "ldae", "seed=3"], "override 'seed=3' is the study's own; use --seeds and --data"),
        (["study", "ldae", "data=digits"], "override 'data=digits' is the study's own"),
    ],
)
def test_bad_studies(command: Command, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    result = command(*arguments, "--out", tmp_path / "study")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "study").exists()


# ---------------------------------------------------------------------------------------------------------- denoising


def ldae(tmp_path: Path, *overrides: str) -> Pipeline:
    """The final l-DAE on digits, with a fitted PCA and a network that is not trained, but gives no zeros."""
    job = next(job for job in jobs_of("digits", tmp_path, overrides=(*SMALL, *overrides)) if job.cell == Cell(FINAL))
    fit_tokenizer(job.recipe, tmp_path / "pca", quiet=True)
    settings = job.recipe.representation.model_copy(update={"path": str(tmp_path / "pca")})
    pipeline = build(job.recipe.model_copy(update={"representation": settings}))
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return pipeline


def test_the_image_of_an_image_network_is_its_output(tmp_path: Path) -> None:
    pipeline, given = ldae(tmp_path), []
    pipeline.denoiser.backbone.register_forward_hook(lambda *arguments: given.append(arguments[2]))
    x = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network_image(pipeline, pipeline.denoiser(x, 0.2))
    torch.testing.assert_close(found, given[0], atol=1e-5, rtol=1e-5)


def test_probes_of_a_study_have_the_seed_of_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def asked(pipeline: Any, **options: Any) -> dict[str, Any]:
        given.append(options)
        return {"rows": [], "train_images": 0, "test_images": 0}

    monkeypatch.setattr(ldae_study, "train", lambda *_, **__: None)
    monkeypatch.setattr(ldae_study, "_with_tokenizer", lambda job, device: (job.recipe, {}))
    monkeypatch.setattr(ldae_study, "probe", asked)
    job = next(job for job in jobs_of("digits", tmp_path, seeds=[7]) if job.cell.recipe == PCA)
    ldae_study._finish(job, "cpu")
    assert [options["seed"] for options in given] == [7]


def test_noise_in_pixels_is_as_much_as_in_latents(tmp_path: Path) -> None:
    """Of d orthonormal components of D, each with noise of σ·scale, the mean square in pixels is (σ·scale)²·d/D."""
    pipeline = ldae(tmp_path)
    space: Any = pipeline.representation
    images = 0.1 * torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    t = 0.02
    in_pixels, in_latents = compare_noise(pipeline, images, t, seed=5)
    expected = (2**0.5 * t * space.latent_scale.item()) ** 2 * 8 / 16
    for noised, clean in ((in_pixels, images), (in_latents, space.decode(space.encode(images)))):
        assert (noised - clean).square().mean().item() == pytest.approx(expected, rel=0.05)
    for one, other in zip(compare_noise(pipeline, images, t, seed=6), (in_pixels, in_latents), strict=True):
        assert not torch.allclose(one, other, atol=1e-3)


class TrueNoise(torch.nn.Module):
    """A backbone that knows the noise of `denoise`."""

    num_classes, in_channels, input_size = 0, 1, (8, 8)

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.weight = seed, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return randn(x.shape, example_generators(self.seed, range(len(x))), device=x.device)


def test_who_knows_the_noise_denoises_exactly(tiny: Recipe) -> None:
    recipe = tiny.model_copy(update={"target": "noise"})
    pipeline = build(recipe)
    pipeline.denoiser.backbone = TrueNoise(seed=7)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for t in (0.0, 0.3, 0.9):
        noisy, denoised = denoise(pipeline, images, t, seed=7)
        torch.testing.assert_close(denoised, images, atol=1e-4, rtol=0)
        eps = randn(images.shape, example_generators(7, range(5)), device="cpu")
        torch.testing.assert_close(noisy, ((1 - t) * images + t * eps).clamp(-1, 1))
    with pytest.raises(MezzotintError, match=r"at t = 1 this model's noise does not tell the data; choose a t from 0"):
        denoise(pipeline, images, 1.0)
    with pytest.raises(MezzotintError, match="outside of"):
        denoise(pipeline, images, 1.5)


def test_denoise_command(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mezzotint.train(load_recipe("digits", [*TINY, "training.steps=1"]), run, quiet=True)
    shown = command("denoise", run, "--t", 0.2, "--t", 0.5, "--count", 3)
    assert shown.out.split() == [str(run / "denoised.png")]
    with Image.open(run / "denoised.png") as picture:
        assert picture.size == (3 * 50 + 2, 5 * 50 + 2), "3 columns; clean, and twice noisy and denoised"
    refused = command("denoise", run, "--noise", tmp_path / "noise.png")
    assert refused.code == 2
    assert "the model's representation is pixels; noise in latents is shown of patch-pca" in refused.err


# --------------------------------------------------------------------------------------------------------- perceptual


def test_perceptual_network_is_fitted_on_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassifierNetwork, "fit", partial(ClassifierNetwork.fit, seen=0))
    perceptual._classifier.cache_clear()
    images = torch.zeros(2, 1, 8, 8, requires_grad=True)
    maps = perceptual.digits(images)
    assert [tuple(found.shape) for found in maps] == [(2, 24, 8, 8), (2, 48, 4, 4), (2, 48, 4, 4), (2, 96, 2, 2)]
    maps[-1].sum().backward()
    assert images.grad is not None
    found = perceptual._classifier(perceptual.DataSettings(name="digits", size=8))
    assert "train" in found.fitted_on
    assert not any(parameter.requires_grad for parameter in found.net.parameters())
    assert found.tested is not None
    assert found.tested > 0.9
    perceptual._classifier.cache_clear()


def test_a_process_of_a_study_shows_its_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), ldae_study._begin, (1,)) as pool:
        pool.submit(warnings.warn, "of a process").result()
    assert capfd.readouterr().err == "warning: of a process\n"
