"""The KL autoencoder, and caches of its posteriors: what is exact, what survives a kill, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_damage import flips

import mezzotint
from mezzotint.data import BatchOrder, CachedLatents, digits, encode_dataset, image_folder, iterate_batches
from mezzotint.data.latents import Shard, cached_latents, read_info, write_shard
from mezzotint.data.transforms import to_float
from mezzotint.encoding import encode
from mezzotint.errors import MezzotintError
from mezzotint.recipe import Recipe, override_recipe, resolve
from mezzotint.representations import KLAutoencoder, representation
from mezzotint.training.run_folder import TrainedOn

diffusers = pytest.importorskip("diffusers")

SIZE, COUNT, SHARD = 32, 11, 4  # pixels, training images, images in a file: three files, the last not full


def save_autoencoder(folder: Path, **config: Any) -> str:
    """A tiny autoencoder with Stable Diffusion's stride of 8, as diffusers writes it."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(config.pop("seed", 0))
    settings = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "scaling_factor": 0.25,
    }
    network = diffusers.AutoencoderKL(**settings | config)
    # Moments as wide as real ones; fresh weights give nearly none.
    network.quant_conv.weight.data.mul_(8)
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "vae")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        (root / f"{'cat' if i < 6 else 'dog'}").mkdir(exist_ok=True)
        picture = Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)
        picture.save(root / f"{'cat' if i < 6 else 'dog'}" / f"{i:02}.png")
    return root


@pytest.fixture
def recipe(tiny: Recipe, photos: Path, vae: str) -> Recipe:
    """The tiny recipe, on photographs through the autoencoder."""
    return override_recipe(
        tiny,
        [
            f"data=folder:{photos}",
            f"data.size={SIZE}",
            "data.channels=3",
            "data.flip=true",
            "representation=kl",
            f"representation.path={vae}",
            "backbone.patch_size=2",
            "training.batch_size=4",
            "training.checkpoint_every=3",
        ],
    )


@pytest.fixture
def cache(recipe: Recipe, tmp_path: Path) -> Path:
    return encode(recipe, tmp_path / "latents", shard_size=SHARD, batch_size=3, progress=False)


def from_cache(recipe: Recipe, cache: Path, *overrides: str) -> Recipe:
    return override_recipe(recipe, [f"data=latents:{cache}", *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def images(photos: Path) -> torch.Tensor:
    dataset = image_folder(photos, SIZE)
    return to_float(torch.stack([dataset[i][0] for i in range(COUNT)]))


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_those_of_diffusers(tmp_path: Path, photos: Path, shift: float | None) -> None:
    """Against diffusers' own formulas: scale·(posterior sample − shift), decoded by their inverse."""
    path = save_autoencoder(tmp_path, shift_factor=shift)
    network = diffusers.AutoencoderKL.from_pretrained(path).eval()
    autoencoder = KLAutoencoder(path, channels=4, stride=8)
    x = images(photos)[:3]
    with torch.no_grad():
        posterior = network.encode(x).latent_dist
        drawn = (posterior.sample(torch.Generator().manual_seed(5)) - (shift or 0)) * 0.25
        eps = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        decoded = network.decode(drawn / 0.25 + (shift or 0)).sample.clamp(-1, 1)
    mean, log_variance = autoencoder.posterior(x)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)
    torch.testing.assert_close(autoencoder.encode(x, eps), drawn)
    torch.testing.assert_close(autoencoder.encode(x), (posterior.mean - (shift or 0)) * 0.25)
    torch.testing.assert_close(autoencoder.decode(drawn), decoded)
    assert not torch.equal(mean, drawn)


MEANS, DEVIATIONS = (-1.6, 1.1, 3.0, -0.6), (8.4, 5.9, 6.6, 5.2)


@torch.no_grad()
def test_numbers_for_each_channel_are_those_of_diffusers(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    """As its SDXL pipelines do: (z − latents_mean) · scaling_factor / latents_std; from images and from a cache."""
    path = save_autoencoder(tmp_path / "vae", latents_mean=MEANS, latents_std=DEVIATIONS)
    network, x = diffusers.AutoencoderKL.from_pretrained(path), images(photos)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEANS, DEVIATIONS))
    expected = (network.encode(x).latent_dist.mean - mean) * 0.25 / std
    autoencoder = KLAutoencoder(path, channels=4, stride=8)
    torch.testing.assert_close(autoencoder.encode(x), expected)
    decoded = network.decode(expected * std / 0.25 + mean).sample.clamp(-1, 1)
    torch.testing.assert_close(autoencoder.decode(expected), decoded)
    double = KLAutoencoder(path, scale=0.5)
    torch.testing.assert_close(double.encode(x), 2 * expected)

    encode(override_recipe(recipe, [f"representation.path={path}"]), tmp_path / "latents")
    info = json.loads((tmp_path / "latents" / "latents.json").read_text())
    assert (info["scale"], info["shift"], info["std"]) == (0.25, list(MEANS), list(DEVIATIONS))
    dataset = cached_latents(tmp_path / "latents")
    moments, _ = dataset.get_batch(torch.arange(len(dataset)))
    torch.testing.assert_close(dataset.encode(moments), autoencoder.encode(images(photos)))
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(info | {"std": [1.0, 2.0]}))
    with pytest.raises(MezzotintError, match=r"latents\.json is damaged: its std has 2 numbers for 4 channels"):
        cached_latents(tmp_path / "latents")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents_mean": MEANS}, "says latents_mean; expected both of latents_mean and latents_std"),
        ({"latents_mean": MEANS, "latents_std": DEVIATIONS, "shift_factor": 0.1}, "says .* and shift_factor; expected"),
        ({"latents_mean": MEANS[:3], "latents_std": DEVIATIONS}, r"says latents_mean \[.*\], expected 4 numbers"),
        ({"latents_mean": MEANS, "latents_std": [1, 1, 1, "1"]}, r"says latents_std \[.*\], expected 4 numbers"),
        ({"latents_mean": MEANS, "latents_std": [1, 1, 0, 1]}, r"says latents_std \[.*\], expected numbers above 0"),
        ({"latents_mean": 0.1, "latents_std": DEVIATIONS}, r"says latents_mean 0\.1, expected 4 numbers"),
        ({"scaling_factor": None}, "says scaling_factor None, expected a number other than 0"),
        ({"scaling_factor": 0}, "says scaling_factor 0, expected a number other than 0"),
        ({"scaling_factor": math.nan}, "says scaling_factor nan, expected a number"),
        ({"shift_factor": "x"}, "says shift_factor 'x', expected a number"),
        ({"_class_name": "AutoencoderTiny"}, "is a diffusers AutoencoderTiny, expected an AutoencoderKL"),
        ({"_class_name": ["AutoencoderKL"]}, r"is a diffusers \['AutoencoderKL'\], expected"),
        ({"block_out_channels": 4}, "no autoencoder could be read"),
        ({"block_out_channels": []}, "no autoencoder could be read"),
        ({"latent_channels": "4"}, "no autoencoder could be read"),
        ({"norm_num_groups": 0}, "no autoencoder could be read"),
        ({"down_block_types": {"a": 1}}, "no autoencoder could be read"),
        ({"act_fn": 3}, "no autoencoder could be read"),
    ],
)
def test_a_config_that_means_nothing(changes: dict[str, Any], sentence: str, vae: str, tmp_path: Path) -> None:
    file = Path(shutil.copytree(vae, tmp_path / "vae")) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(MezzotintError, match=sentence):
        KLAutoencoder(str(file.parent))


def test_a_config_that_is_no_json(vae: str, tmp_path: Path) -> None:
    file = Path(shutil.copytree(vae, tmp_path / "vae")) / "config.json"
    for text in ("{", "[" * 200_000, "[]", ""):
        file.write_text(text)
        with pytest.raises(MezzotintError, match=r"config\.json is (missing or no JSON|not a JSON object)"):
            KLAutoencoder(str(file.parent))


@pytest.mark.parametrize("safe", [True, False])
def test_the_only_variant_is_read(safe: bool, vae: str, tmp_path: Path) -> None:
    half = diffusers.AutoencoderKL.from_pretrained(vae).half()
    half.save_pretrained(tmp_path / "vae", variant="fp16", safe_serialization=safe)
    assert len(list((tmp_path / "vae").iterdir())) == 2
    network = KLAutoencoder(str(tmp_path / "vae")).network
    assert all(torch.equal(p, q.float()) for p, q in zip(network.parameters(), half.parameters(), strict=True))
    half.save_pretrained(tmp_path / "vae", variant="other", safe_serialization=safe)
    with pytest.raises(MezzotintError, match="no autoencoder could be read"):
        KLAutoencoder(str(tmp_path / "vae"))


@pytest.mark.parametrize(("dtype", "word"), [(torch.bool, "BOOL"), (torch.int8, "I8"), (torch.float8_e5m2, "F8_E5M2")])
def test_a_quantised_autoencoder_is_refused(dtype: torch.dtype, word: str, vae: str, tmp_path: Path) -> None:
    file = Path(shutil.copytree(vae, tmp_path / "vae")) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"encoder.conv_in.weight": tensors["encoder.conv_in.weight"].to(dtype)}, file, {"format": "pt"})
    with pytest.raises(MezzotintError, match=rf"encoder\.conv_in\.weight in .* has dtype {word}, expected"):
        KLAutoencoder(str(file.parent))


def test_bf16_computes_in_bf16_and_returns_fp32(vae: str, photos: Path) -> None:
    exact, rough = KLAutoencoder(vae), KLAutoencoder(vae, precision="bf16")
    assert {p.dtype for p in rough.network.parameters()} == {torch.bfloat16}
    x = images(photos)[:2]
    for method in (KLAutoencoder.encode, lambda a, _: a.decode(exact.encode(x))):
        one, other = method(exact, x), method(rough, x)
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert (one - other).abs().mean() < 0.05 * one.std()
    assert exact.digest == KLAutoencoder(vae).digest != rough.digest


def test_a_pipeline_has_the_recipe_s_autoencoder(recipe: Recipe, vae: str) -> None:
    words = ["representation={slicing: true, tiling: true, precision: bf16, scale: 0.5}"]
    for overrides, expected in (([], (False, False, "fp32")), (words, (True, True, "bf16"))):
        pipeline = mezzotint.build(override_recipe(recipe, [f"representation.path={vae}", *overrides]))
        found = pipeline.representation
        assert isinstance(found, KLAutoencoder)
        assert (found.network.use_slicing, found.network.use_tiling, found.precision) == expected
    assert found.scale == 0.5


def test_a_recipe_takes_the_scale_of_cached_latents(recipe: Recipe, cache: Path) -> None:
    dataset = cached_latents(cache)
    unset = override_recipe(recipe, ["representation.scale=null"])
    assert resolve(unset, dataset).representation.scale == dataset.info.scale
    assert TrainedOn.of(recipe, dataset, None).autoencoder == dataset.info.autoencoder


def test_slicing_changes_nothing_and_tiling_little(vae: str) -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6) * 2 - 1, (96, 96), mode="bicubic").clamp(-1, 1)
    plain, sliced, tiled = KLAutoencoder(vae), KLAutoencoder(vae, slicing=True), KLAutoencoder(vae, tiling=True)
    x = plain.encode(smooth)
    torch.testing.assert_close(sliced.encode(smooth), x)
    torch.testing.assert_close(sliced.decode(x), plain.decode(x))
    assert tiled.encode(smooth).shape == x.shape
    assert not torch.allclose(tiled.encode(smooth), x, rtol=1e-3)
    assert tiled.decode(x).shape == smooth.shape
    assert torch.equal(tiled.encode(smooth[..., :32, :32]), plain.encode(smooth[..., :32, :32])), "no more than a tile"


def test_an_autoencoder_as_stable_diffusion_s_is_kept(tmp_path: Path, vae: str) -> None:
    """The names of diffusers 0.4 for the attention's weights, and a config that leaves what has a default."""
    old = Path(shutil.copytree(vae, tmp_path / "old"))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(old / "diffusion_pytorch_model.safetensors")
    for new, former in names.items():
        tensors = {name.replace(f".{new}.", f".{former}."): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, old / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    for key in ("scaling_factor", "shift_factor", "force_upcast", "use_quant_conv", "mid_block_add_attention"):
        del config[key]
    (old / "config.json").write_text(json.dumps(config))
    autoencoder = KLAutoencoder(str(old))
    assert (autoencoder.scale, autoencoder.shift) == (0.18215, 0.0)
    assert autoencoder.digest == KLAutoencoder(vae).digest
    assert KLAutoencoder(str(old), scale=3.0).scale == 3.0


def test_a_pipeline_s_folder_and_a_half_precision_file_will_do(tmp_path: Path, vae: str) -> None:
    shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    assert KLAutoencoder(str(tmp_path / "pipeline")).digest == KLAutoencoder(vae).digest
    diffusers.AutoencoderKL.from_pretrained(vae).half().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in KLAutoencoder(str(tmp_path / "half")).network.parameters()} == {torch.float32}


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_a_pickled_autoencoder_is_read_without_running_code(
    tmp_path: Path, vae: str, capfd: pytest.CaptureFixture[str]
) -> None:
    diffusers.AutoencoderKL.from_pretrained(vae).save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not list((tmp_path / "bin").glob("*.safetensors"))
    assert KLAutoencoder(str(tmp_path / "bin")).digest == KLAutoencoder(vae).digest
    assert capfd.readouterr().err == ""
    for protocol in (0, 2):
        with open(tmp_path / "bin" / "diffusion_pytorch_model.bin", "wb") as file:
            pickle.dump({"encoder.conv_in.weight": Malice(tmp_path / "witness")}, file, protocol=protocol)
        with pytest.raises(MezzotintError, match="no autoencoder could be read from the folder"):
            KLAutoencoder(str(tmp_path / "bin"))
    torch.save({"encoder.conv_in.weight": Malice(tmp_path / "witness")}, file.name)
    with pytest.raises(MezzotintError, match="no autoencoder could be read from the folder"):
        KLAutoencoder(str(tmp_path / "bin"))
    assert not (tmp_path / "witness").exists()


def test_an_autoencoder_that_is_not_there_says_where_to_get_it(
    tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hint = (
        r"hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema\) and set representation.path to its folder"
    )
    broken = tmp_path / "broken"
    shutil.copytree(vae, broken)
    file = broken / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", broken):
        with pytest.raises(MezzotintError, match=hint):
            KLAutoencoder(str(path))
    tensors = load_file(Path(vae) / file.name)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MezzotintError, match=r"lacks 1 of its weights \(encoder.conv_in.weight, …\)"):
        KLAutoencoder(str(broken))
    with pytest.raises(MezzotintError, match=r"representation.path must name"):
        representation("kl")
    assert capfd.readouterr().err == "", "one sentence is enough"


def test_another_autoencoder_than_the_recipe_s(vae: str, photos: Path) -> None:
    for options in ({"channels": 16}, {"stride": 4}):
        with pytest.raises(MezzotintError, match=r"4 latent channels and a stride of 8.*set representation.channels=4"):
            KLAutoencoder(vae, **({"channels": 4, "stride": 8} | options))  # type: ignore[arg-type]
    with pytest.raises(MezzotintError, match=r"takes images of 3 channels, these have 1; set data.channels=3"):
        KLAutoencoder(vae).encode(images(photos)[:, :1])


# ------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_cache_holds_the_posteriors_of_images_and_mirror_images(
    recipe: Recipe, photos: Path, vae: str, tmp_path: Path, dtype: str, flip: bool
) -> None:
    out = encode(recipe, tmp_path / "latents", dtype=dtype, shard_size=SHARD, batch_size=3, progress=False)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "latents.json",
        *(f"train/0000{k}-of-00003.safetensors" for k in range(3)),
    ]
    dataset = cached_latents(out, "train", SIZE, 3, flip=flip)
    stored = getattr(torch, dtype)
    assert load_file(out / "train" / "00002-of-00003.safetensors")["moments"].shape == (3, 8, 4, 4)
    assert (dataset.image_shape, dataset.latent_shape) == ((3, SIZE, SIZE), (4, 4, 4))
    assert dataset.class_names == ("cat", "dog")
    autoencoder, x = KLAutoencoder(vae), images(photos)
    expected = [torch.cat(autoencoder.posterior(side), 1) for side in (x, x.flip(-1))]
    order = torch.tensor([10, 3, 4, 0, 3, 7])
    moments, labels = dataset.get_batch(order)
    assert moments.dtype == stored
    assert labels.tolist() == [1, 0, 0, 0, 0, 1]
    rounding = max(torch.finfo(stored).eps, 1e-4)
    for side, found in enumerate(moments.unbind(1) if flip else [moments]):
        torch.testing.assert_close(found.float(), expected[side][order], rtol=rounding, atol=1e-5)


def test_x_is_the_autoencoder_s(cache: Path, vae: str, photos: Path) -> None:
    dataset, autoencoder, x = cached_latents(cache, flip=True), KLAutoencoder(vae), images(photos)
    moments, _ = dataset.get_batch(torch.arange(COUNT))
    which, eps = torch.rand(COUNT) < 0.5, torch.randn(COUNT, 4, 4, 4)
    expected = autoencoder.encode(torch.where(which.view(-1, 1, 1, 1), x.flip(-1), x), eps)
    torch.testing.assert_close(dataset.encode(dataset.mirror(moments, which), eps), expected)
    assert which.any()
    assert not which.all()
    drawn_again = dataset.encode(dataset.mirror(moments, which), torch.randn(COUNT, 4, 4, 4))
    assert (drawn_again - expected).abs().mean() > 0.01, "the posteriors here are wide enough to be seen"


def test_encoding_again_does_only_what_is_missing(recipe: Recipe, cache: Path, caplog: Any) -> None:
    before = contents(cache)
    encode(recipe, cache, shard_size=SHARD, progress=False)
    assert contents(cache) == before, "a finished folder is left alone"
    first, second, third = sorted((cache / "train").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    (cache / "train" / f".{first.name}.1234.tmp").write_text("of a killed process")
    encode(recipe, cache, shard_size=SHARD, batch_size=3, progress=False)
    assert "damaged" in caplog.text
    after = contents(cache)
    assert after.keys() == before.keys()
    assert all(after[path][1] == content for path, (_, content) in before.items())
    assert after[third] == before[third]


def test_processes_share_the_files(recipe: Recipe, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shared = tmp_path / "shared"
    for rank, count in ((1, 1), (0, 3)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        encode(recipe, shared, shard_size=SHARD, batch_size=3, progress=False)
        assert len(list((shared / "train").iterdir())) == count
        assert (shared / "latents.json").exists() == (rank == 0)
    for path in cache.rglob("*.*"):
        assert (shared / path.relative_to(cache)).read_bytes() == path.read_bytes()


def test_workers_decode_the_same(recipe: Recipe, cache: Path, tmp_path: Path) -> None:
    again = encode(
        override_recipe(recipe, ["data.workers=2"]), tmp_path / "again", shard_size=SHARD, batch_size=3, progress=False
    )
    for path in cache.rglob("*.*"):
        assert (again / path.relative_to(cache)).read_bytes() == path.read_bytes()


def test_a_test_split_is_encoded_where_there_is_one(recipe: Recipe, tmp_path: Path) -> None:
    halves = override_recipe(recipe, ["data.test_fraction=0.3"])
    out = encode(halves, tmp_path / "both", progress=False)
    assert (len(cached_latents(out, "train")), len(cached_latents(out, "test"))) == (7, 4)
    assert cached_latents(out, "test", flip=True).get_batch(torch.tensor([0]))[0].ndim == 4, "only training is flipped"
    later = encode(halves, tmp_path / "later", splits=["test"], progress=False)
    with pytest.raises(MezzotintError, match="has no train split, only test; encode it, too"):
        cached_latents(later)
    encode(halves, later, splits=["train"], progress=False)
    assert read_info(later).splits == read_info(out).splits
    with pytest.raises(MezzotintError, match="no test split"):
        encode(recipe, tmp_path / "none", splits=["test"], progress=False)


def test_unlabelled_images(recipe: Recipe, photos: Path, cache: Path, tmp_path: Path) -> None:
    out = encode(override_recipe(recipe, ["data.labels=false"]), tmp_path / "unlabelled", progress=False)
    for dataset in (cached_latents(out), cached_latents(cache, labels=False)):
        assert dataset.class_names == ()
        assert dataset.get_batch(torch.arange(3))[1].tolist() == [-1] * 3
        batch = next(iterate_batches(dataset, BatchOrder.over(dataset, 4), start_step=0, stop_step=1))
        assert batch.labels is None
    identities = {cached_latents(out).identity, cached_latents(cache).identity}
    assert len(identities | {cached_latents(cache, labels=False).identity}) == 3


def test_other_numbers_in_a_file_are_another_data_set(cache: Path, tmp_path: Path) -> None:
    """Another machine's bits, say: the files describe themselves as before, and are whole."""
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    assert cached_latents(other).identity == cached_latents(cache).identity
    info = read_info(other)
    file = other / info.file("train", 0)
    tensors = load_file(file)
    tensors.pop("checksums")
    write_shard(file, tensors | {"moments": tensors["moments"] + 1e-3}, info.fingerprint("train"))
    assert cached_latents(other).identity != cached_latents(cache).identity


def test_kill_9_loses_no_finished_file(recipe: Recipe, cache: Path, tmp_path: Path) -> None:
    """A real process, killed while it encodes; then the same again, here and to the end, and training on the result."""
    out = tmp_path / "killed"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    program = f"""
import time
from mezzotint.data import latents
from mezzotint.encoding import encode
from mezzotint.recipe import load_recipe
write = latents.write_shard
latents.write_shard = lambda path, *rest: (write(path, *rest), time.sleep(600))
encode(load_recipe({str(tmp_path / "recipe.yaml")!r}), {str(out)!r}, shard_size={SHARD}, batch_size=3)
"""

    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(out.glob("train/0*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(MezzotintError, match=r"train has 1 of 3 files; run the same 'mezzotint encode' again"):
        mezzotint.train(from_cache(recipe, out), tmp_path / "run", quiet=True)
    before = {path: content for path, content in contents(out).items() if path.suffix == ".safetensors"}
    encode(recipe, out, shard_size=SHARD, batch_size=3, progress=False)
    assert before.items() <= contents(out).items()
    assert not list(out.glob(".*")), "the lock of the killed process holds nobody back, and is gone"
    for path in cache.rglob("*.*"):
        assert (out / path.relative_to(cache)).read_bytes() == path.read_bytes()
    trained = mezzotint.train(from_cache(recipe, out), tmp_path / "run", quiet=True)
    assert mezzotint.sample(trained, ["dog"], 2).shape == (2, 3, SIZE, SIZE)


# ------------------------------------------------------------------------------------------------------- training


def test_training_on_a_cache_is_training_on_the_images(recipe: Recipe, cache: Path, tmp_path: Path) -> None:
    """The same batches, flips and posterior noise: so the same weights, to rounding."""
    recipe = override_recipe(recipe, ["training.lr=1e-3", "training.ema=[]"])
    mezzotint.train(recipe, tmp_path / "images", quiet=True, device="cpu")
    mezzotint.train(from_cache(recipe, cache), tmp_path / "cache", quiet=True, device="cpu")
    other = weights(tmp_path / "cache")
    for name, tensor in weights(tmp_path / "images").items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)
    saved = mezzotint.load_recipe(tmp_path / "cache")
    assert saved.representation.scale == 0.25, "so that samples are decoded by the scale of the cache"
    unflipped = override_recipe(recipe, ["data.flip=false"])
    for name, settings in {"plain-images": unflipped, "plain-cache": from_cache(unflipped, cache)}.items():
        mezzotint.train(settings, tmp_path / name, quiet=True, device="cpu")
    other = weights(tmp_path / "plain-cache")
    for name, tensor in weights(tmp_path / "plain-images").items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, weights(tmp_path / "cache")[name]) for name, tensor in other.items())


def test_no_autoencoder_is_needed_until_samples_are(
    recipe: Recipe, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    without = from_cache(recipe, cache, f"representation.path={tmp_path / 'nowhere'}")
    mezzotint.train(without, tmp_path / "run", quiet=True)
    with pytest.raises(MezzotintError, match="download stabilityai/sd-vae-ft-ema"):
        mezzotint.sample(mezzotint.load(tmp_path / "run"), count=1)
    with pytest.raises(MezzotintError, match="download stabilityai/sd-vae-ft-ema"):
        mezzotint.train(override_recipe(without, ["training.sample_every=6"]), tmp_path / "shown", quiet=True)
    assert not (tmp_path / "shown").exists(), "said before the first step, not at the first grid"
    mezzotint.train(from_cache(recipe, cache, "training.sample_every=6"), tmp_path / "shown", quiet=True)
    assert (tmp_path / "shown" / "samples" / "step-00000006.png").exists()


def test_resuming_on_a_cache_is_exact_whatever_the_workers(recipe: Recipe, cache: Path, tmp_path: Path) -> None:
    whole = from_cache(recipe, cache)
    mezzotint.train(whole, tmp_path / "whole", quiet=True)
    mezzotint.train(override_recipe(whole, ["training.steps=3"]), tmp_path / "parts", quiet=True)
    mezzotint.train(override_recipe(whole, ["data.workers=2"]), tmp_path / "parts", resume=True, quiet=True)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name])


def test_the_validation_loss_of_a_cache_is_that_of_the_images(recipe: Recipe, tmp_path: Path) -> None:
    recipe = override_recipe(recipe, ["data.test_fraction=0.4", "training.validate_every=6"])
    out = encode(recipe, tmp_path / "latents", progress=False)
    losses = []
    for name, settings in {"images": recipe, "cache": from_cache(recipe, out, "data.test_fraction=0")}.items():
        mezzotint.train(settings, tmp_path / name, quiet=True)
        lines = (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines()
        losses += [json.loads(line)["loss/validation"] for line in lines if "validation" in line]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_cache_is_read_in_threads_in_forks_and_after_pickling(cache: Path) -> None:
    dataset = cached_latents(cache, flip=True)
    copy = pickle.loads(pickle.dumps(dataset))
    order = BatchOrder.over(dataset, 4, seed=1)
    alone = list(iterate_batches(dataset, order, start_step=0, stop_step=7))
    assert [batch.images.shape for batch in alone] == [(4, 2, 8, 4, 4)] * 7
    for other, workers in ((copy, 0), (dataset, 3)):
        again = iterate_batches(other, order, start_step=0, stop_step=7, workers=workers)
        for one, two in zip(alone, again, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)  # type: ignore[arg-type]
    halves = [list(iterate_batches(dataset, order, start_step=0, stop_step=7, rank=r, world_size=2)) for r in (0, 1)]
    for one, *parts in zip(alone, *halves, strict=True):
        assert torch.equal(one.images, torch.cat([part.images for part in parts]))


def test_no_file_stays_open(cache: Path) -> None:
    dataset = cached_latents(cache)
    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    for _ in range(5):
        dataset.get_batch(torch.randperm(COUNT))
    assert len(os.listdir("/proc/self/fd") if before else []) <= len(before)


# --------------------------------------------------------------------------------------------- what can go wrong


def test_a_folder_of_other_latents_is_refused(recipe: Recipe, photos: Path, cache: Path, tmp_path: Path) -> None:
    before = contents(cache)
    other = save_autoencoder(tmp_path / "other", seed=1)
    part = tmp_path / "photos"
    shutil.copytree(photos / "cat", part / "cat")
    for overrides, options, sentence in (
        ([f"representation.path={other}"], {}, r"autoencoder \([0-9a-f]{16} there, [0-9a-f]{16} here\)"),
        (["representation.precision=bf16"], {}, r"precision \(fp32 there, bf16 here\)"),
        (["representation.tiling=true"], {}, r"tiling \(False there, True here\)"),
        (["representation.scale=2"], {}, r"scale \(0.25 there, 2.0 here\)"),
        (["data.size=48"], {}, r"image_shape \(\(3, 32, 32\) there, \(3, 48, 48\) here\)"),
        ([f"data.path={part}"], {}, r"examples \(11 there, 6 here\)"),
        (["data.labels=false"], {}, r"identity \(.* there, .* here\)"),
        ([], {"dtype": "float16"}, r"dtype \(float32 there, float16 here\)"),
        ([], {"shard_size": 5}, r"shard_size \(4 there, 5 here\)"),
        (
            ["data.test_fraction=0.5"],
            {"splits": ["test"], "dtype": "float16"},
            r"dtype \(float32 there, float16 here\)",
        ),
    ):
        with pytest.raises(MezzotintError, match=f"holds other latents: .*{sentence}.*; encode"):
            encode(override_recipe(recipe, overrides), cache, progress=False, **({"shard_size": SHARD} | options))
    (cache / "latents.json").unlink()
    with pytest.raises(MezzotintError, match=r"is not one of the files that .*latents.json describes"):
        encode(override_recipe(recipe, ["representation.scale=2"]), cache, shard_size=SHARD, progress=False)
    assert {path: content for path, content in before.items() if path.suffix != ".json"}.items() <= (
        contents(cache).items()
    )


def test_a_folder_of_other_things_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for out, why in ((tmp_path, "is not empty and not a folder of latents"), (tmp_path / "thesis.tex", "is a file")):
        with pytest.raises(MezzotintError, match=f"{why}.*; choose another"):
            encode(recipe, out, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_cannot_be_encoded(recipe: Recipe, tiny: Recipe, cache: Path, vae: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for settings, options, sentence in (
        (tiny, {}, "'pixels' has no latents to encode; set representation=kl"),
        (from_cache(recipe, cache), {}, "the data are latents already; set data to the images"),
        (recipe, {"dtype": "int8"}, r"dtype = 'int8' is not valid"),
        (recipe, {"shard_size": 0}, "shard_size must be at least 1, got 0"),
        (recipe, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (recipe, {"splits": []}, "splits names no split"),
        (recipe, {"splits": ["dev"]}, "split 'dev' is unknown; expected train or test"),
        (override_recipe(recipe, ["representation.channels=16"]), {}, "set representation.channels=4"),
        (override_recipe(recipe, ["data.channels=1"]), {}, "takes images of 3 channels, these have 1"),
    ):
        with pytest.raises(MezzotintError, match=sentence):
            encode(settings, out, progress=False, **options)
    with pytest.raises(MezzotintError, match="30 × 30 pixels are not divisible by the autoencoder's stride 8"):
        encode_dataset(digits(size=30, channels=3), KLAutoencoder(vae), out)

    class Stream:
        image_shape, class_names, identity = (3, SIZE, SIZE), (), "stream"
        read = decode = lambda *_: None

    with pytest.raises(MezzotintError, match=r"a stream has no end and cannot be encoded; set data.streaming=false"):
        encode_dataset(Stream(), KLAutoencoder(vae), out)  # type: ignore[arg-type]
    assert not list(out.rglob("*.safetensors"))


def test_moments_that_the_dtype_cannot_hold(photos: Path, vae: str, tmp_path: Path) -> None:
    autoencoder = KLAutoencoder(vae)
    autoencoder.network.quant_conv.bias.data.fill_(1e6)
    with pytest.raises(
        MezzotintError, match="train images 0 to 10 are not finite numbers of float16; encode with dtype"
    ):
        encode_dataset(image_folder(photos, SIZE), autoencoder, tmp_path / "out", dtype="float16")
    encode_dataset(image_folder(photos, SIZE), autoencoder, tmp_path / "wide", dtype="bfloat16")


def test_a_full_disk_is_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    """A real failing write: the process may not write files of more than 3 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3072, hard))
    try:
        with pytest.raises(MezzotintError, match=r"cannot write .*00000-of-00003.safetensors"):
            encode(recipe, tmp_path / "out", shard_size=SHARD, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out" / "train").iterdir())
    encode(recipe, tmp_path / "out", shard_size=SHARD, progress=False)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda cache, first: shutil.rmtree(cache),
            "is not a folder of latents: it has no latents.json; make one with",
        ),
        (lambda cache, first: first.unlink(), "train has 2 of 3 files; run the same 'mezzotint encode' again"),
        (lambda cache, first: first.write_bytes(first.read_bytes()[:-4]), "damaged: it has .* bytes, but its header"),
        (lambda cache, first: first.write_bytes(first.read_bytes() + b"more"), "damaged: it has .* bytes, but its"),
        (lambda cache, first: first.write_bytes(b"hello"), "damaged: its header is cut off; run the same"),
        (lambda cache, first: first.write_bytes(bytes(1000)), "damaged: .*; run the same 'mezzotint encode' again"),
        (lambda cache, first: save_file({"x": torch.zeros(2)}, first), "is not one of the files that"),
        (
            lambda cache, first: shutil.copy(first.with_name("00001-of-00003.safetensors"), first),
            "damaged: .* or is another file of the folder; run the same",
        ),
        (lambda cache, first: (cache / "latents.json").write_text("{"), "latents.json cannot be read"),
        (lambda cache, first: (cache / "latents.json").write_text('{"format": 9}'), "is not of format 1"),
        (
            lambda cache, first: (cache / "latents.json").write_text('{"format": 1}'),
            "damaged: key 'image_shape' is mis",
        ),
    ],
)
def test_a_damaged_cache_is_not_trained_on(
    recipe: Recipe, cache: Path, tmp_path: Path, damage: Callable[[Path, Path], object], sentence: str
) -> None:
    damage(cache, sorted((cache / "train").iterdir())[0])
    with pytest.raises(MezzotintError, match=sentence):
        mezzotint.train(from_cache(recipe, cache), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def write_header(shard: Path, change: Callable[[dict], object]) -> None:
    """Change the header of a safetensors file, and leave the tensors where they are."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def write_labels(shard: Path, label: int) -> None:
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    start = 8 + length + json.loads(content[8 : 8 + length])["labels"]["data_offsets"][0]
    shard.write_bytes(content[:start] + label.to_bytes(8, "little", signed=True) + content[start + 8 :])


def write_info(cache: Path, **values: object) -> None:
    info = json.loads((cache / "latents.json").read_text(encoding="utf-8-sig"))
    info["splits"]["train"]["examples"] = values.pop("examples", info["splits"]["train"]["examples"])
    (cache / "latents.json").write_text(json.dumps(info | values), encoding="utf-8-sig")


def sparse(shard: Path) -> None:
    """A terabyte with a hole, half of it the header."""
    with open(shard, "wb") as file:
        file.write((2**39).to_bytes(8, "little"))
        file.truncate(2**40)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda c, _: write_info(c, examples=10**12, shard_size=1), "train has 3 of 1000000000000 files; run the same"),
        (lambda c, _: write_info(c, examples=10**18), "train has 3 of 250000000000000000 files; run"),
        (lambda c, _: (c / "latents.json").write_text("[" * 100_000), "cannot be read .it is nested too deeply"),
        (lambda _, f: f.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5), "damaged: it is nested too deeply"),
        (lambda _, f: sparse(f), "damaged: its header is cut off; run the same"),
        (lambda _, f: write_header(f, lambda h: h["moments"].update(data_offsets=[0, 4])), "puts moments at 0 to 4"),
        (lambda _, f: write_header(f, lambda h: h["labels"].update(data_offsets=[-32, 0])), "puts labels at -32 to 0"),
        (lambda _, f: write_header(f, lambda h: h["moments"].update(data_offsets=[0.0, 4])), "damaged: 'float' object"),
        (lambda _, f: write_header(f, lambda h: h["labels"].update(shape=[10**12])), "is not one of the files that"),
        (lambda _, f: write_labels(f, 10**9), "damaged: it has labels from 0 to 1000000000 of 2 classes; run the same"),
        (lambda _, f: write_labels(f, -2), "damaged: it has labels from -2 to 0 of 2 classes; run the same"),
    ],
)
def test_a_cache_that_lies_is_refused_at_once(
    cache: Path, damage: Callable[[Path, Path], object], sentence: str
) -> None:
    write_info(cache)  # a byte-order mark is no damage
    assert len(cached_latents(cache)) == COUNT
    damage(cache, sorted((cache / "train").iterdir())[0])
    begun = time.perf_counter()
    with pytest.raises(MezzotintError, match=sentence):
        cached_latents(cache)
    assert time.perf_counter() - begun < 1


def test_every_flipped_bit_of_a_shard_is_found(cache: Path) -> None:
    indices = torch.arange(COUNT)
    expected = cached_latents(cache, flip=True).get_batch(indices)
    passed = 0
    for _ in flips(sorted((cache / "train").iterdir())[0], 400):
        try:
            found = cached_latents(cache, flip=True).get_batch(indices)
        except MezzotintError:
            continue
        passed += 1  # in the name or the digits of `save_tensors`'s own checksum, which `encode` alone looks at
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert passed <= len('"crc32":"01234567"')


def test_a_flipped_example_is_named_and_encoding_mends_it(recipe: Recipe, cache: Path) -> None:
    dataset, expected = cached_latents(cache), contents(cache)
    shard = dataset.shards[1]
    assert isinstance(shard, Shard)
    content = bytearray(shard.path.read_bytes())
    content[shard.offsets["moments"]] ^= 1
    shard.path.write_bytes(content)
    with pytest.raises(MezzotintError, match=rf"00001-of-00003.* example {SHARD} has another content .*encode' again"):
        dataset.get_batch(torch.arange(COUNT))
    encode(recipe, cache, shard_size=SHARD, batch_size=3, progress=False)
    assert [content for _, content in contents(cache).values()] == [content for _, content in expected.values()]


def test_shards_of_earlier_versions_are_read(cache: Path) -> None:
    indices = torch.arange(COUNT)
    expected = cached_latents(cache).get_batch(indices)
    for file in (cache / "train").iterdir():
        tensors = load_file(file)
        del tensors["checksums"]
        with safe_open(file, "pt") as opened:
            save_file(tensors, file, {"cache": opened.metadata()["cache"]})
    found = cached_latents(cache).get_batch(indices)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_file_that_shrinks_during_training(cache: Path) -> None:
    dataset = cached_latents(cache)
    shard = dataset.shards[1]
    assert isinstance(shard, Shard)
    shard.path.write_bytes(shard.path.read_bytes()[:-3000])
    with pytest.raises(MezzotintError, match=r"00001-of-00003.safetensors cannot be read: it has become shorter"):
        dataset.get_batch(torch.arange(COUNT))
    shard.path.unlink()
    with pytest.raises(MezzotintError, match=r"00001-of-00003.safetensors cannot be read: No such file"):
        dataset.get_batch(torch.arange(COUNT))
    assert len(dataset.get_batch(torch.arange(4))[0]) == 4


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.size=64"], r"of images of \(3, 32, 32\), expected \(3, 64, 64\) .*set data.size and data.channels"),
        (["data.channels=1"], r"of images of \(3, 32, 32\), expected \(1, 32, 32\)"),
        (["representation=pixels"], "the recipe's representation is pixels; set representation=kl"),
        (["representation.channels=16"], r"latents are \(4, 4, 4\), expected \(16, 4, 4\) .*representation.channels"),
        (["representation.stride=4"], r"latents are \(4, 4, 4\), expected \(4, 8, 8\) .*representation.stride"),
        (["representation.scale=0.5"], r"for a scale of 0.25, but representation.scale is 0.5; set it to null"),
        (["data.test_fraction=0.5"], r"data.test_fraction means nothing for the data set 'latents'"),
        (["training.validate_every=1"], "has no test split, only train; encode it, too"),
    ],
)
def test_a_recipe_must_fit_the_cache(
    recipe: Recipe, cache: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(MezzotintError, match=sentence):
        mezzotint.train(from_cache(recipe, cache, *overrides), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_latents_are_no_images_to_compare_with(cache: Path) -> None:
    from mezzotint.evaluation.sources import image_source

    dataset = cached_latents(cache)
    assert isinstance(dataset, CachedLatents)
    with pytest.raises(MezzotintError, match=r"holds latents, and images are needed; set data to the images"):
        dataset[0]
    settings = mezzotint.load_recipe("digits", [f"data=latents:{cache}", "data.size=32", "data.channels=3"]).data
    with pytest.raises(MezzotintError, match=r"latents"):
        next(image_source(settings, split="train").batches(4))
