"""Building, saving, loading and sampling."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint import images as output
from mezzotint.conditions import class_labels, parse_classes, split_classes
from mezzotint.errors import MezzotintError
from mezzotint.pipeline import captioner, state_batches
from mezzotint.recipe import Recipe, override_recipe
from mezzotint.samplers import example_generators, randn


@pytest.fixture
def run(pipeline: mezzotint.Pipeline, tmp_path: Path) -> Path:
    from mezzotint.pipeline import save_weights

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(pipeline.recipe.to_yaml())
    save_weights(pipeline.denoiser.backbone, folder / "model.safetensors", {"class_names": '["zero", "one"]'})
    return folder


def test_build_leaves_the_global_random_state_alone(tiny: Recipe) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    mezzotint.build(tiny)
    assert torch.equal(torch.rand(4), expected)


def test_loaded_weights_are_the_saved_ones(pipeline: mezzotint.Pipeline, run: Path) -> None:
    loaded = mezzotint.load(run)
    assert loaded.class_names == ("zero", "one")
    for name, tensor in pipeline.denoiser.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], tensor)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ode-heun", "sde-sigma", "sde-heun-linear", "dpm-solver++"])
def test_an_image_does_not_depend_on_its_batch(pipeline: mezzotint.Pipeline, sampler: str) -> None:
    """Image i depends on (seed, i) and its class alone; to rounding, since matrix products of other sizes round so."""
    options = {"sampler": sampler, "steps": 3, "guidance": 1.5, "seed": 7}
    together = mezzotint.sample(pipeline, [3], 5, **options)
    apart = mezzotint.sample(pipeline, [3], 5, batch_size=2, **options)
    fewer = mezzotint.sample(pipeline, [3], 2, **options)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[:2], fewer, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_same_seed_same_images(pipeline: mezzotint.Pipeline) -> None:
    first, again = (mezzotint.sample(pipeline, count=4, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, mezzotint.sample(pipeline, count=4, seed=2))


def test_trajectory_runs_from_noise_to_the_sample(pipeline: mezzotint.Pipeline) -> None:
    states = mezzotint.sample(pipeline, count=3, steps=4, trajectory=True)
    assert states.shape == (5, 3, 1, 8, 8)
    assert torch.equal(states[-1], mezzotint.sample(pipeline, count=3, steps=4))


def test_a_long_sampling_shows_a_bar_only_to_a_person(
    pipeline: mezzotint.Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    mezzotint.sample(pipeline, count=2, progress=True)
    assert capsys.readouterr().err == ""


def test_labels_cover_the_classes_in_order() -> None:
    assert class_labels([4, 7], 5).tolist() == [4, 4, 4, 7, 7]
    assert class_labels(range(10), 100).tolist() == [i // 10 for i in range(100)]


NAMES = ["goldfish, Carassius auratus", "tench, Tinca tinca", "crane", "crane, machine", "maillot, tank suit", "Élan"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("tench, Tinca tinca", [1]),
        ("tench,tinca tinca", [1]),
        ("tench", [1]),
        ("Tinca tinca, 0 , goldfish", [1, 0, 0]),
        ("tench, goldfish, Carassius auratus, 2", [1, 0, 2]),
        ("crane", [2]),  # the very name of one, and one of the names of another
        ("crane, machine, machine", [3, 3]),
        ("tank suit, null", [4, 6]),
        ("e\u0301lan", [5]),  # composed of two letters, as macOS writes it
        ("\u00e9LAN", [5]),
    ],
)
def test_names_with_commas_and_accents_find_their_classes(typed: str, expected: list[int]) -> None:
    assert parse_classes(split_classes(typed, NAMES), 6, NAMES) == expected


def test_one_name_of_several_classes_is_refused() -> None:
    with pytest.raises(MezzotintError, match="2 classes are called 'cardigan': 0, 1; give one's number"):
        parse_classes(["cardigan"], 2, ["cardigan, corgi", "cardigan, garment"])


@pytest.mark.parametrize("names", [("1", "2", "3"), ("5", "6", "7"), ("001", "002")])
def test_where_classes_are_named_by_numbers_a_number_is_a_name(names: tuple[str, ...]) -> None:
    assert parse_classes([*names, "null"], len(names), names) == [*range(len(names)), len(names)]
    with pytest.raises(MezzotintError, match="class '0' is unknown: the classes are named by numbers"):
        parse_classes(["0"], len(names), names)


@pytest.mark.parametrize("text", ["\u00b2", "\u0663", "1.0", "1e0", "9" * 5000, "-" + "9" * 5000])
def test_what_is_no_number_of_a_class(text: str) -> None:
    with pytest.raises(MezzotintError, match=r"^class .{1,210} is (unknown|out of range)"):
        parse_classes([text], 3)


def test_classes_by_number_and_name() -> None:
    names = ["Trouser", "Ankle boot", "7"]
    assert parse_classes(["trouser", 1, "7", "0", "null"], 3, names) == [0, 1, 2, 0, 3]
    with pytest.raises(MezzotintError, match="class 'trousers' is unknown; closest: Trouser"):
        parse_classes(["trousers"], 3, names)
    with pytest.raises(MezzotintError, match="class 12 is out of range; this model has classes 0 to 9"):
        parse_classes([12], 10)
    with pytest.raises(MezzotintError, match="class -1 is out of range"):
        parse_classes([-1], 10)
    for names in ((), [*"abcdefghij"]):  # the number of the null class, which is asked for by its name
        with pytest.raises(MezzotintError, match=r"class 10 is out of range; .* 0 to 9, and .null. is none"):
            parse_classes([10], 10, names)
    with pytest.raises(MezzotintError, match="unconditional"):
        parse_classes([1], 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"classes": [10]}, "class 10 is out of range"),
        ({"steps": 0}, "steps = 0 is not valid"),
        ({"stepz": 3}, "key 'stepz' is unknown; closest: steps"),
        ({"sampler": "ddpm2"}, "sampler 'ddpm2' is unknown"),
        ({"guidance": -2.0}, "scale = -2.0 is not valid"),
        ({"sampler": "ddpm", "variance": "learned"}, "this model has none"),
        ({"guidance": mezzotint.Guidance(channels=3)}, "guidance.channels is 3, but the model has 1 channel"),
    ],
)
def test_bad_arguments(pipeline: mezzotint.Pipeline, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        mezzotint.sample(pipeline, **({"count": 2} | arguments))  # type: ignore[arg-type]


def test_guiding_an_unconditional_model_is_refused(tiny: Recipe) -> None:
    made = mezzotint.build(override_recipe(tiny, ["backbone.num_classes=0"]))
    assert mezzotint.sample(made, count=2).shape == (2, 1, 8, 8)
    with pytest.raises(MezzotintError, match="needs a conditional model"):
        mezzotint.sample(made, count=2, guidance=2.0)


# ---------------------------------------------------------------------------------------------- damaged run folders


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match=r"is not a run folder: it has no recipe\.yaml"):
        mezzotint.load(tmp_path)


def test_no_weights(run: Path) -> None:
    (run / "model.safetensors").unlink()
    with pytest.raises(MezzotintError, match="has no weights yet, as it was stopped before its first checkpoint"):
        mezzotint.load(run)


def test_truncated_weights(run: Path) -> None:
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MezzotintError, match="is not a whole safetensors file"):
        mezzotint.load(run)


def test_weights_that_do_not_fit_are_listed(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors["stranger"] = tensors.pop("final_layer.linear.bias")
    tensors["pos_embed"] = tensors["pos_embed"][:, :3].contiguous()
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(MezzotintError) as caught:
        mezzotint.load(run)
    assert (
        "missing final_layer.linear.bias; unexpected stranger; pos_embed has shape (1, 3, 16), expected (1, 16, 16)"
        in str(caught.value)
    )


def test_a_pickle_with_the_right_name_is_not_opened(run: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(MezzotintError, match="is not a whole safetensors file"):
        mezzotint.load(run)


# -------------------------------------------------------------------------------------------------------- images out


def test_files_hold_the_images(tmp_path: Path) -> None:
    levels = torch.tensor([0, 100, 200, 255], dtype=torch.uint8)
    images = (levels.float() / 127.5 - 1).view(4, 1, 1, 1).expand(4, 1, 5, 5)
    output.save_npz(images, torch.arange(4), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 5, 5, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == levels.tolist()
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3]
    output.save_pngs(images, tmp_path / "png")
    assert [np.array(Image.open(path))[0, 0] for path in sorted((tmp_path / "png").iterdir())] == levels.tolist()
    output.save_grid(images, tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 50 + 3 * 2, 2 * 50 + 3 * 2)  # 5 pixels are enlarged 10 times, with borders of 2
    output.save_animation(torch.stack([-images, images]), tmp_path / "way.gif", columns=2)
    with Image.open(tmp_path / "way.gif") as animation:
        assert animation.n_frames == 2  # type: ignore[attr-defined]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MezzotintError, match=r"cannot write .*grid\.png: (Not a directory|File exists)"):
        output.save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "file" / "grid.png")
    assert (tmp_path / "file").read_text() == "in the way"


# ------------------------------------------------------------------------------------------------- KL autoencoder


@pytest.fixture
def autoencoder(tmp_path: Path) -> str:
    """A tiny autoencoder with Stable Diffusion's stride of 8, in a folder as diffusers writes it."""
    diffusers = pytest.importorskip("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.25,
    )
    network.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def test_latent_model_trains_and_samples_through_the_autoencoder(
    autoencoder: str, tiny: Recipe, tmp_path: Path
) -> None:
    """The published recipes' way, from a folder of pictures to decoded samples, with a tiny network and autoencoder."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    recipe = mezzotint.load_recipe(
        "dit-xl-2-256",
        [
            f"data=folder:{tmp_path / 'photos'}",
            "data.size=32",
            "data.workers=0",
            f"representation.path={autoencoder}",
            "representation.scale=null",
            "backbone.width=16",
            "backbone.depth=1",
            "backbone.heads=2",
            "backbone.num_classes=null",
            "training.batch_size=4",
            "training.steps=2",
            "sampling.steps=3",
        ],
    )
    trained = mezzotint.train(recipe, tmp_path / "run", quiet=True, device="cpu")
    assert trained.recipe.latent_shape == (4, 4, 4)
    assert trained.representation.scale == 0.25
    images = mezzotint.sample(mezzotint.load(tmp_path / "run"), ["dog"], 2)
    assert images.shape == (2, 3, 32, 32)
    assert images.abs().max() <= 1


def test_missing_autoencoder_says_where_to_get_it(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = mezzotint.build(
        override_recipe(
            tiny, ["representation=kl", f"representation.path={tmp_path / 'none'}", "data.size=32", "data.channels=3"]
        )
    )
    with pytest.raises(MezzotintError, match="download stabilityai/sd-vae-ft-ema"):
        mezzotint.sample(made, count=1)


def test_what_else_is_in_a_folder_of_pngs(tmp_path: Path) -> None:
    """A larger run's pictures would stay beside a smaller one's, and be scored with them."""
    images = torch.zeros(3, 1, 8, 8)
    assert output.others_in(tmp_path / "new", 2) == []
    output.save_pngs(images, tmp_path / "png")
    assert output.others_in(tmp_path / "png", 3) == []
    (tmp_path / "png" / "notes.txt").touch()
    assert output.others_in(tmp_path / "png", 2) == ["000002.png", "notes.txt"]
    with pytest.raises(MezzotintError, match="is a file; choose a folder"):
        output.others_in(tmp_path / "png" / "notes.txt", 2)


def test_sampling_starts_from_noise_of_the_path(tiny: Recipe) -> None:
    recipe = override_recipe(tiny, ["interpolant={name: variance-exploding, sigma_max: 80}", "target=data"])
    made = mezzotint.build(override_recipe(recipe, ["backbone.num_classes=0", "data.labels=false"]))
    first, *_ = next(state_batches(made, None, range(4), trajectory=True))
    torch.testing.assert_close(first, 80 * randn(first.shape, example_generators(0, range(4))))


def test_what_is_made_ahead_is_told_the_time_that_the_network_is_told(pipeline: mezzotint.Pipeline) -> None:
    pipeline.denoiser.time_input = (1000.0, -1.0)
    y = torch.tensor([3, 8])
    ahead = pipeline.denoiser.conditions([0.3], y)
    for found, expected in zip(ahead, pipeline.denoiser.backbone.condition(torch.full((2,), 299.0), y), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(found[0], expected)


def test_a_network_is_compiled_where_told(pipeline: mezzotint.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    assert pipeline.prepare().prepare(compiled=True) is pipeline
    assert compiled == [pipeline.denoiser.backbone]


@pytest.mark.parametrize("room", ["pipeline", "encoding"])
def test_what_an_autoencoder_is_told(room: str, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def representation(**options: Any) -> Any:
        told.update(options)
        raise MezzotintError("that is all")

    monkeypatch.setattr(f"mezzotint.{room}.representation", representation)
    section = {"name": "kl", "path": "sd", "scale": 0.5, "stride": 8, "channels": 3, "precision": "bf16"}
    section |= {"slicing": True, "tiling": True}
    recipe = override_recipe(tiny, {"representation": section, "backbone.patch_size": 1, "backbone.num_classes": 10})
    ask = {
        "pipeline": lambda: mezzotint.build(recipe).representation,
        "encoding": lambda: mezzotint.encode(recipe, tmp_path / "latents"),
    }
    with pytest.raises(MezzotintError, match="that is all"):
        ask[room]()
    assert {key: told[key] for key in section} == section


def test_what_a_text_encoder_is_told(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("mezzotint.pipeline.TextEncoder", lambda name, **options: told.append((name, options)))
    section = {"name": "text", "encoder": "t5", "max_tokens": 17, "precision": "bf16"}
    captioner(override_recipe(tiny, {"condition": section}), "meta")
    assert told == [("t5", {"max_tokens": 17, "precision": "bf16", "device": "meta"})]
