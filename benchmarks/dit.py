"""DiT-S/2 against this machine's own matrix-multiply rate: forward, training step, sampling. `make bench` runs it.

Everything is measured in one process, so its ratios compare like with like; absolute times are this machine's. Rates
count multiply-adds (GMAC/s), as the papers do. `--write FILE` puts the tables into a Markdown file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import DTYPES, Yardstick, machine, median, once, peak_mebibytes, table, write_section
from torch import Tensor

import mezzotint
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.pipeline import build_denoiser
from mezzotint.training.loop import make_objective
from mezzotint.training.parallel import choose_device


def network_table(yardstick: Yardstick, device: torch.device, batch: int) -> str:
    """Forward and training step of DiT-S/2, by precision, eager and compiled."""
    recipe = mezzotint.load_recipe("dit-s-2-256")
    gmacs = recipe_cost(recipe).gmacs * batch
    rows = []
    fp32_eager = 0.0
    for precision, dtype in DTYPES.items():
        for mode in ("eager", "compiled"):
            torch.manual_seed(0)
            denoiser = build_denoiser(recipe).to(device)
            objective = make_objective(recipe, denoiser)
            optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
            if mode == "compiled":
                torch.compiler.reset()
                denoiser.backbone.compile()
            x = torch.randn(batch, 4, 32, 32, device=device)
            y = torch.randint(0, 1000, (batch,), device=device)
            draw = objective.draw(batch, torch.Generator(device).manual_seed(0))
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)

            def forward(denoiser=denoiser, x=x, y=y, draw=draw, autocast=autocast) -> None:  # type: ignore[no-untyped-def]
                with torch.inference_mode(), autocast:
                    denoiser(x, draw.t, y)

            def step(objective=objective, optimizer=optimizer, x=x, y=y, draw=draw, autocast=autocast) -> None:  # type: ignore[no-untyped-def]
                with autocast:
                    loss = objective(x, y, draw)["loss"].mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            denoiser.eval()
            forward_time, forward_speed = yardstick.time(forward, gmacs)
            forward_memory = peak_mebibytes(forward, device)
            denoiser.train()
            step_time, step_speed = yardstick.time(step, 3 * gmacs, repeats=5)
            step_memory = peak_mebibytes(step, device)
            fp32_eager = fp32_eager or step_speed
            rows.append(
                [
                    f"{precision} {mode}",
                    f"{forward_time * 1e3 / batch:.1f} ms",
                    f"{forward_speed / yardstick.speeds[precision]:.0%}",
                    f"{forward_memory:.0f} MiB",
                    f"{step_time * 1e3 / batch:.1f} ms",
                    f"{step_speed / yardstick.speeds[precision]:.0%}",
                    f"{step_memory:.0f} MiB",
                    f"{step_speed / fp32_eager:.2f}×",
                ]
            )
            print(rows[-1], flush=True)
    title = [
        f"DiT-S/2, 32×32×4, batch {batch}",
        "forward, per image",
        "of matmul rate",
        "peak memory",
        "training step, per image",
        "of matmul rate",
        "peak memory",
        "step against fp32 eager",
    ]
    return table(title, rows)


def sampling_table(device: torch.device, batch: int, steps: int = 5) -> str:
    """Network evaluations with and without guidance; a guided one runs both branches in one batch."""
    recipe = mezzotint.load_recipe("dit-s-2-256", [f"sampling.steps={steps}"])
    denoiser = build_denoiser(recipe).to(device).eval()
    y = torch.randint(0, 1000, (batch,), device=device)

    def draw(guidance: Guidance) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(batch, 4, 32, 32, device=device, generator=generator)
        *_, last = recipe.sampling.path(ConditionalModel(denoiser, y, guidance), x, generator)
        return last

    settings = {
        "no guidance": Guidance(scale=1.0),
        "scale 4, all channels": Guidance(scale=4.0),
        "scale 4, 3 of 4 channels": Guidance(scale=4.0, channels=3),
        "scale 4, on t in [0.2, 0.8]": Guidance(scale=4.0, interval=(0.2, 0.8)),
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(4):  # in turn, for the same reason as in Yardstick; the first round warms up
        for name, guidance in settings.items():
            times[name].append(once(lambda g=guidance: draw(g), device))  # type: ignore[misc]
    base = median(times["no guidance"][1:])
    middles = {name: median(values[1:]) for name, values in times.items()}
    rows = [[name, f"{t * 1e3 / batch / steps:.1f} ms", f"{t / base:.2f}×"] for name, t in middles.items()]
    return table([f"DDPM, {steps} steps, batch {batch}, fp32 eager", "a step, per image", "against no guidance"], rows)


def main() -> None:
    """Measure and print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="Markdown file whose section for this kind of device is replaced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="images at a time; default 8 on a CPU, 128 on a GPU")
    options = parser.parse_args()
    device = choose_device(options.device)
    batch = options.batch or (128 if device.type == "cuda" else 8)
    yardstick = Yardstick(device)
    rates = [[name, f"{speed * yardstick.rate:,.1f} GMAC/s"] for name, speed in yardstick.speeds.items()]
    text = "\n".join(
        [
            f"Measured on {machine(device)}.\n",
            table(["matrix product", "rate"], rates),
            network_table(yardstick, device, batch),
            sampling_table(device, max(1, batch // 2)),
        ]
    )
    print(text)
    if options.write is not None:
        write_section(options.write, "CUDA" if device.type == "cuda" else "CPU", Path(__file__).name, text)


if __name__ == "__main__":
    main()
