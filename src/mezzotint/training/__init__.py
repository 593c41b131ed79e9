"""Training: the loop, and what it needs around it."""

from mezzotint.training.loop import train

__all__ = ["train"]
