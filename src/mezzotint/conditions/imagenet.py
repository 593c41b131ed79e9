"""The names of ImageNet's 1,000 classes."""

from __future__ import annotations


def imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 class names of ILSVRC 2012 in the order of their labels, as torchvision ships them (BSD licence).

    Two classes are called cardigan: 264, the dog, and 474, the garment.
    """
    from torchvision.models import ResNet50_Weights  # seconds to import

    return tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
