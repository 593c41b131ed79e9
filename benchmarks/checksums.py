"""What verifying costs: digests against each other, and weights and a training state read with and without.

The files are of random numbers, in a temporary folder, and in memory when they are read (a disk would hide the cost).
All is measured in one process, in turn, so ratios compare like with like; rates are this machine's.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import machine, median, once, table
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.files import READ_SIZE, file_checksum, read_tensors, save_tensors
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.parallel import World

CPU = torch.device("cpu")


def seconds(work: Callable[[], object]) -> float:
    return median([once(work, CPU) for _ in range(7)])


def read(file: Path) -> None:
    """Read a file to its end and keep nothing."""
    chunk = bytearray(READ_SIZE)
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(chunk):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=512)
    size = parser.parse_args().mebibytes
    torch.set_num_threads(1)
    tensors = {f"layer.{i}": torch.randn(4, 2**16) for i in range(size)}
    network = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def copied(read: Callable[[], dict[str, Tensor]]) -> None:
        for name, tensor in read().items():
            network[name].copy_(tensor)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_tensors(tensors, file, {})
        states = Checkpoints(Path(folder) / "state", World(0, 1, CPU), 1)
        states.save(1, {"weights": tensors})
        content, reading = file.read_bytes(), seconds(partial(read, file))
        times = {"reading": reading, "zlib.crc32": seconds(partial(zlib.crc32, content))}
        times |= {name: seconds(partial(hashlib.new, name, content)) for name in ("sha256", "sha1", "blake2b")}
        times["reading and zlib.crc32"] = seconds(partial(file_checksum, file))
        rows = [[name, f"{size / 1024 / time:.1f}", f"{time / reading:.1f}"] for name, time in times.items()]
        print(machine(CPU), table(["", "GiB/s", "of reading"], rows), sep="\n\n")
        plain = seconds(partial(copied, lambda: load_file(file)))
        print(f"weights read into a network: {seconds(partial(copied, lambda: read_tensors(file)[0])) / plain:.2f}")
        loading = seconds(lambda: states.load(1, {"weights": network}))  # of the newest state, which `latest` verified
        verifying = seconds(states.latest)
        print(f"a training state read into a network: {(verifying + loading) / loading:.2f}")


if __name__ == "__main__":
    main()
