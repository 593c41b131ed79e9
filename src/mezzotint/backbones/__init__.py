"""Networks: (x, t, condition) in, tensor out. They know nothing of diffusion, ranks or devices."""

from mezzotint.backbones.diffussm import DIFFUSSM_CONFIGS, DiffuSSM
from mezzotint.backbones.dit import DIT_CONFIGS, DiT

__all__ = ["DIFFUSSM_CONFIGS", "DIT_CONFIGS", "DiT", "DiffuSSM"]
