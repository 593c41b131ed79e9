"""DiT-S/2 against this machine's own matrix-multiply rate: forward, training step, sampling. `make bench` runs it.

Everything is measured in one process, so its ratios compare like with like; absolute times are this machine's. Rates
count multiply-adds (GMAC/s), as the papers do. `--write FILE` puts the tables into a Markdown file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mezzotint
from mezzotint.evaluation.cost import recipe_cost
from mezzotint.files import write_text
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.pipeline import build_denoiser
from mezzotint.training.loop import make_objective
from mezzotint.training.parallel import choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, finished."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


class Yardstick:
    """A large square matrix product on random data: what this machine can do, measured beside what it does.

    Shared machines change speed by the second, so every work is timed between two fp32 products, and its speed is the
    median, over such triples, of its multiply-adds per second over theirs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.n = 8192 if device.type == "cuda" else 2048
        self.operands = {
            name: tuple(torch.randn(self.n, self.n, device=device).to(dtype) for _ in range(2))
            for name, dtype in DTYPES.items()
        }
        self.speeds = {name: self.time(lambda n=name: self.product(n), self.n**3 / 1e9)[1] for name in DTYPES}  # type: ignore[misc]
        self.rate = self.n**3 / 1e9 / median([once(self.product, device) for _ in range(9)])

    def product(self, dtype: str = "fp32") -> Tensor:
        a, b = self.operands[dtype]
        return a @ b

    def time(self, work: Callable[[], object], gmacs: float, repeats: int = 7) -> tuple[float, float]:
        """Median seconds of one call of `work`, after two warm-up calls, and its median speed in fp32 products."""
        once(work, self.device), once(work, self.device)
        times, speeds = [], []
        for _ in range(repeats):
            before, middle, after = (once(w, self.device) for w in (self.product, work, self.product))
            times.append(middle)
            speeds.append(gmacs / middle / (self.n**3 / 1e9) * (before + after) / 2)
        return median(times), median(speeds)


def peak_mebibytes(work: Callable[[], object], device: torch.device) -> float:
    """Highest memory of one call above what was held before it; NaN where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls freed, or it would hide this one's need
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark VmHWM
        before = _status("VmRSS")
        work()
        return (_status("VmHWM") - before) / 2**10
    except OSError:
        return float("nan")


def _status(key: str) -> int:
    """A figure of /proc/self/status in KiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def machine(device: torch.device) -> str:
    """One line on what the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        try:
            text = Path("/proc/cpuinfo").read_text()
            model = re.search(r"model name\s*: (.*)", text)
            has = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in text]
            name = f"{model[1] if model else platform.processor()} ({', '.join(has) or 'no AVX-512'})"
        except OSError:
            name = platform.processor()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


def table(title: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [title, ["---"] * len(title), *rows]]
    return "\n".join(lines) + "\n"


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
        section = "CUDA" if device.type == "cuda" else "CPU"
        begin, end = f"<!-- {section} begin: written by benchmarks/dit.py -->", f"<!-- {section} end -->"
        page = options.write.read_text(encoding="utf-8")
        head, _, rest = page.partition(begin)
        if not rest:
            raise SystemExit(f"{options.write} has no line {begin!r} to write after")
        write_text(options.write, f"{head}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
