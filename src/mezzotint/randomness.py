"""Seeds that are a function of what they are for: any draw can be repeated without replaying those before it."""

from __future__ import annotations

import operator

import torch

from mezzotint.errors import MezzotintError, shortened


def check_seed(seed: int) -> int:
    """`seed`; raises `MezzotintError` unless it fits 64 bits, beyond which two seeds would give the same numbers."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise MezzotintError(f"the seed is {shortened(seed)}; expected a whole number, 0 to 2^64 - 1") from None
    if not 0 <= seed < 2**64:
        shown = seed if seed.bit_length() <= 64 else f"a number of {seed.bit_length()} bits"
        raise MezzotintError(f"the seed is {shown}; expected 0 to {2**64 - 1}, which is 2^64 - 1")
    return seed


def mix(*parts: int) -> int:
    """A 64-bit seed from integers (splitmix64 over them in turn): neighbouring inputs give unrelated seeds.

    Raises `MezzotintError` as `check_seed` does.
    """
    z = 0
    for part in parts:
        z = (z + check_seed(part) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return z


def generator_for(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` seeded by `mix(*parts)`."""
    return torch.Generator(device).manual_seed(mix(*parts))
