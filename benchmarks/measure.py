"""What the benchmarks share: clocks, this machine's own speed, and tables written into Markdown pages."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.files import write_text

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


def write_section(page: Path, section: str, script: str, text: str) -> None:
    """Replace what stands between the comments ``<!-- section begin: written by benchmarks/script -->`` and ``end``."""
    begin, end = f"<!-- {section} begin: written by benchmarks/{script} -->", f"<!-- {section} end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    if not rest:
        raise SystemExit(f"{page} has no line {begin!r} to write after")
    write_text(page, f"{head}{begin}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}")
