"""Networks: (x, t, condition) in, tensor out. They know nothing of diffusion, ranks or devices."""

from mezzotint.backbones.diffussm import DIFFUSSM_CONFIGS, DiffuSSM
from mezzotint.backbones.dit import DIT_CONFIGS, DiT
from mezzotint.backbones.nested import MDM_CONFIGS, NestedUNet
from mezzotint.backbones.unet import UNet

__all__ = ["DIFFUSSM_CONFIGS", "DIT_CONFIGS", "MDM_CONFIGS", "DiT", "DiffuSSM", "NestedUNet", "UNet"]
