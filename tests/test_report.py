"""The page of an evaluation: what it holds, what it looks up, and that it needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from torch import Tensor

import mezzotint
from mezzotint.data.base import InMemoryImages
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import Extracted, FeatureNetwork, extract
from mezzotint.evaluation.frechet import frechet_distance
from mezzotint.evaluation.manifold import precision_recall
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.report import _pictures, copying, nearest, write_report
from mezzotint.evaluation.scores import figures
from mezzotint.evaluation.sources import FunctionSource, ImageSource, image_source
from mezzotint.evaluation.sweep import sweep
from mezzotint.recipe import DataSettings, Recipe, override_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pipeline(tiny: Recipe) -> mezzotint.Pipeline:
    made = mezzotint.build(override_recipe(tiny, ["backbone.num_classes=10"]), class_names=[*"0123456789"])
    generator = torch.Generator().manual_seed(0)
    for parameter in made.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return made


def network(width: int = 64) -> FeatureNetwork:
    """The first pixels, and a judge of classes that is right by accident alone."""

    def compute(images: Tensor) -> dict[str, Tensor]:
        pixels = images.flatten(1).float() / 255
        return {"features": pixels[:, 64 - width :], "logits": pixels[:, 20:30]}

    return FeatureNetwork(f"some (first {width} pixels)", compute, dim=width)


DIGITS = DataSettings()


def looked_at(sources: dict[str, ImageSource], features: FeatureNetwork) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `evaluate` leaves: the scores, and each source with what was seen in it."""
    real = reference_statistics(DIGITS, features, rows=10_000)
    scores: dict[str, Any] = {"features": features.name, "reference": real.source, "reference_images": real.count}
    seen = {name: (source, extract(source, features, keep_rows=10_000)) for name, source in sources.items()}
    scores["sets"] = {name: figures(found, real) for name, (_, found) in seen.items()}
    for name, (_, found) in seen.items():
        if found.labels is not None and found.logits is not None:
            agreed = (found.logits.argmax(1) == found.labels).double().mean().item()
            scores["sets"][name]["class agreement"] = agreed
    return scores, seen


class Page(HTMLParser):
    """The page's tags, checked for balance, its pictures and its text."""

    void = ("meta", "img", "line", "rect")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def pictures(self) -> list[np.ndarray]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        prefix = "data:image/png;base64,"
        assert all(source.startswith(prefix) for source in sources)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :])))) for source in sources]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Page]:
    def write(scores: dict[str, Any], seen: dict[str, Any], features: FeatureNetwork, **options: Any) -> Page:
        write_report(tmp_path / "page.html", scores, seen, features, **options)
        return Page(tmp_path / "page.html")

    return write


def uint8(images: Tensor) -> list[np.ndarray]:
    return list(images.squeeze(1).numpy())


def test_a_models_page(pipeline: mezzotint.Pipeline, tmp_path: Path, written: Callable[..., Page]) -> None:
    features = network()
    sources = {
        "samples": image_source(pipeline, count=120, sampler="ddim", steps=3, eta=0.5, seed=7),
        "guided": image_source(pipeline, count=120, guidance=2.5, sampler="ddim", steps=3, seed=7),
        "real": image_source(DIGITS, split="train", count=120),
    }
    scores, seen = looked_at(sources, features)
    scores |= {"guidance": 2.5, "recipe": "digits", "classifier_accuracy": 0.987, "bits_per_dim": 1.5}
    scores |= {"bits_per_dim_error": 0.1}
    scores["sets"]["samples"]["FD-some, 95 % interval"] = [0.5, 1234.5]
    run = tmp_path / "run"
    sweep(pipeline, run, {"sampler": ["ddim"], "steps": [2, 3], "guidance": [1, 2]}, features=features, count=20)
    page = written(scores, seen, features, data=DIGITS, run=run)
    for text in (
        *("digits: evaluation", features.name, seen["samples"][1].source, "98.7 %", "1.500 ± 0.100", "899 images"),
        *("ddim, 3 steps, eta 0.5", "guided by 2.5", "Guided by 2.5", "0.5 to 1234", "Inception score (some)"),
        *(
            "100 of them, a class a row",
            "898 training images (digits-1x8x8-train",
            "The 8 nearest of all, and 8 others",
        ),
        *("Its FD-some is left out: 64 features need 128 images of a class on either side", "10 classes"),
    ):
        assert text in page.text, text
    # Two sets of 100 samples and 16 examples with 5 training images each; the sweep's two pictures.
    pictures = page.pictures()
    assert len(pictures) == 2 * (100 + 16 * 6) + 2
    images = torch.cat([images for images, _ in sources["samples"].batches(200)])
    first = [index for label in range(10) for index in range(12 * label, 12 * label + 10)]
    for shown, expected in zip(pictures[:100], uint8(images[first]), strict=True):
        # Drawn in another batch, whose rounding may move a pixel on the edge between two levels.
        assert np.abs(shown.astype(int) - expected).max() <= 1
    assert pictures[-1].shape[0] > 200
    # Nothing is fetched or run, and nothing changes from one writing to the next.
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "form"}
    assert not any(name.startswith("on") or name == "href" for _, attributes in page.tags for name in attributes)
    assert "url(" not in (before := (tmp_path / "page.html").read_text())
    written(scores, seen, features, data=DIGITS, run=run)
    assert (tmp_path / "page.html").read_text() == before


def test_all_text_is_escaped(written: Callable[..., Page], tmp_path: Path) -> None:
    nasty = '<script>alert("&")</script>'
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = InMemoryImages(images, torch.arange(40) % 2, (nasty, "b'</td>"), nasty)
    features = network()
    scores, seen = looked_at({"samples": image_source(dataset)}, features)
    page = written(scores | {"recipe": nasty}, seen, features, title=nasty, data=DIGITS)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(nasty) >= 4
    assert nasty in {attributes.get("alt") for _, attributes in page.tags}
    assert html.escape(nasty, quote=False) in (tmp_path / "page.html").read_text().replace("&#34;", '"')


def test_copies_are_found(written: Callable[..., Page]) -> None:
    """A model that gives training images back, one that gives held-out ones, and one of noise."""
    features = network()
    noise = torch.randint(0, 256, (150, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sources: dict[str, ImageSource] = {
        "samples": image_source(DIGITS, split="train", count=150),
        "guided": image_source(DIGITS, split="test", count=150),
        "other": FunctionSource(lambda: noise, "noise"),
    }
    scores, seen = looked_at(sources, features)
    page = written(scores, seen, features, data=DIGITS)
    parts = re.split(r"Nearest training images", page.text)[1:]
    shares = [re.search(r"nearer than the held-out image\s*([\d.]+) % ± ([\d.]+) %", part) for part in parts]
    assert [float(share[1]) for share in shares if share] == [100, pytest.approx(50, abs=5), 0]
    near = [re.search(r"nearest 1 % of held-out images\s*([\d.]+) %", part) for part in parts]
    assert [float(share[1]) for share in near if share] == [100, pytest.approx(1, abs=1), 0]
    same = [re.search(r"very features of a training image\s*(\d+)", part) for part in parts]
    assert [int(number[1]) for number in same if number] == [150, 0, 0]
    # The pictures show it: a copy's nearest training image is itself, at no distance.
    pictures = page.pictures()[100 : 100 + 96]
    for sample, closest in zip(pictures[::6], pictures[1::6], strict=True):
        assert np.array_equal(sample, closest)


def test_nearest_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(700, 30, generator=generator) + 100
    rows = torch.cat([torch.randn(300, 30, generator=generator) + 100, others[:5]])
    distances, indices = nearest(rows, others, 4, block=77)
    exact = (rows[:, None].double() - others.double()).square().sum(2).sqrt()
    expected = exact.sort(dim=1)
    assert torch.equal(distances, expected.values[:, :4])
    assert torch.equal(indices, expected.indices[:, :4])
    assert torch.equal(distances[-5:, 0], torch.zeros(5).double())
    few, where = nearest(rows, others[:2], 5)
    assert few.shape == where.shape == (305, 2)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_copying_is_mann_and_whitneys_statistic(shift: float) -> None:
    generator = np.random.default_rng(0)
    samples, held_out = generator.integers(0, 50, 300) + shift, generator.integers(0, 50, 200) * 1.0
    share, error = copying(torch.tensor(samples), torch.tensor(held_out))
    u = mannwhitneyu(held_out, samples).statistic
    assert share == pytest.approx(u / (300 * 200), rel=1e-12)
    assert error == pytest.approx((501 / (12 * 300 * 200)) ** 0.5, rel=1e-12)


def test_classes_by_themselves(written: Callable[..., Page]) -> None:
    features = network(width=12)
    source = image_source(DIGITS, split="train", count=700)
    scores, seen = looked_at({"samples": source}, features)
    page = written(scores, seen, features, data=DIGITS)
    cells = page.text[page.text.index("By class") :].split()
    start = cells.index("recall") + 2  # after the last heading, FD-some
    found: Extracted = seen["samples"][1]
    assert found.labels is not None
    assert found.logits is not None
    train, test = found.rows[found.indices.argsort()], image_source(DIGITS)
    held_out, names = zip(*test.batches(500), strict=True)
    real, labels = features(torch.cat(held_out))["features"], torch.cat([one for one in names if one is not None])
    for digit in range(10):
        row = cells[start + 7 * digit : start + 7 * digit + 7]
        mine, theirs = train[found.labels == digit], real[labels == digit]
        agreed = (found.logits.argmax(1)[found.labels == digit] == digit).double().mean().item()
        precision, recall = precision_recall(theirs, mine)
        figures = [agreed, len(theirs), precision, recall, frechet_distance(theirs, mine)]
        assert row == [str(digit), str(len(mine)), *(f"{value:.4g}" for value in figures)]


def test_what_is_not_there_is_said(
    pipeline: mezzotint.Pipeline, written: Callable[..., Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = network()
    scores, seen = looked_at({"samples": image_source(pipeline, count=30, steps=2)}, features)
    page = written(scores, seen, features)
    assert "Left out: these images were not compared with a data set" in page.text
    assert "there are no held-out images by class" in page.text
    assert "Sweep" not in page.text
    assert len(page.pictures()) == 30
    page = written(scores, seen, features, data=DIGITS.model_copy(update={"path": "x"}))
    assert "Left out: data.path means nothing for the data set 'digits'; leave it out." in page.text
    # A data set without held-out images has training images all the same.
    folder = tmp_path / "pictures"
    for number, pixels in enumerate(uint8(next(image_source(DIGITS, count=30).batches(30))[0])):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number}.png")
    page = written(scores, seen, features, data=DataSettings(name="folder", path=str(folder)))
    assert "The nearest of 30 training images" in page.text
    assert "There are no held-out images to compare the distances with." in page.text
    assert "held-out image " not in page.text
    # Images without labels are shown in one block.
    scores, seen = looked_at({"samples": image_source(DIGITS.model_copy(update={"labels": False}))}, features)
    page = written(scores, seen, features)
    assert len(page.pictures()) == 100
    assert "By class" not in page.text
    with pytest.raises(MezzotintError, match="cannot write"):
        write_report("/proc/page.html", scores, seen, features)


def test_pictures_of_any_source_and_size(
    pipeline: mezzotint.Pipeline, written: Callable[..., Page], tmp_path: Path
) -> None:
    images = torch.randint(0, 256, (30, 3, 150, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "some.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=np.arange(30) % 15)
    sources = [
        image_source(tmp_path / "some.npz", count=20),
        image_source(DIGITS, count=50),
        FunctionSource(lambda: images.split(7), "function"),
        image_source(pipeline, count=20, steps=2),
    ]
    for source in sources:
        expected = torch.cat([batch for batch, _ in source.batches(4)])
        found = _pictures(source, [17, 3, 3, 12], 4)
        assert sorted(found) == [3, 12, 17]
        assert all((image.int() - expected[index].int()).abs().max() <= 1 for index, image in found.items())
    features = FeatureNetwork("corner", lambda images: images[:, :, 0, 0].float(), dim=3, channels=3)
    found = extract(sources[0], features, keep_rows=20)
    made: dict[str, Any] = {"features": features.name, "reference": "none", "sets": {"samples": {"images": 20}}}
    page = written(made, {"samples": (sources[0], found)}, features)
    assert {picture.shape for picture in page.pictures()} == {(96, 128, 3)}
    assert [str(attributes["width"]) for tag, attributes in page.tags if tag == "img"][:1] == ["128"]
