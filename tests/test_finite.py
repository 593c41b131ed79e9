"""NaN and infinity are noticed where they arise: never saved, exported, scored or drawn. And seeds are 64 bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint
from mezzotint.data import BatchOrder
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.features import FeatureNetwork, feature_network
from mezzotint.evaluation.reference import reference_statistics
from mezzotint.evaluation.scores import evaluate, mean_bits_per_dim
from mezzotint.evaluation.sources import image_source
from mezzotint.finite import nonfinite
from mezzotint.interop import load as load_any
from mezzotint.pipeline import save_weights
from mezzotint.randomness import generator_for
from mezzotint.recipe import Recipe, load_recipe, override_recipe
from mezzotint.samplers import example_generators
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.ema import EMA

NAN, INF = math.nan, math.inf


def poison(pipeline: mezzotint.Pipeline, value: float = NAN) -> str:
    """Makes one weight `value`; returns its tensor's name."""
    with torch.no_grad():
        pipeline.denoiser.backbone.get_parameter("final_layer.linear.weight")[0, 0] = value
    return "final_layer.linear.weight"


def test_the_first_tensor_that_is_not_finite() -> None:
    fine = {
        "large": torch.tensor([1e300, -1e300], dtype=torch.float64),
        "half": torch.tensor([65504.0], dtype=torch.float16),
        "integers": torch.tensor([2**62]),
        "flags": torch.tensor([True]),
        "none": torch.empty(0, 3),
        "shapes": torch.empty(2, device="meta"),
        "complex": torch.tensor([1 + 2j]),
        "eighth": torch.tensor([448.0]).to(torch.float8_e4m3fn),
    }
    assert nonfinite(fine) is None
    assert nonfinite({}) is None
    bad = {
        "nan": torch.tensor([1.0, NAN, 2.0]),
        "inf": torch.tensor([[1.0], [INF]], dtype=torch.bfloat16),
        "-inf": torch.tensor(-INF, dtype=torch.float64),
        "imaginary": torch.tensor([complex(0, NAN)]),
        "eighth": torch.tensor([NAN]).to(torch.float8_e4m3fn),
    }
    for name, tensor in bad.items():
        assert nonfinite({**fine, name: tensor, "later": torch.tensor(NAN)}) == name


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.ema=[1.5]", "training.ema.0 = 1.5 is not valid: input should be less than 1"),
        ("training.ema=[0.9,1]", "training.ema.1 = 1 is not valid: input should be less than 1"),
        ("training.ema=[-0.1]", "input should be greater than or equal to 0"),
        ("training.ema=[.nan]", "training.ema.0 = nan is not valid: input should be a finite number"),
        ("training.betas=[0.9,1.0]", "training.betas.1 = 1.0 is not valid: input should be less than 1"),
        ("training.betas=[-1,0.9]", "training.betas.0 = -1 is not valid"),
        ("representation.fit.betas=[0.5,1]", "representation.fit.betas.1 = 1 is not valid"),
        ("training.lr=3e38", "training.lr = 3e+38 is not valid: input should be less than or equal to"),
        ("training.ssm_lr=3e38", "training.ssm_lr = 3e+38 is not valid"),
        ("representation.fit.lr=3e38", "representation.fit.lr = 3e+38 is not valid"),
        ("training.stages=[{levels: 1, steps: 1, lr: 3.0e+38}]", "training.stages.0.lr = 3e+38 is not valid"),
        ("training.lr=.nan", "training.lr = nan is not valid: input should be a finite number"),
        ("training.weight_decay=.inf", "training.weight_decay = inf is not valid: input should be a finite number"),
        ("training.weight_decay=1.0e+39", "training.weight_decay = 1e+39 is not valid: numbers go up to 3.4e38"),
        ("guidance.scale=.inf", "guidance.scale = inf is not valid: input should be a finite number"),
        ("guidance.scale=1.0e+39", "guidance.scale = 1e+39 is not valid: numbers go up to 3.4e38"),
        ("guidance.interval=[.nan,1]", "guidance.interval.0 = nan is not valid"),
        ("sampling.rtol=.nan", "sampling.rtol = nan is not valid: input should be a finite number"),
        ("objective.time_mean=-.inf", "objective.time_mean = -inf is not valid"),
        ("objective.level_weights=[1.0e+39]", "objective.level_weights = [1e+39] is not valid"),
        ("time_input=[.inf,0]", "time_input.0 = inf is not valid"),
        ("interpolant.beta_max=.inf", "interpolant.beta_max = inf is not valid"),
    ],
)
def test_settings_that_make_them_are_refused(override: str, sentence: str) -> None:
    with pytest.raises(MezzotintError) as caught:
        load_recipe("digits", [override])
    assert sentence in str(caught.value)


def test_the_largest_number_is_none(pipeline: mezzotint.Pipeline) -> None:
    assert load_recipe("digits", ["guidance.scale=3.4e+38", "training.betas=[0,0]", "training.ema=[0.0]"])
    for scale in (INF, NAN, 1e39):
        with pytest.raises(MezzotintError, match=r"^scale = "):
            mezzotint.sample(pipeline, count=1, guidance=scale)


# ------------------------------------------------------------------------------------------------------------ training


@contextmanager
def after(step: int, change: Callable[[EMA[Any], torch.nn.Module], None]) -> Iterator[None]:
    """Runs `change` once that many steps are done."""
    update = EMA.update

    def changed(ema: EMA[Any], module: torch.nn.Module, number: int) -> None:
        update(ema, module, number)
        if number == step:
            change(ema, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMA, "update", changed)
        yield


def spoil_weights(ema: EMA[Any], module: torch.nn.Module) -> None:
    module.backbone.final_layer.linear.bias.data[0] = NAN  # type: ignore[union-attr]


def spoil_average(ema: EMA[Any], module: torch.nn.Module) -> None:
    ema.averages[0]["backbone.final_layer.linear.bias"][0] = INF


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_average])
@pytest.mark.parametrize("step", [4, 6])
def test_what_the_last_step_spoiled_is_not_saved(tiny: Recipe, tmp_path: Path, spoil: Any, step: int) -> None:
    """The losses until then are finite: only the state tells. Step 6 is the run's last, step 4 a checkpoint's."""
    run = tmp_path / "run"
    sentence = rf"^step {step} made NaN or infinite numbers \(\S*final_layer.linear.bias\), .*step-0000000{step - 2}"
    with after(step, spoil), pytest.raises(MezzotintError, match=sentence):
        mezzotint.train(tiny, run, quiet=True)
    assert sorted(path.name for path in (run / "state").iterdir())[-1] == f"step-0000000{step - 2}"
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model.safetensors").values())


def test_moments_that_overflow_are_not_saved(tiny: Recipe, tmp_path: Path) -> None:
    """A gradient of 1e22 has a square that float32 does not hold: the weight would stand still for ever."""

    def steepen(ema: EMA[Any], module: torch.nn.Module) -> None:
        module.backbone.final_layer.linear.bias.register_hook(lambda gradient: gradient + 1e22)  # type: ignore[union-attr]

    with after(1, steepen), pytest.raises(MezzotintError, match=r"^step 2 made .*exp_avg_sq\).*no checkpoint"):
        mezzotint.train(tiny, tmp_path / "run", quiet=True)


def test_gradients_that_overflow_are_named_with_their_step(tiny: Recipe, tmp_path: Path) -> None:
    """Clipping divides by an infinite norm, which would make every gradient zero; with micro-batches, too."""

    def steepen(ema: EMA[Any], module: torch.nn.Module) -> None:
        module.backbone.final_layer.linear.bias.register_hook(lambda gradient: gradient + 1e20)  # type: ignore[union-attr]

    recipe = override_recipe(
        tiny,
        ["training.grad_clip=1.0", "training.accumulate=2", "training.log_every=100", "training.checkpoint_every=6"],
    )
    sentence = r"^the gradients' norm became inf at step 4 \(examples \d+.*Lower training.lr"
    with after(3, steepen), pytest.raises(MezzotintError, match=sentence):
        mezzotint.train(recipe, tmp_path / "run", quiet=True)


def test_a_state_with_nan_is_not_gone_on_with(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing is left to do but to write the weights."""
    mezzotint.train(tiny, tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    read = Checkpoints.load

    def spoiled(self: Checkpoints, step: int, state: dict[str, Any]) -> int:
        step = read(self, step, state)
        next(iter(state["ema"]["0"].values())).fill_(NAN)
        return step

    monkeypatch.setattr(Checkpoints, "load", spoiled)
    with pytest.raises(MezzotintError, match=r"step-00000006 holds NaN or infinite numbers \(ema.0.backbone"):
        mezzotint.train(tiny, tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_validation_loss_of_nan_is_told(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mezzotint.training.loop.validation_loss", lambda *_: NAN)
    mezzotint.train(override_recipe(tiny, ["training.validate_every=3"]), tmp_path / "run", quiet=True)
    assert "the validation loss is nan at step 3" in caplog.text
    assert "NaN" not in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_that_are_nan_are_neither_written_nor_read(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(pipeline.recipe.to_yaml())
    file = run / "model.safetensors"
    save_weights(pipeline.denoiser.backbone, file, {})
    before = file.read_bytes()
    name = poison(pipeline)
    with pytest.raises(MezzotintError, match=f"^{name} of what was to be written holds NaN"):
        save_weights(pipeline.denoiser.backbone, file, {})
    assert file.read_bytes() == before
    assert [path.name for path in run.glob("*.safetensors")] == ["model.safetensors"]
    save_file(pipeline.denoiser.backbone.state_dict(), file, {"format": "mezzotint"})
    with pytest.raises(MezzotintError, match=rf"^{name} of .*model.safetensors holds NaN or infinite numbers"):
        mezzotint.load(run)
    torch.save(pipeline.denoiser.backbone.state_dict(), tmp_path / "official.pt")
    with pytest.raises(MezzotintError, match=rf"^{name} of .*official.pt holds NaN or infinite numbers"):
        load_any(tmp_path / "official.pt", recipe=pipeline.recipe)


# ------------------------------------------------------------------------------------------------------------- samples


def test_images_that_are_nan_are_no_images(pipeline: mezzotint.Pipeline, tmp_path: Path) -> None:
    with torch.no_grad():
        table = next(p for name, p in pipeline.denoiser.backbone.named_parameters() if "y_embedder" in name)
        table[8] = NAN
    assert mezzotint.sample(pipeline, [3], count=2).isfinite().all()
    sentence = (
        r"^the model gave NaN or infinite numbers for 2 of 4 images, the first being number 2; lower the guidance"
    )
    for options in ({}, {"trajectory": True}):
        with pytest.raises(MezzotintError, match=sentence):
            mezzotint.sample(pipeline, [3, 8], count=4, **options)
    with pytest.raises(MezzotintError, match="for 1 of 3 images, the first being number 2"):
        mezzotint.sample(pipeline, [3, 8], count=4, batch_size=3)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pictures_are_not_made_of_them(value: float, tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, 3, 4] = value
    for write in (mezzotint.images.save_grid, mezzotint.images.save_pngs):
        with pytest.raises(MezzotintError, match="the images hold NaN or infinite numbers"):
            write(images, tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MezzotintError, match="NaN or infinite"):
            to_uint8(images)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_adaptive_solver_says_so(pipeline: mezzotint.Pipeline) -> None:
    poison(pipeline)
    with pytest.raises(MezzotintError, match="NaN"):
        mezzotint.sample(pipeline, [3], count=1, sampler="ode-dopri5")


# -------------------------------------------------------------------------------------------------------------- scores


def test_a_network_of_nan_is_not_scored(pipeline: mezzotint.Pipeline) -> None:
    poison(pipeline)
    with pytest.raises(MezzotintError, match="NaN or infinite numbers for 20 of 20 images"):
        evaluate(pipeline, features="pixels", count=20, steps=2, sampler="ode-euler")
    some = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(MezzotintError, match="NaN"):
        mean_bits_per_dim(pipeline, some, torch.zeros(2, dtype=torch.int64))


def test_statistics_of_nan_are_not_compared_with(tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, np.random.default_rng(0).integers(0, 256, (20, 2, 2, 1), dtype=np.uint8))
    network = feature_network("pixels")
    reference = reference_statistics(images, network, rows=3, cache=False)
    for key, sentence in (
        ("mu", "real statistics contain NaN"),
        ("sigma", "real statistics"),
        ("rows", "rows of .*NaN"),
    ):
        reference.save(tmp_path / "real.npz")
        arrays = dict(np.load(tmp_path / "real.npz"))
        arrays[key].flat[0] = NAN
        np.savez(tmp_path / "real.npz", **arrays)
        with pytest.raises(MezzotintError, match=sentence):
            evaluate(str(images), str(tmp_path / "real.npz"), features=network, rows=3)


def test_a_text_encoder_that_gives_nan() -> None:
    network = FeatureNetwork(
        "mine", lambda images: images.flatten(1) / 1.0, dim=2, embed=lambda texts: torch.full((len(texts), 2), NAN)
    )
    with pytest.raises(MezzotintError, match="mine gave NaN or infinite text for 2 of 2"):
        network.embed_text(["a", "b"])


# --------------------------------------------------------------------------------------------------------------- seeds

SENTENCE = r"the seed is {}; expected 0 to 18446744073709551615, which is 2\^64 - 1"


@pytest.mark.parametrize("seed", [2**63 + 1, 2**64 - 1])
def test_seeds_of_64_bits(pipeline: mezzotint.Pipeline, seed: int) -> None:
    assert load_recipe("digits", [f"seed={seed}"]).seed == seed
    assert mezzotint.build(override_recipe(pipeline.recipe, [f"seed={seed}"]))
    assert BatchOrder(5, 5, seed).indices(0).sort().values.tolist() == [0, 1, 2, 3, 4]
    one, other = (mezzotint.sample(pipeline, [3], count=1, seed=number) for number in (seed, seed - 1))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_other_seeds_are_refused_everywhere_in_the_same_words(
    pipeline: mezzotint.Pipeline, seed: int, command: Any
) -> None:
    """2^64 would otherwise be 0, and so on."""
    shown = {-1: "-1", 2**64: "a number of 65 bits", 10**30: "a number of 100 bits"}[seed]
    sentence = SENTENCE.format(shown)
    ways: list[Callable[[], Any]] = [
        lambda: load_recipe("digits", [f"seed={seed}"]),
        lambda: mezzotint.sample(pipeline, [3], count=1, seed=seed),
        lambda: BatchOrder(5, 5, seed),
        lambda: generator_for(seed, 3),
        lambda: example_generators(seed, [0]),
        lambda: image_source(pipeline, count=2, seed=seed, steps=1, sampler="ode-euler").batches(2).__next__(),
    ]
    for way in ways:
        with pytest.raises(MezzotintError, match=sentence):
            way()
    for words in (["sample", "nothing"], ["evaluate", "nothing"], ["probe", "nothing"], ["finetune", "nothing"]):
        result = command(*words, "--seed", seed)
        assert result.code == 2
        assert sentence.replace("\\", "") in result.err


def test_a_seed_of_ten_thousand_digits_is_a_sentence() -> None:
    with pytest.raises(MezzotintError, match="the seed is a number of 33220 bits"):
        generator_for(10**10_000)


def test_guidance_is_looked_at_before_anything_is_drawn(
    pipeline: mezzotint.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mezzotint.evaluation.scores.reference_statistics", None)
    with pytest.raises(MezzotintError, match="scale = inf is not valid: input should be a finite number"):
        evaluate(pipeline, guidance=INF)
