"""What `evaluate` puts together: names, sets, references, and one result from any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Command
from PIL import Image

import mezzotint
from mezzotint.cli.models import warn_of_held_out
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import FeatureNetwork, extract
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.scores import data_settings, evaluate, figures, mean_bits_per_dim
from mezzotint.evaluation.sources import image_source
from mezzotint.recipe import DataSettings


def means(images: torch.Tensor) -> torch.Tensor:
    """Four features, the means of the quarters, so that few samples have a covariance of full rank."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_a_figure_is_named_after_its_features(pipeline: mezzotint.Pipeline) -> None:
    """Distances in different networks never share a name; FID and KID are Inception's alone."""
    images = image_source("digits", count=50)
    names = {}
    for kind in ("inception-v3 (2015 TensorFlow graph, test)", "quarters (test)"):
        network = FeatureNetwork(kind, means, cacheable=False)
        real = reference_statistics("digits", network, rows=50)
        names[kind] = set(figures(extract(images, network, keep_rows=50), real))
    first, second = names.values()
    assert {"FID", "KID"} <= first
    assert {"FD-quarters", "KD-quarters"} <= second
    assert not {"FID", "KID"} & second


def test_features_of_two_networks_are_not_compared() -> None:
    images = image_source("digits", count=50)
    one, other = (FeatureNetwork(name, means, cacheable=False) for name in ("one (1)", "other (2)"))
    with pytest.raises(MezzotintError, match=r"seen by one \(1\), the reference by other \(2\)"):
        figures(extract(images, one), reference_statistics("digits", other))


def test_real_data_stand_beside_the_samples(pipeline: mezzotint.Pipeline) -> None:
    """As many training images as there are samples; they are nearer to the held-out ones than noise is."""
    network = FeatureNetwork("quarters (test)", means, cacheable=False)
    scores = evaluate(pipeline, features=network, count=120, guidance=2.0, steps=2)
    assert list(scores["sets"]) == ["samples", "guided", "real"]
    assert {values["images"] for values in scores["sets"].values()} == {120}
    assert scores["sets"]["real"]["FD-quarters"] < 0.1 * scores["sets"]["samples"]["FD-quarters"]
    assert scores["reference_images"] == 899
    assert scores["features"] == "quarters (test)"
    json.dumps(scores)


def test_intervals_and_infinity_belong_to_the_distance(pipeline: mezzotint.Pipeline) -> None:
    network = FeatureNetwork("quarters (test)", means, cacheable=False)
    images = image_source("digits", split="train", count=400)
    scores = evaluate(images, "digits", features=network, intervals=60, infinity=True)["sets"]["samples"]
    low, high = scores["FD-quarters, 95 % interval"]
    assert low < high
    assert scores["FD-quarters at N = ∞"] < scores["FD-quarters"], "the bias of few samples is taken out"


def scored(pipeline: mezzotint.Pipeline, **options: object) -> dict[str, object]:
    network = FeatureNetwork("quarters (test)", means, cacheable=False)
    with torch.no_grad():  # a flow that is solved in a few steps
        for name, parameter in mezzotint.build(pipeline.recipe).denoiser.named_parameters():
            generator = torch.Generator().manual_seed(0)
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            pipeline.denoiser.get_parameter(name).copy_(parameter + noise)
    asked = {"features": network, "count": 40, "guidance": 2.0, "steps": 2, "intervals": 10, "likelihood": 3} | options
    return evaluate(pipeline, **asked)  # type: ignore[arg-type]


@pytest.fixture
def usual(pipeline: mezzotint.Pipeline) -> dict[str, object]:
    return scored(pipeline)


@pytest.mark.parametrize(
    ("option", "value", "where"),
    [
        ("count", 30, "samples guided"), ("guidance", 3.0, "guided"), ("steps", 3, "samples guided"),
        ("sampler", "ddim", "samples guided"), ("seed", 1, "samples guided bits_per_dim"),
        ("intervals", 20, "samples guided"), ("rows", 20, "samples guided"), ("infinity", True, "samples guided"),
        ("likelihood", 4, "bits_per_dim"), ("batch_size", 2, ""),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_is_of_its_figures(
    pipeline: mezzotint.Pipeline, usual: dict[str, Any], option: str, value: object, where: str
) -> None:
    """Samples, guided samples and bits per dimension change where they depend on it, and nowhere else."""
    found: dict[str, Any] = scored(pipeline, **{option: value})

    def figures_of(scores: dict[str, Any]) -> dict[str, Any]:
        sets = {name: dict(scores["sets"][name]) for name in ("samples", "guided")}
        for values in sets.values():
            values.pop("source")
            values["low"], values["high"] = values.pop("FD-quarters, 95 % interval")
        return {**sets, "bits_per_dim": scores["bits_per_dim"]}

    before, after = figures_of(usual), figures_of(found)
    changed = {name for name in before if after[name] != pytest.approx(before[name], rel=1e-5)}
    assert changed == set(where.split())


def test_rows_are_those_of_every_figure_that_looks_at_single_images(pipeline: mezzotint.Pipeline) -> None:
    """For an extrapolation all of them are kept, but not looked at by the others."""
    more = {"guidance": None, "intervals": 0, "likelihood": 0, "rows": 20}
    one, other = (scored(pipeline, **more, infinity=infinity)["sets"]["samples"] for infinity in (False, True))  # type: ignore[index]
    for name in ("precision", "recall", "density", "coverage", "KD-quarters"):
        assert one[name] == pytest.approx(other[name])


def test_bits_per_dimension_are_those_of_the_class(pipeline: mezzotint.Pipeline) -> None:
    scored(pipeline, likelihood=0, guidance=None, count=4)  # makes its flow an easy one
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = [mean_bits_per_dim(pipeline, images, labels)["bits_per_dim"] for labels in (None, torch.tensor([1, 2, 3]))]
    assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_the_weights_of_a_feature_network_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match="my-inception"):
        evaluate("digits", "digits", features="inception", weights=tmp_path / "my-inception.pth")


def test_a_folder_is_seen_on_the_background_of_the_data_that_it_is_compared_with(tmp_path: Path) -> None:
    """Transparent pictures, which both show as red, and so at no distance."""
    levels = np.zeros((12, 8, 8, 4), np.uint8)
    levels[:, :4, :, 3] = np.arange(12)[:, None, None] * 20
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number, pixels in enumerate(levels):
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.png")
    settings = {"name": "folder", "path": str(tmp_path), "labels": False, "size": 8, "channels": 3}
    network = FeatureNetwork("quarters (test)", means, channels=3, cacheable=False)
    red = DataSettings.parse(settings | {"background": "red"})
    assert evaluate(tmp_path / "test", red, features=network)["sets"]["samples"]["FD-quarters"] == pytest.approx(
        0, abs=1e-6
    )


def test_the_inception_score_does_not_depend_on_the_order_of_the_classes() -> None:
    """Samples come sorted by class; split in that order, ten splits would hold one class each and score 1."""

    def sorted_classes(images: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = images[:, 0, 0, 0].long()
        return {"features": means(images), "logits": 50.0 * torch.nn.functional.one_hot(labels, 10).float()}

    classes = np.repeat(np.arange(10, dtype=np.uint8), 600)
    array = np.broadcast_to(classes[:, None, None, None], (6000, 4, 4, 3))
    path = Path(os.environ["MEZZOTINT_CACHE"]) / "sorted.npz"
    np.savez(path, arr_0=array)
    network = FeatureNetwork("sorted (test)", sorted_classes, cacheable=False)
    seen = extract(image_source(path), network)
    score = figures(seen, reference_statistics(path, network))
    assert score["Inception score (sorted)"] == pytest.approx(10, rel=0.01)
    assert "Inception score (sorted), std over 10 splits" in score


def test_processes_share_the_work_and_find_the_same(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(pipeline.recipe.to_yaml())
    mezzotint.pipeline.save_weights(pipeline.denoiser.backbone, run / "model.safetensors", {})
    found = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "mezzotint", "evaluate", str(run), "--features", "pixels", "--count", "150"]
        command += ["--batch-size", "40", "--device", "cpu", "--out", str(tmp_path / f"{processes}.json")]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / f"{processes}.json").read_text())["sets"])
    for name, figures_of_one in found[0].items():
        for key, value in figures_of_one.items():
            other = found[1][name][key]
            assert other == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (name, key)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of several sizes, by class."""
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{number}.png")
    return tmp_path / "photos"


def test_a_reference_of_several_sizes_is_read_at_one(pictures: Path, tmp_path: Path, command: Command) -> None:
    """By an override of `data`, as a folder of pictures or as a data set; a folder that is scored is read so, too."""
    uniform = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", uniform)
    options = ("--features", "pixels", "--out", tmp_path / "scores.json")

    def scored(*arguments: object) -> dict[str, Any]:
        done = command("evaluate", *arguments, *options)
        assert done.code == 0, done.err
        return json.loads((tmp_path / "scores.json").read_text())

    refused = command("evaluate", tmp_path / "samples.npz", pictures, *options)
    assert refused.code == 2
    assert "expected one size, or set data.size to crop and resize them all" in refused.err
    network = FeatureNetwork("pixels", lambda images: images.flatten(1) / 255)
    expected = figures(
        extract(image_source(tmp_path / "samples.npz"), network),
        reference_statistics(image_source(pictures, size=8), network),
    )
    scores = scored(tmp_path / "samples.npz", pictures, "data.size=8")
    assert scores["reference_images"] == 20
    assert scores["sets"]["samples"]["FD-pixels"] == pytest.approx(expected["FD-pixels"])
    held_out = scored(tmp_path / "samples.npz", f"folder:{pictures}", "data.size=8", "data.test_fraction=0.25")
    assert held_out["reference_images"] == 5
    same = scored(pictures, pictures, "data.size=8")["sets"]["samples"]
    assert same["images"] == 20
    assert same["FD-pixels"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("override", ["sampling.steps=3", "data=digits", "data.path=photos", "training.steps=3"])
def test_of_images_only_the_references_reading_can_be_set(override: str, pictures: Path, command: Command) -> None:
    refused = command("evaluate", pictures, pictures, override, "--features", "pixels")
    assert refused.code == 2
    assert f"override '{override}' is of no use to {pictures}, which is images; only how the reference" in refused.err


def test_a_models_reference_is_read_at_its_size(pipeline: mezzotint.Pipeline, pictures: Path) -> None:
    splits = pictures.rename(pictures.with_name("test"))
    (folder := splits.parent / "set").mkdir()
    splits.rename(folder / "test")
    scores = evaluate(pipeline, f"folder:{folder}", features="pixels", count=12, steps=1)
    assert scores["reference"].startswith("set-1x8x8-test")


@pytest.mark.parametrize("features", ["pixels", None])
def test_a_model_that_was_trained_on_all_pictures_has_none_to_be_scored_against(
    pipeline: mezzotint.Pipeline, pictures: Path, features: str | None
) -> None:
    """The data set's own sentence would have pictures held out that the model has seen."""
    pipeline.recipe = mezzotint.override_recipe(pipeline.recipe, [f"data=folder:{pictures}"])
    with pytest.raises(
        MezzotintError, match=r"nothing was held out of what .* was trained on, .*; give other pictures"
    ):
        evaluate(pipeline, features=features, count=2, steps=1)
    with pytest.raises(MezzotintError, match=r"set data\.test_fraction"):
        evaluate("digits", DataSettings(path=str(pictures), name="folder"), features="pixels")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": "digits"}, "images are scored against others; give a reference"),
        ({"model": "digits", "reference": "idx:/nowhere"}, "nowhere"),
        ({"model": "digits", "reference": "digits", "likelihood": 3}, "a model's, not those of images"),
        ({"model": "digits", "reference": "digits", "features": "vgg"}, "feature network 'vgg' is unknown"),
    ],
)
def test_bad_input_is_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        evaluate(**{"features": "pixels", **arguments})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    mezzotint.train(mezzotint.load_recipe("digits", TINY), run, quiet=True)
    return run


def test_a_model_is_scored_against_a_folder_of_several_sizes(trained: Path, tmp_path: Path, command: Command) -> None:
    for number, size in enumerate(((20, 12), (8, 8), (9, 30), (16, 16))):
        Image.new("L", size, 60 * number).save(tmp_path / f"{number}.png")
    words = ("--features", "pixels", "--count", 4, "--steps", 1)
    done = command("evaluate", trained, tmp_path, *words)
    assert done.code == 0, done.err
    done = command("evaluate", trained, "folder:nowhere")
    assert (done.code, done.err) == (2, "error: there is no folder at 'nowhere'; expected one of folder data")


def test_a_run_is_a_reference_by_its_data(trained: Path) -> None:
    assert data_settings(str(trained)) == mezzotint.load_recipe(trained).data


def test_what_was_trained_on_is_not_held_out_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    trained = DataSettings.parse({"name": "folder", "path": "pictures"})
    warn_of_held_out(trained, trained)
    warn_of_held_out(trained, trained.model_copy(update={"path": "others", "test_fraction": 0.3}))
    assert not caplog.records
    warn_of_held_out(trained, trained.model_copy(update={"test_fraction": 0.3}))
    assert "trained with data.test_fraction=0, so it has seen some of what 0.3 holds out" in caplog.text
