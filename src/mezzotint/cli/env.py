"""``mezzotint env``."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import mezzotint
from mezzotint.cli.options import Json
from mezzotint.cli.tables import Table, print_json, print_table


def env(as_json: Json = False) -> None:
    """Show versions, devices and folders: what a bug report needs."""
    found = environment()
    if as_json:
        return print_json(found)
    print_table(Table(["", ""], [*_rows(found)], prose=True))


def environment() -> dict[str, Any]:
    """Versions, devices and folders, by what they are of."""
    import torch

    from mezzotint.cache import kept
    from mezzotint.files import cache_folder

    return {
        "mezzotint": {"version": mezzotint.__version__, "commit": commit(Path(mezzotint.__file__).parents[2])},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "processor": {
            "name": processor().get("model name", platform.processor() or platform.machine()),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": _memory(),
            "bf16": _processor_bf16(processor().get("flags", "").split()),
        },
        "cuda": torch.version.cuda,
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "cache": {"folder": str(cache_folder()), "bytes": sum(one.bytes for one in kept().values())},
    }


def commit(root: Path) -> str | None:
    """The git commit of the checkout `root`, with a word on changes; None where it is none."""
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
        if head.returncode == 0:
            return head.stdout.strip() + (", with changes" if changed.stdout.strip() else "")
    return None


def packages() -> dict[str, dict[str, str | None]]:
    """What mezzotint needs and what its extras do: {name: {"version": None where it is not installed, "extra"}}."""
    found: dict[str, dict[str, str | None]] = {}
    for line in requires("mezzotint") or []:
        name = re.split(r"[^\w.-]", line)[0]
        extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
        if name == "mezzotint" or (extra and extra[1] == "dev"):
            continue
        found[name] = {"version": None, "extra": extra[1] if extra else None}
        with suppress(PackageNotFoundError):
            found[name]["version"] = version(name)
    return found


def processor() -> dict[str, str]:
    """What Linux says of the first core."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return {}


def _processor_bf16(flags: list[str]) -> str | None:
    """Which instructions for bfloat16 there are."""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "Arm"}
    return next((word for flag, word in known.items() if flag in flags), None)


def _memory() -> int | None:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _device(number: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(number)
    return {
        "name": f"cuda:{number}",
        "model": about.name,
        "memory_bytes": about.total_memory,
        "compute_capability": f"{about.major}.{about.minor}",
        "bf16": about.major >= 8,
    }


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from mezzotint.files import readable_size

    own, cpu = found["mezzotint"], found["processor"]
    rows = [
        ("mezzotint", own["version"] + (f" (git {own['commit']})" if own["commit"] else "")),
        ("Python", found["python"]),
        ("platform", found["platform"]),
        ("processor", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads used"),
        ("memory", readable_size(cpu["memory_bytes"] or 0)),
        ("bf16 on it", f"by {cpu['bf16']}" if cpu["bf16"] else "no instructions for it: slower than fp32"),
        ("CUDA of torch", found["cuda"] or "none"),
    ]
    for device in found["devices"]:
        bf16 = "bf16" if device["bf16"] else "no bf16"
        rows.append((device["name"], f"{device['model']}, {readable_size(device['memory_bytes'])}, {bf16}"))
    if not found["devices"]:
        rows.append(("GPUs", "none"))
    rows.append(("cache", f"{found['cache']['folder']}, {readable_size(found['cache']['bytes'])}"))
    for name, about in found["packages"].items():
        missing = f"not installed (pip install 'mezzotint[{about['extra']}]')" if about["extra"] else "not installed"
        rows.append((name, about["version"] or missing))
    return rows
