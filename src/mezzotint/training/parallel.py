"""Processes and devices, applied to a model from outside. No other file mentions ranks, except to slice a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mezzotint.devices import check_device
from mezzotint.errors import MezzotintError
from mezzotint.locks import locked

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among its equals: rank in 0..size-1, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module, *, partial: bool = False) -> nn.Module:
        """`module` with its gradients averaged over all processes during backward; `partial`: not all take part."""
        if self.size == 1:
            return module
        on_gpu = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            module, device_ids=on_gpu, broadcast_buffers=False, find_unused_parameters=partial
        )

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.size == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def of_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, on every process."""
        box = [make() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return cast(T, box[0])

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def locked_by(here: World, folder: Path) -> Iterator[None]:
    """`locked`, by the main process for all of them; every process calls it, and raises where the main one does."""
    problem = ""
    with ExitStack() as stack:
        if here.is_main:
            try:
                stack.enter_context(locked(folder))
            except MezzotintError as error:
                problem = str(error)
        if here.any(bool(problem)):
            raise MezzotintError(problem or f"{folder} cannot be used; see the first process's message")
        yield


def rank_and_size() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun tells; (0, 1) without it.

    Raises `MezzotintError` where RANK and WORLD_SIZE do not say both.
    """
    rank, size = _variable("RANK", -1), _variable("WORLD_SIZE", -1)
    if (rank, size) in ((-1, -1), (-1, 1)):
        return 0, 1
    if not 0 <= rank < size:
        shown = " and ".join(f"{name}={os.environ.get(name, '')}" for name in ("RANK", "WORLD_SIZE"))
        raise MezzotintError(
            f"the environment says {shown}; expected both, the first below the second, as torchrun sets them, or "
            "neither: unset them for a single process"
        )
    return rank, size


def _variable(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not (value.isascii() and value.isdigit()):
        raise MezzotintError(f"the environment says {name}={value}; expected a number, as torchrun sets it")
    return int(value)


def is_main_process() -> bool:
    """Whether this is the only process, or torchrun's first."""
    return rank_and_size()[0] == 0


def choose_device(name: torch.device | str = "auto") -> torch.device:
    """The device of this name; auto is this process's GPU where there is one, else the CPU.

    Raises `MezzotintError` where the device does not exist.
    """
    return check_device(name, _variable("LOCAL_RANK", 0))


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the other processes when started by torchrun (gloo on CPUs, nccl on GPUs); alone otherwise.

    Raises `MezzotintError` as `choose_device` and `rank_and_size` do, and where the processes cannot meet.
    """
    here = choose_device(device)
    if rank_and_size()[1] == 1:
        yield World(0, 1, here)
        return
    if here.type == "cuda":
        torch.cuda.set_device(here)
    try:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:  # no MASTER_ADDR or MASTER_PORT, or nobody there
        reason = str(error).strip().splitlines()[0]
        raise MezzotintError(
            f"the {rank_and_size()[1]} processes cannot meet ({reason}); start them by torchrun, or unset RANK and "
            "WORLD_SIZE for a single one"
        ) from None
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()
