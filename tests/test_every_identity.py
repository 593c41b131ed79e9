"""Every cache key and identity changes with every input that can change what it stands for.

Tables that a new option of a data set, or a new key of a recipe, makes fail; test_identities.py has what is no table.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_every_key import (
    BASE,
    EFFECTS,
    FOLDER,
    KL,
    PCA,
    Effect,
    hub,
    kl,
    made,
    network,
    objective,
    prepared,
    samples,
    shapes,
)
from test_every_key import places as places  # a fixture

import mezzotint
from mezzotint import archive, data
from mezzotint.errors import MezzotintError
from mezzotint.evaluation import classifier, sweep
from mezzotint.evaluation.features import FeatureNetwork
from mezzotint.evaluation.probing import TEST, features_of, model_view
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.sources import DatasetSource, PipelineSource, image_source
from mezzotint.files import cache_folder, content_digest, content_digests
from mezzotint.pretrained import not_in_weights
from mezzotint.recipe import load_recipe, override_recipe
from mezzotint.representations import KLAutoencoder, open_tokenizer
from mezzotint.studies.ldae import _tokenizer_folder, jobs_of
from mezzotint.training.run_folder import TrainedOn
from mezzotint.training.tokenizers import fit_tokenizer

# --------------------------------------------------------------------------------------------------------- data sets


def write(folder: Path, kind: str) -> Path:
    """A small data set of this kind."""
    generator = np.random.default_rng(0)
    root = folder / kind
    root.mkdir(parents=True)
    if kind in ("folder", "captions"):
        for number in range(8):
            place = root / ("" if kind == "captions" else f"class{number % 2}")
            place.mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (9, 12, 4), dtype=np.uint8)).save(place / f"{number}.png")
        if kind == "captions":
            lines = [{"file_name": f"{n}.png", "text": f"picture {n}", "other": f"number {n}"} for n in range(8)]
            (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif kind == "video":
        for number in range(4):
            place = root / f"class{number % 2}"
            place.mkdir(exist_ok=True)
            first, *rest = (Image.fromarray(one) for one in generator.integers(0, 256, (9, 8, 8), dtype=np.uint8))
            first.save(place / f"{number}.gif", save_all=True, append_images=rest)
    elif kind == "webdataset":
        (root / "classnames.txt").write_text("cat\ndog\n")
        for shard in range(2):
            with tarfile.open(root / f"{shard}.tar", "w") as archive_file:
                for number in range(4):
                    picture = io.BytesIO()
                    Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(picture, "png")
                    about = json.dumps({"text": f"a {number}", "other": f"b {number}"}).encode()
                    for ending, content in (
                        ("png", picture.getvalue()),
                        ("cls", b"%d" % (number % 2)),
                        ("json", about),
                    ):
                        member = tarfile.TarInfo(f"{number}.{ending}")
                        member.size = len(content)
                        archive_file.addfile(member, io.BytesIO(content))
    elif kind == "idx":
        for prefix in ("train", "t10k"):
            images, labels = generator.integers(0, 256, (6, 8, 8), dtype=np.uint8), np.arange(6, dtype=np.uint8) % 3
            for name, array in (("images-idx3", images), ("labels-idx1", labels)):
                header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">i4").tobytes()
                (root / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
    elif kind == "huggingface":
        shutil.rmtree(root)
        hub(root)
    return root


def other_byte(name: str, place: int = -9) -> Callable[[Path], None]:
    """One byte of the file is another."""

    def change(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[place] ^= 1
        (root / name).write_bytes(content)

    return change


def renamed(one: str, other: str) -> Callable[[Path], None]:
    return lambda root: shutil.move(root / one, root / other)


def rewritten(name: str, one: str, other: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text((root / name).read_text().replace(one, other)) and None


SPLIT = {"test_fraction": 0.5}
#: by kind: options, and what can change its content: another option, or another file
SETS: dict[str, tuple[dict[str, Any], list[dict[str, Any] | Callable[[Path], None]]]] = {
    "digits": ({"size": 8}, [{"size": 16}, {"channels": 3}, {"labels": False}, {"split": "test"}]),
    "idx": (
        {"size": 8, "class_names": ("a", "b", "c")},
        [
            *({"size": 16}, {"channels": 3}, {"labels": False}, {"split": "test"}, {"class_names": ("a", "b", "d")}),
            *(other_byte("train-images-idx3-ubyte"), other_byte("train-labels-idx1-ubyte", -3)),
        ],
    ),
    "folder": (
        {"size": 8, "test_fraction": 0.25},
        [
            *({"size": 16}, {"channels": 1}, {"labels": False}, {"background": "red"}, SPLIT, {"split": "test"}),
            *(other_byte("class0/0.png"), renamed("class0", "klass0"), renamed("class0/0.png", "class1/9.png")),
        ],
    ),
    "captions": (
        {"size": 8, "test_fraction": 0.25},
        [
            *({"size": 16}, {"channels": 1}, {"caption_column": "other"}, {"background": "red"}, SPLIT),
            *({"split": "test"}, other_byte("0.png"), rewritten("metadata.jsonl", "picture 0", "picture 9")),
        ],
    ),
    "webdataset": (
        {"size": 8},
        [
            *({"size": 16}, {"channels": 1}, {"labels": False}, {"caption_column": "other"}, {"background": "red"}),
            *(SPLIT, {"split": "test", **SPLIT}, rewritten("classnames.txt", "dog", "fox")),
            *(other_byte("0.tar", 1000), other_byte("1.tar", 1000)),
        ],
    ),
    "huggingface": (
        {"size": 8, "image_column": "first", "label_column": "kind"},
        [
            *({"size": 16}, {"channels": 1}, {"labels": False}, {"background": "red"}, SPLIT, {"streaming": True}),
            *({"image_column": "second"}, {"label_column": "rest"}, {"caption_column": "text"}),
            {"split": "test", **SPLIT},
        ],
    ),
    "video": (
        {"size": 8, "frames": 3, "test_fraction": 0.5},
        [
            *({"size": 16}, {"channels": 1}, {"frames": 4}, {"frame_stride": 2}, {"labels": False}),
            *({"background": "red"}, {"test_fraction": 0.25}, {"split": "test"}, other_byte("class0/0.gif", 60)),
        ],
    ),
    "moving-digits": (
        {"size": 16, "frames": 3, "examples": 8},
        [
            *({"size": 18}, {"frames": 4}, {"channels": 3}, {"labels": False}, {"objects": 2}, {"examples": 9}),
            {"split": "test"},
        ],
    ),
    "emoji": ({"size": 16}, [{"size": 18}, {"channels": 1}, {"split": "test"}, {"test_fraction": 0.5}]),
}
#: options that change nothing of a data set's examples, or (path) whose content is looked at in their place
IDLE = {
    "path": "the content tells, wherever it lies",
    "max_unreadable": "when to give up",
    "shuffle_buffer": "an order, which a resumed run may not change (test_right_values.py)",
    "caption_column": "of videos, those of metadata.jsonl, as of captions",
    "config": "a name of the hub's, and another content",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("sets")}


def identity(kind: str, root: Path | None, **options: Any) -> str:
    given = options if root is None else options | {"path": root}
    return data.load(kind, given.pop("split", "train"), **given).identity


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, (_, changes) in SETS.items() for number in range(len(changes))]
)
def test_a_data_set_is_told_apart_by_all_that_is_in_it(
    kind: str, number: int, sets: dict[str, Path], tmp_path: Path
) -> None:
    options, changes = SETS[kind]
    change, root = changes[number], None
    if kind == "huggingface":
        pytest.importorskip("datasets")
    if kind not in ("digits", "moving-digits", "emoji"):
        if kind not in sets:
            sets[kind] = write(sets[""], kind)
        root = shutil.copytree(sets[kind], tmp_path / "moved" / sets[kind].name)
    try:
        before = identity(kind, root, **options)
    except MezzotintError:
        if kind == "emoji":
            pytest.skip("no font of emoji, or no fontTools")
        raise
    assert before == identity(kind, root and sets[kind], **options), "the same content, wherever it lies"
    if isinstance(change, dict):
        assert identity(kind, root, **options | change) != before
    else:
        assert root is not None
        change(root)
        assert identity(kind, root, **options) != before


def test_every_option_of_every_data_set_is_in_the_table() -> None:
    assert {*SETS, "latents"} == set(data.SOURCES)
    for kind, (options, changes) in SETS.items():
        known = {*IDLE, *options, *(key for change in changes if isinstance(change, dict) for key in change)}
        assert set(signature(data.SOURCES[kind]).parameters) <= known, kind


def test_what_a_run_was_trained_on() -> None:
    """The content of data, and what captions are read with; what autoencoder there is, is compared when it is read."""
    names = {"name": "folder", "path": "/a", "class_names": ("x", "y"), "images": 9}
    before = TrainedOn.parse({**names, "identity": "a-3x8x8-train-0123456789ab", "text_encoder": "0a"})
    assert before.changed(before.model_copy(update={"path": "/b", "identity": "b-3x8x8-train-0123456789ab"})) == ""
    for identity_now in ("a-1x8x8-train-0123456789ab", "a-3x8x8-test-0123456789ab", "a-3x8x8-train-0123456789ac"):
        assert before.changed(before.model_copy(update={"identity": identity_now}))
    assert "text encoder" in before.changed(before.model_copy(update={"text_encoder": "0b"}))
    assert before.changed(before.model_copy(update={"text_encoder": None})) == ""  # of an earlier version


def test_digests_of_files_know_a_file_that_was_written_again(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    (first,) = content_digests([file])
    assert first == content_digest(file)
    file.write_bytes(b"two")
    assert content_digests([file]) == [content_digest(file)] != [first]


# ------------------------------------------------------------------------------------------------------ image sources


def test_images_of_a_folder_and_of_an_npz(tmp_path: Path) -> None:
    photos = write(tmp_path, "folder")
    options: list[dict[str, Any]] = [
        *({"size": 9}, {"size": 8}, {"size": 8, "channels": 1}, {"size": 8, "labels": False}),
        *({"size": 8, "background": "red"}, {"size": 8, "count": 5}, {"size": 8, "count": 6}),
    ]
    found = [image_source(photos, **given).identity for given in options]
    assert len(set(found)) == len(found)
    other_byte("class0/0.png")(photos)
    assert image_source(photos, size=8).identity not in found
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    images[..., 1:] = images[..., :1]
    other = images.copy()
    other[0, 0, 0] += 1
    contents = [(images, None), (other, None), (images, np.arange(9)), (images, np.arange(9) % 3)]
    seen = []
    for pixels, labels in contents:
        np.savez(tmp_path / "a.npz", pixels, *([] if labels is None else [labels]))
        seen += [image_source(tmp_path / "a.npz", **more).identity for more in ({}, {"channels": 1}, {"count": 5})]
    assert len(set(seen)) == len(seen)


# ------------------------------------------------------------------------------- samples, sweeps, probes of a pipeline

#: keys of a recipe by which the same weights, or others, compute something else
COMPUTED = [
    key
    for key, effect in EFFECTS.items()
    if isinstance(effect, Effect)
    and effect.seen_by in (network, objective, samples, shapes)
    and not key.startswith(("objective.", "backbone.dropout", "backbone.outer.dropout"))
    and "KL" not in "".join(effect.base)
]


def keys(pipeline: mezzotint.Pipeline, seed: int = 0, count: int = 4) -> dict[str, str]:
    """What is kept of a pipeline, by where; but for the sampler and guidance in a sweep, which are a cell's."""
    real: Any = SimpleNamespace(source="reference", count=9)
    features: Any = SimpleNamespace(name="pixels")
    if pipeline.denoiser.text and not pipeline.prompts:
        pipeline.prompts = ("a",)
    found: dict[str, Any] = {
        "archive": archive._plan(pipeline, [1, 2], "", count, seed),
        "sweep": sweep._plan(pipeline, features, real, count, seed),
        "probe": model_view(pipeline, [], 0.1, True, seed).key,
    }
    if not pipeline.recipe.data.frames:
        found["samples"] = PipelineSource(pipeline, count, seed=seed).identity
    return {name: json.dumps(value) for name, value in found.items()}


@pytest.mark.parametrize("key", COMPUTED)
def test_what_is_kept_of_a_model_is_kept_by_all_that_it_computes_with(key: str, places: Path) -> None:
    effect = EFFECTS[key]
    assert isinstance(effect, Effect)
    base, change = prepared(effect, places)
    path = f"representation.path={places / 'tokenizer'}"
    pair = [base, override_recipe(base, [change])]
    pair = [override_recipe(one, [path]) if one.representation.name == "patch-pca" else one for one in pair]
    before, after = (keys(made(recipe)) for recipe in pair)
    same = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    allowed: set[str] = set()
    if key.startswith(("sampling.", "guidance.")):
        allowed = {"sweep", "probe"}
        cells = [sweep._Cell({}, recipe.sampling, recipe.guidance) for recipe in pair]
        assert cells[0].plan != cells[1].plan
    elif key in ("target", "variance"):
        allowed = {"probe"}  # features are of layers, whatever the output means
    assert same <= allowed


def test_what_is_kept_of_a_model_is_kept_by_weights_seed_and_count() -> None:
    recipe = load_recipe("digits", BASE)
    first = keys(made(recipe))
    other = made(recipe)
    next(other.denoiser.parameters()).data.flatten()[0] += 1
    for found in (keys(other), keys(made(recipe), seed=1), keys(made(recipe).prepare("bf16"))):
        assert all(found[name] != first[name] for name in first)
    counted = keys(made(recipe), count=5)
    assert {name for name in first if counted[name] == first[name]} == {"probe"}


def test_images_of_an_archive_and_of_a_source_by_what_is_asked() -> None:
    pipeline = made(load_recipe("digits", BASE))
    asked = [archive._plan(pipeline, [1, 2], "", 2, 0), archive._plan(pipeline, [1, 3], "", 2, 0)]
    asked += [archive._plan(pipeline, None, "", 2, 0), archive._plan(pipeline, [1, 2], "dark", 2, 0)]
    assert len({json.dumps(plan) for plan in asked}) == 4
    sources = [PipelineSource(pipeline, 4, **more).identity for more in ({}, {"classes": [1]}, {"guidance": 2.0})]
    sources += [PipelineSource(pipeline, 4, **more).identity for more in ({"steps": 2}, {"sampler": "ddim"})]
    assert len(set(sources)) == 5


class Reader:
    """Stands in for a text encoder."""

    width = 0

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def encode(self, captions: Any, *, cached: bool = True) -> Any:
        return mezzotint.pipeline.Bytes(8).encode(captions)


def test_a_model_of_captions_is_told_apart_by_its_encoder_and_its_prompts() -> None:
    recipe = load_recipe("digits", [*BASE, "condition=text", "backbone={num_classes: 0, text_features: 0}"])

    def found(digest: str, prompts: tuple[str, ...]) -> dict[str, str]:
        pipeline = made(recipe)
        pipeline.captioner, pipeline.prompts = Reader(digest), prompts
        return keys(pipeline)

    first = found("0a", ("a", "b"))
    assert all(value != first[name] for name, value in found("0b", ("a", "b")).items())
    asked = found("0a", ("a", "c"))
    assert {name for name in first if asked[name] != first[name]} == {"sweep", "samples"}
    cut = override_recipe(recipe, ["condition.max_tokens=8"])
    pipeline = made(cut)
    pipeline.captioner, pipeline.prompts = Reader("0a"), ("a", "b")
    assert all(value != first[name] for name, value in keys(pipeline).items())


def test_a_model_of_latents_is_told_apart_by_its_tokenizer_s_content(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):  # other images
        recipe = load_recipe("digits", [*BASE, *PCA, f"seed={seed}", "representation.fit.examples=20"])
        shutil.rmtree(tmp_path / "tokenizer", ignore_errors=True)
        fit_tokenizer(recipe, tmp_path / "tokenizer", device="cpu", quiet=True)
        pipeline = made(override_recipe(recipe, ["seed=0", f"representation.path={tmp_path / 'tokenizer'}"]))
        found.append((open_tokenizer(tmp_path / "tokenizer").digest, *keys(pipeline).values()))
    assert all(one != other for one, other in zip(*found, strict=True))


def test_an_autoencoder_is_told_apart_by_weights_and_scaling(places: Path) -> None:
    pytest.importorskip("diffusers")
    if not (places / "KL").exists():
        kl(places / "KL")
    recipe = load_recipe("digits", [*BASE, *KL[:1], KL[1].replace("'KL'", str(places / "KL"))])
    first, scaled = (mezzotint.build(recipe) for _ in range(2))
    autoencoder: Any = scaled.representation
    assert keys(first) == keys(scaled)
    autoencoder.scale = 2.0
    assert all(value != keys(first)[name] for name, value in keys(scaled).items())
    again = KLAutoencoder(str(places / "KL"))
    next(again.network.parameters()).data.flatten()[0] += 1
    assert again.digest != first.representation.digest  # type: ignore[attr-defined]


def test_a_run_is_not_resumed_with_latents_of_another_scale(places: Path, tmp_path: Path) -> None:
    """The weights are the same, and so was the digest."""
    pytest.importorskip("diffusers")
    if not (places / "KL").exists():
        kl(places / "KL")
    shutil.copytree(places / "KL", tmp_path / "KL")
    words = [*BASE, *FOLDER, "data.size=32", KL[1].replace("'KL'", str(tmp_path / "KL"))]
    words = [word.replace("FOLDER", str(places)) for word in words]
    recipe = load_recipe("digits", [*words, "backbone.num_classes=2"])
    mezzotint.train(recipe, tmp_path / "run", quiet=True, device="cpu")
    mezzotint.train(override_recipe(recipe, ["training.steps=3"]), tmp_path / "run", quiet=True, resume=True)
    config = json.loads((tmp_path / "KL" / "config.json").read_text())
    (tmp_path / "KL" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(MezzotintError, match="trained with another scaling of the autoencoder's latents"):
        mezzotint.train(override_recipe(recipe, ["training.steps=4"]), tmp_path / "run", quiet=True, resume=True)


# ----------------------------------------------------------------------------------------------- what is kept in files


def kept(folder: str) -> set[str]:
    return {path.name for path in (cache_folder() / folder).glob("*")}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("empty_cache")
def test_references_are_kept_by_images_and_network() -> None:
    def network_of(name: str, precision: str = "fp32") -> FeatureNetwork:
        return FeatureNetwork(name, lambda images: images.flatten(1)[:, :4].float(), precision=precision)

    asked: list[tuple[Any, FeatureNetwork, dict[str, Any]]] = [
        ("digits", network_of("a"), {}),
        ("digits", network_of("b"), {}),
        ("digits", network_of("a", "bf16"), {}),
        ("digits", network_of("a"), {"split": "train"}),
        ("digits", network_of("a"), {"size": 16}),
        ("digits", network_of("a"), {"channels": 3}),
        ("digits", network_of("a"), {"labels": False}),
        ("digits", network_of("a"), {"count": 50}),
    ]
    for number, (source, by, options) in enumerate(asked, 1):
        reference_statistics(source, by, **options)
        assert len(kept("references")) == number


@pytest.mark.usefixtures("empty_cache")
def test_statistics_of_a_file_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    """Both are called fid.npz; a sweep against one was taken for one against the other."""
    by = FeatureNetwork(
        "inception-v3 (2015 TensorFlow graph, of a test)", lambda images: images.flatten(1)[:, :2].float()
    )
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    found = []
    for mean in (0.0, 1.0):
        np.savez(tmp_path / "fid.npz", mu=np.full(2, mean), sigma=np.eye(2), arr_0=images)
        found += [reference_statistics(tmp_path / "fid.npz", by, rows=rows).source for rows in (0, 4)]
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.usefixtures("empty_cache")
def test_classifiers_are_kept_by_both_sets_of_images_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(images: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...], *, seed: int = 0) -> Any:
        net = classifier.ConvNet(images.shape[1], len(names), 1).eval()
        return classifier.ClassifierNetwork(net, names, seed=seed)

    monkeypatch.setattr(classifier.ClassifierNetwork, "fit", quick)
    monkeypatch.setattr(classifier, "MAX_EXAMPLES", 40)
    asked: list[dict[str, Any]] = [{}, {"seed": 1}, {"fit_on": "train"}, {"size": 16}, {"channels": 3}]
    for number, options in enumerate(asked, 1):
        classifier.trained_classifier("digits", **options)
        assert len(kept("classifiers")) == number
    monkeypatch.setattr(classifier, "MAX_EXAMPLES", 30)
    classifier.trained_classifier("digits")
    assert len(kept("classifiers")) == len(asked) + 1


@pytest.mark.usefixtures("empty_cache")
def test_features_are_kept_by_images_layer_time_and_noise() -> None:
    pipeline = made(load_recipe("digits", [*BASE, "backbone.depth=2"]))
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"layers": [1], "t": 0.1}, {}),
        ({"layers": [2], "t": 0.1}, {}),
        ({"layers": [1], "t": 0.2}, {}),
        ({"layers": [1], "t": 0.1, "noise": True}, {}),
        ({"layers": [1], "t": 0.1, "noise": True, "seed": 1}, {}),
        ({"layers": [1], "t": 0.1}, {"count": 20}),
        ({"layers": [1], "t": 0.1}, {"split": "train", "count": 20}),
        ({"layers": [1], "t": 0.1}, {"labels": True, "count": 30}),
    ]
    for number, (view, images) in enumerate(asked, 1):
        source = image_source("digits", **{"count": 40} | images)
        assert isinstance(source, DatasetSource)
        features_of(model_view(pipeline, **view), source, TEST, seed=view.get("seed", 0))
        assert len(kept("features")) == number


def test_models_of_transformers_are_told_apart_by_what_their_weights_do_not_say() -> None:
    def config(**changes: Any) -> Any:
        inside = {"hidden_act": "gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-6, "name": "a"}
        return SimpleNamespace(to_dict=lambda: {"vision_config": inside | changes, "transformers_version": "5"})

    first = not_in_weights(config())
    assert first == not_in_weights(config(name="b"))
    for change in ({"hidden_act": "quick_gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-5}):
        assert not_in_weights(config(**change)) != first


def test_a_masked_autoencoder_is_told_apart_by_its_heads() -> None:
    transformers = pytest.importorskip("transformers")
    from mezzotint.evaluation.mae import MAE

    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1}
    names, state = set(), None
    for heads in (1, 2):
        config = transformers.ViTMAEConfig(**sizes, num_attention_heads=heads, intermediate_size=8, mask_ratio=0.0)
        model = transformers.ViTMAEModel(config)
        state = model.state_dict() if state is None else state
        model.load_state_dict(state)
        names |= {MAE(model, [0.5], [0.5]).name, MAE(model, [0.4], [0.5]).name, MAE(model, [0.5], [0.4]).name}
    assert len(names) == 6


def test_cells_of_a_study_by_what_they_are_trained_with(tmp_path: Path) -> None:
    def job(*overrides: str, seed: int = 0) -> Any:
        (found,) = jobs_of("digits", tmp_path, seeds=[seed], cells=["ldae-05c-patch-pca"], overrides=overrides)
        return found

    first = job()
    assert job("sampling.steps=3").settings == first.settings, "what is probed is not sampled"
    others = [job("training.steps=3"), job("backbone.width=32"), job("objective.time_eps=0.01"), job(seed=1)]
    others += [job("representation.channels=4"), replace(first, probe_images=5)]
    assert len({json.dumps(one.settings) for one in [first, *others]}) == len(others) + 1
    assert _tokenizer_folder(job("training.steps=3")) == _tokenizer_folder(first), "one for all of them"
    fits = [job(seed=1), job("representation.channels=4"), job("representation.fit.examples=50")]
    assert len({_tokenizer_folder(one) for one in [first, *fits]}) == 4
