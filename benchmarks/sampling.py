"""Class-guided sampling: this library against diffusers' DiTPipeline, on the same random weights, noise and steps.

Both run DDIM with guidance on all channels in one process, in turn, decoding by the same (tiny) autoencoder; a ratio
is the median over rounds of diffusers' time over that of the row, in the same round. What each idea gives is read off
neighbouring rows. `--write FILE` puts the tables into a Markdown file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from measure import machine, median, once, table, write_section
from torch import Tensor

import mezzotint
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.interop import convert
from mezzotint.pipeline import save_weights
from mezzotint.samplers import Sampler
from mezzotint.training.parallel import choose_device

SCALE = 4.0


def folders(name: str, root: Path) -> tuple[Path, Path]:
    """A run folder of random weights and its diffusers folder, with an autoencoder that is next to nothing."""
    from diffusers import AutoencoderKL

    vae = root / "vae"
    autoencoder: Any = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=4)
    autoencoder.save_pretrained(vae)
    # diffusers' DiT has time frequencies of its own; with the same ones here both compute the same function.
    overrides = [f"backbone={name}", "backbone.freq_shift=1", "data.size=32", "representation.stride=1"]
    overrides += [f"representation.path={vae}"]
    recipe = mezzotint.load_recipe("dit-xl-2-256", overrides)
    pipeline = mezzotint.build(recipe)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    run = root / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    save_weights(pipeline.denoiser.backbone, run / "model.safetensors", {})
    return run, convert(run, root / "diffusers", to="diffusers")


def ours(
    run: Path, noise: Tensor, labels: Tensor, steps: int, *, precision: str, compiled: bool, ahead: bool
) -> Callable[[], Tensor]:
    """A function that samples by this library, from latents to decoded images."""
    pipeline = mezzotint.load(run, device=noise.device).prepare(precision, compiled=compiled)
    sampler = Sampler(sampler="ddim", spacing="ddim", steps=steps)
    generator = torch.Generator()

    @torch.no_grad()
    def draw() -> Tensor:
        model = ConditionalModel(pipeline.denoiser, labels, Guidance(scale=SCALE))
        if ahead:
            model.expect(sampler.times(model))
        *_, last = sampler.path(model, noise, generator)
        return pipeline.representation.decode(last)

    return draw


def theirs(
    folder: Path, noise: Tensor, labels: Tensor, steps: int, *, precision: str, compiled: bool
) -> Callable[[], Tensor]:
    """A function that samples by diffusers."""
    module: Any = import_module("diffusers.pipelines.dit.pipeline_dit")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pipe: Any = module.DiTPipeline.from_pretrained(folder, torch_dtype=dtype).to(noise.device)
    pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer.compile()

    def draw() -> Tensor:
        # DiTPipeline draws its own noise; both are given the same.
        original, module.randn_tensor = module.randn_tensor, lambda *_, **__: noise.to(dtype)
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z: decode(z.float())
        try:
            images = pipe(labels.tolist(), guidance_scale=SCALE, num_inference_steps=steps, output_type="pt").images
        finally:
            module.randn_tensor, pipe.vae.decode = original, decode
        return 2 * images.float() - 1

    return draw


def model_table(name: str, batch: int, steps: int, rounds: int, precisions: list[str], device: torch.device) -> str:
    """One network at one batch size, every way of running it."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 4, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 1000, (batch,), generator=generator).to(device)
    with tempfile.TemporaryDirectory() as root:
        run, folder = folders(name, Path(root))
        ways: dict[str, Callable[[], Tensor]] = {}
        for precision in precisions:
            for compiled in (False, True):
                mode = f"{precision} {'compiled' if compiled else 'eager'}"
                options: Any = {"precision": precision, "compiled": compiled}
                ways[f"diffusers, {mode}"] = theirs(folder, noise, labels, steps, **options)
                ways[f"mezzotint, {mode}"] = ours(run, noise, labels, steps, ahead=False, **options)
                ways[f"mezzotint, {mode}, conditions ahead"] = ours(run, noise, labels, steps, ahead=True, **options)
        base = next(iter(ways))
        images = {way: draw() for way, draw in ways.items()}  # warms up, too
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, draw in ways.items():
                times[way].append(once(draw, device))
    rows = []
    for way, seconds in times.items():
        apart = images[way] - images[base]
        same = next(w for w in ways if w.startswith("diffusers, " + way.split(", ")[1].split()[0]))
        rows.append(
            [
                way,
                f"{median(seconds) * 1e3 / batch / steps:.1f} ms",
                f"{median([b / s for b, s in zip(times[same], seconds, strict=True)]):.2f}×",
                f"{median([b / s for b, s in zip(times[base], seconds, strict=True)]):.2f}×",
                f"{apart.abs().max():.1e}",
                f"{apart.square().mean().sqrt():.1e}",
            ]
        )
        print(rows[-1], flush=True)
    title = [
        f"{name}, batch {batch}, {steps} steps",
        "a step, per image",
        "against diffusers eager, same precision",
        "against diffusers eager fp32",
        "largest difference from it in a pixel",
        "RMS",
    ]
    return table(title, rows)


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose section for this kind of device is replaced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", help="default: dit-s-2 dit-b-4 on a CPU, dit-xl-2 too on a GPU")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 4 on a CPU, 1 8 64 on a GPU")
    parser.add_argument("--steps", type=int, help="a divisor of 1000; default: 4 on a CPU, 50 on a GPU")
    parser.add_argument("--precisions", nargs="+", help="default: fp32 bf16; fp32 on a CPU without bf16 units")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    text = f"Measured on {machine(device)}; images in [-1, 1].\n\n"
    precisions = options.precisions or (["fp32", "bf16"] if gpu or "bf16" in machine(device) else ["fp32"])
    for name in options.models or ["dit-s-2", "dit-b-4", *(["dit-xl-2"] if gpu else [])]:
        for batch in options.batches or ([1, 8, 64] if gpu else [1, 4]):
            steps = options.steps or (50 if gpu else 4)
            text += model_table(name, batch, steps, options.rounds, precisions, device) + "\n"
    print(text)
    if options.write is not None:
        write_section(options.write, f"sampling on a {'GPU' if gpu else 'CPU'}", Path(__file__).name, text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
