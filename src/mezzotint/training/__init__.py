"""Training: the loop, and what it needs around it."""

from mezzotint.training.loop import resume, train

__all__ = ["resume", "train"]
