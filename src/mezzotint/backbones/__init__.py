"""Networks: (x, t, condition) in, tensor out. They know nothing of diffusion, ranks or devices."""

from mezzotint.backbones.dit import DIT_CONFIGS, DiT

__all__ = ["DIT_CONFIGS", "DiT"]
